"""The tests of Parley, told in the order of main.py.

    python -m pytest                    everything
    python -m pytest -m "not browser"   without Chromium

A fake Claude stands at the HTTP transport, so the real SDK sends, parses and fails; its stream can wait at a `Gate` or
hang on purpose. The app runs under a real uvicorn on a free port, and a `Tab` is a text-only browser: it loads a page,
opens the socket the page asks for and applies the fragments as htmx would. Nothing is replaced inside `main`.
SEED=n repeats a run of the chaos and crash tests; n is printed when one of them fails.
"""
import ast
import asyncio
import base64
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import gzip
import html.parser
import http.server
import importlib.util
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import httpx
import httpx2
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from starlette.routing import Mount, Route, WebSocketRoute
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import main

SEED = int(os.environ.get('SEED', 20261122))
DEADLINE = 15           # seconds: the longest that any single wait of a test may take
FRAME = main.Settings().frame_seconds      # as it is by default; most tests need not wait for so many
LIVE, ENDED = 'streaming', {'done', 'stopped', 'interrupted', 'failed'}
SOURCE = Path(main.__file__).resolve()
number = itertools.count(1).__next__
browser_test = pytest.mark.browser


CORPUS = json.loads((SOURCE.parent / '.ci' / 'hostile.json').read_text())

def spelled(case, most=2_000):
    "The text of a case of the corpus; what repeats does so `most` times at most."
    text = case['payload']
    if case.get('enc') == 'repeat':
        before, unit, times, after = json.loads(text)
        text = before + unit * min(times, most) + after
    return text.replace('{{LIVE_ID}}', 'composer')


# ---- The fake Claude: events of the Messages API, at the transport or behind a real socket --------------------------

def event(kind, **data):
    return f'event: {kind}\ndata: {json.dumps({"type": kind, **data})}\n\n'.encode()

def delta(text): return event('content_block_delta', index=0, delta={'type': 'text_delta', 'text': text})

def end(reason='end_turn'):
    stop = {'stop_reason': reason, 'stop_sequence': None}
    return (event('content_block_stop', index=0) + event('message_delta', delta=stop, usage={'output_tokens': 9})
            + event('message_stop'))

def error(kind): return event('error', error={'type': kind, 'message': 'canary-of-the-upstream'})

START = (event('message_start', message={
    'id': 'msg_1', 'type': 'message', 'role': 'assistant', 'model': 'claude-test', 'content': [], 'stop_reason': None,
    'stop_sequence': None, 'usage': {'input_tokens': 3, 'output_tokens': 1}})
    + event('content_block_start', index=0, content_block={'type': 'text', 'text': ''}))
PING = event('ping')
HANG = object()         # the stream stays open and says nothing more


class Gate:
    "The stream waits here until the test opens it."
    def __init__(self): self.opened = concurrent.futures.Future()
    def open(self): self.opened.set_result(None)


@dataclasses.dataclass
class Answer:
    """One HTTP answer: text is sent as deltas, a tuple of text in one piece, bytes as they are, a number waits so many
    seconds, an exception breaks the connection. `before` may be an exception, a Gate or HANG: no headers until then."""
    steps: list
    status: int = 200
    headers: dict = dataclasses.field(default_factory=dict)
    before: object = None

def paced(words, pause): return [step for word in words for step in (word, pause)]

def says(*steps, stop='end_turn'): return Answer([START, *steps, end(stop)])
def raw(*steps, status=200, before=None, **headers):
    return Answer(list(steps), status, {k.replace('_', '-'): v for k, v in headers.items()}, before)
def refuses(status, **headers):
    told = 'too long' if status in (400, 413) else 'canary-of-the-upstream'
    body = json.dumps({'type': 'error', 'error': {'type': 'x_error', 'message': told}}).encode()
    return raw(body, status=status, content_type='application/json', **headers)


class Call:
    def __init__(self, body, headers):
        self.body, self.headers, self.said, self.at = body, headers, '', time.monotonic()
        self.closed = threading.Event()     # the app has let go of the connection

    @property
    def question(self): return words(self.body['messages'][-1]['content'])

    @property
    def questions(self): return [words(m['content']) for m in self.body['messages'] if m['role'] == 'user']

    def encode(self, step):
        if isinstance(step, bytes): return step
        pieces = (step,) if isinstance(step, str) else step
        self.said += ''.join(pieces)
        return b''.join(map(delta, pieces))

def words(content): return content if isinstance(content, str) else ''.join(b.get('text', '') for b in content)


class Upstream(httpx2.AsyncBaseTransport):
    """Claude as the tests need him. `says` and `plays` make a new question with its own answer, or one answer after
    the other for one try after the other; the last one stays. Any other question is answered by its echo."""
    def __init__(self): self.plans, self.calls, self.models, self.title, self.tokens = {}, [], None, says('A title'), None

    def says(self, *steps, stop='end_turn'): return self.plays(says(*steps, stop=stop))

    def plays(self, *answers):
        question = f'question {number()}'
        self.plans[question] = list(answers)
        return question

    def titling(self, question):
        return [c for c in list(self.calls) if question + '\n<' in c.question and c.question.endswith(main.TITLING)]

    def called(self, question): return [c for c in list(self.calls) if question in c.questions[-1:]]

    def listed(self, request):
        "GET /v1/models: nothing there, unless a test has set a list (of pages), bytes or an exception."
        if isinstance(self.models, Exception): raise self.models
        if isinstance(self.models, bytes): return httpx2.Response(200, content=self.models, request=request)
        if self.models is None: return httpx2.Response(404, content=b'<html>', request=request)
        page = int(request.url.params.get('after_id', 0))
        told = {'data': self.models[page], 'has_more': page + 1 < len(self.models), 'last_id': str(page + 1)}
        return httpx2.Response(200, json=told, request=request)

    def answer(self, body, headers):
        call = Call(json.loads(body), headers)
        question = call.questions[-1]
        tries = len(self.called(question))
        self.calls.append(call)
        plan = self.plans.get(question) or [says('You said: ' + question[:200])]
        if question.endswith(main.TITLING): plan = [self.title]
        return call, plan[min(tries, len(plan) - 1)]

    async def handle_async_request(self, request):
        if request.method == 'GET': return self.listed(request)
        if request.url.path.endswith('/count_tokens'):
            return httpx2.Response(200, content=self.tokens if isinstance(self.tokens, bytes) else
                                   json.dumps({'input_tokens': self.tokens}).encode(), request=request)
        call, answer = self.answer(await request.aread(), request.headers)
        try: await wait(answer.before)
        except BaseException:
            call.closed.set()
            raise
        headers = {'content-type': 'text/event-stream', **answer.headers}
        return httpx2.Response(answer.status, headers=headers, stream=Body(call, answer.steps), request=request)


class Body(httpx2.AsyncByteStream):
    def __init__(self, call, steps): self.call, self.steps = call, steps

    async def __aiter__(self):
        for step in self.steps:
            if isinstance(step, (str, bytes, tuple)): yield self.call.encode(step)
            else: await wait(step)

    async def aclose(self): self.call.closed.set()

async def wait(step):
    if isinstance(step, BaseException): raise step
    if isinstance(step, (int, float)): await asyncio.sleep(step)
    if step is HANG: await asyncio.Event().wait()
    if isinstance(step, Gate): await asyncio.shield(asyncio.wrap_future(step.opened))


class Wire(http.server.ThreadingHTTPServer):
    "The same Claude behind a real socket, for servers in a process of their own."
    daemon_threads, block_on_close = True, False

    def __init__(self, upstream):
        super().__init__(('127.0.0.1', 0), Talk)
        self.upstream, self.url = upstream, f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': .05}, daemon=True).start()

    def handle_error(self, *_): pass        # a killed client breaks the pipe; that is the point

class Talk(http.server.BaseHTTPRequestHandler):
    timeout = 60

    def log_message(self, *_): pass

    def do_POST(self):
        call, answer = self.server.upstream.answer(self.rfile.read(int(self.headers['content-length'])), self.headers)
        self.send_response(answer.status)
        for header in {'content-type': 'text/event-stream', **answer.headers}.items(): self.send_header(*header)
        self.end_headers()
        try:
            for step in answer.steps: self.play(call, step)
        finally: call.closed.set()

    def play(self, call, step):
        if isinstance(step, Gate): step.opened.result(60)
        elif step is HANG: self.connection.recv(1)
        elif isinstance(step, (int, float)): time.sleep(step)
        else: self.wfile.write(call.encode(step))


# ---- The people: a tab that applies fragments, a conversation, a person with a cookie jar ---------------------------

VOID = set('area base br col embed hr img input link meta source track wbr'.split())

class Node:
    def __init__(self, tag='', attrs=(), parent=None):
        self.tag, self.attrs, self.parent, self.children = tag, dict(attrs), parent, []

    def walk(self):
        yield self
        for child in self.children:
            if isinstance(child, Node): yield from child.walk()

    def all(self, test): return [node for node in self.walk() if test(node)]
    def find(self, id): return next(iter(self.all(lambda n: n.attrs.get('id') == id)), None)

    @property
    def text(self):
        "Its words, without those of a fold, which are the page's own."
        return ''.join(c if isinstance(c, str) else c.text for c in self.children) if self.tag != 'summary' else ''

    def put(self, children, at=None):
        at = len(self.children) if at is None else at
        self.children[at:at] = children
        for child in children:
            if isinstance(child, Node): child.parent = self


class Page(html.parser.HTMLParser):
    "A document as a tree, changed by out-of-band fragments the way htmx 2 changes it."
    def __init__(self, text):
        super().__init__()
        self.root = self.here = Node()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        node = Node(tag, attrs, self.here)
        self.here.children.append(node)
        if tag not in VOID: self.here = node

    def handle_endtag(self, tag):
        node = self.here
        while node.parent and node.tag != tag: node = node.parent
        if node.parent: self.here = node.parent

    def handle_data(self, data): self.here.children.append(data)

    def apply(self, fragment):
        for node in fragment.children:
            if not isinstance(node, Node): continue
            style, _, selector = node.attrs.get('hx-swap-oob', 'true').partition(':')
            place, _, nth = selector.removeprefix('#').partition('>:nth-child(')
            target = self.root.find(place or node.attrs.get('id'))
            if target and nth: target = [n for n in target.children if isinstance(n, Node)][int(nth[:-1]) - 1]
            assert target, f'htmx:oobErrorNoTarget {node.attrs}'
            self.swap(style, target, node)

    def swap(self, style, target, node):
        outer, here = target.parent, target.parent.children.index(target)
        if style in ('innerHTML', 'textContent'): target.children.clear()
        if style in ('true', 'outerHTML', 'delete'): outer.children.pop(here)
        match style:
            case 'true' | 'outerHTML': outer.put([node], here)
            case 'innerHTML' | 'textContent' | 'beforeend': target.put(node.children)
            case 'afterbegin': target.put(node.children, 0)
            case 'beforebegin': outer.put(node.children, here)
            case 'afterend': outer.put(node.children, here + 1)
            case 'delete': pass
            case _: raise AssertionError(f'unknown swap {style}')


class Tab:
    "One open page with its socket. `code` is the close code, None while the socket is open or when there is none."
    def __init__(self, chat, html, idx=None):
        self.page, self.code, self.socket, self.frames = Page(html), None, None, 0
        bubbles = self.page.root.all(lambda n: n.attrs.get('data-role') == 'assistant')
        self.idx = int(bubbles[-1].attrs['id'].removeprefix('msg-')) if idx is None else idx
        self.status = self.bubble.attrs.get('data-status')
        if path := self.bubble.attrs.get('ws-connect'): self.socket = chat.person.socket(path)

    @property
    def bubble(self): return self.page.root.find(f'msg-{self.idx}')
    @property
    def text(self): return plain(self.page.root.find(f'content-{self.idx}').text)
    @property
    def said(self): return plain(self.page.root.text)

    def read(self, timeout=DEADLINE):
        "Applies one frame; False when the socket is closed."
        if self.code is not None or not self.socket: return False
        try: frame = self.socket.recv(timeout)
        except ConnectionClosed as closed:
            self.code = closed.rcvd.code if closed.rcvd else 1006
            return False
        self.frames, fragment = self.frames + 1, Page(frame).root
        for node in fragment.walk(): self.status = node.attrs.get('data-status', self.status)
        self.page.apply(fragment)
        return True

    def until(self, words):
        while plain(words) not in self.said: assert self.read(), f'closed {self.code} before {words!r}: {self.said}'
        return self

    def ends(self):
        late = time.monotonic() + 2 * DEADLINE
        while self.read(): assert time.monotonic() < late, 'the socket never closes'
        return self

    def drop(self):
        "The network goes away: no close frame."
        if not self.socket: return
        with contextlib.suppress(OSError): self.socket.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.code = 1006

def plain(text): return ' '.join(text.split())
def versions(chat, idx): return named_in(chat, idx, 'message')
def named_in(chat, idx, name):
    return [n.attrs['value'] for n in Page(chat.page()).root.find(f'msg-{idx}').all(lambda n: n.attrs.get('name') == name)]
def id_of(chat, idx): return named_in(chat, idx, 'at')[-1]
def sibling(chat, idx): return named_in(chat, idx, 'message')[0]
def bubbles(html): return Page(html).root.all(lambda n: n.attrs.get('data-role'))
def a_sentence(answer): return re.search(r'\w+ \w+ \w+', Page(answer.text).root.text)


class Chat:
    "A conversation as one person sees it; `html` is the last fragment the server answered with, `new` if it still is."
    def __init__(self, person, id, html): self.person, self.id, self.html, self.new = person, id, html, bool(html)

    def post(self, path='', **form):
        self.new = False
        return self.person.post(f'/c/{self.id}{path}', **form)

    def say(self, message, path='', **form):
        answer = self.post(path, message=message, **form)
        assert answer.status_code == 200, (answer.status_code, answer.text)
        self.html, self.new = answer.text, True
        return self

    def retry(self): return self.say(None, '/retry')

    def stop(self): return self.post('/stop')
    def page(self): return self.person.get(f'/c/{self.id}').text
    def tab(self, idx=None): return Tab(self, self.page(), idx)         # a fresh load
    def watch(self): return Tab(self, self.html)                        # what htmx does with the answer of a POST

    @property
    def messages(self): return self.person.get(f'/c/{self.id}.json').json()['messages']
    @property
    def reply(self): return self.messages[-1]

    def over(self): return (self.ended(), self)[1]

    def ended(self):
        "The reply once it has ended: the last row as it is saved."
        assert (self.watch() if self.new else self.tab()).ends().code in (None, 1000)
        assert (reply := self.reply)['status'] in ENDED
        return reply


LOCAL = {'trust_env': False, 'verify': False}      # plain HTTP: to read all certificates would take most of the time

class Person:
    "A browser profile: a cookie jar and the Origin of the page it is on."
    def __init__(self, url):
        self.url = url
        self.http = httpx.Client(base_url=url, headers={'Origin': url}, timeout=DEADLINE, **LOCAL)

    def get(self, path, **headers): return self.http.get(path, headers=headers)

    def post(self, path, htmx=True, headers=(), **form):
        headers = {**({'HX-Request': 'true'} if htmx else {}), **dict(headers)}
        return self.http.post(path, data=form, headers=headers)

    def ask(self, message, **form):
        answer = self.post('/', message=message, **form)
        assert answer.status_code == 200, (answer.status_code, answer.text)
        return Chat(self, answer.headers['HX-Push-Url'].rpartition('/')[2], answer.text)

    def socket(self, path, origin=..., **options):
        cookie = '; '.join(f'{c.name}={c.value}' for c in self.http.cookies.jar)
        return connect(self.url.replace('http', 'ws', 1) + path, origin=self.url if origin is ... else origin,
                       additional_headers={'Cookie': cookie} if cookie else None, proxy=None, max_size=None,
                       ping_interval=None, open_timeout=DEADLINE, close_timeout=1, legacy=True, **options)


class Site:
    "The app under a real uvicorn in a thread, on a free port, with the fake Claude."
    def __init__(self, folder, upstream, demo=False, **settings):
        listener = socket.create_server(('127.0.0.1', 0))
        port = listener.getsockname()[1]
        self.url, self.upstream, self.db = f'http://127.0.0.1:{port}', upstream, folder / 'parley.db'
        self.settings = dataclasses.replace(main.Settings.read({}), **{
            'api_key': 'test', 'titles': 'off', 'database_url': f'sqlite:///{self.db}', 'port': port, 'drain_seconds': 0,
            'frame_seconds': .005, **settings})
        self.door = main.create_app(self.settings, http=None if demo else httpx2.AsyncClient(transport=upstream))
        self.server = uvicorn.Server(main.serving(self.door))
        self.thread = threading.Thread(target=self.server.run, kwargs={'sockets': [listener]}, daemon=True)
        self.thread.start()
        assert eventually(lambda: self.server.started or not self.thread.is_alive()) and self.server.started

    def person(self): return Person(self.url)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive(), 'the server does not end'


@pytest.fixture(scope='module')
def upstream(): return Upstream()

@pytest.fixture(scope='module')
def new_site(tmp_path_factory, upstream):
    "A site with settings of its own."
    sites = []
    def start(folder=None, **settings):
        sites.append(Site(folder or tmp_path_factory.mktemp('site'), upstream, **settings))
        return sites[-1]
    yield start
    for site in sites: site.server.should_exit = True       # all at once: to end takes each one a moment
    for site in sites: site.stop()

@pytest.fixture(scope='module')
def site(new_site): return new_site()

@pytest.fixture(scope='module')
def impatient(new_site):
    "Half a second of silence, a second and a half of pings, and it gives up; a message has 1000 characters."
    return new_site(idle_seconds=.5, stall_seconds=1.5, max_message_chars=1000).person()

@pytest.fixture
def me(site): return site.person()

@pytest.fixture(autouse=True)
def nothing_goes_wrong_unseen(caplog):
    "No handler may end in a traceback and no task may die unheard, whatever a test looks at."
    yield
    bad = [r.getMessage() for r in caplog.get_records('call') if r.name in ('uvicorn.error', 'asyncio')
           and (r.exc_info or r.levelno >= logging.ERROR)]
    assert not bad, bad


# ---- Settings -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, value, read', [
    ('MODEL', ' claude-x\n', 'claude-x'), ('MAX_TOKENS', '77\n', 77), ('PORT', ' 8080 ', 8080), ('PORT', '  ', 5001),
    ('HOST', ' localhost ', 'localhost'), ('DATABASE_URL', 'sqlite:///x/y.db\n', 'sqlite:///x/y.db'),
    ('DRAIN_SECONDS', '9', 9), ('IDLE_SECONDS', '7', 7), ('STALL_SECONDS', '8', 8), ('MAX_MESSAGE_CHARS', '10', 10), ('MONTHLY_USD', '2.5', 2.5),
    ('SESSION_SECRET', 's \n', 's'), ('ANTHROPIC_API_KEY', 'sk-ant-x\r\n', 'sk-ant-x'),
    ('ANTHROPIC_AUTH_TOKEN', ' t ', 't'), ('ANTHROPIC_BASE_URL', ' http://127.0.0.1:1\n', 'http://127.0.0.1:1')])
def test_a_setting_is_read_and_stripped(name, value, read):
    settings = main.Settings.read({name: value})
    assert getattr(settings, name.removeprefix('ANTHROPIC_').lower()) == read

def test_every_setting_has_a_default_that_works():
    s = main.Settings.read({})
    assert (s.host, s.port, s.database_url) == ('127.0.0.1', 5001, 'sqlite:///data/parley.db')
    assert (s.drain_seconds, s.idle_seconds, s.stall_seconds, s.max_message_chars) == (3, 60, 600, 200_000)
    assert s.model and s.max_tokens > 0 and not s.api_key and not s.auth_token

@pytest.mark.parametrize('name, value', [
    ('PORT', 'many'), ('PORT', '70000'), ('PORT', '-1'), ('MAX_TOKENS', 'ten'), ('MAX_TOKENS', '0'),
    ('IDLE_SECONDS', 'soon'), ('STALL_SECONDS', '-1'), ('DRAIN_SECONDS', 'nan'), ('MAX_MESSAGE_CHARS', '1e9'),
    ('LOG_LEVEL', 'loud'), ('DATABASE_URL', 'postgres://me:canary@host/db'), ('DATABASE_URL', 'canary'),
    ('ANTHROPIC_BASE_URL', 'canary'), ('PRICES', 'canary'), ('PRICES', '{"canary": [1, 2]}'), ('PRICES', '[1]'),
    ('PRICES', '{"canary": [1, 2, 3, -4]}'), ('PRICES', '{"canary": [1, 2, 3, "x"]}'),
    ('ANTHROPIC_API_KEY', 'sk-ant-\ncanary'), ('ANTHROPIC_AUTH_TOKEN', 'tok\x00canary')])
def test_a_setting_that_cannot_be_read_ends_the_start_in_one_line(name, value):
    with pytest.raises(SystemExit) as ended: main.Settings.read({name: value})
    said = str(ended.value)
    assert name in said and 'canary' not in said and '\n' not in said.strip()

def test_settings_do_not_print_their_secrets():
    for name, secret in [*((n, 'canary') for n in ('ANTHROPIC_API_KEY', 'ANTHROPIC_AUTH_TOKEN', 'SESSION_SECRET')),
                         ('APP_PASSWORD', PASSWORD), ('APP_PASSWORD_HASH', HASHED)]:
        assert secret not in repr(main.Settings.read({name: secret}))


# ---- Store: what is on the disk, seen from another process ----------------------------------------------------------

LOOK = 'import json,sqlite3,sys; db=sqlite3.connect(f"file:{sys.argv[1]}?mode=ro",uri=True); ' \
       'print(json.dumps(db.execute(sys.argv[2]).fetchall()))'

def python(code, *args):
    "What another process prints: two libraries of SQLite on one file in one process would break its locks."
    return subprocess.check_output([sys.executable, '-S', '-c', code, *map(str, args)], timeout=DEADLINE).decode()

def rows(db, sql): return json.loads(python(LOOK, db, sql))

def test_both_rows_exist_before_the_first_byte(site, me, upstream):
    chat = me.ask(upstream.plays(raw(before=HANG)))
    found = rows(site.db, 'select id, parent, idx, role, status, owner from message '
                          f"where conversation = '{chat.id}' order by idx")
    (q, _, *question, owner), (r, parent, *reply, owner_too) = found
    assert parent == q != r and question == [0, 'user', 'done'] and reply == [1, 'assistant', LIVE]
    assert owner and owner == owner_too
    chat.stop()

def test_a_conversation_is_a_chain_of_parents(site, me, upstream):
    chat = me.ask(upstream.says('one')).over().say(upstream.says('two')).over()
    chain = rows(site.db, f"select id,parent from message where conversation='{chat.id}' order by idx")
    assert [parent for _, parent in chain] == [None, *(id for id, _ in chain[:-1])]

def test_a_burst_is_a_few_pieces_and_they_are_folded_at_the_end(new_site, upstream):
    site, gate = new_site(frame_seconds=FRAME), Gate()
    chat = site.person().ask(upstream.says(*[('word ',) * 100] * 20, 'so far ', gate, 'end'))
    chat.tab().until('so far')
    count = f"select count(*) from piece where message in (select id from message where conversation='{chat.id}')"
    assert 0 < rows(site.db, count)[0][0] < 100         # of 2001 deltas
    gate.open()
    assert chat.ended()['content'] == 'word ' * 2000 + 'so far end'
    assert rows(site.db, count) == [[0]]

FIRST_SCHEMA = '''
create table conversation (id text primary key, owner text, title text, leaf integer, created float, updated float);
create table message (
    id integer primary key, conversation text references conversation(id) on update cascade on delete cascade,
    owner text, parent integer, idx integer, role text, content text, status text, note text, model text, key text,
    created float, ended float);
create table piece (message integer references message(id) on update cascade on delete cascade, seq integer, text text,
    primary key (message, seq));
create table session (id text primary key, owner text, password text, created float, seen float);
create index conversation_by_time on conversation (owner, updated desc);
create index message_by_parent on message (parent);
create unique index message_by_key on message (conversation, key);
create unique index first_by_key on message (owner, key) where parent is null;
create index message_running on message (conversation) where status = 'streaming';
pragma user_version = 1;
'''
FIRST_ROWS = '''
insert into conversation values ('one', 'owner', 'Tea “&” <b>', 3, 1.5, 9.25), ('two', 'owner', 'Left', 5, 2, 8);
insert into message values
    (1, 'one', 'owner', null, 0, 'user', 'Why?', 'done', '', '', 'key-1', 1.5, 1.5),
    (2, 'one', 'owner', 1, 1, 'assistant', 'No.', 'stopped', '', 'claude-1', null, 2.5, 3.5),
    (3, 'one', 'owner', 1, 1, 'assistant', 'Because\n\n**so**.', 'done', '', 'claude-1', null, 4.5, 9.25),
    (4, 'two', 'owner', null, 0, 'user', 'And?', 'done', '', '', 'key-1b', 7, 7),
    (5, 'two', 'owner', 4, 1, 'assistant', '', 'streaming', '', 'claude-1', null, 7, null);
insert into piece values (5, 0, 'It was '), (5, 1, 'being written');
insert into session values ('hmac', 'owner', 'hmac too', 1, 2);
'''
TABLES = {'conversation': 'id, owner, title, leaf, created, updated', 'session': 'id, owner, password, created, seen',
          'message': 'id, conversation, owner, parent, idx, role, content, status, note, model, key, created, ended'}

def told(db): return {name: rows(db, f'select {columns} from {name} order by 1') for name, columns in TABLES.items()}

@pytest.fixture
def first_release(tmp_path):
    "A database as the first release left it after a kill."
    (tmp_path / 'parley.db').write_bytes(a_database(FIRST_SCHEMA + FIRST_ROWS))
    return tmp_path / 'parley.db'

def test_a_database_of_the_first_release_is_brought_up_to_date_and_kept_as_it_was(first_release, new_site):
    before, kept = told(first_release), first_release.with_name('parley.db.version-1')
    kept.write_text('not ours to overwrite')
    site = new_site(first_release.parent)
    before['message'][4][6:9] = ['It was being written', 'interrupted', main.STOPPED]
    after = told(site.db)
    assert after['message'][4][-1] and after['message'][4][:-1] == before['message'][4][:-1]
    after['message'][4][-1] = None
    assert after | {'session': before['session']} == before and rows(site.db, 'select count(*) from piece') == [[0]]
    assert rows(site.db, 'pragma user_version') == [[len(main.SCHEMA)]] and kept.read_text() == 'not ours to overwrite'
    copy = kept.with_name('parley.db.version-1.2')
    assert rows(copy, 'pragma user_version') == [[1]] and stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert rows(copy, 'select seq, text from piece') == [[0, 'It was '], [1, 'being written']]
    me = site.person()
    assert [m['content'] for m in Chat(me, 'one', '').messages] == ['Why?', 'Because\n\n**so**.']
    assert Chat(me, 'two', '').retry().ended()['content'] == 'You said: And?'

def test_a_step_that_fails_leaves_the_database_as_it_was(first_release):
    with contextlib.closing(sqlite3.connect(first_release)) as db, db: db.execute('create table known (already)')
    before = told(first_release)
    with pytest.raises(main.Unusable, match='stays as it was'): main.Store(first_release)
    assert rows(first_release, 'pragma user_version') == [[1]] and rows(first_release, 'pragma quick_check') == [['ok']]
    assert told(first_release) == before and rows(first_release, 'select count(*) from piece') == [[2]]
    assert not list(first_release.parent.glob('*.version-*')) and not list(first_release.parent.glob('*.part*'))

@pytest.mark.skipif(not hasattr(resource, 'prlimit'), reason='a full disk is played by prlimit')
def test_a_disk_too_full_for_the_copy_leaves_the_database_as_it_was(first_release):
    low = f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({first_release.stat().st_size // 2},) * 2)\n' \
          f'import main, pathlib\ntry: main.Store(pathlib.Path({str(first_release)!r}))\n' \
          'except main.Unusable as error: print(error)'
    said = subprocess.run([sys.executable, '-c', low], cwd=SOURCE.parent, capture_output=True, text=True).stdout
    assert 'the disk' in said and said.count('\n') == 1
    assert rows(first_release, 'pragma user_version') == [[1]] == rows(first_release, 'select count(*) - 1 from piece')
    assert not list(first_release.parent.glob('*.version-*'))

COMMITS = '''import struct, sys
wal = open(sys.argv[1] + '-wal', 'rb').read(); page, salt = struct.unpack('>I', wal[8:12])[0], wal[16:24]
frames = [wal[at:at + 24] for at in range(32, len(wal) - 23, page + 24)]
print(sum(1 for f in frames if f[8:16] == salt and f[4:8] != bytes(4)))'''

def commits(db): return int(python(COMMITS, db))

def test_all_running_replies_share_one_transaction_a_tick(new_site, upstream):
    site = new_site(frame_seconds=FRAME)
    me, gate, before = site.person(), Gate(), commits(site.db)
    chats = [me.ask(upstream.says(gate, *paced(['tick '] * 300, .002))) for _ in range(8)]
    asked = commits(site.db)
    start = time.monotonic()
    gate.open()
    assert {chat.ended()['content'] for chat in chats} == {'tick ' * 300}
    ticks = (time.monotonic() - start) / .03
    assert before < asked and commits(site.db) - asked <= ticks + 8 * 3      # eight of their own would be 8 * ticks

def listed(site, n=0, **columns):
    "A conversation of one question, written by another process; its id."
    id = columns.setdefault('id', f'made-{number()}')
    row = {'owner': main.OWNER, 'title': id, 'created': time.time(), 'updated': time.time(), 'seen': time.time()} | columns
    names, marks = ', '.join(row), ', '.join('?' * len(row))
    python(FILL_LIST, site.db, json.dumps([f'insert into conversation ({names}) values ({marks})', list(row.values())]))
    return id

OPEN_DB = """import json, sqlite3, sys, time
db = sqlite3.connect(sys.argv[1])
db.create_function('spaced', 1, lambda text: text, deterministic=True)
"""
FILL_LIST = OPEN_DB + """
db.execute(*json.loads(sys.argv[2]))
db.execute("insert into message (conversation, owner, idx, role, content, status, note, model, created, ended) "
           "select id, owner, 0, 'user', 'Hello', 'done', '', '', 1, 1 from conversation where leaf is null")
db.execute("update conversation set leaf = (select id from message where conversation = conversation.id) where leaf is null")
db.commit()"""

MANY_LISTED = OPEN_DB + """
db.executemany("insert into conversation (id, owner, title, created, updated, pinned) values (?, ?, ?, 0, ?, ?)",
               [(f'n{n}', 'owner', f'title {n}', float(n // 3), 5.0 if n % 997 == 0 else None)
                for n in range(int(sys.argv[2]))])
db.commit()"""

def test_pages_of_the_list_join_to_all_of_it_in_order_without_a_sort(tmp_path):
    asyncio.run(page_through(main.Store(tmp_path / 'p.db')))

async def page_through(store):
    python(MANY_LISTED, store.file, '10000')
    ids, pages, after = [], 0, None
    while found := await store.conversations(main.OWNER, after):
        ids += [c.id for c in found[:50]]
        pages, after = pages + 1, found[:50][-1].cursor
    order = sorted(range(10_000), key=lambda n: (n % 997 == 0, n // 3, f'n{n}'), reverse=True)
    assert ids == [f'n{n}' for n in order] and pages == 200 and not await store.conversations('somebody else')
    for where, values in [('', []), ('and pinned is null and (updated, id) < (?, ?)', [9.0, 'n']),
                          ('and (pinned < ? or pinned is null)', [9.0])]:
        plan = ' '.join(str(row) for row in store.db['reads'].q(
            'explain query plan ' + main.LISTED.format(where), [main.OWNER, *values, 51]))
        assert 'conversation_listed' in plan and 'message_running' in plan and not re.search('SCAN|TEMP B-TREE', plan)
    store.close()

def test_what_is_thrown_away_for_ever_goes_a_little_at_a_time(tmp_path):
    asyncio.run(throw_away(main.Store(tmp_path / 'p.db')))

async def throw_away(store):
    question, reply, _ = await store.ask(main.OWNER, None, 'first', 'key', 'test')
    other, *_ = await store.ask(main.OWNER, None, 'second', 'key-2', 'test')
    for n in range(1, 1_200):
        await store.save([], [(reply.id, 'done', '', {})])
        if n % 400 == 0: reply = (await store.retry(main.OWNER, question.conversation, 'test'))[1]
    python(OPEN_DB + 'db.execute(sys.argv[2]); db.commit()', store.file, f"""insert into message (conversation, owner, idx, role, content, status, note, model)
        select '{question.conversation}', 'owner', 9, 'user', 'x', 'done', '', '' from
        (with recursive n(n) as (select 1 union all select n + 1 from n where n < 1200) select n from n)""")
    await store.save([], [(reply.id, 'done', '', {})])
    await store.trash(main.OWNER, question.conversation)
    assert not await store.sweep()
    await store.give_up(main.OWNER, question.conversation)
    assert (await store.trashed(main.OWNER))[1] == 0 and not await store.restore(main.OWNER, question.conversation)
    steps = 0
    while await store.sweep(): steps += 1
    assert steps == 4 and rows(store.file, f"select count(*) from message where conversation != '{other.conversation}'"
                               ) == [[0]] and rows(store.file, 'select id from conversation') == [[other.conversation]]
    store.close()

def test_what_one_verb_reads_is_of_one_moment(tmp_path):
    asyncio.run(read_while_others_write(main.Store(tmp_path / 'p.db')))

async def read_while_others_write(store):
    "Between all statements of a read somebody sends a question."
    asked, reply, _ = await store.ask(main.OWNER, None, 'first', 'key', 'test')
    await store.save([], [(reply.id, 'done', '', {})])
    reader, others = store.db['reads'].conn, []
    def write(cursor, sql, values):
        if sql.lstrip().startswith(('select', 'with')):
            others.append(len(others))
            python(OPEN_DB + """
leaf, = db.execute('select leaf from conversation').fetchone()
db.execute("insert into message (conversation, owner, parent, idx, role, content, status, note, model) select "
           "conversation, owner, id, idx + 1, 'user', 'late', 'done', '', '' from message where id = ?", [leaf])
db.execute('update conversation set leaf = (select max(id) from message)')
db.commit()""", store.file)
        return True
    reader.exec_trace = write
    for _ in range(2):
        found, path = await store.path(main.OWNER, asked.conversation, last=1)
        assert len(path) == 1 and path[0].id == found.leaf and len(others) > 1
        others.clear()
    store.close()

def test_the_database_and_all_beside_it_are_private(new_site, tmp_path):
    site = new_site(tmp_path / 'data')
    site.person().ask('hello').ended()
    assert stat.S_IMODE(os.stat(tmp_path / 'data').st_mode) == 0o700
    files = {f.name: stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / 'data').iterdir()}
    assert 'parley.db' in files and set(files.values()) == {0o600}, files


SAID = {'creme': 'Crème brûlée is nice', 'japan': '日本語のテキスト and more', 'thai': 'ภาษาไทย hello', 'hindi': 'हिन्दी में लिखा',
        'apart': 'e\u0301te\u0301 decomposed', 'marks': "c++ is a foo-bar language, don't worry", 'tower': '東京タワー'}
FOUND = [('creme', 'creme'), ('CRÈME', 'creme'), ('brul', 'creme'), ('brulee nice', 'creme'), ('nice brulee', 'creme'),
         ('"is nice"', 'creme'), ('“is nice” cr', 'creme'), ('"nice is"', ''), ('日本', 'japan'), ('本語', 'japan'), ('語', 'japan'),
         ('日語', ''), ('テキ', 'japan'), ('京', 'tower'), ('タワ', 'tower'), ('ไทย', 'thai'), ('ษา', 'thai'), ('हिन्दी', 'hindi'),
         ('हि', 'hindi'), ('été', 'apart'), ('ete', 'apart'), ('foo-bar', 'marks'), ('c++', 'marks'), ("don't", 'marks'),
         ('-foo', 'marks'), ('col:foo', ''), ('NEAR(foo bar)', ''), ('and mor', 'japan'), ('', ''), ('   ', ''), ('"', ''),
         ('"""', ''), ('*', ''), ('(', ''), ('-', ''), ('foo*', 'marks'), ('foo\0bar', 'marks'), ('zz ' * 500, '')]

@pytest.fixture(scope='module')
def library(tmp_path_factory):
    "A Store with a question and its answer for each text of SAID."
    store = main.Store(tmp_path_factory.mktemp('library') / 'p.db')
    async def fill():
        for name, text in SAID.items():
            _, reply, _ = await store.ask('me', None, name, None, 'm')
            await store.save([main.Piece(reply.id, 0, text)], [(reply.id, 'done', '', {})])
    asyncio.run(fill())
    yield store
    store.close()

def search(store, typed, owner='me'): return asyncio.run(store.search(owner, typed))

@pytest.mark.parametrize('typed, name', FOUND)
def test_words_phrases_and_beginnings_are_found_in_any_script(library, typed, name):
    assert {hit.title for hit in search(library, typed) if hit.role == 'assistant'} == ({name} if name else set())

def test_a_title_comes_before_what_was_said_and_matches_are_marked(library):
    title, question = search(library, 'jap')
    assert (title.message, question.role) == (None, 'user') and title.snippet == '\ue000japan\ue001'
    assert search(library, '本')[0].snippet == '日\ue000本\ue001語のテキスト and more'
    assert not search(library, 'jap', owner='you')

@pytest.mark.parametrize('typed, shown', [
    ('talk', 'A «talk»¹ between two sides².'), ('sides', 'A talk¹ between two «sides»².'),
    ('enemies', 'A talk[¹](<https://example.com/a_(b)1> "Words of all the «enemies» at war')])
def test_a_citation_is_its_number_in_what_was_found(tmp_path, typed, shown):
    sources, store = {}, main.Store(tmp_path / 'cited.db')
    first, second = ({'url': f'https://example.com/a_(b){n}', 'cited_text': 'Words of all the enemies at war, and what they '
                      'said to each other before the truce that was to be kept'} for n in (1, 2))
    text = f'A talk{main.cited(first, sources)} between two sides{main.cited(second, sources)}.'
    asyncio.run(store.ask('me', None, text, None, 'm'))
    found = next(hit for hit in search(store, typed) if hit.message)
    store.close()
    html = main.to_xml(main.Snippet(found)[1])
    assert plain(Page(html.replace('<mark>', '«').replace('</mark>', '»')).root.text).startswith(shown), html

@pytest.mark.parametrize('typed, text, shown', [
    ('tea', 'steam, teams and Téa', 'steam, «tea»ms and «Téa»'), ('te', 'steam, teams', 'steam, «te»ams'),
    ('"green tea"', 'green teas, green -- tea', 'green teas, «green -- tea»'), ('tea cup', 'a cup of tea', 'a «cup» of «tea»'),
    ('cafe', 'un cafe\u0301 noir', 'un «cafe»\u0301 noir'), ('i\u0307stanbul', 'İSTANBUL', '«İSTANBUL»'),
    ('本語', 'これは日本語です', 'これは日«本語»です'), ('end', 'x ' * 50 + 'the end', '…' + 'x ' * 27 + 'the «end»'),
    ('end', 'the end' + ' x' * 200, 'the «end»' + ' x' * 96 + ' …'), ('a+b', 'sum: a+b', 'sum: «a+b»'), ('late', 'x ' * 150_000 + 'late', 'x ' * 100 + '…')])
def test_the_words_around_a_match_are_shown(typed, text, shown):
    found = main.around(text[:main.SEEN], main.query_of(typed))
    assert found.replace('\ue000', '«').replace('\ue001', '»') == shown

@given(st.text('ab é\u0301日本.İ', max_size=400), st.text('ab é日İ', min_size=1, max_size=9))
def test_the_words_around_a_match_are_those_of_the_text(text, typed):
    if not (query := main.query_of(typed)): return
    found = main.around(text, query)
    assert re.sub('[\ue000\ue001]', '', found).removeprefix('…').removesuffix('…') in text and len(found) < 700

@pytest.mark.parametrize('case', [case for case in CORPUS if case['where'] in ('query', 'form_field', 'message')],
                         ids=lambda case: case['id'])
def test_whatever_is_typed_is_a_query(library, case): assert isinstance(search(library, spelled(case)), list)

def test_the_index_follows_every_change_and_can_be_made_anew(library):
    db = library.db['writes']
    _, reply, _ = asyncio.run(library.ask('me', None, 'passing', None, 'm'))
    assert search(library, 'passing') and not search(library, 'gone')
    asyncio.run(library.save([main.Piece(reply.id, 0, 'gone soon')], [(reply.id, 'stopped', '', {})]))
    db.execute("update conversation set title = 'fleeting' where id = ?", [reply.conversation])
    assert search(library, 'gone') and search(library, 'fleeting')[0].message is None
    db.execute('update conversation set trashed = 1 where id = ?', [reply.conversation])
    assert not search(library, 'gone') and not search(library, 'fleeting')
    db.execute('delete from conversation where id = ?', [reply.conversation])
    for index in ('said_index', 'titled_index'): db.execute(f"insert into {index} ({index}) values ('integrity-check')")
    before = [search(library, typed) for typed, _ in FOUND[:30]]
    asyncio.run(library.reindex())
    assert [search(library, typed) for typed, _ in FOUND[:30]] == before

def test_what_is_in_the_trash_or_of_another_crowds_nothing_out(tmp_path):
    store = main.Store(tmp_path / 'p.db')
    async def fill():
        question, _, _ = await store.ask('me', None, 'a zebra', None, 'm')
        for owner in ('me', 'other'):
            messages = [{'id': n, 'parent': n - 1 if n else None, 'role': 'assistant' if n % 2 else 'user', 'created': float(n),
                         'content': 'zebra', 'status': 'done', 'note': '', 'model': '', 'ended': 1.0} for n in range(600)]
            told = main.ours(with_field(id=owner) | {'messages': messages}, owner)
            await store.bring_in(owner, told, placed := [], before := {})
            while len(placed) < 600: await store.bring_in(owner, told, placed, before)
        await store.trash('me', 'me')
        return question
    question = asyncio.run(fill())
    assert [hit.message for hit in search(store, 'zebra') if hit.message] == [question.id]
    store.close()

# ---- Store: in and out ----------------------------------------------------------------------------------------------

def bring(me, data, name='conversations.json'):
    "Import a file; what is said in the end."
    if not isinstance(data, bytes): data = json.dumps(data).encode()
    answer = me.http.post('/import', files={'file': (name, data)}, headers={'HX-Request': 'true'})
    def over():
        nonlocal answer
        if 'every 1s' in answer.text: answer = me.get('/import', **{'HX-Request': 'true'})
        return 'every 1s' not in answer.text
    assert eventually(over)
    return plain(Page(answer.text).root.text)

def zipped(files, **more):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items(): archive.writestr(name, data if isinstance(data, bytes) else json.dumps(data))
    return out.getvalue()

def exports(me): return zipfile.ZipFile(io.BytesIO(me.get('/export.zip').content))
def chats(me):
    packed = exports(me)
    return [json.loads(packed.read(name)) for name in packed.namelist() if name.endswith('.json')]
def path_of(told): return [(m['role'], m['content']) for m in told['messages']]

def claude_message(id, parent, sender, *content, at=0, **more):
    return {'uuid': id, 'parent_message_uuid': parent, 'sender': sender, 'text': '', 'attachments': [], 'files': [],
            'created_at': f'2025-03-01T10:00:{at:02}.500000Z', 'content': list(content)} | more

def text(said): return {'type': 'text', 'text': said, 'citations': []}

ROOT = '00000000-0000-4000-8000-000000000000'
CLAUDE = [{
    'uuid': 'c-1', 'name': 'Bread & “butter”', 'summary': '', 'account': {'uuid': 'a'},
    'created_at': '2025-03-01T09:59:59.000000Z', 'updated_at': '2025-03-01T10:01:00+00:00', 'chat_messages': [
        claude_message('m1', ROOT, 'human', text('How do I bake bread?')),
        claude_message('m2', 'm1', 'assistant', text('With *flour*.'), at=1),
        claude_message('m3', 'm1', 'assistant', {'type': 'thinking', 'thinking': 'Hmm.'}, text('With water.'), at=2),
        claude_message('m4', 'm3', 'human', at=3, attachments=[
            {'file_name': 'notes.txt', 'file_type': 'txt', 'extracted_content': 'rye ``` 50 g'}],
            files=[{'file_name': 'loaf.png', 'file_uuid': 'f'}]),
        claude_message('m5', 'm4', 'assistant', text('See:'), {'type': 'tool_use', 'name': 'artifacts', 'input': {
            'title': 'Loaf', 'language': 'python', 'content': 'bake()'}}, {'type': 'tool_result', 'content': []}, at=4),
        claude_message('m6', ROOT, 'human', text('How do I bake cake?'), at=5)],
    'current_leaf_message_uuid': 'm5'}, {
    'uuid': 'c-2', 'name': '', 'created_at': '2023-08-01T00:00:00Z', 'updated_at': None, 'chat_messages': [
        {'uuid': 'n1', 'sender': 'human', 'text': 'An old one \ud83d\ude00 \ud800!', 'created_at': '2023-08-01T00:00:00Z'},
        {'uuid': 'n2', 'sender': 'assistant', 'text': 'Yes.', 'created_at': None, 'attachments': None}]},
    {'uuid': 'c-3', 'name': 'Nothing', 'created_at': '2023-08-01T00:00:00Z', 'updated_at': None, 'chat_messages': []}]

def node(id, parent, role=None, *parts, at=None, kind='text', recipient='all', content=None, **metadata):
    message = role and {'id': id, 'author': {'role': role, 'name': None, 'metadata': {}}, 'create_time': at,
                        'update_time': None, 'content': content or {'content_type': kind, 'parts': list(parts)},
                        'status': 'finished_successfully', 'weight': 1.0, 'metadata': metadata, 'recipient': recipient}
    return id, {'id': id, 'message': message, 'parent': parent, 'children': []}

CHATGPT = [{
    'title': 'A cat', 'create_time': 1700000000.25, 'update_time': 1700000100.5, 'current_node': 'n8', 'id': 'g-1',
    'conversation_id': 'g-1', 'mapping': dict([
        node('n0', None), node('n1', 'n0', 'system', '', is_visually_hidden_from_conversation=True),
        node('nc', 'n1', 'user', content={'content_type': 'user_editable_context', 'user_profile': 'canary'}),
        node('n2', 'nc', 'user', {'content_type': 'image_asset_pointer', 'asset_pointer': 'file-service://file-1'},
             'What is this?', at=1700000001.5, kind='multimodal_text', attachments=[{'name': 'cat.png', 'id': 'file-1'}]),
        node('n3', 'n2', 'assistant', 'A dog.', at=1700000002, model_slug='gpt-4o'),
        node('n4', 'n2', 'assistant', content={'content_type': 'thoughts', 'thoughts': []}, at=1700000003),
        node('n5', 'n4', 'assistant', content={'content_type': 'code', 'language': 'python', 'text': 'look()'},
             at=1700000004, recipient='python', model_slug='o3'),
        node('n6', 'n5', 'tool', content={'content_type': 'execution_output', 'text': 'cat'}, at=1700000005),
        node('n7', 'n6', 'assistant', 'A cat.', at=1700000006, model_slug='o3'),
        node('n8', 'n7', 'user', 'Thanks <b>&</b>', at=1700000007)])}, {
    'title': None, 'create_time': None, 'current_node': 'gone', 'conversation_id': 'g-2', 'mapping': dict([
        node('b', 'a', 'user', 'Second'), node('a', None, 'assistant', 'First', at='soon')])}]

@pytest.fixture(scope='module')
def archive(new_site): return new_site()

@pytest.mark.parametrize('wrap', [lambda told: told, lambda told: zipped({'users.json': [], 'x/conversations.json': told})])
def test_an_export_of_claude_comes_in_with_branches_dates_and_titles(new_site, wrap):
    me = new_site().person()
    assert bring(me, wrap(CLAUDE)) == '2 conversations with 8 messages came in.'
    old, bread = chats(me)
    assert (bread['title'], bread['named'], bread['created'], bread['updated']) == (
        'Bread & “butter”', 2, 1740823199, 1740823260)
    assert path_of(bread) == [
        ('user', 'How do I bake bread?'), ('assistant', 'With water.'),
        ('user', '[Attached: notes.txt]\n\n````\nrye ``` 50 g\n````\n\n[Attached: loaf.png]'),
        ('assistant', 'See:\n\nLoaf\n\n```python\nbake()\n```')]
    assert [(m['content'], m['parent'], m['idx']) for m in bread['others']] == [
        ('How do I bake cake?', None, 0), ('With *flour*.', 0, 1)]
    assert [m['created'] for m in bread['messages']] == [1740823200.5, 1740823202.5, 1740823203.5, 1740823204.5]
    assert path_of(old) == [('user', 'An old one 😀 \ufffd!'), ('assistant', 'Yes.')] and old['title'] == 'An old one 😀 \ufffd!'
    assert bring(me, wrap(CLAUDE)) == '0 conversations with 0 messages came in, 2 were here already.'

@pytest.mark.parametrize('when', [1, 315_000_000, 4_400_000_000, 253_402_214_399])
def test_a_date_that_no_zip_can_hold_is_exported_too(new_site, when):
    me = new_site().person()
    bring(me, [CLAUDE[0] | {'created_at': when}])
    assert not exports(me).testzip() and len(exports(me).namelist()) == 2 and chats(me)[0]['created'] == when

def test_an_export_of_chatgpt_comes_in_without_what_people_never_see(new_site):
    me = new_site().person()
    parts = {f'conversations-00{n}.json': [told] for n, told in enumerate(CHATGPT)}
    assert bring(me, zipped(parts | {'user.json': {}, 'chat.html': b'<script>'})) == '2 conversations with 7 messages came in.'
    odd, cat = chats(me)
    assert (cat['title'], cat['created'], cat['updated']) == ('A cat', 1700000000.25, 1700000100.5)
    assert path_of(cat) == [
        ('user', '[Image: file-service://file-1]\n\nWhat is this?\n\n[Attached: cat.png]'),
        ('assistant', '```python\nlook()\n```\n\n```\ncat\n```\n\nA cat.'), ('user', 'Thanks <b>&</b>')]
    assert [(m['content'], m['parent'], m['model']) for m in cat['others']] == [('A dog.', 0, 'gpt-4o')]
    assert path_of(odd) == [('user', main.UNASKED), ('assistant', 'First'), ('user', 'Second')]
    page = Page(me.get(f'/c/{cat["id"]}').text).root
    assert plain(page.find('content-2').text) == 'Thanks <b>&</b>' and not page.all(lambda n: n.tag == 'b')
    chat = Chat(me, cat['id'], '').say('And now?')      # it goes on like any other, with what came in as its history
    assert chat.ended()['content'] == 'You said: And now?' and len(chat.messages) == 5

def test_our_export_comes_back_as_the_same_bytes(new_site, tmp_path, upstream):
    site, other = new_site(), new_site()
    me, you = site.person(), other.person()
    chat = me.ask(upstream.says('**one** `a` \u2028 é 😀'))
    chat.ended(), chat.say(upstream.plays(refuses(401))).ended(), chat.retry().ended()
    bring(me, CLAUDE), bring(me, CHATGPT)
    told = me.get('/export.zip').content
    assert told == me.get('/export.zip').content and len(chats(me)) == 5
    said = '5 conversations with 20 messages came in.'
    assert bring(you, told) == said and you.get('/export.zip').content == told
    assert bring(you, told).endswith('5 were here already.') and bring(me, told).startswith('0 conversations')
    assert you.get('/export.zip').content == me.get('/export.zip').content == told
    third = new_site().person()
    assert bring(third, me.get(f'/c/{chat.id}.json').content) == '1 conversation with 5 messages came in.'
    assert third.get(f'/c/{chat.id}.json').content == me.get(f'/c/{chat.id}.json').content
    assert third.get(f'/c/{chat.id}.md').text == me.get(f'/c/{chat.id}.md').text

def test_a_file_that_has_grown_adds_what_is_new_and_moves_nobody_elsewhere(archive):
    me = archive.person()
    def told(*messages): return [{'uuid': 'grows', 'name': 'Grows', 'chat_messages': messages}]
    first = [claude_message('1', ROOT, 'human', text('a')), claude_message('2', '1', 'assistant', text('b'), at=1)]
    more = [*first, claude_message('3', '2', 'human', text('c'), at=2), claude_message('4', '3', 'assistant', text('d'), at=3)]
    assert bring(me, told(*first)) == '1 conversation with 2 messages came in.'
    assert bring(me, told(*more)) == '1 conversation with 2 messages came in.'
    [id] = [c['id'] for c in chats(me) if c['title'] == 'Grows']
    chat = Chat(me, id, '')
    assert [m['content'] for m in chat.messages] == ['a', 'b', 'c', 'd']
    chat.say('mine').ended()
    branch = claude_message('5', '1', 'assistant', text('b2'), at=9)
    assert bring(me, told(*more, branch)) == '1 conversation with 1 message came in.'
    assert [m['content'] for m in chat.messages][-2:] == ['mine', 'You said: mine']

def test_what_is_in_the_trash_stays_there_and_what_is_of_somebody_else_is_not_touched(new_site, tmp_path, upstream):
    site = new_site(tmp_path)
    chat = site.person().ask(upstream.says('mine')).over()
    told = chat.person.get(f'/c/{chat.id}.json').content
    python(CHANGE, site.db, 'update conversation set trashed = unixepoch()')
    me = chat.person
    assert bring(me, told).endswith('1 was here already.') and chats(me) == []
    python(CHANGE, site.db, "update conversation set owner = 'somebody else'")
    assert bring(me, told) == '1 conversation with 2 messages came in.' and bring(me, told).startswith('0')
    [copy] = chats(me)
    assert copy['id'] != chat.id and copy | {'id': chat.id} == json.loads(told)
    assert rows(site.db, f"select count(*) from message where conversation = '{chat.id}'") == [[2]]

def deep(n): return b'[' * n + b']' * n
def with_message(**change):
    message = {'id': 0, 'parent': None, 'role': 'user', 'content': 'x', 'status': 'done', 'note': '', 'model': '',
               'created': 1.0, 'ended': 1.0, 'blocks': [], 'meta': {}}
    return {'format': 'parley', 'version': 1, 'id': 'x', 'title': 't', 'named': 0, 'pinned': None, 'created': 1.0,
            'updated': 1.0, 'choices': {}, 'messages': [message | change], 'others': []}
def with_field(**change): return with_message() | change
def looped(*pairs): return [{'id': 'l', 'mapping': dict(node(id, parent, 'user', id) for id, parent in pairs)}]

def test_a_conversation_made_by_hand_comes_in(archive):
    assert 'came in' in bring(archive.person(), with_message())

WRONG = {
    'no file': (b'', 'Choose a file that is not empty'), 'no JSON': (b'hello', 'wrong form'), 'cut off': (json.dumps(CLAUDE).encode()[:-9], 'JSON'),
    'not ours': ({'messages': []}, 'no export'), 'nothing': ([], 'no conversation'), 'a number': (b'17', 'wrong form'),
    'numbers': ([1, 2], 'wrong form'), 'deep': (b'{"mapping":' + deep(100_000) + b'}', 'nested'), 'binary': (b'\xff\xfe{', 'UTF-8'),
    'a backup': (b'SQLite format 3\0' + bytes(99), 'restore'), 'no zip': (b'PK\3\4' + bytes(99), 'damaged'),
    'an empty zip': (zipped({}), 'no conversation'), 'a zip of nothing': (zipped({'a.txt': b'x'}), 'no conversation'),
    'a torn zip': (zipped({'conversations.json': CLAUDE})[:-40], 'damaged'),
    'a bomb': (zipped({'conversations.json': bytes(30_000_000)}), 'Unpacked'),
    'white space': (zipped({'conversations.json': b'[' + b' ' * 19_000_000}), 'JSON'),
    'many names': (zipped({f'{n}.json': b'' for n in range(500)}), 'JSON'),
    'the last one of two': ([*CLAUDE, {'uuid': 'x', 'chat_messages': 5}], 'good conversations'),
    'two of one id': ([CHATGPT[0], CHATGPT[0] | {'title': 'Other'}], 'same id'),
    'messages of one id': ([{'uuid': 'd', 'chat_messages': [claude_message('1', ROOT, 'human', text('a'))] * 2}], 'same id'),
    'a circle': (looped(('a', 'b'), ('b', 'a')), 'circles'), 'itself': (looped(('a', 'a')), 'circles'),
    'a wide circle': (looped(('r', None), ('a', 'c'), ('b', 'a'), ('c', 'b')), 'circles'),
    'types': ([{'uuid': 5, 'chat_messages': [[]]}], 'wrong form'), 'a mapping': ([{'mapping': [1]}], 'wrong form'),
    'nothing in it': ([{'mapping': {}}], ''), 'a parent': ([{'id': 1, 'mapping': {'a': {'parent': []}}}], 'wrong form'),
    'newer': (with_field(version=2), 'newer'), 'a day': (with_field(created=1e300), 'wrong form'),
    'no number': (json.dumps(with_field(created=float('nan'))).encode(), 'wrong form'), 'a number too big': (with_field(named=10**30), 'wrong'),
    'a title': (with_field(title=['t']), 'wrong form'), 'choices': (with_field(choices={'model': []}), 'wrong form'),
    'a role': (with_message(role='system'), 'wrong form'), 'blocks': (with_message(blocks=['x']), 'wrong form'),
    'its own parent': (with_message(parent=0), 'not before it'), 'a place': (with_message(id=7), 'same id'),
    'infinite': (json.dumps(with_message(meta={'x': 1})).encode().replace(b'"x": 1', b'"x": 1e999'), 'wrong form'),
    'a content': (with_message(content=None), 'wrong form'), 'no content': ({'format': 'parley'}, 'wrong form')}

@pytest.fixture(scope='module')
def careful(new_site): return new_site(max_import_bytes=20_000_000)

@pytest.mark.parametrize('what', WRONG)
def test_a_broken_file_changes_nothing_and_is_told_why(careful, what):
    data, why = WRONG[what]
    data, me = data if isinstance(data, bytes) else json.dumps(data).encode(), careful.person()
    before = me.get('/export.zip').content
    answer = me.http.post('/import', files={'file': ('conversations.json', data)})
    said = Page(answer.text).root.find('empty').all(lambda n: n.tag == 'h2')[0].text
    assert answer.status_code in (413, 422) and why in said and plain(said).endswith('.') and len(plain(said)) < 150
    assert me.get('/export.zip').content == before and not list(careful.db.parent.glob('*part*'))

JUNK = [None, True, 0, -1, 3, 1.5, 1e300, 10**30, '', 'x', '\ud800', '2025-01-01', [], {}, [[]], [None], {'a': 1}, 'user',
        'assistant', 'm1', 'n2', {'type': 'text', 'text': 5}, [{'type': 'text'}]]

def inside(told):
    for key, value in told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ():
        yield told, key
        yield from inside(value)

def test_whatever_is_wrong_in_a_file_all_of_it_comes_in_as_trees_or_nothing_does(tmp_path):
    "A part or two of good exports is changed or left out, at random."
    chance, store = random.Random(SEED), main.Store(tmp_path / 'parley.db')
    async def bring_in(owner, data):
        await main.take_in(store, owner, io.BytesIO(data), len(data), state := main.Import())
        return state
    async def attempt(n):
        told = json.loads(json.dumps(chance.choice([CLAUDE, CHATGPT, [with_message()]])))
        for _ in range(chance.randint(1, 2)):
            whole, key = chance.choice([*inside(told)] or [([0], 0)])
            if chance.random() < .2: del whole[key]
            else: whole[key] = json.loads(json.dumps(chance.choice(JUNK)))
        data, owner = json.dumps(told).encode(), f'owner {n}'
        state, kept = await bring_in(owner, data), await store.kept(owner)
        assert state.status == 200 or state.status in (413, 422) and not kept, (SEED, state, told)
        for id in kept:
            _, tree = await store.tree(owner, id)
            depth = {m.id: m.idx for m in tree} | {None: -1}
            assert all(m.idx == depth[m.parent] + 1 for m in tree) and (await store.path(owner, id))[1], (SEED, told)
        if kept: assert (await bring_in(owner, data)).words.startswith('0 conversations'), (SEED, told)
    async def attempts():
        for n in range(120): await attempt(n)
    asyncio.run(attempts())
    store.close()

def test_a_zip_with_a_huge_table_of_contents_is_not_read(careful):
    bomb = zipped({'a.json': b''})
    at = bomb.rindex(b'PK\5\6')
    table = bytes(25_000_000)
    end = bomb[at:at + 12] + struct.pack('<II', len(table), 0) + b'\0\0'
    assert main.LONGEST_TABLE < len(table)
    with pytest.raises(main.Refused, match='more files'): list(main.parts_of(io.BytesIO(b'PK\3\4' + table + end), 10**9))

def test_what_was_deleted_for_ever_comes_in_again(new_site):
    me = new_site().person()
    told = [with_field(id=f'again{n}') for n in range(300)]
    assert bring(me, told).startswith('300 conversations')
    me.post('/trash/all'), me.post('/trash/empty')
    assert bring(me, told).startswith('300 conversations') and len(chats(me)) == 300

def test_what_has_grown_since_it_was_brought_in_grows(archive):
    me = archive.person()
    told = [with_message(), with_message(status='streaming', role='assistant', id=1, parent=0, content='the begin')]
    told = told[0] | {'id': 'grown', 'messages': told[0]['messages'] + told[1]['messages']}
    assert bring(me, told) == '1 conversation with 2 messages came in.'
    assert me.get('/c/grown.json').json()['messages'][1]['status'] == 'interrupted'
    told['messages'][1] |= {'status': 'done', 'content': 'the beginning and the end', 'note': ''}
    assert bring(me, told) == '1 conversation with 1 message came in.'
    assert path_of(me.get('/c/grown.json').json()) == [('user', 'x'), ('assistant', 'the beginning and the end')]
    assert 'beginning' in me.get('/search?q=beginning').text and bring(me, told).startswith('0 conversations')
    told['messages'][1]['content'] = 'the beg'
    assert bring(me, told).startswith('0 conversations') and 'and the end' in me.get('/c/grown.json').text

@pytest.mark.parametrize('behind', ['{}', 'x', ']', '[{}]', '\n' * 3_000_000 + '{}'])
def test_what_comes_after_the_end_of_a_file_is_not_passed_over(archive, behind):
    me = archive.person()
    for told in (with_field(id='behind'), [with_field(id='behind')]):
        assert 'no valid JSON' in bring(me, json.dumps(told).encode() + b'\n' + behind.encode())
    assert me.get('/c/behind.json').status_code == 404

def test_titles_and_system_prompts_of_a_file_have_the_limits_of_those_that_are_typed(archive):
    me = archive.person()
    for n, (title, shown) in enumerate([('', 'Untitled'), ('a\nb\0c\x1b', 'a b c'), ('t' * 3_000_000, 't' * 199 + '…')]):
        bring(me, with_field(id=f'named{n}', title=title))
        assert me.get(f'/c/named{n}.json').json()['title'] == shown
    assert '20,000' in bring(me, with_field(id='loud', choices={'system': 's' * 20_001}))
    assert me.get('/c/loud.json').status_code == 404

def test_a_tree_does_not_begin_with_an_answer(archive):
    assert 'Nothing came in' in bring(archive.person(), with_message(role='assistant'))

@pytest.mark.parametrize('field, value', [('pinned', 5.0), ('updated', 1.5e11)])
def test_pages_of_the_list_lead_to_each_conversation(new_site, field, value):
    me = new_site().person()
    bring(me, [with_field(id=f'p{n}', **{field: value}) for n in range(130)])
    found, place = set(), '/list'
    for _ in range(4):
        page = me.get(place, **{'HX-Request': 'true'}).text
        found |= set(re.findall(r'/c/(p\d+)', page))
        if not (more := re.search(r'(/list\?after=[^"&]+)', page)): break
        place = html.unescape(more[1])
    assert len(found) == 130

@pytest.mark.parametrize('name', [f'files/{"0" * 64}', 'conversations.json', 'some.json'])
@pytest.mark.parametrize('method, why', [(zipfile.ZIP_DEFLATED, 'damaged'), (zipfile.ZIP_BZIP2, 'unusual'), (zipfile.ZIP_LZMA, 'unusual')])
def test_a_zip_that_says_less_than_it_holds_is_unpacked_no_further_than_it_says(name, method, why):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', method) as packed: packed.writestr(name, b'[' + b' ' * 60_000_000)
    bomb = bytearray(out.getvalue())
    for at in 22, bomb.rindex(b'PK\1\2') + 24: bomb[at:at + 4] = struct.pack('<I', 1_000)
    tracemalloc.start()
    try:
        with pytest.raises(main.Refused, match=why):
            main.sift(io.BytesIO(bomb), len(bomb), io.BytesIO(), 'me', main.Settings(), main.Import())
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 2_000_000

def test_a_name_in_a_zip_leads_nowhere(archive, tmp_path):
    me = archive.person()
    names = ['../../up/conversations.json', '/tmp/conversations.json']
    said = bring(me, zipped({name: [CLAUDE[0] | {'uuid': name}] for name in names}))
    assert said == '2 conversations with 12 messages came in.' and not Path('/tmp/conversations.json').exists()

def test_a_large_file_is_for_who_is_signed_in_only(house, stranger, owner, upstream):
    data = json.dumps([CLAUDE[0] | {'uuid': 'big', 'padding': 'x' * 5_000_000}]).encode()
    assert stranger.http.post('/import', files={'file': ('x', data)}).status_code == 413
    assert bring(owner, data) == '1 conversation with 6 messages came in.'
    assert owner.post('/look', back=data.decode()).status_code == 413

def test_an_import_without_a_script_goes_by_pages(archive):
    me = archive.person()
    form = Page(me.get('/data').text).root.all(lambda n: n.attrs.get('action') == '/import')[0]
    assert form.attrs['enctype'] == 'multipart/form-data' and form.attrs['method'] == 'post'
    answer = me.http.post('/import', files={'file': ('x.json', json.dumps(CHATGPT).encode())})
    assert (answer.status_code, answer.headers['Location']) == (303, '/data')
    assert 'came in' in me.get('/data').text or 'already' in me.get('/data').text
    assert 'role="status"' in me.get('/data').text

def test_a_running_reply_is_not_stalled_by_an_import_and_both_come_through(archive, upstream):
    me, gate = archive.person(), Gate()
    tab = me.ask(upstream.says('half ', gate, *paced(['word '] * 100, .005))).watch().until('half')
    messages = [claude_message(str(n), str(n - 1), 'human' if n % 2 == 0 else 'assistant', text('x' * 200)) for n in range(4000)]
    gate.open()
    assert bring(me, [{'uuid': 'long', 'name': 'Long', 'chat_messages': messages}]) == '1 conversation with 4,000 messages came in.'
    assert tab.ends().text == plain('half ' + 'word ' * 100)
    [told] = [told for told in chats(me) if told['title'] == 'Long']
    assert [m['idx'] for m in told['messages']] == list(range(4000)) and not told['others']

def test_a_backup_by_the_page_lets_nobody_in(house, owner, tmp_path):
    owner.ask('kept in the backup').ended()
    answer = owner.get('/backup')
    (tmp_path / 'copy.db').write_bytes(answer.content)
    assert 'attachment' in answer.headers['Content-Disposition'] and rows(tmp_path / 'copy.db', 'pragma quick_check') == [['ok']]
    assert rows(tmp_path / 'copy.db', 'select count(*) from session') == [[0]] != rows(house.db, 'select count(*) from session')
    for [session] in rows(house.db, 'select id from session'): assert session.encode() not in answer.content
    assert ['kept in the backup'] in rows(tmp_path / 'copy.db', 'select content from message')
    assert not list(house.db.parent.glob('*part*'))

def test_what_is_sent_whole_is_sent_once_at_a_time_and_to_no_other_site(archive):
    me = archive.person()
    bring(me, CLAUDE)
    for path in ('/export.zip', '/backup'):
        assert eventually(lambda path=path: me.get(path).status_code == 200)
        assert me.get(path, **{'Sec-Fetch-Site': 'cross-site'}).status_code == 403
        who = ('owner', path.strip('/').removeprefix('export.').replace('backup', 'db'))
        archive.door.state.parley.sending.add(who)
        assert me.get(path).status_code == 429
        archive.door.state.parley.sending.discard(who)


# ---- Claude: history in, events out ---------------------------------------------------------------------------------

def test_what_is_sent_upstream(site, me, upstream):
    me.ask(question := upstream.says('Hello.')).over().say(second := upstream.says('Again.')).over()
    call, = upstream.called(second)
    assert [(m['role'], words(m['content'])) for m in call.body['messages']] \
        == [('user', question), ('assistant', 'Hello.'), ('user', second)]
    assert call.body['model'] == site.settings.model and call.body['max_tokens'] == site.settings.max_tokens
    assert call.body['stream'] is True and 'test' in (call.headers.get('authorization') or call.headers['x-api-key'])

def can(id, line='nova', lifecycle='active', created='2026-01-01', **able):
    "An item of GET /v1/models as the API writes it, with what is `able` supported and the rest not."
    def inside(name, *kinds): return {kind: {'supported': kind in able.get(name, ())} for kind in kinds}
    flags = {name: {'supported': name in able} for name in ('image_input', 'pdf_input', 'citations', 'batch')}
    return {'type': 'model', 'id': id, 'display_name': f'The {id}', 'line': line, 'lifecycle': lifecycle,
            'created_at': created + 'T00:00:00Z', 'deprecated_at': None, 'retires_at': able.get('retires'),
            'max_tokens': able.get('most', 64_000), 'max_input_tokens': 500_000, 'capabilities': flags | {
                'thinking': {'supported': 'thinking' in able, 'types': inside(
                    'thinking', 'adaptive', 'between_tools', 'enabled') | {'disabled': {
                        'supported': 'thinking' not in able or 'disabled' in able['thinking']}}},
                'effort': {'supported': 'effort' in able, **inside('effort', *sorted(able.get('effort', ['low'])))},
                'server_tools': {'supported': False}, 'something_new': [1]}}

NOVA = can('claude-nova-1', thinking=['adaptive', 'between_tools'], effort=['low', 'high', 'max', 'ultra'], most=9_000)
MODELS = [NOVA, can('claude-old-1', thinking=['enabled', 'disabled'], created='2025-01-01'), can('claude-bare-1'),
          can('claude-gone-1', lifecycle='retired', created='2024-01-01'),
          {'id': 'of-another-api', 'object': 'model', 'display_name': '<script>alert(1)</script>'},
          can('claude-haiku-5-5', 'haiku', thinking=['adaptive', 'disabled'], effort=['low', 'max']),
          can('claude-last-1', 'last', lifecycle='deprecated', retires='2027-02-03T00:00:00Z')]

def knowing(*models, **settings):
    claude = main.Claude(dataclasses.replace(main.Settings.read({}), api_key='test', **settings),
                         httpx2.AsyncClient(transport=Upstream()))
    claude.learn(list(models))
    return claude

PLAIN, SHOWN = {}, {'type': 'adaptive', 'display': 'summarized'}
CACHED = {'cache_control': {'type': 'ephemeral'}, 'diagnostics': {'previous_message_id': None}}
NOVA_SENDS = CACHED | {'max_tokens': 9_000}

@pytest.mark.parametrize('model, chosen, sent', [
    ('claude-nova-1', {}, NOVA_SENDS | {'thinking': SHOWN}),
    ('claude-nova-1', {'effort': 'ultra', 'system': ' Be brief. '},
     NOVA_SENDS | {'thinking': SHOWN, 'output_config': {'effort': 'ultra'}, 'system': 'Be brief.'}),
    ('claude-nova-1', {'thinking': 'off', 'effort': 'max', 'max_tokens': '700'},
     CACHED | {'thinking': {'type': 'between_tools'}, 'output_config': {'effort': 'high'}, 'max_tokens': 700}),
    ('claude-nova-1', {'thinking': 'maybe', 'effort': 'xhigh', 'max_tokens': '-5'}, NOVA_SENDS | {'thinking': SHOWN}),
    ('claude-nova-1', {'max_tokens': '9000000'}, NOVA_SENDS | {'thinking': SHOWN}),
    ('claude-old-1', {}, CACHED), ('claude-old-1', {'thinking': 'off'}, CACHED),
    ('claude-old-1', {'thinking': 'on', 'effort': 'high'},
     CACHED | {'thinking': {'type': 'enabled', 'budget_tokens': 8_000}}),
    ('claude-old-1', {'thinking': 'on', 'max_tokens': '1024'}, CACHED | {'max_tokens': 1024}),
    ('claude-bare-1', {'thinking': 'off', 'effort': 'low'}, CACHED), ('of-another-api', {'thinking': 'on'}, PLAIN),
    ('claude-gone-1', {'thinking': 'on'}, {'model': 'claude-sonnet-5-5'}),
    ('never-heard-of', {'effort': 'low'}, {'model': 'claude-sonnet-5-5'})])
def test_a_model_is_sent_what_was_chosen_and_it_can_do(model, chosen, sent):
    claude = knowing(*MODELS)
    request = claude.request([], claude.valid({'model': model, **chosen}))
    assert request == {'model': model, 'max_tokens': 16_000, 'messages': []} | sent

def test_choices_of_another_day_are_sent_as_far_as_they_make_sense_today():
    odd = {'model': ['x'], 'effort': {}, 'thinking': 1, 'max_tokens': 'many', 'system': '', 'new': None}
    assert knowing(*MODELS).request([], odd) == {'model': 'claude-sonnet-5-5', 'max_tokens': 16_000, 'messages': []}

def test_without_a_list_the_configured_model_gets_plain_text():
    claude = knowing(model='local-7b')
    kept = claude.valid({'model': 'claude-nova-1', 'effort': 'high', 'thinking': 'on', 'system': 'Hm.'})
    assert claude.request([], kept) == {'model': 'local-7b', 'max_tokens': 16_000, 'messages': [], 'system': 'Hm.'}

def test_a_retired_model_gives_way_to_the_next_of_its_line():
    line = [can(f'claude-nova-{n}', created=f'202{n}-01-01') for n in (6, 5, 3)]
    claude = knowing(*line, can('claude-nova-4', lifecycle='retired', created='2024-01-01'), model='claude-nova-4')
    assert claude.nearest(main.Model('x', line='nova', created='2027-01-01')).id == 'claude-nova-6'
    assert claude.default().id == 'claude-nova-5' and claude.nearest(main.Model('x', line='other')) is None
    assert claude.valid({'model': 'claude-nova-4'}) == {}
    assert claude.valid({'model': 'claude-nova-4'}, {'model': 'claude-nova-4'}) == {'model': 'claude-nova-4'}

ODD = [None, 5, 'x', [], {}, {'id': 5}, {'id': ''}, {'id': 'a b'}, {'id': 'x' * 200}, {'id': '<script>'}, {'id': None}]

@pytest.mark.parametrize('odd', [*ODD, *({'id': 'odd', **more} for more in (
    {'capabilities': []}, {'capabilities': {'thinking': 5, 'effort': [1], 'image_input': 'yes', 'server_tools': None}},
    {'capabilities': {'thinking': {'supported': True, 'types': 7}, 'effort': {'supported': True, '<b>': True, 'low': 1}}},
    {'display_name': {}, 'lifecycle': ['retired'], 'line': 9, 'max_tokens': True, 'max_input_tokens': -1,
     'created_at': 0, 'retires_at': {}},
    {'display_name': '\u202e\ud800' * 9_999, 'max_tokens': 10**30, 'max_input_tokens': 1.5}))], ids=ascii)
def test_an_odd_item_of_the_list_is_plain_or_nothing(odd):
    model = main.Model.read(odd)
    if odd in ODD: assert model is None
    else: assert model == main.Model('odd', 'odd', known='capabilities' in odd and bool(odd['capabilities']))

def test_thinking_goes_back_only_where_nothing_before_it_has_changed():
    thought = [{'type': 'thinking', 'thinking': 'hm', 'signature': 's'}, {'type': 'text', 'text': 'Yes.'}]
    claude, system = knowing(NOVA), {'model': 'claude-nova-1', 'system': 'Be brief.'}
    def reply(**choices):
        prefix = main.prefix_of(claude.request([], choices))
        return main.Message(1, 'c', 'o', 0, 1, 'assistant', 'Yes.', 'done', '', '', None, 0, 0, thought,
                            {'prefix': prefix})
    then = main.Message(2, 'c', 'o', 1, 2, 'user', 'And?', 'done', '', '', None, 0, 0)
    def sent(reply, **choices): return claude.request([reply, then], choices)['messages'][0]['content']
    assert sent(reply(), model='claude-nova-1') == sent(reply(**system), **system) == thought
    assert sent(reply(), **system) == sent(reply(**system)) == thought[1:]

@pytest.mark.parametrize('model, usage, usd', [
    ('claude-sonnet-5-5', {'input_tokens': 1_000_000, 'output_tokens': 100_000}, 3.0),
    ('claude-sonnet-4-5-20250929', {'cache_read_input_tokens': 10**6, 'cache_creation_input_tokens': 10**6}, 4.05),
    ('claude-haiku-5-5', {'input_tokens': 100_000}, .01), ('claude-haiku-5-5', {'input_tokens': 200_000}, .1),
    ('claude-sonnet-9', {'input_tokens': 5}, None), ('mine', {'input_tokens': 500_000, 'output_tokens': None}, .5)])
def test_a_price_is_known_or_said_to_be_unknown(model, usage, usd):
    assert knowing(prices='{"mine": [1, 2, 3, 4]}').price(model, usage) == (usd and pytest.approx(usd))

@pytest.fixture(scope='module')
def lab(tmp_path_factory, faults):
    "A site whose Claude has a list of models, on two pages. `faults` take seconds: they begin here, to be seen later."
    upstream = Upstream()
    upstream.models = [MODELS[:2], MODELS[2:]]
    lab = Site(tmp_path_factory.mktemp('lab'), upstream, titles='on', max_system_chars=99)
    yield lab
    lab.stop()

def models_of(site): return site.door.state.parley.claude.models
def body(site, question): return site.upstream.called(question)[-1].body

def test_choices_are_kept_and_are_the_default_of_the_next_conversation(lab):
    assert eventually(lambda: len(models_of(lab)) == len(MODELS))
    me, question = lab.person(), lab.upstream.says
    chat = me.ask(first := question('One.'), model='claude-nova-1', effort='ultra', system='Be brief.', max_tokens='x')
    chat.ended(), chat.say(second := question('Two.')).ended(), me.ask(third := question('Three.')).ended()
    for each in (first, second, third):
        sent = body(lab, each)
        assert (sent['model'], sent['output_config']) == ('claude-nova-1', {'effort': 'ultra'})
        assert sent.get('system') == (None if each == third else 'Be brief.')
    assert chat.post('/choices', model='claude-old-1', thinking='on').status_code < 400
    chat.say(fourth := question('Four.')).ended()
    assert body(lab, fourth)['model'] == chat.reply['model'] == 'claude-old-1' and 'system' not in body(lab, fourth)
    assert body(lab, fourth)['thinking'] == {'type': 'enabled', 'budget_tokens': 8_000}

def test_a_list_and_choices_survive_a_restart_without_the_endpoint(lab, tmp_path):
    site = Site(tmp_path, lab.upstream)
    assert eventually(lambda: models_of(site))
    chat = site.person().ask(lab.upstream.says('One.'), model='claude-nova-1', effort='max')
    chat.ended(), site.stop()
    silent = Upstream()
    silent.models = httpx2.ConnectError('down')
    again = Site(tmp_path, silent)
    try:
        Chat(again.person(), chat.id, '').say(question := silent.says('Two.')).ended()
        assert body(again, question)['model'] == 'claude-nova-1'
        assert body(again, question)['output_config'] == {'effort': 'max'}
    finally: again.stop()

def test_a_retired_model_refuses_in_words_and_keeps_the_text(lab):
    me, store = lab.person(), lab.door.state.parley.store
    chat = me.ask(lab.upstream.says('One.'))
    chat.ended(), asyncio.run(store.choose('owner', chat.id, lambda _: {'model': 'claude-gone-1'}))
    answer = chat.post(message='precious words', htmx=False)
    assert answer.status_code == 409 and 'retired' in answer.text and 'precious words' in answer.text

def titles(site, chat): return site.person().get(f'/c/{chat.id}.json').json()['title']

@pytest.mark.parametrize('said, title', [
    ('A title', 'A title'), ('## **Rock** and "roll"\n\nI chose this because', 'Rock and "roll'), ('“Çà et là.”\n', 'Çà et là'),
    ('<b>x</b> \u202ey\x00z', '<b>x</b> y z'), ('word ' * 99, 'word ' * 10 + 'word…'), ('x' * 999, 'x' * 59 + '…'),
    ('', ''), (' \n \t', ''), ('""', ''), ('***', '')])
def test_a_title_is_one_short_line_of_plain_text(said, title): assert main.titled(said, 60) == title

def test_claude_titles_after_the_first_answer_with_the_cheapest_model(lab):
    me, upstream = lab.person(), lab.upstream
    chat = me.ask(question := upstream.says('A long story.'), model='claude-nova-1', system='Be brief.').over()
    assert eventually(lambda: titles(lab, chat) == 'A title')
    call, = upstream.titling(question)
    assert {name: call.body[name] for name in ('model', 'thinking', 'output_config', 'max_tokens')} == {
        'model': 'claude-haiku-5-5', 'thinking': {'type': 'disabled'}, 'output_config': {'effort': 'low'},
        'max_tokens': 60} and 'system' not in call.body and 'A long story.' in call.question
    chat.say('And?').ended(), chat.say('And then?').ended()
    assert len(upstream.titling(question)) == 1

def test_a_title_is_in_nobodys_way(lab, caplog):
    me, upstream, gate = lab.person(), lab.upstream, Gate()
    upstream.title = raw(before=gate)
    try:
        slow = me.ask(mine := upstream.says('One.')).over()
        assert eventually(lambda: upstream.titling(mine))
        slow.say('And?').ended()
        python(CHANGE, lab.db, f"update conversation set named = 2 where id = '{slow.id}'")     # a person gave it
        upstream.title = says('Too late')
        gate.open()
        upstream.title = refuses(400)
        failed = me.ask(question := upstream.says('Two.')).over()
        assert eventually(lambda: upstream.titling(question) and not lab.door.state.parley.turns.naming)
        assert (titles(lab, slow), titles(lab, failed)) == (mine, question)
    finally: upstream.title = says('A title')

def used(usage, *steps, final=None, **more):
    "An answer whose usage is told at its begin and at its end."
    start = event('message_start', message={'id': 'msg_7', 'role': 'assistant', 'content': [], 'usage': usage, **more})
    stop = event('message_delta', delta={'stop_reason': 'end_turn'}, usage=final) + event('message_stop')
    return raw(start, event('content_block_start', index=0, content_block={'type': 'text', 'text': ''}), *steps, stop,
               request_id='req_7')

def booked(site):
    columns = 'model, purpose, input, output, cache_read, cache_write, cost'
    return rows(site.db, f'select {columns} from usage order by id desc limit 1')[0]

PAID = {'input_tokens': 1000, 'output_tokens': 1, 'cache_read_input_tokens': 2000, 'cache_creation_input_tokens': 400}

def test_what_a_reply_used_is_booked_and_shown(site, me, upstream):
    told = {'output_tokens': 100, 'server_tool_use': {'web_search_requests': 3}}
    miss = {'cache_miss_reason': {'type': 'system_changed', 'cache_missed_input_tokens': 9}}
    chat = me.ask(upstream.plays(used(PAID, 'Hello.', final=told, diagnostics=miss)))
    tab = chat.watch().ends()
    assert booked(site) == ['claude-sonnet-5-5', 'reply', 1000, 100, 2000, 400, pytest.approx(.0042)]
    for words in ('1,000 fresh, 2,000 from the cache, 400 into the cache', 'out100', '$0.0042', '3, not in the cost',
                  'all was said', 'the system prompt has changed', 'req_7', 'claude-sonnet-5-5'):
        assert words in tab.said and words in chat.tab().said

@pytest.mark.parametrize('step', [HANG, httpx2.ReadError('gone')])
def test_of_a_reply_that_is_cut_off_the_end_is_estimated(site, me, upstream, step):
    chat = me.ask(upstream.plays(used(PAID, 'x' * 300, step)))
    tab = chat.watch().until('xxx')
    chat.stop(), tab.ends()
    assert booked(site)[2:] == [1000, 100, 2000, 400, pytest.approx(.0042)] and 'about $0.0042' in tab.said

def test_a_reply_that_never_reached_the_model_has_no_cost(me, upstream):
    tab = me.ask(upstream.plays(refuses(401))).watch().ends()
    assert 'Time' in tab.said and 'Cost' not in tab.said

def test_a_price_that_nobody_knows_is_not_guessed(lab):
    me = lab.person()
    chat = me.ask(lab.upstream.plays(used(PAID, 'Hello.', final={'output_tokens': 5})), model='claude-old-1')
    assert 'price unknown' in chat.watch().ends().said
    spent = 'select purpose, input, output, cost from usage order by id desc limit 2'
    assert eventually(lambda: ['title', 3, 9, pytest.approx(4.8e-6)] in rows(lab.db, spent))
    assert ['reply', 1000, 5, None] in rows(lab.db, spent)

@pytest.mark.parametrize('usage', [
    'five', [], 5, {'input_tokens': '9'}, {'input_tokens': -5}, {'input_tokens': 1e99, 'output_tokens': True},
    {'input_tokens': {'a': [1]}, 'server_tool_use': [1]}, {'input_tokens': 10**400, 'server_tool_use': {'x': 'y'}}])
def test_a_hostile_usage_does_no_harm(site, me, upstream, usage):
    chat = me.ask(upstream.plays(used(usage, 'Hello.', final=usage)))
    assert chat.ended()['content'] == 'Hello.' and chat.reply['status'] == 'done'
    for counts in rows(site.db, 'select input, output, cache_read, cache_write from usage'):
        assert all(type(n) is int and 0 <= n < 10**9 for n in counts), counts

def test_a_cap_is_checked_before_a_call_and_while_it_streams_and_loses_nothing(new_site, upstream):
    site = new_site(monthly_usd=.01)
    me = site.person()
    first = me.ask(upstream.plays(used(PAID, 'word ' * 99, HANG)))
    tab = first.watch().until('word word')
    second = me.ask(upstream.plays(used(PAID, 'word ' * 700, HANG)))
    assert second.watch().ends().status == 'stopped' and 'monthly cap' in second.reply['note']
    assert second.reply['content'] == 'word ' * 700 and tab.ends().status == 'stopped'
    for answer in (second.post(message='precious words', htmx=False), me.post('/', message='precious words', htmx=False)):
        assert answer.status_code == 402 and 'cap' in answer.text and 'precious words' in answer.text
    assert second.post('/retry').status_code == 402 and not upstream.called('precious words')

def test_where_there_is_a_cap_a_price_must_be_known(new_site, upstream):
    answer = new_site(monthly_usd=5, model='claude-nova-9').person().post('/', message=(question := 'How much?'))
    assert answer.status_code == 402 and 'PRICES' in answer.text and not upstream.called(question)

def test_the_usage_page_and_its_csv_say_what_was_booked(new_site):
    site = new_site()
    now = time.time()
    python(CHANGE, site.db, f"""
        insert into usage (owner, at, model, purpose, input, output, cache_read, cache_write, searches, cost)
        select 'owner', column1, column2, 'reply', 1234, 5, 0, 0, 0, column3 from (values
            ({now}, '=cmd|x', null), ({now}, 'claude-x', 1.25), ({now} - 86400, 'claude-x', .5), ({now} - 1e7, '<b>', 7))
        union all select 'somebody', {now}, 'theirs', 'reply', 1, 2, 3, 4, 5, 9""")
    me = site.person()
    seen = Page(me.get('/usage').text).root
    table = {row.text for row in seen.all(lambda n: n.tag == 'tr')}
    assert {'=cmd|xunknown151,23400', 'claude-x$1.752102,46800'} <= table and '<b>' not in seen.text
    assert len(seen.all(lambda n: n.tag == 'g')) == 30 and 'theirs' not in seen.text
    lines = list(csv.reader(io.StringIO(me.get('/usage.csv').text)))
    assert sorted(line[1] for line in lines) == ["'=cmd|x", '<b>', 'claude-x', 'claude-x', 'model']
    assert sum(float(line[9]) for line in lines[1:]) == 8.75
    me.http.cookies.set('zone', '-840')
    assert me.get('/usage').status_code == 200 and 'style=' not in me.get('/usage').text

def full_by(tokens, *steps): return used({'input_tokens': tokens}, *steps, final={'output_tokens': 0})

def standing(tab): return [plain(n.text) for n in tab.page.root.all(lambda n: 'standing' in n.attrs.get('class', ''))]

def test_a_conversation_that_fills_the_context_says_so_and_goes_on_with_a_summary(lab):
    upstream, room = lab.upstream, models_of(lab)['claude-old-1'].max_input
    chat = lab.person().ask(first := upstream.plays(full_by(int(.4 * room), 'One.')), model='claude-old-1')
    assert standing(chat.watch().ends()) == []
    chat.say(upstream.plays(full_by(int(.62 * room), 'Two.')))
    half = 'This conversation fills 62% of what the model can read.'
    assert standing(chat.watch().ends()) == standing(chat.tab()) == [half]
    chat.say(second := upstream.plays(full_by(int(.81 * room), 'Three.')))
    assert 'Go on with a summary' in standing(chat.watch().ends())[0]
    upstream.plans[main.SUMMARISING] = [says('We spoke of **tea**.')]
    answer = chat.post('/summary')
    assert answer.status_code == 200 and chat.ended()['content'] == 'We spoke of **tea**.'
    assert [q for q in upstream.called(main.SUMMARISING)[-1].questions] == [first, *chat_questions(chat)[1:3],
                                                                          main.SUMMARISING]
    tab = chat.tab()
    assert 'in place of what stands above' in standing(tab)[-1] and first in tab.said and 'Three.' in tab.said
    assert rows(lab.db, "select count(*) from usage where purpose = 'summary'") == [[1]]
    chat.say(third := upstream.says('Four.')).ended()
    sent = [(m['role'], words(m['content'])) for m in body(lab, third)['messages']]
    assert sent == [('user', main.SUMMARISING), ('assistant', 'We spoke of **tea**.'), ('user', third)]
    number = rows(lab.db, f"select id from message where content = 'We spoke of **tea**.' and conversation = '{chat.id}'")
    undo = chat.post('/summary/use', message=number[0][0], counts='0')
    assert undo.status_code == 200 and 'Undone' in undo.text and 'Four.' in undo.text
    chat.say(fourth := upstream.says('Five.')).ended()
    assert body(lab, fourth)['messages'][0]['content'] == first and main.SUMMARISING not in str(body(lab, fourth))
    assert chat.post('/summary/use', message=number[0][0], counts='1').status_code == 200
    chat.say(fifth := upstream.says('Six.')).ended()
    assert [words(m['content']) for m in body(lab, fifth)['messages']] == [
        main.SUMMARISING, 'We spoke of **tea**.', third, 'Four.', fourth, 'Five.', fifth]
    assert all(lab.person().post(f'/c/{c}/summary/use', message=m, counts='0').status_code == 404
               for c, m in ((chat.id, 0), ('unknown', number[0][0])))
    assert second in chat.page()

def chat_questions(chat): return [m['content'] for m in chat.messages if m['role'] == 'user']

def test_a_summary_that_was_stopped_stands_for_nothing(lab):
    upstream = lab.upstream
    chat = lab.person().ask(first := upstream.says('One.')).over()
    upstream.plans[main.SUMMARISING] = [says('We spoke', HANG)]
    chat.html = chat.post('/summary').text
    tab = chat.watch().until('We spoke')
    chat.stop(), tab.ends()
    chat.say(second := upstream.says('Two.')).ended()
    assert [words(m['content']) for m in body(lab, second)['messages']] == [first, 'One.', second]

def test_what_the_model_can_not_read_is_counted_before_it_is_sent(lab):
    upstream, room = lab.upstream, models_of(lab)['claude-old-1'].max_input
    chat = lab.person().ask(upstream.plays(full_by(int(.95 * room), 'One.')), model='claude-old-1').over()
    try:
        for upstream.tokens, status in ((room + 1, 413), (b'<html>', 200), (room, 200)):
            answer = chat.post(message=(question := upstream.plays(full_by(int(.95 * room), 'Two.'))))
            chat.ended()
            assert answer.status_code == status and bool(upstream.called(question)) == (status == 200), answer.text
            assert status == 200 or 'summary' in answer.text
    finally: upstream.tokens = None

def test_a_first_and_a_changed_question_are_counted_before_they_are_sent(new_site, upstream):
    upstream.models = [[can('claude-small-1') | {'max_input_tokens': (room := 1_000)}]]
    site = new_site(model='claude-small-1')
    try:
        me = site.person()
        assert eventually(lambda: models_of(site))
        first, long = me.ask('short').over(), 'x' * 2_600
        for upstream.tokens, text, status in ((room + 1, long, 413), (b'<html>', long * 2, 413), (b'<html>', long, 200), (room, long, 200)):
            for path in ('/', f'/c/{first.id}/edit?at={id_of(first, 0)}', f'/c/{first.id}'):
                answer = me.post(path, message=f'{text} {number()}', htmx=False)
                assert (answer.status_code == 413) == (status == 413) and (status == 200 or text in answer.text), (path, status)
                first.tab().ends()
            assert status == 200 or 'see the actions' in answer.text
        assert 'Go on with a summary' in me.get(f'/actions/{first.id}').text
    finally: upstream.models = upstream.tokens = None

def test_where_the_api_says_it_is_too_long_a_summary_is_offered(me, upstream):
    told = {'type': 'error', 'error': {'type': 'invalid_request_error', 'message': 'prompt is too long: 5 tokens > 4 maximum'}}
    chat = me.ask(upstream.plays(raw(json.dumps(told).encode(), status=400, content_type='application/json'))).over()
    assert 'too long' in chat.reply['note'] and 'Go on with a summary' in standing(chat.tab())[0]

def test_the_menu_leads_to_a_summary_on_the_page_where_its_conversation_is_shown(me, upstream):
    chat = me.ask(upstream.says('One.')).over()
    def way(**headers):
        html = me.http.get(f'/actions/{chat.id}', headers=headers).text
        form, = Page(html).root.all(lambda n: n.tag == 'form' and n.attrs.get('action') == f'/c/{chat.id}/summary')
        return form.attrs.get('hx-post'), form.attrs.get('hx-target')
    def seen_from(place): return way(**{'HX-Request': 'true', 'HX-Current-URL': f'http://127.0.0.1{place}'})
    assert seen_from(f'/c/{chat.id}') == (f'/c/{chat.id}/summary', '#messages')
    assert seen_from('/') == seen_from('/c/another') == way() == (None, None)

def test_a_path_too_long_to_be_summarised_is_read_from_where_it_fits():
    def message(n): return main.Message(n, 'c', 'o', n - 1, n, ('user', 'assistant')[n % 2], 'x' * 100, 'done', '', '',
                                        None, 0, 0, [], {'weight': 1000 if n == 7 else 'canary'})
    path = [*map(message, range(8)), main.Message(8, 'c', 'o', 7, 8, 'user', main.SUMMARISING, 'done', '', '', None, 0, 0)]
    assert [m.id for m in main.fitting(path, 800)] == [4, 5, 6, 7, 8] and main.fitting(path, 0) == path
    assert main.fitting(path, 5000) == path and main.fitting(path, 900) == path[2:]

def test_a_list_that_is_wanted_while_the_learner_rests_is_asked_for_after_the_rest():
    class Hours(asyncio.SelectorEventLoop):
        "Where nothing but time goes by, and at once."
        now = 0
        def time(self): return self.now
        def _run_once(self):
            if not self._ready and self._scheduled: self.now = max(self.now, self._scheduled[0]._when)
            super()._run_once()

    async def wanted():
        asked, swept = [], []
        claude = main.Claude(main.Settings.read({'ANTHROPIC_API_KEY': 'test'}))
        async def listed(): asked.append(asyncio.get_running_loop().time())
        claude.listed = listed
        turns = main.Turns(None, claude, main.Settings())
        turns.sweep = lambda: swept.append(asyncio.get_running_loop().time())
        learner = asyncio.create_task(turns._learn())
        for at, want in ((30, True), (100, False), (130, True)):
            await asyncio.sleep(at - asyncio.get_running_loop().time())
            if want: turns.stale.set()
        await asyncio.sleep(3600)
        learner.cancel()
        assert swept == asked, 'the trash is looked at, too'
        return asked
    with asyncio.Runner(loop_factory=Hours) as runner: assert [round(at) for at in runner.run(wanted())] == [0, 60, 130]

@pytest.mark.parametrize('told', [b'<html>', b'[]', b'{"data": 5}', b'[' * 100_000, b'{"data": [' + b' ' * 2_000_000,
                                  b'{"data": [{}], "has_more": true}', httpx2.ReadError('x')], ids=lambda b: ascii(b)[:20])
def test_a_hostile_list_of_models_is_no_list(told):
    upstream = Upstream()
    upstream.models = told
    claude = main.Claude(main.Settings.read({'ANTHROPIC_API_KEY': 'test'}), httpx2.AsyncClient(transport=upstream))
    try: listed = asyncio.run(claude.listed())
    except Exception: listed = []   # whoever asks takes any exception as no answer
    assert listed == []

@pytest.mark.parametrize('steps, kept', [(['half of it', HANG], 'half of it'), ([HANG], None), ([' \n', HANG], None)])
def test_a_partial_reply_is_sent_as_text_and_never_as_a_prefill(me, upstream, steps, kept):
    chat = me.ask(first := upstream.says(*steps))
    tab = chat.watch().until(kept or '')
    assert chat.stop().status_code < 400
    tab.ends(), chat.say(second := upstream.says('fine')).ended()
    sent = [(m['role'], words(m['content'])) for m in upstream.called(second)[0].body['messages']]
    assert sent[0][1].startswith(first) and sent[-1][0] == 'user' and sent[-1][1].endswith(second)
    assert [text for role, text in sent if role == 'assistant'] == ([kept] if kept else [])
    assert all(text.strip() for _, text in sent)

LINES = 'naïve 🙂 中文\u2028 \x85 \x0c "quoted" \\ {"a": 1}\ndata: no\n\nevent: no'

@pytest.mark.parametrize('end_of_line', ['\n', '\r\n'])
@pytest.mark.parametrize('cut', [1, 2, 3, 7, 64, 100_000])
def test_events_are_read_whole_wherever_the_stream_is_cut(me, upstream, cut, end_of_line):
    stream = START + PING + b': a comment\n\n' + b''.join(delta(piece) for piece in re.split('(?<= )', LINES)) + end()
    stream += delta('after the end')
    stream = json_unescaped(stream).replace('\n', end_of_line).encode()
    chat = me.ask(upstream.plays(raw(*(stream[at:at + cut] for at in range(0, len(stream), cut)))))
    assert (chat.ended()['content'], chat.reply['status']) == (LINES, 'done')

def json_unescaped(stream):
    "The same events with characters as they are: a line of an event stream ends at CR and LF only."
    def show(line):
        return 'data: ' + json.dumps(json.loads(line[6:]), ensure_ascii=False) if line.startswith('data:') else line
    return '\n'.join(show(line) for line in stream.decode().split('\n'))

def test_other_spellings_of_an_event_stream_are_read(me, upstream):
    lines = (START + delta('terse') + end()).split(b'\n')
    terse = b''.join(b'data:' + line[6:] + b'\n\n' for line in lines if line[:5] == b'data:')
    assert me.ask(upstream.plays(raw(terse))).ended()['content'] == 'terse'

def test_half_a_character_from_upstream_does_no_harm(me, upstream):
    chat = me.ask(upstream.says('a ', '\ud83d', '\ude00', ' b \ud800 c'))
    assert chat.ended()['status'] == 'done' and chat.reply['content'].startswith('a ')
    assert chat.reply['content'].endswith(' c') and 'content-1' in chat.page()

def other(block): return event('content_block_stop', index=0) + event('content_block_start', index=1, content_block=block)
def thinking(*some):
    return other({'type': 'thinking', 'thinking': ''}) + b''.join(event(
        'content_block_delta', index=1, delta={'type': 'thinking_delta', 'thinking': each}) for each in some)

@pytest.mark.parametrize('steps', [
    [thinking('a \ud83d', '\ude00 \ud800 b')], [thinking(['x'])], [(['x'],)], [other({'type': ['x']})], [other({'type': {}})],
    [error('x').replace(b'canary', b'\\ud800')], [other({'type': 'thinking'})], [other({'type': 'thinking', 'thinking': 5})],
    [other({'type': 'file', 'sha': 'x'})], [other({'type': 'x_tool_use', 'id': 'x', 'input': json.loads('[' * 700 + ']' * 700)})],
    [other({'type': 'server_tool_use', 'id': '1', 'name': 'web_search', 'input': {'query': '\ud800'}}),
     other({'type': 'web_search_tool_result', 'tool_use_id': '1', 'content': [{'title': '\ud800', 'url': 'https://a.b/\ud800'}]})],
    [event('message_start', message={'id': '\ud800', 'usage': {}})], [end('odd \ud800')]], ids=ascii)
def test_whatever_claude_sends_it_is_saved_and_shown_and_exported_and_nobody_else_waits(new_site, upstream, steps):
    me = new_site().person()
    chat = me.ask(upstream.plays(raw(START, *[encoded(step) for step in steps], end())))
    assert me.ask(upstream.says('An answer.')).ended()['content'] == 'An answer.'
    assert chat.ended()['status'] in ENDED and 'content-1' in chat.page() and me.get('/export.zip').content[:2] == b'PK'
    assert '## Claude' in me.get(f'/c/{chat.id}.md').text and '\ud800' not in chat.page()
    assert chat.say(upstream.says('And on.')).ended()['content'] == 'And on.'

def encoded(step): return step if isinstance(step, bytes) else b''.join(map(delta, *step[:1]))

def test_halves_of_a_character_meet_in_thinking_too(me, upstream):
    chat = me.ask(upstream.says(thinking('a \ud83d', '\ude00 b')))
    assert chat.ended() and '<pre id="said-1-0">a \U0001f600 b</pre>' in chat.page()

def test_a_reply_that_can_not_be_saved_holds_no_other_one_up(tmp_path):
    "None is known that can't be; if there ever is one, it must not be the end of all."
    async def told():
        store, claude = main.Store(tmp_path / 'parley.db'), main.Claude(main.Settings(titles='off'))
        turns = main.Turns(store, claude, main.Settings(titles='off'))
        asked = [await turns.ask(main.OWNER, None, 'slow') for _ in range(2)]
        bad, good = [turns.find(reply) for _, reply in asked]
        bad.unsaved.append(('text', '\ud800'))
        good.cancel(main.Ended('stopped'))
        async with asyncio.timeout(DEADLINE):
            async for _ in good.follow(): pass
        assert good.reply.status == 'stopped' and not bad.over
        async with asyncio.timeout(DEADLINE):
            async for _ in bad.follow():
                if 'Not saved yet' in bad.notice: break
        bad.unsaved.clear()
        await turns.close()
        await claude.sdk.close()
        store.close()
    asyncio.run(told())

def test_thinking_is_not_text(me, upstream):
    think = event('content_block_start', index=0, content_block={'type': 'thinking', 'thinking': '', 'signature': ''}) \
        + event('content_block_delta', index=0, delta={'type': 'thinking_delta', 'thinking': 'hm'}) \
        + event('content_block_delta', index=0, delta={'type': 'signature_delta', 'signature': 'x'}) \
        + event('content_block_stop', index=0) + event('something_new', index=0)
    assert me.ask(upstream.says(think, 'Yes.')).ended()['content'] == 'Yes.'


# ---- What can be chosen ---------------------------------------------------------------------------------------------

def field(html, name): return next(iter(Page(html).root.all(lambda n: n.attrs.get('name') == name)), None)
def options(html, name): return [o.attrs['value'] for o in field(html, name).all(lambda n: n.tag == 'option')]
def typed(html): return Page(html).root.find('message').text
def picked(html, name): return [o.attrs['value'] for o in field(html, name).all(lambda n: 'selected' in n.attrs)]

def test_the_panel_offers_what_the_model_has_and_nothing_else(lab):
    me = lab.person()
    nova, bare, last = (me.post('/choices', model=m, effort='ultra', system='Hm.').text
                        for m in ('claude-nova-1', 'claude-bare-1', 'claude-last-1'))
    assert options(nova, 'effort') == ['', 'low', 'high', 'max', 'ultra'] and picked(nova, 'effort') == ['ultra']
    assert options(nova, 'thinking') == ['', 'off'] and field(nova, 'max_tokens').attrs['max'] == '9000'
    assert not field(bare, 'effort') and not field(bare, 'thinking') and 'does not take this effort' in bare
    assert '[]' not in bare and '()' not in bare and 'Hm.' in bare and 'retires 2027-02-03' in last and 'price is unknown' in last
    assert 'claude-gone-1' not in options(nova, 'model') and '<script>' not in nova
    assert [group.attrs['label'] for group in field(nova, 'model').children if not isinstance(group, str)] \
        == ['Haiku', 'Nova', 'Others', 'Deprecated']

def test_without_a_script_the_panel_keeps_what_was_typed(lab):
    me = lab.person()
    page = me.post('/choices', htmx=False, do='save', model='claude-nova-1', effort='max', message='half a thought').text
    assert picked(page, 'effort') == ['max'] and 'half a thought' in typed(page)
    chat = me.ask('One.', model='claude-bare-1').over()
    page = chat.post('/choices', htmx=False, model='claude-nova-1', system='Hm.', message='half a thought').text
    assert picked(page, 'model') == ['claude-nova-1'] and 'half a thought' in typed(page)
    assert 'Hm.' in field(chat.page(), 'system').text and f'/c/{chat.id}/choices' in page
    chat.post(htmx=False, model='claude-old-1', message=(question := lab.upstream.says('Two.')))
    chat.ended()
    assert body(lab, question)['model'] == 'claude-old-1'

@pytest.mark.parametrize('do, status', [
    ({'do': 'save'}, 200), ({'do': 'use'}, 200), ({'do': 'keep', 'prompt_name': 'One'}, 200), ({'do': 'drop'}, 200),
    ({'instead': 'claude-old-1'}, 200), ({'do': 'keep', 'prompt_name': ''}, 422), ({'system': 'x' * 100}, 413)])
def test_without_a_script_one_writes_on_from_the_page_that_answers_a_setting(lab, do, status):
    me = lab.person()
    chat = me.ask('One.', model='claude-nova-1').over()
    for place, home in (('/choices', '/'), (f'/c/{chat.id}/choices', f'/c/{chat.id}')):
        page = me.post(place, htmx=False, **{'model': 'claude-nova-1', 'system': 'Hm.', 'message': 'typed'} | do)
        composer = Page(page.text).root.find('composer').attrs
        assert page.status_code == status and composer['action'] == composer['hx-post'] == home and 'typed' in typed(page.text)
        sent = me.post(composer['action'], htmx=False, message=(question := lab.upstream.says('Sent.')))
        Chat(me, sent.headers['location'].removeprefix('/c/'), '').ended()
        assert sent.status_code == 303 and len(lab.upstream.called(question)) == 1
        looked = me.post('/look', htmx=False, theme='dark', back=field(page.text, 'back').attrs['value'])
        assert looked.headers['location'] == home
    for prompt in options(page.text, 'prompt')[1:] if field(page.text, 'prompt') else []: me.post('/choices', do='drop', prompt=prompt)

def filled(html, **changed):
    "What the settings of a page post without a script, with some of them changed."
    def value(name): return ''.join(picked(html, name)) or field(html, name).attrs.get('value') or plain(field(html, name).text)
    return {name: value(name) for name in ('model', 'effort', 'max_tokens', 'system', 'shown')} | changed

@pytest.mark.parametrize('script', [True, False])
def test_an_older_page_changes_only_the_setting_that_is_changed_in_it(lab, script):
    chat = lab.person().ask('One.', model='claude-nova-1', effort='low', system='Hm.\nHm.').over()
    old = chat.page()
    chat.post('/choices', **filled(chat.page(), effort='max', system='New.'), headers={'HX-Trigger-Name': 'effort'})
    chat.post('/choices', **filled(chat.page(), system='Newer.\r\nYes.'), htmx=False)
    by = {'HX-Trigger-Name': 'max_tokens'} if script else {}
    chat.post('/choices', **filled(old, max_tokens='500', system='Hm.\r\nHm.'), headers=by, htmx=script)
    now = chat.page()
    assert picked(now, 'effort') == ['max'] and plain(field(now, 'system').text) == 'Newer. Yes.'
    assert field(now, 'max_tokens').attrs['value'] == '500' and picked(now, 'model') == ['claude-nova-1']
    chat.post('/choices', **filled(now, system=''), headers={'HX-Trigger-Name': 'system'} if script else {}, htmx=script)
    assert not plain(field(chat.page(), 'system').text)

def test_two_settings_changed_at_the_same_moment_are_both_kept(lab):
    chat = lab.person().ask('One.', model='claude-nova-1', effort='low').over()
    page, writer, gate = chat.page(), lab.door.state.parley.store.threads['writes'], threading.Event()
    def change(name, value): return chat.post('/choices', **filled(page, **{name: value}), headers={'HX-Trigger-Name': name})
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        writer.submit(gate.wait, DEADLINE)
        answers = [both.submit(change, 'effort', 'max'), both.submit(change, 'max_tokens', '500')]
        try: assert eventually(lambda: writer._work_queue.qsize() == 2)
        finally: gate.set()
        assert all(answer.result().status_code < 400 for answer in answers)
    assert picked(chat.page(), 'effort') == ['max'] and field(chat.page(), 'max_tokens').attrs['value'] == '500'

def test_a_prompt_is_kept_under_a_name_used_and_deleted(lab):
    me = lab.person()
    kept = me.post('/choices', do='keep', prompt_name=' Poet ', system='Rhyme.').text
    me.post('/choices', do='keep', prompt_name='Poet', system='Rhyme well.')
    _, poet = options(kept, 'prompt')
    newer = options(me.get('/').text, 'prompt')[1]
    used = me.post('/choices', do='use', prompt=newer, system='').text
    assert plain(field(me.post('/choices', do='use', prompt='', system='Typed.').text, 'system').text) == 'Typed.'
    assert picked(kept, 'prompt') == [poet] and plain(field(used, 'system').text) == 'Rhyme well.'
    assert me.post('/choices', do='keep', prompt_name='', system='x').status_code == 422
    assert 'Rhyme well.' in me.post('/choices', do='drop', prompt=newer, system='Rhyme well.').text
    assert not field(me.get('/').text, 'prompt')

def test_a_system_prompt_that_is_too_long_is_refused_in_words(lab):
    me = lab.person()
    for path, chat in (('/', None), ('/choices', None), ('/choices', me.ask('One.'))):
        answer = (chat or me).post(path, htmx=False, message='precious', model='claude-nova-1', system='x' * 100)
        assert answer.status_code == 413 and '99' in answer.text and 'precious' in answer.text

def test_thinking_that_has_no_room_says_so(lab):
    chat = lab.person().ask('One.', model='claude-old-1', thinking='on', max_tokens='1024').over()
    said = 'only thinks where an answer may have more than 1,024 tokens'
    assert said in chat.page() and said in chat.post('/choices', htmx=False, model='claude-old-1', thinking='on', max_tokens='9').text
    told = chat.post('/choices', max_tokens='1024', headers={'HX-Trigger-Name': 'max_tokens'}).text
    assert said in next(n for n in Page(told).root.children if n.attrs.get('hx-swap-oob') == 'innerHTML').text
    assert said not in chat.post('/choices', max_tokens='1025', headers={'HX-Trigger-Name': 'max_tokens'}).text
    assert said not in chat.post('/choices', model='claude-old-1', max_tokens='9').text

@pytest.mark.parametrize('most', ['0', '999999', '-5'])
def test_tokens_out_of_range_are_told_of_stay_as_typed_and_are_in_nobodys_way(lab, most):
    me, said = lab.person(), 'An answer may have 1 to 9,000 tokens.'
    chat = me.ask(first := lab.upstream.says('One.'), model='claude-nova-1', max_tokens=most).over()
    told = chat.post('/choices', **filled(chat.page()), headers={'HX-Trigger-Name': 'max_tokens'}).text
    assert said in next(n for n in Page(told).root.children if n.attrs.get('hx-swap-oob') == 'innerHTML').text
    unscripted = chat.post('/choices', **filled(chat.page()), htmx=False, message='typed').text
    for page in (unscripted, chat.page()): assert said in page and field(page, 'max_tokens').attrs['value'] == most
    assert said in Page(unscripted).root.find('notice').text
    chat.say(second := lab.upstream.says('Two.')).ended()
    assert [body(lab, question)['max_tokens'] for question in (first, second)] == [9_000, 9_000]
    assert said not in chat.post('/choices', **filled(chat.page(), max_tokens='9'), htmx=False).text

def test_a_retired_model_says_so_and_offers_the_next_of_its_line(lab):
    me = lab.person()
    chat = me.ask(lab.upstream.says('One.'), system='Hm.')
    chat.ended(), asyncio.run(lab.door.state.parley.store.choose('owner', chat.id, lambda _: {'model': 'claude-gone-1'}))
    assert 'is retired' in chat.page() and 'Go on with The claude-old-1' in chat.page()
    assert 'is retired' not in chat.post('/choices', model='claude-gone-1', instead='claude-old-1').text
    chat.say(question := lab.upstream.says('Two.')).ended()
    assert body(lab, question)['model'] == 'claude-old-1'


# ---- What Claude does beside writing --------------------------------------------------------------------------------

def block(index, start, *deltas):
    "The events of one content block."
    return (event('content_block_start', index=index, content_block=start)
            + b''.join(event('content_block_delta', index=index, delta=each) for each in deltas)
            + event('content_block_stop', index=index))

def thinks(index, text, signature='sig'):
    return block(index, {'type': 'thinking', 'thinking': '', 'signature': ''}, {'type': 'thinking_delta', 'thinking': text},
                 {'type': 'signature_delta', 'signature': signature})

def writes(index, text, *citations):
    return block(index, {'type': 'text', 'text': ''}, {'type': 'text_delta', 'text': text},
                 *[{'type': 'citations_delta', 'citation': each} for each in citations])

def cites(url, text, **more):
    return {'type': 'web_search_result_location', 'url': url, 'title': 'A page', 'encrypted_index': 'x', 'cited_text': text} | more

PAGES = [{'type': 'web_search_result', 'url': 'https://a.example/x', 'title': 'A page', 'encrypted_content': 'secret', 'page_age': 'May'},
         {'type': 'web_search_result', 'url': 'javascript:alert(1)', 'title': '<b>bad</b>', 'encrypted_content': 'secret'}]
SEARCH = (block(1, {'type': 'server_tool_use', 'id': 's1', 'name': 'web_search', 'input': {}},
                {'type': 'input_json_delta', 'partial_json': '{"query": "<i>tea'}, {'type': 'input_json_delta', 'partial_json': '</i>"}'}),
          block(2, {'type': 'web_search_tool_result', 'tool_use_id': 's1', 'content': PAGES}))
MESSAGE = event('message_start', message={'id': 'm', 'type': 'message', 'role': 'assistant', 'model': 'x', 'content': [],
                                          'usage': {'input_tokens': 3, 'output_tokens': 1}})
def steps(page, idx=1): return plain(page.root.find(f'steps-{idx}').text), [
    plain(''.join(c for c in n.children if isinstance(c, str))) for n in page.root.find(f'steps-{idx}').all(lambda n: n.tag == 'summary')]

def test_thinking_and_searching_are_shown_as_they_happen_and_after_a_reload(me, upstream):
    gates = [Gate() for _ in range(3)]
    chat = me.ask(upstream.plays(raw(
        MESSAGE, event('content_block_start', index=0, content_block={'type': 'thinking', 'thinking': '', 'signature': ''}),
        event('content_block_delta', index=0, delta={'type': 'thinking_delta', 'thinking': 'I <b>wonder'}), gates[0],
        event('content_block_delta', index=0, delta={'type': 'thinking_delta', 'thinking': ' aloud'}),
        event('content_block_delta', index=0, delta={'type': 'signature_delta', 'signature': 'sig'}),
        event('content_block_stop', index=0), SEARCH[0], gates[1], SEARCH[1], writes(3, 'Tea', cites('https://a.example/x', 'hot')),
        gates[2], writes(4, '.'), end())))
    tab = chat.watch().until('I <b>wonder')
    assert steps(tab.page)[1] == ['Thinking'] and steps(Page(chat.page()))[0] == 'I <b>wonder'
    gates[0].open()
    while not any('Searching for “<i>tea</i>”' in told for told in steps(tab.page)[1]): assert tab.read()
    assert steps(tab.page)[0] == 'I <b>wonder aloud' and steps(chat.tab().page) == steps(tab.page)
    gates[1].open()
    tab.until('a.example')
    gates[2].open()
    tab.ends()
    assert steps(tab.page)[1] == ['Thought for a moment', 'Searched for “<i>tea</i>”'] or 'Thought' in steps(tab.page)[1][0]
    assert steps(tab.page) == steps(Page(chat.page())) and 'javascript:' not in chat.page()
    assert chat.reply['content'] == 'Tea[¹](<https://a.example/x> "hot").'

@pytest.mark.parametrize('seconds, words', [(.0, 'a moment'), (.99, 'a moment'), (1., '1 s'), (75., '75 s')])
def test_how_long_was_thought_is_said_in_words(seconds, words):
    assert main.told_step(main.Step(0, {'type': 'thinking', 'seconds': seconds}, {}))[0] == f'Thought for {words}'

def test_a_call_without_a_result_says_so_once_the_reply_is_over(me, upstream):
    chat = me.ask(upstream.plays(raw(MESSAGE, SEARCH[0], HANG)))
    tab = chat.watch()
    while not any('Searching' in told for told in steps(tab.page)[1]): assert tab.read()
    chat.stop(), tab.ends()
    assert steps(tab.page) == ('The reply ended before a result came.', ['Searched for “<i>tea</i>”: no result came'])
    assert steps(Page(chat.page())) == steps(tab.page)

@pytest.mark.parametrize('said, shown', [
    ('2025-08-25T22:30:00Z', '<time datetime="2025-08-25">2025-08-25</time>'), ('2025-02-31', '2025-02-31'),
    ('2025-08-25', '<time datetime="2025-08-25">2025-08-25</time>'), ('April 30, 2025', 'April 30, 2025'), (7, '7')])
def test_the_age_of_a_page_is_a_day(said, shown):
    assert f' · {shown}</li>' in main.framed(main.Source('https://a.example/x', 'A page', said))

def test_a_search_that_failed_says_so_before_it_is_opened(me, upstream):
    failed = {'type': 'web_search_tool_result_error', 'error_code': 'max_uses_exceeded'}
    chat = me.ask(upstream.plays(raw(MESSAGE, SEARCH[0], block(
        2, {'type': 'web_search_tool_result', 'tool_use_id': 's1', 'content': failed}), writes(3, 'Hm.'), end())))
    told = 'It failed: max uses exceeded.', ['Searched for “<i>tea</i>”: it failed']
    assert steps(chat.watch().ends().page) == told == steps(Page(chat.page()))

def test_a_call_that_is_waited_for_goes_back_with_the_pause_and_its_result_comes_after_it(me, upstream):
    chat = me.ask(question := upstream.plays(raw(MESSAGE, SEARCH[0], end('pause_turn')), raw(
        MESSAGE, SEARCH[1], end('pause_turn')), raw(MESSAGE, writes(0, 'Tea.'), end())))
    assert chat.ended()['content'] == 'Tea.' and steps(Page(chat.page()))[1] == ['Searched for “<i>tea</i>”']
    _, second, third = [call.body['messages'][1:] for call in upstream.called(question)]
    assert [[block['type'] for block in turn['content']] for turn in second] == [['server_tool_use']]
    assert [[block['type'] for block in turn['content']] for turn in third] == [
        ['server_tool_use'], ['web_search_tool_result']]
    chat.say(question := upstream.says('well')).ended()
    assert [block['type'] for block in upstream.called(question)[0].body['messages'][1]['content']] == [
        'server_tool_use', 'web_search_tool_result', 'text']

def test_a_pause_between_texts_is_no_glue(me, upstream):
    chat = me.ask(upstream.plays(raw(MESSAGE, writes(0, 'Searching.'), *SEARCH, end('pause_turn')),
                                 raw(MESSAGE, writes(0, 'Again.'), *SEARCH, end('pause_turn')), raw(MESSAGE, writes(0, 'Tea.'), end())))
    assert chat.ended()['content'] == 'Searching.\n\nAgain.\n\nTea.'

def test_what_was_declined_is_not_sent_again(me, upstream):
    chat = me.ask(first := upstream.says('One.')).over()
    chat.say(no := upstream.says('I would ', stop='refusal')).ended()
    chat.say(third := upstream.says('Three.')).ended()
    assert upstream.called(third)[0].questions == [first, third]
    upstream.plans[main.SUMMARISING] = [says('I would not', stop='refusal')]
    try: assert chat.post('/summary').status_code == 200 and chat.ended()['note']
    finally: del upstream.plans[main.SUMMARISING]
    chat.say(last := upstream.says('Last.')).ended()
    assert upstream.called(last)[0].questions == [first, third, last] and no in chat.page()

def test_a_page_that_was_fetched_is_cited_by_its_address(me, upstream):
    document = {'type': 'document', 'title': 'A page', 'source': {'type': 'text', 'media_type': 'text/plain', 'data': 'tea'}}
    fetched = {'type': 'web_fetch_result', 'url': 'https://a.example/tea', 'content': document}
    def found(**more): return {'type': 'char_location', 'cited_text': 'tea', 'document_index': 0, **more}
    chat = me.ask(upstream.plays(raw(
        MESSAGE, block(0, {'type': 'server_tool_use', 'id': 'f1', 'name': 'web_fetch', 'input': {}}),
        block(1, {'type': 'web_fetch_tool_result', 'tool_use_id': 'f1', 'content': fetched}),
        writes(2, 'Tea', found(document_title='A page')), writes(3, ', tea', found(document_title='my.txt')),
        writes(4, ', tea', {'type': 'search_result_location', 'source': 'https://b.example', 'title': 'B', 'cited_text': 'tea'}),
        writes(5, ', tea', {'type': 'search_result_location', 'source': 'javascript:x', 'title': 'B', 'cited_text': 'tea'}), writes(6, '.'), end())))
    assert chat.ended()['content'] == ('Tea[¹](<https://a.example/tea> "tea"), tea (my.txt), tea[²](<https://b.example> "tea"), '
                                       'tea (a file).')

def test_what_is_fetched_is_not_the_length_of_the_reply(new_site, upstream):
    paper = {'type': 'document', 'title': None, 'source': {'type': 'base64', 'media_type': 'application/pdf', 'data': 'x' * 5_000_000}}
    fetched = {'type': 'web_fetch_result', 'url': 'https://a.example/x.pdf', 'content': paper}
    chat = new_site().person().ask(upstream.plays(raw(
        MESSAGE, block(0, {'type': 'server_tool_use', 'id': 'f1', 'name': 'web_fetch', 'input': {}}),
        block(1, {'type': 'web_fetch_tool_result', 'tool_use_id': 'f1', 'content': fetched}), writes(2, 'Read.'), end())))
    assert (chat.ended()['status'], chat.reply['content'], chat.reply['note']) == ('done', 'Read.', '')
    assert len(chat.page()) < 50_000

def heard(*events):
    heard = main.Heard()
    for each in events: heard.take(json.loads(each.partition(b'data: ')[2]))
    return heard

def test_what_an_answer_brings_beside_its_words_is_bounded():
    def given(n): return event('content_block_delta', index=0, delta={'type': 'input_json_delta', 'partial_json': '[],' * n})
    call = event('content_block_start', index=0, content_block={'type': 'tool_use', 'id': 't', 'name': 't', 'input': {}})
    heard(call, *[given(100_000)] * 3)
    with pytest.raises(main.Fault): heard(call, *[given(100_000)] * 4)
    empty = event('content_block_start', index=0, content_block={'type': 'text', 'text': ''})
    heard(*[empty] * 5_000)
    with pytest.raises(main.Fault): heard(*[empty] * 5_001)
    lines, many = main.EventLines(), event('content_block_start', index=0, content_block={'type': 'x', 'input': [[]] * 300_000})
    before, after = lines.feed(many + b'data: {}\n\n'), lines.feed(many)
    assert [type(each) for each in before + after] == [dict, dict, main.Fault]
    assert [type(each) for each in main.EventLines().feed(event('x', data='x' * 15_000_000))] == [dict]

def test_long_input_of_a_tool_is_shown_up_to_a_point():
    shown = main.in_json([[]] * 10**6)
    assert shown.endswith('(cut)') and len(shown) < main.LONGEST_STEP + 20 and main.in_json({}) == ''
    assert main.in_json({'a': ['é', 1]}) == json.dumps({'a': ['é', 1]}, ensure_ascii=False, indent=1)

def test_each_call_of_a_reply_has_its_own_price(new_site, upstream):
    upstream.models = [[can('claude-haiku-5-5', 'haiku')]]
    def part(reason): return raw(
        event('message_start', message={'id': 'm', 'role': 'assistant', 'content': [], 'usage': {'input_tokens': 60_000}}),
        writes(0, 'x'), event('message_delta', delta={'stop_reason': reason}, usage={'output_tokens': 0}) + event('message_stop'))
    try:
        chat = new_site(model='claude-haiku-5-5').person().ask(upstream.plays(part('pause_turn'), part('pause_turn'), part('end_turn')))
        assert chat.ended()['meta']['cost'] == pytest.approx(3 * .006)
    finally: upstream.models = None

def test_a_refusal_says_why(me, upstream):
    told = event('message_delta', delta={'stop_reason': 'refusal', 'stop_details': {
        'type': 'refusal', 'category': 'cyber', 'explanation': 'Not <b>this</b>.'}}, usage={'output_tokens': 9})
    chat = me.ask(upstream.plays(raw(START, 'half', event('content_block_stop', index=0), told, event('message_stop'))))
    assert chat.ended()['note'] == 'Claude declined to go on with this: question and answer are not sent again. Not <b>this</b>.'
    assert '&lt;b&gt;this' in chat.page() and '<b>this' not in chat.page()

def test_a_refusal_that_quotes_the_key_does_not_show_it(new_site, upstream):
    told = event('message_delta', delta={'stop_reason': 'refusal', 'stop_details': {
        'type': 'refusal', 'category': 'cyber', 'explanation': 'Not with sk-canary.'}}, usage={'output_tokens': 9})
    chat = new_site(api_key='sk-canary').person().ask(upstream.plays(
        raw(START, 'half', event('content_block_stop', index=0), told, event('message_stop'))))
    assert chat.ended()['note'].endswith('Not with ….') and 'canary' not in chat.page()

def test_a_thought_that_is_cut_off_is_over_on_the_page_too(me, upstream):
    chat = me.ask(upstream.plays(raw(MESSAGE, event('content_block_start', index=0, content_block={
        'type': 'thinking', 'thinking': '', 'signature': ''}), event('content_block_delta', index=0, delta={
        'type': 'thinking_delta', 'thinking': 'so far'}), HANG)))
    tab = chat.watch().until('so far')
    def folds(): return str([fold.children for fold in tab.page.root.all(lambda n: n.tag == 'summary')])
    assert 'Thinking' in folds()
    chat.stop()
    tab.ends()
    assert 'Thinking' not in folds() and 'Thought' in folds()

def test_the_details_of_a_call_that_failed_name_its_request(me, upstream):
    chat = me.ask(upstream.plays(raw(b'{}', status=400, content_type='application/json', request_id='req_failed')))
    assert chat.ended()['status'] == 'failed' and 'req_failed' in chat.page()

def test_an_answer_goes_back_block_for_block(me, upstream):
    redacted = {'type': 'redacted_thinking', 'data': 'zzz'}
    unknown = {'type': 'something_new', 'payload': [1, {'a': None}]}
    chat = me.ask(upstream.plays(raw(
        MESSAGE, thinks(0, 'hm'), *SEARCH, writes(3, 'Tea'), writes(4, ' is hot', cites('https://a.example/x', 'hot')),
        block(5, redacted), block(6, unknown), writes(7, 'So.'), end())))
    assert chat.ended()['content'] == 'Tea is hot[¹](<https://a.example/x> "hot")\n\nSo.'
    assert 'encrypted this part' in steps(Page(chat.page()))[0]
    chat.say(question := upstream.says('well')).ended()
    (call,) = upstream.called(question)
    assert call.body['messages'][1]['content'] == [
        {'type': 'thinking', 'thinking': 'hm', 'signature': 'sig'},
        {'type': 'server_tool_use', 'id': 's1', 'name': 'web_search', 'input': {'query': '<i>tea</i>'}},
        {'type': 'web_search_tool_result', 'tool_use_id': 's1', 'content': PAGES}, {'type': 'text', 'text': 'Tea'},
        {'type': 'text', 'text': ' is hot', 'citations': [cites('https://a.example/x', 'hot')]}, redacted, unknown,
        {'type': 'text', 'text': 'So.'}]

@pytest.mark.parametrize('parts, content', [
    ([thinks(0, 'hm', ''), writes(1, 'x')], [{'type': 'text', 'text': 'x'}]),
    ([writes(0, 'x'), SEARCH[0]], [{'type': 'text', 'text': 'x'}]),
    ([writes(0, 'x'), SEARCH[1]], [{'type': 'text', 'text': 'x'}]),
    ([writes(0, 'x'), block(1, {'type': 'server_tool_use', 'id': ['odd'], 'name': 7, 'input': 'no'})], [{'type': 'text', 'text': 'x'}])])
def test_what_the_api_would_refuse_is_not_sent_back(me, upstream, parts, content):
    chat = me.ask(upstream.plays(raw(MESSAGE, *parts, end())))
    assert chat.ended()['status'] == 'done' and chat.tab().page
    chat.say(question := upstream.says('well')).ended()
    assert upstream.called(question)[0].body['messages'][1]['content'] == content

def test_a_stopped_reply_keeps_the_thinking_that_was_shown_and_goes_back_as_text(me, upstream):
    chat = me.ask(upstream.plays(raw(MESSAGE, thinks(0, 'so far'), writes(1, 'half '), HANG)))
    tab = chat.watch().until('half')
    chat.stop()
    tab.ends()
    assert 'so far' in chat.tab().said and chat.reply['status'] == 'stopped'
    chat.say(question := upstream.says('well')).ended()
    assert upstream.called(question)[0].body['messages'][1]['content'].strip() == 'half'

def test_a_pause_is_resumed_with_all_its_blocks(me, upstream):
    chat = me.ask(question := upstream.plays(raw(MESSAGE, thinks(0, 'hm'), *SEARCH, end('pause_turn')), says('Tea.')))
    assert chat.ended()['content'] == 'Tea.'
    assert [each['type'] for each in upstream.called(question)[1].body['messages'][-1]['content']] == [
        'thinking', 'server_tool_use', 'web_search_tool_result']

@pytest.mark.parametrize('text', ['"', '\\', '") [x](javascript:alert(1)', '`a`', '$x$', '</a><script>alert(1)</script>', '&quot;', '|',
                                  'a\n\nb', '*a* _b_ ~~c~~', '[1]: http://evil.example', '\ufdd0 \0', ']()'])
def test_a_citation_is_one_link_whatever_it_quotes(text):
    mark = main.cited(cites('https://a.example/x', text), {})
    html = ''.join(main.render('before `code ' + mark + ' after $5 ' + mark))
    links = Page(html).root.all(lambda n: n.tag == 'a')
    assert [(n.attrs['href'], n.text, n.attrs['class']) for n in links] == [('https://a.example/x', '¹', 'cite')] * 2
    assert 'class' not in main.render('[¹ x](https://a.example/x) [ ](https://a.example/x)')[0]
    assert links[0].attrs.get('title', '') == main.normal(' '.join(text.split()))

@pytest.mark.parametrize('url', ['javascript:alert(1)', 'https://a.example/"><script>', 'https://a.example/) [x](b', 'data:text/html,x', '<>'])
def test_the_address_of_a_citation_can_not_break_out(url):
    html = ''.join(main.render('x ' + main.cited(cites(url, 'words'), {}) + ' y'))
    links = Page(html).root.all(lambda n: n.tag == 'a')
    assert len(links) <= 1 and all(n.attrs['href'].startswith('https://a.example/') for n in links) and '<script' not in html

def test_the_same_source_has_one_number_and_a_file_is_named():
    sources = {}
    marks = [main.cited(cites(f'https://a.example/{name}', 'x'), sources) for name in 'aba']
    assert [mark[1] for mark in marks] == ['¹', '²', '¹']
    assert main.cited({'document_title': '*My* file', 'start_page_number': 3, 'cited_text': 'x'}, {}) == ' (&#42;My&#42; file, page 3)'

def test_failures_of_tools_are_said_in_words(me, upstream):
    failed = {'type': 'web_search_tool_result_error', 'error_code': 'max_uses_exceeded'}
    chat = me.ask(upstream.plays(raw(
        MESSAGE, SEARCH[0], block(2, {'type': 'web_search_tool_result', 'tool_use_id': 's1', 'content': failed}), writes(3, 'Well.'), end())))
    chat.ended()
    assert 'It failed: max uses exceeded.' in chat.tab().said

def test_searching_is_offered_and_asked_for_where_the_model_can(new_site, upstream):
    search = {'supported': True, 'web_search': {'supported': True}}
    upstream.models = [[{'id': 'finder', 'capabilities': {'server_tools': search}}, {'id': 'plain', 'capabilities': {}},
                        {'id': 'citer', 'capabilities': {'server_tools': search, 'citations': {'supported': True}}}]]
    me = new_site(model='finder').person()
    assert eventually(lambda: 'name="web"' in me.get('/').text)
    me.ask(question := upstream.says('well'), model='finder', web='on').ended()
    tools = upstream.called(question)[0].body['tools']
    assert [(tool['type'], tool['max_uses']) for tool in tools] == [('web_search_20260318', 8), ('web_fetch_20260318', 8)]
    me.ask(cited := upstream.says('well'), model='citer', web='on').ended()
    citing = [['citations' in tool for tool in body['tools']] for body in (upstream.called(question)[0].body,
                                                                           upstream.called(cited)[0].body)]
    assert citing == [[False, False], [False, True]]
    me.ask(question := upstream.says('well'), model='plain', web='on').ended()
    assert 'tools' not in upstream.called(question)[0].body
    upstream.models = None


# ---- Tools of connected servers --------------------------------------------------------------------------------------

TOKEN = 'canary-token-0123'
CALLED = (block(1, {'type': 'mcp_tool_use', 'id': 'm1', 'name': '<i>look</i>', 'server_name': 'notes', 'input': {}},
                {'type': 'input_json_delta', 'partial_json': '{"where": "<b>here"}'}),
          block(2, {'type': 'mcp_tool_result', 'tool_use_id': 'm1', 'is_error': False,
                    'content': [{'type': 'text', 'text': f'<u>found {TOKEN}'}]}))
def named(html, name): return Page(html).root.all(lambda n: n.attrs.get('name') == name)
LISTING = block(0, {'type': 'mcp_tool_listing', 'mcp_server_name': 'notes', 'tools': []})

@pytest.fixture(scope='module')
def workshop(new_site, upstream):
    "A site whose model is known, with two servers; their ids are 1 and 2."
    upstream.models = [[{'id': 'claude-sonnet-5-5', 'capabilities': {'citations': {'supported': True}}}]]
    site = new_site()
    me = site.person()
    assert eventually(lambda: site.door.state.parley.claude.models)
    upstream.models = None
    for server in ({'name': 'notes', 'url': 'https://mcp.example/notes?key=canary-key', 'token': TOKEN},
                   {'name': 'here', 'url': 'http://127.0.0.1:9/mcp'}):
        assert me.post('/connections', **server).status_code == 303
    return site

def test_a_server_is_listed_without_its_secrets_and_can_be_deleted(workshop):
    me = workshop.person()
    page = me.get('/connections').text
    assert 'https://mcp.example/notes' in page and 'a token is kept' in page and 'no token' in page and 'canary' not in page
    chat = me.ask(workshop.upstream.says('Well.'), model='claude-sonnet-5-5', **{'mcp-1': 'on', 'mcp-9': 'on'})
    assert [named(chat.page(), f'mcp-{n}')[0].attrs.get('checked', 'no') for n in (1, 2)] == [None, 'no']
    assert 'canary' not in chat.page() and 'mcp-1' not in me.get(f'/c/{chat.id}.json').text
    me.post('/connections', name='gone', url='https://gone.example')
    (gone,) = [n.attrs['value'] for n in named(me.get('/connections').text, 'drop') if 'gone' in n.text]
    me.post('/connections', drop=gone)
    assert 'gone.example' not in me.get('/connections').text
    me.post('/connections', name='next', url='https://next.example')
    assert named(me.get('/connections').text, 'drop')[1].attrs['value'] != gone

def test_a_backup_by_the_page_has_no_tokens(workshop, tmp_path):
    (tmp_path / 'copy.db').write_bytes(workshop.person().get('/backup').content)
    assert all(row == [''] for row in rows(tmp_path / 'copy.db', 'select token from server'))
    assert TOKEN.encode() not in (tmp_path / 'copy.db').read_bytes()
    me = workshop.person()
    me.post('/connections', name='brief', url='https://brief.example/?canary-of-the-address', token='canary-of-the-token')
    me.post('/connections', name='brief', url='https://brief.example', token='canary-is-another-token')
    me.post('/connections', drop=[n.attrs['value'] for n in named(me.get('/connections').text, 'drop') if 'brief' in n.text])
    assert b'canary-' not in me.get('/backup').content.replace(b'canary-key', b'')

@pytest.mark.parametrize('wrong', [
    {'name': 'two words'}, {'name': ''}, {'name': '<b>'}, {'url': 'http://mcp.example'}, {'url': 'https://'}, {'url': 'x'},
    {'url': 'https://me:canary@mcp.example'}, {'url': 'https://a.example/ b'}, {'url': 'http://127.0.0.1.evil.example'},
    {'url': 'javascript:alert(1)'}, {'token': 'short'}, {'token': 'has a space in it'}, {'url': 'https://a.example\\@b.example'}])
def test_a_server_that_can_not_be_is_refused_and_what_was_typed_comes_back(workshop, wrong):
    typed = {'name': 'fine', 'url': 'https://a.example', 'token': 'canary-long-enough'} | wrong
    answer = workshop.person().post('/connections', **typed)
    assert answer.status_code == 422 and 'canary-long' not in answer.text and 'role="alert"' in answer.text
    assert named(answer.text, 'url')[0].attrs['value'] == typed['url'] and 'a.example' not in workshop.person().get('/connections').text

def test_servers_are_sent_only_where_they_are_switched_on(workshop):
    me, upstream = workshop.person(), workshop.upstream
    chat = me.ask(first := upstream.says('Well.'), model='claude-sonnet-5-5', **{'mcp-1': 'on'}).over()
    (call,) = upstream.called(first)
    assert call.headers['anthropic-beta'] == 'mcp-client-2026-09-15' and 'betas' not in call.body
    assert call.body['mcp_servers'] == [{'type': 'url', 'name': 'notes', 'url': 'https://mcp.example/notes?key=canary-key',
                                         'authorization_token': TOKEN}]
    assert call.body['tools'] == [{'type': 'mcp_toolset', 'mcp_server_name': 'notes'}]
    me.ask(other := upstream.says('Well.')).ended()
    chat.post('/choices', model='claude-sonnet-5-5')
    chat.say(later := upstream.says('Well.')).ended()
    for question in (other, later):
        (call,) = upstream.called(question)
        assert 'mcp_servers' not in call.body and 'tools' not in call.body and 'anthropic-beta' not in call.headers

def test_a_tool_call_is_shown_and_goes_back_while_its_server_is_on(workshop):
    me, upstream = workshop.person(), workshop.upstream
    gate = Gate()
    chat = me.ask(question := upstream.plays(raw(MESSAGE, LISTING, CALLED[0], gate, CALLED[1], writes(3, 'Found.'), end())),
                  model='claude-sonnet-5-5', **{'mcp-1': 'on'})
    tab = chat.watch()
    while not any('Using notes · <i>look</i>' in told for told in steps(tab.page)[1]): assert tab.read()
    gate.open()
    assert tab.ends().code == 1000 and steps(tab.page) == steps(Page(chat.page()))
    told, summaries = steps(tab.page)
    assert summaries == ['Used notes · <i>look</i>'] and '"where": "<b>here"' in told and '<u>found …' in told
    everything = [chat.page(), me.get(f'/c/{chat.id}.json').text, me.get(f'/c/{chat.id}.md').text, str(chat.messages)]
    assert not any('canary' in text for text in everything)
    chat.say(question := upstream.says('Well.')).ended()
    sent = upstream.called(question)[0].body['messages'][1]['content']
    assert [each['type'] for each in sent] == ['mcp_tool_listing', 'mcp_tool_use', 'mcp_tool_result', 'text']
    assert sent[1]['input'] == {'where': '<b>here'}
    for on in ({}, {'mcp-2': 'on'}):
        chat.post('/choices', model='claude-sonnet-5-5', **on)
        chat.say(question := upstream.says('Well.')).ended()
        assert upstream.called(question)[0].body['messages'][1]['content'] == [{'type': 'text', 'text': 'Found.'}]

def test_a_tool_that_fails_and_an_api_that_quotes_the_token_are_told_without_it(workshop):
    me, upstream = workshop.person(), workshop.upstream
    failed = block(2, {'type': 'mcp_tool_result', 'tool_use_id': 'm1', 'is_error': True, 'content': 'no such place'})
    chat = me.ask(upstream.plays(raw(MESSAGE, CALLED[0], failed, writes(3, 'Well.'), end())), model='claude-sonnet-5-5')
    assert chat.ended() and 'It failed.' in chat.tab().said and 'no such place' in chat.tab().said
    assert steps(chat.tab().page)[1] == ['Used notes · <i>look</i>: it failed']
    told = json.dumps({'type': 'error', 'error': {'type': 'invalid_request_error', 'message': f'MCP server refused {TOKEN}'}})
    chat = me.ask(upstream.plays(raw(told.encode(), status=400, content_type='application/json')), **{
        'model': 'claude-sonnet-5-5', 'mcp-1': 'on'})
    assert chat.ended()['note'] == 'Claude refused the request: MCP server refused …'

def test_a_file_that_comes_in_switches_no_server_on(workshop):
    told = with_field(choices={'mcp-1': 'on', 'system': 'Hm.'}) | {'id': 'smuggled'}
    bring(workshop.person(), told)
    assert rows(workshop.db, "select choices from conversation where id = 'smuggled'") == [['{"system": "Hm."}']]


# ---- Claude's faults: all are started together, then looked at one by one -------------------------------------------

BUSY, TRYING, RETRY, ANY = r'(?i)busy|overloaded|reach', r'(?i)trying again in \d', r'(?i)retry', r'\w'
KEY, FOREIGN_API = r'(?i)\bkey\b', r'(?i)messages api'
BROKEN = [kind('canary') for kind in (httpx2.ReadError, httpx2.RemoteProtocolError, httpx2.ReadTimeout, ValueError,
                                      KeyError, IndexError, RuntimeError, OSError, AssertionError)]
DEEP = b'event: content_block_delta\ndata: ' + b'[' * 100_000 + b'\n\n'

# name: (answers, statuses allowed, text kept, calls, words the person reads)
FAULTS = {
    **{f'status {n}': ([refuses(n)], 'failed', '', 1, KEY) for n in (401, 403)},
    **{f'status {n}': ([refuses(n)], 'failed', '', 3, BUSY) for n in (429, 529, 500, 503)},
    **{f'status {n}': ([refuses(n)], 'failed', '', 1, ANY) for n in (400, 404, 413)},
    'connection refused': ([raw(before=httpx2.ConnectError('canary'))], 'failed', '', 3, BUSY),
    'busy, then well': ([refuses(529), refuses(500), says('well')], 'done', 'well', 3, 'well'),
    'retry-after is obeyed': ([refuses(429, retry_after='2'), says('well')], 'done', 'well', 2, 'well'),
    'retry-after of a day': ([refuses(429, retry_after='86400')], 'failed', '', 1, r'\d'),
    'retry-after of rubbish': ([refuses(429, retry_after='canary'), says('well')], 'done', 'well', 2, 'well'),
    'error before text': ([raw(START, error('overloaded_error'))], 'failed', '', 3, BUSY),
    'error, then well': ([raw(error('api_error')), says('well')], 'done', 'well', 2, 'well'),
    'error after text': ([raw(START, 'half', error('overloaded_error'))], 'interrupted', 'half', 1, RETRY),
    'no message_stop': ([raw(START, 'half')], 'interrupted', 'half', 1, RETRY),
    'no message_stop, only the end of the block':
        ([raw(START, 'half', event('content_block_stop', index=0))], 'interrupted', 'half', 1, RETRY),
    'cut inside an event': ([raw(START, 'half', delta('lost')[:-9])], 'interrupted', 'half', 1, ANY),
    **{f'{type(e).__name__} in mid-stream': ([raw(START, 'half', e)], 'interrupted', 'half', 1, RETRY) for e in BROKEN},
    **{f'{type(e).__name__} at once': ([raw(before=e)], 'failed interrupted', '', None, RETRY) for e in BROKEN},
    'bad JSON': ([raw(START, 'half', b'data: {oops\n\n')], 'interrupted', 'half', 1, ANY),
    'deep JSON': ([raw(START, 'half', DEEP)], 'interrupted', 'half', 1, ANY),
    'bad UTF-8': ([raw(START, 'half', b'data: "\xff\xfe\n\n')], 'interrupted', 'half', 1, ANY),
    **{f'event {body!r}': ([raw(START, 'half', b'event: content_block_delta\ndata: ' + body + b'\n\n', end())],
                           'interrupted done', 'half', 1, 'half')
       for body in (b'[]', b'5', b'null', b'"x"', b'{}', b'{"type": "content_block_delta", "delta": null}',
                    b'{"type": "content_block_delta", "delta": {"type": "text_delta", "text": 5}}')},
    'one JSON body': ([raw(json.dumps({'id': 'm', 'type': 'message', 'role': 'assistant', 'stop_reason': 'end_turn',
                      'content': [{'type': 'text', 'text': 'x'}]}).encode(), content_type='application/json')],
                      'failed', '', 1, FOREIGN_API),
    'HTML': ([raw(b'<html><script>canary</script>', content_type='text/html')], 'failed', '', 1, FOREIGN_API),
    'rubbish': ([raw(b'\x00\xff\x1f canary' * 99)], 'failed', '', 1, FOREIGN_API),
    'nothing at all': ([raw()], 'failed interrupted', '', None, RETRY),
    'max_tokens': ([says('half', stop='max_tokens')], 'done', 'half', 1, r'(?i)half.*(limit|length|token|max)'),
    'refusal': ([says('half', stop='refusal')], 'done', 'half', 1, r'(?i)half.*(refus|declin)'),
    'context': ([says('half', stop='model_context_window_exceeded')], 'done', 'half', 1, r'(?i)half.*(context|long)'),
    'tool_use': ([says('half', stop='tool_use')], 'done', 'half', 1, r'(?i)half.*called a tool.*a call of a tool'),
    'pause_turn': ([says('one, ', stop='pause_turn'), says('two')], 'done', 'one, two', 2, 'one, two'),
    'pause_turn without end': ([says('x', stop='pause_turn')], 'done interrupted', None, None, ANY)}

# these wait for the impatient site
SILENCES = {
    'silence': ([raw(START, 'half', HANG)], 'interrupted', 'half', 1, RETRY),
    'silence before text': ([raw(START, HANG)], 'interrupted failed', '', None, RETRY),
    'silence before headers': ([raw(before=HANG)], 'interrupted failed', '', None, RETRY),
    'nothing but pings': ([raw(START, 'half', *paced([PING] * 60, .2), end())], 'interrupted', 'half', 1, RETRY),
    'an endless line': ([raw(START, 'half', b': ', *paced([b'x'] * 60, .2), b'\n', end())], 'interrupted', 'half', 1,
                        ANY)}

def waited_for(fault): return fault in SILENCES or FAULTS[fault][3] != 1      # these are looked at last

@pytest.fixture(scope='module')
def faults(new_site, impatient, upstream):
    me = new_site().person()
    started = {name: (me, upstream.plays(*row[0])) for name, row in FAULTS.items()}
    started |= {name: (impatient, upstream.plays(*row[0])) for name, row in SILENCES.items()}
    chats = {name: (person.ask(question), question) for name, (person, question) in started.items()}
    return {name: (chat, chat.watch(), question) for name, (chat, question) in chats.items()}

@pytest.mark.parametrize('fault', sorted(FAULTS | SILENCES, key=waited_for))
def test_a_fault_of_claude_is_said_in_words_and_loses_nothing(faults, upstream, fault):
    _, statuses, kept, calls, read = (FAULTS | SILENCES)[fault]
    chat, tab, question = faults[fault]
    assert tab.ends().code in (1000, None)          # None: it had ended before the answer of the POST was made
    asked, reply = chat.messages
    assert (asked['content'], asked['status']) == (question, 'done')
    assert reply['status'] == tab.status in statuses.split()
    assert kept is None or reply['content'] == kept
    fresh = Tab(chat, page := chat.page())
    assert tab.text == plain(reply['content']) == fresh.text
    assert re.search(read, plain(fresh.bubble.text), re.S), fresh.bubble.text
    assert 'canary' not in tab.said + page and 'Traceback' not in page
    assert calls == len(upstream.called(question)) or calls is None and len(upstream.called(question)) < 30
    assert all(call.closed.wait(DEADLINE) for call in upstream.called(question))

@pytest.mark.parametrize('fault', ['status 529', 'error before text', 'connection refused', 'busy, then well'])
def test_waiting_for_the_next_try_is_shown(upstream, me, fault):
    chat = me.ask(upstream.plays(*FAULTS[fault][0]))
    tab = chat.watch()
    while not re.search(TRYING, tab.said): assert tab.read(), tab.said
    chat.stop(), tab.ends()
    assert not re.search(TRYING, tab.said) and chat.reply['status'] == 'stopped'

def test_retry_after_is_waited_for(faults, upstream):
    chat, _, question = faults['retry-after is obeyed']
    first, second = (chat.ended(), upstream.called(question))[1]
    assert second.at - first.at >= 2


@pytest.mark.parametrize('last, status', [
    (error('overloaded_error'), 'interrupted'), (b'data: {not json\n\n', 'interrupted'), (b'data: [1]\n\n', 'interrupted'),
    (event('content_block_delta', index=0, delta={'type': 'text_delta'}), 'interrupted'),
    (end() + b'data: [DONE]\n\n', 'done'), (end(None), 'interrupted'), (end('martian'), 'done')],
    ids=['error', 'no json', 'no object', 'no text', 'done twice', 'no reason', 'odd reason'])
def test_what_came_before_a_fault_in_the_same_read_is_kept_and_asked_for_once(me, upstream, last, status):
    question = upstream.plays(raw(START + delta('kept'), delta(' words') + last, content_type='text/event-stream'))
    reply = me.ask(question).ended()
    assert (reply['content'], reply['status'], len(upstream.called(question))) == ('kept words', status, 1)
    assert bool(reply['note']) == (last != end() + b'data: [DONE]\n\n')

def test_a_key_that_a_server_quotes_is_not_shown(me, upstream):
    body = b'{"error": {"type": "invalid_request_error", "message": "the key test was given"}}'
    reply = me.ask(upstream.plays(raw(body, status=400, content_type='application/json'))).ended()
    assert reply['status'] == 'failed' and 'was given' in reply['note'] and 'test' not in reply['note']

# ---- Turns: the heart -----------------------------------------------------------------------------------------------

def test_a_reply_outlives_the_tab_that_asked(me, upstream):
    gate = Gate()
    chat = me.ask(question := upstream.says('half ', gate, 'whole'))
    chat.watch().until('half').drop()
    gate.open()
    assert (chat.ended()['content'], len(upstream.called(question))) == ('half whole', 1)

def test_a_reply_nobody_watches_is_written(me, upstream):
    chat = me.ask(question := upstream.says('alone'))
    assert eventually(lambda: chat.reply['status'] == 'done') and len(upstream.called(question)) == 1

def test_a_reply_that_ends_at_once_is_shown_whole_everywhere(me, upstream):
    for _ in range(20):
        chat = me.ask(upstream.says('at once'))
        assert chat.watch().ends().text == chat.tab().text == 'at once' == chat.reply['content']

def eventually(look, late=DEADLINE):
    until = time.monotonic() + late
    while not (seen := look()) and time.monotonic() < until: time.sleep(.01)
    return seen

def test_the_first_piece_is_shown_at_once_and_the_rest_in_frames(new_site, upstream):
    gate, pieces = Gate(), ['piece '] * 400
    chat = new_site(frame_seconds=FRAME).person().ask(upstream.says('first ', gate, *paced(pieces, .001)))
    tab = chat.watch().until('first')
    gate.open()
    assert tab.ends().text == plain('first ' + ' '.join(pieces)) and tab.frames < 150

def test_two_viewers_end_with_the_same_text(me, upstream):
    middle, last = Gate(), Gate()
    chat = me.ask(question := upstream.says('one ', middle, 'two ', last, 'three'))
    early = chat.watch().until('one')
    middle.open()
    late = chat.tab().until('two')
    last.open()
    assert early.ends().text == late.ends().text == 'one two three' and early.code == late.code == 1000
    assert len(upstream.called(question)) == 1

def test_text_is_in_the_database_before_any_tab_sees_it(site, me, upstream):
    gates = [Gate() for _ in range(5)]
    chat = me.ask(upstream.says(*(step for n, gate in enumerate(gates) for step in (f'word{n} ', gate))))
    tab = chat.watch()
    for n, gate in enumerate(gates):
        tab.until(f'word{n}')
        assert plain(chat.reply['content']) == tab.text
        held = rows(site.db, 'select text from piece p join message m on m.id = p.message '
                             f"where conversation = '{chat.id}' order by seq")
        assert plain(''.join(text for text, in held)) == tab.text
        gate.open()

def test_a_finished_reply_gives_its_final_state_and_closes_cleanly(me, upstream):
    chat = me.ask(upstream.says('all of it')).over()
    late = chat.watch()
    late.socket = late.socket or me.socket(f'/ws/chat/{chat.id}/1')     # it may have been over before it was shown
    late.ends()
    assert (late.code, late.text, late.status) == (1000, 'all of it', 'done')

@pytest.mark.parametrize('steps', [
    [HANG], ['half ', HANG], ['half ', *paced([PING] * 400, .05)], ['half ', *paced(['more '] * 4000, .005)]])
def test_stop_keeps_the_text_and_closes_the_connection(me, upstream, steps):
    chat = me.ask(question := upstream.says(*steps))
    tab = chat.watch().until(steps[0] if steps[0] is not HANG else '')
    eventually(lambda: upstream.called(question))
    asked = time.monotonic()
    assert chat.stop().status_code in (200, 204, 303)
    call, = upstream.called(question)
    assert call.closed.wait(2) and time.monotonic() - asked < 2        # 300 ms are promised
    kept, tab = chat.reply, tab.ends()
    assert (tab.code, tab.status, kept['status']) == (1000, 'stopped', 'stopped')
    assert tab.text == plain(kept['content']) and call.said.startswith(kept['content'])
    assert chat.say(upstream.says('next')).ended() and chat.messages[1] == kept      # it never grows again

def test_stop_is_heard_before_claude_has_answered_at_all(me, upstream):
    chat = me.ask(question := upstream.plays(raw(before=HANG)))
    assert eventually(lambda: upstream.called(question)) and chat.stop().status_code < 400
    assert upstream.called(question)[0].closed.wait(DEADLINE) and chat.ended()['status'] == 'stopped'

def test_stop_is_heard_over_the_socket_while_a_reply_streams(me, upstream):
    chat = me.ask(question := upstream.says('half ', HANG))
    watcher, tab = chat.tab(), chat.watch().until('half')
    tab.socket.send('{"action": "stop", "HEADERS": {"HX-Request": "true"}}')
    assert (tab.ends().code, tab.status, watcher.ends().status) == (1000, 'stopped', 'stopped')
    assert upstream.called(question)[0].closed.wait(DEADLINE) and chat.reply['content'] == 'half '

def test_stop_during_the_wait_for_a_retry(me, upstream):
    chat = me.ask(question := upstream.plays(refuses(529, retry_after='12')))
    tab = chat.watch().until('trying again')
    chat.stop()
    assert (tab.ends().status, chat.reply['status'], len(upstream.called(question))) == ('stopped', 'stopped', 1)

def test_stop_is_harmless_when_nothing_runs(me, upstream):
    chat = me.ask(upstream.says('done'))
    before = chat.ended()
    assert chat.stop().status_code in (200, 204, 303) and chat.reply == before

def test_a_second_message_is_refused_while_a_reply_runs(me, upstream):
    chat = me.ask(upstream.says('half ', HANG))
    for path, form in [('', {'message': 'impatient'}), ('/retry', {})]:
        refused = chat.post(path, **form)
        assert refused.status_code == 409 and a_sentence(refused)
    assert len(chat.messages) == 2
    chat.stop()

def test_a_send_with_the_same_key_is_the_same_send(me, upstream):
    chat = me.ask(upstream.says('first')).over()
    one = chat.post(message=(question := upstream.says('once')), key='key-1')
    two = chat.post(message=question, key='key-1')
    chat.ended()
    three = chat.post(message=question, key='key-1')
    assert {one.status_code, two.status_code, three.status_code} == {200}
    assert [[n.attrs['id'] for n in bubbles(a.text)] for a in (one, two, three)] == [['msg-2', 'msg-3']] * 3
    assert len(chat.messages) == 4 and len(upstream.called(question)) == 1
    assert 'ws-connect' not in three.text
    assert chat.post(message='another text', key='key-1').status_code == 409 and len(chat.messages) == 4

@pytest.mark.parametrize('new', [True, False])
def test_ten_posts_at_once_with_one_key_are_one_question(me, upstream, new):
    chat = None if new else me.ask(upstream.says('first'))
    if chat: chat.ended()
    question, path = upstream.says('once'), '/' if new else f'/c/{chat.id}'
    with concurrent.futures.ThreadPoolExecutor(10) as crowd:
        answers = list(crowd.map(lambda _: me.post(path, message=question, key=f'key-{question}'), range(10)))
    assert {a.status_code for a in answers} == {200}, [a.status_code for a in answers]
    where = {a.headers.get('HX-Push-Url') for a in answers} if new else {path}
    chat = Chat(me, where.pop().rpartition('/')[2], '')
    assert not where and chat.ended()['content'] == 'once'
    assert len(chat.messages) == (2 if new else 4) and len(upstream.called(question)) == 1

def test_ten_different_posts_at_once_start_one_reply(me, upstream):
    chat = me.ask(upstream.says('first')).over()
    questions = [upstream.says('half ', HANG) for _ in range(10)]
    with concurrent.futures.ThreadPoolExecutor(10) as crowd:
        codes = list(crowd.map(lambda q: chat.post(message=q).status_code, questions))
    assert sorted(codes) == [200] + [409] * 9 and len(chat.messages) == 4
    assert eventually(lambda: sum(len(upstream.called(q)) for q in questions)) == 1
    chat.stop()

def test_retry_writes_a_new_reply_at_the_same_index_and_deletes_nothing(site, me, upstream):
    chat = me.ask(question := upstream.plays(raw(START, 'half'), says('whole')))
    chat.ended(), chat.retry()
    assert (chat.ended()['content'], chat.reply['idx'], chat.reply['status']) == ('whole', 1, 'done')
    assert [m['content'] for m in chat.messages] == [question, 'whole'] and chat.tab().text == 'whole'
    saved = rows(site.db, f"select content from message where conversation='{chat.id}' and idx=1 order by rowid")
    assert saved == [['half'], ['whole']]
    assert upstream.called(question)[1].body['messages'] == upstream.called(question)[0].body['messages']

def test_an_edit_and_a_new_answer_stand_beside_the_old_ones_and_the_path_decides(site, me, upstream):
    chat = me.ask(upstream.says('one')).over().say(old := upstream.says('two')).over()
    def branch(path, idx, **form):
        answer = chat.post(path, **form)
        assert answer.status_code == 200, answer.text
        assert [n.attrs['id'] for n in bubbles(answer.text)] == [f'msg-{n}' for n in range(idx, len(chat.messages))]
        return answer.text
    def texts(): return [m['content'] for m in chat.messages]
    edit = f'/edit?at={id_of(chat, 2)}'
    asked = branch(edit, 2, message=(new := upstream.says('three')), key='key-e')
    assert chat.ended()['content'] == 'three' and upstream.called(new)[0].questions == [texts()[0], new]
    assert branch(edit, 2, message=new, key='key-e') and len(upstream.called(new)) == 1
    assert '2 of 2' in plain(Page(asked).root.text) and texts()[1:] == ['one', new, 'three']
    assert chat.post(edit, message='another', key='key-e').status_code == 409
    branch('/choose', 2, message=sibling(chat, 2))
    assert texts()[1:] == ['one', old, 'two'] and old in me.get(f'/c/{chat.id}.md').text
    for _ in range(2): branch('/retry', 1, at=id_of(chat, 1), key='key-r'), chat.ended()
    assert len(texts()) == 2 and len(upstream.called(texts()[0])) == 2
    chat.say(more := upstream.says('four')).ended()
    assert upstream.called(more)[0].questions == [texts()[0], more]
    kept = rows(site.db, f"select count(*), max(idx) from message where conversation='{chat.id}'")
    assert kept == [[9, 3]]
    branch('/choose', 1, message=sibling(chat, 1))
    assert texts()[1:] == ['one', new, 'three'] and len(versions(chat, 1)) == 2, 'the newest of what follows'

def test_a_fork_is_a_conversation_of_its_own(me, upstream):
    chat = me.ask(upstream.says('one')).over().say(upstream.says('two')).over()
    answer = chat.post('/fork', htmx=False, at=id_of(chat, 1))
    fork = Chat(me, answer.headers['location'].rpartition('/')[2], '')
    assert fork.id != chat.id and fork.messages == chat.messages[:2]
    fork.say(question := upstream.says('three')).ended()
    assert upstream.called(question)[0].questions == [fork.messages[0]['content'], question]
    assert len(chat.messages) == 4 and chat.messages[:2] == fork.messages[:2]
    answer = chat.post('/fork', htmx=False, at=id_of(chat, 2))          # at a question: it can be answered there
    fork = Chat(me, answer.headers['location'].rpartition('/')[2], '')
    fork.html = fork.post('/retry', at=id_of(fork, 2)).text
    assert [n.attrs['id'] for n in bubbles(fork.html)] == ['msg-2', 'msg-3'] and fork.ended()['content'] == 'two'

def test_while_a_reply_runs_its_conversation_shows_no_other_branch(me, upstream):
    chat = me.ask(upstream.says('one'))
    chat.ended(), chat.retry().ended()
    other, here = sibling(chat, 1), id_of(chat, 1)
    chat.say(upstream.says('half ', HANG))
    for path, form in [('/choose', {'message': other}), (f'/edit?at={id_of(chat, 0)}', {'message': 'words'}),
                       ('/retry', {'at': here}), ('/fork', {'at': id_of(chat, 3)})]:
        refused = chat.post(path, **form)
        assert refused.status_code == 409 and 'still being written' in refused.text, path
    assert chat.post('/choose', message=here).status_code == 200        # it is shown already
    assert chat.post('/fork', htmx=False, at=here).status_code == 303
    chat.stop()

def test_a_question_says_what_it_follows_and_a_tab_that_is_behind_is_shown_the_rest(me, upstream):
    chat = me.ask(upstream.says('one')).over()
    seen = Page(chat.page()).root.find('after').attrs['value']
    chat.say(upstream.says('two'), after=seen).ended()
    refused = chat.post(message='typed', after=seen)
    assert refused.status_code == 409 and 'two' in refused.text and len(chat.messages) == 4
    typed = Page(chat.post(htmx=False, message='typed', after=seen).text).root.find('message')
    assert typed.text.strip() == 'typed'
    after = Page(refused.text).root.find('after').attrs['value']
    assert chat.post(message=upstream.says('three'), after=after).status_code == 200
    chat.ended()

def test_a_page_asks_for_what_came_in_on_another_page(me, upstream):
    chat, htmx = me.ask(upstream.says('one')), {'HX-Request': 'true'}
    chat.ended()
    def end(): return str(id_of(chat, len(chat.messages) - 1))
    def asked(after): return me.get(f'/c/{chat.id}?after={after}', **htmx)
    def leaf(): return me.get('/list', **htmx, **{'HX-Current-URL': f'{me.url}/c/{chat.id}'}).headers['x-leaf']
    first = leaf()
    assert first == end() and asked(first).status_code == 204
    chat.say(upstream.says('two')).ended()
    said = asked(first).text
    assert [n.attrs['id'] for n in bubbles(said)] == ['msg-2', 'msg-3'] and 'beforeend:#messages' in said
    assert Page(said).root.find('after').attrs['value'] == leaf() == end() != first
    second = end()
    chat.retry().ended()
    said = asked(second).text
    assert [n.attrs['id'] for n in bubbles(said)] == [f'msg-{n}' for n in range(4)] and 'innerHTML:#messages' in said
    with me.socket('/ws/list') as tab:
        edition = tab.recv(DEADLINE)
        assert chat.post('/choose', message=second).status_code == 200
        assert tab.recv(DEADLINE) != edition and leaf() == second and asked(second).status_code == 204
    chat.post('/delete')
    assert leaf() == '' and asked(second).status_code == 404

@pytest.mark.parametrize('path, field', [('/edit?at=', 'x'), ('/retry', 'at'), ('/fork', 'at'), ('/choose', 'message')])
def test_a_message_of_another_conversation_is_404(me, upstream, path, field):
    chat, other = me.ask(upstream.says('one')), me.ask(upstream.says('two'))
    chat.ended(), other.ended()
    for at in (id_of(other, 0), '', 'x', '9' * 30):
        path = path and path.partition('=')[0] + ('=' + at) * ('?' in path)
        assert chat.post(path, **{'message': 'words', field: at}).status_code == 404, at
    assert len(chat.messages) == 2

def test_a_page_copies_what_it_shows_whatever_branch_another_one_has_chosen(me, upstream):
    chat = me.ask(upstream.says('one')).over()
    (link,) = [n.attrs['href'] for n in bubbles(chat.page())[1].all(lambda n: 'copy' in n.attrs.get('class', ''))]
    upstream.plans[chat.messages[0]['content']] = [says('two')]
    assert chat.retry().ended()['content'] == me.get(link.partition('?')[0]).text == 'two' and me.get(link).text == 'one'
    other = me.ask(upstream.says('three'))
    assert other.ended() and me.get(link.replace(chat.id, other.id)).status_code == 404

def test_a_draft_is_kept_until_it_is_sent_and_never_comes_back(me, upstream):
    chat = me.ask(upstream.says('one')).over()
    def typed(path): return Page(me.get(path).text).root.find('message').text[1:]
    def keep(words, key, conversation=chat.id): return me.post('/draft', conversation=conversation, message=words, key=key)
    assert keep('half a\n <b>thought', 'key-1').status_code == keep('first', 'key-0', '').status_code == 204
    assert typed(f'/c/{chat.id}') == 'half a\n <b>thought' and typed('/') == 'first'
    chat.say(question := upstream.says('two'), key='key-1', after='').ended()
    assert typed(f'/c/{chat.id}') == '' and typed('/') == 'first'
    keep(question, 'key-1'), keep('next', 'key-2')
    assert typed(f'/c/{chat.id}') == 'next' and keep('', 'key-2') and typed(f'/c/{chat.id}') == ''
    begun = me.ask(upstream.says('three'), key='key-0', after='')
    keep('late', 'key-0', ''), keep('late', 'key-0', begun.id)
    assert typed('/') == typed(f'/c/{begun.id}') == '' and begun.ended()
    assert keep('x', 'key', 'nowhere').status_code == 404 and keep('x' * 200_001, 'key').status_code == 413

class Tree(RuleBasedStateMachine):
    """The Store alone: whatever is asked, edited, answered anew, walked and forked, the path shown leads from a root to
    a leaf, depth is the index, and every message is reached by walking the versions from what is shown."""
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store, self.known, self.loop = main.Store(self.folder / 'tree.db'), {}, asyncio.Runner()

    def teardown(self):
        self.store.close(), self.loop.close(), shutil.rmtree(self.folder)

    def run(self, verb, *args, **more): return self.loop.run(getattr(self.store, verb)(main.OWNER, *args, **more))
    def path(self, chat): return self.run('path', chat)[1]
    def some(self, data, role=None):
        chat = [*self.known][data.draw(st.integers(0, len(self.known) - 1))]
        path = [m for m in self.path(chat) if role in (None, m.role)]
        return chat, path[data.draw(st.integers(0, len(path) - 1))]

    def written(self, question, reply, new):
        self.known.setdefault(question.conversation, set()).update([question.id, reply.id])
        said = [main.Piece(reply.id, 0, f'answer {reply.id}')]
        self.loop.run(self.store.save(said, [(reply.id, 'done', '', {})]))
        assert self.path(question.conversation)[-1].id == reply.id

    @initialize()
    def first(self): self.begin()

    @rule()
    def begin(self): self.written(*self.run('ask', None, 'begin', None, 'm'))

    @rule(data=st.data())
    def ask(self, data): self.written(*self.run('ask', self.some(data)[0], 'more', None, 'm'))

    @rule(data=st.data())
    def edit(self, data):
        chat, at = self.some(data, 'user')
        self.written(*self.run('ask', chat, 'edited', None, 'm', instead=at.id))

    @rule(data=st.data())
    def regenerate(self, data):
        chat, at = self.some(data)
        self.written(*self.run('retry', chat, 'm', at=at.id))

    @rule(data=st.data())
    def walk(self, data):
        chat, at = self.some(data)
        before, to = self.path(chat), at.siblings[data.draw(st.integers(0, len(at.siblings) - 1))]
        assert self.run('switch', chat, to) == at.idx
        after = self.path(chat)
        assert after[:at.idx] == before[:at.idx] and after[at.idx].id == to and (to != at.id or after == before)

    @rule(data=st.data())
    def fork(self, data):
        chat, at = self.some(data)
        new = self.run('fork', chat, at.id)
        copy, old = self.path(new), self.path(chat)[:at.idx + 1]
        said = [[(m.idx, m.role, m.content, m.status, m.model, m.created, m.ended) for m in path] for path in (copy, old)]
        assert said[0] == said[1] and {m.id for m in copy}.isdisjoint(set().union(*self.known.values()))
        self.known[new] = {m.id for m in copy}

    @rule(data=st.data(), everything=st.booleans())
    def delete_and_restore(self, data, everything):
        chat = self.some(data)[0]
        since, gone = self.run('trash', None if everything else chat), [*self.known] if everything else [chat]
        assert {c.id for c in self.run('trashed')[0]} == set(gone)
        assert {c.id for c in self.run('conversations', limit=999)} == {*self.known} - set(gone)
        assert self.run('restore', *([None, since] if everything else [chat])) == gone or everything

    @invariant()
    def the_path_is_a_path_and_nothing_is_out_of_reach(self):
        for chat, known in self.known.items():
            shown, path = self.run('path', chat)
            assert [m.idx for m in path] == list(range(len(path))) and path[-1].id == shown.leaf
            assert [m.parent for m in path] == [None, *(m.id for m in path[:-1])]
            reached, walked = {m.id for m in path}, {m.id for m in path}
            while ahead := {id for m in path for id in m.siblings} - walked:
                walked.add(to := min(ahead))
                self.run('switch', chat, to)
                path += (now := self.path(chat))
                reached |= {m.id for m in now}
            assert reached == known
            self.run('switch', chat, shown.leaf)
            assert self.run('path', chat)[0].leaf == shown.leaf

def test_whatever_is_done_to_a_tree_no_message_is_out_of_reach():
    run_state_machine_as_test(Tree, settings=settings(max_examples=15, stateful_step_count=20, deadline=None,
                                                      derandomize=True, suppress_health_check=list(HealthCheck)))

def test_a_reader_that_stops_reading_holds_a_bounded_amount(tmp_path, wire, upstream):
    gate, text = Gate(), ('lorem ' * 40,) * 100
    with Server(tmp_path, ANTHROPIC_BASE_URL=wire.url, ANTHROPIC_API_KEY='test', FRAME_SECONDS=str(FRAME)) as server:
        chat = server.person().ask(upstream.says('go ', gate, *[text] * 80))                # 1.9 MB
        reader, path = chat.watch().until('go'), f'/ws/chat/{chat.id}/1'
        deaf = [chat.person.socket(path, sock=small_socket(server.port)) for _ in range(40)]
        before = server.memory()
        gate.open()
        assert len(reader.ends().text) > 1_900_000 and reader.status == 'done'
        assert server.memory() - before < 60e6              # forty queues of 2 MB would be more than 80
        slow = Tab(chat, chat.html)
        slow.socket = deaf[0]
        assert slow.ends().code == 1000 and slow.text == reader.text

def small_socket(port):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(('127.0.0.1', port))
    return sock


# ---- Files ----------------------------------------------------------------------------------------------------------

def chunk(kind, data=b''): return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
def png(width=3, height=2, noise=b'', end=b'\0\0\0\0IEND\xaeB`\x82'):
    head = width.to_bytes(4) + height.to_bytes(4) + b'\x08\2\0\0\0'
    rows = zlib.compress(b'\0' * (3 * width + 1) * height) if width * height < 10**7 else b''
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', rows) + noise + end

def gif(width=3, height=2, more=b''):
    return b'GIF89a' + width.to_bytes(2, 'little') + height.to_bytes(2, 'little') + b'\0\0\0' + more + b';'
def webp(kind, data):
    return b'RIFF' + (12 + len(data)).to_bytes(4, 'little') + b'WEBPVP8' + kind + len(data).to_bytes(4, 'little') + data
def jpeg(width=3, height=2, before=b'\xff\xe0\0\4ab\xff\xff\xc4\0\2'):
    return (b'\xff\xd8' + before + b'\xff\xc2\0\x11\x08' + height.to_bytes(2) + width.to_bytes(2) + b'\3' * 10
            + b'\xff\xd9')

PAPER, SVG = b'%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF\n', b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>'
WEBPS = [webp(b'X', bytes(4) + b'\2\0\0\1\0\0'), webp(b'L', b'\x2f\2\x40\0\0'),
         webp(b' ', b'\0\0\0\x9d\1\x2a\3\0\2\0')]
HTML = b'<!doctype html><script>alert(1)</script>'

@pytest.mark.parametrize('content, kind', [
    (png(), 'image/png'), (gif(), 'image/gif'), (jpeg(), 'image/jpeg'), *((each, 'image/webp') for each in WEBPS),
    (PAPER, 'application/pdf'), (SVG, 'text/plain'), (HTML, 'text/plain'), ('Grüße 🎉\r\n'.encode(), 'text/plain'),
    (b'\xef\xbb\xbfwith a mark', 'text/plain'), (png(noise=chunk(b'tEXt', HTML)), 'image/png'),
    (png() + PAPER, 'image/png'), (PAPER + HTML, 'application/pdf'), (HTML + PAPER, 'text/plain'),
    (gif(more=b'/*' + HTML + b'*/=1'), 'image/gif'), (png(8_000, 6_250), 'image/png')])
def test_a_file_is_what_its_bytes_are(content, kind): assert main.kind_of(content) == kind

@pytest.mark.parametrize('content, status, says', [
    (b'', 422, 'empty'), (b' \n\t', 422, 'empty'), (bytes(9), 422, 'empty'), (png(end=b''), 422, 'no whole image'),
    (png()[:20], 422, 'no whole image'), (gif()[:-1], 422, 'no whole image'), (WEBPS[0][:-1], 422, 'no whole image'),
    (jpeg()[:9], 422, 'no whole image'), (b'\xff\xd8' + b'\xff\xe0\0\2' * 5_000, 422, 'no whole image'),
    (png(0, 9), 422, 'no whole image'), (png(100_000, 100_000), 413, '100,000 × 100,000'),
    (png(7_999, 7_999), 413, '50 million'), (jpeg(65_535, 1), 413, '65,535'), (gif(0x2f2a, 0x2f2a), 413, 'pixels'),
    (png(noise=bytes(4_000_000)), 413, '3.9 MB'), (b'%PDF-1.7 cut', 422, 'no whole PDF'),
    (PAPER.replace(b'<<>>', b'<</Encrypt 5 0 R>>'), 422, 'password'), (b'MZ\x90\0\3', 415, 'only PNG'),
    (b'\xff\xfeH\0i\0', 415, 'UTF-8'), (b'caf\xe9', 415, 'UTF-8'), (b'\1\2\3\4 text', 415, 'only'),
    (b'PK\3\4' + bytes(30), 415, 'only'), (b'\x1f\x8b\x08', 415, 'only')])
def test_a_file_that_can_not_be_read_is_refused_in_words(content, status, says):
    with pytest.raises(main.Refused) as no: main.kind_of(content)
    assert no.value.status == status and says in no.value.words

BEHIND = 'something else stands behind it'

@pytest.mark.parametrize('name, content, status, says', [
    *((f'a.{end}', text, 415, 'it is text') for text in (SVG, HTML, b'GIF87 no', HTML + PAPER)
      for end in ('png', 'JPG', 'jpeg', 'gif', 'webp', 'Pdf')),
    *((name, image + more, 422, BEHIND) for name, image in (('a.png', png()), ('b', jpeg()), ('c.webp', WEBPS[0]))
      for more in (HTML, PAPER, b'\0PK\3\4')),
    ('a.gif', gif() + PAPER, 422, 'no whole image'), ('a.jpg', jpeg()[:-2], 422, 'no whole image'),
    ('a.png', png() + png(), 422, BEHIND)])
def test_a_file_that_pretends_is_refused_in_words(desk, name, content, status, says):
    no = upload(desk.person(), (name, content))
    assert no.status_code == status and f'“{name}” can’t be attached' in no.text and says in no.text

@pytest.mark.parametrize('name, content', [
    ('a.jpg', png()), ('a.png', jpeg()), ('a.pdf', gif()), ('a.gif', PAPER), ('png', SVG), ('a.png.txt', HTML), ('a.svg', SVG),
    *((f'x.{n}', image + bytes(n)) for image in (png(), jpeg(), gif(), *WEBPS) for n in (0, 3))])
def test_a_file_of_another_ending_is_taken_for_what_it_is(name, content):
    assert main.kind_of_new(name, content) == main.kind_of(content)

@pytest.mark.parametrize('said, name', [
    ('photo.png', 'photo.png'), ('../../etc/passwd', 'passwd'), ('C:\\Users\\me\\a b.txt', 'a b.txt'), ('', 'file'),
    ('a\r\nSet-Cookie: x\0.png', 'aSet-Cookie: x.png'), ('gpj\u202e.exe\ud800', 'gpj.exe'), ('..', 'file'),
    ('x' * 300 + '.pdf', 'x' * 80 + '…' + 'x' * 15 + '.pdf'), ('<b>"', '<b>"')])
def test_the_name_of_a_file_is_only_a_name(said, name): assert main.file_name(said) == name

SEER, PLAINER = can('claude-seer-1', image_input=1, pdf_input=1, citations=1), can('claude-bare-1')

@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "A site whose first model reads images and PDFs, with little room for files."
    upstream = Upstream()
    upstream.models = [[SEER, PLAINER]]
    desk = Site(tmp_path_factory.mktemp('desk'), upstream, model='claude-seer-1', max_file_bytes=40_000, max_files=3,
                max_files_bytes=100_000, max_body_bytes=60_000, max_message_chars=1_000)
    assert eventually(lambda: models_of(desk))
    yield desk
    desk.stop()

def upload(me, *files, path='/files', headers={'HX-Request': 'true'}, **form):  # noqa: B006
    return me.http.post(path, files=[('upload', file) for file in files], data=form, headers=headers)
def chips(answer):
    assert answer.status_code == 200, answer.text
    return [n.attrs['value'] for n in Page(answer.text).root.all(lambda n: n.attrs.get('name') == 'file')]
def attached(me, *files): return chips(upload(me, *files))
def pixels(name='a.png', seed=0): return name, png(noise=chunk(b'tEXt', b'%d' % seed))

def test_files_are_sent_as_blocks_before_the_words(desk):
    me, one = desk.person(), pixels(seed=1)
    files = attached(me, one, ('b.txt', b'caf\xc3\xa9'), ('c.pdf', PAPER))
    chat = me.ask(question := desk.upstream.says('Fine.'), file=files).over()
    shown = [n.attrs for n in Page(chat.page()).root.find('msg-0').walk() if n.tag in ('a', 'img')]
    assert [(a.get('alt'), a.get('download')) for a in shown[:4]] == [
        (None, None), ('a.png', None), (None, 'b.txt'), (None, 'c.pdf')]
    def of(kind, data): return {'type': 'base64', 'media_type': kind, 'data': base64.b64encode(data).decode()}
    cited = {'citations': {'enabled': True}}
    first = [{'type': 'image', 'source': of('image/png', one[1])},
             {'type': 'document', 'title': 'b.txt', **cited,
              'source': {'type': 'text', 'media_type': 'text/plain', 'data': 'café'}},
             {'type': 'document', 'title': 'c.pdf', **cited, 'source': of('application/pdf', PAPER)},
             {'type': 'text', 'text': question}]
    assert body(desk, question)['messages'] == [{'role': 'user', 'content': first}]
    chat.say(again := desk.upstream.says('Yes.'), file=files[:1]).ended(), chat.retry().ended()
    for call in desk.upstream.called(again):
        assert call.body['messages'][0]['content'] == first
        assert call.body['messages'][2]['content'] == [
            {'type': 'text', 'text': '(The file “a.png” is one of those above.)'}, {'type': 'text', 'text': again}]

def test_a_model_is_not_sent_what_it_can_not_read(desk, site):
    me = desk.person()
    files = attached(me, pixels(seed=2), ('b.txt', b'words'), ('c.pdf', PAPER))
    me.ask(question := desk.upstream.says('Hm.'), file=files, model='claude-bare-1').ended()
    told = [{'type': 'text', 'text': f'(The file “{name}” can’t be read by this model.)'} for name in ('a.png', 'c.pdf')]
    text = {'type': 'text', 'media_type': 'text/plain', 'data': 'words'}
    sent = desk.upstream.calls[-1].body['messages'][0]['content']
    assert sent.pop()['text'] == question and sent == [told[0], {'type': 'document', 'title': 'b.txt', 'source': text}, told[1]]
    plain = main.as_sent({'kind': 'text/plain', 'name': 'b', 'sha': 's'}, {'s': 'words'}, main.Model('local'), set())
    assert plain == {'type': 'text', 'text': 'b:\n\nwords'}

def test_what_does_not_fit_or_is_not_here_is_said(desk):
    me = desk.person()
    files = attached(me, ('old.txt', b'o' * 70), ('new.txt', b'n' * 70))
    store, shas = desk.door.state.parley.store, [each.split()[0] for each in files]
    sent = asyncio.run(store.to_send('owner', [shas[1], shas[0], 'f' * 64], 100))
    assert sent == {shas[1]: 'n' * 70, shas[0]: None}
    def said(sha): return main.as_sent({'kind': 'text/plain', 'name': 'x', 'sha': sha}, sent, main.Model('m'), set())['text']
    assert 'left out' in said(shas[0]) and 'not here' in said('f' * 64) and 'not here' in said(None)

def test_files_that_one_request_has_no_room_for_are_told(desk, monkeypatch):
    me = desk.person()
    files = attached(me, ('old.txt', b'old' * 70), ('new.txt', b'new' * 70))
    monkeypatch.setattr(main, 'ROOM', 300)
    chat = me.ask(desk.upstream.says('Hm.'), file=files).over()
    assert chat.reply['note'] == '1 file left out: one request has no room for more.'
    monkeypatch.setattr(main, 'ROOM', 3_000)
    monkeypatch.setattr(main, 'MOST_IMAGES', 1)
    chat.say(desk.upstream.says('Hm.')).ended()
    assert chat.reply['note'].startswith('1 file left out') and 'left out: there are too many' in str(desk.upstream.calls[-1].body)

def test_a_file_is_kept_once_and_goes_with_what_refers_to_it(desk):
    me, file = desk.person(), pixels(seed=3)
    value, = attached(me, file)
    assert attached(me, ('other name.jpg', file[1])) == [value.split()[0] + ' other name.jpg']
    sha = value.split()[0]
    chats = [me.ask(desk.upstream.says('x'), file=value) for _ in range(2)]
    for chat in chats: chat.ended()
    def kept(): return rows(desk.db, f"select count(*) from file where sha = '{sha}'") == [[1]]
    def forget(chat): python(FORGET, desk.db, chat.id)
    forget(chats[0])
    assert kept() and me.get(f'/files/{sha}').status_code == 200
    forget(chats[1])
    assert not kept() and me.get(f'/files/{sha}').status_code == 404
    assert rows(desk.db, f"select count(*) from attached where sha = '{sha}'") == [[0]]
    unsent, = attached(me, pixels(seed=4))
    python(CHANGE, desk.db, 'update attached set created = created - 90000 where message is null')
    attached(me, pixels(seed=5))
    assert me.get(f'/files/{unsent.split()[0]}').status_code == 404

FORGET = '''import sqlite3, sys
with sqlite3.connect(sys.argv[1], timeout=5) as db:
    db.create_function('spaced', 1, lambda text: text, deterministic=True)
    db.execute('pragma foreign_keys = on'); db.execute('delete from conversation where id = ?', sys.argv[2:])'''

@pytest.mark.parametrize('file, kind', [
    (pixels('page.html', 6), 'image/png'), (('evil.svg', SVG), 'text/plain'), (('evil.html', HTML), 'text/plain'),
    (('x.html', PAPER), 'application/pdf')])
def test_a_file_is_served_as_what_it_is_and_nothing_in_it_runs(desk, file, kind):
    me = desk.person()
    value, = attached(me, file)
    got = me.get('/files/' + value.split()[0])
    assert got.content == file[1] and got.headers['content-type'].split(';')[0] == kind
    assert got.headers['content-disposition'] == ('inline' if kind == 'image/png' else 'attachment')
    assert got.headers['x-content-type-options'] == 'nosniff' and 'private' in got.headers['cache-control']
    assert got.headers['content-security-policy'] == "sandbox; default-src 'none'"

def test_a_file_is_only_its_owners(desk, house, stranger):
    me = desk.person()
    value, = attached(me, pixels(seed=7))
    python(CHANGE, desk.db, f"update attached set owner = 'somebody else' where sha = '{value.split()[0]}'")
    assert me.get('/files/' + value.split()[0]).status_code == 404 == me.get('/files/' + '0' * 64).status_code
    refused = me.post('/', message='steal', file=value)
    assert refused.status_code == 422 and 'not here any more' in refused.text
    assert stranger.get('/files/' + '0' * 64).status_code in (303, 401)
    assert upload(stranger, pixels()).status_code == 401
    assert stranger.http.post('/files', content=bytes(5_000_000), headers={'content-type': FORM_DATA}).status_code == 413

FORM_DATA = 'multipart/form-data; boundary=x'

@pytest.mark.parametrize('files, status, says', [
    ([('x.exe', b'MZ\0')], 415, '“x.exe” can’t be attached'), ([('x', b'')], 422, 'it is empty'),
    ([('../<b>.txt', b'\0')], 422, '“<b>.txt”'), ([('big.txt', b'x' * 40_001)], 413, '40 KB'),
    ([pixels(f'{n}.png', n) for n in range(4)], 413, '3 files'), ([('bomb.png', png(60_000, 60_000))], 413, 'pixels'),
    ([(f'{n}.txt', b'%d' % n * 35_000) for n in range(3)], 413, 'files take up')])
def test_a_limit_of_files_answers_in_words(desk, files, status, says):
    no = upload(desk.person(), *files)
    assert no.status_code == status and says in no.text and no.headers['content-type'].startswith('text/plain')

def test_a_hundred_megabytes_are_refused_early(desk):
    me = desk.person()
    def flood():
        yield b'--x\r\ncontent-disposition: form-data; name="upload"; filename="a"\r\n\r\n'
        for _ in range(1_600): yield bytes(65_536)
    def send(content): return me.http.post('/files', content=content, headers={'content-type': FORM_DATA})
    with contextlib.suppress(httpx.HTTPError): assert send(flood()).status_code == 413      # or hangs up
    answer = asked_raw(desk.url, 'POST /files HTTP/1.1', f'Host: {urlsplit(desk.url).netloc}', f'Origin: {desk.url}',
                       f'Content-Type: {FORM_DATA}', 'Content-Length: 104857600')
    assert ' 413 ' in answer.splitlines()[0] and 'too much here' in answer
    assert me.get('/healthz').json() == {'ok': True}

def test_files_are_paced(new_site):
    me = new_site(files_per_hour=1).person()
    assert attached(me, pixels())
    answer = upload(me, pixels('another.png', 8))
    assert answer.status_code == 429 and int(answer.headers['Retry-After']) > 3_000

def test_without_a_script_files_go_with_the_message_and_nothing_is_lost(desk):
    me = desk.person()
    no = upload(me, pixels('good.png', 8), ('bad.exe', b'MZ\0'), path='/', headers={}, message='  typed\n', key='k8')
    page = Page(no.text)
    assert no.status_code == 415 and '“bad.exe” can’t' in page.root.find('notice').text
    assert page.root.find('message').text == '\n  typed\n'       # a browser leaves out the first line break
    value, = (n.attrs['value'] for n in page.root.all(lambda n: n.attrs.get('name') == 'file'))
    question = desk.upstream.says('Seen.')
    sent = upload(me, ('', b''), path='/', headers={}, message=question, key='k8', file=value,
                  model='claude-seer-1')
    assert sent.status_code == 303
    Chat(me, sent.headers['location'].rpartition('/')[2], '').ended()
    assert [b['type'] for b in body(desk, question)['messages'][0]['content']] == ['image', 'text']
    alone = Chat(me, upload(me, pixels('alone.png', 9), path='/', headers={}, message=' ').headers['location'][3:], '')
    assert alone.ended()['status'] == 'done' and me.get(f'/c/{alone.id}').text.count('<title>alone.png') == 1

def test_a_model_that_can_not_read_what_is_there_says_so_when_it_is_chosen(desk):
    me, by = desk.person(), {'HX-Trigger-Name': 'model'}
    files = attached(me, pixels(seed=80), pixels(seed=81), ('c.txt', b'text'))
    chat = me.ask(desk.upstream.says('Seen.'), file=files, model='claude-seer-1').over()
    said = 'The claude-bare-1 can’t read 2 of the files here.'
    assert said in chat.post('/choices', model='claude-bare-1', headers=by).text
    assert said in Page(chat.post('/choices', model='claude-bare-1', htmx=False).text).root.find('notice').text
    assert said not in chat.post('/choices', model='claude-bare-1', headers={'HX-Trigger-Name': 'web'}).text
    assert 'can’t read' not in Page(chat.post('/choices', model='claude-seer-1', headers=by).text).root.find('chosen').text

def test_a_zip_brings_the_files_along(desk, new_site):
    me, you, file = desk.person(), new_site().person(), pixels('along.png', 12)
    value, = attached(me, file)
    chat, sha = me.ask(desk.upstream.says('x'), file=value, model='claude-seer-1'), value.split()[0]
    chat.ended()
    told = me.get('/export.zip').content
    with zipfile.ZipFile(io.BytesIO(told)) as packed: content = packed.read(f'files/{sha}')
    torn = zipped({f'files/{sha}': content[:-1], 'a.json': me.get(f'/c/{chat.id}.json').content})
    assert bring(you, torn) == 'Nothing came in. A file in it is not what it was.' and chats(you) == []
    assert 'came in' in bring(you, told) and you.get('/export.zip').content == told
    assert you.get(f'/files/{sha}').content == content and f'/files/{sha}' in you.get(f'/c/{chat.id}').text

def test_edit_fork_export_and_import_keep_the_files(desk):
    me, file = desk.person(), pixels('kept.png', 10)
    value, = attached(me, file)
    chat = me.ask(desk.upstream.says('x'), file=value, model='claude-seer-1').over()
    question = bubbles(chat.page())[0].attrs
    at = rows(desk.db, f"select id from message where conversation = '{chat.id}' and role = 'user'")[0][0]
    assert question['id'] == 'msg-0' and chat.post(f'/edit?at={at}', message='Once more').status_code == 200
    chat.ended()
    assert [b['type'] for b in desk.upstream.calls[-1].body['messages'][0]['content']] == ['image', 'text']
    copy = chat.post('/fork', at=at, htmx=False).headers['location'].rpartition('/')[2]
    python(FORGET, desk.db, chat.id)
    assert me.get('/files/' + value.split()[0]).status_code == 200 and '/files/' in me.get(f'/c/{copy}').text
    assert '## You\n\n[Attached: kept.png]\n\nquestion' in me.get(f'/c/{copy}.md').text.replace('Once more', 'question')
    told = me.get(f'/c/{copy}.json').content
    python(FORGET, desk.db, copy)
    assert me.get('/files/' + value.split()[0]).status_code == 404
    def bring(content): return me.http.post('/import', files={'file': ('a.json', content)}, headers={'HX-Request': 'true'})
    assert bring(told).status_code == 200
    page = me.get(f'/c/{copy}').text
    assert 'not here any more' in page and 'kept.png' in page and '/files/' not in page
    for odd in ({'name': 5}, {'kind': 'text/html'}, {'size': '1'}, {'sha': 7}):
        block = {'type': 'file', 'sha': 'x', 'name': 'n', 'kind': 'text/plain', 'size': 1} | odd
        message = json.loads(told)['messages'][0] | {'blocks': [block]}
        odd = json.loads(told) | {'id': f'odd{number()}', 'messages': [message], 'others': []}
        assert 'Nothing came in' in bring(json.dumps(odd)).text


def test_a_file_that_the_api_refuses_is_taken_out_of_its_question(desk):
    me, words = desk.person(), desk.upstream.plays(refuses(400), says('Fine.'), says('Good.'))
    bad, good, theirs = (attached(me, pixels(f'{n}.png', 60 + n))[0] for n in range(3))
    chat = me.ask(words, file=[bad, good], model='claude-seer-1').over()
    def sent(): return desk.upstream.called(words)[-1].body['messages'][0]['content']
    def kinds(): return [b['type'] for b in sent()]
    at = id_of(chat, 0)
    def edit(**form): return chat.post(f'/edit?at={at}', message=words, **form)
    assert chat.reply['status'] == 'failed' and kinds() == ['image', 'image', 'text']
    editor = next(n for n in Page(me.get(f'/c/{chat.id}?edit={at}').text).root.walk() if n.attrs.get('class') == 'edit')
    offered = [(n.attrs['name'], n.attrs.get('value')) for n in editor.all(lambda n: n.attrs.get('name') in ('file', 'upload'))]
    assert offered == [('file', bad), ('file', good), ('upload', None)]
    assert edit(file=good, upload='').status_code == 200 and chat.ended()['status'] == 'done' and kinds() == ['image', 'text']
    python(CHANGE, desk.db, f"update attached set owner = 'somebody else' where sha = '{theirs.split()[0]}'")
    assert edit(file=[good, theirs], upload='').status_code == 422
    blank = chat.post(f'/edit?at={at}', htmx=False, message=' ', upload='')
    assert blank.status_code == 422 and edit(upload='').status_code == 200
    chat.ended()
    assert sent() == words


# ---- Words: tables, properties, an oracle; nothing is timed, work is counted in characters parsed --------------------

SAYINGS = [case for case in CORPUS if case.get('enc') in (None, 'repeat') and spelled(case).strip() and case['where'] in
           ('model_output', 'message', 'title', 'form_field', 'filename', 'query', 'system_prompt')]
# Every construct in a few characters; `⏎` is a line end.
SMALL = [text.replace('⏎', '\n') for text in (
    'a', '[<https://a.b> c](https://d.e)', '[![x](http://a.b/c)](<d@e.f>)', 'a b⏎c', 'a  ⏎b', 'a\\⏎b', '# a',
    '## a ##⏎b', '#a', '####### a', 'a⏎===', 'a⏎---⏎b', '---', '* * *', '- - -⏎- a', '___',
    '    code⏎⏎    more⏎⏎no', '\tcode', '```⏎a⏎```', '~~~py⏎x=1⏎~~~⏎b', '```⏎open', '```py⏎⏎⏎x⏎``⏎````⏎b',
    '  ```⏎  a⏎   b⏎  ```',
    '> a⏎b⏎⏎c', '> a⏎> > b⏎> c', '>⏎a', '> ```⏎> a⏎b', '> # a⏎- b', '- a⏎- b⏎⏎c', '- a⏎⏎- b', '- a⏎⏎  b⏎⏎c',
    '1. a⏎2. b', '3) a⏎4) b⏎1. c',
    'a⏎2. b', 'a⏎1. b', '-⏎⏎  a', '- a⏎  - b⏎    - c⏎- d', '* a⏎+ b⏎- c', '1. a⏎⏎2', '1. a⏎⏎2. b', '10. a⏎    b',
    '- ```⏎  a⏎  ```⏎- b',
    '- [ ] a⏎- [x] b⏎- [y] c', '*a* **b** ***c***', '_a_ __b__ a_b_c', '**a *b** c*', '*a', '**a** b*', '~~a~~ ~b~',
    '`a` ``b`c``', '`a', '`` ` ``',
    '\\*a\\* \\`b', '&amp; &lt;b&gt; &#65; &#x42; &nope; &am', '<b>a</b>', '<div>⏎a⏎</div>', '<!-- a -->',
    '[a](https://b.c)', '[a](https://b.c "t")',
    '[a](<https://b.c/d e>)', '[a](/b)', '[a]()', '[a](javascript:b)', '[a *b* `c`](https://d.e) f',
    '[a][b]⏎⏎[b]: https://c.d', '[a]⏎⏎[a]: https://b.c⏎"t"',
    "[a]: https://b.c⏎'t⏎u'⏎⏎[a]", "[a]: https://b.c⏎'t⏎===⏎u⏎⏎v'⏎⏎[a]", '[a]: https://b.c⏎[a]: https://d.e⏎[a]',
    '[A b]⏎⏎[a⏎B]: https://b.c',
    '[a⏎===⏎b⏎]: https://c.d⏎⏎x', '- [a⏎  ===⏎b⏎]: https://c.d⏎⏎x', '> [a]: https://b.c⏎⏎[a]',
    '- [a]: https://b.c⏎- [a]', '[a] b⏎⏎# h⏎[a]: https://b.c⏎"t',
    '![a](https://b.c/d.png)', '![a](d.png) ![b][c]⏎⏎[c]: http://d.e', '[![a](https://b.c/d.png)](https://e.f)',
    '<https://a.b> <c@d.e> <javascript:a>',
    'https://a.b/c. (http://d.e/f(g)) xhttps://a.b www.a.b', '**https://a.b/c** https://a.b/*c*',
    '|a|b|⏎|-|-|⏎|1|2|⏎⏎c', 'a|b⏎:-|-:⏎1|2|3⏎4', '|a|⏎|-|⏎# b',
    'a⏎|b|⏎|-|⏎|c|', '|a|b|⏎|-|', '| a \\| b | `c` |⏎|-|-|', '- a⏎|b|⏎|-|', 'a[^1]⏎⏎[^1]: b',
    '[^b] [^a] [^c]⏎⏎[^a]: x[^d]⏎⏎[^b]: y⏎⏎    z⏎⏎[^d]: w⏎⏎u',
    '[^1]: a⏎[^1]: b⏎⏎c[^1]', '[^1]: a[^1]⏎⏎b[^1]', '- [^1]: a⏎⏎b[^1]', '[^1] unknown', '[^x] word',
    '$a$ $b^2$ $5 and $6', '$a $ $ a$ \\$a\\$ $a$1',
    '$$a$$', '$$⏎a⏎$$⏎b', '$$⏎a⏎+ b⏎⏎c $$', '$$a$$ b', '\\[⏎a⏎\\]', '\\(a\\) \\[b\\] \\(c', '- $$⏎  a⏎  $$⏎- b', '$$⏎a',
    'a⏎$$⏎b⏎$$⏎c', '$\\frac{$ $\\unknown{a}$',
    'a\rb\r\nc\r\r\nd', '\0a', 'a\u2028b\x85c\x0cd', '\ufdd0 \ufdd1', '\ufeffa', 'é́ 👩‍👩‍👧 漢字*字*', ' ', '⏎⏎a⏎⏎⏎⏎b⏎⏎',
    '   a⏎    b', '\ta⏎- \tb⏎\t\tc',
    'a⏎⏎  ', '```⏎a⏎  ', '- a⏎⏎⏎⏎- b⏎⏎⏎c', '> a⏎⏎> b', '* a⏎⏎  * b⏎⏎⏎    c', '1. a⏎   ```⏎⏎   b⏎⏎   ```⏎⏎   c⏎2. d')]
HAND = [
    'Short answer: **yes**.', 'It costs $5 to $10, say 7 €.\n\nWhy? See <https://a.b>.',
    '## Steps\n\n1. Install:\n   ```bash\n   pip install x\n   ```\n2. Run it:\n\n'
    '   ```bash\n   x --go\n   ```\n\n   It prints `ok`.\n3. Done\n\nThat is all.',
    'Euler: $e^{i\\pi}+1=0$, or\n\n$$\n\\int_0^1 x\\,dx = \\frac{1}{2}\n$$\n\nwhere \\(x\\) is real.',
    '| Name | Size |\n|:-----|-----:|\n| `a.py` | 12 |\n| **b** | 3 |\n\nBoth are small.',
    '> Quote\n> more\n\n> again\n\n---\n\nEnd',
    'As [1] and [the docs] say.[^a]\n\n'
    '[1]: https://one.example/x "One"\n[the docs]: https://docs.example\n[^a]: A note with `code`.\n',
    '- [x] first\n- [ ] second\n  - nested *one*\n\n    with a paragraph\n- third',
    '```html\n<script>alert(1)</script>\n```\n\n```\n  plain\n\n```',
    'Regex: `[^1]` and [^abc] stay, `a|b` too.\r\n\r\n- one\r\n- two\r\n',
    '日本語の段落です。**太字**と`コード`。\n\n1. 一\n2. 二\n',
    '# T\n## U\n### V\ntext\n***\n']


def answer(rng):
    """A reply such as a model writes, from a handful of building blocks."""
    def some(low, high): return ' '.join(rng.choice(('the', 'value', 'of', '**bold one**', '`f(x)`', 'and', 'it,', 'is',
        "don't", 'so.', '*very*', '$x_1$',
        '[a link](https://e.example/p)', 'https://u.example/q', 'snake_case', 'AT&T', '3 < 4', '👍', 'é', '[ref]',
        'x[^1]', '5 * 3')) for _ in range(rng.randint(low, high)))
    kinds = (lambda: some(10, 60), lambda: '#' * rng.randint(1, 4) + ' ' + some(1, 5), lambda: '\n'.join('- ' + some(2,
        12) for _ in range(rng.randint(2, 7))),
             lambda: '\n'.join(f'{i}. {some(2, 9)}\n   - {some(1, 4)}' for i in range(1, rng.randint(2, 6))),
                 lambda: '> ' + some(5, 20),
             lambda: '```python\ndef f(x):\n    """Doc."""\n\n    return [x] * 2\n```',
                 lambda: '| a | b |\n|---|---|\n' + '\n'.join(f'| {some(1, 3)} | {i} |' for i in range(3)),
             lambda: '$$\n\\frac{a}{b} + c\n$$', lambda: '---', lambda: '[ref]: https://r.example/x',
                 lambda: '[^1]: ' + some(3, 9))
    return rng.choice(('\n', '\r\n')).join('\n\n'.join(rng.choice(kinds)() for _ in range(rng.randint(3,
    14))).split('\n'))


def pieces(text, rng, most=200):
    while text:
        n = rng.randint(1, most)
        yield text[:n]
        text = text[n:]


def watch(parts):
    """A page that does what the changes say and nothing else. -> (its blocks at the end, the typesetter)"""
    setter, blocks, tail = main.Typesetter(), [], ''
    for part in [*parts, None]:
        for change in setter.finish() if part is None else setter.feed(part):
            match change:
                case main.Block(markup): blocks.append(markup)
                case main.Tail(markup): tail = markup
                case main.Text(text): tail = tail.replace(main.MARK, html.escape(text) + main.MARK)
                case main.Mend(n, markup):
                    assert part is None
                    blocks[n] = markup
        assert tail.count(main.MARK) <= 1 and ''.join(blocks) + tail == setter.html()
    assert tail == ''
    return blocks, setter


def elements(markup):
    """[(tag, attributes)] as an HTML parser reads them, and the depth at the end."""
    found, open_ = [], []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: (found.append((tag, dict(attributes))),
        open_.append(tag) if tag not in ('br', 'hr') else None)
    parser.handle_endtag = lambda tag: open_.pop()
    parser.feed(markup)
    parser.close()
    return found, open_


def is_one_element(markup):
    opened = re.findall(r'<(/?)(?!br|hr)\w+[^>]*>|<hr>', markup)  # '' opens, '/' closes
    depths = list(itertools.accumulate(-1 if slash else 1 for slash in opened))
    whole = markup == '<hr>' or depths and depths.index(0) == len(depths) - 1
    return markup[0] == '<' and markup[-1] == '>' and whole


ATTRIBUTES = {'class', 'href', 'title', 'target', 'rel', 'start', 'tabindex', 'data-src', *main.MATH_ATTRIBUTES}
TAGS = {*'p h1 h2 h3 h4 h5 h6 strong em s code a ul ol li blockquote hr br table thead tbody tr th td div span sup'
        ' section pre figure figcaption details summary'.split(), *main.MATH}


def assert_harmless(markup):
    found, open_ = elements(markup)
    assert not open_
    for tag, attributes in found:
        assert tag in TAGS and set(attributes) <= ATTRIBUTES, (tag, attributes)
        if tag == 'a': assert attributes['rel'] == 'noopener noreferrer nofollow' and attributes['target'] == '_blank'
        for url in (attributes.get('href'), attributes.get('data-src')):
            assert url is None or urlsplit(url).scheme in ('http', 'https', 'mailto')


@pytest.mark.parametrize('text', SMALL + HAND)
def test_pieces_of_any_size_end_as_a_reload_shows(text):
    whole = main.render(text)
    for most in (1, 2, 5, 30): assert watch(pieces(text, random.Random(f'{SEED}{text}'), most))[0] == whole, SEED
    assert all(is_one_element(html) for html in whole)


def test_realistic_answers_end_as_a_reload_shows():
    print('seed', SEED)
    for i in range(40):
        rng = random.Random(f'{SEED}{i}')
        text = answer(rng)
        assert watch(pieces(text, rng))[0] == main.render(text), text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from('` * _ [ ] ( ) # - > | : $ \\ ~ ^ ! < & ; = \' " a b 1. [a]: [^1] [^1]: $$ ``` === https://a.b'
                                .split() + ['\n', '\n\n', ' ', '\t', '\r', '    '])))
def test_any_markup_in_any_pieces_ends_as_a_reload_shows(parts):
    assert watch(parts)[0] == main.render(''.join(parts))


@pytest.mark.parametrize('text', SMALL + HAND)
def test_the_division_into_blocks_changes_nothing(text):
    """The oracle: one run of the library over all tokens of the text, written in one go."""
    env = main.surroundings({}, {}, {}) | {'aside': [], 'formulas': 0}
    main.parse(main.normal(text), env, (parts := []).append)
    tokens = [token for part in parts for token in part.tokens]
    whole = main.write(main.Part(tokens, '', [0, 0]), env) if tokens else ''
    def bare(text): return text.replace('\n<', '<').replace('>\n', '>')
    assert bare(''.join(main.render(text))) == bare(whole + ''.join(main.notes_section(env)))


@pytest.mark.parametrize('text', ['a\n\n' * 7_000, '> a\n\n' * 4_000, '- a\n' * 5_000, '- [ ] a\n' * 2_500, '-\n' * 10_000,
                                  '|a|b|\n|-|-|\n' + '|a|b|\n' * 4_000, ('* ' * 20 + '- - a\n') * 500])
def test_the_memory_of_a_render_is_not_that_of_all_its_tokens(text, monkeypatch):
    monkeypatch.setattr(main, 'BLOCK_LIMIT', 1_000)
    monkeypatch.setattr(main, 'TOKENS_LIMIT', 4_000)
    tracemalloc.start()
    try:
        html, (_, peak) = main.render(text), tracemalloc.get_traced_memory()
    finally: tracemalloc.stop()
    assert html and peak < 240 * len(text), peak / len(text)


@pytest.mark.parametrize('head, lines', [('', '-\n'), ('', '- a\n'), ('', '1.\n'), ('', '* ' * 30 + '\n'), ('', '>' * 40 + '\n'),
    ('', '>' * 40 + 'a\n'), ('', '>-\n'), ('a\n-\n', 'a\n'), ('a|b\n-|-\n', '|\n'), ('|a|b|\n|-|-|\n', '|||\n'),
    ('|' * 200 + '\n' + '|-' * 199 + '|\n', '|' * 200 + '\n'), ('|' * 60 + '\n' + '|-' * 59 + '|\n', 'a\n')])
def test_what_can_be_typeset_keeps_all_of_its_tokens(head, lines, monkeypatch):
    monkeypatch.setattr(main, 'BLOCK_LIMIT', 4_000)
    monkeypatch.setattr(main, 'TOKENS_LIMIT', 4 * 4_000)
    text = head + lines * ((4_000 - len(head)) // len(lines))
    main.parse(text, main.surroundings({}, {}, {}), (parts := []).append)
    assert parts and not any(token is main.DROPPED for part in parts for token in part.tokens)


def test_a_closed_block_is_seen_before_the_reply_ends():
    setter = main.Typesetter()
    changes = setter.feed('# One\n\nTwo *three*\n\nFour')
    assert changes == [main.Block('<h1>One</h1>'), main.Block('<p>Two <em>three</em></p>'),
                       main.Tail(f'<p>Four{main.MARK}</p>')]
    assert setter.feed(' and more, plainly. ') == [main.Text(' and more, plainly. ')]


def test_a_definition_that_comes_late_mends_what_had_closed():
    setter = main.Typesetter()
    assert setter.feed('[a]\n\nb\n\n[a]: https://c.d\n')[0] == main.Block('<p>[a]</p>')
    assert [change.n for change in setter.finish() if isinstance(change, main.Mend)] == [0]


@pytest.mark.parametrize('text, shown', [
    ('a **b', f'<p>a <strong>b{main.MARK}</strong></p>'), ('a `b*', '<p>a <code>b</code></p>'), ('a **', '<p>a </p>'),
    ('see [the do', f'<p>see the do{main.MARK}</p>'),
    ('see [x](https://a', '<p>see x</p>'), ('- ', ''), ('#', ''), ('a\n-', '<p>a</p>'), ('```', ''), ('$x^',
    f'<p><code class="math">x^{main.MARK}</code></p>'), ('AT&am', '<p>AT</p>')])
def test_an_unfinished_end_shows_no_raw_syntax(text, shown):
    setter = main.Typesetter()
    setter.feed(text)
    assert setter.tail.replace(' </p>', '</p>') == shown.replace(' </p>', '</p>')


def test_an_open_fence_grows_by_letters_alone():
    setter = main.Typesetter()
    assert [type(change) for change in setter.feed('```py\n')] == [main.Tail]
    assert setter.feed('x = *1*\n``') == [main.Text('x = *1*\n')]
    assert [type(change) for change in setter.feed('`\n')] == [main.Block, main.Tail]


@pytest.mark.parametrize('case', SAYINGS, ids=lambda case: case['id'])
def test_hostile_text_is_harmless(case):
    payload, setter = spelled(case, 500), main.Typesetter()
    for piece in pieces(payload, random.Random(SEED), max(7, len(payload) // 50)):
        setter.feed(piece)
        assert_harmless(setter.html())
    for markup in (*main.render(payload), main.render_user(payload)): assert_harmless(markup)


@pytest.mark.parametrize('latex', [
    r'\text{</mtext><img src=x onerror=1>}', r'\text{<script>1</script>}', r'\href{javascript:1}{x}',
    r'\style{color:red}{x}', r'\class{x}{y}',
    r'\text{&lt;img src=x&gt;}', r'</math><img src=x>', r'\color{red" onclick="1}{x}', '{' * 900 + '}' * 900,
    r'\sqrt' * 300 + 'x', r'\text{<style><!--</style>}'])
def test_nothing_gets_out_of_a_formula(latex):
    for markup in (*main.render(f'a ${latex}$ b'), *main.render(f'$$\n{latex}\n$$')):
        assert_harmless(markup)
        assert not {'img', 'script', 'style'} & {tag for tag, _ in elements(markup)[0]}


@pytest.mark.parametrize('text, told', [
    ('[good.com](https://evil.com)', 'evil.com'), ('[good.com](https://good.com/x)', ''), ('[a](https://evil.com)', ''),
    ('<https://good.com@evil.com>', 'evil.com'),
    ('[good.com](https://good.com@evil.com)', 'evil.com'), ('[аpple.com](https://аpple.com)', 'xn--pple-43d.com'),
    ('[www.a.com](https://a.com)', ''),
    ('[x@good.com](mailto:x@evil.com)', 'evil.com'), ('[docs.a.com](https://a.com)', 'a.com'),
    ('[good.com](https://evil.com\\@good.com)', None), ('[![good.com](/a)](https://evil.com)', 'evil.com'),
    ('[$\\text{good.com}$](https://evil.com)', 'evil.com'), ('[goo\u200bd.c\u2060om](https://evil.com)', 'evil.com'),
    ('[good\u2024com](https://evil.com)', 'evil.com'), ('[ｇｏｏｄ．ｃｏｍ](https://evil.com)', 'evil.com'),
    ('[localhost](https://evil.com)', 'evil.com'), ('[localhost:80](http://localhost:80/x)', ''),
    ('[good\xad.com](https://good.com)', ''), ('[' + '\u200b' * 500 + 'good.com](https://evil.com)', 'evil.com')])
def test_a_link_that_pretends_is_told(text, told):
    html = ''.join(main.render(text))
    if told is not None: assert re.findall(r'<span class="host">\((.*?)\)</span>', html) == [told] * bool(told)


@pytest.mark.parametrize('code', ['', 'a', '\na', '\n\n a\t\n\n', '<b>&amp;"', '\ufeffx = 1', 'x = """a\nb"""\n',
    '\x0c\x0b\u2028'])
@pytest.mark.parametrize('name', ['', 'python', 'html', 'nonsense', 'c++'])
def test_code_keeps_every_character(code, name):
    figure, found = main.figure(code, name), []
    parser = html.parser.HTMLParser()
    parser.handle_data = found.append
    parser.feed(figure[figure.index('<code>') + 6:figure.index('</code>')])
    parser.close()
    assert ''.join(found) == code


# A few letters that keep one of Pygments' expressions busy for ever, or nearly.
ENDLESS = {'mcschema': '<!--' * 40, 'maple': '"' + '\\a' * 60, 'c': 'a' + ' ' * 20_000 + 'b', 'java': '\n' * 30_000}

@pytest.fixture
def lexers():
    lexers = main.Lexers()
    yield lexers
    if lexers.child: lexers.child.kill()

def has_ended(pid):
    "Wait for the end of a process that need not be our child."
    with contextlib.suppress(ProcessLookupError):
        watched = os.pidfd_open(pid)
        try: return bool(select.select([watched], [], [], DEADLINE)[0])
        finally: os.close(watched)
    return True


@pytest.mark.parametrize('name', ENDLESS)
def test_code_that_takes_for_ever_to_colour_stands_plain(lexers, name):
    assert lexers.words('x = 1', 'python')
    first = lexers.child
    assert lexers.words(ENDLESS[name], name) == [] and first.returncode is not None
    assert lexers.words('x', name) == [] and lexers.child is first             # its language is left alone for a while
    assert ['o', '='] in lexers.words('x = 1', 'python') and lexers.child is not first
    lexers.slow[name] = 0
    assert lexers.words('x', name)


def test_while_too_many_languages_are_slow_none_is_asked(lexers):
    lexers.slow = dict.fromkeys(range(main.SLOW_MOST), float('inf'))
    assert lexers.words('x = 1', 'python') == [] and not lexers.child


@pytest.mark.parametrize('code, name', [('x', 'nonsense'), ('x', 'c++'), ('<b>\ud800\ufdd1"', 'python'), ('x\n' * 9_000, 'sql')])
def test_any_code_in_any_language_gets_an_answer(lexers, code, name):
    words = lexers.words(code, name)
    assert not lexers.slow and ''.join(text for _, text in words) == code * (name != 'nonsense')


def test_who_colours_code_may_end_at_any_time_and_is_asked_by_many_at_once(lexers):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: lexers.words(f'x = {n}', 'python')[-1][1], range(100)))
        assert found == [str(n) for n in range(100)]
    lexers.child.kill()
    has_ended(lexers.child.pid)
    assert lexers.words('x = 1', 'python') and not lexers.slow


def test_who_colours_code_knows_nothing_and_ends_with_us():
    code = """if True:
        import json, main, os, sys
        main.render('```python\\nx = 1\\n```')
        child = main.LEXERS.child.pid
        about = f'/proc/{child}/'
        fds = sorted({os.readlink(f'{about}fd/{fd}').partition(':')[0] for fd in os.listdir(f'{about}fd')})
        print(json.dumps([child, open(f'{about}environ').read(), fds, os.getsid(child) == child]), flush=True)
        sys.stdin.read()"""
    for end in (subprocess.Popen.kill, lambda parent: parent.stdin.close()):
        parent = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  cwd=SOURCE.parent, env=os.environ | {'SECRET': 'canary'})
        child, environment, fds, apart = json.loads(parent.stdout.readline())
        assert (environment, fds, apart) == ('', ['/dev/null', 'socket'], True)
        end(parent)
        parent.wait(DEADLINE)
        assert has_ended(child)


@pytest.mark.parametrize('text', [f'```maple\n{ENDLESS["maple"]}\n```\n', f'> ```maple\n> {ENDLESS["maple"]}\n\nso\n\n',
                                  f'- ~~~maple\n  {ENDLESS["maple"]}\n  ~~~\n\nso\n\n'])
def test_everybody_else_is_served_while_code_is_coloured(text):
    reply = main.Message(1, 'c', 'o', 1, None, 'assistant', text, 'running', '', '', None, 0, 0)
    def shelf(): return main.Shelf().content(reply)
    def live(*pieces):
        turn = main.Turn(reply)
        view = main.LiveReply.of(turn)
        async def read():
            for piece in pieces:
                turn.pieces.append(piece)
                await view.now(view.html)
            return view.html()
        return read()
    async def served(reading):
        main.LEXERS.slow.clear()
        reading, turns = asyncio.create_task(reading), 0
        while not reading.done(): turns += await asyncio.sleep(0, 1)
        return turns, reading.result()
    shown = f'<code>{html.escape(ENDLESS["maple"], False)}\n</code>'
    for reading in (shelf(), live(text), live(*text)):
        turns, markup = asyncio.run(served(reading))
        assert turns > 100 + len(text) and shown in markup and 'maple' in main.LEXERS.slow
    main.LEXERS.slow.clear()


def test_what_colours_code_answers_is_text_too():
    assert main.coloured([['k"><b>', '<i>'], ['', '&'], ['n', 'x'], ['k', '<']]) == [
        '&lt;i&gt;&amp;x<span class="k">&lt;</span>']


def test_a_persons_words_are_shown_as_written():
    assert main.render_user('*a* <b>\n b') == '<p class="said">*a* &lt;b&gt;\n b</p>'
    assert '<figure class="code"><figcaption>py</figcaption>' in main.render_user('see\n```py\nx\n```\nso')
    assert [main.render_user('a\n' * lines).count('<details>') for lines in (20, 40)] == [0, 1]


LONG = {'prose': 'Some words, and more of them. ' * 20 + '\n\n', 'fence': 'some code\n', 'items': '- an item *here*\n',
    'rows': '|some|cells|\n', 'quotes': '>' * 500 + '\n', 'brackets': '[' * 50,
        'definitions': '[a]: /x\n', 'line': 'word ', 'stars': '*a ', 'ticks': '` `` ', 'notes': '[^1]: a\n',
        'formulas': '$a$ $', 'entities': '&', 'fake ends': '``` x\n'}


@pytest.mark.parametrize('kind', LONG)
def test_the_work_grows_with_the_length_only(kind):
    def work(n):
        text = {'fence': '```\n', 'rows': '|a|b|\n|-|-|\n'}.get(kind, '') + (LONG[kind] * n)[:n]
        setter = main.Typesetter()
        for i in range(0, len(text), 40): setter.feed(text[i:i + 40])
        setter.finish()
        return setter.work / len(text)
    assert work(6_000) < (3 if kind in ('fence', 'line') else 24)


@pytest.mark.parametrize('dense', ['[', '![', '[a ', '[`](`)'])
def test_the_work_on_what_is_slow_to_parse_is_less(dense):
    text, setter = dense * (30_000 // len(dense)), main.Typesetter()
    for i in range(0, len(text), 40): setter.feed(text[i:i + 40])
    assert setter.work * main.weight(dense) / len(dense) < 30 * len(text)


@pytest.mark.parametrize('text', ['a*b* ' * 20_000, '|a|\n|-|\n' + '|1|\n' * 20_000, '[' * 30_000, '![' * 15_000,
                                  '[' * 5_000 + 'x' + '](a)' * 5_000])
def test_what_is_too_long_or_too_dense_is_shown_unstyled_with_a_note(text):
    assert [html[:19] for html in main.render(text)] == ['<div class="plain">']


def test_an_ordinary_long_list_of_links_is_set():
    assert ''.join(main.render('- [some words](https://a.example/b) and more\n' * 900)).count('<a ') == 900


@pytest.mark.parametrize('columns, rows', [(1_000, 64), (30, 40), (10, 6), (5, 12), (2, 99)])
def test_a_table_grows_by_empty_cells_only_as_the_text_does(columns, rows):
    head = '|'.join('a' * columns) + '\n' + '|'.join('-' * columns) + '\n'
    text = (head + 'x\n' * rows + '\n') * (20_000 // (len(head) + 2 * rows))
    assert len(''.join(main.render(text))) < 25 * len(text)
    assert main.render(text)[0].count('<th>') == columns
    assert ''.join(main.render(head + 'x\n' * (50 // columns))).count('<td>') == 50 // columns * columns


# ---- Components: text is shown as text ------------------------------------------------------------------------------

HOSTILE = [
    '<script>window.__pwn=1</script>', '</textarea></script></title></style><svg onload=window.__pwn=1>',
    '<div id="content-1" hx-swap-oob="true">D</div>', '![x](http://canary/u.png)', '[x](javascript:window.__pwn=1)',
    '\u202eabc\u202c \u2067rtl\u2069 שלום مرحبا', '👩‍👩‍👧‍👦 🏳️‍🌈 é \ufeff', '\x1b[2J\x1b]0;x\x07',
    '\n\nHuman: x\n\nAssistant:', '{{7*7}} ${x} %s {0}', "'; drop table message; --", '&lt;b&gt; &amp;amp; &#0;',
    'a\n' * 10_000, '😀' * 50_000, 'x' * 100_000, '  leading and trailing  ', 'nul\0inside',
    '\ttab\u2028line\u2029paragraph\x85next', 'ws-connect="/ws/chat/1/1"']

@pytest.mark.parametrize('text', HOSTILE, ids=lambda t: ascii(t[:24]))
def test_text_is_stored_exactly_and_shown_as_text(me, upstream, text):
    upstream.plans[text] = [says(text)]
    chat = me.ask(text)
    asked, reply = (chat.ended(), chat.messages)[1]
    assert asked['content'] == text and reply['content'] == text and text in me.get(f'/c/{chat.id}.md').text
    page = Page(chat.page()).root
    assert shown(page.find('content-0').text) == shown(text)
    assert not page.all(lambda n: n.attrs.get('onload') or n.tag == 'script' and not n.attrs.get('src'))
    assert len(page.all(lambda n: n.attrs.get('id') == 'content-1')) == 1

@pytest.mark.parametrize('case', SAYINGS, ids=lambda case: case['id'])
def test_the_corpus_is_text_as_a_question_as_a_title_and_as_an_answer(me, upstream, case):
    text = spelled(case)
    upstream.plans[text] = [says(*pieces(text, random.Random(SEED), max(9, len(text) // 20)))]
    chat = me.ask(text)
    assert chat.watch().ends().code in (None, 1000)
    told, page = me.get(f'/c/{chat.id}.json').json(), Page(chat.page()).root
    assert [m['content'] for m in told['messages']] == [text, text]
    link = page.all(lambda n: n.attrs.get('href') == f'/c/{chat.id}' and n.tag == 'a')[0]
    assert shown(link.text) == shown(told['title']) == shown(page.all(lambda n: n.tag == 'title')[0].text)
    for id in ('content-0', 'content-1'):
        for node in page.find(id).all(lambda n, id=id: n.attrs.get("id") != id):
            assert node.tag in TAGS and set(node.attrs) <= ATTRIBUTES, (node.tag, node.attrs)
    assert len(page.all(lambda n: n.attrs.get('id') == 'composer')) == 1

def shown(text): return re.sub('[\0\ufffd]', '', text).strip('\n')      # HTML has no NUL

FORM = 'application/x-www-form-urlencoded'

@pytest.mark.parametrize('body', [b'message=%00a%00', b'message=a%ED%A0%80b', b'message=%FF%FE', b'message=%F0%9F%98'])
def test_text_that_is_no_text_is_kept_or_refused_in_words(me, body):
    answer = me.http.post('/', content=body, headers={'Content-Type': FORM, 'HX-Request': 'true'})
    assert answer.status_code in (200, 400, 422) and Page(answer.text).root.text.strip()
    if answer.status_code == 200: assert Chat(me, answer.headers['HX-Push-Url'][3:], '').ended()['status'] == 'done'

def test_an_answer_full_of_markup_arrives_as_text(me, upstream):
    chat = me.ask(upstream.says('<b>bo', 'ld</b> <scr', 'ipt>x</script> <p id="msg', '-0">no</p> &am', 'p;'))
    tab = chat.watch().ends()
    for page in (tab.page.root, Page(chat.page()).root):
        assert '<b>bold</b> <script>x</script> <p id="msg-0">no</p>' in plain(page.find('content-1').text)
        assert len(page.all(lambda n: n.attrs.get('id') == 'msg-0')) == 1 and not page.find('content-1').all(
            lambda n: n.tag in ('script', 'b'))


@pytest.mark.parametrize('ago, zone, day', [
    (0, 0, 'Today'), (3_600 * 13, 0, 'Yesterday'), (3_600 * 13, 600, 'Today'), (3_600 * 11, 840, 'Yesterday'),
    (86_400 * 6, 0, 'Previous 7 days'), (86_400 * 20, 0, 'Previous 30 days'), (86_400 * 40, 0, 'October 2026'),
    (86_400 * 400, 0, 'October 2025'), (-86_400 * 2, 0, 'Today')])
def test_the_list_is_grouped_by_the_days_of_the_reader(ago, zone, day):
    noon = 1_795_435_200            # 23 November 2026
    conversation = main.Conversation('id', 'owner', 'title', None, 0, noon - ago)
    assert main.day_of(conversation, zone, noon) == day
    assert main.day_of(dataclasses.replace(conversation, pinned=1), zone, noon) == 'Pinned'


# ---- Door -----------------------------------------------------------------------------------------------------------

FOREIGN = ['https://evil.example', 'null', 'http://127.0.0.1:1', 'http://localhost', 'file://']

def test_a_cookie_or_a_header_does_not_replace_the_form(me, upstream):
    forged = {'Cookie': 'message=forged; key=forged', 'message': 'forged', 'key': 'forged'}
    answer = me.post('/', headers=forged, message='typed')
    assert Chat(me, answer.headers['HX-Push-Url'][3:], '').messages[0]['content'] == 'typed'
    assert me.post('/', headers=forged).status_code == 422

@pytest.mark.parametrize('path', ['/', '/c/unknown', '/nowhere', 'conversation'])
def test_every_page_carries_a_strict_policy_and_names_no_other_host(me, path):
    if path == 'conversation': path = f'/c/{me.ask("hello").id}'
    answer = me.get(path)
    policy = answer.headers['Content-Security-Policy']
    assert "script-src 'self'" in policy and "style-src 'self'" in policy and not re.search(r'unsafe|\*|http', policy)
    assert answer.headers['X-Content-Type-Options'] == 'nosniff'
    page = Page(answer.text).root
    assert not page.all(lambda n: n.tag == 'style' or n.tag == 'script' and not n.attrs.get('src'))
    assert not page.all(lambda n: any(a.startswith('on') or a.startswith('hx-on') or a == 'style' for a in n.attrs))
    links = [n.attrs[a] for n in page.walk() for a in ('src', 'href', 'action', 'content') if n.attrs.get(a)]
    assert not [link for link in links if re.match(r'(https?:)?//', link) and not link.startswith(me.url)]


PASSWORD = 'correct horse battery'
MANY = {'logins_per_address': 100_000, 'logins_overall': 100_000}


@pytest.fixture(scope='module')
def house(new_site): return new_site(app_password=PASSWORD, **MANY)

@pytest.fixture
def stranger(house): return house.person()

@pytest.fixture
def owner(house): return signed_in(house)

def sign_in(person, password=PASSWORD, **form): return person.post('/login', htmx=False, password=password, **form)

def signed_in(house):
    person = house.person()
    assert sign_in(person).status_code == 303
    return person

def may_enter(person): return person.get('/').status_code == 200

@contextlib.contextmanager
def clock(house, seconds):
    "The wall clock jumps."
    house.door.clock = lambda: time.time() + seconds
    yield
    house.door.clock = time.time


# ---- Settings: nobody by accident -----------------------------------------------------------------------------------

OPEN_HOST = {'HOST': '127.0.0.2'}       # not the loopback's own name, so to Parley it is the open net; to us it is not
HASHED = main.scrypt(PASSWORD.encode(), bytes(16), log_n=4)

@pytest.mark.parametrize('env, names', [
    (OPEN_HOST, 'APP_PASSWORD HOST'), ({'HOST': '0.0.0.0'}, 'APP_PASSWORD HOST'), ({'HOST': '::'}, 'APP_PASSWORD'),
    ({'HOST': '192.0.2.7'}, 'APP_PASSWORD'), ({**OPEN_HOST, 'APP_PASSWORD': ''}, 'APP_PASSWORD'),
    ({**OPEN_HOST, 'APP_PASSWORD': ' ' * 20}, 'APP_PASSWORD'), ({**OPEN_HOST, 'APP_PASSWORD': 'canary'},
        'APP_PASSWORD'),
    ({'APP_PASSWORD': 'canary'}, 'APP_PASSWORD'), ({'FLY_APP_NAME': 'x'}, 'APP_PASSWORD'),
    ({'APP_PASSWORD_HASH': 'canary'}, 'APP_PASSWORD_HASH'), ({'TRUSTED_PROXIES': 'canary'}, 'TRUSTED_PROXIES'),
    ({'APP_PASSWORD': PASSWORD, 'APP_PASSWORD_HASH': HASHED}, 'APP_PASSWORD_HASH'),
    ({'APP_PASSWORD': 'canary\x1bcanary'}, 'APP_PASSWORD'), ({'APP_PASSWORD': 'é' * 600}, 'APP_PASSWORD'), ({'SESSION_DAYS': 'nan'}, 'SESSION_DAYS')])
def test_a_start_that_would_be_open_ends_in_one_line_that_says_what_to_set(tmp_path, env, names):
    server = Server(tmp_path, **env)
    assert server.exit() not in (0, None)
    (line,) = server.log.read_text().strip().splitlines()
    assert all(name in line for name in names.split()) and 'canary' not in line and not (tmp_path / 'data').exists()

def test_a_start_that_would_be_open_is_refused_at_once(tmp_path):
    began = time.monotonic()
    env = {'PATH': os.environ['PATH'], 'HOST': '0.0.0.0', 'PORT': '0'}
    ended = subprocess.run([sys.executable, SOURCE], cwd=tmp_path, env=env, capture_output=True, timeout=DEADLINE)
    assert ended.returncode and b'APP_PASSWORD' in ended.stderr and time.monotonic() - began < 2

@pytest.mark.parametrize('env', [{'APP_PASSWORD': f' {PASSWORD}\n'}, {'APP_PASSWORD_HASH': f'{HASHED}\n'},
                                 {'APP_PASSWORD': PASSWORD, 'FLY_APP_NAME': 'x'}])
def test_with_a_password_it_starts(env): assert main.Settings.read({'HOST': '0.0.0.0', **env}).locked

def hashed(password):
    return subprocess.run([sys.executable, SOURCE, 'hash'], input=password, capture_output=True, text=True,
                          timeout=DEADLINE, cwd=SOURCE.parent)

def test_a_hash_made_on_the_command_line_opens_the_door(new_site):
    with concurrent.futures.ThreadPoolExecutor() as pool: made, *refused = pool.map(hashed, (PASSWORD + '\n', 'short\n', '', 'é' * 600))
    kept = made.stdout.strip()
    assert kept.startswith('scrypt:15:8:3:') and made.returncode == 0 and PASSWORD not in made.stdout + made.stderr
    house = new_site(app_password_hash=kept)
    assert sign_in(house.person()).status_code == 303 and sign_in(house.person(), 'wrong').status_code == 401
    assert all(ended.returncode for ended in refused)


# ---- Door: one lock for every way in --------------------------------------------------------------------------------

LIST = {'/login', '/healthz', '/assets/{file}'}      # the open ones; a new route is guarded, or it is added here

def every_route(house):
    for route in house.door.state.parley.door.app.routes:
        assert isinstance(route, (Route, WebSocketRoute)) and not isinstance(route, Mount), route
        yield route, re.sub(r'{\w+(:\w+)?}', '1', route.path)

def test_every_route_is_guarded_or_on_the_short_list_of_open_ones(house, stranger):
    walked = set()
    for route, path in every_route(house):
        walked.add(route.path)
        if isinstance(route, WebSocketRoute):
            with pytest.raises(InvalidStatus) as refused: stranger.socket(path)
            assert refused.value.response.status_code == 403
            continue
        for method in {'GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'HEAD', *route.methods}:
            answer = stranger.http.request(method, path)
            allowed = {200, 401, 404, 405} if route.path in LIST else {303, 401}
            assert answer.status_code in allowed, (method, path, answer.status_code)
    assert {'/', '/c/{conversation_id}', '/c/{conversation_id}.json', '/ws/chat/{conversation_id}/{msg_idx}'} <= walked

def test_what_a_stranger_gets_holds_nothing_of_anybody(house, owner, stranger):
    chat = owner.ask('canary of a question')
    for path in ('', '.json', '.md', '/0', '/0.md', '/1'):
        for headers in ({}, {'HX-Request': 'true'}, {'Accept': 'application/json'}, {'Sec-Fetch-Mode': 'cors'}):
            answer = stranger.get(f'/c/{chat.id}{path}', **headers)
            assert answer.status_code in (303, 401) and 'canary' not in answer.text
    login = stranger.get('/login').text + stranger.post('/', htmx=False).text
    assert chat.id not in login and 'canary' not in login and 'claude' not in login.lower()

@pytest.mark.parametrize('path', ['/login/', '/login/x', '//login', '/Login', '/%6cogin/../', '/assets/',
    '/assets/../c/1',
                                  '/assets/x/y', '/healthz/', '/healthz;x', '/login%00', '/login\u0085', '/c/x/login'])
def test_what_only_looks_like_an_open_path_is_closed(stranger, path):
    assert stranger.get(path).status_code in (303, 401)

HOSTS = ['evil.invalid', 'localhost.evil.invalid', '127.0.0.1.nip.io', '127.0.0.1@evil', '', '127.1', '0x7f.1',
    '0.0.0.0',
         'localhost:x', '[::1', 'localhost,evil.invalid', '127.0.0.1:80:80', 'xn--localhost', ' evil', 'localhost evil']

def asked_raw(url, *lines, more=b''):
    "One request to the letter; the status line that came back, '' when the connection was just closed."
    port = urlsplit(url).port
    with socket.create_connection(('127.0.0.1', port), DEADLINE) as wire:
        wire.settimeout(DEADLINE)
        wire.sendall(b'\r\n'.join(line.encode('latin-1') if isinstance(line, str) else line for line in lines)
                     + b'\r\n\r\n' + more)
        with contextlib.suppress(ConnectionResetError): return wire.recv(65536).decode('latin-1')
    return ''

SOCKET = ('Upgrade: websocket', 'Connection: Upgrade', 'Sec-WebSocket-Version: 13',
          'Sec-WebSocket-Key: ' + base64.b64encode(bytes(16)).decode())

@pytest.mark.parametrize('host', HOSTS)
def test_another_name_is_not_served_for_pages_and_sockets_alike(site, host):
    for verb in ('GET', 'POST'):
        assert ' 400 ' in asked_raw(site.url, f'{verb} / HTTP/1.1', f'Host: {host}', f'Origin: http://{host}', 'Content-Length: 0')
    answer = asked_raw(site.url, 'GET /ws/chat/x/1 HTTP/1.1', f'Host: {host}', f'Origin: http://{host}', *SOCKET)
    assert re.match(r'HTTP/1.1 40[03] ', answer), answer

@pytest.mark.parametrize('hosts', [[], ['127.0.0.1', 'evil.invalid'], ['evil.invalid', '127.0.0.1']])
def test_one_host_header_not_none_and_not_two(site, hosts):
    assert ' 400 ' in asked_raw(site.url, 'GET / HTTP/1.1', *[f'Host: {host}' for host in hosts])

@pytest.mark.parametrize('host', ['localhost', '127.0.0.1:1', '[::1]:5001', 'LOCALHOST'])
def test_the_names_of_the_loopback_are_served(site, host): assert ' 200 ' in asked_raw(site.url, 'GET / HTTP/1.1',
    f'Host: {host}')

def test_names_that_are_allowed_are_served(new_site):
    house = new_site(app_password=PASSWORD, allowed_hosts='a.example, B.example', fly_app_name='mine', host='0.0.0.0')
    for host, is_ours in {'a.example': 1, 'b.example:443': 1, 'mine.fly.dev': 1, 'c.example': 0, 'fly.dev': 0}.items():
        assert (' 303 ' if is_ours else ' 400 ') in asked_raw(house.url, 'GET / HTTP/1.1', f'Host: {host}')
    assert ' 200 ' in asked_raw(house.url, 'GET /healthz HTTP/1.1', 'Host: 10.1.2.3')     # a checker knows no name

PORT = 'http://127.0.0.1:1'

@pytest.mark.parametrize('headers, status', [
    *[({'Origin': origin}, 403) for origin in (None, *FOREIGN)], ({'Origin': '{url}.evil.invalid'}, 403), ({'Origin': '{url}/'}, 403), ({'Origin': 'ftp{url}'}, 403),
    ({'Sec-Fetch-Site': 'cross-site'}, 403), ({'Sec-Fetch-Site': 'same-site'}, 403), ({'Sec-Fetch-Site': 'none'}, 403),
    ({'Sec-Fetch-Site': ''}, 403), ({'Sec-Fetch-Site': 'same-origin', 'Origin': None}, 422), ({}, 422)])
def test_only_a_page_of_ours_may_post(site, me, upstream, headers, status):
    headers = {'Origin': '{url}', 'HX-Request': 'true', **headers}
    sent = {name: value.replace('{url}', site.url) for name, value in headers.items() if value is not None}
    def post(path): return httpx.post(site.url + path, headers=sent, data={'message': 'x' * (status == 403)}, **LOCAL).status_code
    chat = me.ask(upstream.says('half ', HANG))
    assert post('/') == status and (status != 403 or {post(f'/c/{chat.id}{path}') for path in ('', '/stop', '/retry')} == {403})
    assert chat.reply['status'] == LIVE
    chat.stop()

@pytest.mark.parametrize('origins', [
    *[[origin] for origin in FOREIGN], [], ['{url}', '{url}'], ['{url}', PORT], ['http://{host}.evil.invalid'],
    ['http://localhost:1'], ['{url}/x']])
def test_only_a_page_of_ours_may_listen(site, me, upstream, origins):
    host, chat = urlsplit(site.url).netloc, me.ask(upstream.says('secret'))
    lines = [f'Origin: {origin}'.replace('{url}', site.url).replace('{host}', host) for origin in origins]
    answer = asked_raw(site.url, f'GET /ws/chat/{chat.id}/1 HTTP/1.1', f'Host: {host}', *lines, *SOCKET)
    assert answer.startswith(f'HTTP/1.1 {400 if len(origins) > 1 else 403} '), answer

@pytest.mark.parametrize('method', ['GET', 'HEAD', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'TRACE', 'FOO'])
def test_nothing_changes_but_by_post(me, upstream, method):
    chat = me.ask(upstream.says('half ', HANG))
    for path in ('/stop', '/retry', ''):
        answer = me.http.request(method, f'/c/{chat.id}{path}', headers={'X-HTTP-Method-Override': 'POST'})
        assert answer.status_code in ((200,) if not path and method in ('GET', 'HEAD') else (404, 400 if method == 'FOO' else 405))
    assert chat.reply['status'] == 'streaming' and me.http.request(method, '/logout').status_code in (400, 404, 405)
    chat.stop()


# ---- Door: signing in -----------------------------------------------------------------------------------------------

def cookie_of(answer): return answer.headers['set-cookie']

def test_one_signs_in_without_a_script_and_goes_on_where_one_was_going(stranger, owner):
    chat = owner.ask('hello')
    sent_away = stranger.get(f'/c/{chat.id}?before=1')
    assert sent_away.status_code == 303
    page = Page(stranger.get(sent_away.headers['location']).text).root
    (form,) = page.all(lambda n: n.tag == 'form')
    fields = {n.attrs['name']: n.attrs.get('value') for n in form.all(lambda n: n.tag == 'input')}
    assert (form.attrs['method'], form.attrs['action']) == ('post', '/login')
    assert not page.all(lambda n: n.tag == 'script' or any(name.startswith(('on', 'hx-')) for name in n.attrs))
    answer = stranger.post(form.attrs['action'], htmx=False, **{**fields, 'password': PASSWORD})
    assert (answer.status_code, answer.headers['location']) == (303, f'/c/{chat.id}?before=1')
    assert stranger.get(f'/c/{chat.id}').status_code == 200
    assert stranger.get('/login?next=/c/x').headers['location'] == '/c/x'

@pytest.mark.parametrize('typed', ['two\nlines & <b>"quotes"</b>', '\n starts with a line', 'é👩‍👩‍👧 \u202e',
    'x' * 150_000])
def test_a_message_typed_after_the_session_ended_is_not_lost(stranger, typed):
    refused = stranger.post('/c/some-id', htmx=False, message=typed, key='k')
    assert refused.status_code == 401 and kept_in(refused) == typed
    wrong = sign_in(stranger, 'wrong', message=kept_in(refused), next='/c/some-id')
    assert wrong.status_code == 401 and kept_in(wrong) == typed
    right = sign_in(stranger, message=kept_in(wrong), next='/c/some-id')
    assert right.status_code == 200 and kept_in(right) == typed and may_enter(stranger)
    composer = Page(right.text).root.find('composer')
    assert composer.attrs['action'] == composer.attrs['hx-post'] == '/c/some-id'

def kept_in(answer):
    "The text in the form, as a browser reads it: one line feed after the tag is not part of it."
    (area,) = Page(answer.text).root.all(lambda n: n.attrs.get('name') == 'message')
    return area.text.removeprefix('\n')

def test_htmx_is_led_to_the_login_and_back_to_the_page_it_was_on(stranger):
    for path in ('/c/abc', '/c/abc/stop', '/c/abc/1', '/'):
        answer = stranger.post(path, headers={'HX-Current-URL': stranger.url + '/c/abc?x=1'}, message='typed')
        assert (answer.status_code, answer.headers['hx-redirect']) == (401, '/login?next=%2Fc%2Fabc')
        assert stranger.get(path, **{'HX-Request': 'true', 'HX-Current-URL': 'javascript:x'}).status_code == 401

@pytest.mark.parametrize('place', [
    '//evil.invalid', '/\\evil.invalid', '\\\\evil.invalid', 'https://evil.invalid', 'https:evil.invalid',
        'evil.invalid',
    'javascript:window.__pwn=1', '/\t/evil.invalid', '/\n/evil.invalid', ' //evil.invalid', '/ok\r\nSet-Cookie: x=1',
    '/a\\b', '/\u2028', '', '/' + 'a' * 3000, *[case['payload'].partition('next=')[2] for case in CORPUS
                                                if case['where'] == 'query' and 'next=' in case['payload']]])
def test_the_way_on_never_leads_to_another_site(stranger, place):
    shown = Page(stranger.get('/login?next=' + quote(place)).text).root
    (kept,) = [n.attrs['value'] for n in shown.all(lambda n: n.attrs.get('name') == 'next')]
    answer = sign_in(stranger, next=place)
    ways = [kept, answer.headers['location']] if answer.status_code == 303 else [kept]
    assert answer.status_code in (303, 413) and all(re.match(r'/(?![/\\])[!-~]*$', way) and '\\' not in way
        for way in ways)

def test_a_session_cookie_is_only_for_this_server_and_not_for_scripts(house, stranger):
    cookie = cookie_of(sign_in(stranger))
    name, *flags = cookie.replace('; ', ';').split(';')
    assert name.startswith(f'parley-{house.settings.port}=') and len(name.partition('=')[2]) >= 43
    assert {'HttpOnly', 'Path=/'} < set(flags) and 'samesite=lax' in cookie.lower() and 'domain' not in cookie.lower()
    assert 'secure' not in cookie.lower()

def test_behind_https_the_cookie_is_bound_to_the_host_and_only_a_proxy_that_is_trusted_says_so(new_site):
    spoof = {'X-Forwarded-Proto': 'https', 'X-Forwarded-For': '6.6.6.6'}
    plain_house = new_site(app_password=PASSWORD, **MANY)
    answer = plain_house.person().post('/login', False, spoof, password=PASSWORD)
    assert 'ecure' not in cookie_of(answer) and 'strict-transport-security' not in answer.headers
    house = new_site(app_password=PASSWORD, trusted_proxies='10.0.0.0/8, 127.0.0.1', **MANY)
    me, secure = house.person(), house.url.replace('http', 'https')
    assert me.post('/login', False, spoof, password=PASSWORD).status_code == 403           # http is another origin now
    answer = me.post('/login', False, {**spoof, 'Origin': secure}, password=PASSWORD)
    assert cookie_of(answer).startswith('__Host-parley-') and '; Secure' in cookie_of(answer)
    assert 'max-age=' in answer.headers['strict-transport-security']
    name, value = cookie_of(answer).split(';')[0].split('=', 1)
    assert me.get('/', Cookie=f'{name}={value}', **spoof).status_code == 200
    assert me.get('/', Cookie=f'{name.removeprefix("__Host-")}={value}', **spoof).status_code == 303

def test_no_cookie_is_set_or_needed_where_there_is_no_password(me):
    assert me.get('/').status_code == 200 and 'set-cookie' not in me.get('/').headers
    assert me.get('/login').headers['location'] == '/' and 'logout' not in me.get('/').text

@pytest.mark.parametrize('password', ['', ' ', 'wrong', PASSWORD[:-1], PASSWORD + 'x', PASSWORD.upper(),
    PASSWORD + '\0',
                                      'x' * 1025, '\ud7ff' * 1000, 'é' * 1024])
def test_any_other_password_is_refused(stranger, password):
    answer = sign_in(stranger, password)
    assert answer.status_code in (401, 413) and 'set-cookie' not in answer.headers and not may_enter(stranger)
    assert not password.strip() or password not in answer.text

@pytest.mark.parametrize('kind, body', [
    ('application/json', json.dumps({'password': {'$ne': 1}})), ('application/json',
        json.dumps({'password': PASSWORD})),
    ('application/x-www-form-urlencoded', f'password[]={quote(PASSWORD)}'), ('text/plain', f'password={PASSWORD}x'),
    ('application/x-www-form-urlencoded', f'password={quote(PASSWORD)}&password=wrong'),
    ('application/x-www-form-urlencoded', b'password=\xff'), ('multipart/form-data', 'x'),
    ('multipart/form-data; boundary=', 'x'), ('application/x-www-form-urlencoded', 'a=1&' * 500_000),
    ('application/x-www-form-urlencoded', 'a;' * 400_000), ('application/json', '[' * 100_000)])
def test_a_login_of_another_shape_is_refused(stranger, kind, body):
    asked = time.monotonic()
    answer = stranger.http.post('/login', content=body, headers={'Content-Type': kind})
    assert answer.status_code in (400, 401, 413, 415, 422) and not may_enter(stranger) and time.monotonic() - asked < 2

@pytest.mark.parametrize('kind', [
    *[f'multipart/form-data; boundary=B; charset={codec}' for codec in ('punycode', 'unicode_escape', 'undefined', 'utf-8')],
    'multipart/form-data; charset=punycode; boundary=B', 'application/x-www-form-urlencoded; x=multipart',
    'application/x-www-form-urlencoded; charset=punycode', 'application/x-www-form-urlencoded, multipart/form-data'])
@pytest.mark.parametrize('chunked', [False, True])
def test_no_other_codec_or_parser_is_chosen_by_a_header(stranger, kind, chunked):
    body = b'--B\r\nContent-Disposition: form-data; name="message"\r\n\r\n' + b'ab-a\\ud800' * 99 + b'\r\n--B--\r\n'
    sent = stranger.http.post('/login', content=iter([body]) if chunked else body, headers={'Content-Type': kind})
    assert sent.status_code == 415 and sent.headers['x-content-type-options'] == 'nosniff'

@pytest.mark.parametrize('kind', ['application/x-www-form-urlencoded;charset=UTF-8', 'application/x-www-form-urlencoded; charset=utf-8'])
def test_the_ways_a_browser_names_a_form_are_known(stranger, kind):
    sent = stranger.http.post('/login', content=urlencode({'password': PASSWORD}), headers={'Content-Type': kind})
    assert sent.status_code == 303 and may_enter(stranger)

def test_nobody_else_reads_a_form(house, stranger, monkeypatch):
    def no(_): raise AssertionError('the library makes an object of each sign')
    monkeypatch.setattr('starlette.formparsers.unquote_plus', no)
    assert sign_in(stranger).status_code == 303 and may_enter(stranger)

@given(st.lists(st.tuples(st.text(max_size=9), st.text('ab+&=% é漢\n', max_size=30)), max_size=9), st.text('ab+&=%4Ff', max_size=40))
def test_a_form_is_read_as_the_library_reads_it(pairs, raw):
    for body in (urlencode(pairs), raw):
        try: known = dict(parse_qsl(body, keep_blank_values=True, errors='strict'))
        except UnicodeDecodeError: known = None
        try: assert dict(main.read_form(body.encode(), 50)) == known
        except main.Refused as no: assert known is None and no.status == 422

@pytest.mark.parametrize('body', [b'a=' + b'%' * 1_000_000, b'a=' + b'%E6%BC%A2' * 110_000, b'a=' + b'%41b' * 250_000, b'&' * 1_000_000])
def test_a_form_takes_no_more_memory_than_a_few_times_its_length(body):
    tracemalloc.start()
    try:
        with contextlib.suppress(main.Refused): main.read_form(body, 50)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(body)
    finally: tracemalloc.stop()
    with pytest.raises(main.Refused, match='too many fields'): main.read_form(b'a=1&' * 60, 50)

def test_whatever_a_stranger_says_of_where_it_is_the_answer_has_its_headers(house, stranger, owner):
    no = {'HX-Current-URL': 'http://['}
    assert stranger.get('/c/x', **no).status_code in (303, 401) and owner.get('/list', **no).status_code < 400
    for line in ('OPTIONS * HTTP/1.1', 'DELETE * HTTP/1.1'):
        answer = asked_raw(house.url, line, f'Host: {urlsplit(house.url).netloc}', f'Origin: {house.url}')
        assert answer.startswith('HTTP/1.1 4') and 'nosniff' in answer

def test_a_request_that_breaks_off_is_no_fault_of_ours(house, caplog):
    lines = ['POST /login HTTP/1.1', f'Host: {urlsplit(house.url).netloc}', f'Origin: {house.url}', 'Content-Length: 100',
             'Content-Type: application/x-www-form-urlencoded', '', 'message=half']
    def over(): return [r for r in caplog.records if getattr(r, 'fields', {}).get('status') == 499]
    with caplog.at_level('INFO'):
        with socket.create_connection(('127.0.0.1', urlsplit(house.url).port), DEADLINE) as wire:
            wire.sendall('\r\n'.join(lines).encode())
        assert eventually(over)
    assert not [record for record in caplog.records if record.levelname == 'ERROR']

@pytest.mark.parametrize('typed', ['caf\u00e9 au lait bon', 'cafe\u0301 au lait bon', ' caf\u00e9 au lait bon\n'])
def test_a_password_is_the_same_however_its_accents_are_typed(new_site, typed):
    house = new_site(app_password=main.Settings.read({'APP_PASSWORD': 'cafe\u0301 au lait bon'}).app_password)
    assert sign_in(house.person(), typed).status_code == 303

def test_attempts_are_slowed_per_address_whatever_a_stranger_claims_to_be(new_site):
    house = new_site(app_password=PASSWORD, logins_per_address=3, logins_overall=100)
    owner, stranger = signed_in(house), house.person()
    told = [stranger.post('/login', False, {'X-Forwarded-For': f'1.2.3.{n}', 'Fly-Client-IP': f'9.9.9.{n}'},
                          password='wrong') for n in range(6)]
    assert [answer.status_code for answer in told] == [401] * 3 + [429] * 3 and int(told[-1].headers['retry-after']) > 0
    assert sign_in(stranger).text == told[-1].text and sign_in(stranger).status_code == 429
    assert may_enter(owner)         # who is in stays in

def test_attempts_are_slowed_overall_too(new_site):
    house = new_site(app_password=PASSWORD, logins_per_address=3, logins_overall=7, trusted_proxies='127.0.0.1')
    told = [house.person().post('/login', False, {'X-Forwarded-For': f'1.2.3.{n}'}, password='wrong').status_code
            for n in range(9)]
    assert told == [401] * 7 + [429] * 2

def test_attempts_at_the_same_time_count_too_and_the_right_one_is_not_counted(new_site):
    kept = main.scrypt(PASSWORD.encode(), bytes(16), log_n=10)
    house = new_site(app_password_hash=kept, logins_per_address=5, logins_overall=100)
    for _ in range(9): signed_in(house)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        told = list(pool.map(lambda _: sign_in(house.person(), 'wrong').status_code, range(20)))
    assert sorted(told) == [401] * 5 + [429] * 15

def test_guessing_does_not_slow_others(new_site, upstream):
    "L-10 in small: the work of a hash is done in a thread, one at a time."
    house = new_site(app_password_hash=main.scrypt(PASSWORD.encode(), bytes(16), log_n=14), **MANY)
    owner = signed_in(house)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        guesses = [pool.submit(sign_in, house.person(), 'wrong') for _ in range(4)]
        slowest = 0
        while not all(guess.done() for guess in guesses):
            asked = time.monotonic()
            assert owner.get('/').status_code == 200
            slowest = max(slowest, time.monotonic() - asked)
    assert slowest < 1 and {guess.result().status_code for guess in guesses} == {401}


# ---- Door: sessions -------------------------------------------------------------------------------------------------

def test_a_new_session_begins_at_every_login_and_ends_the_one_before(house, owner):
    before = dict(owner.http.cookies)
    assert sign_in(owner).status_code == 303 and dict(owner.http.cookies) != before and may_enter(owner)
    other = house.person()
    other.http.cookies.update(before)
    assert not may_enter(other)

def test_a_cookie_fixed_before_the_login_opens_nothing_after_it(house, stranger):
    name = f'parley-{house.settings.port}'
    stranger.http.cookies.set(name, 'fixed')
    fresh = cookie_of(sign_in(stranger))
    assert 'fixed' not in fresh and house.person().get('/', Cookie=f'{name}=fixed').status_code == 303

@pytest.mark.parametrize('cookie', ['', 'x', '"', 'x' * 5000, '\xff', '=;=', 'a=b; a=c', '%00', '../../x'])
def test_a_cookie_that_is_none_of_ours_is_a_stranger(house, stranger, cookie):
    headers = {'Cookie': f'parley-{house.settings.port}={cookie}'.encode('latin-1')}
    assert stranger.http.get('/', headers=headers).status_code == 303

def test_signing_out_ends_the_session_on_the_server(house, owner):
    other, copy = signed_in(house), house.person()
    copy.http.cookies.update(owner.http.cookies)
    answer = owner.post('/logout', htmx=False)
    assert (answer.status_code, answer.headers['location']) == (303, '/login') and 'Max-Age=0' in cookie_of(answer)
    assert not may_enter(copy) and may_enter(other)

def test_signing_out_everywhere_ends_all_sessions(house, owner):
    other = signed_in(house)
    owner.post('/logout', htmx=False, everywhere='1')
    assert not may_enter(owner) and not may_enter(other) and may_enter(signed_in(house))

@pytest.mark.parametrize('how', ['here', 'everywhere', 'login again', 'time'])
def test_a_socket_closes_within_a_second_when_its_session_ends(new_site, upstream, how):
    house = new_site(app_password=PASSWORD, **MANY, **({'session_days': 2 / 86_400} if how == 'time' else {}))
    owner, other = signed_in(house), signed_in(house)
    chat = owner.ask(upstream.says('half ', HANG))
    tabs, foreign = [chat.watch().until('half') for _ in range(3)], Tab(Chat(other, chat.id, ''), chat.page())
    foreign.until('half')
    began = time.monotonic()
    if how == 'login again': sign_in(owner)
    elif how != 'time': owner.post('/logout', htmx=False, **({'everywhere': '1'} if how == 'everywhere' else {}))
    assert [tab.ends().code for tab in tabs] == [4401] * 3 and time.monotonic() - began < (3 if how == 'time' else 1)
    if how in ('here', 'login again'):
        other.post(f'/c/{chat.id}/stop')
        assert foreign.ends().code == 1000
    else: assert foreign.ends().code == 4401

def test_sessions_end_unseen_and_at_last_and_a_jump_of_the_clock_back_ends_none(house, owner):
    for days, is_in in [(29, True), (58, True), (87, True), (89.9, True), (91, False)]:     # seen, and so renewed
        with clock(house, days * 86_400): assert may_enter(owner) == is_in, days
    for days in (0, -0.04, -400):
        with clock(house, days * 86_400): assert may_enter(owner), days
    other = signed_in(house)
    with clock(house, 31 * 86_400): assert not may_enter(other)
    with clock(house, -3600): assert may_enter(other) and may_enter(signed_in(house))

def test_a_session_that_ends_just_when_it_was_seen_stays_ended(house, owner):
    name = f'parley-{house.settings.port}'
    id = house.door.sign('session', dict(owner.http.cookies)[name])
    with clock(house, 3600): owner.post('/logout', htmx=False)
    assert may_enter(signed_in(house))      # a write later than both
    assert not rows(house.db, f"select * from session where id = '{id}'")

def test_sessions_outlive_a_restart_but_not_another_password_or_secret(new_site, tmp_path):
    me, jar = None, {}
    for change, is_in in [({}, None), ({}, True), ({'app_password': PASSWORD + '!'}, False), ({}, False)]:
        house = new_site(tmp_path, **{'app_password': PASSWORD, 'port': 5999, **MANY, **change})
        me = house.person()
        if is_in is None: jar = dict(signed_in(house).http.cookies)
        me.http.cookies.update(jar)
        assert is_in is None or may_enter(me) == is_in
        house.stop()
    house = new_site(tmp_path, app_password=PASSWORD, port=5999)
    jar = dict(signed_in(house).http.cookies)
    house.stop()
    house = new_site(tmp_path, app_password=PASSWORD, port=5999, session_secret='another')      # FI-33
    me = house.person()
    me.http.cookies.update(jar)
    assert me.get('/').status_code == 303 and me.get('/login').status_code == 200

def test_the_database_lets_nobody_in(house, owner):
    token = dict(owner.http.cookies)[f'parley-{house.settings.port}']
    stored = ''.join(path.read_bytes().decode('latin-1') for path in house.db.parent.iterdir() if path.is_file())
    assert token not in stored and PASSWORD not in stored
    for (id,) in rows(house.db, 'select id from session'):
        assert house.person().get('/', Cookie=f'parley-{house.settings.port}={id}').status_code == 303

def test_a_person_has_a_hundred_sessions_at_most(new_site):
    house = new_site(app_password=PASSWORD, **MANY)
    first = signed_in(house)
    for _ in range(101): signed_in(house)
    assert not may_enter(first) and rows(house.db, 'select count(*) from session')[0][0] <= 101

class Comings(RuleBasedStateMachine):
    "Browsers sign in and out, write, watch and stop in any order; who is in is only who should be."
    house = upstream = None
    browsers = Bundle('browsers')

    @initialize()
    def begin(self): self.inside, self.tabs, self.all = set(), {}, []

    @rule(target=browsers)
    def opens(self):
        self.all.append(self.house.person())
        return len(self.all) - 1

    @rule(who=browsers, right=st.booleans())
    def signs_in(self, who, right):
        had = dict(self.all[who].http.cookies)
        assert sign_in(self.all[who], PASSWORD if right else 'wrong').status_code == (303 if right else 401)
        if right:
            assert dict(self.all[who].http.cookies) != had
            self.closed(who)
            self.inside.add(who)

    @rule(who=browsers, everywhere=st.booleans())
    def signs_out(self, who, everywhere):
        answer = self.all[who].post('/logout', htmx=False, **({'everywhere': '1'} if everywhere else {}))
        assert answer.status_code == (303 if who in self.inside else 401)
        for one in [*self.inside] if everywhere and who in self.inside else [who]:
            self.closed(one)
            self.inside.discard(one)

    @rule(who=browsers)
    def asks(self, who):
        if who not in self.inside: return self.outside(self.all[who].post('/', message='no'))
        chat = self.all[who].ask(self.upstream.says('half ', HANG))
        self.tabs.setdefault(who, []).append((chat, chat.watch().until('half')))

    @rule(who=browsers)
    def stops(self, who):
        for chat, tab in self.tabs.pop(who, []):
            assert chat.stop().status_code == 204 and tab.ends().code == 1000 and tab.status == 'stopped'

    @rule(who=browsers, back=st.booleans())
    def deletes(self, who, back):
        for chat, tab in self.tabs.pop(who, []):
            assert chat.post('/delete').status_code == 200 and tab.ends().code == 1000 and tab.status == 'stopped'
            assert self.all[who].get(f'/c/{chat.id}').status_code == 404
            if back: assert chat.post('/restore').status_code == 200 and chat.reply['content'] == 'half '

    def closed(self, who):
        for _, tab in self.tabs.pop(who, []): assert tab.ends().code == 4401

    def outside(self, answer): assert answer.status_code == 401 and answer.headers['hx-redirect'].startswith('/login')

    @invariant()
    def only_who_should_be_is_in(self):
        for who, browser in enumerate(getattr(self, 'all', [])): assert may_enter(browser) == (who in self.inside)

    def teardown(self):
        for turn in list(self.house.door.state.parley.turns.running.values()):
            if self.inside: self.all[min(self.inside)].post(f'/c/{turn.reply.conversation}/stop')

def test_any_order_of_coming_and_going(house, upstream):
    Comings.house, Comings.upstream = house, upstream
    run_state_machine_as_test(Comings, settings=settings(
        max_examples=12, stateful_step_count=15, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck)))


# ---- Door: limits, headers, secrets, logs ---------------------------------------------------------------------------

def test_a_limit_answers_in_words_and_the_text_is_kept(new_site, upstream):
    house = new_site(messages_per_hour=4, conversations_per_hour=2, replies_per_person=2, sockets_per_person=2)
    me = house.person()
    chats = [me.ask(upstream.says('half ', HANG)) for _ in range(2)]
    refused = [me.post('/', htmx, message='kept text') for htmx in (True, False)]            # two replies run
    assert [answer.status_code for answer in refused] == [429] * 2 and kept_in(refused[1]) == 'kept text'
    assert a_sentence(refused[0]) and int(refused[0].headers['retry-after']) > 0
    tabs = [chats[0].watch().until('half') for _ in range(2)]
    with pytest.raises(InvalidStatus) as no: chats[1].watch()
    assert no.value.response.status_code == 403
    for chat in chats: chat.stop()
    assert [tab.ends().code for tab in tabs] == [1000] * 2
    refused = me.post('/', message='third conversation')
    assert refused.status_code == 429 and 'conversations' in refused.text and int(refused.headers['retry-after']) > 3000
    for _ in range(2): chats[0].say('again').ended()
    assert chats[0].post(message='fifth').status_code == 429 and chats[0].post('/retry').status_code == 429
    assert len(chats[0].messages) == 6

def test_many_sends_at_once_do_not_slip_past_a_limit(new_site, upstream):
    house = new_site(replies_per_person=3)
    questions = [upstream.says('half ', HANG) for _ in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        told = list(pool.map(lambda q: house.person().post('/', message=q).status_code, questions))
    assert sorted(told) == [200] * 3 + [429] * 9

def test_bodies_are_refused_before_they_are_read(site, house):
    for url in (site.url, house.url):
        for path in ('/', '/login', '/c/x'):
            head = (f'POST {path} HTTP/1.1', f'Host: {urlsplit(url).netloc}', f'Origin: {url}',
                    'Content-Type: application/x-www-form-urlencoded')
            answer = asked_raw(url, *head, 'Content-Length: 400000000')
            assert ' 413 ' in answer.splitlines()[0] and 'nosniff' in answer and re.search('[a-z]+ [a-z]+ [a-z]+',
                answer)
            answer = asked_raw(url, *head, 'Transfer-Encoding: chunked',
                more=b'100000\r\n' + b'x' * 2**20 + b'\r\n' * 1 + b'0\r\n\r\n')
            assert re.match(r'HTTP/1.1 (200|4\d\d) ', answer)

@pytest.mark.parametrize('length', ['-1', '1e9', '+5', '0x10', '9' * 30, 'x'])
def test_a_length_that_is_no_length_is_refused(site, length):
    answer = asked_raw(site.url, 'POST / HTTP/1.1', 'Host: localhost', 'Origin: http://localhost',
        f'Content-Length: {length}')
    assert re.match(r'HTTP/1.1 4(00|13) ', answer), answer

def test_an_endless_body_ends(start):
    server = start(MAX_BODY_BYTES='100000')
    before = server.memory()
    with socket.create_connection(('127.0.0.1', server.port), DEADLINE) as wire:
        wire.sendall(b'POST / HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n'
                     b'Transfer-Encoding: chunked\r\n\r\n')
        with contextlib.suppress(OSError):
            for _ in range(300): wire.sendall(b'20000\r\n' + b'x' * 0x20000 + b'\r\n')
    assert server.memory() - before < 32e6 and server.person().get('/healthz').status_code == 200

@pytest.mark.parametrize('field', [{'key': 'k' * 5000}, {'next': '/' + 'x' * 5000}, {str(n): 'x' for n in range(60)}])
def test_a_field_that_is_too_much_is_refused(me, field):
    answer = me.post('/', message='hello', **field)
    assert answer.status_code in (413, 422) and a_sentence(answer)

def test_a_head_must_end_and_in_time(new_site):
    site = new_site(header_seconds=.2)
    host = f'Host: {urlsplit(site.url).netloc}'
    assert ' 400 ' in asked_raw(site.url, 'GET / HTTP/1.1', host, 'X-Big: ' + 'a' * 70_000).splitlines()[0]
    assert ' 400 ' in asked_raw(site.url, 'GET / HTTP/1.1', host, *[f'X-{n}: {"a" * 500}'
        for n in range(200)]).splitlines()[0]
    port = urlsplit(site.url).port
    for words in (b'', b'GET / HTTP/1.1\r\nHost: x', b'GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /x'):
        with socket.create_connection(('127.0.0.1', port), DEADLINE) as wire:
            wire.settimeout(DEADLINE)
            wire.sendall(words)
            while wire.recv(65536): pass            # it ends, however it began
    me = site.person()
    chat = me.ask(site.upstream.says('half ', gate := Gate(), 'more'))
    tab = chat.watch().until('half')
    with pytest.raises(TimeoutError):                   # a socket is not a head that is late
        while True: tab.socket.recv(.5)
    gate.open()
    assert tab.ends().text == 'half more'

CHUNKED = 'Transfer-Encoding: chunked'

@pytest.fixture(scope='module')
def prompt(new_site): return new_site(header_seconds=1, body_seconds=1)

def wired(site, *lines, more=b'', **options):
    "A connection that sent one request and has the beginning of its answer, unless it is not to be read."
    wire = socket.socket()
    wire.settimeout(DEADLINE)
    if 'room' in options: wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options['room'])
    wire.connect(('127.0.0.1', urlsplit(site.url).port))
    head = [lines[0] + ' HTTP/1.1', f'Host: {urlsplit(site.url).netloc}', f'Origin: {site.url}', *lines[1:]]
    wire.sendall('\r\n'.join([*head, '', '']).encode() + more)
    return wire

@pytest.mark.parametrize('lines, more', [(('GET /healthz',), b'\r\n'), (('POST /', 'Content-Length: 10000000000'), b'x'),
                                         (('GET /healthz', CHUNKED), b'5'), (('POST /', CHUNKED), b'0\r\nX')])
def test_what_is_begun_after_an_answer_or_a_body_must_end_in_time(prompt, lines, more):
    with wired(prompt, *lines) as wire:
        if lines != ('POST /', CHUNKED): assert wire.recv(4096).startswith(b'HTTP/1.1 ')
        wire.sendall(more)
        with contextlib.suppress(ConnectionError):
            while wire.recv(65536): pass

@pytest.mark.parametrize('lines, more', [
    (('POST /', CHUNKED), b'0\r\n'), (('GET /healthz', CHUNKED), b'0\r\n'), (('POST /', CHUNKED), b'1;')])
@pytest.mark.parametrize('flood', [b'X: y\r\n' * 8_000, b'x' * 64_000], ids=['many', 'one'])
def test_no_end_of_trailers_or_extensions_is_collected(prompt, lines, more, flood):
    with wired(prompt, *lines, more=more + b'X: y' * (more == b'0\r\n')) as wire, pytest.raises(ConnectionError):
        for _ in range(200): wire.sendall(flood)

def test_answers_that_nobody_reads_are_given_up(prompt):
    sheet = re.search(r'/assets/[^"]+\.js', prompt.person().get('/').text)[0]
    with wired(prompt, f'GET {sheet}', room=4096) as wire:
        ask = f'GET {sheet} HTTP/1.1\r\nHost: {urlsplit(prompt.url).netloc}\r\n\r\n'.encode()
        def hung_up():
            try: wire.sendall(ask)
            except OSError: return True
        assert eventually(hung_up)

def test_who_reads_slowly_gets_all_of_a_long_answer(new_site):
    site, heard = new_site(body_seconds=1), 0
    assert bring(site.person(), with_message(content='words\n\n' * 1_500_000) | {'id': 'long'}).startswith('1 conversation')
    with wired(site, 'GET /c/long/0.md', 'Connection: close', room=262_144) as wire:
        while part := wire.recv(40_000):
            heard += len(part)
            time.sleep(.01)         # 4 MB a second: longer in all than anything may wait that is not read
    assert heard > 10_500_000

def test_many_requests_at_once_on_one_connection_are_refused(prompt):
    ask = f'GET /healthz HTTP/1.1\r\nHost: {urlsplit(prompt.url).netloc}\r\n\r\n'.encode()
    heard = b''
    with wired(prompt, 'GET /healthz', more=ask * 100) as wire, contextlib.suppress(ConnectionError):
        while part := wire.recv(65536): heard += part
    assert heard.count(b'HTTP/1.1 200') < 20

@pytest.mark.parametrize('lines', [
    ['GET / HTTP/1.1', 'Host: localhost', 'Content-Length: 3', 'Transfer-Encoding: chunked'], ['FOO / HTTP/1.1',
        'Host: localhost'],
    ['CONNECT / HTTP/1.1', 'Host: localhost'], ['GET /%00 HTTP/1.1', 'Host: localhost'], ['GET /%0d%0aX: HTTP/1.1',
        'Host: localhost'],
    ['GET /\x1b[31m HTTP/1.1', 'Host: localhost'], ['GET http://evil.invalid/ HTTP/1.1', 'Host: evil.invalid'],
    ['GET / HTTP/1.1', 'Host: localhost', 'Range: bytes=' + ','.join(f'{n}-{n}' for n in range(6000))],
    ['GET /healthz HTTP/1.1', 'Host: localhost', 'Cookie: ' + 'x=' + 'A' * 60_000], ['GET', ''], ['\0\1\2']])
def test_a_strange_request_is_answered_and_harms_nothing(site, me, lines):
    answer = asked_raw(site.url, *lines)
    assert not answer or re.match(r'HTTP/1.1 (200|303|4\d\d|501) ', answer) and 'Traceback' not in answer
    assert me.get('/healthz').status_code == 200

NEEDED = {'x-content-type-options': 'nosniff', 'referrer-policy': 'no-referrer', 'x-frame-options': 'DENY',
          'cross-origin-opener-policy': 'same-origin', 'cross-origin-resource-policy': 'same-origin'}

@pytest.mark.parametrize('method, path, status', [
    ('GET', '/', 303), ('GET', '/login', 200), ('POST', '/login', 401), ('GET', '/healthz', 200), ('GET', '/assets/x',
        404),
    ('PUT', '/', 401), ('POST', '/', 401), ('POST', '/large', 413), ('POST', '/json', 415), ('GET', '/evil', 400),
    ('POST', '/foreign', 403)])
def test_every_answer_carries_the_headers(house, method, path, status):
    host, origin = ('evil' if status == 400 else 'localhost'), ('evil' if status == 403 else 'localhost')
    lines = {413: ['Content-Length: 99999999'], 415: ['Content-Length: 2',
        'Content-Type: application/json']}.get(status, [])
    answer = asked_raw(house.url, f'{method} {path} HTTP/1.1', f'Host: {host}', f'Origin: http://{origin}', *lines)
    assert answer.startswith(f'HTTP/1.1 {status} '), answer
    headers = httpx.Headers([line.split(': ', 1) for line in answer.partition('\r\n\r\n')[0].splitlines()[1:]])
    needed = NEEDED | ({'referrer-policy': 'same-origin'} if status == 400 else {})     # not the loopback: see below
    assert {name: headers[name] for name in needed} == needed and 'server' not in headers and headers['x-request-id']
    policy = dict(part.strip().partition(' ')[::2] for part in headers['content-security-policy'].split(';'))
    assert {'default-src': "'none'", 'base-uri': "'none'", 'frame-ancestors': "'none'",
        'form-action': "'self'"}.items() \
        <= policy.items() and 'unsafe' not in headers['content-security-policy']
    assert headers['cache-control'] == 'no-store' and 'camera=()' in headers['permissions-policy']

def test_over_plain_http_a_browser_on_another_machine_can_still_post_a_form(new_site):
    "It sends no Sec-Fetch-Site there, and under no-referrer its Origin would be `null`: seen in Chromium 156."
    house = new_site(app_password=PASSWORD, allowed_hosts='parley.lan', trusted_proxies='127.0.0.1')
    ways = {'same-origin': ['Host: parley.lan'], 'no-referrer': ['Host: parley.lan', 'X-Forwarded-Proto: https']}
    for policy, lines in ways.items():
        assert f'referrer-policy: {policy}\r\n' in asked_raw(house.url, 'GET /login HTTP/1.1', *lines)

def test_a_fault_of_ours_says_nothing_and_carries_the_headers(new_site, caplog):
    site = new_site()
    site.door.state.parley.shelf = None          # a broken part, not a replaced one
    chat = site.person().post('/', message='canary of a question')
    assert chat.status_code == 500 and len(chat.content) < 100 and chat.headers['x-content-type-options'] == 'nosniff'
    def faults(): return [record for record in caplog.records if record.exc_info]
    assert eventually(faults)
    logged = '\n'.join(map(main.JsonLines().format, faults()))
    assert 'AttributeError' in logged and 'canary' not in logged and '"at": ["' in logged
    caplog.clear()

CANARIES = {'ANTHROPIC_API_KEY': 'sk-ant-canary0key', 'SESSION_SECRET': 'canary1secret',
    'APP_PASSWORD': 'canary2password'}

def test_secrets_and_words_are_in_no_page_export_log_or_title(tmp_path, wire, upstream):
    "The log is one JSON object a line, with a request id, and holds what happened but never what was said."
    with Server(tmp_path, ANTHROPIC_BASE_URL=wire.url, LOG_LEVEL='DEBUG', **CANARIES) as server: leaks(server, upstream)

def leaks(server, upstream):
    me = server.person()
    assert sign_in(me, 'canary3wrong').status_code == 401 and sign_in(me, CANARIES['APP_PASSWORD']).status_code == 303
    token = next(iter(me.http.cookies.values()))
    chat = me.ask('canary4question ' + 'x' * 80)
    bad = me.ask(upstream.plays(refuses(401)))
    chat.ended(), bad.ended()
    said = [me.get(path).text for path in ('/', '/login', '/healthz', f'/c/{chat.id}.json', f'/c/{chat.id}.md',
        '/nowhere',
                                           f'/c/{chat.id}', f'/c/{bad.id}', f'/c/{chat.id}?q=canary5query')]
    assert asked_raw(server.url, 'GET /%1b%0a"canary?q=canary5query HTTP/1.1', 'Host: localhost')
    process = ''.join(open(f'/proc/{server.process.pid}/{name}').read() for name in ('cmdline', 'comm'))
    secrets = [*CANARIES.values(), token, 'canary3wrong']
    assert not [s for s in secrets if s in process + ''.join(said)]
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert all({'time', 'level', 'logger', 'event', 'request'} <= line.keys() for line in lines)
    told = json.dumps(lines)
    assert not [s for s in [*secrets, 'canary4', 'canary5', 'You said', 'canary-of-the-upstream'] if s in told]
    sends = [line for line in lines if line['event'] == 'request' and line.get('method') == 'POST'
        and line['path'] == '/']
    assert sends[0]['status'] == 200 and sends[0]['ms'] >= 0 and re.fullmatch('[0-9a-f]{16}', sends[0]['request'])
    assert [line for line in lines if line['event'].startswith('upstream fault')
        and line['request'] == sends[-1]['request']]

def test_health_answers_within_a_second_while_a_write_hangs_and_asks_the_disk_once(new_site):
    site = new_site()
    me = site.person()
    with locked(site.db), concurrent.futures.ThreadPoolExecutor(20) as pool:
        asked = time.monotonic()
        told = list(pool.map(lambda _: me.get('/healthz'), range(20)))
        assert time.monotonic() - asked < 2 and {answer.status_code for answer in told} == {503}
        assert told[0].json()['why'] and site.door.state.parley.store.threads['writes']._work_queue.qsize() < 2
    assert eventually(lambda: me.get('/healthz').status_code == 200)

def test_a_nearly_full_disk_refuses_questions_and_keeps_the_text(new_site):
    site = new_site(min_free_bytes=10**15)
    me = site.person()
    answer = me.post('/', htmx=False, message='kept text')
    assert answer.status_code == 503 and 'nearly full' in answer.text and kept_in(answer) == 'kept text' and may_enter(me)
    assert me.get('/healthz').status_code == 200

def test_a_nearly_full_disk_refuses_whatever_writes_much(new_site, tmp_path, upstream):
    first = new_site(tmp_path)
    chat = first.person().ask(upstream.says('one')).over()
    at = id_of(chat, 1)
    first.stop()
    me = new_site(tmp_path, min_free_bytes=10**15).person()
    for path in ('retry', f'fork?at={at}'):
        answer = me.post(f'/c/{chat.id}/{path}', at=at)
        assert answer.status_code == 503 and 'nearly full' in answer.text, path
    assert 'nearly full' in bring(me, with_field(id='more'))

def test_where_the_database_was_taken_away_nothing_is_accepted_and_when_it_is_back_all_is_well(new_site, upstream):
    site = new_site()
    me = site.person()
    chat = me.ask('before').over()
    away = site.db.rename(site.db.with_name('away'))
    answer = me.post(f'/c/{chat.id}', htmx=False, message='kept text')
    assert answer.status_code == 503 and 'not there any more' in answer.text and kept_in(answer) == 'kept text'
    assert me.get('/healthz').status_code == 503 and 'before' in chat.page(), 'what is open can still be read'
    site.db.write_bytes(b'')
    assert me.post('/', message='x').status_code == 503, 'another file is not ours'
    away.rename(site.db)
    assert me.post(f'/c/{chat.id}', message='after').status_code == 200 and me.get('/healthz').status_code == 200

def test_one_signs_in_and_out_while_the_database_is_read_only(start):
    "FI-16 as far as the Door goes: a session that can't be kept ends with the process, and says so to nobody."
    server = start(APP_PASSWORD=PASSWORD)
    me = server.person()
    free = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    assert sign_in(me).status_code == 303 and may_enter(me)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, free)
    assert sign_in(me).status_code == 303 and me.post('/logout', htmx=False).status_code == 303 and not may_enter(me)

# ---- Reliability ----------------------------------------------------------------------------------------------------

def endless(*steps): return Answer(itertools.chain([START, 'half'], itertools.cycle(steps)))
def refusal(*steps, **headers): return Answer(steps, 400, {k.replace('_', '-'): v for k, v in headers.items()})

MUCH, DRIP = b'x' * 65_536, (b'x', .05)
@functools.cache
def bomb(): return gzip.compress(gzip.compress(bytes(150_000_000), 1))
def thought(text): return event('content_block_delta', index=0, delta={'type': 'thinking_delta', 'thinking': text})

FLOODS = {
    'a line of 50 MB': lambda: raw(START, 'half', b'data: ', *[MUCH] * 800, b'\n\n', end()),
    'an endless line': lambda: endless(MUCH), 'an endless line, a byte at a time': lambda: endless(*DRIP),
    'an endless comment': lambda: endless(b': x\n\n' * 9999), 'endless pings': lambda: endless(PING * 999),
    'endless thoughts': lambda: endless(thought('hm ' * 999)), 'endless words': lambda: endless('more ' * 999),
    'a bomb': lambda: raw(bomb(), content_encoding='gzip, gzip'),
    'a bomb as a refusal': lambda: refusal(bomb(), content_encoding='gzip, gzip'),
    'a bomb as a charset': lambda: refusal(zlib.compress(bytes(60_000_000)), content_type='x; charset=zlib_codec'),
    'an endless refusal': lambda: Answer(itertools.repeat(MUCH), 500),
    'an endless refusal, a byte at a time': lambda: Answer(itertools.cycle(DRIP), 400)}

def test_floods_drips_and_bombs_from_upstream_end_in_words_and_hold_up_nobody(start, upstream):
    "FI-11: the other replies go on, and memory stays bounded."
    server = start(IDLE_SECONDS='.5', STALL_SECONDS='.5', RETRY_SECONDS='0', MAX_REPLY_CHARS='100000',
                   FRAME_SECONDS='.005')
    me = server.person()
    questions = {name: upstream.plays(make()) for name, make in FLOODS.items()}
    me.ask('hello').ended()
    before, took = server.memory(), []
    chats = {name: me.ask(question) for name, question in questions.items()}
    while any(chat.reply['status'] == LIVE for chat in chats.values()):
        asked = time.monotonic()
        assert me.ask('hello').ended()['status'] == 'done' and server.memory() - before < 100e6
        took.append(time.monotonic() - asked)
    replies = {name: chat.reply for name, chat in chats.items()}
    assert not [name for name, reply in replies.items() if reply['status'] == 'done' or not reply['note']], replies
    assert sorted(took)[len(took) * 95 // 100] < 1 and server.memory() - before < 100e6
    assert len(replies['endless words']['content']) == 100_000
    assert all(call.closed.wait(DEADLINE) for question in questions.values() for call in upstream.called(question))

def test_of_a_refusal_no_more_is_read_than_words_need(me, upstream):
    "Also where the client is not ours."
    sent = iter([MUCH] * 800)
    assert me.ask(upstream.plays(Answer(sent, 400))).ended()['note'] and len(list(sent)) > 790

@pytest.mark.parametrize('packing, status', [('identity', 'done'), ('Identity', 'done'), ('gzip', 'failed')])
def test_an_answer_that_says_it_is_not_packed_is_read(me, upstream, packing, status):
    answer = says('well')
    answer.headers['content-encoding'] = packing
    assert me.ask(upstream.plays(answer)).ended()['status'] == status

def test_silent_connections_slow_nobody_and_give_their_descriptors_back(start):
    "FI-34, L-08 in small."
    server = start(HEADER_SECONDS='.5')
    me = server.person()
    def descriptors(): return len(os.listdir(f'/proc/{server.process.pid}/fd'))
    me.get('/healthz')
    before = descriptors()
    silent = [socket.create_connection(('127.0.0.1', server.port), DEADLINE) for _ in range(300)]
    for each in silent[::2]: each.sendall(b'POST / HTTP/1.1\r\nHost: local')
    asked = time.monotonic()
    assert server.person().get('/healthz').status_code == 200 and time.monotonic() - asked < 1
    assert eventually(lambda: descriptors() <= before + 3, 5)
    for each in silent: each.close()

def test_out_of_descriptors_it_recovers_by_itself(start):
    server = start()
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f'/proc/{server.process.pid}/fd'))
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (used + 20, limits[1]))
    many = []
    for _ in range(100):
        with contextlib.suppress(OSError): many.append(socket.create_connection(('127.0.0.1', server.port), 1))
    for each in many: each.close()
    def well():
        with contextlib.suppress(httpx.TransportError): return server.person().get('/healthz').status_code == 200
    assert eventually(well, 5)

def test_a_slow_body_is_ended(new_site):
    site = new_site(body_seconds=.3)
    answer = asked_raw(site.url, 'POST / HTTP/1.1', f'Host: {urlsplit(site.url).netloc}', f'Origin: {site.url}',
        'Content-Length: 100', more=b'message=')
    assert answer.startswith('HTTP/1.1 408 ')

def test_a_hundred_replies_at_once_while_a_third_of_the_calls_fail(new_site, upstream):
    site = new_site(retry_seconds=0)
    faults = [refuses(529), refuses(401), raw(b'rubbish', content_type='text/html'), raw(b'data: {"x\n\n')]
    plans = [says('fine') if n % 3 else faults[n // 3 % len(faults)] for n in range(100)]
    questions = [upstream.plays(plan) for plan in plans]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda q: site.person().ask(q).ended(), questions))
    assert [reply['status'] == 'done' for reply in replies] == [bool(n % 3) for n in range(100)]
    assert all(reply['note'] for reply in replies if reply['status'] != 'done')


# ---- The corpus over HTTP and sockets -------------------------------------------------------------------------------

def payload(case):
    if case.get('enc') == 'repeat':
        before, unit, count, after = json.loads(case['payload'])
        return before + unit * count + after
    return base64.b64decode(case['payload']).decode('latin-1') if case.get('enc') == 'b64' else case['payload']

def cases(*where): return [pytest.param(case, id=case['id']) for case in CORPUS
                           if case['where'] in where and case.get('enc') != 'recipe']

@pytest.mark.parametrize('case', cases('url_path'))
def test_no_path_of_the_corpus_finds_anything(me, owner, stranger, case):
    path = payload(case).replace('<conversation route>', 'c')
    for person in (me, owner):
        answer = asked_raw(person.url, f'GET {path} HTTP/1.1', 'Host: localhost').partition('\r\n\r\n')
        assert re.match(r'HTTP/1.1 (400|404|414) ', answer[0]) or ' 303 ' in answer[0].splitlines()[0]
        assert 'Traceback' not in answer[2]
    assert me.get('/healthz').status_code == 200

@pytest.mark.parametrize('case', cases('query', 'header', 'cookie'))
def test_no_query_header_or_cookie_of_the_corpus_does_harm(me, site, case):
    text, host = payload(case), f'Host: {urlsplit(site.url).netloc}'
    lines = {'query': [f'GET /{quote(text, safe="?=&/:")} HTTP/1.1', host], 'cookie': ['GET / HTTP/1.1', host,
        f'Cookie: {text}'],
             'header': ['GET / HTTP/1.1', *([] if text.startswith('Host:') else [host]), text]}[case['where']]
    asked = time.monotonic()
    answer = asked_raw(site.url, *lines)
    assert not answer or re.match(r'HTTP/1.1 (200|400|431) ', answer), answer[:300]
    assert ('400' in answer.splitlines()[0]) if case['expect'].startswith('400') and answer and not text.startswith('Content-Type') else time.monotonic() - asked < 1
    assert '<script>window' not in answer and me.get('/healthz').status_code == 200

@pytest.mark.parametrize('case', cases('ws_frame'))
def test_no_frame_of_the_corpus_disturbs_a_reply(me, upstream, case):
    chat = me.ask(upstream.says('half ', gate := Gate(), 'more'))
    watching, bad = chat.watch().until('half'), chat.watch().until('half')
    with contextlib.suppress(ConnectionClosed): bad.socket.send(payload(case))
    gate.open()
    assert watching.ends().text == 'half more' and watching.status == 'done'
    assert bad.ends().code in (1000, 1009, 4400) and '__pwn' not in bad.said


# ---- Pages: every row of the interface ------------------------------------------------------------------------------

def test_the_first_page_is_an_empty_conversation(me):
    page = Page(me.get('/').text).root
    composer, = page.all(lambda n: n.tag == 'textarea' and n.attrs.get('name') == 'message')
    assert not page.all(lambda n: n.attrs.get('data-role') or 'ws-connect' in n.attrs)

def test_the_first_message_answers_a_browser_with_its_conversation(me, upstream):
    answer = me.post('/', htmx=False, message=upstream.says('hi'))
    assert answer.status_code == 303 and re.fullmatch(r'/c/[\w-]+', answer.headers['Location'])
    assert Chat(me, answer.headers['Location'][3:], '').ended()['content'] == 'hi'

def test_a_message_answers_htmx_with_both_bubbles(me, upstream):
    answer = me.post('/', message=(question := upstream.plays(raw(before=HANG))))
    ask, reply = [n.attrs for n in bubbles(answer.text)]
    where = answer.headers['HX-Push-Url']
    assert (ask['id'], ask['data-role'], ask['data-status']) == ('msg-0', 'user', 'done') and 'ws-connect' not in ask
    assert (reply['id'], reply['data-role'], reply['data-status']) == ('msg-1', 'assistant', LIVE)
    assert reply['hx-ext'] == 'ws' and reply['ws-connect'] == f'/ws/chat/{where[3:]}/1' and '<html' not in answer.text
    texts = [plain(node.find(f'content-{n}').text) for n, node in enumerate(bubbles(answer.text))]
    assert texts == [question, '']
    assert Chat(me, where[3:], '').stop().status_code < 400

def test_later_messages_count_on(me, upstream):
    chat = me.ask(upstream.says('one')).over().say(upstream.says('two')).over()
    assert [n.attrs['id'] for n in Page(chat.html).root.all(lambda n: n.attrs.get('data-role'))] == ['msg-2', 'msg-3']
    plain_post = chat.post(htmx=False, message=upstream.says('three'))
    assert (plain_post.status_code, plain_post.headers['Location']) == (303, f'/c/{chat.id}')
    assert chat.ended()['idx'] == 5 and chat.post('/stop', htmx=False).status_code == 303
    assert chat.post('/retry', htmx=False).status_code == 303

def test_a_reload_in_mid_stream_shows_the_text_so_far_and_goes_on(me, upstream):
    gate = Gate()
    chat = me.ask(upstream.says('half ', gate, 'whole'))
    chat.watch().until('half').drop()
    tab = chat.tab()
    assert (tab.text, tab.status) == ('half', LIVE) and tab.bubble.attrs['ws-connect'] == f'/ws/chat/{chat.id}/1'
    gate.open()
    assert tab.ends().text == 'half whole' == chat.tab().text and 'ws-connect' not in chat.tab().bubble.attrs

def test_a_bubble_can_be_asked_for_by_itself(me, upstream):
    gate = Gate()
    chat = me.ask(upstream.says('half ', gate, 'whole'))
    chat.watch().until('half')
    def bubble(): return Page(me.get(f'/c/{chat.id}/1', **{'HX-Request': 'true'}).text).root.find('msg-1')
    assert (plain(bubble().find('content-1').text), bubble().attrs['data-status']) == ('half', LIVE)
    gate.open()
    chat.ended()
    assert (bubble().find('content-1').text, bubble().attrs['data-status']) == ('half whole', 'done')
    assert me.get(f'/c/{chat.id}/9').status_code == 404 and 'ws-connect' not in bubble().attrs

def test_the_conversation_as_json_and_as_a_markdown_download(me, upstream):
    chat = me.ask(question := upstream.says('**bold** <i> \n\n| a |\n')).over()
    answer = me.get(f'/c/{chat.id}.json')
    told = answer.json()
    assert 'application/json' in answer.headers['Content-Type']
    assert told['id'] == chat.id and isinstance(told['title'], str)
    assert [(m['idx'], m['role'], m['content'], m['status']) for m in told['messages']] == [
        (0, 'user', question, 'done'), (1, 'assistant', '**bold** <i> \n\n| a |\n', 'done')]
    answer = me.get(f'/c/{chat.id}.md')
    assert 'attachment' in answer.headers['Content-Disposition'] and 'text/markdown' in answer.headers['Content-Type']
    assert answer.text.index(question) < answer.text.index('**bold** <i> \n\n| a |')

def test_conversations_are_listed(me, upstream):
    chat = me.ask(upstream.says('listed'))
    assert f'/c/{chat.id}' in [n.attrs.get('href') for n in Page(me.get('/').text).root.walk()]
    chat.ended()

def names(html, id='conversations'):
    "The list as a person reads it: headings and titles in order."
    found = Page(html).root
    return [plain(n.text).partition(', ')[0] for n in (found.find(id) or found).all(
        lambda n: n.tag == 'h2' or n.tag == 'a' and 'id' in n.attrs)]

@pytest.fixture(scope='module')
def years(new_site):
    "A site with 60 conversations from today and 60 from long ago, one of each pinned."
    site = new_site()
    for n in range(2): listed(site, id=f'pin{n}', title=f'pin {n}', pinned=n + 1.0, updated=n * time.time())
    python(OPEN_DB + """
for n in range(120):
    at = time.time() - n if n < 60 else 1e9 - n
    db.execute('insert into conversation (id, owner, title, leaf, created, updated, seen) select ?, owner, ?, leaf, 0, ?, ? '
               "from conversation where id = 'pin0'", (f'y{n}', f'year {n}', at, time.time()))
db.commit()""", site.db)
    return site

def test_further_pages_go_on_where_the_one_before_ended_and_say_no_heading_twice(years):
    me, page = years.person(), None
    said, place = names(me.get('/').text), '/'
    assert said[:4] == ['Pinned', 'pin 1', 'pin 0', 'Today'] and len(said) == 52
    while more := [n for n in Page(me.get(place, **{'HX-Request': 'true'} if page else {}).text).root.walk()
                   if 'after=' in n.attrs.get('href', '')]:
        place, page = more[0].attrs['href'], True
        assert names(me.get(place).text, 'empty') == (fragment := names(me.get(place, **{'HX-Request': 'true'}).text))
        said += fragment
    assert said[:4] + [n for n in said[4:] if not n.startswith('year')] == [
        'Pinned', 'pin 1', 'pin 0', 'Today', 'September 2001']
    assert [n for n in said if n.startswith('year')] == [f'year {n}' for n in range(120)]
    anew = names(me.get('/list?count=122', **{'HX-Request': 'true'}).text)
    assert anew == said
    for odd in ('[]', '[null,NaN,"x"]', '[null,1e300,"x"]', '["a",1,2]', '[[1],1,"a"]', '7', '"', '[1,2,{}]'):
        assert me.get(f'/list?after={quote(odd)}&count=9e9', **{'HX-Request': 'true'}).status_code == 200

def test_the_current_one_the_running_ones_and_the_unread_ones_are_marked(new_site, upstream):
    me = new_site().person()
    read, unread = me.ask(upstream.says('read')), me.ask(upstream.says('unread'))
    read.ended(), unread.ended()
    running = me.ask(upstream.says('half ', HANG))
    def states(on=read): return {n.attrs['id'][2:]: (n.parent.attrs.get('data-state'), n.attrs.get('aria-current'))
                                 for n in Page(on.page()).root.all(lambda n: n.attrs.get('id', '').startswith('c-'))}
    assert states() == {read.id: (None, 'page'), unread.id: ('unread', None), running.id: ('running', None)}
    assert read.post('/seen').status_code == 204 and states(running)[read.id] == (None, None)
    assert 'data-unread' in unread.page() and states(running)[unread.id] == ('unread', None)
    running.stop()
    assert states()[running.id] == ('unread', None)
    running.say(upstream.says('asking is seeing', HANG)).stop(), running.post('/seen')
    assert states()[running.id] == (None, None) and running.post('/seen').status_code == 204

def test_a_person_names_and_pins_a_conversation(new_site, upstream):
    site = new_site(max_title_chars=20)
    me = site.person()
    chat, other = me.ask('first'), me.ask('second')
    for typed, kept in [('  A\r\n name\0\t', 'A name'), ('<b>x</b>', '<b>x</b>'), ('x' * 20, 'x' * 20)]:
        answer = chat.post('/rename', title=typed, headers={'HX-Current-URL': f'{me.url}/c/{chat.id}'})
        assert kept in [n.text for n in Page(answer.text).root.all(lambda n: n.tag == 'h1')]
        assert me.get(f'/c/{chat.id}.json').json()['title'] == kept
    for typed, status in [('', 422), (' \n\0', 422), ('\u200b', 422), ('x' * 21, 413)]:
        answer = chat.post('/rename', title=typed)
        assert answer.status_code == status and a_sentence(answer)
    assert other.post('/rename', title='other').status_code == 204
    assert rows(site.db, 'select named from conversation') == [[2], [2]]
    assert names(me.get('/').text) == ['Today', 'other', 'x' * 20]
    chat.post('/pin', htmx=False, pinned='1')
    assert names(me.get('/').text) == ['Pinned', 'x' * 20, 'Today', 'other']
    assert 'Unpin' in me.get(f'/actions/{chat.id}').text
    chat.post('/pin', pinned='')
    assert names(me.get('/').text)[0] == 'Today'

def test_what_is_deleted_is_nowhere_but_in_the_trash_and_comes_back_as_it_was(new_site, upstream):
    site = new_site()
    me = site.person()
    kept, chat = me.ask('kept'), me.ask(question := upstream.says('half ', HANG), key='key-of-chat')
    chat.watch().until('half')
    answer = chat.post('/delete', headers={'HX-Current-URL': f'{me.url}/c/{kept.id}'})
    assert upstream.called(question)[0].closed.wait(DEADLINE) and 'Undo' in answer.text
    for path in ('', '.json', '.md', '/0', '/1', '/1.md'): assert me.get(f'/c/{chat.id}{path}').status_code == 404
    for path in ('', '/stop', '/retry', '/pin', '/rename', '/delete', '/choices'):
        assert chat.post(path, message='x', title='x').status_code == 404, path
    assert me.post('/', message=question, key='key-of-chat').status_code == 404
    assert me.get(f'/actions/{chat.id}').status_code == 404
    assert close_code(me, f'/ws/chat/{chat.id}/1') == 4404 and '/trash' in chat.page()
    assert names(me.get('/').text)[1:] == ['kept'] and question in me.get('/trash').text
    assert '30 days left' in me.get('/trash').text
    assert chat.post('/restore', htmx=False).headers['Location'] == f'/c/{chat.id}'
    assert (chat.reply['content'], chat.reply['status']) == ('half ', 'stopped')
    assert chat.post('/restore').status_code == 200         # it is back already

def test_everything_is_deleted_and_undone_together_and_the_trash_is_emptied_on_purpose(new_site, upstream):
    site = new_site()
    me = site.person()
    before, chats = me.ask('deleted before'), [me.ask(f'number {n}') for n in range(3)]
    for chat in chats: chat.ended()
    before.post('/delete')
    place = me.post('/trash/all', htmx=False).headers['Location']
    assert names(me.get('/').text) == [] and 'Delete 4 for ever' in me.get('/trash').text
    undo = Page(me.get(place).text).root.all(lambda n: n.attrs.get('name') == 'since')[0].attrs['value']
    me.post('/trash/restore', since=undo)
    assert len(names(me.get('/').text)) == 4 and 'Delete 1 for ever' in me.get('/trash').text
    assert me.post('/trash/restore', since='x').status_code == 422
    chats[0].post('/delete'), chats[1].post('/delete'), me.post(f'/trash/{chats[0].id}/delete')
    assert chats[0].post('/restore').status_code == 404 and chats[1].post('/restore').status_code == 200
    me.post('/trash/empty'), me.post(f'/trash/{chats[2].id}/delete')
    assert eventually(lambda: rows(site.db, 'select count(*) from conversation') == [[2]])
    assert chats[2].page() and rows(site.db, 'select count(distinct conversation) from message') == [[2]]

def test_the_words_of_what_was_deleted_are_not_shown_in_place_of_others(new_site):
    site = new_site()
    me = site.person()
    chat = me.ask('the secret question').over()
    assert 'the secret question' in chat.page()
    ids = rows(site.db, 'select id from message')
    chat.post('/delete'), me.post('/trash/empty')
    assert eventually(lambda: rows(site.db, 'select count(*) from message') == [[0]])
    other = me.ask('something else').over()
    assert rows(site.db, 'select id from message') == ids and 'secret' not in other.page()
    assert 'something else' in other.page()

def test_a_bubble_that_polls_and_an_edit_that_is_cancelled_get_their_own_message(me, upstream):
    chat = me.ask(upstream.says('zebra', HANG))
    poll = Page(chat.page()).root.find('msg-1').attrs['data-poll']
    chat.watch().until('zebra')
    back = re.search(r'href="(/c/[^"]+)"[^>]*>Cancel', me.get(f'/c/{chat.id}?edit={id_of(chat, 0)}').text)[1]
    chat.post('/stop')
    chat.tab().ends()
    me.post(f'/c/{chat.id}/edit?at={id_of(chat, 0)}', message=upstream.says('walrus'))
    chat.tab().ends()
    there = {'HX-Request': 'true'}
    assert 'zebra' in me.get(poll, **there).text and 'walrus' not in me.get(poll, **there).text
    assert 'zebra' not in me.get(back, **there).text and me.get(back).headers['Location'].endswith('?from=0#msg-0')

def test_what_is_deleted_while_the_trash_is_looked_at_is_seen_there_at_once(me, upstream):
    chat, there = me.ask('thrown away'), {'HX-Current-URL': f'{me.url}/trash?deleted=1'}
    place = chat.post('/delete', headers=there).headers['HX-Redirect']
    page = me.get(place).text
    assert urlsplit(place).path == '/trash' and f'/c/{chat.id}/restore' in page and 'name="since"' in page
    undo = Page(page).root.all(lambda n: n.attrs.get('name') == 'since')[0].attrs['value']
    assert me.post('/trash/restore', since=undo, headers=there).headers['HX-Redirect'] == '/trash'
    assert f'/c/{chat.id}/restore' not in me.get('/trash').text

def test_one_click_in_the_trash_deletes_nothing_for_ever(new_site):
    me = new_site().person()
    for n in range(2): me.ask(f'number {n}').post('/delete')
    page = Page(me.get('/trash').text).root
    def final(n): return re.fullmatch('/trash/(empty|.+/delete)', n.attrs.get('action', ''))
    folds = page.all(lambda n: n.tag == 'details' and 'open' not in n.attrs)
    assert len(page.all(final)) == 3 == len([form for fold in folds for form in fold.all(final)])

def test_the_trash_is_swept_when_its_days_are_over(new_site):
    site = new_site(trash_days=.001)
    me = site.person()
    gone, kept = listed(site, trashed=time.time() - 90), me.ask('kept')
    assert gone not in me.get('/trash').text
    kept.post('/delete')
    assert eventually(lambda: rows(site.db, 'select id from conversation') == [[kept.id]])
    assert kept.post('/restore').status_code == 200

@pytest.mark.parametrize('path', ['', '.json', '.md', '/0'])
@pytest.mark.parametrize('id', ['unknown', '0', '-1', '%00', 'a' * 5000, '..%2f..%2fetc', '1e999', "'--"])
def test_an_unknown_conversation_is_404(me, id, path):
    answer = me.get(f'/c/{id}{path}')
    assert answer.status_code == 404 and len(Page(answer.text).root.text) < 20_000 and 'Traceback' not in answer.text

@pytest.mark.parametrize('idx', ['9', '-1', 'x', '1e9', '9' * 30, '1.0', '%31%30'])
def test_an_unknown_message_is_404(me, upstream, idx):
    assert me.get(f'/c/{me.ask("hello").id}/{idx}').status_code == 404

@pytest.mark.parametrize('path', ['', '/stop', '/retry'])
def test_nothing_can_be_done_to_an_unknown_conversation(me, path):
    assert me.post(f'/c/unknown{path}', message='x').status_code == 404

CHANGE = 'import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute(sys.argv[2]); db.commit()'

def test_the_conversation_of_somebody_else_is_404(new_site, tmp_path, upstream):
    first = new_site(tmp_path)
    mine = first.person().ask(upstream.says('private'))
    mine.ended(), first.stop()
    for table in ('conversation', 'message'): python(CHANGE, first.db, f"update {table} set owner = 'somebody else'")
    me = new_site(tmp_path).person()
    me.http.cookies = mine.person.http.cookies
    for path in ('', '.json', '.md', '/1'): assert me.get(f'/c/{mine.id}{path}').status_code == 404
    for path in ('', '/stop', '/retry'): assert me.post(f'/c/{mine.id}{path}', message='x').status_code == 404
    assert 'private' not in me.get('/').text and f'/c/{mine.id}' not in me.get('/').text
    assert close_code(me, f'/ws/chat/{mine.id}/1') == 4404

@pytest.mark.parametrize('text', ['', ' ', '\n\t \r\n', '\u00a0\u2003'])
def test_a_blank_message_is_nothing(me, upstream, text):
    chat = me.ask(upstream.says('one')).over()
    calls = len(upstream.calls)
    assert me.post('/', message=text).status_code == chat.post(message=text).status_code == 422
    assert me.post('/').status_code == chat.post().status_code == 422
    assert len(chat.messages) == 2 and len(upstream.calls) == calls

def test_a_message_that_is_too_long_is_refused_in_a_sentence(impatient):
    assert impatient.ask('x' * 1000).ended()['status'] == 'done'
    refused = impatient.post('/', message='x' * 1001)
    assert refused.status_code == 413 and re.search(r'1[,. ]?000', Page(refused.text).root.text)
    assert impatient.ask('😀' * 1000).ended()['status'] == 'done'       # characters, not bytes

@pytest.mark.parametrize('content', [
    b'', b'{', b'\x00\xff' * 99, b'message', b'&' * 5000, b'message=x&message=y', b'x' * 3_000_000])
@pytest.mark.parametrize('kind', [
    FORM, 'multipart/form-data', 'multipart/form-data; boundary=x', 'application/json', 'text/plain', ''])
def test_a_body_that_is_no_form_is_refused(me, kind, content):
    answer = me.http.post('/', content=content, headers={'Content-Type': kind, 'HX-Request': 'true'})
    assert answer.status_code in ((200, 400, 413, 415, 422) if b'message=' in content else (400, 413, 415, 422))
    assert 'Traceback' not in answer.text

def test_a_file_is_not_a_message(me):
    assert me.http.post('/', files={'message': b'file'}).status_code in (400, 415, 422)


# ---- Socket ---------------------------------------------------------------------------------------------------------

def close_code(person, path):
    "How a socket ends that the server has to refuse: after accept with a code of ours, or as HTTP before it."
    try: sock = person.socket(path)
    except InvalidStatus as refused: return refused.response.status_code
    with sock, pytest.raises(ConnectionClosed) as closed: sock.recv(DEADLINE)
    return closed.value.rcvd.code

@pytest.mark.parametrize('path', ['/ws/chat/unknown/1', '/ws/chat/unknown/0', '/ws/chat/{id}/9', '/ws/chat/{id}/-1',
                                  '/ws/chat/{id}/' + '9' * 30, '/ws/chat/%00/1'])
def test_a_socket_to_nothing_closes_with_a_code_that_ends_it(me, upstream, path):
    assert close_code(me, path.format(id=me.ask('hello').id)) in (4404, 404)

@pytest.mark.parametrize('path', ['/ws/chat/{id}/x', '/ws/chat/{id}/1.5', '/ws/chat/{id}', '/ws/chat/{id}/1/2', '/ws'])
def test_a_socket_with_a_wrong_path_opens_no_loop(me, path):
    assert close_code(me, path.format(id=me.ask('hello').id)) in (4404, 4400, 403, 404)

def test_a_socket_that_comes_back_shows_the_reply_that_its_page_has(me, upstream):
    chat = me.ask(upstream.plays(says('first'), says('second'))).over()
    first = id_of(chat, 1)
    chat.retry().ended()
    for at, said in ((f'?at={first}', 'first'), (f'?at={id_of(chat, 1)}', 'second'), ('', 'second')):
        with me.socket(f'/ws/chat/{chat.id}/1{at}') as sock: assert f'<p>{said}</p>' in sock.recv(DEADLINE)
    other = me.ask(upstream.says('other'))
    for at in ('', 'x', '0', '%00', '9' * 30, id_of(other, 0)): assert close_code(me, f'/ws/chat/{chat.id}/1?at={at}') == 4404
    chat.post('/delete')
    assert close_code(me, f'/ws/chat/{chat.id}/1?at={first}') == 4404

def test_a_socket_to_a_question_ends_cleanly(me):
    assert close_code(me, f'/ws/chat/{me.ask("hello").id}/0') in (1000, 4404)

BAD_MESSAGES = ['{', '[]', '[1, 2]', '5', 'null', '"stop"', 'NaN', '1e999', '', b'\x00\xff', b'{"action": "stop"}',
                '[' * 100_000, '{"a": ' + '9' * 5000 + '}', 'x' * 200_000, 'x' * 400_000]

@pytest.mark.parametrize('message', BAD_MESSAGES, ids=lambda m: ascii(m[:20]))
def test_a_bad_message_closes_only_its_own_socket(me, upstream, message):
    chat = me.ask(upstream.says('half ', gate := Gate(), 'whole'))
    other, tab = chat.tab(), chat.watch().until('half')
    tab.socket.send(message)
    assert tab.ends().code in ((1009, 4400) if len(message) > 2**17 else (4400,)) and 'Error' not in tab.said
    gate.open()
    assert other.ends().text == 'half whole' and other.code == 1000

@pytest.mark.parametrize('message', [
    '{}', '{"action": "dance"}', '{"action": null}', '{"action": ["stop"]}', '{"action": {"a": 1}}',
    '{"HEADERS": {"action": "stop"}}', '{"n": "<img src=x onerror=1>", "msg_idx": "<i>"}'])
def test_a_message_that_asks_for_nothing_stops_nothing(me, upstream, message):
    chat = me.ask(upstream.says('half ', gate := Gate(), 'whole'))
    tab = chat.watch().until('half')
    tab.socket.send(message)
    other = chat.tab()
    gate.open()
    assert other.ends().text == 'half whole' and tab.ends().code in (1000, 4400) and chat.reply['status'] == 'done'
    assert '<img' not in tab.said


def test_every_tab_hears_that_its_list_changed_and_of_nothing_else(site, me, upstream):
    chat = me.ask(upstream.says('x')).over()
    chat.post('/seen')
    with me.socket('/ws/list') as first, me.socket('/ws/list') as second:
        def news(): return [s.recv(DEADLINE) for s in (first, second)]
        seen = news()[0]
        assert me.get('/list', **{'HX-Request': 'true'}).headers['x-edition'] == seen
        for change in (lambda: chat.post('/rename', title='another'), lambda: chat.post('/pin', pinned='1'),
                       lambda: chat.post('/delete'), lambda: chat.post('/restore')):
            change()
            assert len({*news(), seen}) == 2
        chat.post('/seen'), chat.page(), me.get('/trash'), me.post('/look', theme='dark')
        with pytest.raises(TimeoutError): second.recv(.6)
        began = time.monotonic()
        for n in range(20): chat.post('/rename', title=f'title {n}')
        while first.recv(2) != me.get('/list', **{'HX-Request': 'true'}).headers['x-edition']: pass
        assert time.monotonic() - began < 3
        first.send('x')
        with pytest.raises(ConnectionClosed) as closed: first.recv(DEADLINE)
        assert closed.value.rcvd.code == 4400


# ---- App ------------------------------------------------------------------------------------------------------------

def test_health_is_json(me):
    answer = me.get('/healthz')
    assert answer.status_code == 200 and answer.json()

def test_scripts_and_styles_are_ours_with_a_hash_and_a_long_cache(me):
    page = Page(me.get('/').text).root
    urls = [n.attrs.get('src') or n.attrs.get('href') for n in page.walk()
            if n.tag == 'script' or n.tag == 'link' and 'stylesheet' in n.attrs.get('rel', '')]
    answers = [me.get(url) for url in urls]
    assert len(urls) >= 3 and {a.status_code for a in answers} == {200}
    assert all(re.search(r'max-age=\d{7}', a.headers['Cache-Control']) for a in answers)
    assert all(re.search('[0-9a-f]{8}', url) for url in urls)
    package = Path(importlib.util.find_spec('django_htmx').submodule_search_locations[0])
    theirs = {f.read_text() for pattern in ('htmx-2*.js', 'hx-ws-2*.js') for f in package.rglob(pattern)}
    ours = me.get(next(url for url in urls if url.endswith('-parley.js'))).text
    assert len(ours) > len(main.JS) * .8 and not set(ours.split('\n')) & set(re.findall('(?m)^//.*', main.JS))
    assert len([a for a in answers if a.text in theirs]) == 2       # htmx 2.0.10 and ws extension 2.0.4, as they come

@pytest.mark.parametrize('path', [
    '/main.py', '/data/parley.db', '/..%2fmain.py', '/%2e%2e/main.py', '/test_main.py', '/.sesskey',
    '/assets/../main.py', '/requirements.txt', '/assets/..%2fmain.py', '/static/..%2f..%2fmain.py'])
def test_no_file_of_the_machine_is_served(me, path): assert me.get(path).status_code in (400, 404)

def test_without_a_key_the_demo_model_answers_and_says_so(new_site):
    me = new_site(api_key=None, demo=True).person()
    assert 'demo' in me.get('/').text.lower() and 'Extra high' in me.get('/').text
    tab = me.ask('hello').watch().ends()
    assert (tab.code, tab.status) == (1000, 'done') and tab.text and tab.frames > 2


REAL = os.environ.get('ANTHROPIC_API_KEY', '') if os.environ.get('REAL_API') else ''

@pytest.mark.skipif(not REAL, reason='asks the real API, for money: only with REAL_API=1 and ANTHROPIC_API_KEY')
def test_the_real_api_lists_its_models_and_answers(new_site):
    real = new_site(demo=True, api_key=REAL, max_tokens=2_000)
    me = real.person()
    assert eventually(lambda: '<optgroup' in me.get('/').text)
    chat = me.ask('Answer with the one word: parley')
    reply = chat.watch().ends() and chat.reply
    assert reply['status'] == 'done' and 'parley' in reply['content'].lower()
    assert chat.say('And again, please').ended()['status'] == 'done'       # what was thought before is taken back


# ---- The whole process ----------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context('forkserver')        # the libraries are imported once, every server starts at once
FORK.set_forkserver_preload(['anthropic.resources.messages', 'anyio._backends._asyncio', 'httpcore2', 'main', 'pytest',
                              'uvloop', 'websockets.server'])
RUN = """import os, sys
os.environ.clear(); os.environ.update(env); os.chdir(folder); sys.argv = [path]
out = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600); os.dup2(out, 1); os.dup2(out, 2)
sys.path.insert(0, os.path.dirname(path)); import main; main.main()"""

class Server:
    "`python main.py` in a process of its own, as far as the system can tell."
    def __init__(self, folder, port=None, **env):
        with socket.create_server(('127.0.0.1', 0)) as free: self.port = port or free.getsockname()[1]
        self.url, self.log = f'http://127.0.0.1:{self.port}', folder / 'log'
        self.db = folder / 'data' / 'parley.db'
        env = {'PATH': os.environ['PATH'], 'HOME': str(folder), 'PORT': str(self.port), 'TITLES': 'off', 'FRAME_SECONDS': '.005', **env}
        scope = {'env': env, 'folder': str(folder), 'path': str(SOURCE), 'log': str(self.log)}
        self.process = FORK.Process(target=exec, args=(RUN, scope), daemon=True)
        self.process.start()

    def __enter__(self):
        assert eventually(self.healthy), self.log.read_text()
        return self

    def healthy(self):
        assert self.process.is_alive(), self.log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + '/healthz', **LOCAL).status_code == 200

    def __exit__(self, *_): self.kill()
    def person(self): return Person(self.url)
    def signal(self, number): os.kill(self.process.pid, number)

    def memory(self):
        "Resident bytes."
        return int(Path(f'/proc/{self.process.pid}/statm').read_text().split()[1]) * resource.getpagesize()

    def kill(self):
        self.process.kill()
        self.process.join(DEADLINE)

    def exit(self):
        self.process.join(DEADLINE)
        return self.process.exitcode

@pytest.fixture(scope='module')
def wire(upstream):
    wire = Wire(upstream)
    yield wire
    wire.shutdown()

@pytest.fixture
def start(tmp_path, wire):
    "Starts the server on the folder of the test, again and again if it must; none is left behind."
    upstream = {'ANTHROPIC_BASE_URL': wire.url, 'ANTHROPIC_API_KEY': 'test'}
    with contextlib.ExitStack() as stack: yield lambda **env: stack.enter_context(Server(tmp_path, **upstream, **env))

def test_kill_9_loses_not_one_shown_character(start, upstream):
    print(f'SEED={SEED}')
    dice, before, jar = random.Random(SEED), [], None
    for _ in range(8):
        server = start()
        me = server.person()
        me.http.cookies = jar or me.http.cookies
        for each in before: assert_survived(me, upstream, *each)
        questions = [upstream.says(*paced((f'word{n} ' for n in range(1500)), .001)) for _ in range(3)]
        chats = [me.ask(question) for question in questions]
        tabs, jar = [chat.watch() for chat in chats], me.http.cookies
        for _ in range(dice.randrange(24)): dice.choice(tabs).read()
        server.kill()
        before = [(chat.id, question, tab.ends().text) for chat, question, tab in zip(chats, questions, tabs, strict=True)]
        assert [tab.code for tab in tabs] == [1006] * 3
    me = with_cookies(start().person(), jar)
    for each in before: assert_survived(me, upstream, *each)

def with_cookies(person, jar):
    person.http.cookies = jar
    return person

def assert_survived(me, upstream, id, question, shown):
    asked, reply = Chat(me, id, '').messages
    assert (asked['content'], reply['status']) == (question, 'interrupted')
    assert plain(reply['content']).startswith(shown), (shown, reply)
    said = [call.said for call in upstream.called(question)] or ['']
    assert len(said) == 1 and said[0].startswith(reply['content'])

def test_after_a_restart_nothing_says_streaming_and_retry_works(start, upstream):
    server = start()
    chat = server.person().ask(question := upstream.plays(raw(START, 'half', HANG), says('whole')), key='key-1')
    chat.watch().until('half')
    server.kill()
    again = Chat(with_cookies(start().person(), chat.person.http.cookies), chat.id, '')
    assert (again.reply['status'], again.reply['content']) == ('interrupted', 'half')
    assert again.person.ask(question, key='key-1').id == chat.id and len(upstream.called(question)) == 1
    page = Page(again.page()).root
    assert not page.all(lambda n: 'ws-connect' in n.attrs) and 'retry' in plain(page.find('msg-1').text).lower()
    assert again.retry().ended()['content'] == 'whole' and len(upstream.called(question)) == 2

def test_sigterm_lets_a_reply_end_and_saves_the_rest(start, upstream):
    server, gate = start(DRAIN_SECONDS='1'), Gate()
    me = server.person()
    soon, never = me.ask(upstream.says('half ', gate, 'whole')), me.ask(upstream.says('half ', HANG))
    tabs = [chat.watch().until('half') for chat in (soon, never)]
    server.signal(signal.SIGTERM)
    assert eventually(lambda: refused(me, upstream))
    gate.open()
    assert [(tab.ends().code, tab.text) for tab in tabs] == [(1000, 'half whole'), (1012, 'half')]
    assert server.exit() in (0, -signal.SIGTERM) and 'Traceback' not in server.log.read_text()
    me = with_cookies(start().person(), me.http.cookies)
    ends = [Chat(me, chat.id, '').reply for chat in (soon, never)]
    assert [(m['content'], m['status']) for m in ends] == [('half whole', 'done'), ('half ', 'interrupted')]

def refused(me, upstream):
    try: return me.post('/', message=upstream.says('late')).status_code == 503
    except httpx.TransportError: return True

@pytest.mark.parametrize('signals', [[signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
def test_ctrl_c_does_not_wait(start, upstream, signals):
    server = start(DRAIN_SECONDS='60')
    chat = server.person().ask(upstream.says('half ', HANG))
    tab, asked = chat.watch().until('half'), time.monotonic()
    for number in signals:
        server.signal(number)
        assert number != signal.SIGTERM or eventually(lambda: refused(server.person(), upstream))
    assert tab.ends().code in (1012, 1006) and server.exit() is not None and time.monotonic() - asked < 10
    assert Chat(with_cookies(start().person(), chat.person.http.cookies), chat.id, '').reply['status'] == 'interrupted'

def test_a_tab_comes_back_to_the_new_process_and_is_shown_the_truth(start, upstream):
    server = start(DRAIN_SECONDS='0')
    chat = server.person().ask(upstream.says('half ', HANG))
    tab = chat.watch().until('half')
    server.signal(signal.SIGTERM)
    assert tab.ends().code == 1012 and server.exit() is not None
    start(port=server.port)
    tab.socket, tab.code = chat.person.socket(f'/ws/chat/{chat.id}/1'), None
    assert (tab.ends().code, tab.status, tab.text) == (1000, 'interrupted', 'half')

@pytest.mark.parametrize('env, says', [
    ({'PORT': 'many'}, 'PORT'), ({'DATABASE_URL': 'postgres://me:canary@host/db'}, 'DATABASE_URL'),
    ({'DATABASE_URL': 'sqlite:///text.db'}, 'text.db'), ({'DATABASE_URL': 'sqlite:///torn.db'}, 'torn.db'),
    ({'DATABASE_URL': 'sqlite:///folder.db'}, 'folder.db'), ({'DATABASE_URL': 'sqlite:////proc/x/parley.db'}, '/proc'),
    ({'DATABASE_URL': 'sqlite:///text.db/x/parley.db'}, 'text.db'), ({'DATABASE_URL': 'sqlite:///empty.db'}, 'empty'),
    ({'DATABASE_URL': 'sqlite:///newer.db'}, 'newer Parley'), ({'DATABASE_URL': 'sqlite:///other.db'}, 'not one of'),
    ({'ANTHROPIC_API_KEY': 'sk-ant-\ncanary'}, 'ANTHROPIC_API_KEY')])
def test_a_start_that_cannot_be_ends_in_one_clear_line(tmp_path, env, says):
    (tmp_path / 'text.db').write_text('no database ' * 999)
    (tmp_path / 'torn.db').write_bytes(b'SQLite format 3\0' + random.Random(SEED).randbytes(9999))
    (tmp_path / 'empty.db').touch()
    (tmp_path / 'newer.db').write_bytes(a_database('create table message (id); pragma user_version = 99'))
    (tmp_path / 'other.db').write_bytes(a_database('create table fruit (name)'))
    before = {f: f.read_bytes() for f in tmp_path.glob('*.db')}
    (tmp_path / 'folder.db').mkdir()
    server = Server(tmp_path, **env)
    assert server.exit() not in (0, None)
    lines = server.log.read_text().strip().splitlines()
    assert len(lines) == 1 and says in lines[0] and 'canary' not in lines[0], lines
    assert before == {f: f.read_bytes() for f in before} and not list(tmp_path.glob('*.db-*'))

def a_database(sql):
    "The bytes of a database that nobody has open."
    with contextlib.closing(sqlite3.connect(':memory:')) as db: return (db.executescript(sql), db.serialize())[1]

def test_a_database_is_one_process_and_its_bare_file_is_an_earlier_state(start, tmp_path, upstream):
    "FI-21: a second process refuses, the first goes on. FI-19: without what is beside it the file opens all the same."
    server, gate = start(), Gate()
    chat = server.person().ask(upstream.says('half ', gate, 'whole'))
    tab, second = chat.watch().until('half'), Server(tmp_path)
    (tmp_path / 'copy' / 'data').mkdir(parents=True)
    shutil.copy(server.db, tmp_path / 'copy' / 'data')
    with Server(tmp_path / 'copy') as copy: assert copy.person().ask('hello').ended()['status'] == 'done'
    assert second.exit() == 1 and 'another Parley is using the database' in server.log.read_text()
    gate.open()
    assert tab.ends().text == chat.reply['content'] == 'half whole' and 'Traceback' not in server.log.read_text()
    server.signal(signal.SIGTERM)
    assert server.exit() is not None and not list(server.db.parent.glob('*-wal'))       # nothing is left to be deleted

def runs(folder, *words):
    "What `python main.py …` says, its one line, and how it ends."
    done = subprocess.run([sys.executable, SOURCE, *map(str, words)], cwd=folder, capture_output=True, text=True,
                          env={'PATH': os.environ['PATH'], 'DATABASE_URL': 'sqlite:///data/parley.db'}, timeout=60)
    said = (done.stdout + done.stderr).strip()
    assert '\n' not in said and 'Traceback' not in said, said
    return done.returncode, said

def test_a_backup_is_made_while_a_reply_streams_and_is_put_back(start, tmp_path, upstream):
    server, gate = start(), Gate()
    chat = server.person().ask(upstream.says('half ', gate, 'whole'))
    tab = chat.watch().until('half')
    copy = tmp_path / 'copy.db'
    assert runs(tmp_path, 'backup', copy.name)[0] == 0 and stat.S_IMODE(copy.stat().st_mode) == 0o600
    with pytest.raises(main.Unusable, match='there is a file copy.db already'): main.copy_database(server.db, copy)
    with pytest.raises(main.Unusable, match='another Parley is using'): main.restore_database(copy, server.db, True)
    gate.open()
    assert tab.ends().text == 'half whole'
    server.process.kill()                               # what it leaves beside the database goes along
    server.exit()
    with pytest.raises(main.Unusable, match='--replace'): main.restore_database(copy, server.db, False)
    code, said = runs(tmp_path, 'restore', copy.name, '--replace')
    kept = tmp_path / 'data' / re.search(r'parley\.db\.20[^ ]+Z', said)[0]
    assert code == 0 and rows(kept, "select content from message where role = 'assistant'") == [['half whole']]
    assert rows(server.db, 'select status from message order by id') == [['done'], [LIVE]]
    back = Chat(with_cookies(start().person(), chat.person.http.cookies), chat.id, '')
    assert (back.reply['content'], back.reply['status']) == ('half ', 'interrupted')

def test_a_command_that_nobody_knows_starts_nothing(tmp_path):
    code, said = runs(tmp_path, 'bakcup', 'copy.db')
    assert code == 1 and '`backup FILE`' in said and not [*tmp_path.iterdir()]

@pytest.mark.parametrize('name, says_why', [
    ('text.db', 'not a database'), ('other.db', 'not one of Parley'), ('newer.db', 'newer Parley'),
    ('none.db', 'can not be opened'), ('torn.db', 'damaged'), ('empty.db', 'not a database of Parley')])
def test_what_is_no_backup_of_ours_is_not_put_back(tmp_path, name, says_why):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'parley.db').write_text('as it was')
    whole = a_database(FIRST_SCHEMA + FIRST_ROWS + "insert into conversation select 'c' || value, 'owner', "
                       "hex(randomblob(500)), null, 1, 1 from generate_series(1, 50);"
                       .replace("generate_series(1, 50)", "json_each('[" + ','.join(map(str, range(50))) + "]')"))
    files = {'text.db': b'no database ' * 999, 'other.db': a_database('create table fruit (name)'), 'empty.db': b'',
             'newer.db': a_database('create table message (id); pragma user_version = 99'),
             'torn.db': whole[:8192] + bytes(4096) + whole[12288:]}
    if name in files: (tmp_path / name).write_bytes(files[name])
    with pytest.raises(main.Unusable, match=says_why):
        main.restore_database(tmp_path / name, tmp_path / 'data' / 'parley.db', True)
    assert (tmp_path / 'data' / 'parley.db').read_text() == 'as it was' and not list(tmp_path.glob('data/*part*'))

def test_a_file_of_somebody_else_is_said_in_words():
    with pytest.raises(main.Unusable, match='may not be accessed'), main.in_words(): raise PermissionError

def test_a_port_that_is_taken_ends_the_start(tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        server = Server(tmp_path, port=taken.getsockname()[1])
        assert server.exit() not in (0, None)
    assert str(server.port) in server.log.read_text() and 'Traceback' not in server.log.read_text()

LOCK = '''import sqlite3, sys
db = sqlite3.connect(sys.argv[1]); db.execute("begin immediate"); print("held", flush=True); sys.stdin.read()'''

@contextlib.contextmanager
def locked(db):
    holder = subprocess.Popen([sys.executable, '-c', LOCK, str(db)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    try: yield
    finally: holder.communicate(timeout=DEADLINE)

def test_a_locked_database_refuses_a_message_in_words_and_stalls_no_reader(new_site, upstream):
    site = new_site()
    assert site.door.state.parley.store.patience == 5
    site.door.state.parley.store.patience = 1
    chat = site.person().ask(upstream.says('hello')).over()
    with concurrent.futures.ThreadPoolExecutor() as pool, locked(site.db):
        sent = pool.submit(chat.post, message='while locked')
        asked = time.monotonic()
        assert chat.tab().text == 'hello' and not sent.done() and time.monotonic() - asked < 2
        assert sent.result().status_code in (500, 503, 507) and a_sentence(sent.result())
    assert chat.say('now').ended()['content'] == 'You said: now' and len(chat.messages) == 4

def test_a_disk_that_stalls_delays_a_reply_and_loses_nothing(new_site, upstream):
    site, gate = new_site(), Gate()
    me = site.person()
    chat, old = me.ask(upstream.says('half ', gate, *paced(['more '] * 50, .01))), me.ask(upstream.says('old'))
    old.ended()
    tab = chat.watch().until('half')
    with locked(site.db):
        gate.open()
        assert old.tab().text == 'old' and chat.reply['status'] == LIVE
    assert tab.ends().text == plain('half ' + 'more ' * 50) and tab.status == 'done'

@pytest.mark.skipif(not hasattr(resource, 'prlimit'), reason='the disk of a running process is filled by prlimit')
def test_a_full_disk_keeps_what_was_shown_and_recovers_without_a_restart(start, upstream):
    server, gate = start(), Gate()
    me = server.person()
    old, chat = me.ask(upstream.says('old')), me.ask(upstream.says('half ', gate, *paced(['more '] * 50, .01)))
    old.ended()
    tab = chat.watch().until('half')
    free = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    answer = old.post(message='typed')
    assert answer.status_code in (500, 503, 507) and a_sentence(answer) and str(server.db) not in answer.text
    assert me.get('/healthz').status_code == 503 and old.tab().text == 'old'
    gate.open()
    while not re.search('disk', tab.said): assert tab.read(), tab.said
    shown = tab.text
    assert plain(chat.reply['content']).startswith(shown)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, free)
    assert old.say('typed').ended()['status'] == 'done'
    assert chat.ended()['content'].startswith(shown) and tab.ends().text == plain(chat.reply['content'])
    assert me.get('/healthz').status_code == 200 and 'Traceback' not in server.log.read_text()

def test_main_runs_as_the_readme_says(tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    env = {'PATH': os.environ['PATH'], 'HOME': str(tmp_path), 'PORT': str(port)}
    process = subprocess.Popen([sys.executable, SOURCE], cwd=tmp_path, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    me = Person(f'http://127.0.0.1:{port}')
    assert eventually(lambda: reachable(me, process))
    assert me.ask('hello').watch().until('demo').status == LIVE and (tmp_path / 'data' / 'parley.db').exists()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=DEADLINE)[0].decode()
    assert process.returncode in (0, 130, -signal.SIGINT) and 'Traceback' not in said, said

def reachable(me, process):
    assert process.poll() is None
    with contextlib.suppress(httpx.TransportError): return me.get('/healthz').status_code == 200

def test_importing_main_touches_nothing(tmp_path):
    code = 'import sys, threading; import main; assert threading.active_count() == 1; print("fine")'
    env = {'PATH': os.environ['PATH'], 'HOME': str(tmp_path), 'PYTHONPATH': str(SOURCE.parent)}
    assert subprocess.check_output([sys.executable, '-c', code], cwd=tmp_path, env=env, timeout=DEADLINE) == b'fine\n'
    assert not list(tmp_path.iterdir())


# ---- Chaos ----------------------------------------------------------------------------------------------------------

def test_chaos_leaves_every_tab_the_database_and_the_upstream_equal(new_site, upstream):
    print(f'SEED={SEED}')
    site = new_site()
    with concurrent.futures.ThreadPoolExecutor(4) as people:
        met = people.map(lambda n: wander(random.Random(f'{SEED} {n}'), site.person(), upstream), range(4))
        assert sum(met) >= 52

def wander(dice, me, upstream):
    "One person with too many tabs and a bad network: thirteen replies; each is compared when it has ended."
    chat = None
    for turn in range(13):
        text = [f'{dice.choice(("lorem", "ipsum", "dolor", "sit"))} {n} ' for n in range(100)]
        question, key = upstream.says(*paced(text, dice.random() / 400)), f'{turn} {number()}'
        fresh = chat is None or dice.random() < .3
        def send(): return me.ask(question, key=key) if fresh else chat.say(question, key=key)      # noqa: B023
        chat = send()
        tabs = [chat.watch()]
        for _ in range(dice.randrange(3, 9)):
            one = dice.choice(tabs)
            match dice.choice('read read reload drop extra again stop'.split()):
                case 'read': one.read()
                case 'reload' | 'drop' as how:
                    one.drop()
                    tabs.append(chat.tab() if how == 'reload' else chat.watch())
                case 'extra': tabs.append(chat.tab())
                case 'again': send()
                case 'stop' if dice.random() < .5: chat.stop()
        assert_equal(chat, [tab.ends() for tab in [*tabs, chat.tab()]], upstream, question)
    return 13

def assert_equal(chat, tabs, upstream, question):
    reply, calls = chat.reply, upstream.called(question)
    said = ''.join(call.said for call in calls)         # none: stopped before Claude was asked
    assert len(calls) == 1 or not calls and reply['status'] == 'stopped'
    assert {tab.code for tab in tabs} <= {1000, None, 1006, 1012}       # 1006: dropped by us; 1012: come again
    tabs = [tab for tab in tabs if tab.code in (1000, None)]
    assert {tab.text for tab in tabs} == {plain(reply['content'])}
    assert {tab.status for tab in tabs} == {reply['status']} <= {'done', 'stopped'}
    assert said == reply['content'] if reply['status'] == 'done' else said.startswith(reply['content'])


# ---- The shape: rules that nothing runs are comments ----------------------------------------------------------------

def sections():
    "Name → source of every numbered section of main.py, in order."
    _, *parts = re.split(r'^# ## \d+ (\w+)$', SOURCE.read_text(), flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))

def test_no_name_of_the_file_is_made_twice():
    made = [name for part in ast.parse(SOURCE.read_text()).body for name in
            ([part.name] if hasattr(part, 'name') else
             [target.id for target in getattr(part, 'targets', []) if isinstance(target, ast.Name)])]
    assert {name for name in made if made.count(name) > 1} <= {'question'}

def test_a_section_uses_only_what_stands_above_it_but_for_links():
    trees = [ast.parse(text) for text in sections().values()]
    for here, tree in enumerate(trees):
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        links = {ast.unparse(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == 'to'}
        local = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)} | \
            {n.id for n in names if isinstance(n.ctx, ast.Store)}
        below = set().union(*map(made_in, trees[here + 1:])) - links - local - {'asset', 'PAPER'}
        assert not [n.id for n in names if n.id in below]

def made_in(tree):
    constants = [part for part in tree.body if isinstance(part, ast.Assign)]
    return {n.name for n in tree.body if hasattr(n, 'name')} | \
        {n.id for part in constants for n in ast.walk(part) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

@pytest.mark.parametrize('sign, homes', [
    (r'os\.environ', 'App'), (r'\b(select|insert into|delete from|update) \w', 'Store'),
    (r'AsyncAnthropic\(', 'Claude'), (r'</?(div|p|span|article)\b', 'Words Components Look'),
    (r'\bto_xml\(|\bDiv\(', 'Components Pages Socket App'), (r'addEventListener', 'Look')])
def test_each_concern_has_one_home(sign, homes):
    assert [name for name, text in sections().items() if re.search(sign, text) and name not in homes.split()] == []


# ---- The notebook ---------------------------------------------------------------------------------------------------

NO_NETWORK = '''import socket
def refuse(*_): raise OSError("the notebook asked for the network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse'''

def test_every_cell_of_the_notebook_runs_without_key_server_or_network(tmp_path, monkeypatch):
    jupytext, nbclient = pytest.importorskip('jupytext'), pytest.importorskip('nbclient')
    for name in [name for name in os.environ if name.startswith('ANTHROPIC_')]: monkeypatch.delenv(name)
    book = jupytext.read(SOURCE, fmt='py:percent')
    book.cells.insert(0, pytest.importorskip('nbformat').v4.new_code_cell(NO_NETWORK))
    place = {'metadata': {'path': str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=60, kernel_name='python3', resources=place).execute()
    ran = [cell for cell in book.cells if cell.cell_type == 'code' and cell.execution_count]
    assert len(ran) > 10 and any(cell.outputs for cell in ran)

def test_the_notebook_round_trips_byte_for_byte():
    jupytext = pytest.importorskip('jupytext')
    text = SOURCE.read_text()
    assert text.startswith('# %% [markdown]')
    assert jupytext.writes(jupytext.reads(text, 'py:percent'), 'py:percent') == text


# ---- The browser ----------------------------------------------------------------------------------------------------

# What happens on the page, in order: requests, bubbles (with the length of their text), sockets, text, status.
WATCH = '''window.__log = []; const seen = {}
const note = (...what) => window.__log.push(what)
document.addEventListener('htmx:beforeRequest', e => e.detail.requestConfig.verb == 'post' && note('sent'))
for (const name of ['wsOpen', 'wsClose', 'wsError'])
  document.addEventListener('htmx:' + name, e => note(name, e.detail.event && e.detail.event.code || 0))
new MutationObserver(() => document.querySelectorAll('[id^=msg-]').forEach(bubble => {
  const id = bubble.id, content = document.getElementById(id.replace('msg', 'content'))
  const size = content ? content.innerText.trim().length : 0
  if (!(id in seen)) note('bubble', id, bubble.dataset.role, size)
  else if (seen[id] != size) note('text', id, size)
  seen[id] = size
})).observe(document, {childList: true, subtree: true, characterData: true})'''

# A network that lets no WebSocket through: every handshake fails.
NO_SOCKETS = '''window.WebSocket = class extends WebSocket {
  constructor(url, protocols) { super(String(url).replace('/ws/', '/blocked/'), protocols) } }'''


@pytest.fixture(scope='module')
def chromium():
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not path: pytest.skip('no Chromium is installed')
    api = pytest.importorskip('playwright.sync_api')
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()

@pytest.fixture
def profile(chromium):
    "Makes browser profiles: each has its own cookies."
    with contextlib.ExitStack() as stack:
        def new(**options):
            context = chromium.new_context(**{'viewport': {'width': 900, 'height': 700}, **options})
            context.set_default_timeout(DEADLINE * 1000)
            stack.callback(context.close)
            return context
        yield new

@pytest.fixture
def view(profile, site):
    view = View(profile(), site.url)
    yield view
    assert not view.console and view.hosts <= {site.url}, (view.console, view.hosts)


class View:
    "A tab of Chromium: its console, the hosts it asked, the sockets it opened and the log of its page."
    def __init__(self, profile, url, script=WATCH):
        self.page, self.url, self.profile = profile.new_page(), url, profile
        self.console, self.hosts, self.sockets = [], set(), []
        self.page.on('console', lambda m: m.type in ('error', 'warning') and self.console.append(m.text))
        self.page.on('pageerror', lambda e: self.console.append(str(e)))
        self.page.on('request', lambda r: self.hosts.add('/'.join(r.url.split('/')[:3])))
        self.page.on('websocket', lambda s: s.url.endswith('/list') or self.sockets.append(s.url))  # not the list's
        self.page.add_init_script(script)
        self.page.goto(url)

    @property
    def composer(self): return self.page.locator('textarea[name=message]:not(.edit *)')
    @property
    def log(self): return self.page.evaluate('window.__log')
    def kinds(self, kind): return [entry for entry in self.log if entry[0] == kind]
    def bubble(self, idx): return self.page.locator(f'#msg-{idx}')
    def text(self, idx): return plain(self.page.locator(f'#content-{idx}').inner_text())
    def button(self, name): return self.page.get_by_role('button', name=re.compile(name, re.I))

    def eventually(self, look):
        def now():
            with contextlib.suppress(Exception):        # in the middle of a navigation there is no page to look at
                self.page.wait_for_timeout(10)
                return look()
        return eventually(now)

    def go(self, steps, idx, text):
        "Back or forward, until message `idx` says `text`, or is not there for None."
        with contextlib.suppress(Exception): self.page.evaluate(f'history.go({steps})')
        def there(): return self.text(idx) == text if text else not self.bubble(0).count() and self.composer.count()
        assert self.eventually(there), (self.page.url, self.page.content())

    def send(self, text):
        self.composer.fill(text)
        self.composer.press('Enter')
        return self

    def until(self, words, idx=1):
        assert self.eventually(lambda: self.bubble(idx).count() and plain(words) in self.text(idx)), words
        return self

    def ends(self, status='done', idx=1):
        assert self.eventually(lambda: self.page.locator(f'#msg-{idx}[data-status={status}]').count()), status
        return self.text(idx)


@browser_test
def test_the_seven_steps_happen_in_their_order(view, upstream):
    start, gate, rest = Gate(), Gate(), [f'word{n} ' for n in range(40)]
    question = upstream.says(start, 'first ', gate, *paced(rest, .01))
    view.send(question)
    assert view.eventually(lambda: view.kinds('wsOpen'))
    start.open()
    view.until('first')
    gate.open()
    shown = view.ends()
    assert view.eventually(lambda: view.kinds('wsClose'))
    log = view.log
    steps = [['sent'], ['bubble', 'msg-0', 'user', len(question)], ['bubble', 'msg-1', 'assistant', 0], ['wsOpen'],
             ['text', 'msg-1'], ['wsClose', 1000]]
    order = [log.index(next(entry for entry in log if entry[:len(step)] == step)) for step in steps]
    assert order == sorted(order) and len(view.kinds('text')) > 5, log
    sizes = [size for _, id, size in view.kinds('text') if id == 'msg-1']
    assert sizes == sorted(sizes) and len(view.sockets) == 1 and not view.kinds('wsError')
    view.page.reload()
    assert view.text(1) == shown == plain('first ' + ''.join(rest)) and view.text(0) == question
    assert len(view.sockets) == 1 and view.page.url.startswith(view.url + '/c/')

@browser_test
def test_a_person_sees_the_state_of_the_connection(view, upstream):
    view.send(upstream.says('half ', gate := Gate(), 'whole')).until('half')
    state = view.page.locator('#link')
    assert view.eventually(lambda: 'live' in state.inner_text())
    gate.open()
    view.ends()
    assert view.eventually(lambda: 'finished' in state.inner_text())

@browser_test
def test_a_reload_in_mid_stream_goes_on(view, upstream):
    view.send(question := upstream.says('half ', gate := Gate(), 'whole')).until('half')
    view.page.reload()
    view.until('half')
    gate.open()
    assert view.ends() == 'half whole' and len(view.sockets) == 2 and len(upstream.called(question)) == 1

@browser_test
def test_two_tabs_show_the_same(view, upstream):
    gate = Gate()
    view.send(question := upstream.says('one ', gate, *paced(['more '] * 60, .005))).until('one')
    other = View(view.profile, view.page.url).until('one')
    gate.open()
    assert view.ends() == other.ends() == plain('one ' + 'more ' * 60)
    assert len(upstream.called(question)) == 1 and not other.console

@browser_test
def test_a_tab_that_is_behind_shows_everything_once_it_sends(view, upstream):
    view.send(upstream.says('first')).ends()
    other = View(view.profile, view.page.url)
    other.page.route('**/list?*', lambda asked: asked.abort())  # it does not learn of it by itself
    view.send(upstream.says('second')).ends(idx=3)
    other.send(question := upstream.says('third')).until('second', idx=3)
    assert 'not sent yet' in other.page.inner_text('#notice') and other.composer.input_value() == question
    other.composer.press('Enter')
    other.ends(idx=5)
    assert [other.text(idx) for idx in (1, 3, 5)] == ['first', 'second', 'third']

@browser_test
def test_an_open_conversation_follows_what_is_done_on_another_page(view, site, upstream):
    view.send(upstream.says('first')).ends()
    other = View(view.profile, view.page.url)
    other.composer.fill(typed := f'typed {number()}')
    assert view.eventually(lambda: rows(site.db, f"select 1 from draft where text='{typed}'"))
    def shown(v): return [plain(t) for t in v.page.locator('.message .content').all_inner_texts()]
    def same(*last): return view.eventually(lambda: shown(view) == shown(other) and tuple(shown(other)[-len(last):]) == last)
    question = upstream.says('half ', gate := Gate(), 'whole')
    view.send(question).until('half', idx=3)
    other.until('half', idx=3)
    gate.open()
    assert view.ends(idx=3) == other.ends(idx=3) == 'half whole' and same(question, 'half whole')
    upstream.plans[question] = [says('anew')]
    def act(v, name):
        v.bubble(3).hover()
        v.bubble(3).get_by_role('button', name=re.compile(name)).first.click()
    act(view, 'Regenerate')
    assert same(question, 'anew')
    act(other, 'Previous')
    assert same(question, 'half whole') and len(shown(view)) == 4
    assert other.composer.input_value() == typed and len(upstream.called(question)) == 2
    other.page.reload()
    assert other.composer.input_value() == typed
    other.send(upstream.says('third')).ends(idx=5)
    assert same('third') and len(shown(view)) == 6 and not view.console + other.console

@browser_test
def test_a_conversation_that_begins_while_the_list_is_on_its_way_is_not_called_deleted(view, me, upstream):
    held = []
    view.page.route('**/list?*', lambda asked: held.append(asked), times=1)
    me.ask(elsewhere := upstream.says('elsewhere')).ended()
    assert view.eventually(lambda: held)
    view.send(question := upstream.says('first')).ends()
    held[0].continue_()
    rows_ = view.page.locator('#conversations a[id] > span:first-child')
    assert view.eventually(lambda: {elsewhere, question} <= {plain(t) for t in rows_.all_inner_texts()})
    assert view.page.locator('#notice').inner_text() == '' and not view.console
    me.post(urlsplit(view.page.url).path + '/delete')
    assert view.eventually(lambda: 'was deleted' in view.page.locator('#notice').inner_text())

@browser_test
def test_the_stop_button_stops(view, upstream):
    view.send(question := upstream.says('half ', HANG)).until('half')
    view.button('stop').first.click()
    assert view.ends('stopped') == 'half' and upstream.called(question)[0].closed.wait(DEADLINE)
    view.send(upstream.says('next')).ends(idx=3)
    assert view.text(3) == 'next' and view.text(1) == 'half'

@browser_test
def test_a_failed_reply_offers_retry(view, upstream):
    view.send(upstream.plays(refuses(401), says('whole'))).ends('failed')
    view.button('retry').first.click()
    assert view.ends() == 'whole' and view.bubble(1).count() == 1 and view.bubble(2).count() == 0

NODES = """id => { const walk = document.createTreeWalker(document.getElementById(id)), all = []
    for (let n = walk.currentNode; n; n = walk.nextNode()) all.push([n.nodeName, n.nodeValue,
        ...[...(n.attributes || [])].map(a => a.name + '=' + a.value).sort()].join('|'))
    return all }"""

@browser_test
def test_a_person_edits_walks_regenerates_and_forks(view, upstream):
    view.send(first := upstream.says('one')).ends()
    view.send(old := upstream.says('two')).ends(idx=3)
    def act(idx, name):
        view.bubble(idx).hover()
        view.bubble(idx).get_by_role(name[0], name=re.compile(name[1])).first.click()
    box = view.page.locator('.edit textarea')
    act(2, ('link', 'Edit'))
    assert box.input_value() == old and view.eventually(lambda: box.evaluate('e => e === document.activeElement'))
    box.fill('not yet sent'), box.press('Escape')
    assert view.eventually(lambda: not box.count() and view.text(2) == old)
    assert view.eventually(lambda: view.page.evaluate('document.activeElement.getAttribute("href")?.endsWith("#msg-2")'))
    act(2, ('link', 'Edit'))
    assert view.eventually(lambda: box.input_value() == 'not yet sent')
    box.fill(new := upstream.says('three')), box.press('Enter')
    assert view.until('three', idx=3).text(2) == new and view.bubble(4).count() == 0 and view.ends(idx=3)
    assert not view.page.evaluate("Object.keys(sessionStorage).filter(name => name.startsWith('edit:')).length")
    act(2, ('button', 'Previous'))
    assert view.until('two', idx=3).text(2) == old
    assert view.page.evaluate('document.activeElement.id') == 'Previous-2', 'one goes on walking by keyboard'
    view.page.keyboard.press('Enter')
    assert view.until('three', idx=3).text(2) == new
    act(1, ('button', 'Regenerate'))
    assert view.eventually(lambda: view.bubble(1).get_by_text('2/2').count() and not view.bubble(2).count())
    view.ends()
    view.send(upstream.says('four')).ends(idx=3)
    act(1, ('button', 'Previous'))
    assert view.until('three', idx=3).text(2) == new
    view.page.reload()
    assert [view.text(idx) for idx in range(4)] == [first, 'one', new, 'three']
    was = view.page.url
    act(1, ('button', 'Fork'))
    assert view.eventually(lambda: view.page.url != was and view.text(1) == 'one') and view.bubble(2).count() == 0

@browser_test
def test_without_javascript_a_question_is_changed_and_its_versions_are_walked(profile, site, me, upstream):
    chat = me.ask(old := upstream.says('one')).over()
    view = View(profile(java_script_enabled=False), f'{site.url}/c/{chat.id}')
    view.bubble(0).get_by_role('link', name='Edit').click()
    view.page.locator('.edit textarea').fill(' ')
    view.page.locator('.edit .send').click()
    view.page.locator('#notice', has_text='Write something').wait_for(timeout=DEADLINE * 1000)
    view.composer.fill(new := upstream.says('two'))             # of the page that says why not
    view.page.locator('#composer .send').click()
    assert view.until('two').text(0) == new and len(chat.messages) == 2
    view.bubble(0).get_by_role('button', name='Previous').click()
    assert view.until('one').text(0) == old and view.page.url.endswith('?from=0#msg-0')

@browser_test
def test_without_javascript_a_page_at_one_of_its_messages_follows_the_reply_and_stays_where_it_is_read(
        profile, site, me, upstream):
    chat, gate = me.ask(upstream.says('a line\n\n' * 100)).over(), Gate()
    view = View(profile(java_script_enabled=False), f'{site.url}/c/{chat.id}')
    view.bubble(0).get_by_role('link', name='Edit').click()
    box = view.page.locator('.edit textarea')
    box.fill(upstream.says('so far ' + 'a line\n\n' * 100, gate, 'the end'))
    addresses = []
    view.page.on('framenavigated', lambda frame: addresses.append(frame.url))
    view.page.locator('.edit .send').click()
    view.until('so far')
    assert addresses[0].endswith('?from=0#msg-0'), addresses    # a refresh since then drops what is behind the #
    def reads(): return view.page.evaluate('scrollTo(0, 700)') or view.page.evaluate('scrollY') == 700
    assert view.eventually(reads)       # a page that goes away under it is no place to read
    gate.open()
    assert view.ends().endswith('the end') and view.eventually(lambda: view.page.evaluate('scrollY') == 700)
    assert view.page.locator('noscript').count() == 0

@browser_test
def test_the_streamed_page_is_node_for_node_what_a_reload_shows(view, upstream):
    print(f'SEED={SEED}')
    rng = random.Random(SEED)
    late = ('See [the docs] and a note[^n], **bold** and `code`.\n\n- one\n- two\n\n```py\nx = 1\n```\n\n'
            '| a | b |\n|---|---|\n| 1 | $x^2$ |\n\n[the docs]: https://a.example/b\n\n[^n]: A note.\n')
    texts = [late, *(answer(rng) for _ in range(4))]
    for depth, text in enumerate(texts):
        said = [piece for part in pieces(text, rng, 40) for piece in (part, .01)]
        view.send(upstream.says(*said)).ends(idx=2 * depth + 1)
        streamed = view.page.evaluate(NODES, f'content-{2 * depth + 1}')
        view.page.reload()
        assert view.page.evaluate(NODES, f'content-{2 * depth + 1}') == streamed

@browser_test
def test_what_a_reader_does_in_a_finished_block_survives_to_the_end(view, upstream):
    code = '```\n' + 'wide ' * 200 + '\n```\n\n'
    view.send(upstream.says('One paragraph.\n\n' + code, 'Two', gate := Gate(), *(' and *more*',) * 9, '\n\nThree'))
    view.until('Two').page.evaluate("""() => { const p = document.querySelector('#content-1 p')
        getSelection().selectAllChildren(p); document.querySelector('#content-1 pre').scrollLeft = 77 }""")
    gate.open()
    view.ends()
    assert view.page.evaluate("""[String(getSelection()).trim(), document.querySelector('#content-1 pre').scrollLeft]
        """) == ['One paragraph.', 77]

@browser_test
def test_where_sockets_are_blocked_the_bubble_polls(profile, site, upstream):
    view = View(profile(), site.url, WATCH + '\n' + NO_SOCKETS)
    view.send(upstream.says('half ', gate := Gate(), 'whole'))
    assert view.until('half')
    gate.open()
    assert view.ends() == 'half whole' and len(view.sockets) >= 2
    assert view.eventually(lambda: view.page.locator('#link').inner_text() == 'finished')
    opened = len(view.sockets)
    view.page.wait_for_timeout(2500)        # a socket that were still wanted would have been tried again by now
    assert len(view.sockets) == opened

@browser_test
def test_back_and_forward_open_no_socket_for_a_finished_reply(view, upstream):
    def answered(start, end):
        view.send(upstream.says(start, gate := Gate(), end)).until(start)
        gate.open()
        view.ends()
    answered('fir', 'st')
    there = view.page.url
    view.page.goto(view.url)
    answered('sec', 'ond')
    opened = len(view.sockets)
    for steps, text in [(-1, None), (-1, 'first'), (1, None), (1, 'second'), (-3, None), (1, 'first')]:
        view.go(steps, 1, text)
    view.page.goto(there)
    assert view.text(1) == 'first' and len(view.sockets) == opened == 2

@browser_test
def test_back_after_the_first_message_leaves_a_page_that_works(view, upstream):
    view.send(upstream.says('half ', gate := Gate(), 'whole')).until('half')
    view.go(-1, 1, None), view.go(1, 1, 'half')
    gate.open()
    assert view.ends() == 'half whole' and view.bubble(1).count() == 1

@browser_test
@pytest.mark.parametrize('event', ["document, 'visibilitychange'", "window, 'online'"])
def test_a_page_that_wakes_up_connects_again(view, upstream, event):
    view.send(question := upstream.says('half ', gate := Gate(), 'whole')).until('half')
    target, name = event.split(', ')
    wake = f'{target}.dispatchEvent(new Event({name}))'
    assert view.eventually(lambda: view.page.evaluate(wake) and len(view.sockets) == 2)   # unless it was just heard
    gate.open()
    assert view.ends() == 'half whole' and len(upstream.called(question)) == 1
    shown = urlsplit(view.bubble(1).locator('.copy').get_attribute('href')).query
    assert shown and {urlsplit(url).query for url in view.sockets} == {shown}
    view.page.evaluate(wake)
    view.page.wait_for_timeout(500)
    assert len(view.sockets) == 2

@browser_test
def test_a_page_finds_the_new_process_after_a_restart(profile, start, upstream):
    server = start(DRAIN_SECONDS='0')
    view = View(profile(), server.url)
    view.send(upstream.says('half ', HANG)).until('half')
    server.signal(signal.SIGTERM)
    assert server.exit() is not None
    assert view.eventually(lambda: 'reconnecting' in view.page.locator('#link').inner_text())
    start(port=server.port)
    assert view.ends('interrupted') == 'half' and 'retry' in view.bubble(1).inner_text().lower()

class Network:
    "A stretch of wire before a server: it can be cut, and it can lose what comes back."
    def __init__(self, port):
        self.port, self.loses, self.wires = port, False, []
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.url = f'http://127.0.0.1:{self.listener.getsockname()[1]}'
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        with contextlib.suppress(OSError):
            while near := self.listener.accept()[0]:
                far = socket.create_connection(('127.0.0.1', self.port), DEADLINE)
                near.settimeout(DEADLINE)
                self.wires += [near, far]
                for ends in (near, far), (far, near): threading.Thread(target=self.carry, args=ends, daemon=True).start()

    def carry(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65_536):
                if not self.loses or one.getpeername()[1] != self.port: other.sendall(data)
        self.cut(one, other)

    def cut(self, *wires):
        for wire in wires or self.wires:
            with contextlib.suppress(OSError): wire.shutdown(socket.SHUT_RDWR)

@pytest.fixture
def network(site):
    network = Network(site.settings.port)
    yield network
    network.cut(network.listener, *network.wires)
    network.listener.close()

@browser_test
def test_a_network_that_cuts_the_socket_again_and_again_loses_nothing(profile, network, upstream):
    "FI-30"
    gates = [Gate() for _ in range(3)]
    question = upstream.says(*(step for n, gate in enumerate(gates) for step in (f'word{n} ', gate)), 'end')
    view = View(profile(), network.url).send(question)
    for n, gate in enumerate(gates):
        view.until(f'word{n}')
        network.cut(), gate.open()
    assert (view.ends(), len(view.sockets)) == ('word0 word1 word2 end', 4) and len(upstream.called(question)) == 1

@browser_test
def test_what_came_while_the_browser_was_offline_is_shown_and_a_draft_is_kept(view, upstream):
    "FI-25"
    view.send(question := upstream.says('half ', gate := Gate(), 'whole')).until('half')
    view.composer.fill('a draft')
    view.profile.set_offline(True)
    gate.open()
    assert upstream.called(question)[0].closed.wait(DEADLINE)
    view.profile.set_offline(False)
    assert view.ends() == 'half whole' and view.composer.input_value() == 'a draft'
    view.console[:] = [said for said in view.console if 'ERR_INTERNET_DISCONNECTED' not in said]  # its draft, asked early

@browser_test
@pytest.mark.parametrize('arrives', [False, True])
def test_a_send_that_the_network_swallows_keeps_its_text_and_is_one_question(profile, network, upstream, arrives):
    "FI-26: nothing gets through, or all but the answer."
    view, question = View(profile(), network.url), upstream.says('answer')
    network.loses = arrives
    view.profile.set_offline(not arrives)
    view.send(question)
    assert not arrives or eventually(lambda: upstream.called(question))
    assert view.eventually(lambda: network.cut() or 'Not sent' in view.page.locator('#notice').inner_text())
    assert view.composer.input_value() == question
    network.loses = False
    view.profile.set_offline(False)
    view.composer.press('Enter')
    assert view.ends() == 'answer' and len(upstream.called(question)) == 1 and not view.bubble(2).count()

@browser_test
def test_of_two_tabs_that_send_at_once_one_is_told_to_wait_and_loses_nothing(profile, site, upstream):
    "FI-24"
    view, gate = View(profile(), site.url).send(upstream.says('first')), Gate()
    view.ends()
    other = View(view.profile, view.page.url)
    questions = [upstream.says('half ', gate, 'whole') for _ in range(2)]
    view.send(questions[0]).until('half', idx=3)
    other.send(questions[1])
    assert other.eventually(lambda: 'still being written' in other.page.locator('#notice').inner_text())
    assert other.composer.input_value() == questions[1]
    gate.open()
    view.ends(idx=3)
    other.composer.press('Enter')
    other.until('half whole', idx=3).composer.press('Enter')
    assert other.ends(idx=5) == 'half whole'
    assert [other.text(idx) for idx in (2, 3, 4)] == [questions[0], 'half whole', questions[1]]
    assert [len(upstream.called(question)) for question in questions] == [1, 1]

@browser_test
def test_without_javascript_the_app_still_works(profile, site, upstream):
    view = View(profile(java_script_enabled=False), site.url)
    view.composer.fill(upstream.says('half ', gate := Gate(), 'whole'))
    view.page.locator('form:has(textarea) .send').first.click()
    view.until('half')
    gate.open()
    assert view.ends() == 'half whole'
    view.composer.fill(upstream.says('endless ', HANG))
    view.page.locator('form:has(textarea) .send').first.click()
    view.until('endless', idx=3)
    view.button('stop').first.click()
    assert view.ends('stopped', idx=3) == 'endless' and not view.console

@browser_test
@pytest.mark.parametrize('script', [True, False])
def test_a_summary_is_a_marker_that_opens_and_can_be_undone(profile, site, upstream, script):
    view = View(profile(java_script_enabled=script), site.url)
    view.composer.fill(upstream.says('One.', stop='model_context_window_exceeded'))
    view.page.locator('form:has(textarea) .send').first.click()
    view.ends()
    upstream.plans[main.SUMMARISING] = [says('It was **tea**.')]
    view.button('Go on with a summary').click()
    view.ends(idx=3)
    assert not view.bubble(2).is_visible() and not view.page.locator('#content-3').is_visible()
    view.bubble(3).get_by_text('Summary of what stands above').click()
    assert view.page.locator('#content-3 strong').is_visible()
    for name in ('Undo', 'Use it again', 'Undo'):
        view.bubble(3).get_by_role('button', name=name).click()
    assert view.eventually(lambda: view.bubble(3).get_by_role('button', name='Use it again').is_visible())
    assert not view.console

@browser_test
def test_a_draft_survives_a_reload_and_a_refusal(profile, new_site, upstream):
    view = View(profile(), new_site(max_message_chars=50).url)
    view.composer.fill('a draft')
    view.page.reload()
    assert view.composer.input_value() == 'a draft'
    def elsewhere(): return View(profile(), view.url).composer.input_value() == 'a draft'
    assert view.eventually(elsewhere), 'it is on the server'
    view.send(upstream.says('half ', gate := Gate(), 'whole')).until('half')
    assert view.composer.input_value() == ''
    view.send('too early').page.locator('#notice', has_text='still being written').wait_for()
    assert view.composer.input_value() == 'too early' and view.bubble(2).count() == 0
    gate.open()
    view.ends()
    view.send('x' * 51)
    assert view.eventually(lambda: '50' in view.page.locator('body').inner_text().replace('x' * 51, ''))
    assert view.composer.input_value() == 'x' * 51 and view.bubble(2).count() == 0

def let_go(routes):
    "End requests that were held back, also those whose page has gone: a route nobody answers stays a task for ever."
    for route in routes:
        with contextlib.suppress(Exception): route.abort()

@browser_test
def test_a_draft_of_an_earlier_release_is_taken_over(view):
    view.page.evaluate("localStorage.setItem('draft:/', 'old words')")
    with view.page.expect_response('**/draft'): view.page.reload()
    assert view.composer.input_value() == 'old words' and view.page.evaluate('localStorage.length') == 0
    with view.page.expect_response('**/draft'): view.composer.fill('')

@browser_test
def test_a_question_that_was_on_its_way_as_the_page_was_left_is_a_draft_unless_it_arrived(profile, new_site, upstream):
    view, sent = View(profile(), new_site().url), upstream.says('An answer.')
    def typed(): return View(view.profile, view.url).composer.input_value()
    held = []
    view.page.route(view.url + '/', lambda route: route.continue_() if route.request.method == 'GET' else held.append(route))
    view.send('on its way')
    view.page.goto(view.url + '/usage')
    assert view.eventually(lambda: typed() == 'on its way')
    let_go(held)
    view.page.unroute_all()
    view.page.goto(view.url)
    view.send(sent)
    view.page.goto(view.url + '/usage')
    assert view.eventually(lambda: upstream.called(sent) and typed() == '')
    view.page.wait_for_timeout(300)
    assert typed() == ''

@browser_test
def test_shift_enter_makes_a_line_and_a_blank_message_sends_nothing(view, upstream):
    view.send('  ').page.wait_for_timeout(200)
    assert view.bubble(0).count() == 0 and not view.kinds('sent')
    view.composer.fill('one')
    view.composer.press('Shift+Enter')
    view.composer.type('two')
    view.composer.press('Enter')
    view.ends()
    assert view.page.locator('#content-0').inner_text() == 'one\ntwo'

@browser_test
def test_hostile_text_executes_nothing(view, upstream):
    text = ' '.join(text for text in HOSTILE if len(text) < 200 and '\x1b' not in text)
    upstream.plans[plain(text)] = [says(*re.findall('(?s).{1,9}', text))]
    view.send(plain(text)).ends()
    for _ in range(2):
        assert view.page.evaluate('window.__pwn') is None
        assert '<svg onload=window.__pwn=1>' in view.text(1) and '<svg onload=window.__pwn=1>' in view.text(0)
        view.page.reload()

@browser_test
@pytest.mark.parametrize('script', [True, False], ids=['script', 'no script'])
def test_a_send_after_the_session_ended_brings_its_text_back_after_the_login(profile, new_site, upstream, script):
    context = profile(java_script_enabled=script)
    view = View(context, new_site(app_password=PASSWORD, **MANY).url)
    def sign_in():
        view.page.fill('#password', PASSWORD)
        view.page.press('#password', 'Enter')
        view.page.wait_for_selector('#composer')
    sign_in()
    context.clear_cookies()
    view.composer.fill('typed too late')
    view.page.locator('.send').click()
    view.page.wait_for_selector('#password')
    sign_in()
    assert view.composer.input_value() == 'typed too late'

@browser_test
def test_what_is_typed_after_the_session_ended_is_there_after_the_login(profile, new_site):
    context = profile()
    view = View(context, new_site(app_password=PASSWORD, **MANY).url)
    def sign_in():
        view.page.fill('#password', PASSWORD)
        view.page.press('#password', 'Enter')
        view.page.wait_for_selector('#composer')
    sign_in()
    context.clear_cookies()
    view.composer.type('typed too late', delay=5)
    view.page.wait_for_selector('#password')        # the draft could not be kept
    sign_in()
    assert view.composer.input_value() == 'typed too late'

@browser_test
def test_the_corpus_opens_no_dialog_asks_no_other_host_and_leaves_the_console_empty(profile, new_site, upstream):
    site = new_site()
    with socket.create_server(('127.0.0.1', 0)) as canary:
        texts = [spelled(case).replace('{{CANARY}}', f'http://127.0.0.1:{canary.getsockname()[1]}') for case in SAYINGS]
        chat = None
        for text in texts:
            upstream.plans[text] = [says(text)]
            chat = chat.say(text) if chat else site.person().ask(text)
            assert chat.watch().ends().code in (None, 1000)
        view, dialogs = View(profile(), f'{site.url}/c/{chat.id}'), []
        view.page.on('dialog', lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        for end in range(2 * len(texts), 0, -30):
            view.page.goto(f'{site.url}/c/{chat.id}?before={end}')
            view.page.wait_for_timeout(50)
            assert view.page.evaluate('[window.__pwn, document.querySelectorAll("#composer").length]') == [None, 1]
        canary.settimeout(0)
        with pytest.raises(BlockingIOError): canary.accept()
    assert not dialogs and not view.console and view.hosts <= {site.url}

@browser_test
def test_the_page_follows_the_text_only_while_the_reader_is_at_the_bottom(view, upstream):
    gate, more = Gate(), ('line of text\n\n' * 40,)
    view.send(upstream.says('go ', more, more, gate, more, 'end')).until('line')
    bottom = '''(() => { let e = document.getElementById('content-1')
        while (e && !/auto|scroll/.test(getComputedStyle(e).overflowY)) e = e.parentElement
        e = e || document.scrollingElement; %s })()'''
    distance = bottom % 'return e.scrollHeight - e.clientHeight - e.scrollTop'
    assert view.eventually(lambda: view.page.evaluate(distance) < 60)
    view.page.evaluate(bottom % 'e.scrollTop = 10; return 0')
    view.page.wait_for_timeout(100)
    gate.open()
    view.ends()
    assert view.page.evaluate(distance) > 300

@browser_test
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_page_fits_a_phone(profile, site, upstream, scheme):
    view = View(profile(viewport={'width': 360, 'height': 640}, color_scheme=scheme), site.url)
    view.send(upstream.says('x' * 3000)).ends()
    assert view.page.evaluate('document.documentElement.scrollWidth <= innerWidth') and view.composer.is_visible()
    assert not view.console


@browser_test
def test_an_import_is_followed_to_its_end_and_an_export_is_a_download(profile, new_site, tmp_path):
    many, view = [CLAUDE[0] | {'uuid': f'many-{n}', 'name': f'Loaf {n}'} for n in range(1500)], View(profile(), new_site().url)
    (tmp_path / 'many.json').write_text(json.dumps(many))
    (tmp_path / 'torn.json').write_text('[{"uuid":')
    page, seen = view.page, view.page.locator('#incoming')
    page.get_by_role('link', name='Your data').focus()
    page.keyboard.press('Enter')
    chosen = page.get_by_label('A file that Parley')
    chosen.set_input_files(tmp_path / 'torn.json')
    view.button('^Import$').press('Enter')
    assert view.eventually(lambda: 'no valid JSON' in seen.inner_text())
    chosen.set_input_files(tmp_path / 'many.json')
    view.button('^Import$').press('Enter')
    assert view.eventually(lambda: seen.locator('progress').count() and 'of 1,500 conversations' in seen.inner_text())
    assert view.eventually(lambda: seen.inner_text().strip() == '1,500 conversations with 9,000 messages came in.')
    with page.expect_download() as download: page.get_by_role('link', name='Export everything').click()
    with zipfile.ZipFile(download.value.path()) as packed: assert len(packed.namelist()) == 3000 and not packed.testzip()
    with page.expect_download() as download: page.get_by_role('link', name='Download a backup').click()
    assert Path(download.value.path()).read_bytes()[:6] == b'SQLite' and not view.console

# ---- The browser: files ---------------------------------------------------------------------------------------------

# What a person drops or pastes: files in a DataTransfer, of bytes in base64.
CARRY = '''([kind, files]) => {
  const data = new DataTransfer()
  for (const [name, type, bytes] of files)
    data.items.add(new File([Uint8Array.from(atob(bytes), c => c.charCodeAt(0))], name, { type }))
  const how = { bubbles: true, cancelable: true }, at = document.querySelector('#message')
  if (kind === 'paste') return at.dispatchEvent(new ClipboardEvent('paste', { ...how, clipboardData: data }))
  at.dispatchEvent(new DragEvent(kind, { ...how, dataTransfer: data }))
}'''

def carry(view, kind, *files):
    view.page.evaluate(CARRY, [kind, [[name, type, base64.b64encode(data).decode()] for name, type, data in files]])
def given(name, data, type=''): return {'name': name, 'mimeType': type, 'buffer': data}
def waits(view, n): return view.eventually(lambda: view.page.locator('#files input[name=file]').count() == n)

@pytest.fixture
def seer(profile, desk):
    view = View(profile(), desk.url)
    view.page.select_option('#model', 'claude-seer-1', force=True)
    yield view
    assert not [said for said in view.console if 'status of 4' not in said] and view.hosts <= {desk.url}, view.console

@browser_test
def test_files_come_by_button_paste_and_drop_and_go_with_the_message(seer, desk):
    page = seer.page
    with page.expect_file_chooser() as chooser: seer.button('Attach files').first.click()
    chooser.value.set_files([given('wide.png', png(1_600, 4), 'image/png'), given('notes.txt', b'some notes')])
    assert waits(seer, 2)
    carry(seer, 'paste', ('pasted.png', 'image/png', png(5, 6)))
    carry(seer, 'dragenter', ('dropped.pdf', 'application/pdf', PAPER))
    assert page.locator('body.dropping').count()
    carry(seer, 'drop', ('dropped.pdf', 'application/pdf', PAPER), ('bad.exe', '', b'MZ\0'))
    assert waits(seer, 4) and not page.locator('body.dropping').count()
    assert seer.eventually(lambda: '“bad.exe” can’t be attached' in page.locator('#notice').inner_text())
    assert 'attached' in said(seer)
    seer.button('Remove notes.txt').click()
    assert waits(seer, 3)
    page.reload()
    page.select_option('#model', 'claude-seer-1', force=True)
    assert waits(seer, 3)
    seer.send('What is this?').ends()
    assert waits(seer, 0)
    blocks = desk.upstream.calls[-1].body['messages'][0]['content']
    assert [b['type'] for b in blocks] == ['image', 'image', 'document', 'text']
    assert main.pixels('image/png', base64.b64decode(blocks[0]['source']['data'])) == (1_568, 4)
    page.reload()
    assert seer.composer.is_visible() and not page.locator('.chip').count()
    sizes = "[...document.querySelectorAll('#msg-0 img')].map(i => [i.alt, i.naturalWidth, i.naturalHeight])"
    assert seer.eventually(lambda: page.evaluate(sizes) == [['wide.png', 1_568, 4], ['pasted.png', 5, 6]])
    with page.expect_download() as download: page.locator('#msg-0').get_by_text('dropped.pdf').click()
    assert download.value.suggested_filename == 'dropped.pdf'
    assert Path(download.value.path()).read_bytes() == PAPER

@browser_test
def test_progress_is_shown_and_a_message_waits_for_its_files(seer, desk):
    page, held = seer.page, []
    page.route('**/files', lambda route: held.append(route))
    page.set_input_files('#upload', given('a.txt', b'one'))
    assert seer.eventually(lambda: len(held) == 1)      # two requests of the same moment may change places
    page.set_input_files('#upload', given('b.txt', b'two'))
    assert seer.eventually(lambda: len(held) == 2) and page.locator('#files progress').count() == 2
    seer.button('Remove').last.click()
    assert page.locator('#files progress').count() == 1 and page.locator('#notice').inner_text() == ''
    seer.send('With a file')
    assert seer.eventually(lambda: 'as soon as its files' in page.locator('#notice').inner_text())
    assert not seer.bubble(0).count()
    held[0].continue_()
    let_go(held[1:])
    seer.ends()
    assert page.locator('#msg-0 .files li').all_inner_texts()[0].startswith('a.txt') and not seer.composer.input_value()

@browser_test
def test_a_message_is_not_sent_without_a_file_that_could_not_come(seer):
    page, held = seer.page, []
    page.route('**/files', lambda route: held.append(route))
    page.set_input_files('#upload', given('bad.exe', b'MZ\0'))
    assert seer.eventually(lambda: held)
    seer.send('With a file')
    held[0].continue_()
    assert seer.eventually(lambda: 'can’t be attached' in page.locator('#notice').inner_text())
    page.wait_for_timeout(300)
    assert seer.composer.input_value() == 'With a file' and not seer.bubble(0).count()

@browser_test
@pytest.mark.parametrize('script', [True, False])
def test_a_file_is_taken_out_of_a_question_that_is_changed(profile, desk, script):
    me, question = desk.person(), desk.upstream.plays(refuses(400), says('Fine.'))
    chat = me.ask(question, model='claude-seer-1', file=attached(me, pixels('bad.png', 70), ('good.txt', b'good'))).over()
    view = View(profile(java_script_enabled=script), f'{desk.url}/c/{chat.id}')
    edit, box = view.page.locator('.edit'), view.page.locator('.edit textarea')
    def change(): view.bubble(0).hover(), view.bubble(0).get_by_role('link', name='Edit').click(), box.wait_for()
    change()
    if script:
        box.fill('half a thought'), box.press('Escape'), box.wait_for(state='detached'), change()
        assert view.eventually(lambda: box.input_value() == 'half a thought')
        edit.get_by_role('button', name='Remove bad.png').click()
        assert view.page.evaluate("document.activeElement.matches('.edit textarea')")
    else: edit.get_by_role('checkbox', name='Send bad.png').uncheck()
    assert edit.locator('.chip').count() == 2 - script
    box.fill(question), edit.locator('.send').click()
    assert view.ends() == 'Fine.' and not view.console
    assert view.page.locator('#msg-0 .files li').all_inner_texts()[0].startswith('good.txt')
    assert [b['type'] for b in desk.upstream.called(question)[-1].body['messages'][0]['content']] == ['document', 'text']

@browser_test
def test_of_several_refused_files_each_is_told_of(seer):
    notice = seer.page.locator('#notice')
    def told(*names): return seer.eventually(lambda: all(f'“{name}” can’t be attached' in notice.inner_text() for name in names))
    seer.page.set_input_files('#upload', [given('a.exe', b'MZ\0'), given('b.exe', b'MZ\0'), given('c.txt', b'fine')])
    assert told('a.exe', 'b.exe') and waits(seer, 1)
    seer.page.set_input_files('#upload', given('d.exe', b'MZ\0'))
    assert told('d.exe') and 'a.exe' not in notice.inner_text()

@browser_test
def test_a_model_that_can_not_read_a_file_is_warned_of(seer):
    page = seer.page
    page.set_input_files('#upload', [given(name, png(), 'image/png') for name in ('a.png', 'a “b" c.png')])
    warning = page.get_by_text('The model can’t read this.')    # it is said once
    assert waits(seer, 2) and not warning.is_visible() and page.get_by_alt_text('a “b" c.png', exact=True).count() == 1
    page.select_option('#model', 'claude-bare-1', force=True)
    assert seer.eventually(warning.is_visible)


# ---- Look -----------------------------------------------------------------------------------------------------------

def clipboard(profile, site, **options):
    "A tab that may read the clipboard."
    context = profile(permissions=['clipboard-read', 'clipboard-write'], **options)
    view = View(context, site.url)
    view.pasted = lambda: view.page.evaluate('navigator.clipboard.readText()')
    return view

FILL = '''import sqlite3, sys, time
db, count = sqlite3.connect(sys.argv[1], timeout=10), int(sys.argv[2])
db.create_function('spaced', 1, lambda text: text, deterministic=True)
first = db.execute('select coalesce(max(id), 0) + 1 from message').fetchone()[0]
with db:
    db.execute("""insert into conversation (id, owner, title, leaf, created, updated)
               values ('long', 'owner', 'A long one', ?, ?, ?)""", (first + count - 1, *[time.time()] * 2))
    db.executemany("""insert into message (id, conversation, owner, parent, idx, role, content, status, note, model,
                   created, ended) values (?, 'long', 'owner', ?, ?, ?, ?, 'done', '', '', ?, ?)""", [
        (first + n, first + n - 1 if n else None, n, 'assistant' if n % 2 else 'user', f'message {n} ' + 'and so on ' * 40,
         *[time.time()] * 2) for n in range(count)])
'''

@pytest.fixture(scope='module')
def long(new_site):
    "A site with a conversation of 2,000 messages at /c/long."
    site = new_site()
    subprocess.run([sys.executable, '-c', FILL, str(site.db), '2000'], check=True, timeout=DEADLINE)
    return site

def scrolled(view): return view.page.evaluate('[scrollY, document.documentElement.scrollHeight - innerHeight - scrollY]')
def said(view): return view.page.locator('#said').text_content()


@browser_test
def test_a_conversation_is_renamed_in_place_pinned_deleted_and_back_and_a_second_tab_follows(profile, new_site, upstream):
    view = View(profile(), new_site(titles='off').url)
    view.send(first := upstream.says('one')).ends()
    view.page.goto(view.url)
    view.send(second := upstream.says('two')).ends()
    other = View(profile(), view.url)
    view.page.bring_to_front()
    def titles(v): return [plain(t) for t in v.page.locator('#conversations a[id] > span:first-child').all_inner_texts()]
    def menu(n, item):
        view.page.locator('#conversations .more').nth(n).click()
        view.page.locator('#menu').get_by_role('button', name=item, exact=True).click()
    assert view.eventually(lambda: titles(other) == titles(view) == [second, first])
    menu(0, 'Rename')
    view.page.keyboard.type('not this')
    view.page.keyboard.press('Escape')
    assert titles(view) == [second, first]
    menu(0, 'Rename')
    view.page.keyboard.type('  A better <b>title</b> ')
    view.page.keyboard.press('Enter')
    assert view.eventually(lambda: titles(other) == titles(view) == ['A better <b>title</b>', first])
    assert view.eventually(lambda: view.page.locator('h1').inner_text() == 'A better <b>title</b>' == view.page.title())
    focused = 'document.activeElement.getAttribute("aria-label") || document.activeElement.textContent'
    assert view.eventually(lambda: view.page.evaluate(focused) == 'A better <b>title</b>')
    menu(1, 'Pin')
    assert view.eventually(lambda: titles(other) == titles(view) == [first, 'A better <b>title</b>'])
    assert view.eventually(lambda: view.page.evaluate(focused) == f'Actions for {first}')
    view.page.locator('#heading .more').click()
    view.page.locator('#menu').get_by_role('button', name='Rename').click()
    view.page.keyboard.type('A title')
    view.page.keyboard.press('Enter')
    assert view.eventually(lambda: view.page.evaluate(focused) == 'Actions for A title')
    assert view.eventually(lambda: titles(other) == titles(view) == [first, 'A title'])
    other.page.goto(view.page.url)
    Person(view.url).post(urlsplit(view.page.url).path + '/rename', title='A better <b>title</b>')
    assert other.eventually(lambda: titles(other) == titles(view) == [first, 'A better <b>title</b>'])
    assert other.page.locator('#heading .more').get_attribute('aria-label') == 'Actions for A better <b>title</b>'
    assert other.page.locator('#conversations h2').all_inner_texts() == ['Pinned', 'Today']
    menu(0, 'Delete')                                           # another one than is shown: one stays where one is
    assert view.eventually(lambda: titles(other) == titles(view) == ['A better <b>title</b>'])
    assert view.page.evaluate('document.activeElement.textContent') == 'Undo' and view.text(1) == 'two'
    view.page.keyboard.press('Enter')
    assert view.eventually(lambda: titles(other) == titles(view) == [first, 'A better <b>title</b>'])
    assert not view.page.locator('#undo button').count()
    there = view.page.url
    view.page.locator('#heading .more').click()
    view.page.locator('#menu').get_by_role('button', name='Delete').click()
    view.page.wait_for_url('**/?deleted=*')
    assert view.eventually(lambda: titles(other) == titles(view) == [first]), (titles(other), titles(view), view.console)
    view.button('Undo').click()
    view.page.wait_for_url(there)
    assert view.text(1) == 'two' and view.eventually(lambda: len(titles(other)) == 2) and not view.console + other.console

@browser_test
def test_another_tab_sees_a_reply_run_and_that_it_is_unread_until_it_is_looked_at(view, upstream):
    other = View(view.profile, view.url)
    view.send(question := upstream.says('half ', gate := Gate(), 'whole')).until('half')
    place = view.page.url
    def state(v): return v.page.locator(f'#conversations li:has([href="{urlsplit(place).path}"])').get_attribute('data-state')
    assert view.eventually(lambda: state(other) == state(view) == 'running')
    view.page.goto(view.url)
    gate.open()
    assert view.eventually(lambda: state(other) == state(view) == 'unread')
    view.page.goto(place)
    assert view.eventually(lambda: state(other) is None is state(view)) and question in view.text(0)

@browser_test
def test_the_list_goes_on_as_one_scrolls_and_stays_where_it_is_when_it_changes(profile, years):
    view = View(profile(), years.url)
    rows_ = view.page.locator('#conversations a[id]')
    assert rows_.count() == 50
    for n in (100, 122):
        rows_.last.scroll_into_view_if_needed()
        assert view.eventually(lambda n=n: rows_.count() >= n)
    assert [plain(t) for t in view.page.locator('#conversations h2').all_inner_texts()][:3] == ['Pinned', 'Today', 'September 2001']
    assert view.page.locator('#conversations h2').count() == 3
    view.page.locator('#c-y100').focus()
    before = view.page.evaluate("[document.querySelector('#conversations').scrollTop, document.activeElement.id]")
    years.person().post('/c/y119/rename', title='another title')
    assert view.eventually(lambda: view.page.locator('#c-y119').inner_text() == 'another title')
    assert view.page.evaluate("[document.querySelector('#conversations').scrollTop, document.activeElement.id]") == before
    years.person().post('/c/y119/rename', title='year 119')
    assert rows_.count() == 122
    view.page.keyboard.press('Enter')                           # far down: the next page has as much of the list, there
    view.page.wait_for_url('**/c/y100')
    assert view.eventually(lambda: view.page.evaluate("document.querySelector('#conversations').scrollTop") == before[0])
    assert view.page.locator('#conversations [aria-current]').get_attribute('id') == 'c-y100' and rows_.count() == 122
    view.page.reload()
    assert view.eventually(lambda: view.page.evaluate("document.querySelector('#conversations').scrollTop") == before[0])

@browser_test
@pytest.mark.parametrize('script', [True, False])
def test_on_a_phone_the_menu_of_a_conversation_works_without_javascript_too(profile, new_site, upstream, script):
    site = new_site(titles='off')
    site.person().ask('a question')
    view = View(profile(java_script_enabled=script, viewport={'width': 390, 'height': 800}, has_touch=True), site.url)
    def menu():
        view.button('Conversations').first.click()
        view.page.locator('#sidebar .more').click()
    menu()
    if script: view.page.locator('#menu').get_by_role('button', name='Rename').click()
    field = view.page.locator('input[name=title]:visible')
    field.fill('A name')
    view.page.locator('form.rename:has(input:visible) button').click() if not script else field.press('Enter')
    assert view.eventually(lambda: not view.page.locator('.rename input:visible').count())
    view.page.goto(site.url)
    assert view.page.locator('#conversations a[id]').text_content().startswith('A name')
    menu()
    view.page.get_by_role('button', name='Delete', exact=True).click()
    view.button('Undo').click()
    assert view.eventually(lambda: '/c/' in view.page.url or view.page.locator('#conversations a[id]').count())
    assert not view.console

@browser_test
def test_the_list_finds_the_new_process_after_a_restart(profile, start):
    server = start(DRAIN_SECONDS='0')
    view = View(profile(), server.url)
    server.signal(signal.SIGTERM)
    assert server.exit() is not None
    again = start(port=server.port)
    Person(again.url).ask('from elsewhere')
    assert view.eventually(lambda: view.page.locator('#conversations a[id]').count() == 1)

@browser_test
def test_keys_lead_to_the_composer_the_keys_and_the_palette(view):
    view.page.evaluate('document.activeElement.blur()')
    view.page.keyboard.press('?')
    assert view.page.locator('#keys').is_visible() and 'Esc' in view.page.locator('#keys').inner_text()
    view.page.keyboard.press('Escape')
    assert not view.page.locator('#keys').is_visible()
    view.page.keyboard.press('/')
    view.page.keyboard.type('a/b?')
    assert view.composer.input_value() == 'a/b?' and not view.page.locator('dialog[open]').count()
    view.page.keyboard.press('Control+k')
    assert view.page.locator('#palette').is_visible()
    view.page.keyboard.press('Meta+k')
    assert not view.page.locator('#palette').is_visible()

@browser_test
def test_the_palette_finds_conversations_and_actions_by_words(view, upstream):
    view.send(upstream.says('one') + ' Crème brûlée').ends()
    there = view.page.url
    view.page.goto(view.url)
    view.page.keyboard.press('Control+k')
    view.page.keyboard.type('brulee creme')
    options = view.page.locator('#choices [role=option]:not(.hit)')
    assert options.count() == 1 and options.first.get_attribute('aria-selected') == 'true'
    query = view.page.locator('#query')
    assert query.get_attribute('aria-activedescendant') == options.first.get_attribute('id')
    view.page.keyboard.press('Enter')
    view.page.wait_for_url(there)
    view.page.route('**/search?*', lambda route: route.fulfill(body=''))     # what it finds comes when it comes
    view.page.keyboard.press('Control+k')
    view.page.keyboard.type('theme')
    view.page.keyboard.press('ArrowDown')
    view.page.keyboard.press('ArrowUp')
    view.page.keyboard.press('ArrowUp')
    assert options.count() == 3 and 'dark' in view.page.locator('[aria-selected=true]').inner_text()
    view.page.keyboard.press('Enter')
    assert view.page.locator('html').get_attribute('data-theme') == 'dark'
    view.page.keyboard.press('Control+k')
    view.page.keyboard.type('nothing has this name')
    assert not options.count() and view.page.get_by_text('Nothing found.').is_visible()
    view.page.keyboard.press('Enter')
    assert not view.page.locator('#palette').is_visible()

@browser_test
def test_the_palette_shows_a_title_however_it_was_found(view, upstream):
    view.send(upstream.says('one') + ' blue, “green”: a tale').ends()
    view.page.keyboard.press('Control+k')
    for words in ('"blue green"', 'green. tale', 'blue green'):
        view.page.locator('#query').fill(words)
        def found(): return view.page.locator('#choices li:not([data-message])').filter(has_text='green').count() == 1
        assert view.eventually(found), words

@browser_test
def test_escape_closes_what_is_open_before_it_stops_the_reply(view, upstream):
    view.send(upstream.says('half ', HANG)).until('half')
    view.page.keyboard.press('Control+k')
    view.page.keyboard.press('Escape')
    view.page.wait_for_timeout(200)
    assert view.bubble(1).get_attribute('data-status') == 'streaming' and not view.page.locator('dialog[open]').count()
    view.page.keyboard.press('Escape')
    view.ends('stopped')

@browser_test
def test_enter_that_confirms_a_composition_does_not_send(view, upstream):
    view.composer.fill('にほん')
    view.page.evaluate('''() => { for (const how of [{isComposing: true}, {keyCode: 229}]) for (const key of ['Enter', 'Escape'])
        document.querySelector('#message').dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, ...how})) }''')
    view.page.wait_for_timeout(200)
    assert not view.kinds('sent') and view.composer.input_value() == 'にほん'
    view.composer.press('Enter')
    assert view.eventually(lambda: view.kinds('sent'))
    view.ends()

@browser_test
def test_up_in_an_empty_composer_recalls_the_last_question(view, upstream):
    question = upstream.says('one') + '\n\n  **two** ```three```\n'
    view.send(question).ends()
    view.composer.press('ArrowUp')
    assert view.eventually(lambda: view.composer.input_value() == question)
    view.composer.fill('mine')
    view.composer.press('ArrowUp')
    view.page.wait_for_timeout(100)
    assert view.composer.input_value() == 'mine'

@browser_test
def test_copy_gives_the_exact_markdown(profile, site, upstream):
    view, answer = clipboard(profile, site), '# One\n\n- *a*  \n- b\t<i>&amp;\n\n```\n x\n```\n\n'
    view.send(upstream.says(answer)).ends()
    view.bubble(1).hover()
    view.bubble(1).locator('.copy').click()
    assert view.eventually(lambda: said(view) == 'Copied') and view.pasted() == answer
    assert view.page.evaluate('fetch(document.querySelector("#msg-1 .copy").href).then(r => r.text())') == answer

@browser_test
def test_code_is_copied_exactly_and_wraps_on_demand(profile, site, upstream):
    view, code = clipboard(profile, site), '\tif a < b && c:\n\n        print("  x")' + ' # long' * 60 + '\n'
    view.send(upstream.says(f'Look:\n\n```python\n{code}```\n\nThat is all.')).ends()
    view.button('Copy this code').click()
    assert view.eventually(lambda: said(view) == 'Copied') and view.pasted() == code
    wide = '(e => e.scrollWidth > e.clientWidth)(document.querySelector("#content-1 pre"))'
    assert view.page.evaluate(wide)
    view.button('Wrap').click()
    assert not view.page.evaluate(wide) and view.button('Wrap').get_attribute('aria-pressed') == 'true'
    assert view.page.locator('figcaption button').count() == 2

@browser_test
def test_the_time_of_a_message_is_there_for_pointer_and_keyboard(view, upstream):
    view.send(upstream.says('one')).ends()
    shown = lambda: float(view.bubble(1).locator('time').evaluate('e => getComputedStyle(e).opacity'))
    view.page.mouse.move(5, 5)
    assert view.eventually(lambda: shown() == 0)
    view.bubble(1).hover()
    assert view.eventually(lambda: shown() == 1) and '20' in view.bubble(1).locator('time').inner_text()
    view.page.mouse.move(5, 5)
    view.bubble(1).locator('.copy').focus()
    assert view.eventually(lambda: shown() == 1)

@browser_test
def test_the_end_is_offered_to_a_reader_who_left_it(view, upstream):
    gate, more = Gate(), 'line of text\n\n' * 60
    view.send(upstream.says(more, gate, more, 'end')).until('line')
    assert view.eventually(lambda: scrolled(view)[1] < 2) and not view.page.locator('#jump').is_visible()
    view.page.mouse.move(400, 300)
    view.page.mouse.wheel(0, -300)
    assert view.eventually(lambda: view.page.locator('#jump').is_visible())
    before = scrolled(view)[0]
    gate.open()
    view.ends()
    view.page.wait_for_timeout(100)
    assert scrolled(view)[0] == before
    view.button('Jump to the end').click()
    assert view.eventually(lambda: scrolled(view)[1] < 2 and not view.page.locator('#jump').is_visible())

@browser_test
def test_a_small_step_up_is_enough_to_stay(view, upstream):
    gate = Gate()
    more = itertools.chain(*(('more words\n\n', .01) for _ in range(40)))
    view.send(upstream.says('line of text\n\n' * 60, gate, *more)).until('line')
    assert view.eventually(lambda: scrolled(view)[1] < 2)
    view.page.mouse.move(400, 300)
    view.page.mouse.wheel(0, -20)
    assert view.eventually(lambda: scrolled(view)[1] > 15)
    view.page.wait_for_timeout(200)
    before = scrolled(view)[0]
    gate.open()
    view.ends()
    assert scrolled(view)[0] == before

@browser_test
def test_the_page_does_not_move_when_a_reply_completes(view, upstream):
    view.send(upstream.says('line of text\n\n' * 60 + 'last', gate := Gate(), ' words')).until('last')
    assert view.eventually(lambda: scrolled(view)[1] < 2)
    before = view.page.locator('#content-1').bounding_box()['y']
    gate.open()
    view.ends()
    view.page.wait_for_timeout(100)
    assert abs(view.page.locator('#content-1').bounding_box()['y'] - before) < 2

@browser_test
def test_a_long_conversation_opens_at_its_end_with_few_of_its_messages(profile, long):
    view = View(profile(), long.url + '/c/long')
    assert 'message 1999' in view.text(1999) and view.eventually(lambda: scrolled(view)[1] < 2)
    assert view.page.locator('.message').count() <= 60 and not view.console

@browser_test
def test_a_message_that_is_landed_on_is_in_view_however_old(profile, long):
    view = View(profile(), f'{long.url}/c/long?from=1900#msg-1900')
    top = view.bubble(1900).evaluate('e => e.getBoundingClientRect().top')
    assert 0 <= top < 300 and view.bubble(1898).count() and view.bubble(1999).count()

@browser_test
def test_older_messages_load_above_and_keep_the_readers_place(profile, long):
    view = View(profile(), long.url + '/c/long')
    view.page.wait_for_timeout(200)
    first = lambda: int(view.page.locator('.message').first.get_attribute('id')[4:])
    for _ in range(3):
        top = first()
        at = view.page.evaluate('''id => { scrollTo(0, 60); return document.getElementById(id).getBoundingClientRect().y }''',
                                f'msg-{top}')       # the link is in sight, and a message to keep an eye on
        assert view.eventually(lambda top=top: first() < top) and first() == top - 30
        assert view.eventually(lambda top=top, at=at: abs(view.bubble(top).bounding_box()['y'] - at) < 2)
    ids = view.page.evaluate('[...document.querySelectorAll(".message")].map(m => +m.id.slice(4))')
    assert ids == list(range(ids[0], 2000)) and not view.console

@browser_test
def test_older_messages_are_a_link_without_javascript(profile, long):
    view = View(profile(java_script_enabled=False), long.url + '/c/long')
    view.page.get_by_text('Earlier messages').click()
    assert view.bubble(1969).count() and not view.bubble(1970).count()
    view.page.get_by_text('To the end of the conversation').click()
    assert view.bubble(1999).count()

@browser_test
def test_a_reload_brings_the_reader_back_to_the_place(profile, long):
    view = View(profile(), long.url + '/c/long')
    view.page.evaluate('scrollTo(0, 900)')
    view.page.wait_for_timeout(100)
    seen = view.page.evaluate('[...document.querySelectorAll(".message")].find(m => m.getBoundingClientRect().top > 60).id')
    at = view.page.locator(f'#{seen}').bounding_box()['y']
    view.page.reload()
    assert view.eventually(lambda: abs(view.page.locator(f'#{seen}').bounding_box()['y'] - at) < 2)

@browser_test
@pytest.mark.parametrize('script', [True, False])
def test_theme_and_sidebar_are_remembered(profile, site, script):
    view = View(profile(java_script_enabled=script, color_scheme='light'), site.url)
    paper = lambda: view.page.locator('body').bounding_box() and view.page.locator('html').get_attribute('data-theme')
    view.button('^Dark$').click()
    assert view.eventually(lambda: paper() == 'dark') and view.button('^Dark$').get_attribute('aria-pressed') == 'true'
    view.button('^Sidebar$').click()
    assert view.eventually(lambda: not view.page.locator('#sidebar').is_visible())
    answer = view.page.goto(site.url)
    assert 'data-theme="dark"' in answer.text() and not view.page.locator('#sidebar').is_visible()     # the first paint is right
    view.button('^Sidebar$').click()
    assert view.eventually(lambda: view.page.locator('#sidebar').is_visible())

@pytest.mark.parametrize('back', ['//evil.example', 'https://evil.example', '/\\evil.example', '', 'javascript:x'])
def test_a_change_of_look_leads_nowhere_else(me, back):
    answer = me.post('/look', htmx=False, theme='dark', sidebar='<b>', back=back)
    assert answer.status_code == 303 and answer.headers['Location'] == '/'
    assert 'theme=dark' in answer.headers['Set-Cookie'] and 'sidebar' not in answer.headers['Set-Cookie']
    assert 'data-theme="auto"' in me.get('/', Cookie='theme="><script>').text

@browser_test
def test_an_example_is_a_question_without_javascript_too(profile, new_site):
    view = View(profile(java_script_enabled=False), new_site(api_key=None, demo=True).url)
    assert 'demo model' in view.page.locator('#empty').inner_text() and view.page.locator('.examples button').count() == 4
    question = view.page.locator('.examples button').first.inner_text()
    view.page.locator('.examples button').first.click()
    assert view.text(0) == question and view.ends()

LISTENS = "e => !!e['htmx-internal-data']?.listenerInfos"  # a swapped element does 20 ms later

@browser_test
@pytest.mark.parametrize('phone', [False, True])
def test_the_settings_of_a_conversation_by_keyboard_and_on_a_phone(profile, lab, phone):
    options = {'viewport': {'width': 390, 'height': 800}, 'has_touch': True, 'is_mobile': True} if phone else {}
    view = View(profile(**options), lab.url)
    page, panel, opener = view.page, view.page.locator('#panel'), view.page.locator('#opener [popovertarget]')
    opener.press('Enter')
    page.keyboard.press('Tab')
    assert panel.is_visible() and page.evaluate('document.activeElement.id') == 'model'
    page.locator('#model').select_option('claude-bare-1')
    assert view.eventually(lambda: 'bare' in opener.inner_text() and page.locator('#model').evaluate(LISTENS))
    assert not page.locator('#effort').count()
    page.locator('#model').select_option('claude-nova-1')
    page.locator('#effort').select_option('ultra')
    page.locator('#system').fill('Be brief.')
    page.locator('#max_tokens').fill('500')
    page.locator('#max_tokens').press('Enter')
    if phone:
        sizes = page.eval_on_selector_all('#opener button, #fields :is(select, input, textarea, button)',
                                          'all => all.filter(e => e.checkVisibility()).map(e => e.offsetHeight)')
        assert min(sizes) >= 44 and panel.evaluate('e => e.scrollWidth <= e.clientWidth'), sizes
    page.keyboard.press('Escape')
    assert not panel.is_visible() and not view.bubble(0).count()
    view.send(question := lab.upstream.says('Once.')).ends()
    sent = body(lab, question)
    assert (sent['model'], sent['output_config'], sent['system'], sent['max_tokens']) == (
        'claude-nova-1', {'effort': 'ultra'}, 'Be brief.', 500)
    assert view.bubble(1).locator('.by').text_content() == 'claude-nova-1'
    opener.click()
    with page.expect_response('**/choices'): page.locator('#effort').select_option('low')
    page.reload()
    assert page.locator('#effort').input_value() == 'low' and page.locator('#system').input_value() == 'Be brief.'
    assert not view.console

@browser_test
@pytest.mark.parametrize('field', ['model', 'effort'])
def test_a_setting_that_is_answered_after_the_question_it_went_with_leaves_the_page_alone(profile, lab, field):
    view = View(profile(), lab.url)
    page, held = view.page, []
    page.locator('#opener [popovertarget]').click()
    with page.expect_response('**/choices'): page.locator('#model').select_option('claude-nova-1')
    assert view.eventually(lambda: page.locator('#effort').count()
                           and page.locator('#model').evaluate(LISTENS))
    page.route('**/choices', lambda route: held.append(route))
    with page.expect_request('**/choices'):
        page.locator(f'#{field}').select_option({'model': 'claude-bare-1', 'effort': 'ultra'}[field])
    page.keyboard.press('Escape')
    view.send(question := lab.upstream.says('Once.')).ends()
    place = f"{page.evaluate('location.pathname')}/choices"
    with page.expect_event('requestfinished', lambda request: request.url.endswith('/choices')): held[0].continue_()
    page.evaluate('() => new Promise(requestAnimationFrame)')
    sent = body(lab, question)
    assert (sent['model'], sent.get('output_config')) == {
        'model': ('claude-bare-1', None), 'effort': ('claude-nova-1', {'effort': 'ultra'})}[field]
    assert {page.locator(f'#{name}').get_attribute('hx-post') for name in ('model', 'max_tokens')} == {place}
    assert ('bare' in page.locator('#opener').inner_text()) == (field == 'model') and not view.console

@browser_test
def test_what_a_setting_is_refused_for_is_said_in_the_panel(profile, lab):
    view = View(profile(), lab.url)
    view.page.locator('#opener [popovertarget]').click()
    view.button('Save prompt').click()
    assert view.eventually(lambda: 'name' in view.page.locator('#panel #chosen').inner_text())
    assert view.page.locator('#notice').inner_text() == '' and view.page.locator('#panel').is_visible()
    view.page.locator('#prompt_name').fill('Poet'), view.page.locator('#system').fill('Rhyme.')
    view.button('Save prompt').click()
    view.button('^Delete$').wait_for()
    assert view.page.locator('#chosen').inner_text() == ''
    with view.page.expect_response('**/choices'): view.button('^Delete$').click()

@browser_test
def test_a_page_shows_the_settings_of_another_but_never_in_place_of_what_is_typed(profile, lab):
    view, says_ = View(profile(), lab.url), lab.upstream.says
    view.send(says_('One.')).ends()
    other, place = View(view.profile, view.page.url), urlsplit(view.page.url).path
    def switch(**form): lab.person().post(f'{place}/choices', model=form.pop('model', 'claude-nova-1'), **form)
    def shows(v, model):
        return v.eventually(lambda: model in v.page.locator('#opener').inner_text()
                            and v.page.locator('#model').input_value() == model)
    def focused(): return other.page.evaluate('[document.activeElement.id, document.activeElement.value]')
    other.composer.fill('half a thought')
    switch(system='Hm.')
    view.send(says_('Two.')).ends(idx=3), other.ends(idx=3)
    assert shows(other, 'claude-nova-1') and shows(view, 'claude-nova-1') and focused() == ['message', 'half a thought']
    other.page.locator('#opener [popovertarget]').click()
    system = other.page.locator('#system')
    assert system.input_value() == 'Hm.'
    system.press('Control+a'), system.press_sequentially('Half a prompt')
    switch(model='claude-bare-1')
    view.send(says_('Three.')).ends(idx=5)
    other.ends(idx=5)
    assert other.eventually(lambda: 'bare' in other.page.locator('#opener').inner_text())
    assert focused() == ['system', 'Half a prompt'] and other.page.locator('#model').input_value() == 'claude-nova-1'
    with other.page.expect_response('**/choices'): other.page.keyboard.press('Escape')
    other.page.locator('#settings').focus()
    view.send(says_('Four.')).ends(idx=7), other.ends(idx=7)
    assert shows(other, 'claude-bare-1') and system.input_value() == 'Half a prompt' and focused()[0] == 'settings'
    assert other.composer.input_value() == 'half a thought' and not view.console + other.console

@browser_test
@pytest.mark.parametrize('script', [True, False])
def test_tokens_out_of_range_never_keep_a_message_from_being_sent(profile, lab, script):
    view = View(profile(java_script_enabled=script), lab.url)
    page, said = view.page, 'An answer may have 1 to '
    for idx, most in ((1, '0'), (3, '999999')):
        page.locator('#opener [popovertarget]').click()
        page.locator('#max_tokens').fill(most)
        page.keyboard.press('Escape')
        assert not script or view.eventually(lambda: said in page.locator('#notice').inner_text())
        view.composer.fill(lab.upstream.says('Sent.'))
        page.locator('#composer .send').click()
        assert view.ends(idx=idx) == 'Sent.' and page.locator('#max_tokens').input_value() == most
        page.locator('#opener [popovertarget]').click()
        assert said in page.locator('#panel').inner_text() and not view.console
        page.keyboard.press('Escape')

@browser_test
def test_a_server_is_connected_switched_on_and_its_call_is_seen(profile, workshop):
    site = workshop
    view = View(profile(viewport={'width': 390, 'height': 800}, has_touch=True, is_mobile=True), site.url + '/connections')
    page = view.page
    for label, words in (('Name', 'zebra'), ('Address', 'https://zebra.example/x?key=canary'), ('Token', TOKEN)):
        page.get_by_label(label).last.fill(words)
    view.button('^Connect$').tap()
    page.locator('.servers li', has_text='zebra').get_by_text('a token is kept').wait_for()
    sizes = page.eval_on_selector_all('#empty :is(input, button)', 'all => all.map(e => e.offsetHeight)')
    assert min(sizes) >= 44 and page.evaluate('document.documentElement.scrollWidth <= innerWidth'), sizes
    page.goto(site.url)
    page.locator('#opener button').tap()
    page.get_by_label('notes').check()
    page.keyboard.press('Escape')
    view.send(site.upstream.plays(raw(MESSAGE, LISTING, CALLED[0], gate := Gate(), CALLED[1], writes(3, 'So.'), end())))
    fold = page.locator('#steps-1 details')
    fold.locator('summary', has_text='Using notes · <i>look</i>').tap()
    gate.open()
    fold.get_by_text('<u>found …').wait_for()
    assert 'Used notes' in fold.inner_text() and view.ends() == 'So.'
    shown = page.locator('#steps-1').inner_text()
    page.reload()
    page.locator('#steps-1 summary').tap()
    assert page.locator('#steps-1').inner_text() == shown and page.locator('[name=mcp-1]').is_checked()
    assert 'canary' not in page.content() and not view.console

@browser_test
def test_a_day_is_the_same_everywhere_and_a_time_is_the_readers(profile, site, upstream):
    view = View(profile(timezone_id='America/Los_Angeles', locale='en-US'), site.url)
    found = block(2, {'type': 'web_search_tool_result', 'tool_use_id': 's1', 'content': [PAGES[0] | {'page_age': '2025-08-25'}]})
    view.send(upstream.plays(raw(MESSAGE, SEARCH[0], found, writes(3, 'Tea.'), end()))).ends()
    assert view.eventually(lambda: view.page.locator('#steps-1 time').text_content() == 'Aug 25, 2025')
    assert re.fullmatch(r'\w+ \d+, \d{4}, \d+:\d\d.[AP]M', view.page.locator('#msg-1 .actions time').text_content())
    assert not view.console

@browser_test
def test_on_a_phone_the_sidebar_is_an_overlay_without_javascript_too(profile, site):
    view = View(profile(java_script_enabled=False, viewport={'width': 390, 'height': 800}), site.url)
    assert not view.page.locator('#sidebar').is_visible()
    view.button('Conversations').click()
    assert view.page.locator('#sidebar').is_visible() and view.page.get_by_role('link', name='New conversation').first.is_visible()
    view.page.keyboard.press('Escape')
    assert not view.page.locator('#sidebar').is_visible()

@browser_test
def test_a_reply_is_announced_at_start_end_and_error_only(view, upstream):
    view.page.evaluate('''() => { window.__said = []; new MutationObserver(() => window.__said.push(
        document.querySelector('#said').textContent)).observe(document.querySelector('#said'), {childList: true}) }''')
    view.send(upstream.says('half ', gate := Gate(), *(f'word{n} ' for n in range(30)))).until('half')
    gate.open()
    view.ends()
    view.send(upstream.plays(refuses(401))).ends('failed', idx=3)
    told = view.page.evaluate('window.__said')
    if len(told) == 3: told.insert(2, told[0])      # it failed so fast that there was nothing to begin
    assert told[:3] == ['Claude is answering.', 'Claude has answered.', 'Claude is answering.'] and len(told) == 4
    assert 'key was refused' in told[3]
    live = view.page.evaluate('''[...document.querySelectorAll('[aria-live], [role=log], [role=status], [role=alert]')].filter(
        e => e.closest('.content') || e.querySelector('.content')).length''')
    assert live == 0

@browser_test
def test_a_reply_that_ends_in_a_background_tab_shows_in_title_and_icon(view, upstream):
    view.send(upstream.says('half ', gate := Gate(), 'whole')).until('half')
    look = '''hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true})
        document.dispatchEvent(new Event('visibilitychange')) }'''
    icon = lambda: view.page.locator('link[rel=icon]').get_attribute('href')
    calm, title = icon(), view.page.title()
    view.page.evaluate(look, True)
    gate.open()
    view.ends()
    assert view.eventually(lambda: view.page.title() == '● ' + title) and icon().endswith('news.svg')
    view.page.evaluate(look, False)
    assert view.page.title() == title and icon().endswith(calm)

@browser_test
def test_it_can_be_installed(view):
    session = view.page.context.new_cdp_session(view.page)
    found = session.send('Page.getAppManifest')
    told = json.loads(found['data'])
    assert not found['errors'] and told['display'] == 'standalone' and told['start_url'] == '/'
    for icon in told['icons']: assert view.page.request.get(view.url + icon['src']).headers['content-type'] == 'image/svg+xml'

@browser_test
def test_an_image_is_never_loaded_and_opens_in_a_tab_of_its_own(profile, site, upstream):
    view = View(profile(), site.url)
    view.profile.route('http://image.invalid/**', lambda route: route.fulfill(body='an image'))
    view.send(upstream.says('![A cat](http://image.invalid/a.png)')).ends()
    view.page.wait_for_timeout(200)
    assert view.hosts == {site.url}
    view.page.locator('.image').focus()
    with view.profile.expect_page() as opened: view.page.keyboard.press('Enter')
    opened.value.wait_for_load_state()
    assert opened.value.url == 'http://image.invalid/a.png' and opened.value.evaluate('[opener, document.referrer]') == [None, '']

@browser_test
def test_a_tap_on_a_citation_shows_what_is_quoted_and_the_next_one_follows(profile, site, upstream):
    phone = profile(viewport={'width': 390, 'height': 800}, has_touch=True, is_mobile=True)
    phone.route('https://a.example/*', lambda asked: asked.fulfill(body='The source.'))
    view = View(phone, site.url)
    view.send(upstream.says('Tea[¹](<https://a.example/x> "is hot") and more.')).ends()
    quoted = "getComputedStyle(document.querySelector('.cite'), '::after').content"
    cite = view.page.locator('.cite')
    cite.tap()
    assert view.page.evaluate(quoted) == '"is hot"' and len(phone.pages) == 1
    view.page.locator('#content-1').tap(position={'x': 9, 'y': 9})
    assert view.page.evaluate(quoted) == 'none'
    cite.tap()
    with phone.expect_page() as source: cite.tap()
    assert source.value.url == 'https://a.example/x'

@browser_test
@pytest.mark.parametrize('width', [320, 640])        # 1280 pixels at 400 and at 200 %
def test_the_page_can_be_zoomed(profile, site, upstream, width):
    view = View(profile(viewport={'width': width, 'height': 400}), site.url)
    view.send(upstream.says('x' * 500)).ends()
    assert view.page.evaluate('document.documentElement.scrollWidth <= innerWidth') and view.composer.is_visible()

@browser_test
def test_on_a_touch_screen_everything_is_large_enough(profile, site, upstream):
    view = View(profile(viewport={'width': 390, 'height': 800}, has_touch=True, is_mobile=True), site.url)
    small = '''[...document.querySelectorAll('button, a, summary, textarea')].filter(e => e.checkVisibility() &&
        !e.closest('.content, .unseen')).filter(e => { const b = e.getBoundingClientRect(); return b.width < 43.5 || b.height < 43.5
        }).map(e => e.outerHTML)'''
    assert not view.page.evaluate(small)
    view.send(upstream.says('x', HANG)).until('x')
    view.button('stop').first.click()
    view.ends('stopped')
    view.bubble(0).get_by_role('link', name='Edit').click()
    view.page.locator('.edit .send').click()
    view.until('x').button('stop').first.click()
    view.ends('stopped')
    view.bubble(0).get_by_role('link', name='Edit').click()
    view.page.locator('.edit').wait_for()
    assert not view.page.evaluate(small)
    view.page.locator('.edit .cancel').click()
    view.bubble(0).get_by_role('button', name='Next').wait_for()
    assert not view.page.evaluate(small)
    view.button('Conversations').click()
    assert not view.page.evaluate(small)


@pytest.fixture(scope='module')
def axe():
    "A look of axe-core at a page: the violations it finds, in short."
    if not os.environ.get('AXE'): pytest.skip('AXE does not name axe.min.js (npm pack axe-core)')
    source = Path(os.environ['AXE']).read_text()

    def look(view):
        view.page.evaluate(source)
        view.page.evaluate('Promise.allSettled(document.getAnimations().filter(a => a instanceof CSSTransition)'
                           '.map(a => a.finished)).then(() => {})')
        found = view.page.evaluate('axe.run({runOnly: {type: "tag", values: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa",'
                                   ' "wcag22aa", "best-practice"]}, resultTypes: ["violations"]}).then(r => r.violations)')
        return [(v['id'], v['impact'], [n['html'][:200] for n in v['nodes']][:3]) for v in found]
    return look

RICH = '''Words, [a link](https://example.org), `code`, $x^2$ and a note[^1].

### A heading

- item
- [x] task

```python
class A:
    def f(self, x=1): return 'a' + str(x)  # why
```

```diff
- old
+ new
```

| a | b |
|---|--:|
| 1 | 2 |

> quoted

![A cat](https://example.org/a.png)

$$\frac a b$$

[^1]: The note.
'''

@browser_test
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1280])
def test_axe_finds_no_violation(profile, long, workshop, house, upstream, axe, scheme, width):
    view = View(profile(color_scheme=scheme, viewport={'width': width, 'height': 800}), long.url)
    assert axe(view) == []
    view.page.goto(long.url + '/c/long')
    assert axe(view) == []
    view.page.goto(long.url)
    view.send(upstream.says('half ', gate := Gate(), 'tea[¹](<https://a.example/x> "is hot").\n\n' + RICH)).until('half')
    assert axe(view) == []
    gate.open()
    view.ends()
    view.page.locator('.account summary').click()
    assert eventually(lambda: view.page.evaluate("getComputedStyle(document.querySelector('.account')).opacity") == '1')
    assert axe(view) == []
    view.bubble(1).get_by_role('button', name='Regenerate').click()
    assert view.eventually(lambda: view.bubble(1).locator('.walk').count()) and view.ends()
    view.bubble(0).get_by_role('link', name='Edit').click()
    view.page.locator('.edit').wait_for()
    assert axe(view) == []
    view.page.locator('.edit .cancel').click()
    view.send(upstream.plays(refuses(401))).ends('failed', idx=3)
    assert axe(view) == []
    view.page.keyboard.press('Control+k')
    assert view.page.get_by_role('option').count() > 3 and axe(view) == []
    view.page.keyboard.press('Escape')
    view.page.evaluate('document.activeElement.blur()')
    view.page.keyboard.press('?')
    assert view.page.locator('#keys').is_visible() and axe(view) == []
    view.page.keyboard.press('Escape')
    view.page.locator('#opener [popovertarget]').click()
    assert view.page.locator('#panel').is_visible() and axe(view) == []
    view.page.keyboard.press('Escape')
    if width == 390:
        view.button('Conversations').click()
        assert axe(view) == []
    view.page.goto(long.url + '/usage')
    assert view.page.get_by_role('img', name='Cost of the last').is_visible() and axe(view) == []
    assert axe(View(profile(color_scheme=scheme), long.url + '/c/unknown')) == []
    assert axe(View(profile(color_scheme=scheme), house.url)) == []
    tall = {'width': width, 'height': 2000}    # so that the composer lies over nothing
    view = View(profile(color_scheme=scheme, viewport=tall), workshop.url)
    for place in ('/trash', '/connections', '/data', '/search?q=and'):
        view.page.goto(workshop.url + place)
        assert axe(view) == [], place
    view.page.goto(workshop.url)
    view.page.locator('#opener [popovertarget]').click()
    assert view.page.get_by_label('notes').is_visible() and axe(view) == []
