"""Makes the two pictures of the README anew: .venv/bin/python .ci/screenshots.py

Needs playwright and a Chromium. The app runs on the demo model, with a database of its own that is thrown away.
"""
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
ASKED = ['How do I keep a conversation when my laptop sleeps?', 'What is the difference between stop and close?',
         'Please search: what is a parley?']


def started(folder):
    "The app on a free port, answering."
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith('ANTHROPIC_')}
    app = subprocess.Popen([sys.executable, ROOT / 'main.py'], cwd=folder,
                           env={**kept, 'PORT': str(port), 'LOG_LEVEL': 'WARNING', 'TITLES': 'off'})
    url = f'http://127.0.0.1:{port}'
    for _ in range(100):
        try: return app, urllib.request.urlopen(url + '/healthz', timeout=1) and url
        except OSError: time.sleep(0.1)
    raise SystemExit('the app does not answer')


def talk(page, url):
    for question in ASKED:
        page.goto(url)
        page.fill('#message', question)
        page.press('#message', 'Enter')
        page.wait_for_selector('#msg-1[data-status=done]')
    page.reload()  # without the last thing that was said about the connection
    page.wait_for_timeout(300)


def picture(browser, url, name, **look):
    page = browser.new_page(**look)
    talk(page, url)
    page.mouse.move(5, 5)
    page.evaluate('document.activeElement.blur(); scrollTo(0, 0)')
    page.wait_for_timeout(300)
    file = ROOT / 'docs' / f'{name}.png'
    page.screenshot(path=file)
    size = file.stat().st_size
    print(file.relative_to(ROOT), f'{size / 1000:.0f} KB')
    if size > 200_000: raise SystemExit('too large for a README')


def main():
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    (ROOT / 'docs').mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        app, url = started(folder)
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu'])
            picture(browser, url, 'desktop', viewport={'width': 1200, 'height': 760}, color_scheme='light',
                    device_scale_factor=1.5)
            picture(browser, url, 'phone', viewport={'width': 390, 'height': 844}, color_scheme='dark', is_mobile=True,
                    has_touch=True, device_scale_factor=2)
            browser.close()
        finally:
            app.terminate()
            app.wait(20)


main()
