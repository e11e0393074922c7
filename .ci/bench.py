"""Parley on the scales: `python .ci/bench.py [--quick] [--rows one,burst] [--repeat 5]`.

Starts a fake upstream, the app and a yardstick (a chat of the usual FastHTML pattern), gives both the same work
and prints medians, ratios and the bars we set ourselves. A row is one function under `@row`; it answers figures.

CPU is what the kernel charged to the server's process tree, the turn's beginning and end included: never wall time,
never the upstream's or the viewers' share. Wire bytes are what arrives on the viewer's socket after the handshake.
"""
# ruff: noqa: E401
import argparse, asyncio, functools, hashlib, importlib.util, json, os, platform, random, re, resource, shutil, signal
import socket, sqlite3, statistics, sys, tempfile, time, uuid
from asyncio.subprocess import PIPE
from contextlib import asynccontextmanager, closing, suppress
from itertools import pairwise
from pathlib import Path
import httpx
from websockets.asyncio.client import ClientConnection, connect

MAIN = Path(__file__).resolve().parent.parent/'main.py'
OPENING, CLOSING = 'Tides', 'Finis'  # the first and the last token of every answer: no other word begins like them

class Missing(Exception): "A row can't be measured here; the text says why."


# ---- Words: the same realistic answers on every machine

STEMS = '''the of and a to in is that it for as with on by be are this from or which at an not when one can but if then
every value list page server reader message answer token stream socket client request block cursor window thread memory
function result simple careful small large early late open close begin finish order number letter question because while
through between without before after again always never often measure compare choose explain expect remember forget
carry hold keep lose find build break change return follow depend contain include describe consider prefer avoid happen
water river light colour garden house paper travel weather history language kitchen bread coffee morning evening winter
distance energy balance pressure surface pattern example reason method detail problem version network database index
storage latency buffer transaction boundary protocol document paragraph sentence table column error failure recovery
people teacher engineer neighbour writer different important possible common useful clear quiet quick slow'''.split()
ENDS = ('', '', '', '', 's', 'ed', 'ing', 'ly', 'er', 'ness')
WEIGHTS = [1/(i + 3) for i in range(len(STEMS))]  # Zipf's law: without it deflate would look better than it is

def words(rng, n): return [w + rng.choice(ENDS)*(len(w) > 3) for w in rng.choices(STEMS, WEIGHTS, k=n)]
def several(make, rng, low, high, by): return by.join(make(rng) for _ in range(rng.randint(low, high)))
def plain(rng): return ' '.join(words(rng, rng.randint(6, 18))).capitalize() + rng.choice('....?:')
def paragraph(rng): return several(sentence, rng, 2, 5, ' ')
def heading(rng): return '## ' + ' '.join(words(rng, 4)).capitalize()
def bullets(rng): return '- ' + several(sentence, rng, 3, 6, '\n- ')
def steps(rng): return '\n'.join(f'{i}. {sentence(rng)}' for i in range(1, rng.randint(4, 7)))

def sentence(rng):
    said = plain(rng).split()
    if rng.random() < .6:
        at, mark = rng.randrange(len(said)), rng.choice(('**{}**', '*{}*', '`{}`', '[{}](https://example.org/)'))
        said[at] = mark.format(said[at])
    return ' '.join(said)

def code(rng):
    name, arg, *rest = words(rng, 8)
    lines = [f'    {w}_{i} = {arg}.{w}({rng.randint(0, 99)}, "{w}")  # {rng.choice(rest)}' for i, w in enumerate(rest)]
    return '\n'.join([f'```python\ndef {name}({arg}, limit=9):', *lines, f'    return {rest[-1]}_5\n```'])

def table(rng):
    rows = [words(rng, 3) for _ in range(rng.randint(3, 6))]
    return '\n'.join('| ' + ' | '.join(r) + ' |' for r in (rows[0], ('---', '---:', ':---'), *rows[1:]))

KINDS = {'prose': {plain: 1}, 'markdown': {paragraph: 10, bullets: 3, steps: 2, code: 3, heading: 3, table: 1}}

@functools.lru_cache(64)
def answer(kind, tokens, seed=0):
    "The pieces of an answer, about 4.5 characters each as in real streams; joined they are its exact text."
    rng, text = random.Random(f'{kind} {seed}'), [OPENING]
    while sum(map(len, text)) < tokens*8: text.append(rng.choices([*KINDS[kind]], KINDS[kind].values())[0](rng))
    pieces = re.findall(r'\s*\w{1,6}|\s*[^\w\s]{1,4}', '\n\n'.join(text))[:max(1, tokens - 1)]
    fence = '\n```' if ''.join(pieces).count('```') % 2 else ''
    return [*pieces, f'{fence}\n\n{CLOSING}']


# ---- Upstream: the Messages API's events over a plain socket, in a process of its own (`bench.py upstream`)

def event(kind, **data): return f'event: {kind}\ndata: {json.dumps({"type": kind, **data})}\n\n'.encode()
def chunk(data): return b'%x\r\n%s\r\n' % (len(data), data)

def asked(body):
    "What the last question asks for: `pace=50` tokens a second (0: at once), `tokens=500`, `text=markdown` or `prose`."
    said = json.dumps([m['content'] for m in body['messages'] if m['role'] == 'user'][-1])
    wish = {'pace': '0', 'tokens': '20', 'text': 'prose'} | dict(re.findall(r'\b(pace|tokens|text)=(\w+)', said))
    return float(wish['pace']), answer(wish['text'], min(int(wish['tokens']), 100_000))

def message(model, text=(), reason=None): return {
    'id': f'msg_{uuid.uuid4().hex}', 'type': 'message', 'role': 'assistant', 'model': model, 'stop_reason': reason,
    'stop_sequence': None, 'content': [{'type': 'text', 'text': t} for t in text],
    'usage': {'input_tokens': 9, 'output_tokens': 1}}

async def stream_answer(body, writer):
    pace, pieces = asked(body)
    writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n'
                 b'request-id: req_bench\r\n\r\n' + chunk(
        event('message_start', message=message(body['model'])) + event('ping')
        + event('content_block_start', index=0, content_block={'type': 'text', 'text': ''})))
    began = time.perf_counter()
    for i, text in enumerate(pieces):
        if pace and (wait := began + i/pace - time.perf_counter()) > 0: await asyncio.sleep(wait)
        writer.write(chunk(event('content_block_delta', index=0, delta={'type': 'text_delta', 'text': text})))
        await writer.drain()
    writer.write(chunk(event('content_block_stop', index=0) + event('message_delta', usage={'output_tokens': i + 1},
        delta={'stop_reason': 'end_turn', 'stop_sequence': None}) + event('message_stop')) + b'0\r\n\r\n')
    await writer.drain()

def whole(path, body):
    "The answers that are one JSON body: the (empty) list of models, a short message that isn't streamed."
    if path == '/v1/models': return 200, {'data': [], 'has_more': False, 'first_id': None, 'last_id': None}
    if path != '/v1/messages': return 404, {'type': 'error', 'error': {'type': 'not_found_error', 'message': path}}
    return 200, message(body['model'], ['A short title'], 'end_turn')

def plain_answer(status, data):
    data = json.dumps(data).encode()
    head = f'HTTP/1.1 {status} OK\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n'
    return head.encode() + data

async def upstream_connection(reader, writer):
    try:
        while head := (await reader.readuntil(b'\r\n\r\n')).decode('latin-1'):
            length = re.search(r'(?im)^content-length: *(\d+)', head)
            body = json.loads(await reader.readexactly(int(length[1])) if length and int(length[1]) else b'{}')
            path = head.split()[1].split('?')[0]
            if path == '/v1/messages' and body.get('stream'): await stream_answer(body, writer)
            else: writer.write(plain_answer(*whole(path, body)))
    except (EOFError, ConnectionError): pass  # the client went away, as clients do
    finally: writer.close()

async def upstream():
    server = await asyncio.start_server(upstream_connection, '127.0.0.1', 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # ends with the bench, however that ends
    os._exit(0)


# ---- The yardstick: what one writes after reading FastHTML's own examples

YARDSTICK = r'''
import os
from collections import defaultdict
from uuid import uuid4
import uvicorn
from anthropic import AsyncAnthropic
from fasthtml.common import *

hdrs = (Script(src='/htmx-2.min.js'), Script(src='/hx-ws-2.min.js'), Style('.chat {white-space: pre-wrap}'))
app, rt = fast_app(default_hdrs=False, hdrs=hdrs)
client = AsyncAnthropic()
chats = defaultdict(list)

def Bubble(role, idx, text='', **kw):
    return Div(Span(text, id=f'content-{idx}'), id=f'msg-{idx}', cls=f'chat {role}', **kw)

@rt('/')
def get():
    return Titled('Chat', Div(id='chat'), Form(Input(name='message'), Button('Send'),
                  hx_post='/', hx_target='#chat', hx_swap='beforeend'))

@rt('/')
def post(message: str):
    cid = uuid4().hex
    chats[cid].append({'role': 'user', 'content': message})
    return Bubble('user', 0, message), Bubble('assistant', 1, hx_ext='ws', ws_connect=f'/ws/chat/{cid}/1')

async def stream(ws, send, conversation_id: str, msg_idx: int):
    messages, text = chats[conversation_id], ''
    async with client.messages.stream(model='claude-haiku-4-5', max_tokens=8192, messages=messages) as reply:
        async for token in reply.text_stream:
            text += token
            await send(Span(token, id=f'content-{msg_idx}', hx_swap_oob='beforeend'))
    messages.append({'role': 'assistant', 'content': text})
    await ws.close()

@app.ws('/ws/chat/{conversation_id}/{msg_idx}', conn=stream)
async def chat(): pass

if __name__ == '__main__': uvicorn.run(app, host=os.environ['HOST'], port=int(os.environ['PORT']))
'''

def lay_yardstick(folder):
    "Write the yardstick and the two scripts its page needs into `folder`; FastHTML serves them from there."
    (folder/'yardstick.py').write_text(YARDSTICK)
    if not (spec := importlib.util.find_spec('django_htmx')): return  # then only its browser rows have no figures
    files = Path(spec.submodule_search_locations[0])/'static'/'django_htmx'
    for name in ('htmx-2.min.js', 'ext/hx-ws-2.min.js'): shutil.copy(files/name, folder)


# ---- Servers: start, drive, weigh, stop

def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]

def stat(pid): return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1:]  # from the parent's id on

def tree(pid):
    "`pid` and the living processes below it."
    found, parents = [pid], {}
    for entry in Path('/proc').glob('[0-9]*'):
        with suppress(OSError): parents[int(entry.name)] = int(stat(entry.name)[0])
    for p in found: found += [child for child, parent in parents.items() if parent == p]
    return found

def cpu_seconds(pid):
    """User and system time of a process and of the children it has reaped.
    A process's CPU clock (clock_getcpuclockid(3)) is utime + stime of /proc/PID/stat, in ns instead of 10 ms ticks."""
    return time.clock_gettime((~pid << 3) | 2) + sum(map(int, stat(pid)[12:14]))/os.sysconf('SC_CLK_TCK')

def megabytes(pid, field):
    return int(re.search(rf'(?m)^{field}: +(\d+) kB', Path(f'/proc/{pid}/smaps_rollup').read_text())[1])/1024

class Counted(ClientConnection):
    wire = 0
    def data_received(self, data):
        self.wire += len(data)
        super().data_received(data)

class Server:
    "A server process with a folder of its own, and one visitor who keeps its cookies."
    def __init__(self, name, script, cwd, folder, upstream_port):
        self.name, self.script, self.cwd, self.folder, self.process = name, script, cwd, folder, None
        self.db, self.port = folder/'bench.db', free_port()
        self.url = f'http://127.0.0.1:{self.port}'
        self.env = {k: v for k, v in os.environ.items() if not k.startswith('ANTHROPIC_')} | {
            'HOST': '127.0.0.1', 'PORT': str(self.port), 'DATABASE_URL': f'sqlite:///{self.db}',
            'TITLES': 'off',  # else a second call would be in every figure of a first answer
            'ANTHROPIC_API_KEY': 'bench', 'ANTHROPIC_BASE_URL': f'http://127.0.0.1:{upstream_port}'}
        self.visitor = httpx.AsyncClient(base_url=self.url, headers={'Origin': self.url}, timeout=20, trust_env=False)

    async def start(self):
        "Spawn it and wait for its first page; `started` are the seconds between."
        began = time.perf_counter()
        with (self.folder/'log').open('ab') as log: self.process = await asyncio.create_subprocess_exec(
            sys.executable, str(self.script), cwd=self.cwd, env=self.env, stdout=log, stderr=log)
        while time.perf_counter() < began + 30 and self.process.returncode is None:
            try: page = await self.visitor.get('/')
            except httpx.TransportError: await asyncio.sleep(.005)
            else:
                self.started = time.perf_counter() - began
                if page.status_code < 400: return  # or where one signs in
                break
        raise Missing(f'{self.name} does not start: {self.log()}')

    async def stop(self):
        if not self.process or self.process.returncode is not None: return
        self.process.terminate()
        try: await asyncio.wait_for(self.process.wait(), 10)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    def log(self): return (self.folder/'log').read_text()[-500:]
    def cpu(self): return sum(map(cpu_seconds, tree(self.process.pid)))
    def memory(self, field): return sum(megabytes(p, field) for p in tree(self.process.pid))

    async def ask(self, message):
        "Post a question as the page does: the new conversation's path and its reply's socket."
        answered = await self.visitor.post('/', data={'message': message}, headers={'HX-Request': 'true'})
        socket_path = re.search(r'ws-connect="([^"]+)"', answered.text)
        if not socket_path: raise Missing(f'POST / answered {answered.status_code}, no ws-connect: {self.log()}')
        return answered.headers.get('HX-Push-Url'), socket_path[1]

    def socket(self, path):
        "The connection that a page opens to watch a reply."
        cookies = '; '.join(f'{k}={v}' for k, v in self.visitor.cookies.items())
        return connect(f'ws://127.0.0.1:{self.port}{path}', origin=self.url, create_connection=Counted, proxy=None,
                       additional_headers={'Cookie': cookies} if cookies else {}, max_size=2**25)

    async def watch(self, path):
        "Read a reply to its end as a browser would: (when its first text came, wire bytes)."
        first, frames = None, []
        async with self.socket(path) as ws:
            async for frame in ws:
                if first is None and OPENING in frame: first = time.perf_counter()
                frames.append(frame)
        if ws.close_code != 1000 or CLOSING not in re.sub('<[^>]*>', '', ''.join(frames[-99:])):
            raise Missing(f'the reply broke off: code {ws.close_code}, {"".join(frames)[-200:]!r}')
        return first, ws.wire - len(ws.response.serialize())

    async def reply(self, message, delay=0):
        "One whole turn, begun after `delay` seconds: (seconds to the first text, wire bytes)."
        await asyncio.sleep(delay)
        posted = time.perf_counter()
        first, wire = await self.watch((await self.ask(message))[1])
        return first - posted, wire


@asynccontextmanager
async def running(server):
    try:
        await server.start()
        yield server
    finally: await server.stop()

class Bench:
    "What the rows share: the arguments, servers to their taste, and the browser."
    def __init__(self, args, folder, upstream_port):
        self.args, self.folder, self.upstream_port = args, folder, upstream_port
        self.playwright = self.chromium = None

    def question(self, pace, tokens): return f'pace={pace} tokens={tokens} text={self.args.text}'

    def server(self, name):
        folder = Path(tempfile.mkdtemp(prefix=f'{name}-', dir=self.folder))
        if name == 'app': return Server(name, self.args.app, self.args.app.parent, folder, self.upstream_port)
        lay_yardstick(folder)
        return Server(name, folder/'yardstick.py', folder, folder, self.upstream_port)

    async def browser(self):
        try: from playwright.async_api import async_playwright, Error
        except ImportError: raise Missing('no browser: playwright is not installed') from None
        self.playwright = self.playwright or await async_playwright().start()
        path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
        try: return await self.playwright.chromium.launch(executable_path=path, args=FLAGS)
        except Error as e: raise Missing(f'no browser: {str(e).strip().splitlines()[0]}') from None

    @asynccontextmanager
    async def profile(self, server):
        "A fresh browser profile that holds the visitor's cookies."
        self.chromium = self.chromium or await self.browser()
        cookies = [{'name': k, 'value': v, 'url': server.url} for k, v in server.visitor.cookies.items()]
        async with await self.chromium.new_context() as context:
            await context.add_cookies(cookies)
            yield context

    async def close(self):
        if self.chromium: await self.chromium.close()
        if self.playwright: await self.playwright.stop()


# ---- Rows: `async def row(server, bench)` answers {figure: value}; the table shows the median of each

ROWS = {}
BARS = {  # figure: (limit, what must stay below it)
    'one stream at 50/s: CPU, µs a token': (.5, 'ratio'), 'one stream at 50/s: wire, bytes a token': (10, 'app'),
    '20 streams at 50/s: CPU, µs a token': (.5, 'ratio'), '20 streams at 50/s: wire, bytes a token': (10, 'app'),
    'burst: CPU, µs a token': (1/3, 'ratio'), 'burst: wire, bytes a token': (10, 'app'),
    'first visit: KB': (45, 'app'), 'second visit: KB': (10, 'app'),
    'typeset 2,000 tokens: main thread, ms': (1200, 'app'),
    'typeset 2,000 tokens: longest task over 50 ms': (50, 'app'),
    'open 2,000 messages: browser, ms': (1000, 'app'), 'first page: 10,000 to 10, ratio': (1.25, 'app')}

def row(name, yardstick=True, limit=120):
    "Register a row. `yardstick=False`: the app only. `limit`: seconds until a run is given up."
    def register(measure):
        ROWS[name] = measure, yardstick, limit
        return measure
    return register

async def streams(server, bench, label, count, pace, tokens):
    question, before = bench.question(pace, tokens), server.cpu()
    seen = await asyncio.gather(*(server.reply(question, i/count/(pace or 50)) for i in range(count)))
    await asyncio.sleep(.3)  # what is left to do when the sockets have closed
    spent, wire = server.cpu() - before, sum(wire for _, wire in seen)
    return {f'{label}: CPU, µs a token': spent*1e6/count/tokens, f'{label}: wire, bytes a token': wire/count/tokens}

@row('one')
async def one(server, bench): return await streams(server, bench, 'one stream at 50/s', 1, 50, bench.args.tokens)

@row('twenty')
async def twenty(server, bench): return await streams(server, bench, '20 streams at 50/s', 20, 50, bench.args.tokens//2)

@row('burst')
async def burst(server, bench): return await streams(server, bench, 'burst', 1, 0, bench.args.tokens*8)

@row('first')
async def first(server, bench):
    waits = [(await server.reply(bench.question(200, 4)))[0] for _ in range(10)]
    return {'first token: ms from the post': statistics.median(waits)*1000}

FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()
LONGEST = """window.longest = 0; new PerformanceObserver(seen => { for (const task of seen.getEntries())
    longest = Math.max(longest, task.duration) }).observe({type: 'longtask'})"""  # the browser lists those over 50 ms
NODES = '() => { let n = 0, all = document.createNodeIterator(document.body); while (all.nextNode()) n++; return n }'
USABLE = '() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))'

async def load(context, url):
    "Open `url` in a new tab: (KB that came over the wire, headers included; requests that brought any)."
    page, sizes = await context.new_page(), []
    cdp = await context.new_cdp_session(page)
    cdp.on('Network.loadingFinished', lambda seen: sizes.append(seen['encodedDataLength']))
    await cdp.send('Network.enable')
    await page.goto(url)
    await asyncio.sleep(1)  # what the page asks for after its load event belongs to the visit
    await page.close()
    return sum(sizes)/1000, sum(map(bool, sizes))

@row('visits', yardstick=False)
async def visits(server, bench):
    async with bench.profile(server) as context:
        (size, requests), (again, again_requests) = [await load(context, server.url) for _ in range(2)]
    return {'first visit: KB': size, 'first visit: requests': requests,
            'second visit: KB': again, 'second visit: requests': again_requests}

async def milliseconds(cdp):
    "What the page's main thread has spent so far, by DevTools' own names."
    return {m['name']: m['value']*1000 for m in (await cdp.send('Performance.getMetrics'))['metrics']}

@row('typeset')
async def typeset(server, bench):
    async with bench.profile(server) as context:
        page = await context.new_page()
        clock, cpu = [await context.new_cdp_session(page) for _ in range(2)]
        await clock.send('Performance.enable')
        await cpu.send('Performance.enable', {'timeDomain': 'threadTicks'})  # the same without waits for a free core
        await page.goto(server.url)
        await page.evaluate(LONGEST)
        await page.fill(':is(textarea, input:not([type=hidden]))[name=message]', bench.question(200, 2000))
        before, cpu_before = await milliseconds(clock), await milliseconds(cpu)
        async with page.expect_websocket(lambda ws: '/ws/chat/' in ws.url) as opened:
            await page.evaluate('document.activeElement.form.requestSubmit()')
        await (await opened.value).wait_for_event('close', timeout=60_000)  # nothing asks the page while it works
        await asyncio.sleep(.5)
        after, cpu_after = await milliseconds(clock), await milliseconds(cpu)
        if CLOSING not in await page.inner_text('body'): raise Missing('the reply never reached the page')
        longest, nodes = await page.evaluate('window.longest'), await page.evaluate(NODES)
    spent = {k: after[k] - before[k] for k in before}
    return {f'typeset 2,000 tokens: {k}': v for k, v in (
        ('main thread, ms', spent['TaskDuration']),
        ('of it CPU, ms', cpu_after['TaskDuration'] - cpu_before['TaskDuration']),
        ('of it script, ms', spent['ScriptDuration']),
        ('of it style and layout, ms', spent['LayoutDuration'] + spent['RecalcStyleDuration']),
        ('longest task over 50 ms', longest), ('DOM nodes', nodes))}

def fill_conversation(db, n):
    "Grow the one turn in `db` to `n` messages: its two rows, whatever their columns, again and again with other text."
    with closing(sqlite3.connect(db)) as con, con:
        con.create_function('spaced', 1, lambda text: text, deterministic=True)  # of the index; the texts are ASCII
        con.row_factory = sqlite3.Row
        turn = [dict(r) for r in con.execute('select * from message order by idx')]
        leaf = turn[-1]['id']
        for i in range(2, n):
            text = ''.join(answer('markdown', 60 + i % 7*40, i) if i % 2 else answer('prose', 30, i))
            new = turn[i % 2] | {'parent': leaf, 'idx': i, 'content': text, 'key': None}  # a key belongs to one send
            leaf = new['id'] = leaf + 1 if isinstance(leaf, int) else uuid.uuid4().hex
            con.execute(f'insert into message ({",".join(new)}) values ({",".join("?"*len(new))})', [*new.values()])
        con.execute('update conversation set leaf = ?', [leaf])

async def browser_wait(server, bench, path):
    "Milliseconds from the navigation to the second frame after the page's load event; or why they can't be had."
    try:
        async with bench.profile(server) as context:
            page = await context.new_page()
            await page.goto(server.url + path)
            return await page.evaluate(USABLE)
    except Missing as why: return why

async def server_wait(server, path):
    began = time.perf_counter()
    page = await server.visitor.get(path)
    if 'id="msg-1999"' not in page.text: raise Missing(f'{path} answered {page.status_code}, without the last message')
    return (time.perf_counter() - began)*1000

@row('open', yardstick=False)
async def open_long(_, bench):
    async with running(bench.server('app')) as server:
        path, socket_path = await server.ask(bench.question(0, 50))
        await server.watch(socket_path)
    await asyncio.to_thread(fill_conversation, server.db, 2000)
    async with running(server):
        cold, *warm = [await server_wait(server, path) for _ in range(6)]
        return {'open 2,000 messages: server, the first time, ms': cold,
                'open 2,000 messages: server, ms': statistics.median(warm),
                'open 2,000 messages: browser, ms': await browser_wait(server, bench, path)}

def fill_list(db, first, last):
    "Copies of the one conversation in `db`, a quarter of an hour apart."
    with closing(sqlite3.connect(db)) as con, con:
        con.create_function('spaced', 1, lambda text: text, deterministic=True)
        con.row_factory = sqlite3.Row
        like = dict(con.execute('select * from conversation').fetchone())
        for n in range(first, last):
            new = like | {'id': f'copy-{n}', 'title': f'Conversation {n}', 'updated': like['updated'] - 900*n}
            names, marks = ','.join(new), ','.join('?'*len(new))
            con.execute(f'insert into conversation ({names}) values ({marks})', [*new.values()])

@row('list', yardstick=False)
async def open_list(_, bench):
    async def wait():
        began = time.perf_counter()
        page = await server.visitor.get('/')
        if page.text.count('id="c-') != min(50, count): raise Missing('the list is not on the page')
        return (time.perf_counter() - began)*1000
    waits, before, server = {}, 1, bench.server('app')
    async with running(server): await server.watch((await server.ask(bench.question(0, 5)))[1])
    for count in (10, 50, 10_000):
        await asyncio.to_thread(fill_list, server.db, before, count)
        async with running(server): waits[count], before = statistics.median([await wait() for _ in range(40)]), count
    return labelled('first page', {f'{n:,} conversations, ms': waits[n] for n in waits} | {
        '10,000 to 50, ratio': waits[10_000]/waits[50], '10,000 to 10, ratio': waits[10_000]/waits[10]})

@row('start')
async def start(server, bench):
    async with running(bench.server(server.name)) as fresh:
        await asyncio.sleep(1)
        return {'start to first page: s': fresh.started, 'idle memory: RSS, MB': fresh.memory('Rss'),
                'idle memory: PSS, MB': fresh.memory('Pss')}


# ---- Load and faults: what is left of them, and what others feel meanwhile. L-06 to L-10 are the issue's own names

PASSWORD = 'correct horse battery'
HEAD = 'POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\nContent-Type: text/plain\r\n'
FORM = HEAD.replace('text/plain', 'application/x-www-form-urlencoded')

def p99(values): return sorted(values)[int(len(values)*.99)]
def labelled(label, figures): return {f'{label}: {k}': v for k, v in figures.items()}
def descriptors(server): return len(os.listdir(f'/proc/{server.process.pid}/fd'))

@asynccontextmanager
async def house(bench):
    "The app behind a password, on a server of its own: the visitor is signed in, others may guess without end."
    server, salt = bench.server('app'), bytes(16)
    digest = hashlib.scrypt(PASSWORD.encode(), salt=salt, n=2**15, r=8, p=3, maxmem=2**27, dklen=32)
    server.env |= {'APP_PASSWORD_HASH': f'scrypt:15:8:3:{salt.hex()}:{digest.hex()}', 'LOGINS_PER_ADDRESS': '100000',
                   'LOGINS_OVERALL': '100000'}
    async with running(server):
        await server.visitor.post('/login', data={'password': PASSWORD})
        yield server

async def felt(server, load):
    "While `load` goes on, over a new connection each time: how long /healthz takes, how much the memory grows."
    load, before, waits, peak = asyncio.ensure_future(load), server.memory('Rss'), [], 0
    async with httpx.AsyncClient(timeout=20, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)) as one:
        while not load.done() or len(waits) < 50:
            began = time.perf_counter()
            await one.get(server.url + '/healthz')
            waits.append((time.perf_counter() - began)*1000)
            peak = max(peak, server.memory('Rss') - before)
            await asyncio.sleep(.02)
    return {'healthz p99, ms': p99(waits), 'memory grew, MB': peak}, await load

@row('search', yardstick=False, limit=240)
async def search(_, bench):
    async with running(bench.server('app')) as server: await server.ask(bench.question(0, 50))
    await asyncio.to_thread(fill_conversation, server.db, 100_000)
    async with running(server):
        async def wait(typed):
            began = time.perf_counter()
            page = await server.visitor.get('/search', params={'q': typed}, headers={'HX-Request': 'true'})
            if 'role="option"' not in page.text: raise Missing(f'nothing was found for {typed}')
            return 1000 * (time.perf_counter() - began)
        typed = {'a common word': STEMS[0] + ' ', 'the same unfinished': STEMS[0],
                 'one letter': STEMS[0][0], 'two words': ' '.join(STEMS[:2]),
                 'a phrase': f'"{STEMS[0]} {STEMS[1]}"', 'a rare word': STEMS[-1]}
        waits = {name: [await wait(words) for _ in range(5)] for name, words in typed.items()}
    return labelled('search 100,000 messages', {f'{name}, ms': statistics.median(some) for name, some in waits.items()})

@row('export', yardstick=False)
async def export(_, bench):
    "10,000 messages come in as an export of Claude's, go out as a zip, and are said to be here already."
    texts = [''.join(answer('markdown', 200, seed)) for seed in range(40)]
    told = [{'uuid': f'c{n}', 'name': f'Number {n}', 'created_at': '2026-01-01T00:00:00Z', 'chat_messages': [
        {'uuid': f'{n}-{i}', 'parent_message_uuid': f'{n}-{i - 1}', 'sender': ('human', 'assistant')[i % 2],
         'text': texts[(n + i) % 40], 'created_at': f'2026-01-01T00:00:{i:02}Z'} for i in range(20)]}
        for n in range(500)]
    data = json.dumps(told).encode()

    async def come(server):
        began, asks = time.perf_counter(), {'headers': {'HX-Request': 'true'}, 'timeout': 60}
        page = await server.visitor.post('/import', files={'file': ('conversations.json', data)}, **asks)
        while 'every 1s' in page.text: page = (await asyncio.sleep(.01), await server.visitor.get('/import', **asks))[1]
        return time.perf_counter() - began, page.text

    async def go(server):
        began, size = time.perf_counter(), 0
        async with server.visitor.stream('GET', '/export.zip', timeout=60) as zip:
            async for chunk in zip.aiter_bytes(): size += len(chunk)
        return time.perf_counter() - began, size

    async with running(bench.server('app')) as server:
        came, (seconds, said) = await felt(server, come(server))
        if '10,000 messages came in' not in said: raise Missing(said)
        went, (sent, size) = await felt(server, go(server))
        again, _ = await come(server)
    mb = sum(len(text) for text in texts) * 250 / 1e6
    return labelled('10,000 messages come in', {'s': seconds, 'again, s': again} | came) \
        | labelled('10,000 messages go out', {'s': sent, 'MB/s': mb / sent, 'zip, MB': size / 1e6} | went)

async def knock(server, said='', count=1):
    "Connections that say this much and no more."
    writers = [(await asyncio.open_connection('127.0.0.1', server.port))[1] for _ in range(count)]
    for writer in writers: writer.write(said.encode())
    return writers

def leave(writers):
    for writer in writers: writer.close()

async def each(count, parallel, make):
    "The results of `make(n)` for n below `count`, so many at once."
    room = asyncio.Semaphore(parallel)

    async def one(n):
        async with room: return await make(n)
    return await asyncio.gather(*map(one, range(count)))

@row('posts', yardstick=False)
async def posts(_, bench):
    "L-06"
    async with running(bench.server('app')) as server:
        form, began = {'message': bench.question(0, 1)}, time.perf_counter()
        answers = await each(600, 16, lambda _: server.visitor.post('/', data=form, headers={'HX-Request': 'true'}))
        took = time.perf_counter() - began
        await asyncio.sleep(1)
    with closing(sqlite3.connect(server.db)) as db:
        ended = db.execute("select count(*) from message where status = 'done' and role = 'assistant'").fetchone()[0]
    return labelled('600 posts, 16 at once', {'answered 2xx': sum(a.is_success for a in answers),
                                              'replies complete': ended, 's': took})

@row('sockets', yardstick=False)
async def sockets(_, bench):
    "L-07"
    async with running(bench.server('app')) as server:
        path = (await server.ask(bench.question(0, 50)))[1]
        await each(200, 20, lambda _: server.watch(path))
        before, files = server.memory('Rss'), descriptors(server)
        await each(1000, 20, lambda _: server.watch(path))
        await asyncio.sleep(1)
        return labelled('1,000 sockets come and go', {'descriptors more': descriptors(server) - files,
                                                      'memory grew, MB': server.memory('Rss') - before})

@row('heads', yardstick=False)
async def heads(_, bench):
    "L-08"
    async with house(bench) as server:
        half, slow = await knock(server, HEAD, 300), await knock(server, f'{FORM}Content-Length: 60000\r\n\r\n', 20)

        async def drip():
            for _ in range(100):
                for writer in slow: writer.write(b'x')
                await asyncio.sleep(.05)
        figures, _ = await felt(server, drip())
        leave(half + slow)
        return labelled('300 half heads, 20 slow bodies', figures)

@row('silent', yardstick=False)
async def silent(_, bench):
    "As many silent connections as this machine allows, 9,000 at most."
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    async with house(bench) as server:
        files, count = descriptors(server), min(9000, most - 500)
        figures, mute = await felt(server, knock(server, count=count))
        held = descriptors(server) - files
        await asyncio.sleep(12)  # HEADER_SECONDS and a little
        figures |= {'descriptors held': held, '12 s later': descriptors(server) - files}
        leave(mute)
        return labelled(f'{count:,} silent connections', figures)

@row('garbage', yardstick=False)
async def garbage(_, bench):
    "L-09: 20 MB/s by one who has not signed in."
    block, sent, until = b'10000\r\n%s\r\n' % bytes(65_536), 0, time.perf_counter() + bench.args.tokens/50

    async def pour(_):
        nonlocal sent
        while time.perf_counter() < until:
            writer, = await knock(server, f'{FORM}Transfer-Encoding: chunked\r\n\r\n')
            with suppress(OSError):
                while time.perf_counter() < until:
                    writer.write(block)
                    await writer.drain()
                    sent += 65_536
                    await asyncio.sleep(.012)
            writer.close()
    async with house(bench) as server:
        figures, _ = await felt(server, each(4, 4, pour))
        return labelled('garbage by a stranger', figures | {'MB sent': sent/1e6})

async def gaps(server, bench):
    "Milliseconds between the frames of one reply."
    times = []
    async with server.socket((await server.ask(bench.question(50, 300)))[1]) as ws:
        async for _ in ws: times.append(time.perf_counter())
    return [(b - a)*1000 for a, b in pairwise(times)]

@row('guesses', yardstick=False)
async def guesses(_, bench):
    "L-10: 50 wrong passwords a second while a reply streams."
    async with house(bench) as server, httpx.AsyncClient(base_url=server.url, timeout=None, trust_env=False,
                                                         limits=httpx.Limits(max_connections=None)) as thief:
        async def guess(n):
            await asyncio.sleep(n/50)
            told.append(await thief.post('/login', data={'password': f'guess {n}'}, headers={'Origin': server.url}))
        quiet, told = await gaps(server, bench), []
        flood = asyncio.gather(*map(guess, range(400)))
        flooded = await gaps(server, bench)
        flood.cancel()
        with suppress(asyncio.CancelledError): await flood
        return labelled('50 wrong passwords a second', {'answered': len(told), 'frame gap p99, ms': p99(flooded),
                                                        'frame gap p99 without, ms': p99(quiet)})


# ---- The run and its table

async def run_row(name, servers, bench):
    "{figure: {server: [values]}}; a run that fails leaves its reason instead of a value."
    measure, yardstick, limit = ROWS[name]
    figures = {}
    for server in servers[not yardstick:]*bench.args.repeat:
        try:
            async with asyncio.timeout(limit): found = await measure(server, bench)
        except Exception as e: found = {name: e if isinstance(e, Missing) else Missing(f'{type(e).__name__}: {e}')}
        for figure, value in found.items(): figures.setdefault(figure, {}).setdefault(server.name, []).append(value)
    return figures

COLUMNS = '{:<48}{:>10}{:>10}{:>7}{:>7}  {}'.format

def number(v):
    if v is None: return ''
    return f'{v:,.0f}' if v >= 100 or v == int(v) else f'{v:.1f}' if v >= 10 else f'{v:.2f}'

def line(figure, values):
    "One line of the table: both medians, their ratio, how far the app's runs lie apart, the bar and whether it holds."
    for name, seen in values.items():
        for why in (v for v in seen if isinstance(v, Missing)):
            return f'{figure:<48} {name}: {" ".join(str(why).split())[:300]}'
    yard, app = (statistics.median(values[name]) if name in values else None for name in ('yardstick', 'app'))
    ratio = app/yard if app is not None and yard else None
    runs = values.get('app', [])
    spread = f'±{(max(runs) - min(runs))/2/app:.0%}' if app and len(runs) > 1 else ''
    limit, what = BARS.get(figure, (None, None))
    had = {'ratio': ratio, 'app': app}.get(what)
    bar = '' if had is None else f'{"ok  " if had <= limit else "OVER"} ≤ {number(limit)}{"×"*(what == "ratio")}'
    return COLUMNS(figure, number(yard), number(app), number(ratio), spread, bar).rstrip()

async def run(args, folder):
    "Start what is needed, run the rows, print the table; what was started here is ended here."
    fake = await asyncio.create_subprocess_exec(sys.executable, __file__, 'upstream', stdin=PIPE, stdout=PIPE)
    bench = Bench(args, folder, int(await asyncio.wait_for(fake.stdout.readline(), 20)))
    try:
        async with running(bench.server('yardstick')) as yardstick, running(bench.server('app')) as app:
            for server in (yardstick, app):  # the first turn imports and connects: not measured
                await server.reply(bench.question(200, 200))
            print(COLUMNS(f'medians of {args.repeat}', 'yardstick', 'app', 'ratio', 'spread', 'bar'), flush=True)
            for name in args.rows:
                figures = await run_row(name, (yardstick, app), bench)
                print(*(line(figure, values) for figure, values in figures.items()), sep='\n', flush=True)
    except Missing as why: sys.exit(str(why))
    finally:
        await bench.close()
        fake.stdin.close()
        await fake.wait()

async def main(args):
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    print(f'{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, text: {args.text}')
    with tempfile.TemporaryDirectory(prefix='parley-bench-') as folder: await run(args, Path(folder))

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='one short run of each row')
    parser.add_argument('--rows', type=lambda names: names.split(','), default=list(ROWS), help=', '.join(ROWS))
    parser.add_argument('--repeat', type=int)
    parser.add_argument('--text', choices=KINDS, default='markdown')
    parser.add_argument('--app', type=lambda p: Path(p).resolve(), default=MAIN, help='another main.py to weigh')
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS): parser.error(f'no such row: {", ".join(sorted(unknown))}')
    if not args.app.exists(): parser.error(f'{args.app} is missing')
    args.tokens, args.repeat = (150 if args.quick else 500), args.repeat or (1 if args.quick else 3)
    return args

if __name__ == '__main__':
    try: asyncio.run(upstream() if sys.argv[1:] == ['upstream'] else main(arguments()))
    except (KeyboardInterrupt, asyncio.CancelledError): sys.exit('stopped')
