# %% [markdown]
# # Parley
#
# A web chat with Claude that never loses a word, in one file. A person types; the question and an empty reply are
# committed before anything is shown; the reply is written by a task of the server, never by a socket; what a tab shows
# is in the database first. Tabs only watch: they get a snapshot, then what is new, then the end.
#
# | part one: the conversation, knows no HTML | part two: the page, knows no SQL |
# |---|---|
# | 1 Settings, 2 Store, 3 Claude, 4 Turns | 5 Words, 6 Components, 7 Look, 8 Door, 9 Pages, 10 Socket, 11 App |
#
# Read from the top: a section uses only what stands above it. It opens as a notebook too, and every `Try it` cell runs.
#
# It does not: know several people, run several processes on one database, or phone home.

# %%
import asyncio
import base64
import binascii
import contextlib
import contextvars
import csv
import fcntl
import functools
import gc
import hashlib
import hmac
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import zipfile
import zlib
from base64 import urlsafe_b64encode
from bisect import bisect_left
from collections import ChainMap, Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import UTC, datetime
from getpass import getpass
from html import escape, unescape
from ipaddress import ip_network
from itertools import groupby, islice
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import apsw
import httpx2
import nh3
import uvicorn
from fastcore.xml import NotStr
from fasthtml.components import (H1, H2, A, Article, B, Body, Button, Caption, Code, Dd, Desc, Details, Dialog, Div, Dl,
                                 Dt, Figure, Footer, Form, G, Head, Header, Html, Img, Input, Kbd, Label, Li, Link,
                                 Main, Mark, Meta, Nav, Noscript, Optgroup, Option, P, Pre, Progress, Rect, Script,
                                 Select, Span, Summary, Svg, Table, Tbody, Td, Template, Textarea, Th, Thead, Time,
                                 Title, Tr, Ul, to_xml)
from fasthtml.core import APIRouter, FastHTML, FtResponse, HtmxResponseHeaders, HttpHeader, fh_cfg
from fastlite import Database
from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock, paragraph
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from mdit_py_plugins.footnote.index import footnote_def
from pygments.token import STANDARD_TYPES
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import (HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response,
                                 StreamingResponse)
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

NOTEBOOK = 'ipykernel' in sys.modules
log = logging.getLogger('parley')

def try_it(coroutine):
    "Run a coroutine from a cell: a notebook has a loop that runs already, so this one runs beside it."
    with ThreadPoolExecutor(1) as thread: return thread.submit(asyncio.run, coroutine).result()

# %% [markdown]
# ## 1 Settings
#
# Everything that can be set comes from the environment, here and nowhere else, each with a default that works. A value
# that can't be read ends the start with one line that names the setting and quotes nothing: it may be a secret.

# %%
def setting(default, meaning, env='', low=None, high=None, secret=False):
    "A field of `Settings`: read from `env` (else its own name in capitals), a number between `low` and `high`."
    return field(default=default, repr=not secret, metadata=dict(meaning=meaning, env=env, low=low, high=high))

HASH = re.compile(r'scrypt:(\d{1,2}):(\d{1,2}):(\d{1,2}):([0-9a-f]{32}):([0-9a-f]{64})')  # log2 n, r, p, salt, hash
LOUDEST = 1_024  # bytes of a password

@dataclass(frozen=True)
class Settings:
    "What can be set, once, at the start. Durations in seconds, sizes in characters unless the name says bytes."
    api_key: str = setting('', 'your key; with none of these three the demo model answers', 'ANTHROPIC_API_KEY',
                           secret=True)
    auth_token: str = setting('', 'a bearer token instead of a key', 'ANTHROPIC_AUTH_TOKEN', secret=True)
    base_url: str = setting('', 'any server that speaks the Messages API', 'ANTHROPIC_BASE_URL')
    model: str = setting('claude-sonnet-5-5', 'the model that answers where none was chosen')
    max_tokens: int = setting(16_000, 'the longest answer, in tokens', low=1, high=1_000_000)
    prices: str = setting('', 'USD per million tokens, as {"model": [in, out, cache read, cache write]}')
    monthly_usd: float = setting(0.0, 'the most that one person may spend in a month (UTC), with PRICES for any model '
                                 'whose price is unknown; 0 is no cap', low=0, high=1_000_000)
    database_url: str = setting('sqlite:///data/parley.db', 'where conversations are kept')
    host: str = setting('127.0.0.1', 'the address to listen on')
    port: int = setting(5001, 'the port to listen on', low=0, high=65_535)
    session_secret: str = setting('', 'signs sessions; else made once and kept beside the database', secret=True)
    app_password: str = setting('', 'what one signs in with; needed wherever others could reach Parley', secret=True)
    app_password_hash: str = setting('', 'the same, as `python main.py hash` prints it', secret=True)
    allowed_hosts: str = setting('', 'the names Parley is reached by, with commas between')
    trusted_proxies: str = setting('', 'addresses or networks whose X-Forwarded-For and -Proto are believed')
    fly_app_name: str = setting('', 'set by Fly.io')
    session_idle_days: float = setting(30.0, 'how long one stays signed in unseen', low=0.001, high=365)
    session_days: float = setting(90.0, 'how long one stays signed in at all', low=0.001, high=365)
    log_level: str = setting('INFO', 'DEBUG, INFO, WARNING or ERROR')
    drain_seconds: float = setting(3.0, 'how long SIGTERM waits for running replies', low=0, high=600)
    idle_seconds: float = setting(60.0, 'silence after which a reply counts as interrupted', low=0.05, high=3600)
    stall_seconds: float = setting(600.0, 'the same when only pings come: a model may think for minutes', low=0.05,
                                   high=7200)
    retry_seconds: float = setting(20.0, 'how long a busy Claude is tried again', low=0, high=600)
    frame_seconds: float = setting(0.05, 'the time between two commits of what was said, and two frames', low=0.001,
                                   high=1)
    max_message_chars: int = setting(200_000, 'the longest question', low=1, high=10_000_000)
    max_reply_chars: int = setting(2_000_000, 'where an endless reply is cut', low=1, high=50_000_000)
    titles: str = setting('on', 'on or off: a short title by Claude after the first answer')
    max_title_chars: int = setting(60, 'the longest title', low=2, high=400)
    trash_days: float = setting(30.0, 'how long what was deleted stays in the trash', low=0.001, high=3650)
    max_system_chars: int = setting(20_000, 'the longest system prompt', low=1, high=1_000_000)
    max_searches: int = setting(8, 'web searches for one answer, and as many pages fetched', low=1, high=100)
    max_prompts: int = setting(200, 'saved prompts of one person', low=1, high=10_000)
    max_servers: int = setting(20, 'connected servers of one person', low=0, high=100)
    max_field_chars: int = setting(1_024, 'the longest field of a form that is not a message', low=50, high=10_000)
    max_body_bytes: int = setting(4_000_000, 'the longest body of a request', low=1_000, high=200_000_000)
    max_import_bytes: int = setting(2_000_000_000, 'the largest file to import, packed and unpacked', low=1_000,
                                    high=10**12)
    max_file_bytes: int = setting(10_000_000, 'the largest file', low=1, high=20_000_000)
    max_files: int = setting(10, 'files of one message', low=1, high=50)
    max_files_bytes: int = setting(2_000_000_000, 'all files of one person together', low=0, high=10**15)
    files_per_hour: int = setting(1_000, 'files that one person adds', low=1, high=1_000_000)
    max_header_bytes: int = setting(32_768, 'the longest head of a request', low=4_096, high=1_000_000)
    max_frame_chars: int = setting(4_096, 'the longest message a page sends over a socket', low=64, high=1_000_000)
    header_seconds: float = setting(10.0, 'how long the head of a request may take', low=0.1, high=600)
    body_seconds: float = setting(60.0, 'how long a body may take to come, and an answer may wait unread', low=0.1,
                                  high=3600)
    messages_per_hour: int = setting(3_600, 'questions and retries of one person', low=1, high=1_000_000)
    conversations_per_hour: int = setting(1_800, 'new conversations of one person', low=1, high=1_000_000)
    replies_per_person: int = setting(200, 'replies of one person being written at once', low=1, high=10_000)
    replies_overall: int = setting(400, 'replies being written at once', low=1, high=10_000)
    sockets_per_person: int = setting(500, 'open sockets of one person', low=1, high=100_000)
    logins_per_address: int = setting(10, 'wrong passwords from one address in 15 minutes', low=1, high=100_000)
    logins_overall: int = setting(30, 'wrong passwords from anywhere in a minute', low=1, high=100_000)
    min_free_bytes: int = setting(50_000_000, 'what questions leave free on the disk', low=0, high=10**15)

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> 'Settings':
        "Settings from an environment; a blank value counts as not set. Raises `SystemExit` with one line."
        values = {}
        for f in fields(cls):
            name, raw = f.metadata['env'] or f.name.upper(), environ.get(f.metadata['env'] or f.name.upper(), '')
            if raw.strip(): values[f.name] = cls._value(name, f, raw.strip())
        return cls(**values)._checked()

    @staticmethod
    def _value(name, f, raw):
        low, high = f.metadata['low'], f.metadata['high']
        if f.type is str:
            if raw.isprintable() and (raw.isascii() or name == 'APP_PASSWORD'): return raw
            raise SystemExit(f'{name} has a character that can not stand there')
        try: value = f.type(raw)
        except ValueError: value = float('nan')
        if low <= value <= high: return value
        raise SystemExit(f'{name} must be a {"whole " if f.type is int else ""}number from {low} to {high}')

    def _checked(self):
        if not self.database_url.startswith('sqlite:///') or not self.database_url[10:]:
            raise SystemExit('DATABASE_URL must look like sqlite:///data/parley.db: only SQLite is supported so far')
        if self.base_url and not re.match(r'https?://[^\s/\[]+|https?://\[[0-9a-fA-F:.]+\]', self.base_url):
            raise SystemExit('ANTHROPIC_BASE_URL must begin with http:// or https://')
        if self.titles not in ('on', 'off'): raise SystemExit('TITLES must be on or off')
        try: right = all(len(rates) == 4 and 0 <= min(map(float, rates)) and sum(rates) < 1e6
                         for rates in self.own_prices.values())
        except (ValueError, TypeError, AttributeError): right = False
        if not right:
            raise SystemExit('PRICES must look like {"claude-x": [2, 10, 0.2, 2.5]}: in, out, cache read, cache write')
        if self.log_level.upper() not in ('DEBUG', 'INFO', 'WARNING', 'ERROR'):
            raise SystemExit('LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR')
        try: [ip_network(part.strip()) for part in self.trusted_proxies.split(',') if part]
        except ValueError: raise SystemExit('TRUSTED_PROXIES must be addresses or networks, with commas') from None
        return self._locked()

    def _locked(self):
        "Nobody comes in by accident: where others could knock there is a password, and it can't be guessed."
        if self.app_password and self.app_password_hash:
            raise SystemExit('APP_PASSWORD and APP_PASSWORD_HASH are both set: unset one of them')
        if self.app_password and len(self.app_password) < 12:
            raise SystemExit('APP_PASSWORD must have at least 12 characters')
        if len(self.app_password.encode('utf-8', 'replace')) > LOUDEST:
            raise SystemExit(f'APP_PASSWORD must have at most {LOUDEST:,} bytes')
        if self.app_password_hash and not HASH.fullmatch(self.app_password_hash):
            raise SystemExit('APP_PASSWORD_HASH must be what `python main.py hash` prints')
        if not self.locked and (self.fly_app_name or not self.at_home):
            raise SystemExit('others could reach Parley: set APP_PASSWORD to at least 12 characters'
                             + ('' if self.fly_app_name else ', or HOST to 127.0.0.1'))
        return self

    @property
    def own_prices(self) -> dict[str, list[float]]: return json.loads(self.prices or '{}')
    @property
    def database(self) -> Path: return Path(self.database_url.removeprefix('sqlite:///'))
    @property
    def locked(self) -> bool: return bool(self.app_password or self.app_password_hash)
    @property
    def at_home(self) -> bool: return self.host.strip('[]') in ('localhost', '127.0.0.1', '::1')
    @property
    def demo(self) -> bool: return not (self.api_key or self.auth_token or self.base_url)

# %%
if NOTEBOOK:
    print(Settings.read({'MODEL': ' claude-opus-5-5 ', 'ANTHROPIC_API_KEY': 'not shown'}))

# %% [markdown]
# ## 2 Store
#
# One row per message, with its parent, so that a conversation is a tree and its current path is read from the leaf up.
# A reply that is being written lives in `piece`: append-only rows, one per frame, folded into the message when it ends.
# Verbs that write run on one thread with one connection, verbs that only read on another: WAL lets a page be read
# while a slow disk holds a commit. Each verb is one transaction.

# %%
@dataclass
class Conversation:
    "A conversation of one owner. `leaf` is the id of the last message of the path that is shown."
    id: str
    owner: str
    title: str
    leaf: int | None
    created: float  # seconds since 1970, as all times here
    updated: float
    named: int = 0  # who gave the title: 0 its first words, 1 Claude, 2 a person
    pinned: float | None = None  # since when
    trashed: float | None = None  # since when it is in the trash
    seen: float = 0  # when a person last looked at it
    choices: dict = field(default_factory=dict)  # what was chosen for it: model, system prompt, tools …
    answered: float = 0  # when its newest reply ended
    running: bool = False  # a reply is being written; told in the list only

    @property
    def unread(self): return self.answered > self.seen and not self.running
    @property
    def cursor(self): return self.pinned, self.updated, self.id  # its place in the list

@dataclass
class Message:
    """One message. `idx` is its depth on the path from 0; `content` is the exact Markdown that people see and search;
    `note` says how it ended; `blocks` are the API's content blocks when there is more to send back than `content`; of a
    question its files, {'type': 'file', 'sha', 'name', 'kind', 'size'}, `sha` is None where the bytes are not here."""
    id: int
    conversation: str
    owner: str
    parent: int | None
    idx: int
    role: str  # user | assistant
    content: str
    status: str  # streaming | done | stopped | interrupted | failed
    note: str
    model: str
    key: str | None  # made by the page: the same key again is the same send
    created: float
    ended: float | None
    blocks: list = field(default_factory=list)
    meta: dict = field(default_factory=dict)  # of a reply: usage, timings, request id; `summary` of a summary (history)
    siblings: list = field(default_factory=list)  # on a path: the ids of all that stand at its place, oldest first

@dataclass
class Piece:
    """What a running reply said in one frame; (message, seq) is the cursor of whoever watches it. Its `kind` is `text`
    for Markdown, `thought` for thinking, `block` for a content block of the API that is whole, as JSON."""
    message: int
    seq: int
    text: str
    kind: str = 'text'

@dataclass
class Prompt:
    "A system prompt that its owner keeps under a name."
    id: int
    owner: str
    name: str
    text: str

@dataclass
class Remote:
    "An MCP server whose tools Claude may use where `mcp-{id}` is among the choices. Its token leaves only for Claude."
    id: int
    owner: str
    name: str
    url: str
    token: str = field(repr=False)

@dataclass
class Session:
    "Who came in with the password. `id` is an HMAC of what the cookie says, so that reading the file lets nobody in."
    id: str
    owner: str
    password: str  # HMAC of the password it began with: another password ends it
    created: float
    seen: float

@dataclass
class Hit:
    "A title (`message` is None) or a message that a search found. In `snippet` what matched stands between MATCH."
    conversation: str
    title: str
    message: int | None
    role: str
    created: float
    snippet: str

OWNER = 'owner'  # one person for now; every row carries it, so that there can be more
RUNNING = 'streaming'
DAY = 86_400  # seconds
STOPPED = 'Parley was stopped while this was being written.'
STILL_WRITING = 'A reply is still being written: stop it or wait.'
ELSEWHERE = 'This conversation has gone on elsewhere. Your text is not sent yet: read first, then send it again.'
NO_MESSAGE = 'There is no such message here.'

class Refused(Exception):
    "What can't be done, with an HTTP `status` and `words` for the person. `typed` is the text that must not be lost."
    def __init__(self, status: int, words: str, typed: str = '', retry_after: int | None = None):
        super().__init__(words)
        self.status, self.words, self.typed, self.retry_after = status, words, typed, retry_after

class Trashed(Refused):
    "The conversation is in the trash."

class Unusable(Exception):
    "The database can't be used; the text says why in one line, without SQL and without values."

DISK = {apsw.FullError: 'the disk is full', apsw.ReadOnlyError: 'the database is read-only',
        apsw.BusyError: 'another program holds the database', apsw.LockedError: 'another program holds the database',
        apsw.CantOpenError: 'the database file can not be opened', apsw.NotADBError: 'the file is not a database',
        apsw.CorruptError: 'the database is damaged', apsw.IOError: 'the disk reports an error',
        apsw.PermissionsError: 'the database may not be accessed', PermissionError: 'the database may not be accessed'}

@contextlib.contextmanager
def in_words():
    "Turn SQLite's errors into `Unusable`. Which of them a person may meet: https://sqlite.org/rescode.html"
    try: yield
    except (apsw.Error, OSError) as error:
        words = next((DISK[kind] for kind in DISK if isinstance(error, kind)), None)
        raise Unusable(words or f'the database failed ({type(error).__name__})') from error

@contextlib.contextmanager
def transaction(conn, durable=False, kind='immediate'):
    "One transaction. `durable` waits for the disk (FULL): a question survives a power cut, a frame a `kill -9`."
    try:
        if durable: conn.pragma('synchronous', 'full')
        conn.execute(f'begin {kind}')
        yield
        conn.execute('commit')
    except BaseException:
        if conn.in_transaction: conn.execute('rollback')
        raise
    finally:
        if durable: conn.pragma('synchronous', 'normal')

def verb(thread, scope=lambda conn: contextlib.nullcontext()):
    "Make a plain method (self, db, …) a coroutine that runs on the `reads` or the `writes` thread, within `scope`."
    def wrap(work):
        def run(self, asked, args, kwargs):
            db = self.db[thread]
            waited = time.monotonic() - asked  # behind others
            db.conn.set_busy_timeout(max(1, int(1000 * (self.patience - waited))))
            if thread == 'writes': self._look_for_file()
            with in_words(), scope(db.conn): return work(self, db, *args, **kwargs)

        @functools.wraps(work)
        async def call(self, *args, **kwargs):
            loop, asked = asyncio.get_running_loop(), time.monotonic()
            return await loop.run_in_executor(self.threads[thread], run, self, asked, args, kwargs)
        return call
    return wrap

reads = verb('reads', functools.partial(transaction, kind='deferred'))  # all that a verb reads is of one moment
writes = verb('writes', transaction)
writes_durably = verb('writes', functools.partial(transaction, durable=True))

ENDLESS = 1 << 60  # deeper than any path
# the text of a message, wherever it is kept at the moment
TEXT = """content || coalesce((select group_concat(text, '' order by seq) from piece
                               where message = m.id and kind = 'text'), '')"""
MINE = 'from file where sha = ? and exists (select 1 from attached where owner = ? and sha = file.sha)'
# a page of the list; `{}` is where the last one ended
LISTED = '''select *, exists (select 1 from message where conversation = c.id and status = 'streaming') as running
from conversation c where owner = ? and trashed is null {} order by pinned desc, updated desc, id desc limit ?'''
PATH = f'''with recursive path(id) as (
    select coalesce(:leaf, leaf) from conversation where id = :conversation and owner = :owner and trashed is null
    union all select m.parent from message m join path on m.id = path.id where m.idx > :first)
select m.id, conversation, owner, parent, idx, role, {TEXT} as content, status, note, model, key, created, ended,
       blocks, meta, (select json_group_array(id order by id) from message
                      where conversation = m.conversation and parent is m.parent) as siblings
from message m join path on m.id = path.id where m.idx < :before order by idx'''
# the end of the path that leads on from a message, always by the newest; a child's id is greater than its parent's
NEWEST = '''with recursive down(id) as (
    select :m union all select (select max(id) from message where conversation = :c and parent = down.id) from down
    where down.id is not null)
select max(id) from down'''

# Numbered steps by `user_version`, each one transaction. A step that was released is never edited: a new one follows.
SCHEMA = ['''
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
''', '''
alter table conversation add column named integer not null default 0;
alter table conversation add column pinned float;
alter table conversation add column trashed float;
alter table conversation add column seen float not null default 0;
alter table conversation add column choices text not null default '{}';
update conversation set seen = unixepoch('subsec');
alter table message add column blocks text not null default '[]';
alter table message add column meta text not null default '{}';
alter table piece add column kind text not null default 'text';
create table known (name text primary key, value text, at float);
create table prompt (id integer primary key, owner text, name text, text text);
create unique index prompt_by_name on prompt (owner, name);
create view said as select id, spaced(content) as text from message;
create view titled as select rowid as id, spaced(title) as text from conversation;  -- never VACUUM: it moves rowids
create virtual table said_index using fts5(text, content=said, content_rowid=id, prefix='1 2',
    tokenize="unicode61 remove_diacritics 2 categories 'L* N* Co M*'");
create virtual table titled_index using fts5(text, content=titled, content_rowid=id, prefix='1 2',
    tokenize="unicode61 remove_diacritics 2 categories 'L* N* Co M*'");
create trigger said_new after insert on message begin
    insert into said_index (rowid, text) values (new.id, spaced(new.content)); end;
create trigger said_gone after delete on message begin
    insert into said_index (said_index, rowid, text) values ('delete', old.id, spaced(old.content)); end;
create trigger said_anew after update of content on message when old.content <> new.content begin
    insert into said_index (said_index, rowid, text) values ('delete', old.id, spaced(old.content));
    insert into said_index (rowid, text) values (new.id, spaced(new.content)); end;
create trigger titled_new after insert on conversation begin
    insert into titled_index (rowid, text) values (new.rowid, spaced(new.title)); end;
create trigger titled_gone after delete on conversation begin
    insert into titled_index (titled_index, rowid, text) values ('delete', old.rowid, spaced(old.title)); end;
create trigger titled_anew after update of title on conversation when old.title <> new.title begin
    insert into titled_index (titled_index, rowid, text) values ('delete', old.rowid, spaced(old.title));
    insert into titled_index (rowid, text) values (new.rowid, spaced(new.title)); end;
insert into said_index (said_index) values ('rebuild');
insert into titled_index (titled_index) values ('rebuild');
drop index message_by_parent;
create index message_by_parent on message (conversation, parent);
create table draft (owner text, conversation text, text text, at float, primary key (owner, conversation));
create trigger draft_with_conversation after delete on conversation begin
    delete from draft where conversation = old.id; end;
create table file (sha text primary key, kind text, size integer, content blob);
create table attached (owner text, sha text references file(sha), created float,
    message integer references message(id) on update cascade on delete cascade);
create unique index attached_once on attached (owner, sha, message);
create unique index attached_unsent on attached (owner, sha) where message is null;
create index attached_by_message on attached (message);
create index attached_by_file on attached (sha);
create trigger file_sent after insert on message when new.blocks like '%"file"%' begin
    insert or ignore into attached (owner, sha, created, message)
        select owner, sha, new.created, new.id from attached where owner = new.owner and sha in
        (select value ->> 'sha' from json_each(new.blocks) where value ->> 'type' = 'file');
    delete from attached where message is null and owner = new.owner and sha in (
        select sha from attached where message = new.id);
end;
create trigger file_unused after delete on attached begin
    delete from file where sha = old.sha and not exists (select 1 from attached where sha = old.sha);
end;
alter table conversation add column answered float not null default 0;
create index conversation_listed on conversation (owner, pinned, updated, id) where trashed is null;
create index conversation_trashed on conversation (trashed) where trashed is not null;
create table usage (id integer primary key, owner text, at float, model text, purpose text, input integer,
    output integer, cache_read integer, cache_write integer, searches integer, cost float);
create index usage_by_time on usage (owner, at, cost);
-- ids are never used again: a choice of a server that is gone must not mean another one
create table server (id integer primary key autoincrement, owner text, name text, url text, token text);
create unique index server_by_name on server (owner, name);
''']

# Scripts that put no spaces between words: each of their letters is a word, and a run of them a phrase.
UNSPACED = re.compile('([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff'
                      '\U00020000-\U0003ffff])')
GAP, MATCH = '\u200b', '\ue000\ue001'  # what is put between them; what marks the begin and the end of a match

def spaced(text: str) -> str:
    "What is indexed for `text`. It is part of the schema: the index holds what this says."
    return text if text.isascii() else UNSPACED.sub(rf'{GAP}\1{GAP}', text)

def query_of(typed: str) -> str:
    "Whatever was typed as an FTS5 query: words and “phrases” that all must occur, the last word perhaps unfinished."
    terms = [(said or word).replace('\0', ' ') for said, word in re.findall(r'["“”]([^"“”]*)["“”]|([^\s"“”]+)', typed)]
    terms = [spaced(term) for term in terms if any(letter.isalnum() for letter in term)][:20]
    unfinished = '*' * (bool(terms) and unicodedata.category(typed[-1])[0] in 'LNM')
    return ' '.join(f'"{term}"' for term in terms) + unfinished

# A citation as `cited` writes it; what a person reads of it is its number.
CITATION = re.compile(r'\[([⁰¹²³⁴-⁹]+)\]\(<[^<>\n]{0,2100}> "[^"\n]{0,3000}"\)')
LETTER, OTHER, SEEN = r'[^\W_]', r'[\W_]', 50_000  # what the index takes for a word; how far a text is looked through

@functools.cache
def unaccented() -> dict[int, str]:
    return {n: parts[0] for n in range(0xc0, 0x2000) if len(parts := unicodedata.normalize('NFD', chr(n))) > 1}

def folded_letters(text: str) -> str:
    "Small letters without accents, one for each, so that a place in them is a place in the text."
    return (text if text.isascii() else text.translate(unaccented())).lower()

def around(text: str, query: str) -> str:
    "The words around the first match in a text, matches marked: SQLite's `snippet` is quadratic in the matches."
    sought, terms = [], [re.findall(LETTER + '+', folded_letters(term)) for term in re.findall('"([^"]*)"', query)]
    for n, words in enumerate(filter(None, terms), 1):
        begins = '' if UNSPACED.match(words[0]) else f'(?<!{LETTER})'
        ends = '' if UNSPACED.match(words[-1][-1]) or n == len(terms) and query[-1] == '*' else f'(?!{LETTER})'
        sought.append(f'{begins}{f"{OTHER}*".join(words[:8])}{ends if len(words) <= 8 else ""}')
    sought, first = re.compile('|'.join(dict.fromkeys(sought)) or '(?!)'), None
    for shown in dict.fromkeys((CITATION.sub(r'\1', text), text)):
        if first := sought.search(plain := folded_letters(shown)): break
    at = first.start() if first else 0
    start = at - 60 if at > 80 else 0
    start = start and max(start, shown.find(' ', start, at) + 1)
    end = min(start + 200, len(shown))
    parts, last = ['…' * bool(start)], start
    for match in sought.finditer(plain, at, end):
        parts += [shown[last:match.start()], MATCH[0], shown[match.start():match.end()], MATCH[1]]
        last = match.end()
    return ''.join([*parts, shown[last:end], '…' * (end < len(shown))])

# The newest matches are ranked, not all: a common word is in every second message.
HITS = '''with found (id, rank) as materialized (
    select said_index.rowid, bm25(said_index) from said_index join message m on m.id = said_index.rowid
    join conversation c on c.id = m.conversation
    where said_index match :query and m.owner = :owner and c.trashed is null order by said_index.rowid desc limit 500)
select m.id as message, m.conversation, c.title, m.role, m.created from found
join message m on m.id = found.id join conversation c on c.id = m.conversation
order by rank / (1 + max(0, :now - m.created) / 31536000) limit :limit'''
TITLES = '''select c.id as conversation, c.title, null as message, '' as role, c.updated as created,
    highlight(titled_index, 0, :start, :end) as snippet
from titled_index join conversation c on c.rowid = titled_index.rowid
where titled_index match :query and c.owner = :owner and c.trashed is null order by c.updated desc limit :limit'''

SERVER_URL = re.compile(r'(https://([a-z0-9._-]+|\[[0-9a-f:]+\])|http://(localhost|127(\.\d{1,3}){3}|\[::1\]))'
                        r'(:\d{1,5})?([/?][!-~]*)?', re.IGNORECASE)

JSON_COLUMNS = ('choices', 'blocks', 'meta', 'siblings')
# what a call is counted in, as the API says it and as it is booked
TOKENS = {'input_tokens': 'input', 'output_tokens': 'output', 'cache_read_input_tokens': 'cache_read',
          'cache_creation_input_tokens': 'cache_write', 'searches': 'searches'}

def number(meta: dict, name: str) -> float:
    "A number of a message's `meta`, which may have come by an import: 0 for anything else."
    return meta[name] if type(meta.get(name)) in (int, float) and 0 <= meta[name] < 1e12 else 0

def as_row(row: dict, kind):
    "A row as an object of its class: columns that hold JSON become what they stand for."
    return kind(**{name: json.loads(value) if name in JSON_COLUMNS else value for name, value in row.items()})

def derived(*parts: str) -> str:
    "The id of a conversation that came from elsewhere: the same each time."
    return urlsafe_b64encode(hashlib.sha256(json.dumps(parts).encode()).digest()[:12]).decode()

def folded(pieces: list[tuple[str, str]]) -> tuple[str, list[dict]]:
    """What a reply said, from its (kind, text) in order: its Markdown, and the API's blocks if it is more than text.
    A whole block takes the place of what was heard of it before; what never became whole stays as far as it was heard,
    thinking without its signature."""
    content, blocks, heard = ''.join(text for kind, text in pieces if kind == 'text'), [], {'text': '', 'thought': ''}
    def flush():
        if heard['thought']: blocks.append({'type': 'thinking', 'thinking': heard['thought']})
        if heard['text'].strip(): blocks.append({'type': 'text', 'text': heard['text']})
        heard.update(text='', thought='')
    for kind, text in pieces:
        if kind != 'block':
            if not heard[kind]: flush()
            heard[kind] += text
            continue
        block = json.loads(text)
        own = {'text': 'text', 'thinking': 'thought'}.get(block['type'])
        if own: heard[own] = ''
        flush()
        blocks.append(block)
    flush()
    return content, blocks if any(block.keys() != {'type', 'text'} for block in blocks) else []

# How a file begins tells what it is; its name and what a browser says tell nothing. What is none of these may be text.
BEGINS = {'image/png': rb'\x89PNG\r\n\x1a\n....IHDR', 'image/jpeg': rb'\xff\xd8\xff', 'image/gif': rb'GIF8[79]a',
          'image/webp': rb'RIFF....WEBPVP8[ LX]', 'application/pdf': rb'%PDF-'}
IMAGES, PDF, PLAIN_TEXT = [kind for kind in BEGINS if kind.startswith('image/')], 'application/pdf', 'text/plain'
# The API refuses an image that is larger, and with it every later request of its conversation; base64 takes a third:
# https://platform.claude.com/docs/en/build-with-claude/vision
EDGE, PIXELS, IMAGE_BYTES = 8_000, 50_000_000, 3_900_000

def kind_of(content: bytes) -> str:
    "The media type of a file, by its bytes; nothing is decoded. Raises `Refused` 413, 415 and 422."
    if not content.strip(b'\0\t\n\f\r '): raise Refused(422, 'it is empty')
    kind = next((kind for kind, begins in BEGINS.items() if re.match(begins, content, re.DOTALL)), PLAIN_TEXT)
    if kind in IMAGES:
        width, height = pixels(kind, content)
        if not width or not height or broken_off(kind, content): raise Refused(422, 'it is no whole image')
        if max(width, height) > EDGE or width * height > PIXELS:
            raise Refused(413, f'it has {width:,} × {height:,} pixels; {EDGE:,} each way and '
                               f'{PIXELS // 10**6} million are the most')
        if len(content) > IMAGE_BYTES: raise Refused(413, f'an image may have {weight_in_words(IMAGE_BYTES)}')
    elif kind == PDF:
        if b'%%EOF' not in content[-2_048:]: raise Refused(422, 'it is no whole PDF')
        if re.search(rb'/Encrypt\s+\d+\s+\d+\s+R', content): raise Refused(422, 'it is a PDF with a password')
    else:
        try: text = content.decode('utf-8')
        except ValueError: text = '\0'
        if len(re.findall(r'[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]', text)) > len(text) // 100 or '\0' in text:
            raise Refused(415, 'only PNG, JPEG, GIF and WebP images, PDFs and text in UTF-8 can be read')
    return kind

def pixels(kind: str, content: bytes) -> tuple[int, int]:
    "Width and height as the head of an image says them, (0, 0) if it doesn't."
    def number(at, length, order='big'): return int.from_bytes(content[at:at + length], order)
    match kind, content[15:16]:
        case 'image/png', _: return number(16, 4), number(20, 4)
        case 'image/gif', _: return number(6, 2, 'little'), number(8, 2, 'little')
        case 'image/webp', b'X': return number(24, 3, 'little') + 1, number(27, 3, 'little') + 1
        case 'image/webp', b'L': return number(21, 4, 'little') % 2**14 + 1, (number(21, 4, 'little') >> 14) % 2**14 + 1
        case 'image/webp', _: return number(26, 2, 'little') % 2**14, number(28, 2, 'little') % 2**14
    at = 2
    for _ in range(1_000):  # the segments of a JPEG, until the one of its frame: ITU-T T.81, B.1 and B.2
        if content[at:at + 1] != b'\xff': break
        mark = number(at + 1, 1)
        if 0xc0 <= mark <= 0xcf and mark not in (0xc4, 0xc8, 0xcc): return number(at + 7, 2), number(at + 5, 2)
        at += 1 if mark == 0xff else 2 + number(at + 2, 2)
    return 0, 0

def broken_off(kind: str, content: bytes) -> bool:
    "Whether the end of an image is missing, as far as its format says."
    return (kind == 'image/png' and b'IEND\xaeB`\x82' not in content
            or kind == 'image/gif' and not content.rstrip(b'\0').endswith(b';')
            or kind == 'image/webp' and int.from_bytes(content[4:8], 'little') + 8 > len(content))

def kind_of_new(name: str, content: bytes) -> str:
    """The same of a file that is sent here: it must not be text under the name of an image or a PDF, and an image must
    end where its file does, but for zeros. Those that came in before stay what they are."""
    kind, whole, size = kind_of(content), content.rstrip(b'\0'), int.from_bytes(content[4:8], 'little') + 8
    if kind == PLAIN_TEXT and re.search(r'\.(png|jpe?g|gif|webp|pdf)$', name, re.IGNORECASE):
        raise Refused(415, 'its name is one of an image or a PDF, but it is text')
    if (kind == 'image/png' and whole.partition(b'IEND\xaeB`\x82')[2] or kind == 'image/webp' and len(whole) > size
            or kind == 'image/jpeg' and not whole.endswith(b'\xff\xd9')):
        raise Refused(422, 'it is no whole image, or something else stands behind it')
    return kind

def file_name(said: str) -> str:
    "What a file is called here: its name without a path, in printable characters, not too long. It is only ever shown."
    name = ''.join(filter(str.isprintable, re.split(r'[/\\]', said)[-1])).strip(' .')
    return (name if len(name) <= 100 else name[:80] + '…' + name[-19:]) or 'file'

def weight_in_words(size: int) -> str:
    return f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.0f} KB' if size >= 1e3 else f'{size} B'

def lock(database: Path, tries=10):
    """One process per database: a second one would end the replies of the first. A kill frees the lock. Returns the
    file that holds it. Raises `Unusable`."""
    held = open(os.open(database.with_name(database.name + '.lock'), os.O_RDWR | os.O_CREAT, 0o600), 'w')
    for wait in (0.3,) * tries + (0,):  # the process before this one may just be ending
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except BlockingIOError: time.sleep(wait)
    raise Unusable('another Parley is using the database')

@contextlib.contextmanager
def examined(database: Path):
    "A connection that only reads a database of ours. What isn't ours is refused, and not changed even by opening it."
    with in_words(), contextlib.closing(apsw.Connection(str(database), flags=apsw.SQLITE_OPEN_READONLY)) as conn:
        conn.set_busy_timeout(5000)
        version = conn.pragma('user_version')
        if version > len(SCHEMA): raise Unusable('the database was written by a newer Parley')
        if not version and conn.execute('select 1 from sqlite_master').fetchone():
            raise Unusable('the file is a database, but not one of Parley')
        yield conn

# what a copy that leaves the machine by the page is without
SECRETS = ['delete from session', "update server set token = ''"]

def copy_database(database: Path, file: Path, without=(), spare=1_000_000) -> Path:
    """A consistent copy, also of a database in use, by SQLite's own backup (https://sqlite.org/backup.html): all of it
    or nothing, readable by its owner only, never in place of a file that exists. Raises `Unusable`."""
    if file.exists(): raise Unusable(f'there is a file {file.name} already')
    if not file.parent.is_dir(): raise Unusable(f'there is no folder {file.parent}')
    part = file.with_name(f'{file.name}.{secrets.token_hex(4)}.part')
    try:
        with examined(database) as source:
            size = source.pragma('page_count') * source.pragma('page_size')
            if shutil.disk_usage(file.parent).free < size + spare: raise apsw.FullError
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            with contextlib.closing(apsw.Connection(str(part))) as target:
                with target.backup('main', source, 'main') as copying: copying.step()  # one snapshot, and no lock
                target.pragma('journal_mode', 'delete')  # one file, with nothing beside it
                target.pragma('secure_delete', True)
                for sql in without: target.execute(sql)
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # nobody else made one meanwhile
            part.replace(file)
        return file
    finally:
        for left in part.parent.glob(part.name + '*'): left.unlink()

def free_name(name: str) -> Path:
    "The file of that name, with a number behind it if there is one."
    return next(file for n in range(1, 10_000) if not (file := Path(f'{name}.{n}' if n > 1 else name)).exists())

def restore_database(file: Path, database: Path, replace: bool) -> Path | None:
    """Put a backup in place of the database, which is kept under the name that is returned. Raises `Unusable`, and then
    nothing has changed, unless it was a renaming that failed: then what was there has the name it is kept under."""
    part, kept = database.with_name(f'{database.name}.{secrets.token_hex(4)}.part'), None
    try:
        with in_words():
            with examined(file) as conn:
                if not conn.pragma('user_version'): raise Unusable('the file is not a database of Parley')
                if conn.pragma('quick_check') != 'ok': raise Unusable('the backup is damaged')
            database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with lock(database, 0):
                if database.exists() and not replace: raise Unusable('there is a database already: say --replace')
                copy_database(file, part)
                if database.exists():
                    kept = free_name(f'{database}.{time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())}')
                    for beside in ('-wal', '-shm', ''):  # first what would be taken for the new one's
                        with contextlib.suppress(FileNotFoundError):
                            Path(f'{database}{beside}').rename(f'{kept}{beside}')
                part.rename(database)
        return kept
    finally: part.unlink(missing_ok=True)

def unbroken(text: str) -> str:
    "`text` as it can be kept and sent: half a surrogate pair that stands alone is no letter, it becomes U+FFFD."
    return text if text.isascii() else text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')

def is_block(block) -> bool:
    "Whether something has the form of a content block. What else is in it may be anything."
    return isinstance(block, dict) and isinstance(block.get('type'), str) and all(
        isinstance(block.get(name, ''), str) for name in ('text', 'thinking'))

CONTROLS = re.compile(r'[\s\0-\x1f\x7f-\x9f]+')

def in_a_line(text, most):
    "Text in one line of `most` characters, cut between words where there are any."
    line = ' '.join(text.split(None, 60)[:60])
    return line if len(line) <= most else line[:most - 1].rsplit(' ', 1)[0] + '…'

class Store:
    """Every SQL statement, as verbs. Opening it makes or migrates the database, ends what a crash left running and
    takes the lock of the one process that may write. Raises `Unusable` when that can't be."""
    patience = 5.0  # seconds: the most that anybody waits for a lock

    def __init__(self, file: Path, limits: Settings | None = None):
        self.file, self.limits = file.resolve(), limits or Settings()  # a link has no lock of its own
        self.threads = {name: ThreadPoolExecutor(1, name) for name in ('reads', 'writes')}
        self.db: dict[str, Database] = {}
        with in_words(): self._open()

    def _open(self):
        self._private_folder()
        self.lock = lock(self.file)
        if self.file.is_dir(): raise Unusable('the database is a folder')
        if self.file.exists() and not self.file.stat().st_size:
            raise Unusable('the database file is empty: restore it, or delete it to begin anew')
        logging.getLogger('apsw').setLevel(logging.CRITICAL)  # it would print failing SQL
        for left in self.file.parent.glob(f'{self.file.name}.*.part*'): left.unlink()  # copies that a kill cut off
        if self.file.exists():
            with examined(self.file): pass
        self.db = {name: Database(apsw.Connection(str(self.file))) for name in self.threads}
        for db in self.db.values():
            db.conn.set_busy_timeout(5000)
            db.conn.create_scalar_function('spaced', spaced, 1, deterministic=True)
            db.conn.pragma('synchronous', 'normal')
            db.conn.pragma('secure_delete', 'fast')  # a token that is deleted is in no backup either
        self.db['reads'].conn.pragma('query_only', True)
        for file in self.file.parent.glob(self.file.name + '*'): file.chmod(0o600)
        opened = self.file.stat()
        self.opened = opened.st_dev, opened.st_ino
        self._migrate(self.db['writes'])
        self._sweep(self.db['writes'])

    def _look_for_file(self):
        "What is written to a file that has been deleted, or moved away, goes when Parley ends. Raises `Unusable`."
        with contextlib.suppress(OSError):
            now = self.file.stat()
            if (now.st_dev, now.st_ino) == self.opened: return
        raise Unusable('the database file is not there any more')

    def _private_folder(self):
        folder = self.file.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
        # a folder that others share on purpose (sticky, as /tmp) is left as it is; the files in it are 0600 anyway
        if mode & 0o077 and not mode & stat.S_ISVTX and folder.stat().st_uid == os.getuid(): folder.chmod(0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise Unusable(f'the folder can not be written: it is read-only, or chown it to user {os.getuid()}')

    def _migrate(self, db):
        "Bring an older database up to date, step by step; before that, a copy is put beside it."
        version, kept = db.conn.pragma('user_version'), None
        try:
            if 0 < version < len(SCHEMA):
                kept = copy_database(self.file, free_name(f'{self.file}.version-{version}'))
            with in_words():
                for number, step in enumerate(SCHEMA[version:], version + 1):
                    with transaction(db.conn, durable=True):
                        db.conn.execute(step).fetchall()
                        db.conn.pragma('user_version', number)
        except Unusable as error:
            if kept and db.conn.pragma('user_version') == version: kept.unlink()  # it would only be a second one
            raise Unusable(f'it can not be brought up to date, and stays as it was: {error}') from error
        if kept: log.info('the database was brought up to date; as it was it is kept as %s', kept.name)

    def _sweep(self, db):
        "After a crash no row says `streaming`: what was running is interrupted and keeps its text."
        with transaction(db.conn, durable=True):
            for row in db.q('select id from message where status = ?', [RUNNING]):
                self._end(db, row['id'], 'interrupted', STOPPED)

    def close(self):
        for thread in self.threads.values(): thread.shutdown()
        for db in self.db.values(): db.conn.close()
        self.lock.close()

    def secret(self) -> str:
        "The key that signs sessions: made once, kept beside the database, readable by its owner only."
        file = self.file.with_name('session.secret')
        with in_words():
            if not file.exists() or not file.read_text().strip():
                file.unlink(missing_ok=True)
                with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'w') as new:
                    new.write(secrets.token_urlsafe(32))
            file.chmod(0o600)
            return file.read_text().strip()

    @writes
    def check(self, db):
        "Write something that changes nothing, so that `/healthz` knows. Raises `Unusable`."
        db.conn.pragma('user_version', len(SCHEMA))

    @reads
    def conversations(self, db, owner, after=None, limit=51) -> list[Conversation]:
        """What is pinned first, then what was written in last; a further page begins `after` a `Conversation.cursor`.
        A page of the list shows all but the last of these, which is there to say that there are more."""
        match after:
            case None: where, values = '', []
            case None, updated, id: where, values = 'and pinned is null and (updated, id) < (?, ?)', [updated, id]
            case _: where, values = 'and (pinned is null or (pinned, updated, id) < (?, ?, ?))', [*after]
        return [as_row(row, Conversation) for row in db.q(LISTED.format(where), [owner, *values, limit])]

    @writes
    def see(self, db, owner, conversation) -> bool:
        "A person has looked at it; whether that is news."
        db.execute('update conversation set seen = ? where id = ? and owner = ? and seen < answered',
                   [time.time(), conversation, owner])
        return bool(db.conn.changes())

    @writes
    def pin(self, db, owner, conversation, pinned: bool):
        self._conversation(db, owner, conversation)
        db.execute('update conversation set pinned = ? where id = ?', [time.time() if pinned else None, conversation])

    @writes
    def rename(self, db, owner, conversation, title) -> Conversation:
        "A title by a person. Raises `Refused` 404, 422 blank, 413 too long."
        title, most = CONTROLS.sub(' ', title).strip(), self.limits.max_title_chars
        if not any(c.isprintable() and c != ' ' for c in title): raise Refused(422, 'A title needs a word or two.')
        if len(title) > most: raise Refused(413, f'This title has {len(title):,} characters; {most} are allowed.')
        db.execute('update conversation set title = ?, named = 2 where id = ?',
                   [title, self._conversation(db, owner, conversation).id])
        return self._conversation(db, owner, conversation)

    @writes_durably
    def trash(self, db, owner, conversation=None) -> float:
        "Move a conversation to the trash, or all. Returns when, which `restore` takes."
        now = time.time()
        if conversation: self._conversation(db, owner, conversation)
        where, values = ('id = ?', [conversation]) if conversation else ('owner = ?', [owner])
        db.execute(f'update conversation set trashed = ? where {where} and trashed is null', [now, *values])
        return now

    @writes_durably
    def restore(self, db, owner, conversation=None, since=None) -> list[str]:
        "Take a conversation from the trash, or all that were put there together. Returns their ids."
        back = db.q("""update conversation set trashed = null where owner = ? and (id = ? or trashed = ?)
                       and trashed > ? returning id""", [owner, conversation, since, self.kept_since()])
        return [row['id'] for row in back]

    @reads
    def trashed(self, db, owner, limit=200) -> tuple[list[Conversation], int]:
        "What was deleted last, and how much there is in all."
        where = 'from conversation where owner = ? and trashed > ?'
        rows = db.q(f'select * {where} order by trashed desc limit ?', [owner, self.kept_since(), limit])
        count = db.q(f'select count(*) as n {where}', [owner, self.kept_since()])[0]['n']
        return [as_row(row, Conversation) for row in rows], count

    def kept_since(self): return time.time() - self.limits.trash_days * DAY

    @writes_durably
    def give_up(self, db, owner, conversation=None):
        "Delete for ever what is in the trash, or one of it: nobody finds it any more, and `sweep` takes it away."
        db.execute('update conversation set trashed = 0 where owner = ? and trashed is not null and id = ifnull(?, id)',
                   [owner, conversation])

    @writes
    def sweep(self, db) -> bool:
        "Take away a little of what was in the trash for too long. Returns whether there may be more."
        old = db.q('''select id from conversation c where trashed <= ? and not exists
            (select 1 from message where conversation = c.id and status = 'streaming') limit 1''', [self.kept_since()])
        for row in old:
            db.execute('delete from message where id in (select id from message where conversation = ? limit 500)',
                       [row['id']])
            if not db.conn.changes(): db.execute('delete from conversation where id = ?', [row['id']])
        return bool(old)

    @reads
    def search(self, db, owner, typed, limit=30) -> list[Hit]:
        "Titles first, then messages, the best and newest first, on whatever branch. Anything may be typed."
        values = dict(query=query_of(typed), owner=owner, now=time.time(), limit=limit, start=MATCH[0], end=MATCH[1])
        if not values['query']: return []
        titles, said = db.q(TITLES, values), db.q(HITS, values)
        texts = {row['id']: row['text'] for row in db.q(
            'select id, substr(content, 1, ?) as text from message where id in (select value from json_each(?))',
            [SEEN, json.dumps([hit['message'] for hit in said])])}
        return [Hit(**hit | {'snippet': hit['snippet'].replace(GAP, '')}) for hit in titles] + [
            Hit(**hit, snippet=around(texts[hit['message']], values['query'])) for hit in said]

    @writes
    def reindex(self, db):
        "Make the index of the search anew from what is there."
        for name in ('said_index', 'titled_index'): db.execute(f"insert into {name} ({name}) values ('rebuild')")

    @reads
    def path(self, db, owner, conversation, first=0, before=ENDLESS, last=None, reach=ENDLESS
             ) -> tuple[Conversation, list[Message]]:
        """A conversation and the messages of its current path, from depth `first` on and `before` a depth; of these
        only the `last` so many, and more when it takes more to `reach` a depth. Raises `Refused` 404."""
        found = self._conversation(db, owner, conversation)
        if last: first = max(first, min(reach, min(before, self._row(db, found.leaf).idx + 1) - last))
        return found, self._path(db, owner, conversation, first, before)

    @reads
    def kept(self, db, owner) -> list[str]:
        "The ids of all conversations that are not in the trash, oldest first."
        rows = db.q('select id from conversation where owner = ? and trashed is null order by created, id', [owner])
        return [row['id'] for row in rows]

    @reads
    def sent_files(self, db, owner) -> list[str]:
        "The sha256 of all files in conversations that are not in the trash."
        rows = db.q('select distinct sha from attached a join message m on m.id = a.message join conversation c '
                    'on c.id = m.conversation where a.owner = ? and c.trashed is null order by sha', [owner])
        return [row['sha'] for row in rows]

    @reads
    def tree(self, db, owner, conversation) -> tuple[Conversation, list[Message]]:
        "A conversation and all its messages, in the order they came. Raises `Refused` 404."
        found = self._conversation(db, owner, conversation)
        rows = db.q(f'select *, {TEXT} as content from message m where conversation = ? order by id', [conversation])
        return found, [as_row(row, Message) for row in rows]

    @writes
    def bring_in(self, db, owner, told: dict, placed: list[int], here: dict) -> int:
        """Save what is missing of a conversation as `ours` tells it, 100 messages a call, until `placed` has the id of
        each; says how many were new. A message is the same if its parent, role and time are: `here` are those that were
        there before; one that has grown since then is what it has become. After each call the tree is whole, so nothing
        has to be undone if the next one fails."""
        messages, new = told['messages'], 0
        rows = db.q('select * from conversation where id = ?', [told['id']])
        if rows and rows[0]['owner'] != owner:  # somebody else has brought in the same
            told['id'] = derived(owner, 'parley', told['id'])
            return self.bring_in.__wrapped__(self, db, owner, told, placed, here)
        if rows and rows[0]['trashed'] is not None or placed and not rows:  # there it stays; or it was deleted just now
            placed += [0] * (len(messages) - len(placed))
            return 0
        if not rows:
            here[None] = True  # all is new, the path that is shown too
            row = {name: value for name, value in told.items() if name not in ('messages', 'path')}
            self._insert(db, 'conversation', owner=owner, seen=time.time(), **row)
        elif not placed:
            for row in db.q('select id, parent, role, created, length(content) as size from message '
                            'where conversation = ? order by id desc', [told['id']]):
                here.setdefault((row['parent'], row['role'], row['created']), []).append((row['id'], row['size']))
        self._room_for()
        for message in messages[len(placed):]:
            parent = None if message['parent'] is None else placed[message['parent']]
            if same := here.get((parent, message['role'], message['created'])):
                id, size = same.pop()
                placed.append(id)
                new += len(message['content']) > size and self._grow(db, id, message)
            else:
                for file in message.get('blocks', ()):  # of a file whose bytes are not here only the name is kept
                    if file['type'] != 'file' or db.q(f'select 1 {MINE}', [file['sha'], owner]): continue
                    file['sha'] = None
                row = message | {'parent': parent, 'conversation': told['id'], 'owner': owner}
                placed.append(self._insert(db, 'message', **row))
                new += 1
            if new == 100: break
        path = told['path'][:bisect_left(told['path'], len(placed))] or [len(placed) - 1]
        running = 'select 1 from message where conversation = ? and status = ?'
        followed = None in here or any(placed[n] == rows[0]['leaf'] for n in reversed(path))
        if new and followed and not db.q(running, [told['id'], RUNNING]):
            db.execute('update conversation set leaf = ?, updated = max(updated, ?) where id = ?',
                       [placed[path[-1]], told['updated'], told['id']])
        return new

    def _grow(self, db, id, message) -> bool:
        "What an export of a later moment says of a message, if it begins with what is here."
        kept = ('content', 'blocks', 'status', 'note', 'meta', 'ended')
        row = {name: message[name] for name in kept if name in message}
        db.execute(f'''update message set {', '.join(f'{name} = :{name}' for name in row)} where id = :id
            and status <> 'streaming' and substr(:content, 1, length(content)) = content''',
            {'id': id} | {name: json.dumps(value) if name in JSON_COLUMNS else value
                                             for name, value in row.items()})
        return bool(db.conn.changes())

    @reads
    def message(self, db, owner, conversation, idx, id=None) -> Message:
        "The message of depth `idx` on the current path, or on the one to the message `id`. Raises `Refused` 404."
        leaf = id and self._message(db, owner, conversation, id).id
        first = max(0, min(idx, 2**31))  # a number from outside may be of any size
        path = self._path(db, owner, conversation, first, first + 1, leaf)
        for message in path:
            if message.idx == idx: return message
        raise Refused(404, NO_MESSAGE)

    @reads
    def sent(self, db, owner, conversation, text, key) -> tuple[Message, Message] | None:
        "What the same send saved before. Raises `Refused` 409 when the key was used for another text."
        return self._sent(db, owner, conversation, text, key)

    @reads
    def choices(self, db, owner, conversation=None) -> dict:
        "What was chosen for a conversation, by default for the one that was used last. Raises `Refused` 404."
        if conversation: return self._conversation(db, owner, conversation).choices
        rows = db.q('select * from conversation where owner = ? order by updated desc limit 1', [owner])
        return as_row(rows[0], Conversation).choices if rows else {}

    @writes
    def choose(self, db, owner, conversation, change: Callable[[dict], dict]) -> dict:
        "Keep what `change` makes of what was chosen for a conversation. Raises `Refused` 404, and what `change` does."
        choices = change(self._conversation(db, owner, conversation).choices)
        db.execute('update conversation set choices = ? where id = ?', [json.dumps(choices), conversation])
        return choices

    @writes
    def entitle(self, db, owner, conversation, title):
        "A title by Claude, unless a person gave one or another came before it."
        db.execute('update conversation set title = ?, named = 1 where id = ? and owner = ? and named = 0',
                   [title, conversation, owner])

    @reads
    def prompts(self, db, owner) -> list[Prompt]:
        return [Prompt(**row) for row in db.q('select * from prompt where owner = ? order by name', [owner])]

    @writes
    def keep_prompt(self, db, owner, name, text):
        "Keep a prompt under a name, in the place of another one of that name. Raises `Refused` 422."
        if not name or not text: raise Refused(422, 'A prompt is kept with a name and its text: write both.')
        db.execute('delete from prompt where owner = ? and name = ?', [owner, name])
        if db.q('select count(*) as n from prompt where owner = ?', [owner])[0]['n'] >= self.limits.max_prompts:
            raise Refused(422, 'No more prompts can be kept: delete one first.')
        self._insert(db, 'prompt', owner=owner, name=name, text=text)

    @writes
    def drop_prompt(self, db, owner, id):
        db.execute('delete from prompt where owner = ? and id = ?', [owner, id])

    @reads
    def servers(self, db, owner) -> list[Remote]:
        return [Remote(**row) for row in db.q('select * from server where owner = ? order by name', [owner])]

    @writes
    def keep_server(self, db, owner, name, url, token):
        "Keep a server under a name; one of that name gets the new address and token. Raises `Refused` 422."
        if not re.fullmatch(r'[A-Za-z0-9_-]{1,64}', name): raise Refused(422, 'A name has letters, digits, - and _.')
        if not SERVER_URL.fullmatch(url):
            raise Refused(422, 'The address must be a URL with https://; http:// only on this machine.')
        if token and not re.fullmatch(r'[!#-\[\]-~]{8,}', token): raise Refused(422, 'This can not be a token.')
        others = db.q('select count(*) as n from server where owner = ? and name <> ?', [owner, name])[0]['n']
        if others >= self.limits.max_servers: raise Refused(422, 'No more servers can be kept: delete one first.')
        db.execute("""insert into server (owner, name, url, token) values (?, ?, ?, ?)
            on conflict (owner, name) do update set url = excluded.url, token = excluded.token""",
                   [owner, name, url, token])

    @writes
    def drop_server(self, db, owner, id): db.execute('delete from server where owner = ? and id = ?', [owner, id])

    @reads
    def known(self, db, name):
        "What was learnt last under this name, None for nothing."
        rows = db.q('select value from known where name = ?', [name])
        return json.loads(rows[0]['value']) if rows else None

    @writes
    def know(self, db, name, value):
        db.execute('insert or replace into known values (?, ?, ?)', [name, json.dumps(value), time.time()])

    @reads
    def draft(self, db, owner, conversation='') -> str:
        "What is typed and not sent, in a conversation or, for '', on the first page."
        rows = db.q('select text from draft where owner = ? and conversation = ?', [owner, conversation])
        return rows[0]['text'] if rows else ''

    @writes
    def keep_draft(self, db, owner, conversation, text, key):
        "Keep a draft, or none for ''. What was sent with this key is none: it comes late. Raises `Refused` 404, 413."
        if conversation: self._conversation(db, owner, conversation)
        if len(text) > (most := self.limits.max_message_chars): raise Refused(413, f'{most:,} characters are allowed.')
        if key and self._keyed(db, owner, conversation or None, key): return
        self._drop_draft(db, owner, conversation)
        if text: self._insert(db, 'draft', owner=owner, conversation=conversation, text=text, at=time.time())

    @writes
    def keep_file(self, db, owner, sha, kind, content: bytes):
        """Keep a file for a day, and as long as a message has it; by its sha256, so that the same bytes are there once.
        Raises `Refused` 413 when there is no more room."""
        self._room_for(len(content))
        db.execute('delete from attached where message is null and created < ?', [time.time() - 86_400])
        used = db.q('select coalesce(sum(size), 0) as n from file where sha <> ? and sha in '
                    '(select sha from attached where owner = ?)', [sha, owner])[0]['n']
        if used + len(content) > self.limits.max_files_bytes:
            raise Refused(413, f'your files take up {weight_in_words(used)} already, delete some conversations first')
        db.execute('insert or ignore into file values (?, ?, ?, ?)', [sha, kind, len(content), content])
        db.execute('insert into attached (owner, sha, created) values (?, ?, ?) on conflict (owner, sha) '
                   'where message is null do update set created = excluded.created', [owner, sha, time.time()])

    @reads
    def content(self, db, owner, sha) -> tuple[str, bytes]:
        "Kind and content. Raises `Refused` 404."
        for row in db.q(f'select kind, content {MINE}', [sha, owner]): return row['kind'], row['content']
        raise Refused(404, 'There is no such file here.')

    @reads
    def named(self, db, owner, names: list[tuple[str, str]]) -> list[dict]:
        "The blocks of files by (sha, name), of those that are here."
        return [{'type': 'file', 'name': name, **row} for sha, name in names
                for row in db.q(f'select sha, kind, size {MINE}', [sha, owner])]

    @reads
    def to_send(self, db, owner, shas: list[str], room: int) -> dict[str, str | None]:
        "The content of files as text or base64, None for those that no more fit into `room` bytes."
        sent = {}
        for sha in shas:
            for row in db.q(f'select kind, size, iif(size <= ?, content, null) as content {MINE}', [room, sha, owner]):
                room -= row['size']
                encode = bytes if row['kind'] == PLAIN_TEXT else base64.b64encode
                sent[sha] = row['content'] and encode(row['content']).decode()
        return sent

    def _room_for(self, size=0):
        if shutil.disk_usage(self.file.parent).free - size < self.limits.min_free_bytes:  # else not even deleting works
            raise Unusable('the disk is nearly full')

    @writes_durably
    def ask(self, db, owner, conversation, text, key, model, choices=None, after=None, instead=None,
            files=None, summary=False) -> tuple[Message, Message, bool]:
        """Save a question and its empty reply: in a new conversation with `choices` if `conversation` is None; at the
        end of the path, where the page that sends it saw the message `after` (None: it does not say); or as a sibling
        of the question `instead`, whose files it keeps where `files` is None.

        Returns both and whether they are new: the same `key` again finds what the first send saved.
        Raises `Refused`: 404 no such conversation or question, 409 a reply is running, the path ends elsewhere, or the
        key was used for another text."""
        if sent := self._sent(db, owner, conversation, text, key): return *sent, False
        self._room_for()
        leaf, blocks = None, [*(files or ())]
        if after is not None: self._drop_draft(db, owner, conversation or '')
        if conversation is None:
            conversation = self._begin(db, owner, text.strip() or ', '.join(f['name'] for f in blocks), choices or {})
        else: leaf = self._free_leaf(db, owner, conversation, text)
        if leaf and after and after != str(leaf.id): raise Refused(409, ELSEWHERE, text)
        if instead is not None:
            old = self._message(db, owner, conversation, instead, 'user')
            leaf = old.parent and self._row(db, old.parent)
            blocks = [b for b in old.blocks if files is None or 'sha' not in b] + blocks  # what has none can't be named
        question = self._add(db, owner, conversation, leaf, 'user', text, 'done', key=key, blocks=blocks,
                             meta={'summary': 1} if summary else {})
        reply = self._add(db, owner, conversation, question, 'assistant', '', RUNNING, model=model)
        return question, reply, True

    @writes_durably
    def retry(self, db, owner, conversation, model, at=None, key=None) -> tuple[Message, Message, bool]:
        """A new, empty reply beside the reply `at` or to the question `at`, by default the last; what was there stays.
        Returns its question, it, and whether it is new, as `ask` does. Raises `Refused` 404 and 409 likewise."""
        reply = self._keyed(db, owner, conversation, key) if key else None
        if reply and reply.role == 'assistant': return self._row(db, reply.parent), reply, False
        self._room_for()
        leaf = self._free_leaf(db, owner, conversation)
        if at is not None: leaf = self._message(db, owner, conversation, at)
        question = leaf if leaf.role == 'user' else self._row(db, leaf.parent)
        reply = self._add(db, owner, conversation, question, 'assistant', '', RUNNING, model=model, key=key)
        return question, reply, True

    @writes
    def summary(self, db, owner, conversation, message, counts: int) -> Message:
        "Let a summary stand for what came before it, or no more. Raises `Refused` 404."
        reply = self._message(db, owner, conversation, message, 'assistant')
        db.execute("update message set meta = json_set(meta, '$.summary', ?) where meta ->> 'summary' is not null and "
                   '(id = ? or conversation = ? and parent = ?)', [counts, reply.parent, conversation, reply.parent])
        return reply

    @writes
    def switch(self, db, owner, conversation, message) -> int:
        """Show the path through `message`, down to the newest that follows it; the path that is shown already stays as
        it is. Returns its depth. Raises `Refused`: 404 no such message, 409 a reply is running on another path."""
        self._conversation(db, owner, conversation)
        chosen = self._message(db, owner, conversation, message)
        if chosen.id not in [m.id for m in self._path(db, owner, conversation, chosen.idx, chosen.idx + 1)]:
            self._free_leaf(db, owner, conversation)
            db.execute(f'update conversation set leaf = ({NEWEST}) where id = :c', dict(m=chosen.id, c=conversation))
        return chosen.idx

    @writes_durably
    def fork(self, db, owner, conversation, at) -> str:
        """Copy the path that leads to the message `at` into a conversation of its own and return its id.
        Raises `Refused`: 404 no such message, 409 it is still being written."""
        old, last = self._conversation(db, owner, conversation), self._message(db, owner, conversation, at)
        if last.status == RUNNING: raise Refused(409, STILL_WRITING)
        self._room_for()
        new, now, leaf = secrets.token_urlsafe(12), time.time(), None
        row = vars(old) | dict(id=new, created=now, updated=now, seen=now, pinned=None, trashed=None)
        del row['running']
        self._insert(db, 'conversation', **row)
        for each in self._path(db, owner, conversation, leaf=last.id):
            row = vars(each) | dict(id=None, conversation=new, parent=leaf, key=None)
            del row['siblings']
            leaf = self._insert(db, 'message', **row)
        db.execute('update conversation set leaf = ? where id = ?', [leaf, new])
        return new

    @verb('writes')
    def save(self, db, pieces: list[Piece], ends: list[tuple[int, str, str, dict]]) -> list[Message]:
        """One frame: what all running replies said since the last one, and which of them ended: (id, status, note,
        meta); returns these. Nearly always it is one statement, which is a transaction of its own."""
        with transaction(db.conn) if ends else contextlib.nullcontext():
            if pieces:
                db.conn.execute(f'insert into piece values {", ".join(["(?, ?, ?, ?)"] * len(pieces))}',
                                [value for piece in pieces for value in vars(piece).values()])
            return [self._end(db, *end) for end in ends]

    @reads
    def sessions(self, db) -> list[Session]: return [Session(**row) for row in db.q('select * from session')]

    @writes
    def keep_session(self, db, session: Session):
        db.execute('delete from session where id = ?', [session.id])
        self._insert(db, 'session', **vars(session))

    @writes
    def end_sessions(self, db, ids: list[str]):
        for id in ids: db.execute('delete from session where id = ?', [id])

    @writes
    def book(self, db, owner, model, purpose, meta):
        "What a call cost that is no reply."
        self._book(db, owner, model, purpose, meta)

    @reads
    def spent(self, db, owner) -> float:
        "What all calls of this month (UTC) cost together, in USD, as far as their prices are known."
        since = "cast(unixepoch('now', 'start of month') as float)"
        return db.q(f'select total(cost) as sum from usage where owner = ? and at >= {since}', [owner])[0]['sum']

    @reads
    def usage(self, db, owner, since=0.0, zone=0) -> list[dict]:
        """What was used since then, summed for each day, model and purpose, the newest day first. Days are
        those of a place `zone` minutes east of Greenwich; `unknown` counts the calls that have no price."""
        sums = ', '.join(f'sum({name}) as {name}' for name in TOKENS.values())
        return list(db.q(f"""select date(at + 60 * ?, 'unixepoch') as day, model, purpose, count(*) as calls, {sums},
                                    total(cost) as cost, sum(cost is null) as unknown
                             from usage where owner = ? and at >= ? group by 1, 2, 3 order by 1 desc, 2, 3""",
                         [zone, owner, since]))

    def _conversation(self, db, owner, conversation):
        rows = db.q('select * from conversation where id = ? and owner = ?', [conversation, owner])
        if not rows: raise Refused(404, 'There is no such conversation here.')
        if rows[0]['trashed'] is not None: raise Trashed(404, 'This conversation is in the trash.')
        return as_row(rows[0], Conversation)

    def _path(self, db, owner, conversation, first=0, before=ENDLESS, leaf=None):
        values = dict(owner=owner, conversation=conversation, first=first, before=before, leaf=leaf)
        return [as_row(row, Message) for row in db.q(PATH, values)]

    def _row(self, db, id): return as_row(db.q('select * from message where id = ?', [id])[0], Message)

    def _message(self, db, owner, conversation, id, role=''):
        rows = db.q('select * from message where id = ? and conversation = ? and owner = ?', [id, conversation, owner])
        if not rows or role and rows[0]['role'] != role: raise Refused(404, NO_MESSAGE)
        return as_row(rows[0], Message)

    def _keyed(self, db, owner, conversation, key):
        where, value = ('parent is null and owner', owner) if conversation is None else ('conversation', conversation)
        rows = db.q(f'select * from message where {where} = ? and key = ? and owner = ?', [value, key, owner])
        return as_row(rows[0], Message) if rows else None

    def _sent(self, db, owner, conversation, text, key):
        if not key or not (question := self._keyed(db, owner, conversation, key)): return None
        self._conversation(db, owner, question.conversation)
        if question.content != text: raise Refused(409, 'This was sent already with another text.', text)
        reply = db.q('select max(id) as id from message where conversation = ? and parent = ?',
                     [question.conversation, question.id])[0]
        return question, self._row(db, reply['id'])

    def _drop_draft(self, db, owner, conversation):
        db.execute('delete from draft where owner = ? and conversation = ?', [owner, conversation])

    def _begin(self, db, owner, text, choices):
        now, id = time.time(), secrets.token_urlsafe(12)
        title = in_a_line(text, self.limits.max_title_chars)
        self._insert(db, 'conversation', id=id, owner=owner, title=title, created=now, updated=now,
                     choices=choices)
        return id

    def _free_leaf(self, db, owner, conversation, typed=''):
        leaf = self._row(db, self._conversation(db, owner, conversation).leaf)
        if db.q(f"select 1 from message where conversation = ? and status = '{RUNNING}'", [conversation]):
            raise Refused(409, STILL_WRITING, typed)
        return leaf

    def _add(self, db, owner, conversation, parent, role, content, status, **more):
        now, meta = time.time(), parent and role == 'assistant' and 'summary' in parent.meta and parent.meta
        row = dict(conversation=conversation, owner=owner, parent=parent and parent.id, role=role, content=content,
                   idx=parent.idx + 1 if parent else 0, status=status, note='', created=now,
                   ended=None if status == RUNNING else now,
                   **{'model': '', 'key': None, 'blocks': [], 'meta': meta or {}} | more)
        id = self._insert(db, 'message', **row)
        db.execute('update conversation set leaf = ?, updated = ?, seen = ? where id = ?', [id, now, now, conversation])
        return Message(id=id, **row)

    def _insert(self, db, table, **row) -> int:
        row = {name: json.dumps(value) if name in JSON_COLUMNS else value for name, value in row.items()}
        db.execute(f'insert into {table} ({", ".join(row)}) values (:{", :".join(row)})', row)
        return db.conn.last_insert_rowid()

    def _end(self, db, id, status, note, meta=None):
        rows = db.q('select kind, text from piece where message = ? order by seq', [id])
        content, blocks = folded([(row['kind'], row['text']) for row in rows])
        meta = unbroken(json.dumps(meta or {}, ensure_ascii=False))  # both may quote a server, which may send anything
        db.execute('update message set content = ?, blocks = ?, status = ?, note = ?, meta = json_patch(meta, ?), '
                   'ended = ? where id = ?',
                   [content, json.dumps(blocks), status, unbroken(note), meta, time.time(), id])
        db.execute('delete from piece where message = ?', [id])
        db.execute('update conversation set answered = ? where id = (select conversation from message where id = ?)',
                   [time.time(), id])
        reply = self._row(db, id)
        self._book(db, reply.owner, reply.model, 'summary' if 'summary' in reply.meta else 'reply', reply.meta)
        return reply

    def _book(self, db, owner, model, purpose, meta):
        "The books are their own: a conversation that is deleted leaves them as they are."
        if not (usage := meta.get('usage')): return
        self._insert(db, 'usage', owner=owner, at=time.time(), model=model, purpose=purpose, cost=meta.get('cost'),
                     **{column: usage.get(name, 0) for name, column in TOKENS.items()})

# %%
if NOTEBOOK:
    store = Store(Path(tempfile.mkdtemp()) / 'try.db')
    question, reply, new = try_it(store.ask(OWNER, None, 'What is a parley?', 'key-1', 'demo'))
    try_it(store.save([Piece(reply.id, 0, 'A talk '), Piece(reply.id, 1, 'of foes.')], [(reply.id, 'done', '', {})]))
    print(*try_it(store.path(OWNER, question.conversation))[1], sep='\n')

# %% [markdown]
# ### In and out
#
# One format of our own, lossless and the same bytes each time; what others export is turned into it. A file is read to
# its end, off the event loop and a conversation at a time, before anything of it is kept: a broken one changes nothing.
# Then it comes in by small transactions that no running reply has to wait for, and the same file again adds only what
# is missing. Formats: https://support.claude.com/en/articles/9450526 and https://help.openai.com/en/articles/7260999

# %%
# what only means something in this database, or only now
LOCAL = {'id', 'owner', 'conversation', 'key', 'parent', 'idx', 'leaf', 'trashed', 'seen', 'siblings', 'answered',
         'running'}
PORTABLE = {kind: [f for f in fields(kind) if f.name not in LOCAL] for kind in (Conversation, Message)}
LONGEST_CONVERSATION, LONGEST_TABLE, LAST_DAY = 80_000_000, 20_000_000, 253_402_214_400  # characters, bytes, 9999-12-31
CHOSEN = {'model': str, 'system': str, 'effort': str, 'thinking': str, 'max_tokens': int}

def carried(choices: Mapping) -> dict:
    "What of choices goes on to other conversations. Servers do not: each is switched on where it is wanted."
    return {name: value for name, value in choices.items() if not name.startswith('mcp-')}

def exported(conversation: Conversation, tree: list[Message]) -> dict:
    """A conversation as our own format has it: `messages` are the path that is shown, `others` the rest of the tree. A
    message's `id` is its place in the order they came, `idx` its depth."""
    place, path, at = {m.id: n for n, m in enumerate(tree)}, set(), conversation.leaf
    while at in place:
        path.add(at)
        at = tree[place[at]].parent
    parts = {True: [], False: []}
    for n, m in enumerate(tree):
        told = {'id': n, 'parent': place.get(m.parent), 'idx': m.idx}
        parts[m.id in path].append(told | {f.name: getattr(m, f.name) for f in PORTABLE[Message]})
    return {'format': 'parley', 'version': 1, 'id': conversation.id, 'messages': parts[True], 'others': parts[False],
            **{f.name: getattr(conversation, f.name) for f in PORTABLE[Conversation]},
            'choices': carried(conversation.choices)}

def as_text(told: dict) -> bytes: return json.dumps(told, ensure_ascii=False, sort_keys=True).encode() + b'\n'

def as_document(conversation: Conversation, path: list[Message]) -> str:
    def text(m):
        files = [block['name'] for block in m.blocks if m.role == 'user' and block['type'] == 'file']
        return '\n\n'.join([f'[Attached: {name}]' for name in files] + [m.content])
    parts = [f'# {conversation.title}', *[f'## {"You" if m.role == "user" else "Claude"}\n\n{text(m)}' for m in path]]
    return '\n\n'.join(parts) + '\n'

class Outbox(io.BytesIO):
    "A file to write to, whose bytes are taken away to be sent as they come; so a zip can't go back in it."
    def tell(self): raise OSError

    def take(self) -> bytes:
        data = self.getvalue()
        self.__init__()
        return data

async def everything(store: Store, owner: str) -> AsyncIterator[bytes]:
    "A zip of all conversations as JSON and as Markdown, and of their files; one at a time is in memory."
    out = Outbox()
    archive = zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED)
    for id in await store.kept(owner):
        with contextlib.suppress(Refused):  # it was deleted meanwhile
            await asyncio.to_thread(pack, archive, *await store.tree(owner, id))
        yield out.take()
    for sha in await store.sent_files(owner):
        with contextlib.suppress(Refused):
            _, content = await store.content(owner, sha)
            await asyncio.to_thread(archive.writestr, zipfile.ZipInfo(f'files/{sha}'), content)
        yield out.take()
    archive.close()
    yield out.take()

def pack(archive, conversation, tree):  # zips know the years from 1980 to 2107
    told, when = exported(conversation, tree), time.gmtime(min(max(conversation.created, 315_619_200), 4_354_732_800))
    name = '-'.join([time.strftime('%Y-%m-%d', when), *re.findall(r'\w+', conversation.title[:50]), conversation.id])
    text = as_document(conversation, [tree[m['id']] for m in told['messages']])
    for kind, data in (('json', as_text(told)), ('md', text.encode())):
        archive.writestr(zipfile.ZipInfo(f'{name}.{kind}', when[:6]), data, zipfile.ZIP_DEFLATED)

class Narrow:
    "A file of which nothing reads much at once: a zip's table of contents would be read whole, however long it is."
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)

    def read(self, most=-1):
        data = self.file.read(LONGEST_TABLE + 1 if most < 0 else min(most, LONGEST_TABLE + 1))
        if len(data) > LONGEST_TABLE: raise Refused(413, 'This zip has more files in it than can be read.')
        return data

def found_in(archive, name) -> list:
    "The files in a zip with such a name. Raises `NotImplementedError` if one would unpack further than is asked for."
    found = [each for each in archive.infolist() if re.fullmatch(name, each.filename, re.DOTALL)]
    if {each.compress_type for each in found} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}: raise NotImplementedError
    return found

def parts_of(file, most: int) -> Iterator:
    "What came, or if it is a zip the JSON files in it that matter, of which nothing is ever written to the disk."
    file.seek(0)
    magic = file.read(16)
    file.seek(0)
    if magic[:6] == b'SQLite': raise Refused(422, 'This is a backup: `python main.py restore FILE` puts it back.')
    if magic[:2] != b'PK': return (yield file)
    with zipfile.ZipFile(Narrow(file)) as archive:
        found = found_in(archive, r'(.*/)?conversations([-_]\d+)?\.json') or found_in(archive, r'.*\.json')
        if sum(each.file_size for each in found) > most: raise Refused(413, f'Unpacked, this is over {most:,} bytes.')
        for each in found:
            with archive.open(each) as part: yield part

def files_in(file, limits: Settings) -> Iterator[tuple[str, str, bytes]]:
    "The files that go with the messages in a zip of ours: sha256, kind, content. Raises `Refused`."
    file.seek(0)
    if file.read(2) != b'PK': return
    with zipfile.ZipFile(Narrow(file)) as archive:
        found = found_in(archive, 'files/[0-9a-f]{64}')
        if sum(each.file_size for each in found) > min(limits.max_import_bytes, limits.max_files_bytes) or any(
                each.file_size > limits.max_file_bytes for each in found):
            raise Refused(413, 'The files in it are too large.')
        for each in found:
            with archive.open(each) as part: content = part.read(each.file_size)  # and no more, whatever is in it
            sha = each.filename[6:]
            if hashlib.sha256(content).hexdigest() != sha: raise Refused(422, 'A file in it is not what it was.')
            try: yield sha, kind_of(content), content
            except Refused as no: raise Refused(no.status, f'A file in it can not be kept: {no.words}.') from None

def objects(part) -> Iterator[dict]:
    "The objects of a JSON array, one at a time, or the one object that there is. Raises `ValueError`."
    def no(constant): raise ValueError(constant)
    def ended(at):
        rest = text[at:]
        while not rest.strip() and (rest := stream.read(1 << 20)): pass
        if rest.strip(): raise json.JSONDecodeError('There is more behind it', '', 0)
    stream, decode = io.TextIOWrapper(part, 'utf-8-sig'), json.JSONDecoder(parse_constant=no).raw_decode
    text = stream.read(1 << 16).lstrip()
    many, gap = text[:1] == '[', re.compile(r'[\s,]*')
    at = int(many)
    try:
        while True:
            at = gap.match(text, at).end()
            if many and text[at:at + 1] == ']': return ended(at + 1)
            try:
                if text[at:at + 1] not in ('{', ''): raise TypeError
                value, at = decode(text, at)
            except ValueError:
                more = stream.read(max(1 << 20, len(text) - at))  # twice as much each time: parsed twice at most
                if not more: raise
                text, at = text[at:] + more, 0
                if len(text) <= LONGEST_CONVERSATION: continue
                raise Refused(413, 'There is a conversation in it that is too long to be read.') from None
            yield value
            if not many: return ended(at)
    finally: stream.detach()

def moment(value, otherwise=None) -> float | None:
    "A time however it is told, in seconds or as ISO 8601 has it, if it is one that a calendar knows."
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(value, str):
            when = datetime.fromisoformat(value)
            value = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, (int, float)) and 0 <= float(value) < LAST_DAY: return float(value)
    return otherwise

def checked(told: dict, kind) -> dict:
    "The fields of a conversation or a message of our own format. Raises `TypeError` for what can't be, or `KeyError`."
    right = {}
    for f in PORTABLE[kind]:
        if f.name not in told and not (f.default is f.default_factory is MISSING): continue  # from before there was one
        value = told[f.name]
        if isinstance(0.5, f.type) and value is not None: value = moment(value)
        if not isinstance(value, f.type) or isinstance(value, int) and abs(value) >> 53: raise TypeError
        right[f.name] = value
    return right

def ours(told: dict, owner: str) -> dict:
    "A conversation of our own format as `Store.bring_in` takes it. Raises what a wrong type or a missing field does."
    if told['version'] != 1: raise Refused(422, 'This was exported by a newer Parley.')
    if not all(isinstance(value, CHOSEN.get(name, object)) for name, value in told['choices'].items()): raise TypeError
    id, messages = told['id'], []
    if not re.fullmatch(r'[A-Za-z0-9_-]{1,64}', id): id = derived(owner, 'parley', id)  # it stands in addresses
    for n, m in enumerate(sorted([*told['messages'], *told['others']], key=lambda m: m['id'])):
        parent, message = m['parent'], checked(m, Message)
        if type(m['id']) is not int or m['id'] != n: raise Refused(422, 'Two messages in this file have the same id.')
        if parent is not None and (type(parent) is not int or not 0 <= parent < n):
            raise Refused(422, 'A message in this file follows one that is not before it.')
        if m['role'] not in ROLES or parent is None and m['role'] != 'user': raise TypeError
        if not all(map(is_block, m.get('blocks', ()))): raise TypeError
        for file in message.get('blocks', ()):
            if file['type'] != 'file': continue
            if not isinstance(file['name'], str) or file['kind'] not in (*BEGINS, PLAIN_TEXT): raise TypeError
            if type(file['size']) is not int or not isinstance(file['sha'], str | None): raise TypeError
        if m['status'] not in OVER: message |= {'status': 'interrupted', 'ended': message['created']}
        messages.append(message | {'parent': parent, 'idx': 0 if parent is None else messages[parent]['idx'] + 1})
    told = told | {'choices': carried(told['choices'])}  # a file switches no server on
    found = checked(told, Conversation) | with_path(id, messages, messages and told['messages'][-1]['id'])
    return found | {'title': in_a_line(CONTROLS.sub(' ', found['title']), 200) or 'Untitled'}

def with_path(id, messages, leaf) -> dict:
    path = [leaf] if messages else []
    while path and (at := messages[path[-1]]['parent']) is not None: path.append(at)
    return {'id': id, 'messages': messages, 'path': path[::-1]}

def from_claude(told: dict, owner: str) -> dict:
    "A conversation of Claude's data export. The parent of its first message is one that isn't there."
    def text(m):
        parts = list(map(words_from, m.get('content') or []))
        for file in (m.get('attachments') or []) + (m.get('files') or []):
            parts += [f'[Attached: {file.get("file_name") or "a text"}]', fenced(file.get('extracted_content'))]
        return flowing(parts) or flowing([m.get('text')])
    nodes = [(m['uuid'], m.get('parent_message_uuid'), {'human': 'user'}.get(m['sender'], m['sender']), text(m),
              m.get('created_at'), '') for m in told['chat_messages']]
    if not any(node[1] for node in nodes):  # older exports tell no parents
        nodes = [(id, n and nodes[n - 1][0], *rest) for n, (id, _, *rest) in enumerate(nodes)]
    return planted(derived(owner, 'claude', told['uuid']), told.get('name'), told.get('created_at'),
                   told.get('updated_at'), nodes, told.get('current_leaf_message_uuid'))

def from_chatgpt(told: dict, owner: str) -> dict:
    "A conversation of ChatGPT's data export, in which much is never seen by people."
    nodes = []
    for id, node in told['mapping'].items():
        m = node.get('message') or {}
        content, meta, role = m.get('content') or {}, m.get('metadata') or {}, (m.get('author') or {}).get('role')
        kind, parts = content.get('content_type'), content.get('parts') or [content.get('text')]
        if role == 'tool' and kind in ('execution_output', 'multimodal_text'): role = 'assistant'
        if meta.get('is_visually_hidden_from_conversation') or kind in UNTOLD: role = None
        text = flowing(map(words_from, parts))
        if kind in ('code', 'execution_output') or m.get('recipient') not in (None, 'all'):
            text = fenced(text, content.get('language'))
        text = flowing([text, *[f'[Attached: {file.get("name")}]' for file in meta.get('attachments') or []]])
        nodes.append((id, node.get('parent'), role, text, m.get('create_time'), meta.get('model_slug')))
    source = told.get('conversation_id') or told.get('id') or min(told['mapping'])
    return planted(derived(owner, 'chatgpt', source), told.get('title'), told.get('create_time'),
                   told.get('update_time'), nodes, told.get('current_node'))

ROLES, OVER = ('user', 'assistant'), ('done', 'stopped', 'interrupted', 'failed')
UNTOLD = ('thoughts', 'reasoning_recap', 'user_editable_context', 'model_editable_context', 'system_error',
          'tether_browsing_display')
UNASKED = '(This conversation began with an answer.)'

def words_from(part) -> str:
    "What a part of a foreign message says: its text, what a tool was given to write, or the name of what isn't here."
    match part:
        case str(): return part
        case {'content_type': 'image_asset_pointer', 'asset_pointer': str(name)}: return f'[Image: {name}]'
        case {'type': 'text', 'text': str(text)} | {'content_type': 'audio_transcription', 'text': str(text)}:
            return text
        case {'content_type': str(kind)}: return f'[Not in the export: {kind}]'
        case {'type': 'tool_use', 'input': {'content': str(text), **more}}:
            return flowing([more.get('title'), fenced(text, more.get('language'))])
    return ''

def flowing(parts) -> str: return '\n\n'.join(part for part in parts if isinstance(part, str) and part.strip())

def fenced(text, language='') -> str:
    if not isinstance(text, str) or not text.strip(): return ''
    fence = max([*re.findall('`{3,}', text), '``']) + '`'
    return f'{fence}{language if re.fullmatch(r"[a-z0-9+#]{1,20}", str(language)) else ""}\n{text}\n{fence}'

def planted(id, title, created, updated, nodes, leaf) -> dict:
    """A foreign conversation as `Store.bring_in` takes it, of nodes (id, parent, role, text, time, model). What has no
    role of ours or no words is left out, and what follows it follows what was before; an answer that only goes on with
    the answer before it is joined to it; where a tree begins with an answer, a question is put before it."""
    known, depth, after = {node[0]: node for node in nodes}, {}, Counter(node[1] for node in nodes)
    if len(known) < len(nodes): raise Refused(422, 'Two messages in this file have the same id.')
    for at in known:
        chain = []
        while at in known and at not in depth:
            depth[at] = 0  # until it is known; who meets it meanwhile has gone round
            chain.append(at)
            at = known[at][1]
        if at in known and not depth[at]: raise Refused(422, 'The messages of a conversation go round in circles.')
        for n, each in enumerate(reversed(chain), depth.get(at, 0) + 1): depth[each] = n
    began, messages, place, sole = moment(created), [], {}, {}
    def add(parent, role, text, when, model=''):
        messages.append({'parent': parent, 'idx': 0 if parent is None else messages[parent]['idx'] + 1, 'role': role,
                         'content': text, 'status': 'done', 'note': '', 'model': model, 'created': when, 'ended': when})
        return len(messages) - 1
    for node in sorted(nodes, key=lambda node: (depth[node[0]], moment(node[4], 0.0))):
        at, above, role, text, when, model = node
        parent, only = place.get(above), after[above] == 1 and sole.get(above, True)
        before = {} if parent is None else messages[parent]
        when = moment(when, before.get('created', began or 0.0))
        if role not in ROLES or not text: place[at], sole[at] = parent, only
        elif role == before.get('role') == 'assistant' and only:
            before['content'], place[at] = f'{before["content"]}\n\n{text}', parent
        else:
            if parent is None and role == 'assistant': parent = add(None, 'user', UNASKED, when)
            place[at] = add(parent, role, text, when, model if isinstance(model, str) else '')
    title = ' '.join(title.split()) if isinstance(title, str) else ''
    last = place.get(leaf) if isinstance(leaf, str) else None
    if last is None and messages: last = max(range(len(messages)), key=lambda n: (messages[n]['created'], n))
    times = [m['created'] for m in messages] or [0.0]
    return {'title': in_a_line(title or next((m['content'] for m in messages), ''), 200), 'named': 2 * bool(title),
            'created': began or min(times), 'updated': moment(updated) or max(times), **with_path(id, messages, last)}

@dataclass
class Import:
    "A file that is coming in, or that did. `status` is how it ended, as HTTP numbers it, 0 while it goes on."
    words: str = 'Reading the file.'
    done: float = 0.0  # of 1
    status: int = 0
    task: asyncio.Task | None = None

def several(n, what): return f'{n:,} {what}{"s" * (n != 1)}'

BROKEN = {UnicodeDecodeError: 'it is not text in UTF-8', RecursionError: 'it is nested too deeply',
          NotImplementedError: 'it is packed in an unusual way', zipfile.BadZipFile: 'the zip is damaged',
          zlib.error: 'the zip is damaged', EOFError: 'the zip is damaged', RuntimeError: 'it has a password',
          json.JSONDecodeError: 'it is no valid JSON'}

def sift(file, size, out, owner, limits: Settings, state: Import) -> int:
    "Read a file to its end, and write what it holds to `out`, a conversation a line. Raises `Refused`."
    count, seen = 0, {}
    try:
        for _ in files_in(file, limits): pass
        for part in parts_of(file, limits.max_import_bytes):
            for told in objects(part):
                match told:
                    case {'format': 'parley'}: read = ours
                    case {'chat_messages': _}: read = from_claude
                    case {'mapping': _}: read = from_chatgpt
                    case _: raise Refused(422, 'This is no export of Parley, Claude or ChatGPT that can be read.')
                found = read(told, owner)
                if len(found.get('choices', {}).get('system', '')) > limits.max_system_chars:
                    raise Refused(413, 'There is a system prompt in this file with more than the '
                                       f'{limits.max_system_chars:,} characters that are allowed.')
                line = unbroken(json.dumps(found, ensure_ascii=False, allow_nan=False)).encode() + b'\n'
                mark = hashlib.sha256(line).digest()
                if seen.setdefault(found['id'], mark) != mark:
                    raise Refused(422, 'Two conversations in this file have the same id.')
                out.write(line)
                count += 1
                state.done = file.tell() / size / 2
                if state.status: raise Refused(503, 'Parley is being restarted. Import the file again in a moment.')
    except OSError as error: raise Refused(507, 'There is no room on the disk to unpack this.') from error
    except Refused: raise
    except Exception as error:  # noqa: BLE001 whatever is wrong with a file from elsewhere
        why = next((BROKEN[kind] for kind in BROKEN if isinstance(error, kind)), 'something in it has the wrong form')
        place = f' Before that come {several(count, "good conversation")}.' if count else ''
        raise Refused(422, f'This file can not be read: {why}.{place}') from error
    if not count: raise Refused(422, 'There is no conversation in this file.')
    return count

async def take_in(store: Store, owner: str, file, size: int, state: Import):
    "Import a file, and say in `state` how far it is and how it ended."
    came = messages = here = 0
    try:
        with tempfile.TemporaryFile(dir=store.file.parent) as lines:
            count = await asyncio.to_thread(sift, file, size, lines, owner, store.limits, state)
            lines.seek(0)
            while await store.sweep(): pass  # what was deleted for ever is not here already
            files = files_in(file, store.limits)
            while found := await asyncio.to_thread(next, files, None): await store.keep_file(owner, *found)
            for n in range(count):
                told, placed, before, new = await asyncio.to_thread(lambda: json.loads(lines.readline())), [], {}, 0
                while len(placed) < len(told['messages']): new += await store.bring_in(owner, told, placed, before)
                came, here, messages = came + (new > 0), here + (not new and bool(placed)), messages + new
                state.words, state.done = f'{n + 1:,} of {count:,} conversations are in.', .5 + n / count / 2
        state.words, state.status = f'{several(came, "conversation")} with {several(messages, "message")} came in' + (
            f', {here:,} {"was" if here == 1 else "were"} here already.' if here else '.'), 200
    except Refused as no: state.words, state.status = f'Nothing came in. {no.words}', no.status
    except Exception as error:  # noqa: BLE001 whatever it is, the person must be told
        log.error('an import failed: %s', type(error).__name__)
        why = error if isinstance(error, Unusable) else 'Parley failed, the log says more'
        state.words, state.status = f'{several(came, "conversation")} came in, then it ended: {why}. The same file ' \
            'again brings the rest.', 503

# %%
if NOTEBOOK:
    print(as_text(exported(*try_it(store.tree(OWNER, question.conversation)))).decode())

# %% [markdown]
# ## 3 Claude
#
# History in, events out. The SDK keeps the connection, the authentication and the errors; the lines of the stream are
# parsed here, because its typed event objects are half of all the work of a token. Retries are ours too: the SDK's
# would sleep as long as a server asks. However a reply ends, it ends as an `Ended` with words for the person.

# %%
@dataclass(frozen=True)
class Waiting:
    "Claude is busy and will be asked again in `seconds`."
    seconds: float

@dataclass(frozen=True)
class Thought:
    "Some more of what Claude thinks."
    text: str

@dataclass(frozen=True)
class Whole:
    "A content block of the API that is complete: what must be sent back. Its text or thinking was told before."
    block: dict

@dataclass(frozen=True)
class Ended:
    "The last event of a reply: a `status` of the table in Store and a `note` in words, empty when all is well."
    status: str
    note: str = ''
    meta: dict = field(default_factory=dict)  # of Message

class Fault(Exception):
    "What went wrong upstream, in words. `again`: worth another try; `after`: seconds the server asks to wait."
    def __init__(self, words, again=False, after=None, status='failed'):
        super().__init__(words)
        self.words, self.again, self.after, self.status = words, again, after, status

STOPS = {'end_turn': '', 'stop_sequence': '',
         'max_tokens': 'The answer reached the most tokens allowed: its maximum output, or MAX_TOKENS.',
         'refusal': 'Claude declined to go on with this: question and answer are not sent again.',
         'tool_use': 'Claude called a tool that is not here.',
         'model_context_window_exceeded': 'The conversation has grown longer than the model can read.',
         'pause_turn': 'Claude paused too often and was not asked again.'}
FOREIGN = 'The server at the base URL does not speak the Messages API.'
TOO_MUCH = 'Claude sent more in one piece than can be read.'
BROKE_OFF = 'The connection to Claude broke off.'
BUSY = 'Claude is busy'
LEAST_THINKING = 1024  # tokens; an answer must have room for more
TRIES, LONGEST_WAIT, RESUMES, LONGEST_EVENT, LONGEST_REFUSAL = 3, 15, 10, 16_000_000, 65_536
LONGEST_LIST, MOST_MODELS = 1_000_000, 300
# of one answer: letters that tools are given, blocks, and values in them, which take 50 times their letters
LONGEST_CALL, MOST_BLOCKS, MOST_VALUES = 1_000_000, 5_000, 1_000_000

@dataclass(frozen=True)
class Model:
    "What a model can do, as the Models API says. One that is not listed there is sent plain text and nothing else."
    id: str
    name: str = ''
    line: str = ''
    lifecycle: str = 'active'  # active | deprecated | retired
    created: str = ''  # days, as 2027-01-31
    retires: str = ''
    max_input: int = 0  # tokens; 0 is unknown
    max_output: int = 0
    known: bool = False  # its capabilities are
    thinking: tuple = ()  # what may be sent as thinking.type
    efforts: tuple = ()
    tools: tuple = ()  # server tools
    images: bool = False
    pdfs: bool = False
    citations: bool = False

    @classmethod
    def read(cls, told) -> 'Model | None':
        "A model from an item of the list, whatever of it makes sense, None if that is nothing. Any server may send it."
        id = told.get('id') if isinstance(told, dict) else None
        if not isinstance(id, str) or not MODEL_ID.fullmatch(id): return None
        def able(of): return isinstance(of, dict) and of.get('supported') is True
        def inside(of): return [k for k in of if able(of[k]) and MODEL_ID.fullmatch(k)][:20] if able(of) else []
        def words(key): return ''.join(filter(str.isprintable, told[key][:80])) if type(told.get(key)) is str else ''
        def day(key): return words(key)[:10]
        def tokens(key): return told[key] if type(told.get(key)) is int and 0 < told[key] < 10**9 else 0
        can = told.get('capabilities') if isinstance(told.get('capabilities'), dict) else {}
        think, efforts = can.get('thinking'), inside(can.get('effort'))
        types = think.get('types') if able(think) else None
        return cls(
            id, words('display_name').strip() or id, words('line'), words('lifecycle') or 'active',
            day('created_at'), day('retires_at'), tokens('max_input_tokens'), tokens('max_tokens'), bool(can),
            tuple(inside({'supported': True} | types) if isinstance(types, dict) else ()),
            tuple(sorted(efforts, key=lambda e: EFFORTS.index(e) if e in EFFORTS else len(EFFORTS))),
            tuple(inside(can.get('server_tools'))), *[able(can.get(what)) for what in READS])

    def reads(self, kind: str) -> bool:
        "Whether it can be given a file of this media type."
        return kind == PLAIN_TEXT or self.images and kind in IMAGES or self.pdfs and kind == PDF

    @property
    def ways(self) -> tuple:
        "What can be chosen of its thinking: `off` where it thinks by itself, `on` where it must be told, or nothing."
        if 'adaptive' in self.thinking: return ('off',) if {'disabled', 'between_tools'} & {*self.thinking} else ()
        return ('on',) if 'enabled' in self.thinking else ()

MODEL_ID, READS = re.compile(r'[A-Za-z0-9_.:/@+-]{1,100}'), ('image_input', 'pdf_input', 'citations')
EFFORTS = ('low', 'medium', 'high', 'xhigh', 'max')  # in this order, and any new one after them

# Prices are in no API. USD per million tokens (in, out, read from the cache, written to it for five minutes) as the
# price list of 2026-11-10 has them, and where long prompts cost more: from how many tokens on, and how often as much.
# A model that is missing here has an unknown price: its line's would be a guess.
PRICES = {
    'claude-fable-5-2': (8, 40, .2, 10), 'claude-fable-5-1': (10, 50, .25, 12.5), 'claude-fable-5': (10, 50, 1, 12.5),
    'claude-mythos-5-1': (10, 50, .25, 12.5), 'claude-mythos-5': (10, 50, 1, 12.5),
    'claude-opus-5-5': (4, 20, .2, 5), 'claude-sonnet-5-5': (2, 10, .1, 2.5), 'claude-sonnet-5': (2, 10, .2, 2.5),
    'claude-haiku-5-5': (.1, .5, .01, .125, 100_000, 5), 'claude-haiku-4-5': (1, 5, .1, 1.25),
    **dict.fromkeys(['claude-opus-5', *[f'claude-opus-4-{n}' for n in (5, 6, 7, 8)]], (5, 25, .5, 6.25)),
    **dict.fromkeys(['claude-sonnet-4-5', 'claude-sonnet-4-6'], (3, 15, .3, 3.75))}

TITLING = ('Give this conversation a title of two to six words in its own language. '
           'Answer with the title alone: one line of plain text without quotes.')

def titled(answer: str, most: int) -> str:
    "The title in an answer to TITLING: its first line without marks and control characters, '' if nothing is left."
    line = re.sub('[*`]|^#+ ', '', answer.strip().partition('\n')[0])
    return in_a_line(''.join(c if c.isprintable() else ' ' for c in line[:1_000]).strip(' "\'“”„«»_.'), most)

THOUGHTS = ('thinking', 'redacted_thinking')
# The Models API has no word of its own for reading pages; searching without it would be half of what people expect.
WEB = {'web_search': {}, 'web_fetch': {'max_content_tokens': 30_000}}

MCP = ['mcp-client-2026-09-15']  # https://platform.claude.com/docs/en/agents-and-tools/mcp-connector

SUMMARISING = ('Summarise our conversation so far, so that we can go on from your summary alone: what I want, what was '
               'found out and decided, what is still open, and word for word whatever must stay exact, such as names, '
               'figures and code. Write in the language that we speak.')

def declined(reply: Message) -> bool: return reply.role == 'assistant' and reply.meta.get('stop') == 'refusal'

def compacted(path: list[Message]) -> list[Message]:
    """What of a path Claude reads: it begins with the newest summary, asked for and answered, which stands for all that
    came before as any question and answer would, so that neither the system prompt nor the order of roles is touched.
    One that was undone, or never became whole, is passed over."""
    kept, rest = [], iter(path)
    for m in rest:
        reply = next(rest, None) if m.role == 'user' and 'summary' in m.meta else m
        if reply is m: kept.append(m)
        elif reply is None or reply.status == RUNNING: kept.append(m)  # it is being asked for
        elif m.meta['summary'] and reply.status == 'done' and not declined(reply) and reply.content.strip():
            kept = [m, reply]
    return kept

def fitting(path: list[Message], room: int) -> list[Message]:
    "Of a path that is to be summarised what the model can read, by what the last reply weighed: the end of it."
    weight = next(filter(None, (number(m.meta, 'weight') for m in reversed(path))), 0)
    size, at = sum(len(m.content) for m in path), 0
    most = .95 * room / weight * size if room and weight else math.inf
    while len(path) - at > 3 and size > most:
        size -= len(path[at].content) + len(path[at + 1].content)
        at += 2
    return path[at:]

def prefix_of(request: dict) -> str:
    """A mark of what stands before the first message. Newer models take their thinking back only if nothing before it
    has changed, else they refuse the whole request: https://platform.claude.com/docs/en/build-with-claude/preserved-thinking"""
    first = (request.get('messages') or [{}, {}])[:2]
    first = first if first[0].get('content') == SUMMARISING else []  # a summary, and all before it is gone
    servers = [server | {'authorization_token': ''} for server in request.get('mcp_servers', ())]
    before = json.dumps([request.get('system'), request.get('tools'), servers or None] + first, sort_keys=True)
    return hashlib.sha256(before.encode()).hexdigest()[:16]

ROOM = 22_000_000  # bytes of files in one request: as base64 they leave a little of the 32 MB that it may have
MOST_IMAGES = 100  # in one request; both: https://platform.claude.com/docs/en/build-with-claude/vision

def files_on(path: list[Message]) -> list[str]:
    "The files that a request for `path` would carry, the newest first, each once."
    return list(dict.fromkeys(block.get('sha') or '' for m in reversed(path) if m.role == 'user'
                              for block in reversed(m.blocks) if block.get('type') == 'file'))

def weight_of(blocks) -> float:
    "About how many tokens the files among these have; of a PDF rather more."
    each = {PLAIN_TEXT: 1 / 3, PDF: 1 / 20}
    return sum(b['size'] * each[b['kind']] if b['kind'] in each else 2_000 for b in blocks if b['type'] == 'file')

def as_sent(file: dict, sent: Mapping[str, str | None], model: Model, before: set) -> dict:
    "A file of a question as the API takes it, or words in its place; what came `before` is not sent twice."
    kind, name, sha = file['kind'], file['name'], file.get('sha')
    def words(text): return {'type': 'text', 'text': text}
    if not model.reads(kind): return words(f'(The file “{name}” can’t be read by this model.)')
    if not sha or sha not in sent: return words(f'(The file “{name}” is not here any more.)')
    if sent[sha] is None: return words(f'(The file “{name}” was left out: there are too many for one request.)')
    if sha in before: return words(f'(The file “{name}” is one of those above.)')
    before.add(sha)
    if kind == PLAIN_TEXT and not model.known: return words(f'{name}:\n\n{sent[sha]}')
    source = {'type': 'text' if kind == PLAIN_TEXT else 'base64', 'media_type': kind, 'data': sent[sha]}
    if kind in IMAGES: return {'type': 'image', 'source': source}
    cited = {'citations': {'enabled': True}} if model.citations else {}
    return {'type': 'document', 'source': source, 'title': name, **cited}

def sent_back(blocks: list[dict], paused=False) -> list[dict]:
    """What of an answer goes back to Claude: all of it as it came, but thinking that was not signed, texts that are
    empty, and a tool's call without its result or the other way round, all of which the API refuses. Only a `paused`
    answer has them: the call that it waits for has its result in the answer that goes on."""
    calls, results = [[block.get(name) for block in blocks] for name in ('id', 'tool_use_id')]
    def taken(block):
        if block['type'] == 'thinking': return block.get('signature')
        return block.get('text', True) and (paused or ('id' not in block or block['id'] in results) and (
            'tool_use_id' not in block or block['tool_use_id'] in calls))
    return [{name: value for name, value in block.items() if name != 'seconds'} for block in blocks if taken(block)]

def history(path: list[Message], prefix='', model=Model(''), sent: Mapping[str, str | None] = {}, servers=()
            ) -> list[dict]:
    """What Claude is sent: the path without empty messages. A partial reply stands as text before the next question,
    never last: models refuse to go on from a text that isn't theirs to finish. Thinking under another `prefix` (see
    `prefix_of`) is left out, each time in the same way, so that what was thought since stays valid, and so is what
    was done with other servers than these. Files, whose content is in `sent`, stand before the words about them. What
    Claude declined is left out with its question, else it would go on to decline:
    https://platform.claude.com/docs/en/test-and-evaluate/strengthen-guardrails/handle-streaming-refusals"""
    before = set()
    gone = {n for n, m in enumerate(path) if declined(m)}
    path = [m for n, m in enumerate(path) if not {n, n + 1} & gone]
    def known(block):
        name = block.get('server_name') or block.get('mcp_server_name')
        return name in servers or block['type'] not in ('mcp_tool_use', 'mcp_tool_listing')
    def content(m):
        if m.status != 'done' or 'summary' in m.meta: return m.content  # what was thought for a summary was about more
        if m.role == 'user' and m.blocks:
            blocks = [as_sent(b, sent, model, before) if b['type'] == 'file' else b for b in m.blocks]
            return blocks + [{'type': 'text', 'text': m.content}] * bool(m.content.strip())
        same = m.role == 'user' or m.meta.get('prefix') == prefix
        blocks = [block for block in m.blocks if known(block) and (same or block['type'] not in THOUGHTS)]
        return sent_back(blocks) or m.content
    turns = [{'role': m.role, 'content': content(m)} for m in path]
    turns = [turn for turn in turns if isinstance(turn['content'], list) or turn['content'].strip()]
    while turns and turns[-1]['role'] == 'assistant': turns.pop()
    return turns

def until_next(frame: float) -> float:
    "Seconds until the next frame begins. Frames of `frame` seconds are cut by the clock, the same for everyone."
    return frame - time.monotonic() % frame

class EventLines:
    "The events of a `text/event-stream`, from bytes cut anywhere. Raises `Fault` for a line that never ends."
    def __init__(self): self.rest, self.data, self.values = bytearray(), bytearray(), 0

    def feed(self, chunk: bytes) -> list[dict | Exception]:
        "The events that `chunk` completes; one that can't be read stands among them as the exception it raised."
        self.rest += chunk
        if len(self.rest) + len(self.data) > LONGEST_EVENT:
            raise Fault(TOO_MUCH)
        if b'\n' not in chunk: return []  # so that a line of many pieces is looked through once
        *lines, self.rest = self.rest.split(b'\n')
        events = []
        for line in lines:
            line = line.rstrip(b'\r')
            if line.startswith(b'data:'): self.data += line[5:] + b'\n'
            elif not line and self.data:
                if len(self.data) > 1_000: self.values += sum(map(self.data.count, b'[{,'))
                try: events.append(Fault(TOO_MUCH) if self.values > MOST_VALUES else json.loads(self.data))
                except (ValueError, RecursionError) as error: events.append(error)
                self.data = bytearray()
        return events

GROWS = {'text_delta': 'text', 'thinking_delta': 'thinking', 'signature_delta': 'signature',
         'input_json_delta': 'partial_json', 'citations_delta': 'citation'}  # what a delta brings, by its type

def counted(told) -> dict[str, int]:
    "What is counted here of a usage as the API tells it. A server may send anything."
    told = told if isinstance(told, dict) else {}
    tools = told['server_tool_use'] if isinstance(told.get('server_tool_use'), dict) else {}
    if 'web_search_requests' in tools: told = told | {'searches': tools['web_search_requests']}
    return {name: told[name] for name in TOKENS if type(told.get(name)) is int and 0 <= told[name] < 10**9}

MEANT = {ord(sign): f'&#{ord(sign)};' for sign in '&"<>`\\$|[]*_~'}  # what could mean something in Markdown
RAISED = str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹')

def cited(citation: dict, sources: dict[str, int], pages: Mapping[str, str] = {}) -> str:
    """A citation as Markdown: a numbered link to its source with the quoted passage as its title. Nothing in it can
    mean anything else: https://spec.commonmark.org/0.31.2/#entity-and-numeric-character-references"""
    def line(name, most): return ' '.join(str(citation.get(name) or '').split())[:most].translate(MEANT)
    url, named = citation.get('url') or citation.get('source'), str(citation.get('document_title'))
    url = url if citation.get('url') or re.match('https?://', str(url)) else pages.get(named)
    if not url:  # a passage of a file
        page = citation.get('start_page_number')
        return f' ({line("document_title", 80) or "a file"}{f", page {page}" if isinstance(page, int) else ""})'
    url = quote(str(url)[:2_000], safe=":/?#@!&'(),;=%+~.*_-")
    number = str(sources.setdefault(url, len(sources) + 1)).translate(RAISED)
    return f'[{number}](<{url}> "{line("cited_text", 300)}")'

class Heard:
    """One answer put together from its events: the API's content blocks, why it stopped, what it cost. It may go on
    with one that `paused`. `sources` are the numbers of what was cited so far, `pages` the addresses of what was
    fetched. A thinking block also gets its `seconds`, which are ours."""
    def __init__(self, paused: 'Heard | None' = None):
        self.sources, self.pages = (paused.sources, paused.pages) if paused else ({}, {})
        self.spoke = bool(paused and paused.spoke)  # there were words
        self.above = paused and paused.above  # the type of the block before
        self.since, self.call = 0.0, 0  # the letters of what tools are given
        self.blocks, self.parts, self.kept = [], [], 0  # whole blocks; the pieces of the open one; `kept` were told
        self.began, self.complete, self.reason, self.usage, self.held = False, False, None, {}, ''
        self.id, self.miss, self.size = '', '', 0  # of the answer: its id, why it read no cache, its letters
        self.why = ''  # it was refused, in the API's words

    def take(self, event: dict) -> list[str | Thought | Whole]:
        "What `event` adds for the reader and for the record. Raises `Fault` for an error of the API."
        self.began = self.began or event['type'] != 'error'
        match event['type']:
            case 'content_block_delta':
                delta = event['delta']
                grown = delta.get(GROWS.get(delta['type']))
                if grown is None: return []
                if type(grown) is not (dict if delta['type'] == 'citations_delta' else str): raise TypeError
                if delta['type'] == 'input_json_delta': self.call += len(grown)
                if self.call > LONGEST_CALL: raise Fault(TOO_MUCH)
                self.spoke = self.spoke or delta['type'] == 'text_delta'
                self.parts.append((delta['type'], grown))
                if delta['type'] != 'signature_delta': self.size += len(grown)
                return {'text_delta': [grown], 'thinking_delta': [Thought(grown)]}.get(delta['type'], [])
            case 'content_block_start':
                block = {**event['content_block']}
                if not is_block(block): raise TypeError
                if len(self.blocks) >= MOST_BLOCKS: raise Fault(TOO_MUCH)
                told = self._tell(len(self.blocks))  # a text stays untold until more follows: mostly nothing does
                if block['type'] == 'text':
                    if self.spoke and self.above != 'text': told.append('\n\n')
                    if block.get('text'): told.append(block['text'])
                    self.spoke = self.spoke or bool(block.get('text'))
                match block:
                    case {'type': 'web_fetch_tool_result',
                          'content': {'url': str(url), 'content': {'title': str(title)}}}: self.pages[title] = url
                self.blocks.append(block)
                self.parts, self.since, self.above = [], time.monotonic(), block['type']
                return told
            case 'content_block_stop' if self.blocks:
                self._close(block := self.blocks[-1])
                if block.keys() == {'type', 'text'}: return []
                marks = dict.fromkeys(cited(each, self.sources, self.pages) for each in block.get('citations') or ())
                return [*marks, *self._tell(len(self.blocks))]
            case 'message_start':
                told = event['message']
                self.usage, self.id = counted(told.get('usage')), str(told.get('id', ''))[:80]
                with contextlib.suppress(TypeError, KeyError):  # mostly there is none
                    self.miss = str(told['diagnostics']['cache_miss_reason']['type'])[:40]
            case 'message_delta':
                self.reason = event['delta'].get('stop_reason') or self.reason
                self.usage = self.usage | counted(event.get('usage'))
                with contextlib.suppress(TypeError, KeyError):
                    self.why = str(event['delta']['stop_details']['explanation'] or '')[:300]
            case 'message_stop':
                self.complete = True
                return self._tell(len(self.blocks)) if self.kept else []
            case 'error': raise upstream_error(event['error'])
        return []

    def used(self) -> dict[str, int]:
        "What it has used so far. How much was said is told at the end; until then it is estimated, rather too high."
        if self.reason or not self.usage: return self.usage
        return self.usage | {'output_tokens': max(self.usage.get('output_tokens', 0), self.size // 3)}

    def _close(self, block):
        "Put what the deltas brought where the API keeps it."
        for kind, some in groupby(self.parts, lambda part: part[0]):
            grown = [each for _, each in some]
            if kind == 'citations_delta': block['citations'] = [*(block.get('citations') or []), *grown]
            elif kind == 'input_json_delta': block['input'] = json.loads(''.join(grown) or '{}')
            else: block[GROWS[kind]] = block.get(GROWS[kind], '') + ''.join(grown)
        if block['type'] == 'thinking': block['seconds'] = round(time.monotonic() - self.since, 1)
        self.parts = []

    def _tell(self, until):
        told = [Whole(block) for block in self.blocks[self.kept:until]]
        self.kept = until
        return told

    def whole(self, text: str) -> str:
        "Join the halves of a surrogate pair that two events may carry; a half that stays alone becomes U+FFFD."
        text = self.held + text
        self.held = text[-1] if text and '\ud800' <= text[-1] <= '\udbff' else ''
        return unbroken(text[:len(text) - len(self.held)])

def added(one: dict, other: dict) -> dict:
    "Usage of two calls together."
    return one | {name: one.get(name, 0) + n for name, n in other.items()}

async def shortened(response: httpx2.Response):
    "Of a refusal only as much as is worth reading, as it came: the SDK would take it whole, unpack and decode it."
    if response.is_success: return
    body = b''
    async with contextlib.aclosing(response.stream) as stream, contextlib.aclosing(aiter(stream)) as chunks:
        async for chunk in chunks:
            if len(body := body + chunk) > LONGEST_REFUSAL: break
    response.stream, response.encoding = httpx2.ByteStream(body[:LONGEST_REFUSAL]), 'utf-8'
    response.headers.pop('content-encoding', None)

class Claude:
    "One SDK client. `http` is the seam for tests and for the demo model: an `httpx2.AsyncClient`."
    def __init__(self, settings: Settings, http: httpx2.AsyncClient | None = None):
        import anthropic  # here, for it takes longer than all others together: a bad setting is refused at once
        self.settings, self.models = settings, {}
        if settings.demo and http is None: http = httpx2.AsyncClient(transport=Demo())
        http = http or anthropic.DefaultAsyncHttpxClient(follow_redirects=False)
        http.event_hooks['response'].append(shortened)
        self.sdk = anthropic.AsyncAnthropic(
            api_key=settings.api_key or (None if settings.auth_token else 'none'),
            auth_token=settings.auth_token or None, max_retries=0,
            base_url=settings.base_url or 'https://api.anthropic.com',  # else the SDK would read the environment itself
            default_headers={'accept-encoding': 'identity'}, http_client=http,
            timeout=httpx2.Timeout(settings.idle_seconds, connect=10))

    async def listed(self) -> list[dict]:
        "All that the Models API lists, as it says it, within bounds. Raises what the SDK or the parser raise."
        found, room, after = [], LONGEST_LIST, {}
        async with asyncio.timeout(self.settings.idle_seconds):
            for _ in range(RESUMES):
                async with self.sdk.models.with_streaming_response.list(
                        lifecycle=['active', 'deprecated', 'retired'], limit=1000, **after) as response:
                    if 'content-encoding' in response.headers: raise Fault(FOREIGN)
                    body = bytearray()
                    async for chunk in response.iter_bytes():
                        body += chunk
                        if len(body) > room: raise Fault('The list of models is too long to be read.')
                told, room = json.loads(body), room - len(body)
                found += filter(Model.read, told['data'])
                after = {'after_id': told.get('last_id')}
                if not told.get('has_more') or not isinstance(after['after_id'], str): break
        return found[:MOST_MODELS]

    def learn(self, listed: list[dict]):
        "Know these models from now on."
        self.models = {model.id: model for model in map(Model.read, listed) if model}

    def default(self) -> Model:
        "The model where none was chosen: MODEL, or once that is retired the next of its line."
        id = 'demo' if self.settings.demo else self.settings.model
        model = self.models.get(id) or Model(id, id)
        return (model.lifecycle == 'retired' and self.nearest(model)) or model

    def nearest(self, model: Model) -> Model | None:
        "The active model of the same line that came next after this one, else the newest."
        line = [m for m in self.models.values() if m.lifecycle == 'active' and m.line and m.line == model.line]
        newer = [m for m in line if m.created >= model.created]
        return min(newer, key=lambda m: m.created) if newer else max(line, key=lambda m: m.created, default=None)

    def model_of(self, choices: dict) -> Model: return self.models.get(str(choices.get('model'))) or self.default()

    def longest(self, model: Model) -> int:
        "The most tokens that an answer may have."
        return min(self.settings.max_tokens, model.max_output or self.settings.max_tokens)

    def valid(self, said: Mapping, before: Mapping = {}) -> dict:
        """What of `said`, by a form or long ago, can be chosen today: what the list of models has, and a system prompt.
        A model that is retired can only be kept from `before`; tokens out of range are kept to be told of."""
        said = {name: str(value) for name, value in said.items()}
        kept, model = {}, self.models.get(said.get('model'))
        if model and (model.lifecycle != 'retired' or model.id == before.get('model')): kept['model'] = model.id
        model, tokens, system = self.model_of(kept), said.get('max_tokens', ''), said.get('system', '').strip()
        for name, allowed in (('effort', model.efforts), ('thinking', model.ways)):
            if said.get(name) in allowed: kept[name] = said[name]
        if re.fullmatch(r'-?[0-9]{1,12}', tokens) and int(tokens) != self.longest(model):
            kept['max_tokens'] = int(tokens)
        kept |= {name: 'on' for name in said if re.fullmatch(r'mcp-\d{1,15}', name) and said[name] == 'on'}
        if said.get('web') == 'on' and 'web_search' in model.tools: kept['web'] = 'on'
        return kept | ({'system': system} if system else {})

    def request(self, path: list[Message], choices: Mapping = {}, sent: Mapping[str, str | None] = {},
                servers: list[Remote] = ()) -> dict:
        """The parameters of the call that answers `path`, whose files are `sent`: what was chosen, as far as the model
        can do it; of `servers` those that are switched on. What nobody chose is left out, so that the model's own
        default holds, which its makers tuned; only a model that decides by itself how much it thinks (`adaptive`) is
        always asked to, else its thinking is hidden."""
        choices, path = self.valid(choices, choices), compacted(path)
        model, think, effort = self.model_of(choices), choices.get('thinking'), choices.get('effort')
        most = choices.get('max_tokens', 0)
        if not 0 < most < self.longest(model): most = self.longest(model)
        request = {'model': model.id, 'max_tokens': most}
        if 'system' in choices: request['system'] = choices['system']
        if model.known:  # the API finds the place to cache by itself, and says why an earlier one was of no use
            before = [m.meta['id'] for m in path if re.fullmatch(r'msg_\w+', str(m.meta.get('id')))]
            request |= {'cache_control': {'type': 'ephemeral'},
                        'diagnostics': {'previous_message_id': before[-1] if before else None}}
        if think == 'off':
            request['thinking'] = {'type': 'disabled' if 'disabled' in model.thinking else 'between_tools'}
            if effort not in EFFORTS[:3]: effort = effort and 'high'  # more is refused without thinking
        elif 'adaptive' in model.thinking: request['thinking'] = {'type': 'adaptive', 'display': 'summarized'}
        elif think and most > LEAST_THINKING:
            request['thinking'] = {'type': 'enabled', 'budget_tokens': max(LEAST_THINKING, most // 2)}
        if effort in model.efforts: request['output_config'] = {'effort': effort}
        if 'web' in choices: request['tools'] = [
            {'type': f'{name}_20260318', 'name': name, 'max_uses': self.settings.max_searches,
             'allowed_callers': ['direct']} | more for name, more in WEB.items()]
        if 'web' in choices and model.citations: request['tools'][-1]['citations'] = {'enabled': True}
        on = [server for server in servers if f'mcp-{server.id}' in choices and model.known]
        if on: request |= {
            'betas': MCP, 'mcp_servers': [{'type': 'url', 'name': server.name, 'url': server.url} | (
                {'authorization_token': server.token} if server.token else {}) for server in on],
            'tools': [*request.get('tools', ()), *[{'type': 'mcp_toolset', 'mcp_server_name': server.name}
                                                   for server in on]]}
        first = [{'role': m.role, 'content': m.content} for m in path[:2]]
        prefix = prefix_of(request | {'messages': first})
        return request | {'messages': history(path, prefix, model, sent, [server.name for server in on])}

    async def weigh(self, request: dict) -> int | None:
        "How many tokens a request has, as the API counts them; None when it can't, or not at once."
        told = {name: request[name] for name in ('model', 'messages', 'system', 'thinking', 'tools') if name in request}
        with contextlib.suppress(Exception):  # whatever it is, an estimate will do
            async with asyncio.timeout(2), self.sdk.messages.with_streaming_response.count_tokens(**told) as response:
                n = json.loads(await anext(response.iter_bytes(1_000)))['input_tokens']
                return n if type(n) is int else None

    def titling(self, path: list[Message]) -> dict:
        "The parameters of the small call that names a conversation: the cheapest model, as little thought as may be."
        active = [m for m in self.models.values() if m.lifecycle == 'active']
        priced = sorted((self.rates(m.id)[:2], m.id) for m in active if self.rates(m.id))
        haiku = [m.id for m in active if m.line == 'haiku']
        model = self.model_of({'model': priced[0][1] if priced else haiku[0] if haiku else path[-1].model})
        thinks = 'adaptive' in model.thinking and not model.ways
        said = '\n\n'.join(f'<{m.role}>\n{m.content[:2_000]}\n</{m.role}>' for m in path)
        return self.request([], {'model': model.id, 'thinking': 'off', 'max_tokens': 2_000 if thinks else 60,
                                 'effort': (*model.efforts, '')[0]}) | {
            'messages': [{'role': 'user', 'content': f'{said}\n\n{TITLING}'}]}

    def rates(self, model: str) -> tuple | None:
        "Of PRICES, the setting first; an id may end in a date that its price does not. The demo costs nothing."
        if self.settings.demo: return 0, 0, 0, 0
        known = PRICES | self.settings.own_prices
        return known.get(model) or known.get(re.sub(r'[@-]20\d{6}$', '', model))

    def price(self, model: str, usage: Mapping) -> float | None:
        "What a call cost, in USD; None where nobody can say."
        if not (rates := self.rates(model)): return None
        fresh, said, read, written = (usage.get(name) or 0 for name in (
            'input_tokens', 'output_tokens', 'cache_read_input_tokens', 'cache_creation_input_tokens'))
        times = rates[5] if len(rates) > 4 and fresh + read + written > rates[4] else 1
        return times * (fresh * rates[0] + said * rates[1] + read * rates[2] + written * rates[3]) / 1e6

    async def reply(self, request: dict, meta: dict | None = None
                    ) -> AsyncIterator[str | Thought | Whole | Waiting | Ended]:
        """What Claude says to `request` (the parameters of a call), as it comes; `Ended` is last, whatever happens.
        Tries again only before anything was said. What is known of it is in `meta` all the time, for it may be cut
        off."""
        began, meta = time.monotonic(), {} if meta is None else meta
        try:
            async for event in self._tried(request, meta, began):
                if isinstance(event, Ended): self._account(request['model'], meta, began)
                yield event
        finally: self._account(request['model'], meta, began)

    def _account(self, model, meta, began):
        "The time it took, what it cost, and how much of what the model can read is full now."
        meta |= {'seconds': round(time.monotonic() - began, 3), 'cost': meta.get('cost', self.price(model, {}))}
        room = self.models[model].max_input if model in self.models else 0
        if room and 'weight' in meta: meta['full'] = round(meta['weight'] / room, 3)

    async def _tried(self, request, meta, began):
        said, give_up = False, began + self.settings.retry_seconds
        meta['prefix'] = prefix_of(request)
        for attempt in range(1, TRIES + 1):
            try:
                async for event in self._once(request, meta):
                    if not said: meta |= {'first': round(time.monotonic() - began, 3), 'tries': attempt}
                    said = True
                    if isinstance(event, Whole) and event.block['type'] == 'mcp_tool_result':
                        event = Whole(json.loads(self._without_secrets(json.dumps(event.block), request)))
                    if isinstance(event, Ended):
                        event = replace(event, note=self._without_secrets(event.note, request))
                    yield event
                return
            except Exception as error:  # noqa: BLE001 the SDK, the HTTP client and the parser share no base
                fault = explain(error, said, request['model'])
                if id := getattr(error, 'request_id', None): meta['request'] = id[:80]
            wait = fault.after or 2 ** attempt * random.uniform(0.25, 0.75)  # noqa: S311 jitter, not a secret
            if said or not fault.again or attempt == TRIES or wait > LONGEST_WAIT or time.monotonic() + wait > give_up:
                meta['tries'] = attempt
                words = self._without_secrets(fault.words, request)
                if 'prompt is too long' in words: meta['full'] = 1  # so that the way on is offered
                yield Ended('interrupted' if said else fault.status, words, meta)
                return
            yield Waiting(wait)
            await asyncio.sleep(wait)

    def _without_secrets(self, text, request):
        "A server may quote what it was sent."
        tokens = [server.get('authorization_token') for server in request.get('mcp_servers', ())]
        for secret in filter(None, (self.settings.api_key, self.settings.auth_token, *tokens)):
            text = text.replace(secret, '…')
        return text

    async def _once(self, request, meta):
        "One answer, what each read of the connection brought; a `pause_turn` is sent back as it is and resumed."
        silent, heard = True, None
        for _ in range(RESUMES):
            heard, before, paid = Heard(heard), meta.get('usage', {}), meta.get('cost') or 0
            async for events in self._reads(request, meta):
                said, fault = [], None
                try:
                    for event in events:
                        if isinstance(event, Exception): raise event
                        said += heard.take(event)
                        if heard.complete: break  # what comes after it does not count
                except Exception as error: fault = error  # noqa: BLE001 raised once what came before it is said
                used = heard.used()
                cost = self.price(request['model'], used)
                meta |= {'usage': added(before, used), 'about': not heard.reason, 'weight': sum(used.values()),
                         'cost': cost if cost is None else paid + cost}
                for kind, some in groupby(said, type):
                    if kind is not Whole:
                        text = heard.whole(''.join(each if kind is str else each.text for each in some))
                        some = [text if kind is str else Thought(text)] * bool(text)
                    for each in some:
                        silent = silent and kind is not str
                        yield each
                if fault: raise fault
                if heard.complete: break
            if heard.held: yield '\ufffd'
            meta |= {'stop': heard.reason, 'id': heard.id} | ({'miss': heard.miss} if heard.miss else {})
            if not heard.began: raise Fault(FOREIGN)
            if not heard.complete or not heard.reason: raise Fault(BROKE_OFF, status='interrupted')
            if heard.reason != 'pause_turn': break
            paused = {'role': 'assistant', 'content': sent_back(heard.blocks, paused=True)}
            request = request | {'messages': [*request['messages'], paused]}
        note = STOPS.get(heard.reason, f'Claude stopped for a reason that is not known here: {str(heard.reason)[:40]}.')
        if heard.why and heard.reason == 'refusal': note += f' {heard.why}'
        yield Ended('done', note or 'Claude answered without words.' * silent, meta)

    async def _reads(self, request, meta) -> AsyncIterator[list[dict | Exception]]:
        "The events of each read of the connection. Silence, endless pings and another protocol are faults."
        limits, clock = self.settings, time.monotonic
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(limits.idle_seconds):
                calls = self.sdk.beta.messages if 'betas' in request else self.sdk.messages
                response = await stack.enter_async_context(calls.with_streaming_response.create(
                    **request, stream=True))
            meta['request'] = response.headers.get('request-id', '')[:80]
            kind, packing = (response.headers.get(f'content-{name}', '') for name in ('type', 'encoding'))
            if not kind.startswith('text/event-stream') or packing.lower() not in ('', 'identity'):
                raise Fault(FOREIGN)  # packed was not asked for; it could be a bomb
            lines, chunks, heard, room = EventLines(), response.iter_bytes(), clock(), 32 * limits.max_reply_chars
            pace = functools.partial(self._pace, response, stack)
            while True:
                patience = min(limits.idle_seconds, heard + limits.stall_seconds - clock())
                async with asyncio.timeout(patience): chunk = await anext(chunks, None)
                if chunk is None: return
                if (room := room - len(chunk)) < 0: raise Fault('Claude sent more than can be read.')
                if events := lines.feed(chunk):
                    if not all(isinstance(event, dict) and event.get('type') == 'ping' for event in events):
                        heard = clock()
                    if pace and b'content_block_delta' in chunk: pace = pace()
                    yield events

    def _pace(self, response, stack):
        """From here on read the socket once a frame, at its beginning: a burst is one wake-up then, and the kernel's
        buffer holds the server back. The connection reads through its `network_stream`, so that is where to wait."""
        if stream := response.http_response.extensions.get('network_stream'):
            read = stream.read

            async def paced(*args, **kwargs):
                await asyncio.sleep(until_next(self.settings.frame_seconds))
                return await read(*args, **kwargs)
            stream.read = paced
            stack.callback(delattr, stream, 'read')

KEY_REFUSED = 'The key was refused: set ANTHROPIC_API_KEY to one that is valid and start Parley again.'
PASSING = {408, 409, 429, 500, 502, 503, 504, 529}
PASSING_TYPES = {'overloaded_error', 'rate_limit_error', 'api_error', 'timeout_error'}

def upstream_error(error: dict) -> Fault:
    "A fault from the `error` object of the Messages API, in a stream (with status 200) or in a body."
    kind, message = str(error.get('type')), str(error.get('message', ''))[:300]
    if 'spend_limit' in json.dumps(error): return Fault('The spend limit of the key is reached.')
    if kind in PASSING_TYPES: return Fault(f'{BUSY} ({kind.removesuffix("_error").replace("_", " ")}).', again=True)
    if kind in ('authentication_error', 'permission_error'): return Fault(KEY_REFUSED)
    return Fault(f'Claude refused the request: {message}')

def seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    "The `retry-after` header in seconds, None when there is none that can be read."
    try: return max(0.0, float(headers.get('retry-after', '')))
    except ValueError: return None

def explain(error: Exception, said: bool, model: str) -> Fault:
    "Any exception of a call to Claude as a `Fault` in our words; nothing of its text is shown but the API's message."
    import anthropic
    log.warning('upstream fault: %s %s', type(error).__name__, getattr(error, 'status_code', ''))
    match error:
        case Fault(): return error
        case anthropic.APIStatusError(body={'error': dict() as told}) if 'spend_limit' in json.dumps(told):
            return upstream_error(told)
        case anthropic.APIStatusError(status_code=401 | 403): return Fault(KEY_REFUSED)
        case anthropic.APIStatusError(status_code=code) if code in PASSING:
            after = seconds_to_wait(error.response.headers)
            asks = f' and asks to wait {after:.0f} s before Retry' if after and after > LONGEST_WAIT else ''
            return Fault(f'{BUSY} ({code}){asks}.', again=True, after=after)
        case anthropic.APIStatusError(status_code=404):
            return Fault(f'The server at the base URL knows no such address or no model “{model}”: choose '
                         'another, or set MODEL.')
        case anthropic.APIStatusError(body={'error': {'message': str()} as told}): return upstream_error(told)
        case anthropic.APIStatusError(): return Fault(FOREIGN)
        case TimeoutError() | anthropic.APITimeoutError() | httpx2.TimeoutException():
            return Fault('Claude fell silent.', status='interrupted')
        case anthropic.APIConnectionError(): return Fault('Claude can not be reached.', again=True)
        case httpx2.HTTPError(): return Fault(BROKE_OFF, status='interrupted')
        case _ if said: return Fault('Claude sent something that can not be read.')
        case _: return Fault(FOREIGN)

# %% [markdown]
# The demo model answers when there is neither a key nor a base URL. It stands at the transport, so that everything
# above and below it is the real thing.

# %%
DEMO_ANSWER = """This is the **demo model**: a small script inside Parley that answers without a key, so that you can \
see how a reply streams in, stops and survives a reload. It does not think.

Try these:

- Say **slow**, then reload the page, close it, or open it in a second tab. The reply goes on.
- Say **long**, and press Stop in the middle. What you saw is kept.
- Say **think**, **search**, **tool** or **refuse**, and see what Claude does beside writing.
- Set `ANTHROPIC_API_KEY` and start Parley again to talk with Claude itself.

```python
def parley(you, claude):
    while you.have_questions():
        yield claude.answer(you.ask())
```

"""
DEMO_THOUGHT = 'They want to see me think. I can not, but I can show what it looks like while it happens. ' * 3
DEMO_PAGE = {'type': 'web_search_result', 'title': 'Parley', 'url': 'https://en.wikipedia.org/wiki/Parley',
             'page_age': 'October 3, 2026', 'encrypted_content': 'ZGVtbw=='}
DEMO_SEARCH = [
    {'type': 'text', 'text': 'I will look that up.'},
    {'type': 'server_tool_use', 'id': 'srvtoolu_demo', 'name': 'web_search', 'input': {'query': 'what is a parley'}},
    {'type': 'web_search_tool_result', 'tool_use_id': 'srvtoolu_demo', 'content': [DEMO_PAGE]},
    {'type': 'text', 'text': 'A parley is a talk between two sides that are at war', 'citations': [
        {'type': 'web_search_result_location', 'url': DEMO_PAGE['url'], 'title': 'Parley',
         'encrypted_index': 'ZGVtbw==', 'cited_text': 'A parley is a conference, especially one between enemies.'}]},
    {'type': 'text', 'text': '. (Nothing was really searched.)'}]

def demo_tool(server):
    return [{'type': 'mcp_tool_use', 'id': 'mcptoolu_demo', 'name': 'weather', 'server_name': server,
             'input': {'place': 'Kiel', 'days': 1}},
            {'type': 'mcp_tool_result', 'tool_use_id': 'mcptoolu_demo', 'is_error': False,
             'content': [{'type': 'text', 'text': 'Kiel: 14 °C, rain and wind from the west'}]},
            {'type': 'text', 'text': 'Take a coat: it rains in Kiel. (No tool was really called.)'}]

def demo_answer(asked: str, server='demo') -> tuple[list[dict], str, float]:
    "What the demo model says to `asked`: blocks, why it stops, and the seconds between two words."
    text, said = f'{DEMO_ANSWER}You said: “{" ".join(asked.split())[:200]}”', asked.lower()
    pause = 0.25 if 'slow' in said else 0.02
    if asked.endswith(TITLING): text, pause = 'Demo: ' + ' '.join(asked.split('</')[0].split()[1:6]), 0
    elif 'long' in said:
        part, pause = 'It goes on and on, as you asked, until it ends or you stop it. ' * 8, 0.008
        text = ''.join(f'## Part {n}\n\n{part}\n\n' for n in range(1, 26))
    elif 'tool' in said: return demo_tool(server), 'end_turn', pause
    elif 'search' in said: return DEMO_SEARCH, 'end_turn', pause
    elif 'refuse' in said: return [{'type': 'text', 'text': 'I would rather'}], 'refusal', pause
    thought = {'type': 'thinking', 'thinking': DEMO_THOUGHT, 'signature': 'ZGVtbw=='}
    return [thought] * ('think' in said) + [{'type': 'text', 'text': text}], 'end_turn', pause

class DemoStream(httpx2.AsyncByteStream):
    "The events of one demo answer: texts and thoughts word by word, other blocks in one."
    GROWING = {'text': 'text_delta', 'thinking': 'thinking_delta'}

    def __init__(self, blocks, reason, pause): self.blocks, self.reason, self.pause = blocks, reason, pause

    async def __aiter__(self):
        def event(type, **more): return f'event: {type}\ndata: {json.dumps(dict(type=type, **more))}\n\n'.encode()
        yield event('message_start', message=dict(id='msg_demo', type='message', role='assistant', model='demo',
                                                  usage=dict(input_tokens=12)))
        count = 0
        for index, block in enumerate(self.blocks):
            kind, block, after = block['type'], {**block}, []
            if kind == 'thinking': after = [dict(type='signature_delta', signature=block.pop('signature'))]
            if kind == 'text': after = [dict(type='citations_delta', citation=each)
                                        for each in block.pop('citations', ())]
            words = re.findall(r'\s*\S+\s*?', block[kind]) if kind in self.GROWING else []
            if words: block[kind] = ''
            yield event('content_block_start', index=index, content_block=block)
            for word in words:
                yield event('content_block_delta', index=index, delta={'type': self.GROWING[kind], kind: word})
                await asyncio.sleep(self.pause)
            for delta in after: yield event('content_block_delta', index=index, delta=delta)
            if not words: await asyncio.sleep(20 * self.pause)
            yield event('content_block_stop', index=index)
            count += len(words)
        yield event('message_delta', delta=dict(stop_reason=self.reason), usage=dict(output_tokens=count))
        yield event('message_stop')

def demo_model(id, name, **can):
    "An item of the demo's list of models; what is not named in `can` it can't do."
    yes = {'supported': True}
    return {'type': 'model', 'id': id, 'display_name': name, 'line': 'demo', 'lifecycle': 'active', 'max_tokens': 8_000,
            'max_input_tokens': 200_000, 'created_at': '2026-11-01T00:00:00Z', 'capabilities': {'citations': yes} | {
                name: yes | ({each: yes for each in inside} if name != 'thinking' else
                             {'types': {each: yes for each in inside}}) for name, inside in can.items()}}

DEMO_MODELS = [
    demo_model('demo', 'Demo', thinking=['adaptive', 'disabled'], effort=EFFORTS, image_input=[], pdf_input=[],
               server_tools=['web_search', 'web_fetch']),
    demo_model('demo-plain', 'Demo, plain text only'),
    demo_model('demo-old', 'Demo, once', thinking=['enabled', 'disabled']) | {
        'lifecycle': 'retired', 'created_at': '2025-01-01T00:00:00Z', 'retires_at': '2026-10-01T00:00:00Z'}]

class Demo(httpx2.AsyncBaseTransport):
    "Answers as the Messages API and the Models API do; `pace` 0 says all at once."
    def __init__(self, pace=1.0): self.pace = pace

    async def handle_async_request(self, request):
        if request.method == 'GET': return httpx2.Response(200, json={'data': DEMO_MODELS, 'has_more': False})
        told = json.loads(await request.aread())
        asked = told['messages'][-1]['content']
        if isinstance(asked, list): asked = ' '.join(b.get('text', f'({b["type"]})') for b in asked)
        blocks, reason, pause = demo_answer(asked, *[server['name'] for server in told.get('mcp_servers', ())][:1])
        return httpx2.Response(200, headers={'content-type': 'text/event-stream'},
                               stream=DemoStream(blocks, reason, pause * self.pace))

# %%
if NOTEBOOK:
    claude = Claude(Settings(), httpx2.AsyncClient(transport=Demo(pace=0)))
    hello = {'model': 'demo', 'max_tokens': 9, 'messages': [{'role': 'user', 'content': 'Hello'}]}
    async def heard(): return [event async for event in claude.reply(hello)]
    print(*try_it(heard()))

# %% [markdown]
# ## 4 Turns
#
# A reply is a task of the server. It begins when the question is committed and goes on whoever watches. What Claude
# says waits in memory for the next frame; one commit a frame serves all replies, and only what is committed is shown.
# Time is cut in frames by the clock, so nothing has to be agreed: sockets to Claude are read when a frame begins, and
# what they brought is committed together.

# %%
class Pace:
    "At most so many in so many seconds for each key, in a window that slides by a clock that never jumps."
    def __init__(self, most, seconds): self.most, self.seconds, self.taken = most, seconds, {}

    def wait(self, key) -> int:
        "Whole seconds until there is room for one more, 0 when there is."
        now, taken = time.monotonic(), self.taken.get(key, ())
        while taken and taken[0] <= now - self.seconds: taken.popleft()
        return 0 if len(taken) < self.most else int(taken[0] + self.seconds - now) + 1

    def take(self, key):
        for old in [old for old in self.taken if not self.wait(old) and not self.taken[old]]: del self.taken[old]
        self.taken.setdefault(key, deque()).append(time.monotonic())

    def give_back(self, key):
        if self.taken.get(key): self.taken[key].pop()

class Turn:
    """All live state of one reply. `pieces` are its committed texts and may be shown, `aside` are its committed
    (kind, text) that are no Markdown; `unsaved` waits for the next frame."""
    def __init__(self, reply: Message):
        self.reply, self.pieces, self.aside, self.unsaved, self.size, self.count = reply, [], [], [], 0, 0
        self.notice = ''  # words for now: a wait, a full disk
        self.end: Ended | None = None  # how it ended, perhaps not committed yet
        self.over = False  # the end is committed: nothing will ever be added
        self.view = None  # whatever shows this reply may keep itself here
        self.task: asyncio.Task | None = None
        self.cut_off = Ended('stopped')  # the end, should Claude not be heard out
        self.meta: dict = {}  # of the reply, as far as it is known
        self.changed = asyncio.Event()

    def show(self, notice: str):
        "Wake all who follow; each finds by itself what is new."
        self.notice = notice
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    async def follow(self) -> AsyncIterator[None]:
        "Yield now, after each change, and a last time when the reply is over. Whoever is slow skips steps, not text."
        while True:
            over, changed = self.over, self.changed
            yield
            if over: return
            await changed.wait()

    def cancel(self, end: Ended):
        self.cut_off = end
        self.task.cancel()

def joined(said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    "(kind, text) in order, neighbours of a kind in one; each block stays by itself."
    together = []
    for kind, text in said:
        if kind == 'block' or not together or together[-1][0] != kind: together.append((kind, [text]))
        else: together[-1][1].append(text)
    return [(kind, ''.join(texts)) for kind, texts in together]

class News:
    "That something changed, for whoever waits for it: `edition` is another number then."
    def __init__(self): self.edition, self.changed = time.time_ns(), asyncio.Event()

    def tell(self):
        self.edition += 1
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

class Turns:
    "The replies being written right now, one per conversation at most, and the one loop that commits what they say."
    def __init__(self, store: Store, claude: Claude, settings: Settings):
        self.store, self.claude, self.settings = store, claude, settings
        self.running: dict[str, Turn] = {}
        self.grew, self.began, self.closing = asyncio.Event(), asyncio.Event(), False
        self.keeper: asyncio.Task | None = None
        self.learner, self.stale = None, asyncio.Event()  # who asks for the list of models, and that it is old
        self.naming: set[asyncio.Task] = set()
        self.sweeper: asyncio.Task | None = None
        self.lists = defaultdict(News)  # of each owner, for every page that shows it
        self.asking: list[str] = []  # the owners of replies that are about to begin
        self.spent: dict[str, float] = {}  # this month, by owner, where there is a cap
        self.messages = Pace(settings.messages_per_hour, 3600)
        self.conversations = Pace(settings.conversations_per_hour, 3600)
        self.files = Pace(settings.files_per_hour, 3600)

    async def open(self):
        "Know the models of last time at once, and begin to ask for today's."
        self.claude.learn(await self.store.known('models') or [])
        self.learner = asyncio.create_task(self._learn())

    async def _learn(self):
        """Every few hours, ask for the list of models, sooner when one failed or is not on it, and look at the trash;
        never in the way."""
        while True:
            wait = 6 * 3600
            self.sweep()
            self.stale.clear()
            try:
                if listed := await self.claude.listed():
                    self.claude.learn(listed)
                    await self.store.know('models', listed)
            except Exception as error:  # noqa: BLE001 whatever it is, yesterday's list or none will do
                log.info('the list of models can not be had: %s', type(error).__name__)
                wait = 600
            await asyncio.sleep(60)
            with contextlib.suppress(TimeoutError): await asyncio.wait_for(self.stale.wait(), wait)

    async def first_choices(self, owner) -> dict:
        "What a new conversation begins with: what was chosen for the last one, but not what was said to it."
        last = await self.store.choices(owner)
        return self.claude.valid({name: value for name, value in carried(last).items() if name != 'system'})

    async def _chosen(self, owner, conversation, text, choices=None) -> tuple[dict, str]:
        """What holds for the next reply of a conversation, and the id of the model that writes it.
        Raises `Refused` 404, 409 the model is retired."""
        if conversation: choices = await self.store.choices(owner, conversation)
        elif choices is None: choices = await self.first_choices(owner)
        model = self.claude.model_of(choices)
        if model.id not in self.claude.models: self.stale.set()
        if model.lifecycle == 'retired':
            raise Refused(409, f'{model.name} is retired and answers no more: choose another model.', text)
        await self._afford(owner, model.id, text)
        return choices, model.id

    async def _afford(self, owner, model, text=''):
        "Raises `Refused` 402 when no more may be spent this month, or when nobody could say how much it would be."
        if not (cap := self.settings.monthly_usd): return
        if not self.claude.rates(model):
            raise Refused(402, f'The price of {model} is unknown and there is a monthly cap: set it in PRICES, or '
                               'choose another model. Nothing was sent.', text)
        self.spent[owner] = await self.store.spent(owner)
        if self._spending(owner) >= cap:
            raise Refused(402, f'The monthly cap is reached: ${self.spent[owner]:.2f} of ${cap:,.2f} are spent. '
                               'Nothing was sent.', text)

    def _spending(self, owner):
        "What this month costs so far, with what the running replies have used."
        theirs = [turn for turn in self.running.values() if turn.reply.owner == owner]
        return self.spent.get(owner, 0) + sum(turn.meta.get('cost') or 0 for turn in theirs)

    def _capped(self, turns):
        "Stop the replies of all who have come to the cap."
        over = {owner for owner in {turn.reply.owner for turn in turns}
                if self._spending(owner) >= self.settings.monthly_usd}
        for turn in self.running.values():
            if turn.reply.owner in over: turn.cancel(Ended('stopped', 'The monthly cap was reached.'))

    async def attach(self, owner, name: str, content: bytes) -> dict:
        "Keep a file for a question; returns its block. Raises `Refused` 413, 415, 422, 429 and `Unusable`."
        name, most = file_name(name), self.settings.max_file_bytes
        if wait := self.files.wait(owner):
            raise Refused(429, f'{self.files.most:,} files an hour are allowed. Try again in {wait:,} s.', '', wait)
        self.files.take(owner)
        try:
            if len(content) > most: raise Refused(413, f'a file may have {weight_in_words(most)}')
            kind = await asyncio.to_thread(kind_of_new, name, content)
            sha = await asyncio.to_thread(lambda: hashlib.sha256(content).hexdigest())
            await self.store.keep_file(owner, sha, kind, content)
        except Refused as no: raise Refused(no.status, f'“{name}” can’t be attached: {no.words}.') from None
        return {'type': 'file', 'sha': sha, 'name': name, 'kind': kind, 'size': len(content)}

    async def ask(self, owner, conversation, text, key=None, choices=None, **place) -> tuple[Message, Message]:
        """Save a question at its `place` with its files (of Store.ask: after, instead, files) and start the reply;
        `choices` are for a new conversation, by default those of the last.
        Raises `Refused` 422 blank, 413 too long, 429 too many, 503 stopping, and Store.ask's."""
        limit = self.settings.max_message_chars
        if not text.strip() and not place.get('files'): raise Refused(422, 'Write something first.', text)
        if len(text) > limit: raise Refused(413, f'This has {len(text):,} characters; {limit:,} are allowed.', text)
        return await asyncio.shield(self._asked(owner, conversation, text, key, choices, place))

    async def _asked(self, owner, conversation, text, key, choices, place):
        "Shielded, so that a client that hangs up between the commit and the start leaves no reply without its task."
        if key and (before := await self.store.sent(owner, conversation, text, key)): return before
        choices, model = await self._chosen(owner, conversation, text, choices)
        if not place.get('summary'): await self._fit(owner, conversation, text, choices, model, place)
        with self._open_for(owner, text, conversation is None):
            question, reply, new = await self.store.ask(owner, conversation, text, key, model, choices, **place)
            if new: self._start(reply)
            return question, reply

    async def _fit(self, owner, conversation, text, choices, model, place):
        """Raises `Refused` 413 when this is more than the model can read. By what the last reply weighed that is mostly
        out of the question; else it is counted by the API, and estimated where it can't be."""
        if not (room := self.claude.models[model].max_input if model in self.claude.models else 0): return
        instead, files, path = place.get('instead'), place.get('files') or (), []
        new = len(text) / 3 + weight_of(files)
        if conversation and instead is None:
            _, (leaf,) = await self.store.path(owner, conversation, last=1)
            if leaf.model == model and 0 < number(leaf.meta, 'weight') < .8 * room - new: return
        if conversation: _, path = await self.store.path(owner, conversation)
        if instead is not None:
            at = next((n for n, m in enumerate(path) if str(m.id) == str(instead)), 0)
            if place.get('files') is None and path: files = path[at].blocks
            path = path[:at]
        kept = compacted(path)
        weights = [number(m.meta, 'weight') for m in kept if m.model == model and 'summary' not in m.meta]
        guess = next(filter(None, reversed(weights)), sum(len(m.content) / 3 + weight_of(m.blocks) for m in kept))
        guess += len(text) / 3 + weight_of(files)
        if guess < .5 * room: return
        question = Message(0, '', owner, None, len(path), 'user', text, 'done', '', '', None, 0, 0, [*files])
        path = [*path, question]
        request = self.claude.request(path, choices, await self._files(owner, path))
        counted = await self.claude.weigh(request)
        if (guess if counted is None else counted) <= room: return
        raise Refused(413, f'With this the conversation is longer than the {room:,} tokens that '
                           f'{self.claude.models[model].name} can read. Shorten it, choose another model, or go on '
                           'with a summary: see the actions of the conversation (⋯). Nothing was sent.', text)

    async def _files(self, owner, path) -> dict[str, str | None]:
        "The files on a path, the newest first; None for those that one request has no room for."
        files = files_on(path)
        if not files: return {}
        return await self.store.to_send(owner, files[:MOST_IMAGES], ROOM) | dict.fromkeys(files[MOST_IMAGES:])

    async def retry(self, owner, conversation, at=None, key=None) -> tuple[Message, Message]:
        "A new reply beside the reply `at`, by default beside the last one. Raises `Refused` as `ask` does."
        async def retried():
            _, model = await self._chosen(owner, conversation, '')
            with self._open_for(owner):
                question, reply, new = await self.store.retry(owner, conversation, model, at, key)
                if new: self._start(reply)
                return question, reply
        return await asyncio.shield(retried())

    async def fork(self, owner, conversation, at) -> str:
        "The id of a new conversation that begins as this one did. Raises `Refused` 429, 503 and Store.fork's."
        with self._open_for(owner, begins=True): new = await self.store.fork(owner, conversation, at)
        self.lists[owner].tell()
        return new

    @contextlib.contextmanager
    def _open_for(self, owner, text='', begins=False):
        "Hold a place among the running replies until one begins there. Raises `Refused` 503 and 429."
        if self.closing: raise Refused(503, 'Parley is being restarted. Send again in a moment.', text, 5)
        running = [turn.reply.owner for turn in self.running.values()] + self.asking
        if running.count(owner) >= self.settings.replies_per_person or len(running) >= self.settings.replies_overall:
            raise Refused(429, 'Too many replies are being written. Send again when one has ended.', text, 10)
        paces = [(self.messages, 'messages')] + [(self.conversations, 'conversations')] * begins
        for pace, what in paces:
            if wait := pace.wait(owner):
                raise Refused(429, f'{pace.most:,} {what} an hour are allowed. Send again in {wait:,} s.', text, wait)
        for pace, _ in paces: pace.take(owner)
        self.asking.append(owner)
        try: yield
        finally: self.asking.remove(owner)

    def find(self, message: Message) -> Turn | None:
        "The turn that is writing `message`."
        turn = self.running.get(message.conversation)
        return turn if turn and turn.reply.id == message.id else None

    async def stop(self, owner, conversation):
        "Stop the running reply, from any tab and at any moment; returns when that is committed. Raises `Refused` 404."
        turn = self.running.get(conversation)
        if not turn or turn.reply.owner != owner: return await self.store.path(owner, conversation, 2**31)  # may be 404
        turn.cancel(Ended('stopped'))
        await self._over([turn], 2)

    async def trash(self, owner, conversation=None) -> float:
        "Move a conversation to the trash, or all; what is being written there is stopped. Raises `Refused` 404."
        since = await self.store.trash(owner, conversation)
        running = [turn for turn in self.running.values() if turn.reply.owner == owner
                   and conversation in (None, turn.reply.conversation)]
        for turn in running: turn.cancel(Ended('stopped'))
        await self._over(running, 2)
        self.sweep()
        return since

    def sweep(self):
        "Begin to take away what was in the trash for too long, a little at a time."
        async def swept():
            with contextlib.suppress(Unusable):
                while await self.store.sweep(): pass
        if not self.sweeper or self.sweeper.done(): self.sweeper = asyncio.create_task(swept())

    async def close(self):
        "Take no more questions and save what runs as interrupted."
        self.closing = True
        for turn in self.running.values():
            turn.cancel(Ended('interrupted', STOPPED))
        await self._over(list(self.running.values()), 2)
        for task in filter(None, (self.keeper, self.learner, self.sweeper, *self.naming)): task.cancel()

    async def _over(self, turns, seconds):
        async def wait(turn):
            async for _ in turn.follow(): pass
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds): await asyncio.gather(*map(wait, turns))

    def _start(self, reply):
        turn = self.running[reply.conversation] = Turn(reply)
        self.lists[reply.owner].tell()
        turn.task = asyncio.create_task(self._write(turn))
        turn.task.add_done_callback(functools.partial(self._written, turn))
        if not self.keeper or self.keeper.done(): self.keeper = asyncio.create_task(self._keep())
        if self.closing: turn.cancel(Ended('interrupted', STOPPED))

    async def _write(self, turn):
        "The one owner of a reply: hears Claude out, or as far as it goes."
        try:
            conversation, path = await self.store.path(turn.reply.owner, turn.reply.conversation)
            path, model = compacted(path), self.claude.models.get(turn.reply.model)
            if 'summary' in turn.reply.meta:
                fit = fitting(path, model.max_input if model else 0)
                path, turn.meta['left'] = fit, len(path) - len(fit)
            sent = await self._files(turn.reply.owner, path)
            left = sum(content is None for content in sent.values())
            choices = conversation.choices | {'model': turn.reply.model}
            servers = await self.store.servers(turn.reply.owner) if carried(choices) != choices else ()
            request = self.claude.request(path, choices, sent, servers)
            async with contextlib.aclosing(self.claude.reply(request, turn.meta)) as events:
                async for event in events:
                    match event:
                        case str(): await self._hear(turn, 'text', event)
                        case Thought(text): await self._hear(turn, 'thought', text)
                        case Whole(block):
                            await self._hear(turn, 'block', unbroken(json.dumps(block, ensure_ascii=False)))
                        case Waiting(seconds): turn.show(f'{BUSY}, trying again in {seconds:.0f} s')
                        case Ended():
                            note = f'{several(left, "file")} left out: one request has no room for more. ' * bool(left)
                            turn.end = replace(event, note=(note + event.note).strip())
                            if event.status == 'failed': self.stale.set()  # perhaps the model is no more
                    if turn.size >= self.settings.max_reply_chars:
                        turn.cut_off = Ended('interrupted', 'The reply was cut: it is longer than MAX_REPLY_CHARS.')
                        break
        except Exception as error:  # noqa: BLE001 whatever it is, the reply must end and the person be told
            log.error('a reply failed: %s', type(error).__name__)
            turn.cut_off = Ended('failed', 'Parley failed; the log says more.')

    def _written(self, turn, task):
        "However its task ended, even before it began, a reply has an end."
        turn.end = turn.end or replace(turn.cut_off, meta=turn.meta)
        self.grew.set()

    async def _hear(self, turn, kind, text):
        if kind != 'block': text = text[:self.settings.max_reply_chars - turn.size]
        if not turn.size: self.began.set()
        turn.unsaved.append((kind, text))
        if kind != 'block': turn.size += len(text)  # how much comes in blocks is bounded where it is read
        self.grew.set()
        while len(turn.unsaved) > 250: await turn.changed.wait()  # the disk is slow: read no further

    async def _keep(self):
        "Commit what grew once a frame, and the first words of a reply at once. A disk that fails is tried again."
        committed = 0.0
        while True:
            await self.grew.wait()
            if (early := committed + 0.8 * self.settings.frame_seconds - time.monotonic()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(early): await self.began.wait()
            self.grew.clear()
            self.began.clear()
            committed = time.monotonic()
            grown = [turn for turn in self.running.values() if turn.unsaved or turn.end]
            if self.settings.monthly_usd: self._capped(grown)
            parts = [grown]
            while parts:
                try: await self._commit(some := parts.pop())
                except Exception as error:  # noqa: BLE001 whatever it is: without this loop no reply would ever end
                    log.error('a frame was not saved: %s', type(error).__name__)
                    if not isinstance(error, Unusable) and len(some) > 1:  # one can't be saved: the others do not wait
                        parts = [[turn] for turn in some]
                        continue
                    words = error if isinstance(error, Unusable) else 'the database failed'
                    for turn in some: turn.show(f'Not saved yet: {words}. Trying again.')
                    await asyncio.sleep(1)
                    self.grew.set()

    async def _commit(self, turns):
        batch = [(turn, len(turn.unsaved), joined(turn.unsaved), turn.end) for turn in turns]
        pieces = [Piece(turn.reply.id, turn.count + n, text, kind) for turn, _, said, _ in batch
                  for n, (kind, text) in enumerate(said)]
        ended = await self.store.save(pieces, [(turn.reply.id, end.status, end.note, end.meta)
                                               for turn, _, _, end in batch if end])
        for turn, count, said, end in batch:
            del turn.unsaved[:count]
            turn.count += len(said)
            for kind, text in said:
                if kind == 'text': turn.pieces.append(text)
                else: turn.aside.append((kind, text))
            if end:
                turn.over = True
                turn.reply = next(reply for reply in ended if reply.id == turn.reply.id)
                del self.running[turn.reply.conversation]
                self.lists[turn.reply.owner].tell()
                if turn.reply.idx == 1 and end.status == 'done' and self.settings.titles == 'on':
                    self.naming.add(task := asyncio.create_task(self._name(turn.reply)))
                    task.add_done_callback(self.naming.discard)
            turn.show('')
        if self.settings.monthly_usd:
            with contextlib.suppress(Unusable):
                for reply in ended: self.spent[reply.owner] = await self.store.spent(reply.owner)

    async def _name(self, reply):
        "A title after the first answer, in nobody's way: what goes wrong is only logged."
        try:
            conversation, path = await self.store.path(reply.owner, reply.conversation, before=2)
            if conversation.named: return
            text, end, meta, request = '', None, {}, self.claude.titling(path)
            await self._afford(reply.owner, request['model'])
            try:
                async with contextlib.aclosing(self.claude.reply(request, meta)) as events:
                    async for event in events:
                        if isinstance(event, str): text += event
                        if isinstance(event, Ended): end = event
                        if len(text) > 2_000: break
            finally: await self.store.book(reply.owner, request['model'], 'title', meta)
            title = titled(text, self.settings.max_title_chars)
            if end and end.status == 'done' and title:
                await self.store.entitle(reply.owner, reply.conversation, title)
                self.lists[reply.owner].tell()
        except Exception as error: log.warning('no title: %s', type(error).__name__)  # noqa: BLE001 the old one stays

# %%
if NOTEBOOK:
    async def and_then():
        turns = Turns(store, claude, Settings())
        await turns.ask(OWNER, question.conversation, 'And then?')
        async for _ in (turn := turns.running[question.conversation]).follow(): print(len(turn.pieces), end=' ')
    try_it(and_then())

# %% [markdown]
# ## 5 Words
#
# Markdown becomes safe HTML, block by block while it is written. A block that has closed is typeset once and never
# touched again; only the open tail is set anew, and most pieces of it are plain letters that need no parser at all.
# Three walls: the parser knows no HTML, our renderer writes only what it knows, and nh3 has the last word. Beside nh3
# go two things only, both written by our own hand with every text escaped: a code block's frame and a formula.
# `render(text)` is what a reload shows; a `Typesetter` that has finished holds exactly the same, whatever the pieces.

# %%
MARK = '<span class="end"></span>'  # stands in a tail where plain letters may follow; the page gives it an id
END, ASIDE = '\ufdd0', '\ufdd1'     # noncharacters, never in a text (see `normal`): the mark, and a thing set aside
BLOCK_LIMIT = 64 * 1024    # of `weight`; a block of more is shown unstyled
TOKENS_LIMIT = 4 * BLOCK_LIMIT  # of one block; a letter makes three at most
CODE_LIMIT = 100 * 1024    # characters; longer code is not coloured
CODE_SECONDS = 0.5         # of CPU to colour a block; a language that took longer is plain for the next
SLOW_SECONDS = 600         # as every one is while so many of them are slow:
SLOW_MOST = 10
FORMULA_LIMIT = 2_000      # characters; a longer formula is shown as its source, and so are
FORMULAS_LIMIT = 500       # further ones in the same block: each costs about 0.3 ms
DEEP = 24                  # levels of quotes and lists (a list is two); what is deeper is plain text
CALM = 2_000               # of `weight`; a tail of more is set again only when it has grown by an eighth
# What no style colours needs no span: half the nodes of a code block.
COLOURED = set(STANDARD_TYPES.values()) - {'', 'n', 'p', 'w', 'x', 'err'}

def normal(text):
    """`text` with `\\n` for every line end; U+FFFD for NUL, lone surrogates and our own two marks."""
    return re.sub('[\0\ud800-\udfff\ufdd0\ufdd1]', '\ufffd', re.sub('\r\n?', '\n', text))

class Lexers:
    """Code to words, [[class, text]], in a process of its own: a few letters can keep one of Pygments' expressions busy
    for ever, and it holds the GIL. The process begins with the first block, knows no secret and ends with its input, so
    with ours; the kernel ends it when a block has had its time, and the next block begins another. To be called in a
    thread: who comes while others are slow waits."""
    PROGRAM = '''
import sys
seconds, sys.path[:] = float(sys.argv[1]), sys.argv[2:]
import json, signal
from pygments.lexers import get_all_lexers, get_lexer_by_name
from pygments.token import STANDARD_TYPES
names = {name for _, names, *_ in get_all_lexers(plugins=False) for name in names}
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    name, code = json.loads(line)
    try:
        tokens = get_lexer_by_name(name, stripnl=False, ensurenl=False).get_tokens(code) if name in names else ()
        words = [(STANDARD_TYPES.get(kind) or STANDARD_TYPES.get(kind.parent, ''), text) for kind, text in tokens]
    except Exception: words = []
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(words), flush=True)
'''
    def __init__(self): self.lock, self.child, self.line, self.slow = threading.Lock(), None, None, {}

    def words(self, code, name):
        "The words of `code`, none if it is to stand plain."
        with self.lock:
            now = time.monotonic()
            self.slow = {slow: until for slow, until in self.slow.items() if until > now}
            if name in self.slow or len(self.slow) >= SLOW_MOST: return []
            try:
                if not self.child or self.child.poll() is not None: self._begin()
                self.line.sendall(json.dumps([name, code]).encode() + b'\n')
                with self.line.makefile('rb') as answer: words = json.loads(answer.readline())
                return words if ''.join(text for _, text in words) == code else []  # some lexers drop a character
            except (OSError, ValueError, TypeError):
                self.slow[name] = now + SLOW_SECONDS
                if self.child: self.child.kill(), self.child.wait()
                return []

    def _begin(self):
        if self.line: self.line.close()
        self.line, theirs = socket.socketpair()
        self.line.settimeout(10 * CODE_SECONDS)  # of the clock, should the kernel's hand ever fail
        with theirs:
            self.child = subprocess.Popen(  # noqa: S603 our own words only
                [sys.executable, '-IS', '-c', self.PROGRAM, str(CODE_SECONDS), *sys.path], stdin=theirs, stdout=theirs,
                stderr=subprocess.DEVNULL, cwd='/', env={}, start_new_session=True)

LEXERS = Lexers()

def coloured(words):
    """HTML in pieces of some hundred words: nh3 sees no giant string, and other threads get their turn."""
    spans = [f'<span class="{name}">{escape(text, False)}</span>' if name in COLOURED else escape(text, False)
             for name, text in words]
    return [''.join(spans[i:i + 400]) for i in range(0, len(spans), 400)]

def figure(code, info='', colour=True):
    """A code block; the text of its `code` is `code`, to the letter."""
    name = (re.match(r'\s*([A-Za-z0-9+#._-]{1,24})(?=[\s{,]|$)', info) or ['', ''])[1]
    fancy = colour and name and 0 < len(code) <= CODE_LIMIT and END not in code
    words = fancy and LEXERS.words(code, name.lower())
    pieces = coloured(words) if words else [escape(code, False).replace(END, MARK)]
    return (f'<figure class="code"><figcaption>{name}</figcaption><pre tabindex="0"><code>'
            + ''.join(map(clean, pieces)) + '</code></pre></figure>')

MATH = set('math mrow mi mn mo mtext mspace ms mfrac msqrt mroot mstyle mpadded mphantom menclose msub msup msubsup '
           'munder mover munderover mmultiscripts mprescripts none mtable mtr mtd merror'.split())
MATH_ATTRIBUTES = set('display mathvariant stretchy fence separator form lspace rspace minsize maxsize columnalign '
                      'rowspacing columnspacing columnlines rowlines linethickness accent accentunder movablelimits '
                      'displaystyle scriptlevel width height depth notation symmetric'.split())
def mathml(element):
    """MathML written anew from the tree: known tags, known attributes, escaped text. It is put in place after nh3 has
    cleaned the rest: no sanitiser need read `mtext` as every browser does, for there is never HTML inside a formula."""
    if element.tag not in MATH: raise ValueError(element.tag)
    attributes = ''.join(f' {key}="{value}"' for key, value in element.items()
                         if key in MATH_ATTRIBUTES and re.fullmatch(r'[\w.%+ -]*', value))
    inside = escape(unescape(element.text or '')) + ''.join(map(mathml, element))
    return f'<{element.tag}{attributes}>{inside}</{element.tag}>'

@functools.lru_cache(1024)
def formula(latex, display):  # MathML, or the source where that cannot be had; `display` is 'block' or 'inline'
    with contextlib.suppress(Exception):  # the library raises what it likes, RecursionError included
        if len(latex) <= FORMULA_LIMIT and END not in latex: return mathml(convert_to_element(latex, display=display))
    return as_source(latex)

def as_source(latex): return f'<code class="math">{escape(latex, False).replace(END, MARK)}</code>'

def host_of(url, schemes=('http', 'https', 'mailto')):
    """The host (for mailto: the address's) that a browser would really go to, or '' for what we do not link."""
    try: parts = urlsplit(url)
    except ValueError: return ''
    host = (parts.path if parts.scheme == 'mailto' else parts.netloc).rpartition('@')[2]
    plain = re.fullmatch(r'([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:\d*)?', host.lower())
    return plain[1] if plain and parts.scheme in schemes else ''

def pretends(words, host):  # does a link's text name a host other than its own?
    seen = ''.join(c for c in unicodedata.normalize('NFKC', words[:5_000]) if unicodedata.category(c) != 'Cf')
    named = re.findall(r'(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}(?![\w-])|\blocalhost\b', seen.lower()[:500])
    return any(name.removeprefix('www.') != host.removeprefix('www.') for name in named)

# %% [markdown]
# ### From Markdown to HTML
#
# CommonMark with tables, strikethrough and tasks is the library's; formulas, bare addresses, notes and a bound for
# nesting are four short rules beside it. How a token is written is said once, in `Pen`.

# %%
CLOSING = {r'\(': r'\)', r'\[': r'\]'}
# Prices stay text by pandoc's rule for a single dollar: no space inside, no digit after.
INLINE_MATH = re.compile(r'\$\$([^$]{1,2000})\$\$|\$(?![\s$])((?:[^$\\]|\\.){0,1999}(?:[^$\\\s]|\\\S))\$(?!\d)'
                         r'|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]', re.DOTALL)
NOTE_MARK = re.compile(r'\[\^([^\]\s]{1,99})\]')
URL, AFTER_URL = re.compile(r'://[^\s<>\[\]{}|\\^`"*\ufdd0]{1,2000}'), '.,;:!?\'_~'
def new_block(state, start, end, silent):  # asked first where one begins: above a top-level one all has ended
    if not silent and state.level == 0: state.hand_over()
    return False

def deep(state, start, end, silent):  # nesting beyond `DEEP` is text; the parser's own limit would drop the text
    return not silent and state.level >= DEEP and paragraph(state, start, end, silent)

def math_block(state, start, end, silent):
    r"""`$$` or `\[` at the start of a line: up to the closing delimiter at the end of a line, or to a blank line, so
    that a forgotten delimiter swallows one paragraph at most. The first line alone decides that it is a formula."""
    first = state.src[state.bMarks[start] + state.tShift[start]:state.eMarks[start]].rstrip()
    if state.is_code_block(start) or not first.startswith(('$$', r'\[')): return False
    closing = CLOSING.get(first[:2], '$$')
    at = first.find(closing, 2)
    if 0 <= at < len(first) - 2: return False  # words follow the formula: a paragraph
    if silent: return True
    line, closed = start + 1, at >= 0
    while not closed and line < end and not state.isEmpty(line) and state.sCount[line] >= state.blkIndent:
        closed = state.src[state.bMarks[line]:state.eMarks[line]].rstrip().endswith(closing)
        line += 1
    token = state.push('math_block', 'math', 0)
    token.map, token.meta = [start, line], {'closed': closed, 'display': 'block'}
    latex = state.getLines(start, line, state.blkIndent, False).strip()
    token.content, state.line = latex[2:-2].strip() if closed else latex, line
    return True

def math_inline(state, silent):
    closing = CLOSING.get(state.src[state.pos:state.pos + 2], '$')
    if state.src.find(closing, state.pos + 1, state.pos + FORMULA_LIMIT + 4) < 0: return False  # quick for a lone one
    found = INLINE_MATH.match(state.src, state.pos, state.posMax)
    if not found: return False
    if not silent:
        token = state.push('math_inline', 'math', 0)
        token.content = found[found.lastindex]
        token.meta = {'closed': True, 'display': 'block' if found.lastindex in (1, 4) else 'inline'}
    state.pos = found.end()
    return True

def bare_url(state, silent):
    """`https://…` without brackets is a link; `www.` and bare domains stay text."""
    found = state.linkLevel == 0 and URL.match(state.src, state.pos, state.posMax)
    scheme = found and re.search(r'(?<![A-Za-z0-9+.-])https?$', state.src[max(state.pos - 6, 0):state.pos])
    if not scheme or not silent and not state.pending.endswith(scheme[0]): return False
    rest = found[0].rstrip(AFTER_URL)
    while rest.endswith(')') and rest.count(')') > rest.count('('): rest = rest[:-1].rstrip(AFTER_URL)
    url = state.md.normalizeLink(scheme[0] + rest)
    if not host_of(url): return False
    if not silent:
        state.pending = state.pending[:-len(scheme[0])]
        state.push('link_open', 'a', 1).attrs = {'href': url}
        state.push('text', '', 0).content = scheme[0] + rest
        state.push('link_close', 'a', -1)
    state.pos += len(rest)
    return True

def note(state, start, end, silent):
    """`[^label]: text` is no block where it stands. As with links, the first definition counts."""
    before = len(state.tokens)
    if not footnote_def(state, start, end, silent): return False
    if not silent:
        opening, *tokens, _ = state.tokens[before:]
        del state.tokens[before:]
        state.env['notes'].setdefault(opening.meta['label'], Part.of(state, tokens, opening.map))
    return True

def note_mark(state, silent):
    """`[^label]`. While a reply is open a number counts as a note whose text is still to come."""
    found = NOTE_MARK.match(state.src, state.pos, state.posMax)
    if not found or not (found[1] in state.env['notes'] or state.env['guess'] and found[1].isdigit()): return False
    if not silent: state.push('note', 'sup', 0).meta = {'label': found[1]}
    state.pos = found.end()
    return True

class Pen(RendererHTML):
    """How a token is written; a method is named after its token."""
    def aside(self, env, html):  # kept out of nh3's way; its place is taken by a number between noncharacters
        env['aside'].append(html)
        return f'{ASIDE}{len(env["aside"]) - 1}{ASIDE}'
    def text(self, tokens, i, options, env): return escape(tokens[i].content).replace(END, MARK)
    def code_inline(self, tokens, i, options, env): return f'<code>{self.text(tokens, i, options, env)}</code>'
    def code_block(self, tokens, i, options, env): return self.aside(env, figure(tokens[i].content))
    def fence(self, tokens, i, options, env):
        return self.aside(env, figure(tokens[i].content, unescape(tokens[i].info), not env['tail']))
    def table_open(self, *_): return '<div class="table" tabindex="0"><table>\n'
    def table_close(self, *_): return '</table></div>\n'
    def td_open(self, tokens, i, *_):
        align = str(tokens[i].attrs.get('style', '')).removeprefix('text-align:')
        return f'<{tokens[i].tag} class="{align}">' if align else f'<{tokens[i].tag}>'
    th_open = td_open

    def list_item_open(self, tokens, i, *_):
        checked = tokens[i].meta.get('checked')
        return '<li>' if checked is None else f'<li class="task"><span class="box">{"☑" if checked else "☐"}</span> '
    def link_open(self, tokens, i, *_):
        url, title, level = str(tokens[i].attrs['href']), str(tokens[i].attrs.get('title', '')), tokens[i].level
        end = next(j for j in range(i, len(tokens)) if tokens[j].type == 'link_close' and tokens[j].level == level)
        host, words = host_of(url), ''.join(t.content for t in tokens[i:end] if t.type in ('text', 'code_inline'))
        drawn = any(t.type in ('image', 'math_inline') for t in tokens[i:end])  # and may show any name
        told = f' <span class="host">({escape(host)})</span>' if host and (drawn or pretends(words, host)) else ''
        tokens[end].meta['html'] = f'</a>{told}' if host else ''
        title = title and f' title="{escape(title)}"'
        cite = ' class="cite"' * (bool(words) and {*map(ord, words)} <= {*RAISED.values()})
        return f'<a{cite} href="{escape(url)}"{title} target="_blank">' if host else ''
    def link_close(self, tokens, i, *_): return tokens[i].meta['html']

    def image(self, tokens, i, options, env):
        url, words = str(tokens[i].attrs['src']), escape(self.renderInlineAsText(tokens[i].children, options, env))
        host = host_of(url, ('http', 'https'))
        if not host: return words
        return f'<span class="image" data-src="{escape(url)}">{words} <span class="host">({host})</span></span>'
    def note(self, tokens, i, options, env):  # its turn of first use; without ids there is nothing to jump to
        return f'<sup class="note">{env["numbers"].setdefault(tokens[i].meta["label"], len(env["numbers"]) + 1)}</sup>'

    def math_inline(self, tokens, i, options, env):
        env['formulas'] += 1
        latex, fine = tokens[i].content, tokens[i].meta['closed'] and env['formulas'] <= FORMULAS_LIMIT
        return self.aside(env, formula(latex, tokens[i].meta['display']) if fine else as_source(latex))
    def math_block(self, *token): return f'<div class="math" tabindex="0">{self.math_inline(*token)}</div>'

WALL = nh3.Cleaner(
    tags=set('p h1 h2 h3 h4 h5 h6 strong em s code a ul ol li blockquote hr br table thead tbody tr th td div span sup '
             'section pre'.split()),
    attributes={'a': {'href', 'title'}, 'ol': {'start'}, 'span': {'data-src'}},
    tag_attribute_values={'a': {'target': {'_blank'}}, 'div': {'tabindex': {'0'}}},
    allowed_classes={'span': {'end', 'host', 'image', 'box', *STANDARD_TYPES.values()} - {''}, 'li': {'task'},
                     'div': {'table', 'math', 'plain'}, 'sup': {'note'}, 'section': {'notes'}, 'p': {'cut'},
                     'a': {'cite'}, **dict.fromkeys(('th', 'td'), {'left', 'center', 'right'})},
    url_schemes={'http', 'https', 'mailto'}, url_relative='deny', link_rel='noopener noreferrer nofollow')
def clean(html): return WALL.clean(ASIDE + html)[1:]  # with something before it, or a leading U+FEFF would go

PARSER = MarkdownIt('commonmark', {'html': False, 'xhtmlOut': False, 'tasklists': True, 'maxNesting': 2 * DEEP},
                    renderer_cls=Pen).enable(['table', 'strikethrough']).disable(['html_block', 'html_inline'])
PARSER.validateLink = lambda url: True  # the pen decides: what we do not link keeps its words
PARSER.block.ruler.before('table', 'new_block', new_block)
PARSER.block.ruler.after('new_block', 'deep', deep)
PARSER.block.ruler.before('fence', 'math_block', math_block, {'alt': ['paragraph', 'reference', 'blockquote', 'list']})
PARSER.block.ruler.before('reference', 'note', note, {'alt': ['paragraph', 'reference']})
PARSER.inline.ruler.after('text', 'bare_url', bare_url)
PARSER.inline.ruler.before('escape', 'math_inline', math_inline)
PARSER.inline.ruler.before('link', 'note', note_mark)
PARSER.core.ruler.enableOnly(['inline', 'text_join'])
# A row that lacks cells gets them, up to so many in a table: about one for a letter at most, whatever the tables.
sys.modules['markdown_it.rules_block.table'].MAX_AUTOCOMPLETED_CELLS = 50

@dataclass
class Part:
    """A top-level block or a note's text: the parser's tokens and the Markdown they stand for."""
    tokens: list
    source: str
    lines: list        # first line, and the one after the last

    @classmethod
    def of(cls, state, tokens, lines):
        return cls(tokens, state.src[state.bMarks[lines[0]]:state.bMarks[lines[1]]].rstrip('\n'), lines)

def surroundings(references, notes, numbers, guess=False):
    """What a parser run knows and learns: link definitions {label: link}, notes {label: Part}, their numbers."""
    return {'references': references, 'notes': notes, 'numbers': numbers, 'guess': guess, 'tail': False}

DROPPED = Token('', '', 0)  # stands for all that are
class Reading(StateBlock):
    """The parser's place in a text. Tokens take hundreds of times the room of their letters, so those of a block go to
    `take` before the next begins, and one too long to typeset keeps no more of them than the longest that isn't."""
    def __init__(self, text, env, take):
        super().__init__(text, PARSER, env, [])
        self.take = take
    def push(self, *args):
        token = super().push(*args)
        if len(self.tokens) > TOKENS_LIMIT: self.tokens[-1] = DROPPED
        return token
    def hand_over(self):
        if self.tokens: self.take(Part.of(self, self.tokens, self.tokens[0].map))
        self.tokens = []

def parse(text, env, take):
    """Hand the top-level blocks to `take`, in order. -> the lines as the parser sees them."""
    state = Reading(text, env, take)
    PARSER.block.tokenize(state, 0, state.lineMax)
    state.hand_over()
    return state

def weight(text): return len(text) + 25 * text.count('[')  # in 10 us to typeset it, or less

LONG = '<div class="plain"><p class="cut">Too long to typeset, shown as written.</p><pre>\n%s</pre></div>'
def write(part, env):
    """One block's HTML: exactly one element. Runs the inline parser; may be called again with other surroundings."""
    code = part.tokens and part.tokens[0].type in ('fence', 'code_block')
    if weight(part.source) > BLOCK_LIMIT and not code: return LONG % escape(part.source).replace(END, MARK)
    env |= {'aside': [], 'formulas': 0}
    for token in part.tokens:
        if token.type == 'inline':
            token.children, token.content = [], complete(token.content) if END in token.content else token.content
    PARSER.core.process(StateCore('', PARSER, env, part.tokens))
    html = clean(PARSER.renderer.render(part.tokens, PARSER.options, env)).strip()
    return re.sub(f'{ASIDE}(\\d+){ASIDE}', lambda found: env['aside'][int(found[1])], html).replace(END, '')

def notes_section(env):
    """The notes that were used, numbered by first use; a note's text may use further ones."""
    items = []
    while len(items) < len(env['numbers']):
        for label in list(env['numbers'])[len(items):]:
            items.append(f'<li>{write(env["notes"][label], env) if label in env["notes"] else ""}</li>')
    return [f'<section class="notes"><ol>{"".join(items)}</ol></section>'] if items else []

def render(text):
    """Markdown -> the safe HTML of its blocks, one element each; a section of notes comes last if there are any."""
    text, env, blocks = normal(text), surroundings({}, {}, {}), []
    if ']:' in text: parse(text, env, lambda part: None)  # what is defined below counts above
    parse(text, env, lambda part: blocks.append(write(part, env)))
    return blocks + notes_section(env)

SAID = re.compile(r'^ {0,3}(`{3,})([^`\n]*)\n(.*?)(?:^ {0,3}\1`*[ \t]*(?:\n|\Z)|\Z)'  # fenced code, or lines of words
                  r'|(?:(?!^ {0,3}`{3,}[^`\n]*\n)(?:[^\n]+\n?|\n)){1,20}', re.M | re.S)
def render_user(text, most=20):
    """A person's message as it was written: no Markdown but code fences; what goes beyond `most` lines is folded."""
    shown, folded, lines = '', '', 0
    for said in SAID.finditer(normal(text)):
        lines += said[0].count('\n') + (not said[1] and said[0][-1] != '\n')
        html = figure(said[3], said[2]) if said[1] else f'<p class="said">{escape(said[0], False)}</p>'
        if folded or shown and lines > most or lines > most + 1: folded += html
        else: shown += html
    return shown + (f'<details><summary>All {lines} lines</summary>{folded}</details>' if folded else '')

# %% [markdown]
# ### While it is written
#
# A block is final when later lines cannot reach it. Mostly it is so when another follows, but a link definition's label
# or title may go on over lines that meanwhile look like a heading underlined with `===` or like a paragraph. It ends at
# a blank line and at whatever may interrupt it, so only there do we cut, and only after complete lines.

# %%
@dataclass
class Block: html: str  # it has closed and stands before the tail from now on
@dataclass
class Tail: html: str   # what stands behind the closed blocks, all of it
@dataclass
class Text: text: str   # letters, unescaped, for the place of the tail's `MARK`
@dataclass
class Mend:             # closed block `n` (from 0) looks different now that a definition has come after it
    n: int
    html: str

def final(state, part, after=None):
    """Can no later line reach this block, which `after` follows?"""
    token, line = part.tokens[0], part.lines[1]
    if token.type == 'fence': return token.content.count('\n') == token.map[1] - token.map[0] - 2  # it has its end
    if token.type == 'hr' or token.markup[:1] == '#' or token.type == 'math_block' and token.meta['closed']: return True
    blank = line < state.lineMax and state.isEmpty(line)
    if after: return blank or state.isEmpty(line - 1)
    return blank and token.type not in ('bullet_list_open', 'ordered_list_open', 'code_block')

# What is loose at the end of a tail; a link that has begun; whole code, escapes, and marks that may be open.
LOOSE = re.compile(r'(?:[*_~`\\$|<!]+|\\[([]|<[\w:/.@-]*|&#?\w{0,31}|\[\^[^\]\s]*)\Z')
LINK = re.compile(r'!?\[([^\[\]\n]*)(?:\](?:\([^()\n]*)?)?\Z')
RUN = re.compile(r'(`+)(?!`)(?:(?!\1).)*?(?<!`)\1(?!`)|\\[^()[\]]'
                 r'|(?P<mark>`+|\*+|~~|(?<![^\W_])_+|_+(?![^\W_])|\$\$?|\\.)', re.S)
def complete(words):
    """The last words of a tail without what is loose; code, emphasis, formulas and links that are open are closed, with
    `END` where letters may follow. A guess that the next render may overturn; closed blocks never see it."""
    head, text, open_ = words[:-CALM], words[-CALM:].replace(END, ''), []
    end = '' if LOOSE.search(text[-80:]) or re.search(r'://\S*$|\](?:\([^)]*)?$', text[-800:]) else END
    while found := LOOSE.search(text[-80:]): text = text[:-len(found[0])]
    text = LINK.sub(r'\1', text)
    for run in RUN.finditer(text):
        mark, after = run['mark'], text[run.end():run.end() + 1]
        if not mark: continue
        if mark in open_ and not text[run.start() - 1].isspace(): del open_[open_.index(mark):]
        elif open_ and open_[-1][0] in '$\\' or mark in CLOSING.values(): continue
        elif after.strip() and not (mark == '$' and after.isdigit()): open_.append(CLOSING.get(mark, mark))
    return head + text + end + ''.join(reversed(open_))

# Letters that mean nothing where they stand, inside a line that has begun: no parser need see them.
PLAIN = re.compile(r'(?:[^\W_]|[ ,;\'"?!(){}%=+^.-]|[^\x00-\x7f]|:(?=[ \w]|$)|(?<![:/])/(?!/))+')
SYNTAX = re.compile(r'[*_`|~#>]+')
# A last line that may still become anything is not shown yet; nor is what may be the end of a fence.
UNDECIDED = re.compile(r'[ >\t]*(?:[-+*]|\d{1,9}[.)]?)?[ \t]*'
                       r'(?:\[[ xX]?\]?|[-=*_+`~#|:$>\\ \t]{0,80}|\\\[|\[\^?[^\]\s]*\]?:?[^ ]*)')
FENCE_END = re.compile(r' {0,3}(?:`{0,50}|~{0,50})[ \t]{0,40}')
# Begun like this after a blank line, a line starts a block of its own, whatever comes of it.
BEGUN = r'(?:[*_`]*[^\W\d]|#{1,6} \S)'
NEW_BLOCK = re.compile(rf'\n[ \t]*\n{BEGUN}|\n```[^`\n]*\n')

def may_have_code(text): return '```' in text or '~~~' in text  # to colour, which takes its time

class Typesetter:
    """Typesets a reply while it is written: feed pieces of text, get changes. After `finish()`, `blocks` equals
    `render(whole text)`, string for string.
    Cost: the tail is parsed when a piece could be syntax, a long one only when it has grown by an eighth or a new block
    has begun. So a text of n characters costs O(n). An open fence is never parsed. A text with notes or definitions,
    which may be used above them, costs one more render at the end."""
    def __init__(self):
        self.blocks, self.work = [], 0      # work: characters given to the parser so far, for the tests
        self._lines = io.IncrementalNewlineDecoder(None, True)  # keeps a piece's last '\r', perhaps half a line end
        self._above = []                                        # the text of the blocks
        self._references, self._notes, self._numbers = {}, {}, {}
        self._start('')

    def _start(self, text):  # a new tail
        self._pieces, self._size, self._weight, self._code = [text], len(text), weight(text), may_have_code(text)
        self._end, self._fence = text[-100:], None            # a pattern: how the open fence would end
        self._html, self._marked, self._shown = '', False, 0  # as it was last set, at the weight `_shown`
        self._added, self._held = [], ''                      # since then; what may be the end of a fence
        self._vain = 0                                        # the weight at which a new block closed nothing

    def heavy(self, piece):
        """May the next feed, of an ordinary `piece`, take longer than about 10 ms? Then call it in a thread."""
        if may_have_code(self._end + piece): return True
        return self._size > 5_000 if self._fence else self._code or self._weight > 2_000

    @property
    def tail(self): return self._html.replace(MARK, escape(''.join(self._added)) + MARK)
    def html(self): return ''.join(self.blocks) + self.tail

    def feed(self, piece):
        """The text that came since. -> changes in their order: blocks first, then at most one Tail or Text."""
        text = normal(self._lines.decode(piece))
        if not text: return []
        recent, at = self._end + text, len(self._end)
        self._pieces.append(text)
        self._size, self._weight, self._end = self._size + len(text), self._weight + weight(text), recent[-100:]
        self._code = self._code or may_have_code(recent)
        plain = self._marked and (self._shown > BLOCK_LIMIT or PLAIN.fullmatch(recent, at))
        if self._fence:
            if self._fence.search(recent): return self._set()
            text = self._but_end(text)
        elif NEW_BLOCK.search(recent) and self._weight * 8 >= self._vain * 9:
            self._vain = self._weight  # unless a block closes now
            return self._set()
        elif not plain:
            if self._shown <= CALM or self._weight * 8 >= self._shown * 9: return self._set()
            text = SYNTAX.sub('', text) * self._marked
        self._added.append(text)
        return [Text(text)] if text else []

    def _set(self):
        """Close what has closed, typeset the rest anew."""
        source, before = ''.join(self._pieces), self.tail
        line = source[source.rfind('\n') + 1:]
        decided = len(line) >= 200 or not UNDECIDED.fullmatch(line)
        env = surroundings(ChainMap({}, self._references), ChainMap({}, self._notes), self._numbers, True)
        state = parse(source + END if decided else source[:len(source) - len(line)], env, (parts := []).append)
        self.work += len(source)
        whole = source.count('\n')  # lines; what the last one says counts only if nothing can change it
        sure = [part for part in parts if part.lines[0] < whole or re.match(BEGUN, line)]
        n = next((n for n in range(len(parts), 0, -1)
                  if parts[n - 1].lines[1] <= whole and final(state, *sure[n - 1:n + 1])), 0)
        cut, fence = parts[n - 1].lines[1] if n else 0, None
        if parts[n:] and parts[-1].tokens[0].type == 'fence' and parts[-1].lines[0] < whole:  # it ends what is above it
            n, cut, fence = len(parts) - 1, parts[-1].lines[0], parts[-1].tokens[0]
        # Of the definitions keep those above the cut; the others are not final yet.
        links, notes = env['references'].maps[0], env['notes'].maps[0]
        self._references |= {label: link for label, link in links.items() if link['map'][0] < cut}
        self._notes |= {label: note for label, note in notes.items() if note.lines[0] < cut}
        closed = surroundings(self._references, self._notes, self._numbers, True)
        changes = [Block(write(part, closed)) for part in parts[:n]]
        self.blocks += [block.html for block in changes]
        if cut:
            self.work += state.bMarks[cut]
            self._above.append(source[:state.bMarks[cut]])
            self._start(source[state.bMarks[cut]:])
        self._shown, self._added, self._held = self._weight, [], ''
        if fence:
            code = self._but_end(source[state.bMarks[cut + 1]:])
            self._html = figure(code + END, unescape(fence.info), False)
            self._fence = re.compile(rf'\n {{0,3}}{fence.markup}{fence.markup[0]}*[ \t]*\n')
        else: self._html = self._sketch(parts[n:], env)
        self._marked = MARK in self._html
        return changes + [Tail(self._html)] * bool(changes or self._html != before)

    def _sketch(self, parts, env):
        """The open blocks as they would look if they ended well; notes' texts, which show up at the end only, below."""
        if parts and re.fullmatch(r'\|.{0,300}', parts[-1].source): parts = parts[:-1]  # perhaps a table's head
        env |= {'numbers': dict(self._numbers), 'tail': True}
        html = ''.join(write(part, env) for part in parts)
        env['numbers'] = {label: 1 for label in env['notes'].maps[0] if label not in self._notes}
        return html + ''.join(notes_section(env))

    def _but_end(self, code):  # more of a fence; what may be its closing line waits for the rest of that line
        line = self._end.rpartition('\n')[2]
        code, self._held = self._held + code, line if FENCE_END.fullmatch(line) else ''
        return code.removesuffix(self._held)

    def finish(self):
        """The text is complete. -> changes: Mends, the last Blocks, an empty Tail."""
        source, before = ''.join(self._pieces) + self._lines.decode('', True), self.blocks
        text, shown = ''.join(self._above) + source, self._html
        env = surroundings(self._references, self._notes, self._numbers)
        parse(source, env, (parts := []).append)
        again = any((self._references, self._notes, self._numbers))  # they may change what stands above them
        self.work += 3 * len(text) if again else 2 * len(source)
        self.blocks = render(text) if again else before + [write(part, env) for part in parts]
        self._start('')
        mends = [Mend(n, html) for n, (html, old) in enumerate(zip(self.blocks, before, strict=False)) if html != old]
        return mends + [Block(html) for html in self.blocks[len(before):]] + [Tail('')] * bool(shown)

# %%
if NOTEBOOK:
    typesetter = Typesetter()
    for piece in ("**Bold", " words** and", " more.\n\nA second", " block."): print(typesetter.feed(piece))
    print(typesetter.finish(), typesetter.blocks == render("**Bold words** and more.\n\nA second block."))

# %% [markdown]
# ## 6 Components
#
# Values in, tags out. Ids are the protocol between the server and the page: `msg-3`, `content-3`, `state-3`. A frame of
# the socket is one or more elements that htmx swaps out of band; this is the only place where an event becomes markup.

# %%
ENDS = {'stopped': 'Stopped.', 'interrupted': 'Interrupted.', 'failed': 'No answer.'}
PAPER = {'light': '#fbfaf7', 'dark': '#1b1a18'}  # the page's colour, for what a browser draws around the page
ICONS = {'sidebar': 'M4 5h16v14H4zM10 5v14', 'new': 'M12 5v14M5 12h14', 'send': 'M12 19V5M6 11l6-6 6 6',
         'stop': 'M7 7h10v10H7z', 'end': 'M12 5v14M6 13l6 6 6-6',
         'file': 'M20 11l-8.5 8.5a5 5 0 0 1-7-7L13 4a3.3 3.3 0 0 1 4.7 4.7l-8.4 8.4a1.7 1.7 0 0 1-2.4-2.4L14 7.6',
         'find': 'M11 18a7 7 0 1 1 0-14 7 7 0 0 1 0 14zM16 16l4 4',
         'page': 'M7 3h7l4 4v14H7zM14 3v4h4',
         'save': 'M12 4v11M7 10l5 5 5-5M5 20h14', 'close': 'M6 6l12 12M18 6L6 18'}

def Icon(name): return NotStr(f'<svg viewBox="0 0 24 24" aria-hidden="true"><path d="{ICONS[name]}"/></svg>')
def Unseen(words): return Span(words, cls='unseen')

def State(message, notice=''):
    "What stands under a message: how it is or how it ended, and what can be done. Swapped as a whole."
    words = f'{ENDS.get(message.status, "")} {message.note}'.strip() if message.status != RUNNING else notice
    theirs = message.role == 'assistant'
    return Footer(P(words, role='status' if notice else None) if words else None,
                  StopForm(message) if message.status == RUNNING else None,
                  RetryForm(message, data_action='Retry the last answer') if message.status in ENDS else
                  RetryForm(message, 'Answer') if message.role == 'user' else None,  # seen when nothing follows
                  *[Standing(message), Account(message)] if theirs and message.status != RUNNING else [],
                  id=f'state-{message.idx}', cls='state', data_status=message.status)

def Standing(message):
    "Of a summary whether it counts; else how full the conversation is, and near the edge the way on. Seen at the end."
    meta, place = message.meta, dict(conversation_id=message.conversation)
    if 'summary' in meta:
        left = f'The first {n:,} messages were too much for it to read. ' if (n := number(meta, 'left')) else ''
        return message.status == 'done' and BranchForm(
            count_summary.to(**place), message, Input(type='hidden', name='message', value=message.id),
            Span(left + ('Claude reads this in place of what stands above.' if meta['summary'] else
                         'Undone: Claude reads all that stands above.')),
            Button('Undo' if meta['summary'] else 'Use it again', name='counts', value=0 if meta['summary'] else 1,
                   cls='quiet'), cls='standing') or None
    full = number(meta, 'full')
    if meta.get('stop') == 'model_context_window_exceeded': full = 1
    if full < .5: return None
    way = summarise.to(**place)
    return Form(Span(f'This conversation fills {min(full, 1):.0%} of what the model can read.'),
                *[Key(id=None), Button('Go on with a summary', cls='quiet')] if full >= .8 else [], method='post',
                action=way, **to_messages(way), cls='standing last')

def to_messages(place):
    "The attributes of a form whose answer stands below the messages that are shown."
    return dict(hx_post=place, hx_target='#messages', hx_swap='beforeend', hx_disabled_elt='find button')

REASONS = {'end_turn': 'all was said', 'stop_sequence': 'a stop sequence', 'max_tokens': 'its maximum output',
           'refusal': 'a refusal', 'pause_turn': 'a pause', 'tool_use': 'a call of a tool',
           'model_context_window_exceeded': 'the end of the context'}
MISSES = {'model_changed': 'another model answered before', 'system_changed': 'the system prompt has changed',
          'tools_changed': 'the tools have changed', 'messages_changed': 'an earlier message has changed',
          'previous_message_not_found': 'the request before is not on record any more',
          'unavailable': 'the API can’t say why'}

def money(usd): return f'${usd:,.2f}' if usd >= .1 or not usd else f'${usd:.2g}' if usd >= 1e-4 else 'less than $0.0001'

def Account(message):
    "What is known of how a reply came about. All but the times and counts is foreign text, and may be missing."
    meta, used = message.meta, counted(message.meta.get('usage'))
    def words(name, table=MISSES): return table.get(str(meta[name])) or str(meta[name])[:80] if meta.get(name) else ''
    fresh, said, read, written, searches = map(used.get, TOKENS, [0] * len(TOKENS))
    about, first, whole = 'about ' * bool(meta.get('about')), number(meta, 'first'), number(meta, 'seconds')
    rows = {
        'Model': message.model,
        'Tokens in': ', '.join([f'{fresh:,} fresh'] + [f'{read:,} from the cache'] * bool(read)
                               + [f'{written:,} into the cache'] * bool(written)) if used else '',
        'Tokens out': f'{about}{said:,}' if used else '',
        'Cost': f'{about}{money(number(meta, "cost"))}' if used and 'cost' in meta else 'price unknown' if used else '',
        'Searches': f'{searches}, not in the cost' if searches else '',
        'Time': f'{whole:.1f} s, the first of it after {first:.1f} s' if first else f'{whole:.1f} s' if whole else '',
        'Speed': f'{said / (whole - first):.0f} tokens a second' if said and whole - first >= .1 else '',
        'Tries': number(meta, 'tries') if number(meta, 'tries') > 1 else '',
        'Ended by': words('stop', REASONS), 'Cache missed': words('miss'), 'Request': words('request')}
    return Details(Summary('Details', Unseen(' of this answer'), cls='quiet'),
                   Dl(*[Div(Dt(name), Dd(what)) for name, what in rows.items() if what]), cls='account')

def StopForm(message):
    action = stop.to(conversation_id=message.conversation)
    return Form(Button('Stop', cls='quiet'), id='stop', method='post', action=action, hx_post=action, hx_swap='none')

def BranchForm(action, message, *content, **attrs):
    "A form under a message. It is answered by the path from there on, or by the page."
    return Form(*content, method='post', action=action, hx_post=action, hx_target=f'#msg-{message.idx}',
                hx_swap='outerHTML', **attrs)

def RetryForm(message, words='Retry', **attrs):
    return BranchForm(retry.to(conversation_id=message.conversation), message,
                Button(words, name='at', value=message.id, cls='quiet', **attrs), Key(id=None),
                cls='retry', hx_disabled_elt='find button')

def Walk(message):
    "The way to the other versions of a message, in a circle."
    versions, n = message.siblings, message.siblings.index(message.id)
    def Way(sign, words, other):
        return Button(Span(sign, aria_hidden='true'), Unseen(f'{words} version, {n + 1} of {len(versions)} is shown'),
                      id=f'{words}-{message.idx}', name='message', value=other, cls='quiet')  # htmx keeps focus by id
    return BranchForm(choose_branch.to(conversation_id=message.conversation), message,
                Way('‹', 'Previous', versions[n - 1]), f'{n + 1}/{len(versions)}',
                Way('›', 'Next', versions[(n + 1) % len(versions)]), cls='walk')

def Editor(message):
    "A question that is being changed, at its place."
    back = asking_for(message)
    return Article(
        H2('You', cls='unseen'),
        BranchForm(f'{edit.to(conversation_id=message.conversation)}?at={message.id}', message, Key(id=None),
             Ul(*[Chip(b) for b in message.blocks if b.get('sha')], cls='files', aria_label='Files to send'),
             Input(type='hidden', name='upload'),  # the form says which files go along: without it all would
             Div(Textarea('\n' + message.content, name='message', rows=2, autofocus=True, autocomplete='off',
                          aria_label='Your question'),
                 Button(Icon('send'), Unseen('Send the changed question'), cls='send round'), cls='field'),
             A('Cancel', href=back, hx_get=back, hx_target=f'#msg-{message.idx}', hx_swap='outerHTML',
               cls='cancel quiet'), cls='edit'),
        id=f'msg-{message.idx}', cls='message', data_role='user')

def Actions(message):
    "What can be done with any message. The link leads to its exact Markdown; the script copies that instead."
    when = time.strftime('%Y-%m-%dT%H:%MZ', time.gmtime(message.created))
    here, theirs = dict(conversation_id=message.conversation), message.role == 'assistant'
    change = f'{show.to(**here)}?from={message.idx}&edit={message.id}'
    return Div(Walk(message) if len(message.siblings) > 1 else None,
               A('Copy', Unseen(' this message as Markdown'), cls='copy quiet',
                 href=f'{as_written.to(**here, idx=message.idx)}?at={message.id}'),
               RetryForm(message, 'Regenerate') if theirs else
               A('Edit', Unseen(' this question'), cls='change quiet', href=f'{change}#msg-{message.idx}',
                 hx_get=change, hx_select=f'#msg-{message.idx}', hx_target=f'#msg-{message.idx}', hx_swap='outerHTML'),
               Form(Button('Fork', Unseen(' the conversation here'), name='at', value=message.id, cls='quiet'),
                    method='post', action=fork.to(**here), cls='fork'),
               Span(message.model, cls='by'), Time(when.translate({84: ' ', 90: ' UTC'}), datetime=when), cls='actions')

KINDS = {'application/pdf': 'PDF', 'text/plain': 'Text'}

def File(file):
    "A file: an image as itself, which leads to the whole of it, anything else as a name to download."
    name, place = file['name'], file.get('sha') and serve_file.to(sha=file['sha'])
    what = Span(f'{KINDS.get(file["kind"], "Image")}, {weight_in_words(file["size"])}', cls='what')
    if not place: return Span(Span(name, cls='called'), Span('not here any more', cls='what'), cls='name')
    if file['kind'] in IMAGES: return A(Img(src=place, alt=name), href=place, target='_blank', title=name)
    return A(Icon('page'), Span(name, cls='called'), what, href=place, download=name, cls='name', title='Download')

def Files(files): return Ul(*[Li(File(file)) for file in files], cls='files', aria_label='Files') if files else None

def Chip(file):
    "A file that goes with the next message, unless it is removed: by script, or by taking its mark away."
    needs = 'image' if file['kind'] in IMAGES else 'pdf' if file['kind'] == PDF else 'text'
    return Li(File(file), Input(type='checkbox', name='file', value=f'{file["sha"]} {file["name"]}', checked=True,
                                cls='unscripted', aria_label=f'Send {file["name"]}'),
              Remove(file['name']), cls='chip', data_needs=needs)

def Remove(name):
    return Button(Icon('close'), Unseen(f'Remove {name}'), type='button', cls='round remove scripted', title='Remove')

def Coming():
    "A file on its way up, for the script to fill in."
    name = Span(Span(cls='called'), Progress(max=1, value=0), cls='name')
    return Template(Li(name, Remove('this file'), cls='chip'), id='coming')

MOST_STEPS, LONGEST_STEP = 200, 20_000  # of one reply that are shown; characters of one

@dataclass
class Step:
    "Something Claude did beside writing: a content block, and that of its result, {} if none came. `n` counts from 0."
    n: int
    block: dict
    result: dict | None = None

def take_step(steps: list[Step], block: dict) -> Step | None:
    "Put a block where it belongs: the step that is new or has changed, None if there is none to be seen."
    open = next((step for step in steps if step.block.get('open')), None)
    if block['type'] in ('text', 'mcp_tool_listing'): return None
    if block['type'] == 'thinking' and open:
        open.block = block
        return open
    of = block.get('tool_use_id')
    for step in steps:
        if of and step.block.get('id') == of:
            step.result = block
            return step
    if len(steps) >= MOST_STEPS: return None
    steps.append(Step(len(steps), block))
    return steps[-1]

def steps_of(blocks):
    steps = []
    for block in blocks: take_step(steps, block)
    left_open(steps)
    return steps

def left_open(steps) -> list[Step]:
    "What is not closed when its reply is over: calls without a result, none will come, and a thought."
    calls = [step for step in steps if step.result is None and step.block['type'].endswith('tool_use')]
    for step in calls: step.result = {}
    return calls + [step for step in steps if step.block.pop('open', None)]

def cut(text): return text if len(text) <= LONGEST_STEP else text[:LONGEST_STEP] + ' … (cut)'
def in_json(value):
    pieces = json.JSONEncoder(ensure_ascii=False, indent=1).iterencode(value) if value else ()
    try: return cut(''.join(islice(pieces, LONGEST_STEP + 1)))
    except RecursionError: return '…'  # deeper than anybody reads

def Age(said):
    "When a page is from: a day where that is said in figures, else the words for it."
    try: day = str(datetime.fromisoformat(said).date())
    except ValueError: return said[:40]
    return Time(day, datetime=day)

def Source(url, title, age=''):
    "A page that a tool found: a link if it leads to a host, which is said."
    host = host_of(str(url), ('http', 'https'))
    words = str(title or url)[:200]
    if not host: return Li(words)
    return Li(A(words, href=str(url), target='_blank', rel='noopener noreferrer nofollow'),
              Span(f' {host}', cls='host'), *[' · ', Age(str(age))] if age else [])

def Result(result):
    "What a tool brought: pages, texts, or why there is nothing."
    if not result: return P('The reply ended before a result came.')
    content = result.get('content')
    if isinstance(content, dict) and 'error_code' in content:
        return P(f'It failed: {str(content["error_code"])[:60].replace("_", " ")}.')
    if isinstance(content, dict) and 'url' in content:  # a page that was read
        page = content.get('content') if isinstance(content.get('content'), dict) else {}
        return Ul(Source(content['url'], page.get('title'), content.get('retrieved_at')))
    some = [each for each in content if isinstance(each, dict)][:50] if isinstance(content, list) else []
    pages = [Source(each['url'], each.get('title'), each.get('page_age')) for each in some if 'url' in each]
    said = '\n'.join(str(each.get('text')) for each in some if each.get('text')) or isinstance(content, str) and content
    return (P('It failed.') if result.get('is_error') else None, Ul(*pages) if pages else None,
            Pre(cut(said)) if said else None if pages else P('Nothing came back.'))

def told_step(step):
    "What a step was, in words, and what it brought."
    block, done = step.block, step.result is not None
    asked = block.get('input') if isinstance(block.get('input'), dict) else {}
    match block['type'], str(block.get('name')):
        case 'thinking', _:
            seconds = block.get('seconds')
            words = f'Thought for {seconds:.0f} s' if isinstance(seconds, float) else 'Thought'
            if isinstance(seconds, float) and seconds < 1: words = 'Thought for a moment'
            return 'Thinking' if block.get('open') else words, ''.join(block.get('thinking', ''))
        case 'redacted_thinking', _:
            return 'Thought something that is hidden', ('The makers of the model have encrypted this part of what it '
                                                        'thought. It is kept, and only they can read it.')
        case _, 'web_search':
            return f'{"Searched" if done else "Searching"} for “{str(asked.get("query", ""))[:200]}”', None
        case _, 'web_fetch':
            return f'{"Read" if done else "Reading"} {host_of(str(asked.get("url", ""))) or "a page"}', None
    name = ' · '.join(str(part)[:80] for part in (block.get('server_name'), block.get('name') or block['type']) if part)
    return f'{"Used" if done else "Using"} {name}', in_json(asked)

def went_wrong(result):
    "What is to be seen of a result before its fold is opened."
    if result is None: return ''
    content = result.get('content')
    if result.get('is_error') or isinstance(content, dict) and 'error_code' in content: return ': it failed'
    return '' if result else ': no result came'

def StepSummary(idx, step, **attrs):
    return Summary(told_step(step)[0] + went_wrong(step.result), id=f'sum-{idx}-{step.n}', **attrs)

def StepBody(idx, step, **attrs):
    words = told_step(step)[1]
    return Div(Pre(words, id=f'said-{idx}-{step.n}') if words is not None else None,
               Result(step.result) if step.result is not None else None,
               id=f'step-{idx}-{step.n}', **attrs)

def StepFold(idx, step): return Details(StepSummary(idx, step), StepBody(idx, step))

def Steps(idx, steps, **attrs):
    "What Claude did beside writing, above what it wrote."
    return Div(*[StepFold(idx, step) for step in steps], id=f'steps-{idx}', cls='steps', **attrs)

def StepsFrame(idx, steps) -> str: return framed(Steps(idx, steps, hx_swap_oob='true')) if steps else ''
def framed(element) -> str: return to_xml(element, indent=False)

def Bubble(message, shown, notice='', steps=None, **live):
    """A message. `shown` is its content as HTML, `steps` what was done beside; `live` are the attributes that keep it
    going while it is written."""
    content = Div(NotStr(shown), id=f'content-{message.idx}', cls='content', hx_disable=True)
    summary = 'summary' in message.meta
    return Article(
        H2('You' if message.role == 'user' else 'Claude', cls='unseen'),
        Steps(message.idx, steps_of(message.blocks) if steps is None else steps) if message.role != 'user' else
        Files([block for block in message.blocks if block['type'] == 'file']),
        Details(Summary('Summary of what stands above'), content) if summary else content,
        State(message, notice), Actions(message), id=f'msg-{message.idx}', cls='message' + ' summary' * summary,
        data_role='note' if summary and message.role == 'user' else message.role, data_status=message.status, **live)

def asking_for(message):
    return f'{fragment.to(conversation_id=message.conversation, idx=message.idx)}?at={message.id}'

def streaming_message_bubble(msg_idx, conversation_id, message, shown='', steps=None):
    "The bubble of a reply that is being written: its socket brings the rest."
    return Bubble(message, shown, steps=steps, hx_ext='ws', ws_connect=f'/ws/chat/{conversation_id}/{msg_idx}',
                  data_poll=asking_for(message))

def PollingBubble(message, shown, steps=None):
    "The same where WebSockets are blocked: it asks for itself once a second until it is over."
    return Bubble(message, shown, steps=steps, hx_get=asking_for(message), hx_trigger='every 1s', hx_swap='outerHTML')

def Reply(message, shown, steps=None):
    "A message as it is now: live while it is being written, plain when it is over."
    if message.status != RUNNING: return Bubble(message, shown, steps=steps)
    return streaming_message_bubble(message.idx, message.conversation, message, shown, steps)

def Transcript(path, bubbles):
    "Messages in a row. What stands before them is loaded when the reader gets there; without the script, by a link."
    place = path and f'{show.to(conversation_id=path[0].conversation)}?before={path[0].idx}'
    earlier = A('Earlier messages', id='earlier', cls='quiet', href=place, hx_get=place, hx_swap='outerHTML',
                hx_trigger='intersect once, click')
    return (earlier if path and path[0].idx else None, *bubbles)

# Frames are put together as text: a component per piece would cost more than everything else a piece does.
def Frame(idx, change) -> str:
    "One change of the typeset text as an element that htmx swaps out of band."
    match change:
        case Text(text): return f'<p id="end-{idx}" hx-swap-oob="beforeend">{escape(text, quote=False)}</p>'
        case Block(html): return f'<div hx-swap-oob="beforebegin:#tail-{idx}">{html}</div>'
        case Tail(html): return f'<div id="tail-{idx}" hx-swap-oob="innerHTML">{marked(idx, html)}</div>'
        case Mend(n, html):
            place = f'hx-swap-oob="outerHTML:#content-{idx}&gt;:nth-child({n + 1})"'
            return re.sub(r'^<\w+', lambda tag: f'{tag[0]} {place}', html)

def marked(idx, tail): return tail.replace(MARK, f'<span id="end-{idx}"></span>')
def Snapshot(idx, html) -> str: return f'<div id="content-{idx}" hx-swap-oob="innerHTML">{html}</div>'
def StateFrame(message, notice='') -> str: return to_xml(State(message, notice), indent=False)

class LiveReply:
    """A running reply as its viewers see it: typeset once for all of them. Frames are numbered; who is behind the
    oldest that is kept gets a snapshot, so nothing ever queues for a slow socket."""
    KEPT = 25

    def __init__(self, turn):
        self.turn, self.words, self.read = turn, Typesetter(), 0
        self.finished = self.closed = False  # typeset to the end; and its last frame is made
        self.frames, self.count, self.notice = deque(maxlen=self.KEPT), 0, ''
        self.steps, self.stepped = [], 0  # what was done beside; of `turn.aside` this much is among them
        self.lock = asyncio.Lock()

    @classmethod
    def of(cls, turn):
        turn.view = turn.view or cls(turn)
        return turn.view

    async def now(self, look):
        """What `look()` says once all that is committed is typeset: at once if it is little, in a thread if it may take
        long (shielded then: a viewer that leaves must not take a frame with it). Nobody looks while a thread sets."""
        new = ''.join(self._new())
        if self.lock.locked() or self.turn.over or len(new) > 2_000 or self.words.heavy(new):
            return await asyncio.shield(self._now(look))
        self._add(self.words.feed(self._read()))
        return look()

    async def _now(self, look):
        async with self.lock:
            over, changes = self.turn.over, []
            if text := self._read(): changes = await asyncio.to_thread(self.words.feed, text)
            if over and not self.finished:
                changes += await asyncio.to_thread(self.words.finish)
                self.finished = True
            self._add(changes)
            return look()

    def _new(self): return self.turn.pieces[self.read:]

    def _read(self):
        text, self.read = ''.join(self._new()), len(self.turn.pieces)
        return text

    def _add(self, changes):
        reply, last = self.turn.reply, self.finished and not self.closed
        frame = self._steps() + ''.join(Frame(reply.idx, change) for change in changes)
        if last: frame += (''.join(map(self._changed, left_open(self.steps)))
                           + f'<div hx-swap-oob="delete:#tail-{reply.idx}"></div>')
        if last or self.notice != self.turn.notice:
            self.notice = self.turn.notice
            frame += StateFrame(reply, self.notice)
        self.closed = self.finished
        if frame:
            self.frames.append(frame)
            self.count += 1

    def _steps(self):
        "Frames for what Claude did beside writing. A fold that the reader has opened stays open: it is only filled."
        new, idx, frames = self.turn.aside[self.stepped:], self.turn.reply.idx, ''
        self.stepped += len(new)
        for kind, text in new:
            last = self.steps[-1] if self.steps else None
            if kind == 'thought' and last and last.block.get('open'):
                last.block['thinking'].append(text)
                frames += framed(Pre(text, id=f'said-{idx}-{last.n}', hx_swap_oob='beforeend'))
                continue
            block = json.loads(text) if kind == 'block' else {'type': 'thinking', 'thinking': [text], 'open': True}
            known = len(self.steps)
            if not (step := take_step(self.steps, block)): continue
            if len(self.steps) > known:
                frames += framed(Div(StepFold(idx, step), hx_swap_oob=f'beforeend:#steps-{idx}'))
            else:
                frames += self._changed(step)
        return frames

    def _changed(self, step):
        parts = [StepSummary] if step.result is None else [StepSummary, StepBody]
        return ''.join(framed(part(self.turn.reply.idx, step, hx_swap_oob='true')) for part in parts)

    def look(self): return self.html(), self.steps

    def since(self, cursor: int | None) -> tuple[int, str]:
        "The cursor now, and what to send to a viewer that has had the frames before `cursor` (None: nothing yet)."
        if cursor is None or self.count - cursor > len(self.frames):
            idx = self.turn.reply.idx
            return self.count, (StepsFrame(idx, self.steps) + Snapshot(idx, self.html())
                                + StateFrame(self.turn.reply, self.notice))
        return self.count, ''.join(islice(self.frames, len(self.frames) - (self.count - cursor), None))

    def html(self) -> str:
        "The content so far: its blocks, and the tail where the next words go."
        idx, blocks = self.turn.reply.idx, ''.join(self.words.blocks)
        return blocks if self.finished else f'{blocks}<div id="tail-{idx}">{marked(idx, self.words.tail)}</div>'

class Shelf:
    "The typeset content of finished messages, as much of it as `room` characters hold: nothing is typeset twice."
    def __init__(self, room=16_000_000): self.room, self.html = room, {}

    def put(self, message, html):
        place = message.id, message.created  # what is deleted for ever leaves its id to another
        self.room += len(self.html.pop(place, '')) - len(html)
        self.html[place] = html
        while self.room < 0: self.room += len(self.html.pop(next(iter(self.html))))

    async def content(self, message) -> str:
        if (html := self.html.get((message.id, message.created))) is not None: return html
        typeset = render_user if message.role == 'user' else lambda text: ''.join(render(text))
        quick = len(message.content) < 1_000 and not may_have_code(message.content)
        html = typeset(message.content) if quick else await asyncio.to_thread(typeset, message.content)
        if message.status != RUNNING: self.put(message, html)
        return html

def Key(id='key', **attrs): return Input(type='hidden', id=id, name='key', value=secrets.token_urlsafe(12), **attrs)
def After(id, **attrs): return Input(type='hidden', id='after', name='after', value=id or '', **attrs)

@dataclass(frozen=True)
class Setup:
    "What is chosen for a conversation (None: one that has not begun), and what can be."
    conversation: str | None
    choices: dict
    model: Model
    models: list[Model]
    rates: dict[str, tuple | None]
    successor: Model | None  # of a retired model
    prompts: list[Prompt]
    servers: list[Remote]
    longest: int  # tokens of an answer
    limit: int  # characters of a system prompt
    said: str = ''

    @property
    def place(self): return (show.to(conversation_id=self.conversation) if self.conversation else '') + '/choices'

def marks(choices: Mapping) -> dict[str, str]:
    "Each value in a few digits: what a page showed, so that what was changed in it can be told from the rest."
    return {name: str(zlib.crc32('\n'.join(str(value).splitlines()).encode())) for name, value in choices.items()}

def thousands(n): return f'{n / 1e6:.3g}M' if n >= 1e6 else f'{n / 1e3:.3g}K' if n >= 1e3 else str(n)
def dollars(rates): return f'${rates[0]:g} in, ${rates[1]:g} out'

def Abilities(model, rates):
    "What a model reads and writes, what that costs and when it ends, in a line."
    ends = {'deprecated': f'Deprecated, retires {model.retires or "on a day not yet set"}.',
            'retired': f'Retired {model.retires}'.strip() + '.'}
    reads = ', '.join(['text'] + ['images'] * model.images + ['PDFs'] * model.pdfs)
    sizes = [f'Reads {reads}'] + [f'{thousands(model.max_input)} tokens of context'] * bool(model.max_input)
    sizes += [f'answers of up to {thousands(model.max_output)}'] * bool(model.max_output)
    costs = f'{dollars(rates)} a million tokens.' if rates else 'Its price is unknown.'
    return P(' '.join(filter(None, [ends.get(model.lifecycle), '; '.join(sizes) + '.', costs])))

def Models(setup):
    "The models to choose from, each line by itself, those that end soon last. A retired one is there if it is chosen."
    def option(m):
        rates = setup.rates[m.id]
        return Option(m.name + (f' · {dollars(rates)}' if rates else ''), value=m.id, selected=m.id == setup.model.id)
    there = [m for m in setup.models if m.lifecycle != 'retired' or m.id == setup.model.id]
    there.sort(key=lambda m: (m.lifecycle != 'active', not m.line, m.line))
    groups = groupby(there, lambda m: m.line.title() if m.lifecycle == 'active' else m.lifecycle.title())
    return [Optgroup(*map(option, some), label=name or 'Others') for name, some in groups]

def Said(setup, **attrs): return P(setup.said, id='chosen', role='status', **attrs)

def Fields(setup, **attrs):
    """What can be chosen, and only what this model has. The fields belong to the composer's form, so that a first
    question takes them along; of a conversation that has begun each is kept as it changes, by script or with Save."""
    own = {'form': 'composer', 'hx_post': setup.place, 'hx_params': 'not message,key'}
    kept = own | {'hx_trigger': 'change', 'hx_swap': 'none'}
    anew = own | {'hx_target': '#fields', 'hx_swap': 'outerHTML'}
    system = setup.choices.get('system', '')
    def Row(words, control): return Label(Span(words), control, cls='row')
    def Act(words, do, cls='quiet'):
        return Button(words, name='do', value=do, cls=cls, formaction=setup.place, **anew)
    def Choice(words, name, default, values):
        now = setup.choices.get(name)
        if not values: return None
        return Row(words, Select(Option(default, value=''), *[
            Option('Extra high' if v == 'xhigh' else v.title(), value=v, selected=v == now) for v in values],
            id=name, name=name, **kept))
    return Div(
        Row('Model', Select(*Models(setup), id='model', name='model', **anew)),
        Abilities(setup.model, setup.rates[setup.model.id]),
        Choice('Effort', 'effort', 'The model’s own', setup.model.efforts),
        Choice('Thinking', 'thinking', 'Off' if 'on' in setup.model.ways else 'On', setup.model.ways),
        Row('Max. tokens', Input(type='number', id='max_tokens', name='max_tokens', min=1, max=setup.longest,
                                 value=setup.choices.get('max_tokens'), placeholder=setup.longest, **kept)),
        Row('System prompt', Textarea('\n' + system, id='system', name='system', maxlength=setup.limit,
                                      placeholder='What Claude should know or be in this conversation', **kept)),
        Row('Saved prompts', Select(Option('Choose one …', value=''), *[
            Option(p.name, value=p.id, selected=p.text == system) for p in setup.prompts], id='prompt', name='prompt',
            **anew | {'hx_vals': '{"do": "use"}'})) if setup.prompts else None,
        Div(Input(id='prompt_name', name='prompt_name', form='composer', placeholder='Name of this prompt',
                  aria_label='Name of this prompt', maxlength=60), Act('Save prompt', 'keep'),
            Act('Use', 'use', cls='quiet unscripted') if setup.prompts else None,
            Act('Delete', 'drop') if any(p.text == system for p in setup.prompts) else None, cls='row'),
        Div(Span(A('Connections', href=connections.to())), *[
            Label(Input(type='checkbox', name=(name := f'mcp-{server.id}'), value='on', checked=name in setup.choices,
                        **kept), server.name) for server in setup.servers], cls='row', role='group',
            aria_label='Connections') if setup.servers and setup.model.known else None,
        Input(type='hidden', name='shown', form='composer',
              value=urlencode(marks(setup.choices | {'model': setup.model.id}))),
        Act('Save all', 'save', cls='quiet unscripted'), Said(setup), id='fields', **attrs)

def Panel(setup):
    id = setup.conversation
    told = id and A('Download as JSON', href=as_json.to(conversation_id=id), download=f'parley-{id}.json', cls='quiet',
                    data_action='Download as JSON')
    return Div(H2('This conversation'), Fields(setup), told, id='panel', popover=True, role='dialog',
               hx_sync='this:queue all', aria_label='Settings of this conversation')

def Opener(setup, **attrs):
    "Which model answers; it opens the panel. Of a retired one it says so, and offers the next."
    gone, next = setup.model.lifecycle == 'retired', setup.successor
    return Div(P(f'{setup.model.name} is retired and answers no more.') if gone else None,
               Button(f'Go on with {next.name}', name='instead', value=next.id, form='composer', formaction=setup.place,
                      cls='quiet', hx_post=setup.place, hx_target='#fields', hx_swap='outerHTML',
                      hx_params='not message,key') if gone and next else None,
               Label(Input(type='checkbox', id='web', name='web', value='on', checked='web' in setup.choices,
                           form='composer', hx_post=setup.place, hx_trigger='change', hx_swap='none',
                           hx_params='not message,key'),
                     'Web search', cls='quiet') if 'web_search' in setup.model.tools else None,
               Button(setup.model.name, id='settings', type='button', popovertarget='panel', cls='quiet',
                      title='Model and settings of this conversation', data_action='Settings of this conversation'),
               id='opener', data_reads=' '.join(['image'] * setup.model.images + ['pdf'] * setup.model.pdfs), **attrs)

def Composer(typed='', notice='', to='', setup=None, after=None, files=()):
    """Where one writes. It posts to the page's own address, so a first question and a later one are the same form;
    `to` is for a page that stands at another one. `after` is the message that the next question follows."""
    return Form(
        Label('Message', _for='message', cls='unseen'), Key(), After(after),
        Ul(*map(Chip, files), id='files', cls='files', aria_label='Files to send'), Coming(),
        P('The model can’t read this.', cls='unread'),
        Input(type='file', id='upload', name='upload', multiple=True, aria_label='Attach files'),
        Div(Button(Icon('file'), Unseen('Attach files'), type='button', cls='attach round scripted',
                   title='Attach files', data_action='Attach files'),
            Textarea('\n' + typed, id='message', name='message', rows=1, placeholder='Ask Claude', autocomplete='off'),
            Button(Icon('send'), Unseen('Send'), cls='send round', title='Send (Enter)',
                   formenctype='multipart/form-data'),
            Button(Icon('stop'), Unseen('Stop'), form='stop', cls='stop round', title='Stop (Esc)',
                   data_action='Stop the reply'), cls='field'),
        Button(Icon('end'), 'Jump to the end', type='button', id='jump', hidden=True, data_action='Jump to the end'),
        P(notice, id='notice', role='alert'),
        Div(Opener(setup) if setup else None, P(id='link'),
            P(Kbd('Enter'), ' sends, ', Kbd('Shift Enter'), ' breaks the line', cls='hint'), cls='under'),
        id='composer', method='post', action=to or None, hx_post=to, hx_target='#messages', hx_swap='beforeend',
        hx_disabled_elt='.send', novalidate=True)  # a field of the closed panel can't say what is wrong with it

EXAMPLES = ['What is recursion? Show me with a short Python function.', 'Compare tea and coffee in a small table.',
            'Help me answer a difficult e-mail kindly and briefly.', 'Why is the sky blue? Give me the formula, too.']

def Empty(model):
    "The first page. An example is a form of its own, with a key, so that two clicks are one question."
    demo = model.line == 'demo' or model.id == 'demo'
    return Div(
        H2('A quiet place to talk with Claude'),
        Ul(Li('Ask anything. The answer is set in type here while it is being written.'),
           Li('Close the tab, lose the network, restart the server: no word is lost.'),
           Li('Everything stays in one file on your own disk, and no other site hears of it.')),
        P('The demo model answers, because no key is set. It streams and plays: say ', B('slow'), ', ',
          B('long'), ', ', B('think'), ', ', B('search'), ', ', B('tool'), ' or ', B('refuse'), ' to it. Set ',
          Code('ANTHROPIC_API_KEY'), ' and start again to talk with Claude.', cls='demo')
        if demo else P(f'{model.name} answers.', cls='demo'),
        Div(*[Form(Input(type='hidden', name='message', value=words),
                   Input(type='hidden', name='key', value=secrets.token_urlsafe(12)),
                   Button(words), method='post', action='/') for words in EXAMPLES], cls='examples'), id='empty')

def day_of(conversation, zone, now):
    "The heading over a conversation in the list; `zone` is in minutes east of Greenwich."
    if conversation.pinned: return 'Pinned'
    local = conversation.updated + 60 * zone
    ago = (now + 60 * zone) // DAY - local // DAY
    near = next((words for days, words in ((0, 'Today'), (1, 'Yesterday'), (7, 'Previous 7 days'),
                                           (30, 'Previous 30 days')) if ago <= days), None)
    return near or time.strftime('%B %Y', time.gmtime(local))

def More(id, title):
    return A('⋯', href=actions.to(conversation_id=id), cls='more round', title='Actions',
             aria_label=f'Actions for {title}')

@functools.lru_cache(5_000)  # the same rows again and again: made once, a list costs no more than a line
def Row(id, title, state, here):
    words = {'running': ', Claude is answering', 'unread': ', new answer'}.get(state)
    return NotStr(to_xml(Li(
        A(Span(title), Unseen(words) if words else None, id=f'c-{id}', href=show.to(conversation_id=id),
          aria_current='page' if here else None), More(id, title), data_state=state), indent=False))

def ListItem(conversation, current=None):
    here = conversation.id == current
    state = 'running' if conversation.running else 'unread' if conversation.unread and not here else None
    return Row(conversation.id, conversation.title, state, here)

def ListItems(found, look, current=None, after=None, limit=50):
    """A page of the list, `found` one more than its `limit` if there are more, under headings by day; a page that goes
    on in the group where the one before ended, `after`, says no heading twice."""
    now, shown = time.time(), found[:limit]
    last = after and day_of(Conversation('', '', '', None, 0, after[1], pinned=after[0]), look['zone'], now)
    place = len(found) > limit and f'{listed.to()}?{urlencode({"after": json.dumps(shown[-1].cursor)})}'
    return [item for day, some in groupby(shown, lambda c: day_of(c, look['zone'], now))
            for item in [Li(H2(day)) if day != last else None, *[ListItem(c, current) for c in some]]] + [
        Li(A('More', href=place, hx_get=place, hx_target='closest li', hx_swap='outerHTML',
             hx_trigger='intersect once, click', cls='quiet')) if place else None]

def LookForm(look, *content):
    "A form that changes how the page looks. The script does it at once; without it, the server does."
    return Form(*content, Input(type='hidden', name='back', value=look['here']), method='post',
                action=remember.to(), cls='look')

def Sidebar(conversations, look, current=None):
    "The list of conversations: a column, or on a phone a popover, which needs no script to open."
    themes = [Button(name.title(), name='theme', value=name, cls='quiet', data_action=f'Theme: {name}',
                     aria_pressed=str(name == look['theme']).lower()) for name in ('auto', 'light', 'dark')]
    return Nav(A(Icon('new'), 'New conversation', href='/', cls='new', data_action='New conversation'),
               A(Icon('find'), 'Find', Kbd('Ctrl K'), href=search.to(), cls='find', data_opens='palette'),
               Ul(*ListItems(conversations, look, current), id='conversations', data_edition=look['edition']),
               P('Nothing here yet. What you ask is listed here, newest first.', cls='none'),
               LookForm(look, Div(*themes, role='group', aria_label='Theme', cls='themes')),
               Div(A('Trash', href=trash.to(), cls='quiet', data_action='Trash'),
                   A('Usage', href=usage.to(), cls='quiet', data_action='Usage'),
                   A('Your data', href=your_data.to(), cls='quiet', data_action='Your data: export, import, backup'),
                   A('Connections', href=connections.to(), cls='quiet', data_action='Connections: MCP servers'),
                   Button('Keys', Kbd('?'), type='button', cls='quiet scripted', data_opens='keys',
                          data_action='Show the keys'), cls='ways'), SignOut() if look['locked'] else None,
               id='sidebar', popover=True, aria_label='Conversations')

def Act(words, place, cls='quiet', **fields):
    "A form that is only a button."
    return Form(Button(words, cls=cls), *[Input(type='hidden', name=name, value=value) for name, value in
                fields.items()], method='post', action=place, hx_post=place, hx_swap='none')

def Menu(conversation, most, here=False):
    "What can be done with a conversation, which may be `here`: a small menu, or without the script a page."
    of = {'conversation_id': conversation.id}
    place, way = rename.to(**of), summarise.to(**of)
    return (Form(Input(name='title', value=conversation.title, aria_label='Title', required=True, maxlength=most,
                       autocomplete='off'), Button('Save', cls='quiet'), method='post', action=place, hx_post=place,
                 hx_swap='none', cls='rename', data_id=conversation.id),
            Button('Rename', type='button', cls='quiet scripted', data_rename=conversation.id),
            Act('Unpin' if conversation.pinned else 'Pin', pin.to(**of), pinned='' if conversation.pinned else '1'),
            A('Download as Markdown', href=as_markdown.to(**of), cls='quiet'),
            Form(Key(id=None), Button('Go on with a summary', cls='quiet'), method='post', action=way,
                 **to_messages(way) if here else {}),
            Act('Delete', delete.to(**of)))

def Undo(since='', **attrs):
    "What was moved to the trash just now, and the way back. It stands until the next thing is done."
    undo = since and ('Moved to the trash.', Act('Undo', undelete.to(), since=since))
    return Div(*undo, id='undo', role='status', **attrs)

def TrashPage(found, count, days):
    def Left(conversation):
        left = int((conversation.trashed - time.time()) / DAY + days + 0.999)
        return f'{left} days left' if left > 1 else 'a day left'
    def Row(conversation):
        of = {'conversation_id': conversation.id}
        return Li(Span(conversation.title), Span(Left(conversation), cls='tag'), Act('Restore', restore.to(**of)),
                  Finally('Delete', 'Delete for ever', discard.to(**of)))
    def Finally(words, act, place):  # never by one click
        return Details(Summary(words, cls='quiet'), P('This can not be undone.'), Act(act, place))
    empty = Finally('Empty the trash', f'Delete {count:,} for ever', empty_trash.to())
    return Div(H2('Trash'), P('What you delete stays here for a while; then it is gone.') if found else
               P('The trash is empty.'), Ul(*map(Row, found)) if found else None,
               P(f'The newest {len(found)} of {count:,} are shown.') if count > len(found) else None,
               empty if found else None, Act('Move all conversations to the trash', delete_all.to()), id='empty',
               cls='listing')

def Heading(conversation=None, title='Parley', **attrs):
    if not conversation: return Div(H1(title), id='heading', **attrs)
    save = A(Icon('save'), Unseen('Download as Markdown'), cls='round', title='Download as Markdown',
             href=as_markdown.to(conversation_id=conversation.id), data_action='Download as Markdown')
    return Div(H1(conversation.title), save, More(conversation.id, conversation.title), id='heading',
               data_unread=conversation.unread or None, **attrs)

def Bar(title, look, conversation=None, demo=False):
    shown = look['sidebar'] == 'open'
    return Header(
        Button(Icon('sidebar'), Unseen('Conversations'), type='button', popovertarget='sidebar', cls='round narrow'),
        LookForm(look, Button(Icon('sidebar'), Unseen('Sidebar'), name='sidebar', value='closed' if shown else 'open',
                              cls='round wide', title='Sidebar', aria_controls='sidebar',
                              aria_expanded=str(shown).lower(), data_action='Show or hide the sidebar')),
        Heading(conversation, title), Span('Demo model', cls='tag') if demo else None,
        A(Icon('new'), Unseen('New conversation'), href='/', cls='round', title='New conversation'), id='bar')

def Snippet(hit):
    "What was found: the conversation it is in, and the words around the matches."
    parts = re.split(f'[{MATCH}]', hit.snippet)
    words = [Mark(part) if n % 2 else part for n, part in enumerate(parts)]
    return words if hit.message is None else [Span(hit.title, cls='where'), Span(*words)]

def told_of(hit):
    who = {'user': 'You', 'assistant': 'Claude'}.get(hit.role, 'Conversation')
    return f'{who}, {time.strftime("%Y-%m-%d", time.gmtime(hit.created))}'

def HitOption(hit, n):
    "A hit in the palette; the script goes there, or lands at its message by a form."
    return Li(*Snippet(hit), id=f'hit-{n}', role='option', cls='hit', data_kind=told_of(hit), data_message=hit.message,
              data_to=place_of(hit))

def place_of(hit): return show.to(conversation_id=hit.conversation) + '/choose' * (hit.message is not None)

def Hits(typed, hits):
    "A page of its own for who has no script. Going to a message is a POST: its branch is chosen by it."
    def Way(hit):
        if hit.message is None: return A(*Snippet(hit), href=place_of(hit))
        return Form(Button(*Snippet(hit), name='message', value=hit.message), method='post', action=place_of(hit))
    return Div(
        H2('Search'), Form(Input(name='q', value=typed, type='search', aria_label='Words to find'),
                           Button('Search', cls='quiet'), action=search.to(), role='search'),
        Ul(*[Li(Way(hit), P(told_of(hit))) for hit in hits]),
        P('Nothing found.') if typed and not hits else None, id='search')

KEYS = [('Enter', 'send'), ('Shift Enter', 'a new line'), ('Esc', 'stop the reply'), ('↑', 'your last question again'),
        ('/', 'to the message box'), ('Ctrl K', 'find words, a conversation or an action'), ('?', 'these keys')]

def Dialogs():
    close = Form(Button(Icon('close'), Unseen('Close'), cls='round'), method='dialog')
    words = 'Find words, a conversation or an action'
    query = Input(id='query', role='combobox', placeholder=words, aria_label=words, autocomplete='off', name='q',
                  aria_expanded='true', aria_controls='choices', aria_autocomplete='list', hx_get=search.to(),
                  hx_trigger='input changed delay:120ms', hx_target='#choices', hx_swap='beforeend',
                  hx_sync='this:replace', maxlength=400)
    return (Dialog(query, Ul(id='choices', role='listbox', aria_label=words), P('Nothing found.', cls='none'),
                   id='palette', closedby='any', aria_label='Find'),
            Dialog(close, H2('Keys', id='keys-title'),
                   Dl(*[Div(Dt(Kbd(key)), Dd(what)) for key, what in KEYS]),
                   id='keys', closedby='any', aria_labelledby='keys-title'))

def Page(title, conversations, *content, look, conversation=None, again='', demo=False, setup=None, undo='',
         **composer):
    "A whole page. Without JavaScript it loads `again`, an address, while a reply runs. `look`: see `look_of`."
    config = {'includeIndicatorStyles': False, 'allowEval': False, 'allowScriptTags': False, 'historyCacheSize': 0,
              'refreshOnHistoryMiss': True, 'selfRequestsOnly': True, 'responseHandling': [
                  {'code': '204', 'swap': False}, {'code': '[23]..', 'swap': True},
                  {'code': '[45]..', 'swap': True, 'target': '#notice', 'swapOverride': 'innerHTML'}]}
    head = Head(
        Meta(charset='utf-8'), Title(title),
        Meta(name='viewport', content='width=device-width, initial-scale=1, viewport-fit=cover, '
                                      'interactive-widget=resizes-content'),
        *[Meta(name='theme-color', content=PAPER.get(look['theme'], colour), media=f'(prefers-color-scheme: {scheme})')
          for scheme, colour in PAPER.items()],
        Meta(name='color-scheme', content='light dark'), Meta(name='htmx-config', content=json.dumps(config)),
        Link(rel='stylesheet', href=asset('parley.css')), Link(rel='manifest', href=asset('parley.webmanifest')),
        Link(rel='icon', href=asset('icon.svg'), data_news=asset('news.svg')),
        *[Script(src=asset(name), defer=True) for name in ('htmx.js', 'ws.js', 'parley.js')],
        Noscript(Meta(http_equiv='refresh', content=f'2; url={again}')) if again else None)
    return Html(head, Body(
        A('To the message box', href='#message', cls='skip unseen'), Bar(title, look, conversation, demo),
        Sidebar(conversations, look, conversation and conversation.id),
        Main(Div(*content, id='messages'), Undo(undo), Composer(setup=setup, **composer),
             Panel(setup) if setup else None),
        *Dialogs(), Div(id='menu', popover=True, role='dialog', aria_label='Actions'),
        P(id='said', role='status', cls='unseen')),
        lang='en', data_theme=look['theme'], data_sidebar=look['sidebar'])

def Incoming(now):
    "How far an import is, or how it ended. While it goes on it asks for itself."
    asks = dict(hx_get=importing.to(), hx_trigger='every 1s', hx_swap='outerHTML') if now and not now.status else {}
    return Div(P(now.words, role='status') if now else None,
               Progress(value=f'{now.done:.3f}', max=1, aria_label='Import') if asks else None, id='incoming', **asks)

def YourData(now):
    what = 'A file that Parley, Claude or ChatGPT exported (zip or JSON)'
    return Div(
        H2('Your data'),
        P(A('Export everything', href=export.to(), download=True), ': a zip of all conversations with all their '
          'branches, as JSON that can be imported, and as Markdown.'),
        P(A('Download a backup', href=backup.to(), download=True), ': the whole database, the ',
          A('trash', href=trash.to()), ' too, without sign-ins. ', Code('python main.py restore'), ' puts it back.'),
        Form(Label(what, _for='file'), Input(type='file', id='file', name='file', required=True,
                                            accept='.zip,.json,application/zip,application/json'),
             Button('Import', cls='quiet'), Progress(value=0, max=1, hidden=True, aria_label='Upload'), method='post',
             enctype='multipart/form-data', action=bring.to(), hx_post=bring.to(), hx_encoding='multipart/form-data',
             hx_target='#incoming', hx_swap='outerHTML', hx_disabled_elt='find button'),
        Incoming(now), id='empty', cls='data')

def Plot(bars, words, summary):
    "A bar for each (name, height, what it stands for), drawn without a script; the figures are in a table below it."
    most = max([height for _, height, _ in bars]) or 1
    return Figure(Svg(Title(words, id='plot-title'), Desc(summary, id='plot-words'), *[
        G(Title(f'{name}: {said}'), Rect(x=n * 10 + 1, y=0, width=8, height=100, cls='there'),
          Rect(x=n * 10 + 1, y=round(100 - 100 * height / most, 2), width=8, height=round(100 * height / most, 2)))
        for n, (name, height, said) in enumerate(bars)], viewBox=f'0 0 {10 * len(bars)} 100', role='img',
        preserveAspectRatio='none', aria_labelledby='plot-title plot-words'), cls='plot')

COLUMNS = {'cost': 'Cost', 'calls': 'Calls', 'output': 'Out', 'input': 'In, fresh', 'cache_read': 'from cache',
           'cache_write': 'into cache'}

def summed(rows, key) -> dict[str, dict]:
    "Rows of Store.usage added up by what they have under `key`."
    names = dict.fromkeys(row[key] for row in rows)
    return {name: {column: sum(row[column] for row in rows if row[key] == name) for column in (*COLUMNS, 'unknown')}
            for name in names}

def cost_of(row):
    if row['unknown'] == row['calls']: return 'unknown'
    return '≥ ' * bool(row['unknown']) + money(row['cost'])

def Sums(words, name, sums):
    def cells(row): return [Td(f'{row[c]:,}' if c != 'cost' else cost_of(row), cls='right') for c in COLUMNS]
    return Div(Table(Caption(words), Thead(Tr(Th(name, scope='col'), *[Th(c, scope='col', cls='right')
                                                                       for c in COLUMNS.values()])),
                     Tbody(*[Tr(Th(key, scope='row'), *cells(row)) for key, row in sums.items()])),
               cls='table', tabindex='0', role='region', aria_label=words)

def Usage(rows, days, spent, cap):
    "What was used on these days, the oldest first, and what this month has cost."
    by_day, month = summed(rows, 'day'), time.strftime('%B %Y', time.gmtime())
    dollars = any(row['cost'] for row in rows)
    none = dict.fromkeys([*COLUMNS, 'unknown'], 0)
    def bar(day):
        row = by_day.get(day, none)
        tokens = sum(row[c] for c in TOKENS.values() if c in row)
        return day, row['cost'] if dollars else tokens, f'{cost_of(row)}, {tokens:,} tokens' if row['calls'] else 'none'
    words = f'{"Cost" if dollars else "Tokens"} of the last {len(days)} days'
    total = P(B(money(spent)), f' in {month} (UTC)', f', of a cap of {money(cap)}' if cap else '', '.')
    if not rows: return Div(H2('Usage'), total, P('Nothing was used in the last days.'), cls='content usage')
    return Div(H2('Usage'), total, Plot(list(map(bar, days)), words, f'{days[0]} to {days[-1]}'),
               P(Span(days[0]), Span(words), Span(days[-1]), cls='axis'),
               Sums('By model', 'Model', summed(rows, 'model')), Sums('By day', 'Day', by_day),
               P(A('All of it as CSV', href=usage_csv.to(), download=True),
                 '. Titles and summaries are counted; of a reply that was cut off the end is estimated.'
                 + ' ≥ where the price of some calls is unknown.' * any(row['unknown'] for row in rows)),
               cls='content usage')

def Connections(servers, said='', name='', url=''):
    "The servers whose tools Claude may use. What stands after a `?` may be a secret, as a token is."
    def Row(server):
        return Li(B(server.name), Span(server.url.partition('?')[0], cls='host'),
                  Span('a token is kept' if server.token else 'no token', cls='host'),
                  Form(Button('Delete', Unseen(f' {server.name}'), name='drop', value=server.id, cls='quiet'),
                       method='post'))
    return Div(
        H2('Connections'),
        P('Claude can use the tools of servers that speak the Model Context Protocol (MCP). It is Claude’s side that '
          'calls them, with what the tool needs from your conversation. A conversation uses one only where you switch '
          'it on, in its settings.'),
        Ul(*map(Row, servers), cls='servers') if servers else None,
        Form(Label('Name', Input(name='name', value=name, required=True, maxlength=64, pattern='[A-Za-z0-9_\\-]+',
                                 title='letters, digits, - and _', autocomplete='off')),
             Label('Address', Input(name='url', value=url, type='url', required=True, placeholder='https://…')),
             Label('Token, if it needs one', Input(name='token', type='password', autocomplete='off')),
             P(said, role='alert'), Button('Connect', cls='quiet'), method='post'), id='empty', cls='data')

def SignOut():
    return Form(Button('Sign out', cls='quiet', data_action='Sign out'),
                Button('everywhere', name='everywhere', value='1', cls='quiet', data_action='Sign out everywhere'),
                method='post', action=leave.to(), cls='leave')

def Login(place, notice='', typed=''):
    "The page before all others. It carries where one was going and what one had typed."
    return Html(
        Head(Meta(charset='utf-8'), Title('Sign in to Parley'), Link(rel='stylesheet', href=asset('parley.css')),
             Meta(name='viewport', content='width=device-width, initial-scale=1'),
             Meta(name='color-scheme', content='light dark'), Link(rel='icon', href=asset('icon.svg'))),
        Body(Div(Form(H1('Parley'), Input(name='username', value='Parley', autocomplete='username', hidden=True),
                      Label('Password', _for='password'),
                      Input(type='password', id='password', name='password', autocomplete='current-password',
                            required=True, autofocus=True, maxlength=1024),
                      Button('Sign in'), P(notice, role='alert'), Input(type='hidden', name='next', value=place),
                      Textarea('\n' + typed, name='message', hidden=True) if typed else None,
                      P('What you typed is kept.') if typed else None, method='post', action=enter.to()),
                 id='login', role='main')), lang='en')

# %%
if NOTEBOOK:
    print(Frame(1, Text('plain letters')), to_xml(State(replace(reply, status='done', note='All is said.'))), sep='\n')

# %% [markdown]
# ## 7 Look
#
# The stylesheet and the script, nothing else. JavaScript does only what a server can't.

# %%
CSS = r'''
/* Tokens. The type scale is 1.2 around the reading size; colours meet AA on page and card in both schemes. */
:root {
  color-scheme: light dark;
  --page: light-dark(#fbfaf7, #1b1a18); --card: light-dark(#f1eee7, #282623); --line: light-dark(#e4e0d7, #37342f);
  --ink: light-dark(#25221e, #e6e2d9); --soft: light-dark(#66615a, #a8a298); --edge: light-dark(#928b81, #7b756c);
  --accent: light-dark(#a3451d, #e99c75); --on-accent: light-dark(#fff, #1b1a18); --shade: light-dark(#25221e33, #0009);
  --read: ui-serif, Charter, 'Bitstream Charter', 'Charis SIL', 'Sitka Text', Cambria, 'Source Serif 4', Georgia, serif;
  --ui: system-ui, 'Inter', sans-serif; --code: ui-monospace, 'SF Mono', 'Cascadia Code', 'DejaVu Sans Mono', monospace;
  --body: 1.0625rem; --small: .9375rem; --tiny: .8125rem; --column: 41rem; --side: 17rem; --top: 3.25rem;
  --round: .5rem; --quick: 120ms ease-out;
}
[data-theme=light] { color-scheme: light; } [data-theme=dark] { color-scheme: dark; }

/* Ground */
*, ::before, ::after { box-sizing: border-box; }
html { scrollbar-gutter: stable; text-size-adjust: 100%; }
body { margin: 0; min-height: 100dvh; color: var(--ink); background: var(--page); font: var(--small)/1.5 var(--ui);
  display: grid; grid-template: var(--top) 1fr / var(--side) minmax(0, 1fr);
  grid-template-areas: 'side bar' 'side main'; }
[data-sidebar=closed] { --side: 0rem; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: .2em; }
button, input, textarea { font: inherit; color: inherit; }
button { background: none; border: 0; border-radius: var(--round); padding: .375rem .625rem; cursor: pointer; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
svg { width: 1.25rem; height: 1.25rem; flex: none; fill: none; stroke: currentColor; stroke-width: 1.75;
  stroke-linecap: round; stroke-linejoin: round; }
::file-selector-button { margin-right: .625rem; padding: .25rem .75rem; border: 1px solid var(--edge);
  border-radius: .375rem; font: inherit; font-size: var(--tiny); color: inherit; background: none; cursor: pointer; }
kbd { font: inherit; font-size: var(--tiny); color: var(--soft); border: 1px solid var(--line); border-radius: .25rem;
  padding: 0 .3rem; white-space: nowrap; }
.unseen:not(:focus) { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
.skip:focus { position: fixed; top: .5rem; left: .5rem; z-index: 9; padding: .5rem 1rem; background: var(--page); }
.round { display: grid; place-items: center; flex: none; width: 2.25rem; height: 2.25rem; padding: 0;
  border-radius: 50%; color: var(--soft); }
.quiet { font-size: var(--tiny); color: var(--soft); padding: .125rem .5rem; border-radius: .375rem;
  text-decoration: none; }
:is(.round, .quiet, .find, nav a):hover { background: var(--card); color: var(--ink); }
@media (scripting: none) { .scripted, body:has([data-status=streaming]) #message { display: none !important; } }
@media (scripting) { .unscripted, #upload, .state #stop { display: none; } }

/* What several pieces share */
.what, .unread, .under, #panel p, #search li p, #choices li::after, .listing li h2, #conversations h2 {
  color: var(--soft); font-size: var(--tiny); }
:is(.state, .listing, .data) .quiet, #undo .quiet, #fields button, #opener [name=instead], #search > form button {
  border: 1px solid var(--edge); }
:is(.state, .listing, .data) .quiet, #undo .quiet { color: var(--ink); padding: .25rem .75rem; }
summary { width: fit-content; cursor: pointer; border-radius: .25rem; }
dialog, #menu, #panel, #undo, #jump { color: var(--ink); background: var(--page); border: 1px solid var(--edge); }
:is(dialog, #panel) h2 { margin: 0 0 .75rem; font-size: 1.0625rem; }
:is(#undo, .files, #notice, #panel p, .data [role=alert]):empty { display: none; }
:is(#fields, .data label) :is(select, input, textarea), .rename input, :is(#search, #login) input { min-width: 0;
  border: 1px solid var(--edge); border-radius: var(--round); background: var(--card); }
.under p, :is(#panel, #login, #search li, .data form) p, .rename, #menu form, .listing form, #keys dl, dd { margin: 0; }
.files, #conversations, .listing ul, #empty ul, #choices, #search ul { margin: 0; padding: 0; list-style: none; }
#heading h1, #sidebar li > a[id], .called, .where { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.files, .actions, .state, .standing, #opener, .ways, .listing li { display: flex; flex-wrap: wrap;
  align-items: center; gap: .25rem .75rem; }

/* Bar */
#bar { grid-area: bar; position: sticky; top: 0; z-index: 2; display: flex; align-items: center; gap: .25rem;
  padding: 0 .75rem; background: var(--page); color: var(--soft); }
#heading { flex: 1; min-width: 0; display: flex; align-items: center; gap: .25rem; padding-left: .25rem; }
#heading h1 { margin: 0; font-size: var(--tiny); font-weight: 500; }
.tag { font-size: var(--tiny); border: 1px solid var(--line); border-radius: 1rem; padding: 0 .625rem;
  white-space: nowrap; }
.narrow { display: none; }

/* Sidebar */
#sidebar { grid-area: side; position: sticky; inset: 0 auto auto 0; display: flex; flex-direction: column;
  gap: .125rem; width: auto; height: 100dvh; margin: 0; padding: .5rem .75rem .75rem; border: 0;
  border-right: 1px solid var(--line); background: var(--page); color: var(--soft); overflow: hidden; }
#sidebar:not(:hover, :focus-within) li a:not([aria-current]) { color: var(--soft); }
#sidebar a, .find { display: flex; align-items: center; gap: .625rem; min-height: 2.125rem; padding: .25rem .625rem;
  border-radius: var(--round); color: var(--ink); text-decoration: none; }
.find kbd { margin-left: auto; }
#conversations { flex: 1; margin: .75rem -.75rem 0; padding: .5rem .75rem; overflow-y: auto;
  border-top: 1px solid var(--line); scrollbar-width: thin; overflow-anchor: none; }
#conversations h2 { margin: .75rem 0 .125rem; padding: 0 .625rem; } li > h2 { font-weight: 500; }
#conversations li:first-child h2 { margin-top: 0; }
#sidebar li { display: flex; align-items: center; border-radius: var(--round); }
#sidebar li > a[id] { flex: 1; min-width: 0; display: block; line-height: 1.625rem; unicode-bidi: isolate; }
#sidebar li:is(:hover, :focus-within, :has([aria-current])) { background: var(--card); }
#sidebar li > [aria-current] { font-weight: 550; }
#sidebar li > .more { flex: none; min-height: 0; width: 2rem; height: 2rem; padding: 0; display: grid; opacity: 0; }
#sidebar li:is(:hover, :focus-within) > .more { opacity: 1; }
.more { text-decoration: none; }
li[data-state] > a[id]::before { content: ''; display: inline-block; width: .5rem; height: .5rem; margin-right: .5rem;
  border-radius: 50%; border: 2px solid var(--accent); }
li[data-state=running] > a[id]::before { animation: pulse .8s ease-in-out infinite alternate; }
#sidebar li[data-state=unread] > a[id] { font-weight: 650; color: var(--ink); }
li[data-state=unread] > a[id]::before { background: var(--accent); }
.rename { flex: 1; display: flex; min-width: 0; gap: .25rem; }
.rename input { flex: 1; padding: .125rem .5rem; border-color: var(--accent); background: var(--page); }
#menu { position: fixed; inset: auto; margin: 0; min-width: 11rem; padding: .375rem; border-radius: var(--round); }
#menu:not(:popover-open), #menu .rename { display: none; } :is(#menu, #panel)::backdrop { background: none; }
#menu :is(button, a) { display: block; width: 100%; padding: .375rem .625rem;
  text-align: left; font-size: var(--small); color: var(--ink); }
#menu :is(button, a):hover { background: var(--card); }
#undo { position: fixed; z-index: 3; top: calc(var(--top) + .25rem); left: 50%; translate: -50%; display: flex;
  align-items: center; gap: .75rem; padding: .25rem .25rem .25rem 1rem; white-space: nowrap; border-radius: .75rem; }
.listing ul:not(#conversations) { margin: 1rem 0; }
.listing li { padding: .375rem 0; border-top: 1px solid var(--line); font: var(--small)/1.5 var(--ui); }
.listing li > span:first-child, .listing li > a[id] { flex: 1 1 12rem; overflow-wrap: anywhere; }
.listing > form { margin: .5rem 0; }
#conversations:empty { flex: 0; padding: 0; } #conversations:empty + .none { flex: 1; }
.none { margin: 0; padding: 1rem .625rem; } :not(:empty) + .none { display: none; }
.themes { display: flex; gap: .125rem; margin: 0 -.75rem; padding: .5rem .75rem 0; border-top: 1px solid var(--line); }
.themes button { flex: 1; min-height: 1.75rem; }
.themes [aria-pressed=true] { background: var(--card); color: var(--ink); }
.ways { gap: 0; } #sidebar .ways > * { min-height: 1.75rem; padding: .125rem .625rem; color: var(--soft); }
 .ways kbd { margin-left: .5rem; }
@media (min-width: 48.01rem) { [data-sidebar=closed] #sidebar { display: none; } }

/* Messages */
main { grid-area: main; display: flex; flex-direction: column; width: min(var(--column) + 2.5rem, 100%); min-width: 0;
  margin: 0 auto; padding: 0 1.25rem; }
#messages { flex: 1; padding: 1rem 0 1.5rem; overflow-anchor: none; }
#earlier { display: block; text-align: center; padding: .75rem; }
.message { margin-top: 1rem; scroll-margin-top: var(--top); }
.message[data-role=user]:not(:first-of-type) { margin-top: 2.25rem; }
.content { overflow-wrap: anywhere; font: var(--body)/1.6 var(--read); }
.message[data-role=user] .content { width: fit-content; max-width: 100%; padding: .625rem 1rem;
  border-radius: .875rem; background: var(--card); font: var(--small)/1.6 var(--ui); }
.actions { gap: 0 .5rem; min-height: 1.75rem; position: relative; left: -.5rem; /* a margin ends at the float */
  color: var(--soft); font-size: var(--tiny); }
.actions > :not(.walk), .account { opacity: 0; transition: opacity var(--quick); }
.message:is(:hover, :focus-within) :is(.actions > :not(.walk), .account), .account[open] { opacity: 1; }
.actions > time { padding: 0 .5rem; }
.walk { font-variant-numeric: tabular-nums; white-space: nowrap; }
.edit textarea { scroll-margin: calc(var(--top) + .5rem); } .edit .cancel { display: inline-block; margin-top: .25rem; }
body:has(.message[data-status=streaming]) .actions :is(.change, .walk, .retry) { visibility: hidden; }
.message:last-of-type:has(.state .retry) .actions .retry { display: none; }
.message:target { box-shadow: -1rem 0 var(--page), calc(-1rem - 2px) 0 var(--accent); }
.state { color: var(--soft); font-family: var(--ui); }
.state p { margin: .5rem 0; padding-left: .75rem; border-left: 2px solid var(--accent); }
.message:not(:last-of-type) .state .retry { display: none; }
.steps { color: var(--soft); font-size: var(--small); }
.steps summary { padding: .125rem 0; }
.steps details > div { margin: .25rem 0 .75rem .375rem; padding-left: .875rem; border-left: 2px solid var(--line); }
.steps :is(pre, ul, p) { margin: .25rem 0; } .steps ul { padding-left: 1rem; }
.steps pre { max-height: 40vh; overflow-y: auto; white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; }
.steps:not(:empty) { margin-bottom: .75rem; }
.standing { flex: 1 1 12rem; font-size: var(--tiny); }
.message:not(:last-of-type) .last, .message[data-role=note] { display: none; }
.summary { border-block: 1px solid var(--line); padding-block: .5rem; }
.summary > details > summary { color: var(--soft); }
[data-status=streaming] .steps details:last-child summary, .summary[data-status=streaming] > details > summary {
  animation: pulse 1.6s ease-in-out infinite alternate; }
.state:has(> .account:only-child:not([open])), .message:not(:last-of-type) .state:has(> .last + .account:not([open])) {
  float: right; } .account { margin-left: auto; }
:is(.account, .listing li details)[open] { flex: 1 0 100%; } .account summary { margin: 0 -.5rem 0 auto; }
.state .account summary { border: 0; padding: .25rem .5rem; color: var(--soft); }
.account dl { margin: .25rem 0 .5rem; padding: .5rem .75rem; border: 1px solid var(--line); border-radius: var(--round);
  display: grid; gap: .125rem; font-size: var(--tiny); font-variant-numeric: tabular-nums; }
.account dl div { display: grid; grid-template-columns: 7rem minmax(0, 1fr); }
.account dd { color: var(--ink); overflow-wrap: anywhere; }
/* at work: a quiet pulse, then a caret where the text ends */
[data-status=streaming]:not(:has(.state p, .steps > *)) :is(.content:empty, [id^=tail-]:only-child:empty)::after {
  content: 'Claude is thinking'; color: var(--soft); font: var(--small)/1.6 var(--ui);
  animation: pulse 1.6s ease-in-out infinite alternate; }
[id^=end-]::after { content: ''; border-left: .15em solid var(--accent); margin-left: .15em; font-size: .8em; }
@keyframes pulse { from { opacity: .55; } }

/* Words: what Markdown becomes */
.content :where(p, ul, ol, blockquote, figure, .table, .math, .plain, details) { margin: 0 0 1rem; }
.content :where(h1, h2, h3, h4, h5, h6) { margin: 1.75rem 0 .5rem; }
.content > :first-child, .content > [id^=tail-]:first-child > :first-child { margin-top: 0; }
[data-role=user] .content > :last-child, .content :is(blockquote, li, details) > :last-child { margin-bottom: 0; }
.content :is(.said, .plain pre) { white-space: pre-wrap; font: inherit; }
.content :is(h1, h2, h3, h4, h5, h6) { font-family: var(--ui); font-weight: 650; line-height: 1.3; }
.content h1 { font-size: 1.53rem; } .content h2 { font-size: 1.275rem; }
.content :is(h3, h4, h5, h6) { font-size: 1.0625rem; }
.content :is(ul, ol) { padding-left: 1.5rem; } .content li > :is(ul, ol, p) { margin: .25rem 0 0; }
.content li { margin-bottom: .25rem; } .content li::marker { color: var(--soft); font-variant-numeric: tabular-nums; }
.content .task { list-style: none; margin-left: -1.375rem; } .content .task > :is(ul, ol) { margin-left: 1.375rem; }
.content blockquote { padding-left: 1rem; border-left: 2px solid var(--edge); color: var(--soft); }
.content hr { border: 0; border-top: 1px solid var(--line); margin: 2rem 0; }
.content code { font: .875em/1.5 var(--code); background: var(--card); border-radius: .25rem; padding: .1em .3em; }
.content .code { border: 1px solid var(--line); border-radius: var(--round); overflow: hidden; }
.code figcaption { display: flex; align-items: center; gap: .25rem; min-height: 2rem;
  padding: .125rem .375rem .125rem .875rem; color: var(--soft); font: var(--tiny)/1.5 var(--ui);
  background: var(--card); }
.code figcaption > :first-of-type { margin-left: auto; }
.code figcaption [aria-pressed=true] { color: var(--accent); }
.code pre { margin: 0; padding: .75rem .875rem; overflow-x: auto; white-space: pre; tab-size: 4; outline-offset: -2px;
  font: .8125rem/1.55 var(--code); }
.code code { padding: 0; background: none; font: inherit; overflow-wrap: normal; }
.code[data-wrap] :is(pre, code) { white-space: pre-wrap; overflow-wrap: anywhere; }
.code :is([class^=k], .ow, .nt) { color: var(--accent); } /* the short names that Pygments gives to kinds of tokens */
.code :is([class^=s], .gi) { color: light-dark(#3a6a2b, #a5c78e); }
.code :is([class^=m], .il, .kc, .no) { color: light-dark(#1d5d88, #8abae0); }
.code :is(.nf, .fm, .nc, .nd, .na, .nb) { color: light-dark(#5d429c, #c5b2f0); }
.code [class^=c] { color: var(--soft); font-style: italic; } .code .gd { color: light-dark(#a3161d, #f09a96); }
.content .table { overflow-x: auto; }
.content table { border-collapse: collapse; font: .9375rem/1.5 var(--ui);
  font-variant-numeric: lining-nums tabular-nums; }
.content :is(th, td) { padding: .4rem 1.25rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: normal; min-width: 4rem; }
.content th { border-bottom-color: var(--edge); font-weight: 650; }
.content .right { text-align: right; } .content .center { text-align: center; }
.content .math { overflow-x: auto; overflow-y: hidden; text-align: center; } .content math { font-size: 1.08em; }
.content .image { display: inline-block; padding: .25rem .75rem; border: 1px dashed var(--edge);
  border-radius: var(--round); font: var(--small)/1.6 var(--ui); color: var(--accent); cursor: pointer;
  text-decoration: none; }
.host { color: var(--soft); font-size: .875em; }
input { accent-color: var(--accent); } .content .cite { padding: 0 .1em; text-decoration: none; font-weight: 650; }
.content > * { position: relative; }
.content a[title]:is(:focus-visible, [data-told])::after { content: attr(title); position: absolute; left: 0;
  right: 0; top: 100%; z-index: 1; padding: .5rem .75rem; border: 1px solid var(--edge); color: var(--ink);
  border-radius: var(--round); background: var(--page); font: var(--tiny)/1.5 var(--ui); }
.content :is(sup, sub) { line-height: 0; font-size: .75em; }
.content .notes { margin-top: 2rem; padding-top: .75rem; border-top: 1px solid var(--line); font-size: var(--small); }
.content :is(summary, .cut) { color: var(--soft); }

/* Composer */
#composer { position: sticky; bottom: 0; z-index: 1; padding: 0 0 max(.5rem, env(safe-area-inset-bottom));
  background: var(--page); box-shadow: 0 -.75rem .75rem var(--page); }
.field { display: flex; align-items: end; gap: .25rem; padding: .25rem; border: 1px solid var(--edge);
  border-radius: 1.375rem; transition: border-color var(--quick), background-color var(--quick); }
.field:focus-within { border-color: var(--accent); background: var(--card); }
.files { gap: .5rem; margin: 0 0 .375rem; align-items: stretch; }
.files li { position: relative; max-width: 100%; }
.files img { display: block; width: auto; max-width: min(20rem, 100%); max-height: 15rem; min-width: 3rem;
  min-height: 3rem; border: 1px solid var(--line); border-radius: var(--round); background: var(--card); }
.chip img { width: 4.5rem; height: 4.5rem; object-fit: cover; }
.name { display: grid; grid-template-columns: auto 1fr; column-gap: .5rem; align-items: center; min-height: 3rem;
  padding: .375rem .75rem; border: 1px solid var(--line); border-radius: var(--round); text-decoration: none;
  color: var(--ink); max-width: 20rem; }
.name svg { grid-row: span 2; color: var(--soft); } .name:not(:has(svg)) { grid-template-columns: 1fr; }
.called { font-weight: 500; }
.chip { display: flex; align-items: center; gap: .25rem; } .chip .name { max-width: 15rem; }
.chip progress { width: 6rem; }
.chip .remove { position: absolute; top: 0; right: 0; translate: 40% -40%; background: none; }
.remove svg { width: 1.375rem; height: 1.375rem; padding: .25rem; border-radius: 50%; color: var(--page);
  background: var(--soft); stroke-width: 3; } .remove:hover svg { background: var(--ink); }
.unread { display: none; margin: 0 .75rem .375rem; color: var(--accent); }
#composer:has(#opener:not([data-reads~=image])) [data-needs=image],
#composer:has(#opener:not([data-reads~=pdf])) [data-needs=pdf] {
  & :is(.name, img) { border: 1px dashed var(--accent); } &::after { content: '' / 'The model can’t read it.'; } }
#composer:has(#opener:not([data-reads~=image])) :has([data-needs=image]) ~ .unread,
#composer:has(#opener:not([data-reads~=pdf])) :has([data-needs=pdf]) ~ .unread { display: block; }
#files { padding: .5rem .75rem 0 .25rem; } #upload { margin-bottom: .375rem; color: var(--soft); }
[data-role=user] .content:empty { display: none; }
.dropping::after { content: 'Drop files to attach them'; position: fixed; inset: .75rem; z-index: 9; display: grid;
  place-items: center; border: 2px dashed var(--accent); border-radius: .875rem; pointer-events: none;
  background: color-mix(in srgb, var(--page) 85%, transparent); color: var(--accent); font-size: 1.275rem; }
.field textarea { flex: 1; min-width: 0; padding: .375rem .75rem; border: 0; outline: 0; resize: none;
  max-height: 40dvh; background: none; font: 1rem/1.5 var(--ui); field-sizing: content; }
::placeholder { color: var(--soft); opacity: 1; }
.attach { margin-right: -.5rem; }
.send, .stop, :is(.send, .stop):hover { color: var(--on-accent); background: var(--accent); }
.stop, body:has(.message[data-status=streaming]) .send { display: none; }
body:has(.message[data-status=streaming]) .stop { display: grid; }
.stop svg { fill: currentColor; }
#notice { margin: .375rem .75rem 0; } :is(#notice, #login [role], .data [role=alert]) { color: var(--accent); }
.under { display: flex; align-items: center; justify-content: space-between; gap: 1rem; min-height: 1.25rem;
  margin: .25rem .75rem 0; white-space: nowrap; }
.under .hint { visibility: hidden; }
.field:focus-within ~ .under .hint { visibility: visible; }
#opener { gap: 0; margin-left: -.5rem; min-width: 0; } #opener:not(:has(p)) { flex-wrap: nowrap; }
#opener button { overflow: hidden; text-overflow: ellipsis; } [type=checkbox] { margin: 0; }
#opener label, #fields div label { display: flex; flex: none; align-items: center; gap: .375rem; }
#opener [popovertarget]::after { content: '▾' / ''; margin-left: .375rem; }
#opener p { color: var(--accent); padding-left: .5rem; white-space: normal; }
#panel { inset: auto 0 5.5rem var(--side); width: min(36rem, calc(100vw - var(--side) - 2rem));
  max-height: calc(100dvh - 8rem); margin: 0 auto; padding: 1rem 1.25rem; border-radius: .875rem; overflow-y: auto; }
#fields { display: grid; grid-template-columns: minmax(0, 1fr); gap: .625rem; }
#fields .row { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem .75rem; }
#fields span { flex: 0 0 8rem; color: var(--soft); white-space: nowrap; } select { text-overflow: ellipsis; }
:is(#fields, .data label) :is(select, input, textarea) { flex: 1 1 11rem; padding: .375rem .625rem; color: inherit;
  border-color: var(--line); font: inherit; }
#fields [type=checkbox] { flex: none; } #fields div[role=group] { align-items: center; }
#fields textarea { resize: vertical; min-height: 4.5rem; max-height: 40dvh; field-sizing: content; }
#fields button { white-space: nowrap; } #panel > a { margin: .375rem 0 0 -.5rem; }
#panel a, #search li a { display: inline-block; min-height: 1.5rem; } #fields > p { padding-left: 8.75rem; }
#jump { position: absolute; bottom: calc(100% + .5rem); left: 50%; translate: -50%; display: flex;
  align-items: center; gap: .375rem; padding: .25rem .875rem .25rem .625rem; border-radius: 2rem; white-space: nowrap; }
#jump[hidden], main:not(:has(.message)) #jump { display: none; }

/* First visit */
#empty:not([class]) { padding-top: min(12vh, 6rem); }
:is(#empty, #search, .usage) > h2, #login h1 {
  margin: 0 0 1rem; font: 500 1.85rem/1.2 var(--read); text-wrap: balance; }
#empty ul { margin-bottom: 1.25rem; font: var(--body)/1.6 var(--read); } #empty:not([class]) li { margin-top: .375rem; }
.demo { margin: 0 0 2rem; color: var(--soft); } .demo code { font: .875em var(--code); } .demo b { color: var(--ink); }
.examples form { display: grid; }
.examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 2rem; }
.examples button { width: 100%; padding: .6875rem 0; border-top: 1px solid var(--line); border-radius: 0;
  text-align: left; display: flex; }
.examples button:hover { color: var(--accent); }

.data form { display: grid; justify-items: start; gap: .5rem; margin: 1.5rem 0 1rem; }
.data input { max-width: 100%; }
.data label { display: grid; gap: .25rem; width: min(26rem, 100%); }
#empty .servers { font: var(--small)/1.6 var(--ui); } .servers .host { overflow-wrap: anywhere; }
.servers li { display: grid; grid-template-columns: 1fr auto; gap: 0 .75rem; padding: .5rem 0;
  border-top: 1px solid var(--line); }
.data .servers form { margin: 0; grid-area: 1 / 2 / span 3; align-content: center; }
progress { width: 100%; accent-color: var(--accent); } progress[hidden] { display: none; }
/* Usage */
.plot { margin: 0; } .plot svg { display: block; width: 100%; height: 8rem; stroke: none; fill: var(--accent);
  border-bottom: 1px solid var(--edge); }
.plot .there { fill: var(--card); } .plot g:hover .there { fill: var(--line); }
.axis { display: flex; justify-content: space-between; color: var(--soft); font: var(--tiny)/1.5 var(--ui); }
.usage caption { text-align: left; color: var(--soft); }
.usage :is(th, td) { white-space: nowrap; padding-right: .75rem; }
.usage tbody th { font-weight: 400; border-color: var(--line); }

/* Dialogs */
dialog { width: min(36rem, calc(100vw - 2rem)); max-height: 80dvh; margin: 10vh auto auto; padding: 0;
  border-radius: .875rem; }
::backdrop { background: var(--shade); }
#query { width: 100%; padding: .875rem 1.25rem; border: 0; outline: 0; background: none; font-size: 1rem; }
#choices { padding: .375rem; max-height: 55dvh; overflow-y: auto; border-top: 1px solid var(--line); }
#choices li { display: flex; justify-content: space-between; gap: 1rem; padding: .5rem .875rem;
  border-radius: var(--round); cursor: pointer; }
#choices [aria-selected=true] { background: var(--card); box-shadow: inset 2px 0 var(--accent); }
#choices li::after { content: attr(data-kind); }
#choices .hit { flex-wrap: wrap; gap: 0 1rem; } .hit > :not(.where) { order: 3; flex-basis: 100%; color: var(--soft); }
.where { flex: 1; }
mark { color: var(--accent); background: none; font-weight: 600; }
#search form { display: flex; gap: .5rem; } #search > form { margin-bottom: 1.5rem; }
#search input { flex: 1; padding: .375rem .75rem; } #search ul { margin-block: 1em; }
#search li { padding: .625rem 0; border-top: 1px solid var(--line); }
#search li button { flex: 1; display: grid; padding: .25rem 0; text-align: left; }
#palette:focus-within { border-color: var(--accent); }
#keys { padding: 1.25rem 1.5rem; width: min(26rem, calc(100vw - 2rem)); }
#keys form { float: right; margin: -.375rem -.75rem; }
#keys dl div { display: flex; justify-content: space-between; gap: 1rem; padding: .375rem 0; text-align: right;
  border-top: 1px solid var(--line); }

/* Other circumstances */
@media (max-width: 48rem) {
  :root { --side: 0rem; }
  .narrow { display: grid; } .wide, #heading [data-action], #heading:has(a) + .tag,
  [data-role=assistant]:not(:has(.account[open])) time { display: none; }
  #sidebar { position: fixed; width: min(20rem, 85vw); } #panel { bottom: 7.5rem; }
  #fields span { flex-basis: 7.5rem; } #fields > p { padding-left: 0; } #panel { padding-inline: 1rem; }
  #sidebar:not(:popover-open) { display: none; }
  main { padding: 0 1rem; }
}
@media (max-width: 64rem) { .hint, .by { display: none; } }
@media (hover: none) { .actions > :not(.walk), .account, #sidebar li > .more { opacity: 1; } }
@media (pointer: coarse) {
  :root { --top: 3.5rem; } .actions { gap: 0; } .walk { margin: 0 -.25rem 0 -.75rem; }
  .round { width: 2.75rem; height: 2.75rem; }
  #sidebar li > .more, #sidebar .ways > * { min-width: 2.75rem; min-height: 2.75rem; }
  #sidebar :is(a, button), .quiet, #choices li, summary, #jump, #panel a, #search li a {
    min-height: 2.75rem; min-width: 2.75rem; align-content: center; }
  :is(#fields, .data label) :is(select, input) { min-height: 2.75rem; font-size: 1rem; }
  #fields textarea { font-size: 1rem; } ::file-selector-button { min-height: 2.75rem; }
  .field textarea { padding-block: .625rem; } nav kbd { display: none; } .quiet { text-align: center; }
}
/* Signing in */
body:has(> #login) { display: grid; grid-template: 1fr / 1fr; place-items: center; padding: 1rem; }
#login { width: min(20rem, 100%); } #login form { display: grid; gap: .75rem; }
#login input { padding: .625rem .75rem; font-size: 1rem; }
#login button { background: var(--accent); color: var(--on-accent); min-height: 2.75rem; }
#login p { color: var(--soft); } .leave { display: flex; }

@media (prefers-reduced-motion: reduce) {
  *, ::before, ::after { animation: none !important; transition: none !important; }
}
@media (forced-colors: active) {
  [data-role=user] .content, [aria-current], [aria-pressed=true] { border: 1px solid; }
  #choices [aria-selected=true] { outline: 2px solid; }
}
@media print {
  :root { color-scheme: light; --page: #fff; } body { display: block; } .code pre { white-space: pre-wrap; }
  #sidebar, #bar .round, .tag, #composer, .actions, .account, .code button, #earlier { display: none !important; }
}
'''

JS = r'''
'use strict';
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const remove = elements => elements.forEach(element => element.remove());
const on = (name, act, how) => document.addEventListener(name, act, how);
const say = text => { $('#link').textContent = text; };
const announce = text => { $('#said').textContent = text; };
const notice = text => { $('#notice').textContent = text; };
const keep = (name, value) => { document.cookie = `${name}=${value}; path=/; max-age=31536000; samesite=lax`; };

// The socket of a reply. A clean end is final; a socket that fails twice in a row gives way to polling.
htmx.config.wsReconnectDelay = retry => Math.min(1000 * 2 ** retry, 2000) * (0.75 + Math.random() / 4);
// It asks for the very message that its bubble shows: while a tab slept, another may have come to the same place.
htmx.createWebSocket = url => new WebSocket(url + $(`[ws-connect="${new URL(url).pathname}"] .copy`).search);
on('htmx:wsConnecting', e => {
  if (!e.target.failures) announce('Claude is answering.');
  say(e.target.failures ? 'reconnecting…' : 'connecting…');
});
on('htmx:wsOpen', e => { e.target.restart = false; say('live'); });
on('htmx:wsError', () => say('connection lost'));
on('htmx:wsBeforeMessage', e => { e.target.failures = 0; e.target.heard = performance.now(); });
on('htmx:wsClose', e => {
  const bubble = e.target, code = e.detail.event.code;
  if (code === 4401) return location.reload(); // signed out
  if (code === 1000 || code === 4404) return finish(bubble);
  bubble.failures = (bubble.failures || 0) + 1;
  if (code === 1012) bubble.restart = true;
  say('reconnecting…');
  if (code >= 4000 || bubble.failures >= (bubble.restart ? 8 : 2)) poll(bubble);
});

function unplug(bubble) { for (const name of ['ws-connect', 'hx-ext']) bubble.removeAttribute(name); }

function finish(bubble) {
  unplug(bubble);
  const { status } = $('.state', bubble).dataset;
  bubble.dataset.status = status === 'streaming' ? 'interrupted' : status;
  over(bubble);
}

function over(bubble) { // said once, however the end was heard of; a hidden tab shows it in title and icon
  const { status } = bubble.dataset;
  dress(bubble);
  say(status === 'done' ? 'finished' : status);
  announce($('.state p', bubble)?.textContent || 'Claude has answered.');
  if (document.hidden) news(true);
  $('#heading').dataset.unread = '';
  seen();
}

function news(is) {
  const icon = $('link[rel=icon]');
  icon.dataset.calm ??= icon.href;
  icon.href = is ? icon.dataset.news : icon.dataset.calm;
  document.title = (is ? '● ' : '') + document.title.replace(/^● /, '');
}

function poll(bubble) { // a copy, so that the extension finds the element of its socket gone
  bubble['htmx-internal-data'].webSocket.init = () => {}; // its next try is on the clock already
  const copy = bubble.cloneNode(true), asks = { get: bubble.dataset.poll, trigger: 'every 1s', swap: 'outerHTML' };
  unplug(copy);
  for (const [name, value] of Object.entries(asks)) copy.setAttribute('hx-' + name, value);
  bubble.replaceWith(copy);
  htmx.process(copy);
  say('live, without a socket');
}
on('htmx:afterSwap', e => {
  const asked = e.detail.requestConfig?.elt, polled = asked?.matches('.message[hx-trigger]') && $('#' + asked.id);
  if (polled && polled.dataset.status !== 'streaming') over(polled);
  if (asked?.matches('.cancel')) $(`#${e.detail.target.id} [href*="edit="]`)?.focus();
});

// A file on its way: its form has a bar for how much of it has gone.
on('htmx:xhr:progress', e => {
  const bar = $('progress', e.target);
  if (!bar || !e.target.matches('form')) return;
  bar.hidden = e.detail.loaded === e.detail.total;
  bar.value = e.detail.loaded / e.detail.total;
});

// A socket that slept may be half open and say nothing: open it anew unless it has just been heard.
function wake() {
  for (const bubble of $$('[ws-connect]')) {
    const wrapper = bubble['htmx-internal-data']?.webSocket, socket = wrapper?.socket;
    if (socket?.readyState !== WebSocket.OPEN || performance.now() - (bubble.heard || 0) < 2000) continue;
    socket.onclose = socket.onerror = null;
    bubble.heard = performance.now();
    wrapper.init();
  }
  if (performance.now() - listHeard > 2000) follow();
}
on('visibilitychange', () => { if (!document.hidden) { news(false); wake(); relist(); seen(); } });
addEventListener('online', wake);
addEventListener('pageshow', e => { if (e.persisted) location.reload(); });

// The reader's place, decided here only. The end is followed while it is in view; else what is seen stays where it is,
// also when older messages come in above, after a reload, and on the way back.
const page = document.scrollingElement, messages = $('#messages'), jump = $('#jump');
let pinned = true, last = 0, tall = 0, below = null;
const atEnd = () => page.scrollHeight - page.scrollTop - page.clientHeight < 40;
const toEnd = () => { pinned = true; page.scrollTop = page.scrollHeight; };
const place = () => 'place:' + location.pathname;
function settled() {
  last = page.scrollTop;
  tall = page.scrollHeight;
  jump.hidden = pinned || atEnd();
}
function grown() {
  if (below !== null) page.scrollTop = page.scrollHeight - below;
  else if (pinned) toEnd();
  below = null;
  settled();
}
on('scroll', () => { // a step up is the reader's wish to stay, however small, unless the page has only shrunk
  if (page.scrollTop < last - 1 && page.scrollHeight >= tall) pinned = false;
  else pinned ||= atEnd();
  settled();
});
addEventListener('resize', grown);
new ResizeObserver(grown).observe(messages);
on('htmx:beforeSwap', e => {
  if (e.detail.target.id === 'earlier' && !pinned) below = page.scrollHeight - page.scrollTop;
});
addEventListener('pagehide', () => {
  const seen = $$('.message').find(m => m.getBoundingClientRect().bottom > 60);
  if (pinned || !seen) sessionStorage.removeItem(place());
  else sessionStorage.setItem(place(), JSON.stringify([seen.id, seen.getBoundingClientRect().top]));
});
function arrive() { // where a link leads, else where one was
  const [visit] = performance.getEntriesByType('navigation'), hit = document.getElementById(location.hash.slice(1));
  pinned = !hit || visit.type !== 'navigate';
  if (!pinned) return hit.scrollIntoView();
  const [id, top] = JSON.parse(sessionStorage.getItem(place())) || [], seen = id && $('#' + id);
  pinned = !seen && Boolean($('.message'));
  if (!seen) return pinned && toEnd();
  page.scrollTop += seen.getBoundingClientRect().top - top;
}
history.scrollRestoration = 'manual';

// What a message gets once it is complete: tools for its code, local times, image links that a keyboard reaches.
function dress(root) {
  for (const code of $$('figure.code', root)) {
    if ($('button', code) || code.closest('[id^=tail-]')) continue;
    $('figcaption', code).insertAdjacentHTML('beforeend', `
      <button class=quiet data-wrap aria-pressed=false>Wrap</button>
      <button class=quiet data-copy>Copy<span class=unseen> this code</span></button>`);
  }
  for (const time of $$('time:not([title])', root)) {
    time.title = time.textContent;
    const [day, clock] = time.dateTime.split('T'), timeStyle = clock && 'short'; // a day is the same day everywhere
    time.textContent = new Date(`${day}T${clock || '00:00'}`).toLocaleString([], { dateStyle: 'medium', timeStyle });
  }
  for (const image of $$('.image[data-src]', root)) Object.assign(image, { role: 'link', tabIndex: 0 });
}
new MutationObserver(changes => new Set(changes.map(change => change.target)).forEach(dress))
  .observe(messages, { childList: true, subtree: true });

async function copy(text, control) { // `text` may be on its way: Safari wants the clipboard asked within the click
  const type = 'text/plain', blob = Promise.resolve(text).then(text => new Blob([text], { type }));
  try {
    if (navigator.clipboard) await navigator.clipboard.write([new ClipboardItem({ [type]: blob })]);
    else { // plain http on another machine
      const words = await (await blob).text();
      on('copy', e => { e.clipboardData.setData(type, words); e.preventDefault(); }, { once: true });
      if (!document.execCommand('copy')) throw new Error('refused');
    }
    control.dataset.did = 'Copied';
  } catch { control.dataset.did = 'Not copied'; }
  announce(control.dataset.did);
  setTimeout(() => delete control.dataset.did, 1500);
}
async function written(link) {
  const got = await fetch(link.href);
  if (!got.ok || got.redirected) throw new Error('signed out');
  return got.arrayBuffer();
}

on('click', e => {
  const control = e.target.closest('button, a, .image');
  for (const told of $$('[data-told]')) if (told !== control) delete told.dataset.told;
  if (control?.matches('.cite[title]:not([data-told])') && matchMedia('(pointer: coarse)').matches) {
    e.preventDefault(); // a tap shows what is quoted, the next one follows
    control.dataset.told = '';
  } else if (control?.matches('a.copy')) { e.preventDefault(); copy(written(control), control); }
  else if (control?.matches('[data-copy]')) copy($('code', control.closest('figure')).textContent, control);
  else if (control?.matches('[data-wrap]'))
    control.ariaPressed = control.closest('figure').toggleAttribute('data-wrap');
  else if (control?.matches('.image[data-src]')) open(control.dataset.src, '_blank', 'noopener,noreferrer');
  else if (control?.matches('.more') && !e.ctrlKey && !e.metaKey && !e.shiftKey) { e.preventDefault(); offer(control); }
  else if (control?.matches('[data-rename]')) rename(control.dataset.rename);
  else if (control?.matches('[data-opens]')) { e.preventDefault(); show(control.dataset.opens); }
  else if (control === jump) toEnd();
  else if (control?.matches('.attach')) upload.click();
  else if (control?.matches('.remove')) {
    const chip = control.parentNode;
    $('textarea', chip.closest('form')).focus();
    chip.remove();
    chip.asked?.abort();
    waiting = false;
  }
});

// How the page looks is remembered in cookies, so that the server's first paint is right.
on('submit', e => {
  if (!e.target.matches('.look')) return;
  e.preventDefault();
  const { name, value } = e.submitter, root = document.documentElement;
  root.dataset[name] = value;
  keep(name, value);
  const open = value === 'open';
  if (name === 'sidebar') Object.assign(e.submitter, { value: open ? 'closed' : 'open', ariaExpanded: open });
  else for (const button of $$('[name=theme]')) button.ariaPressed = button === e.submitter;
  for (const meta of $$('meta[name=theme-color]')) meta.content = getComputedStyle(document.body).backgroundColor;
});

// The list. Its socket says only that there is something new; then as many rows as there are now are had again, and
// of these only what differs is replaced: a click, the focus and the place in the list survive, also on the next page.
const list = $('#conversations'), menu = $('#menu');
let listSocket = null, listHeard = 0, failures = 0, edition = list.dataset.edition, listing = false;
const were = JSON.parse(sessionStorage.getItem('list')) || {};
if (were.rows > $$('a[id]', list).length) edition = null;
else settle();
function settle() { [list.scrollTop, were.rows] = [were.top, 0]; }
addEventListener('pagehide', () =>
  sessionStorage.setItem('list', JSON.stringify({ rows: $$('a[id]', list).length, top: list.scrollTop })));
keep('zone', -new Date().getTimezoneOffset());
function follow() {
  if (listSocket) { listSocket.onclose = listSocket.onmessage = null; listSocket.close(); }
  listHeard = performance.now();
  const socket = listSocket = new WebSocket(location.origin.replace('http', 'ws') + '/ws/list');
  socket.onmessage = e => {
    [listHeard, failures, list.dataset.edition] = [performance.now(), 0, e.data];
    relist();
  };
  socket.onclose = e => {
    if (e.code === 4401) return location.reload();
    if (failures > 1) { list.dataset.edition = ''; relist(); } // without a socket it asks now and then
    const wait = Math.min(1000 * 2 ** failures++, 5000) * (.75 + Math.random() / 4);
    setTimeout(() => socket === listSocket && follow(), wait);
  };
}
async function relist() {
  const wanted = list.dataset.edition, count = Math.max($$('a[id]', list).length, were.rows);
  if (listing || document.hidden || edition === wanted || $('form', list)) return;
  listing = true;
  try {
    const headers = { 'HX-Request': 'true', 'HX-Current-URL': location.href };
    const got = await fetch('/list?count=' + count, { headers });
    const html = await got.text();
    if (got.ok && !$('form', list)) {
      edition = got.headers.get('x-edition');
      leaf = got.headers.get('x-leaf');
      if (!wanted) list.dataset.edition = edition;
      renew(document.createRange().createContextualFragment(html));
      if (were.rows) settle();
      catchUp();
    }
  } catch { /* the socket tells when Parley is back */ }
  listing = false;
  if (wanted && list.dataset.edition !== wanted) relist(); // there was more news meanwhile
}

// What was said or chosen on another page comes in here, too, but never beside an answer to what is done here.
let leaf = null, behind = null;
const busy = () => Boolean($('form.htmx-request, .edit'));
function catchUp() {
  const after = $('#after')?.value;
  if (leaf === null || leaf === after || busy() || !location.pathname.startsWith('/c/')) return;
  if (!leaf) return notice('This conversation was deleted.');
  [leaf, behind] = [null, after];
  htmx.ajax('GET', `${location.pathname}?after=${after}`, { source: messages, swap: 'none' });
}
on('htmx:beforeSwap', e => {
  if (e.detail.requestConfig.elt !== messages || !busy() && behind === $('#after').value) return;
  [e.detail.shouldSwap, leaf] = [false, 'unknown'];
});
on('htmx:afterRequest', e => {
  const reply = $$('.message').at(-1);
  if (e.target !== messages) return catchUp();
  if (e.detail.xhr.status !== 200) return;
  if (reply.dataset.status !== 'streaming') over(reply);
  if (box.value) later(); // what was sent there has taken the place of this draft
});
function renew(fresh) {
  const old = new Map($$('li', list).map(li => [li.outerHTML, li])), at = document.activeElement;
  const link = list.contains(at) && `[href="${at.getAttribute('href')}"]`;
  const wanted = [...fresh.children].map(li => old.get(li.outerHTML) || li), kept = new Set(wanted);
  remove([...list.children].filter(li => !kept.has(li)));
  wanted.forEach((li, n) => { if (list.children[n] !== li) list.insertBefore(li, list.children[n] || null); });
  htmx.process(list);
  const title = $('[aria-current] > span', list)?.textContent, heading = $('#heading h1');
  if (title && heading) document.title = document.title.replace(heading.textContent, () => heading.textContent = title);
  if (title && heading) $('#heading .more').ariaLabel = 'Actions for ' + title;
  if (link && document.activeElement !== at) $(link, list)?.focus();
}
function seen() {
  const { dataset } = $('#heading');
  if (document.hidden || !('unread' in dataset) || $('.message[data-status=streaming]')) return;
  delete dataset.unread;
  fetch(location.pathname + '/seen', { method: 'POST' });
}

// What can be done with a conversation: a menu beside the button that asks for it; its title becomes a field in place.
async function offer(control) {
  await htmx.ajax('GET', control.href, { target: menu, swap: 'innerHTML', source: menu });
  menu.showPopover({ source: control });
  const { left, bottom } = control.getBoundingClientRect();
  menu.style.left = Math.max(8, Math.min(left, innerWidth - menu.offsetWidth - 8)) + 'px';
  menu.style.top = Math.max(8, Math.min(bottom, innerHeight - menu.offsetHeight - 8)) + 'px';
  menu.place = control.closest('#heading') ? 'heading' : 'list';
  $('[data-rename]', menu).focus();
}
menu.addEventListener('click', e => { if (e.target.closest('button, a')) menu.hidePopover(); });
function rename(id) {
  const form = $('form.rename', menu), field = $('input', form);
  const title = menu.place === 'heading' ? $('#heading h1') : document.getElementById('c-' + id);
  if (!title) return;
  const home = () => menu.place === 'heading' ? $('#heading .more') : title; // the heading may be another by then
  const before = field.value, back = words => {
    if (form.left) return; // to leave the page takes its focus, which would be another call
    form.left = true;
    ($('span', title) || title).textContent = words;
    form.replaceWith(title);
    relist();
  };
  title.replaceWith(form);
  field.select();
  form.addEventListener('keydown', e => {
    if (e.key !== 'Escape') return;
    e.stopPropagation();
    back(before);
    home().focus();
  });
  form.addEventListener('focusout', e => form.contains(e.relatedTarget) || field.value !== before || back(before));
  form.addEventListener('htmx:afterRequest', e => {
    if (!e.detail.successful) return;
    back(field.value);
    home().focus();
  });
}
on('htmx:beforeSwap', e => { // the panel lies over the notice
  const { target, requestConfig } = e.detail;
  if (target.id === 'notice' && requestConfig.elt.closest('#panel:popover-open')) e.detail.target = $('#chosen');
});
on('htmx:oobBeforeSwap', e => { // what is being set here stays, whatever is set on another page
  const being = '#panel:is(:popover-open, :has(.htmx-request)) #fields:has([hx-post^="/c/"])';
  if (e.detail.target.matches(being)) e.detail.shouldSwap = false;
});
on('htmx:beforeRequest', e => { // a field that an answer has replaced meanwhile was taken along with the question
  if (e.detail.pathInfo.requestPath.endsWith('/choices')) e.target.addEventListener('htmx:beforeOnLoad', late => {
    if (!e.target.isConnected && late.detail.xhr.status < 400) late.preventDefault();
  }, { once: true });
});
on('htmx:oobAfterSwap', e => { // what is said of a setting stands in its panel, unless that was closed meanwhile
  const { id, textContent } = e.detail.target;
  if (id === 'chosen' && textContent && !$('#panel:popover-open')) notice(textContent);
});
on('htmx:oobAfterSwap', e => {
  if (e.detail.target.id !== 'undo' || !$('#undo button')) return;
  $('#sidebar:popover-open')?.hidePopover(); // on a phone it would hide the way back
  $('#undo button').focus();
});

// The composer: empties only when the server has the message. What is typed is kept there too, soon after each letter.
const composer = $('#composer'), box = $('#message');
let sent = null, unsaved = 0, saving = false, refused = false;
const sized = CSS.supports('field-sizing: content');
const grow = (area = box) => { if (!sized) area.rows = Math.min(12, area.value.split('\n').length); };
const write = text => { box.value = text; grow(); };
const draft = () => new URLSearchParams({ message: box.value, key: $('#key').value,
  conversation: (composer.getAttribute('action') || location.pathname).match(/^\/c\/([^/]+)/)?.[1] || '' });
async function save() {
  const text = box.value;
  saving = true;
  const got = await fetch('/draft', { method: 'POST', body: draft() }).catch(() => null);
  saving = false;
  unsaved = 0;
  if (text !== box.value) later();
  else if (!(got?.status < 500)) later(5000);
  refused = got?.status >= 400;
  if (got?.status === 401) location.reload(); // with what is typed: it is there again after the login
}
function later(wait = 600) { if (!saving) unsaved ||= setTimeout(save, wait); }
addEventListener('pagehide', () => { // a reload may come back before this has arrived: it finds the text in the tab
  if (!unsaved && !refused) return;
  navigator.sendBeacon('/draft', draft()); // what is being sent, too: if it arrives, this is none any more
  if (!sent) sessionStorage.setItem('draft:' + location.pathname, box.value);
});
const drafted = 'draft:' + location.pathname; // the first releases kept it in the browser, under the same name
const kept = sessionStorage.getItem(drafted) ?? (box.value ? null : localStorage.getItem(drafted));
sessionStorage.removeItem(drafted);
if (kept !== null && !$('#notice').textContent) { write(kept); later(); localStorage.removeItem(drafted); }
on('input', e => {
  if (!e.target.matches('#message, .edit textarea')) return;
  grow(e.target);
  if (e.target === box) later(); else sessionStorage.setItem(edited(e.target), e.target.value);
});
const edited = area => 'edit:' + area.form.getAttribute('action'); // kept in its tab until it is sent, also by Esc
on('htmx:load', e => {
  const area = $('.edit textarea', e.target), text = area && sessionStorage.getItem(edited(area));
  if (text) { area.value = text; grow(area); }
});
on('htmx:afterRequest', e => {
  const area = e.detail.successful && $('.edit textarea', e.detail.requestConfig.elt);
  if (area) sessionStorage.removeItem(edited(area));
});
on('keydown', e => {
  if (e.isComposing || e.keyCode === 229 || !e.target.matches('#message, .edit textarea')) return;
  if (e.key === 'ArrowUp' && !box.value && e.target === box) recall(e);
  if (e.key !== 'Enter' || e.shiftKey) return;
  e.preventDefault();
  if (e.target.value.trim() || $('.chip', e.target.form)) e.target.form.requestSubmit();
});
async function recall(e) {
  const link = $$('[data-role=user] .copy').at(-1);
  if (!link) return;
  e.preventDefault();
  const text = new TextDecoder().decode(await written(link));
  if (!box.value) write(text);
}
on('htmx:beforeRequest', e => {
  const text = $('#message, .edit textarea', e.target)?.value, chips = $$('.chip', e.target);
  if (text !== undefined && !text.trim() && !chips.length) return e.preventDefault();
  if (e.target === composer && (waiting = Boolean($('progress', files)))) {
    notice('It is sent as soon as its files are here.');
    return e.preventDefault();
  }
  if (e.target.matches('form')) notice('');
  if (e.target === composer) { sent = { text, chips }; $('#undo').replaceChildren(); }
  if (text !== undefined) pinned = true;
  if (e.target.matches('.walk')) pinned = false;
});
on('htmx:beforeSwap', e => { // a change of branch is answered by all that follows: it takes the place of what did
  const { target, requestConfig } = e.detail;
  if (!target.matches('.message') || requestConfig.verb !== 'post') return;
  remove($$(`#${target.id} ~ .message`));
});
composer.addEventListener('htmx:afterRequest', e => {
  if (e.detail.xhr.status < 200 || e.detail.xhr.status >= 300) {
    sent = null;
    refused ||= e.detail.xhr.status === 401; // htmx goes to the login
    return;
  }
  emptied();
  const reply = $$('.message').at(-1);
  if (reply && reply.dataset.status !== 'streaming') over(reply); // it was over before it could be shown
});
composer.addEventListener('htmx:sendError',
  () => notice('Not sent: Parley can not be reached. Your text is still here.'));
function emptied() {
  if (!sent) return;
  write(box.value.startsWith(sent.text) ? box.value.slice(sent.text.length) : box.value);
  remove(sent.chips);
  sent = null;
  if (box.value) later();
  toEnd();
}

// Files: each goes up as soon as it is chosen, pasted or dropped, and is a chip from then on. An image is scaled down
// to what every model looks at: https://platform.claude.com/docs/en/build-with-claude/vision
const files = $('#files'), upload = $('#upload'), EDGE = 1568;
let waiting = false, inside = 0, refusals = [];
upload.name = '';
async function scaled(file) {
  const image = /^image\/(png|jpeg|webp)$/.test(file.type) && await createImageBitmap(file).catch(() => null);
  const scale = image ? EDGE / Math.max(image.width, image.height) : 1;
  if (scale >= 1) return file;
  const [width, height] = [image.width, image.height].map(side => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext('2d').drawImage(image, 0, 0, width, height);
  const blob = await canvas.convertToBlob({ type: file.type, quality: 0.9 });
  return blob.type === file.type ? blob : file;
}
async function attach(file) {
  const chip = $('#coming').content.firstElementChild.cloneNode(true), form = new FormData();
  const asked = new XMLHttpRequest();
  $('.called', chip).textContent = $('progress', chip).ariaLabel = file.name;
  chip.asked = asked;
  files.append(chip);
  form.append('upload', await scaled(file), file.name);
  if (!chip.isConnected) return;
  asked.upload.onprogress = e => { $('progress', chip).value = e.loaded / e.total; };
  asked.onloadend = () => {
    if (!chip.isConnected) return;
    if (asked.status === 200) chip.outerHTML = asked.responseText; else chip.remove();
    if (asked.status === 200) announce(`${file.name} is attached.`);
    else { // the message waits: without its file it would not be what was meant
      waiting = false;
      refusals.push(asked.responseText || `“${file.name}” was not sent: Parley can not be reached.`);
      notice(refusals.join(' '));
    }
    if (waiting && !$('progress', files)) { waiting = false; composer.requestSubmit($('.send')); }
  };
  asked.open('POST', '/files');
  asked.setRequestHeader('HX-Request', 'true');
  asked.send(form);
}
// What is attached and not sent survives a reload of its tab, as ids that the server turns into chips again.
let drawer = 'files:' + location.pathname;
const ids = JSON.parse(sessionStorage.getItem(drawer)) || [];
if (ids.length && !files.children.length)
  htmx.ajax('POST', '/files', { source: '#files', target: '#files', swap: 'beforeend', values: { file: ids } });
new MutationObserver(() => {
  sessionStorage.removeItem(drawer);
  drawer = 'files:' + location.pathname;
  sessionStorage.setItem(drawer, JSON.stringify($$('[name=file]', files).map(input => input.value)));
}).observe(files, { childList: true });
const attachAll = list => { notice(''); refusals = []; for (const file of list) attach(file); };
upload.addEventListener('change', () => { attachAll([...upload.files]); upload.value = ''; });
on('paste', e => {
  if (!e.clipboardData.files.length || e.clipboardData.types.includes('text/plain')) return;
  e.preventDefault();
  attachAll(e.clipboardData.files);
});
const dropping = by => { inside = by && Math.max(0, inside + by); document.body.classList.toggle('dropping', inside); };
const carries = e => e.dataTransfer?.types.includes('Files');
on('dragenter', e => { if (carries(e)) dropping(1); });
on('dragleave', e => { if (carries(e)) dropping(-1); });
on('dragover', e => { if (carries(e)) e.preventDefault(); });
on('drop', e => {
  dropping(0);
  if (!carries(e)) return;
  e.preventDefault();
  attachAll(e.dataTransfer.files);
});

// The palette: what the sidebar lists and every control that names its action, found by words at once; then, from the
// server, titles and messages.
const query = $('#query'), choices = $('#choices'), picked = () => $('[aria-selected=true]', choices);
const bare = text => text.normalize('NFD').replace(/\p{M}/gu, '').toLowerCase();
const usable = el => !el.matches('.stop, .retry *, #jump') || el.checkVisibility();
function show(id) {
  if ($('dialog[open]')) return;
  $('#' + id).showModal();
  if (id === 'palette') find(query.value = '');
}
function find() {
  const words = bare(query.value).split(/\s+/), hits = query.value.trim() ? $$('.hit', choices) : [];
  const all = [...$$('#conversations a[id]').map(el => [el, $('span', el).textContent, 'Conversation']),
    ...$$('[data-action]').filter(usable).map(el => [el, el.dataset.action, 'Action'])];
  const found = all.filter(([, name]) => words.every(word => bare(name).includes(word)));
  choices.replaceChildren(...found.map(([el, name, kind], n) => {
    const option = document.createElement('li');
    option.dataset.kind = kind;
    if (el.pathname) option.dataset.at = el.pathname;
    return Object.assign(option, { id: 'choice-' + n, role: 'option', textContent: name, act: () => el.click() });
  }), ...hits);
  pick(choices.firstChild);
}
on('htmx:beforeSwap', e => { if (e.detail.target === choices) remove($$('.hit', choices)); });
on('htmx:afterSwap', e => {
  if (e.detail.target !== choices) return;
  const listed = new Set($$('[data-at]', choices).map(option => option.dataset.at));
  if (!query.value.trim() || !$('#palette').open) remove($$('.hit', choices));
  remove($$('.hit:not([data-message])', choices).filter(hit => listed.has(hit.dataset.to)));
  if (!picked()) pick(choices.firstChild);
  announce(choices.children.length + ' found');
});
function land({ to, message }) {
  if (!message) return location.assign(to);
  const form = document.createElement('form'), field = document.createElement('input');
  form.append(Object.assign(field, { name: 'message', value: message }));
  document.body.append(Object.assign(form, { method: 'post', action: to, hidden: true }));
  form.submit();
}
function pick(option) {
  for (const each of choices.children) each.ariaSelected = each === option;
  query.setAttribute('aria-activedescendant', option?.id || '');
  option?.scrollIntoView({ block: 'nearest' });
}
function choose(option) {
  $('#palette').close();
  if (!option) return;
  option.act ? option.act() : land(option.dataset);
}
query.addEventListener('input', find);
query.addEventListener('keydown', e => {
  if (e.isComposing || !['ArrowDown', 'ArrowUp', 'Enter'].includes(e.key)) return;
  e.preventDefault();
  if (e.key === 'Enter') choose(picked());
  else if (e.key === 'ArrowDown') pick(picked()?.nextSibling || choices.firstChild);
  else pick(picked()?.previousSibling || choices.lastChild);
});
choices.addEventListener('click', e => choose(e.target.closest('li')));

// Keys. Esc closes what is open before it stops a reply; a letter is a key only where nobody writes.
on('keydown', e => {
  if (e.isComposing) return;
  const writing = e.target.matches('input, textarea, [contenteditable]'), open = $('dialog[open], :popover-open');
  if (e.key === 'Enter' && e.target.matches('#panel input')) e.preventDefault(); // it would send the message
  else if (e.key === 'Escape' && e.target.closest('.edit')) $('.cancel', e.target.closest('.edit')).click();
  else if (e.key === 'Escape' && !open) $('#stop')?.requestSubmit();
  else if (e.key === 'Enter' && e.target.matches('.image')) e.target.click();
  else if ((e.ctrlKey || e.metaKey) && e.key.toLowerCase() === 'k') {
    e.preventDefault();
    if ($('#palette').open) $('#palette').close(); else show('palette');
  } else if (!writing && !open && !e.ctrlKey && !e.metaKey && !e.altKey) {
    if (e.key === '/') { e.preventDefault(); box.focus(); }
    if (e.key === '?') show('keys');
  }
});
dress(messages);
if (matchMedia('(pointer: fine)').matches) box.focus({ preventScroll: true });
arrive();
follow();
seen();
'''

ICON = '''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">
<rect width="64" height="64" rx="14" fill="#a3451d"/>
<path fill="none" stroke="#fff" stroke-width="4" stroke-linecap="round" d="M20 22h24M20 32h24M20 42h13"/></svg>'''
NEWS = ICON.replace('</svg>', '<circle cx="50" cy="14" r="13" fill="#e99c75" stroke="#1b1a18" stroke-width="3"/></svg>')
WHOLE = ICON.replace(' rx="14"', '')  # a maskable icon fills its square; the drawing stays in the middle four fifths

def bare(text): return re.sub(r'(?m)^// .*\n| // .*$| */\*.*?\*/', '', text)  # comments are for who reads this file

@functools.cache
def assets() -> dict[str, tuple[str, str, bytes]]:
    "File name → (its URL with a hash of the content, media type, content). htmx comes from the django-htmx package."
    folder = Path(importlib.util.find_spec('django_htmx').submodule_search_locations[0]) / 'static' / 'django_htmx'
    files = {'htmx.js': (folder / 'htmx-2.min.js').read_text(),
             'ws.js': (folder / 'ext' / 'hx-ws-2.min.js').read_text(),
             'parley.js': bare(JS), 'parley.css': bare(CSS), 'icon.svg': ICON, 'news.svg': NEWS, 'whole.svg': WHOLE}
    kinds = {'js': 'text/javascript', 'css': 'text/css', 'svg': 'image/svg+xml',
             'webmanifest': 'application/manifest+json'}

    def made(name, text):
        url = f'/assets/{hashlib.sha256(text.encode()).hexdigest()[:12]}-{name}'
        return url, kinds[name.rpartition('.')[2]], text.encode()
    found = {name: made(name, text) for name, text in files.items()}
    icons = [{'src': found[name][0], 'sizes': 'any', 'type': 'image/svg+xml', 'purpose': purpose}
             for name, purpose in (('icon.svg', 'any'), ('whole.svg', 'maskable'))]
    manifest = {'name': 'Parley', 'id': '/', 'start_url': '/', 'scope': '/', 'display': 'standalone', 'icons': icons,
                'background_color': PAPER['light'], 'theme_color': PAPER['light']}
    return found | {'parley.webmanifest': made('parley.webmanifest', json.dumps(manifest))}

def asset(name): return assets()[name][0]

# %%
if NOTEBOOK:
    print(*(url for url, *_ in assets().values()))

# %% [markdown]
# ## 8 Door
#
# One plain ASGI guard outside everything, the same for pages and sockets: by which name, from which page, signed in or
# not, and how much. Whatever is not on the short list of open paths is closed. Sessions are kept here in memory and
# written through to the Store, so that ending one ends it at once, its sockets included.

# %%
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
          "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; manifest-src 'self'")
UNUSED = ('camera', 'display-capture', 'geolocation', 'microphone', 'midi', 'payment', 'usb')
HEADERS = {b'content-security-policy': POLICY.encode(), b'x-content-type-options': b'nosniff',
           b'referrer-policy': b'no-referrer', b'x-frame-options': b'DENY', b'cache-control': b'no-store',
           b'cross-origin-opener-policy': b'same-origin', b'cross-origin-resource-policy': b'same-origin',
           b'permissions-policy': ', '.join(f'{name}=()' for name in UNUSED).encode()}
# Over plain http from another machine browsers say where a form came from in Origin alone, and say `null` there when
# the policy is no-referrer; same-origin tells other sites no more.
OVER_HTTP, AT_HOME = {b'referrer-policy': b'same-origin'}, r'(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$'
OPEN = re.compile('/login|/healthz|/assets/[^/]+')  # what needs no session; the manifest is one of the assets
TYPED, CARRYING = 'application/x-www-form-urlencoded', 'multipart/form-data'
# And nothing else: a `charset` would choose among all codecs there are, of which some take hours.
FORM = re.compile(rf'''{TYPED}(; ?charset="?utf-8"?)?|{CARRYING}; ?boundary=("?)[\w'()+,./:=?-]{{1,70}}\2''',
                  re.IGNORECASE)
REQUEST = contextvars.ContextVar('the id of the request that is being answered', default=None)
SMALL = 65_536  # bytes that a stranger may send freely

def scrypt(password: bytes, salt: bytes, log_n=15, r=8, p=3) -> str:
    "A password as it may be kept: each guess costs 32 MB and 0.4 s (OWASP's Password Storage Cheat Sheet)."
    digest = hashlib.scrypt(password, salt=salt, n=2**log_n, r=r, p=p, maxmem=2**27, dklen=32)
    return f'scrypt:{log_n}:{r}:{p}:{salt.hex()}:{digest.hex()}'

def fits(password: bytes, kept: str) -> bool:
    log_n, r, p, salt, _ = HASH.fullmatch(kept).groups()
    return hmac.compare_digest(scrypt(password, bytes.fromhex(salt), int(log_n), int(r), int(p)), kept)

def typed_bytes(password: str) -> bytes:
    "The bytes of a password, the same for every way a keyboard makes an accent."
    return unicodedata.normalize('NFC', password.strip()).encode('utf-8', 'replace')

def own_path(path: str) -> str:
    "A path of this app to go on to; anything that could lead elsewhere becomes `/`."
    return path if re.fullmatch(r'/(?![/\\])[!-\[\]-~]*', path) else '/'

def carries(headers) -> bool: return headers.get('content-type', '').lower().startswith(CARRYING)

def path_of(url: str) -> str:
    "The path of an address that a stranger may have sent."
    try: return urlsplit(url).path
    except ValueError: return '/'

class Door:
    "Decides who may come in, bounds what they bring, and puts the headers on every answer."
    def __init__(self, app, settings: Settings, store: Store):
        self.settings, self.store, self.state, self.clock = settings, store, app.state, time.time
        self.app, self.entry = app, self.guard
        if settings.trusted_proxies: self.entry = ProxyHeadersMiddleware(self.guard, settings.trusted_proxies)
        self.names = {'localhost', '127.0.0.1', '[::1]', *settings.allowed_hosts.lower().replace(',', ' ').split()}
        if settings.fly_app_name: self.names.add(f'{settings.fly_app_name}.fly.dev')
        self.secret = (settings.session_secret or store.secret()).encode()
        self.password = self.sign('password', settings.app_password or settings.app_password_hash)
        self.sessions: dict[str, Session] = {}
        self.sockets: dict[asyncio.Timeout, tuple[str, str | None]] = {}  # of which owner, of which session
        self.by_address, self.overall = Pace(settings.logins_per_address, 900), Pace(settings.logins_overall, 60)
        self.one, self.few = asyncio.Semaphore(1), asyncio.Semaphore(2)

    def sign(self, what, text) -> str: return hmac.digest(self.secret, f'{what}:{text}'.encode(), 'sha256').hex()

    async def open(self):
        "Who is signed in already. With another password, or another secret, nobody is."
        for session in await self.store.sessions(): self.sessions[session.id] = session
        await self.end([each for each in self.sessions.values() if each.password != self.password])

    async def __call__(self, scope, receive, send):
        await (self.app if scope['type'] == 'lifespan' else self.entry)(scope, receive, send)

    async def guard(self, scope, receive, send):
        began, status, id, path = time.monotonic(), 0, secrets.token_hex(8), scope['path'][:200]
        REQUEST.set(id)

        async def answer(message):
            nonlocal status
            if message['type'] == 'http.response.start':
                there, mine = {name for name, _ in message['headers']}, HEADERS | {b'x-request-id': id.encode()}
                if self.secure(scope): mine[b'strict-transport-security'] = b'max-age=31536000'
                elif not re.match(AT_HOME, Headers(scope=scope).get('host', '')): mine |= OVER_HTTP
                message['headers'] = [*message['headers'], *[pair for pair in mine.items() if pair[0] not in there]]
            status = message.get('status') or message.get('code') or status
            await send(message)

        try:
            refusal = self.objection(scope)
            if refusal and scope['type'] == 'websocket': await answer({'type': 'websocket.close'})  # becomes a 403
            else: await (refusal or self.admit)(scope, receive, answer)
        except ClientDisconnect: status = 499  # it broke off in the middle of what it sent; nobody is there to answer
        finally:
            log.info('request', extra={'fields': dict(method=scope.get('method', 'SOCKET'), path=path, status=status,
                                                      ms=round(1000 * (time.monotonic() - began)))})

    def objection(self, scope):
        "The one lock: the ASGI app that answers instead of ours, or None. Sets `owner` in the scope."
        headers, path, socket = Headers(scope=scope), scope['path'], scope['type'] == 'websocket'
        if path != '/healthz' and not self.known(headers.getlist('host'), scope):
            return PlainTextResponse('This is not a name of this server: ALLOWED_HOSTS says which are.', 400)
        reads = not socket and scope['method'] in ('GET', 'HEAD')
        if not reads and not self.same(headers, scope): return PlainTextResponse('This came from another site.', 403)
        session = self.session(scope)
        scope['owner'] = session.owner if session else None if self.settings.locked else OWNER
        scope['session_id'] = session and session.id
        length = headers.get('content-length', '0')
        most = 0 if reads or socket else self.most(scope)
        if not length.isdecimal() or int(length[:20]) > most or reads and 'transfer-encoding' in headers:
            return PlainTextResponse(f'More than {most:,} bytes are too much here.', 413)
        if not reads and not socket and not FORM.fullmatch(headers.get('content-type', TYPED)):  # FastHTML parses JSON
            return PlainTextResponse('This is no form that can be read.', 415)
        if scope['owner']:
            crowd = socket and sum(owner == scope['owner'] for owner, _ in self.sockets.values())
            if crowd < self.settings.sockets_per_person: return None  # else the page polls
        return PlainTextResponse('Sign in first.', 403) if socket else self.for_strangers(scope, headers, path, reads)

    def most(self, scope) -> int:
        "How many bytes a request may bring; of somebody who is signed in also files, as far as there is room."
        headers, limits = Headers(scope=scope), self.settings
        most = limits.max_body_bytes + limits.max_files * limits.max_file_bytes
        if scope['path'] == '/import': most = limits.max_import_bytes
        files = carries(headers) and 'content-length' in headers
        if not files or not scope['owner']: return limits.max_body_bytes
        room = shutil.disk_usage(self.store.file.parent).free - limits.min_free_bytes
        return min(most, max(room, limits.max_body_bytes))

    def for_strangers(self, scope, headers, path, reads):
        "Open paths, else the way to the login page: with where one was going, and with what one had typed."
        posts = not reads and scope['method'] == 'POST'
        if OPEN.fullmatch(path): return self.hear_out if posts else None
        place = path_of(headers['hx-current-url']) if 'hx-current-url' in headers else path
        if reads and 'hx-request' not in headers and scope['query_string']:
            place += '?' + scope['query_string'].decode('latin-1')
        if not reads: place = (re.match('/(c/[^/]+)?', place) or '/')[0]
        way = '/login?' + urlencode({'next': own_path(place)})
        if 'hx-request' in headers: return PlainTextResponse('Sign in first.', 401, {'hx-redirect': way})
        if posts: return functools.partial(self.hear_out, path=way)
        if reads and headers.get('sec-fetch-mode', 'navigate') == 'navigate': return RedirectResponse(way, 303)
        return PlainTextResponse('Sign in first.', 401)

    async def hear_out(self, scope, receive, send, path=None):
        "A stranger's form, as one for the login page. Long ones only a few at a time, for they take memory."
        if path: scope |= dict(path='/login', raw_path=b'/login', query_string=path.partition('?')[2].encode())
        long = int(Headers(scope=scope).get('content-length', SMALL + 1)) > SMALL
        if long and self.few.locked():
            return await PlainTextResponse('Sign in first.', 429, {'retry-after': '10'})(scope, receive, send)
        async with self.few if long else contextlib.nullcontext(): await self.admit(scope, receive, send)

    async def admit(self, scope, receive, send):
        "Run the app: a body must come in time, and a socket lives no longer than its session."
        if scope['type'] == 'http':
            if not carries(Headers(scope=scope)):  # else FastHTML would read each form, on the loop and at any cost
                scope['headers'] = [pair for pair in scope['headers'] if pair[0] != b'content-type']
            most, until = self.most(scope), time.monotonic() + self.settings.body_seconds

            async def in_time():
                late = self.settings.body_seconds if most > self.settings.max_body_bytes else until - time.monotonic()
                try:
                    async with asyncio.timeout(late): return await receive()  # a file may take long, if it keeps coming
                except TimeoutError: raise Refused(408, 'This took too long to arrive. Send it again.') from None
            return await RequestBodyLimitMiddleware(self.app, most)(scope, in_time, send)
        session = self.sessions.get(scope['session_id'])
        try:
            async with asyncio.timeout(session and self.left(session)) as until:
                self.sockets[until] = scope['owner'], scope['session_id']
                await self.app(scope, receive, send)
        except TimeoutError:
            if not until.expired(): raise
            await send({'type': 'websocket.close', 'code': 4401})
        finally: self.sockets.pop(until, None)

    def secure(self, scope) -> bool: return scope['scheme'] in ('https', 'wss') or bool(self.settings.fly_app_name)
    def cookie(self, scope): return f'{"__Host-" if self.secure(scope) else ""}parley-{self.settings.port}'

    def known(self, hosts, scope) -> bool:
        "A name we go by, against DNS rebinding; where we listen to others, also the address that was reached."
        name = re.sub(r':\d+$', '', hosts[0].lower()) if len(hosts) == 1 else ''
        return name in self.names or not self.settings.at_home and name.strip('[]') == (scope['server'] or '?')[0]

    def same(self, headers, scope) -> bool:
        "Whether a page of our own sent this: browsers say so in Sec-Fetch-Site or in Origin, sockets in Origin."
        if scope['type'] == 'http' and 'sec-fetch-site' in headers: return headers['sec-fetch-site'] == 'same-origin'
        schemes = ('https',) if self.secure(scope) else ('http', 'https')  # a proxy may speak https for us
        return headers.getlist('origin') in [[f'{scheme}://{headers.get("host")}'] for scheme in schemes]

    def session(self, scope) -> Session | None:
        "The session that a cookie names. That it was seen is written now and then, in the background."
        token = HTTPConnection(scope).cookies.get(self.cookie(scope), '')
        session = self.sessions.get(self.sign('session', token))
        if not session or self.left(session) <= 0: return None
        if abs(self.clock() - session.seen) > min(600, self.settings.session_idle_days * DAY / 10):
            session.seen = self.clock()
            self.saving = asyncio.create_task(self.save(session))
        return session

    def left(self, session) -> float:
        "Seconds until a session ends by itself. A clock that went back ends none."
        age, unseen = (max(0.0, self.clock() - since) for since in (session.created, session.seen))
        return min(self.settings.session_days * DAY - age, self.settings.session_idle_days * DAY - unseen)

    async def save(self, session):
        if session.id not in self.sessions: return  # it has just been ended
        with contextlib.suppress(Unusable): await self.store.keep_session(session)  # else it ends with the process

    async def enter(self, conn: HTTPConnection, password: str) -> str:
        "What the cookie of a new session says. Raises `Refused` 401 wrong, 429 too often."
        fly = conn.headers.get('fly-client-ip') if self.settings.fly_app_name else None
        tries = [(self.by_address, fly or conn.client.host), (self.overall, '')]
        if any(pace.wait(key) for pace, key in tries):
            raise Refused(429, 'There were too many attempts. Wait a little, then try again.', retry_after=60)
        for pace, key in tries: pace.take(key)  # at once, so that many at the same time count, too
        if not await self.right(password):
            log.warning('a wrong password', extra={'fields': {'address': tries[0][1][:64]}})
            raise Refused(401, 'That is not the password.')
        for pace, key in tries: pace.give_back(key)
        token, now = secrets.token_urlsafe(32), self.clock()
        session = Session(self.sign('session', token), OWNER, self.password, now, now)
        mine = sorted(self.sessions.values(), key=lambda each: each.created)
        with contextlib.suppress(Unusable):
            await self.end([each for each in mine if self.left(each) <= 0 or each.id == conn.scope['session_id']]
                           + mine[:-100])
        self.sessions[session.id] = session
        await self.save(session)
        return token

    async def right(self, password: str) -> bool:
        "Whether this is the password. Work that costs is done in a thread, one at a time."
        given = typed_bytes(password[:LOUDEST + 1])
        if len(given) > LOUDEST: return False
        if self.settings.app_password:
            known = typed_bytes(self.settings.app_password)
            return hmac.compare_digest(self.sign('given', given), self.sign('given', known))
        if not self.settings.app_password_hash: return False
        async with self.one: return await asyncio.to_thread(fits, given, self.settings.app_password_hash)

    async def leave(self, scope, everywhere: bool):
        "Sign out here, or this person everywhere."
        await self.end([each for each in self.sessions.values() if each.id == scope['session_id']
                        or everywhere and each.owner == scope['owner']])

    async def end(self, sessions: list[Session]):
        "End sessions and their sockets, at once; then on the disk. Raises `Unusable`."
        ids = [session.id for session in sessions]
        for id in ids: self.sessions.pop(id, None)
        for until, (_, id) in list(self.sockets.items()):
            if id in ids: until.reschedule(0)
        if ids: await self.store.end_sessions(ids)

# %%
if NOTEBOOK:
    print(own_path('/c/abc'), own_path('//evil.example'), fits(b'open sesame', scrypt(b'open sesame', bytes(16))))

# %% [markdown]
# ## 9 Pages
#
# Look up, act, answer: a handler returns exactly what changed on the page, or a page to a browser that asked for one.

# %%
rt = APIRouter()

@dataclass
class Parley:
    "All state of a running app, as `app.state.parley`."
    settings: Settings
    store: Store
    claude: Claude
    turns: Turns
    shelf: Shelf
    door: Door
    check: asyncio.Task | None = None  # the write of /healthz that is under way
    imports: dict[str, Import] = field(default_factory=dict)  # the last one of each owner
    sending: set = field(default_factory=set)  # who is being sent what, of what is sent once at a time

def parley(conn) -> Parley: return conn.app.state.parley
def owner(conn) -> str: return conn.scope['owner']
def by_htmx(req): return 'hx-request' in req.headers and 'hx-history-restore-request' not in req.headers

BARE = re.compile(b'%(?![0-9A-Fa-f]{2})')  # a sign that escapes nothing stands for itself

def read_form(body: bytes, most: int) -> list[tuple[str, str]]:
    """The fields of a form of plain letters. The usual way makes objects of 200 bytes for each `%`; here the one of
    e-mail does it, with `=` for `%`. Raises `Refused` 413 more than `most` fields, 422 no UTF-8."""
    def read(quoted):
        quoted = BARE.sub(b'%25', quoted.replace(b'+', b' ')).replace(b'=', b'%3D')
        return binascii.a2b_qp(quoted.replace(b'%', b'=')).decode()
    pairs = [pair.partition(b'=') for pair in body.split(b'&', most) if pair]
    if len(pairs) > most: raise Refused(413, 'This form has too many fields.')
    if next(islice(BARE.finditer(body), 1_000, None), None): raise Refused(422, 'This is no form that can be read.')
    try: return [(read(name), read(value)) for name, _, value in pairs]
    except ValueError: raise Refused(422, 'This is not text that can be read (UTF-8).') from None

async def fields_of(req: Request) -> list[tuple[str, str | UploadFile]]:
    "The fields of a posted form in their order. Raises `Refused` 422 what is no text, 413 too many."
    if carries(req.headers): return (await req.form()).multi_items()
    if not hasattr(req.state, 'fields'):
        body, most = await req.body(), 20 + parley(req).settings.max_files + parley(req).settings.max_servers
        small = len(body) <= SMALL
        req.state.fields = read_form(body, most) if small else await asyncio.to_thread(read_form, body, most)
    return req.state.fields

async def form_of(req: Request) -> dict[str, str]:
    """The texts of a posted form, read from the body itself: FastHTML's injected parameters can be overridden by a
    cookie or a header of the same name. Raises `Refused` as `fields_of` does, 413 a long field."""
    form = {name: value for name, value in await fields_of(req) if isinstance(value, str)}
    most = parley(req).settings.max_field_chars
    if all(len(form[name]) <= most for name in form.keys() - {'message', 'system', 'shown'}): return form
    raise Refused(413, 'A field of this form is too long.', form.get('message', ''))

async def files_of(req: Request) -> list[dict]:
    """The files that a form brings or names, as blocks; also at `req.state.files`, even if some are refused.
    Raises `Refused` as `Turns.attach` does, 422 when one is not here, 413 for too many."""
    fields, here, most, refusals = await fields_of(req), parley(req), parley(req).settings.max_files, []
    names = [value.partition(' ')[::2] for name, value in fields if name == 'file' and isinstance(value, str)]
    names = names[:most + 1]
    found = [file | {'name': file_name(file['name'])} for file in await here.store.named(owner(req), names)]
    if len(found) < len(names): refusals.append(Refused(422, 'A file is not here any more: attach it again.'))
    for part in [value for name, value in fields if name == 'upload'][:most + 1]:
        if isinstance(part, str) or not part.filename and not part.size: continue
        name = (part.filename or '').replace('%22', '"')  # as browsers write it in the head of a part
        try: found.append(await here.turns.attach(owner(req), name, await part.read()))
        except Refused as no: refusals.append(no)
    req.state.files = found[:most]
    if len(found) > most: refusals.append(Refused(413, f'{most} files can go with one message.'))
    if refusals:
        raise Refused(refusals[0].status, ' '.join(no.words for no in refusals), retry_after=refusals[0].retry_after)
    return found

async def bubble(req, message, make=Reply):
    "The bubble of a message as it is now, running or not."
    turn = message.status == RUNNING and parley(req).turns.find(message)
    if turn:
        live = LiveReply.of(turn)
        return make(message, *await live.now(live.look))
    if message.status == RUNNING:  # it has ended since it was read
        message = await parley(req).store.message(owner(req), message.conversation, message.idx, message.id)
    return make(message, await parley(req).shelf.content(message))

async def transcript(req, path, edit=None):
    return Transcript(path, [Editor(m) if str(m.id) == edit and m.role == 'user' else await bubble(req, m)
                             for m in path])

LOOKS = {'theme': ('auto', 'light', 'dark'), 'sidebar': ('open', 'closed')}  # the first of each is the default

def look_of(req):
    "How this browser wants its pages, from its cookies; `here`, to come back to after a change; `locked`: has a login."
    said = {name: req.cookies.get(name) for name in LOOKS}
    looks = {name: said[name] if said[name] in known else known[0] for name, known in LOOKS.items()}
    return looks | {'here': home_of(req), 'locked': parley(req).settings.locked, 'zone': zone_of(req),
                    'edition': edition(req)}

def home_of(req):
    "The page that an address is of, also of a form that was answered with a page: the conversation's, or the first."
    return re.sub(r'^(/c/[^/]+)/.*|^/choices$', r'\1', req.url.path) or '/'

def again_of(req):
    "The address that shows this page once more. It is named because a browser goes nowhere from `…#msg-0` to itself."
    return f'{req.url.path}?{req.url.query}'.rstrip('?') if req.method == 'GET' else home_of(req)

def zone_of(conn):
    "This browser's time zone in minutes east of Greenwich, as its script said."
    said = re.fullmatch(r'-?\d{1,3}', conn.cookies.get('zone', ''))
    return int(said[0]) if said else 0

def edition(conn):
    "What the list shows is as it was as long as this is; the day of the reader is a part of it."
    zone = zone_of(conn)
    return f'{parley(conn).turns.lists[owner(conn) or OWNER].edition}.{zone}.{int(time.time() + 60 * zone) // DAY}'

async def page(req, title='Parley', *content, status=200, conversation=None, **more):
    store, look, demo = parley(req).store, look_of(req), parley(req).settings.demo  # the edition never younger than
    conversations = await store.conversations(owner(req))                           # what is listed
    typed = await store.draft(owner(req), conversation.id if conversation else '')
    return FtResponse(Page(title, conversations, *content, look=look, demo=demo, conversation=conversation,
                           **{'typed': typed} | more), status)

async def sent(req, question, reply):
    "Answer a send: the two bubbles as a fragment, or the way to the conversation."
    place = show.to(conversation_id=reply.conversation)
    if not by_htmx(req): return RedirectResponse(place, 303)
    return (await bubble(req, question), await bubble(req, reply), *await following(req, reply))

async def following(req, message):
    "What a page goes on with behind a message: a key, the message, and the settings, which another may have changed."
    conversation, _ = await parley(req).store.path(owner(req), message.conversation, ENDLESS)
    setup = await setup_of(req, conversation.id, conversation.choices)
    return (Key(hx_swap_oob='true'), After(message.id, hx_swap_oob='true'), Fields(setup, hx_swap_oob='true'),
            Opener(setup, hx_swap_oob='true'))

async def branch(req, conversation, idx):
    "Answer a change of branch: the path from depth `idx` on in place of what was there, or the page at that message."
    if not by_htmx(req):
        return RedirectResponse(f'{show.to(conversation_id=conversation)}?from={idx}#msg-{idx}', 303)
    _, path = await parley(req).store.path(owner(req), conversation, idx)
    return (*[await bubble(req, m) for m in path], *await following(req, path[-1]))

async def setup_of(req, conversation=None, choices=None, said='') -> Setup:
    "What is and what can be chosen for a conversation, or for one that has not begun."
    here = parley(req)
    if choices is None: choices = await here.turns.first_choices(owner(req))
    model = here.claude.model_of(choices)
    held, longest = here.claude.valid(choices, choices), here.claude.longest(model)
    if not 0 < (most := held.get('max_tokens', longest)) <= longest:
        said += f' An answer may have 1 to {longest:,} tokens.'
    elif held.get('thinking') == 'on' and most <= LEAST_THINKING:
        said += f' {model.name} only thinks where an answer may have more than {LEAST_THINKING:,} tokens.'
    models = list((here.claude.models | {model.id: model}).values())
    return Setup(conversation, choices, model, models, {m.id: here.claude.rates(m.id) for m in models},
                 here.claude.nearest(model), await here.store.prompts(owner(req)), await here.store.servers(owner(req)),
                 longest, here.settings.max_system_chars, said.strip())

@rt.get('/')
async def home(req):
    setup = await setup_of(req)
    return await page(req, 'Parley', Empty(setup.model), setup=setup, undo=req.query_params.get('deleted', '')[:40])

def told(req, place, *fragments):
    "Answer what changed the list: every page of this person hears of it; a browser without a script goes to `place`."
    parley(req).turns.lists[owner(req)].tell()
    if not by_htmx(req): return RedirectResponse(place, 303)
    return fragments or Response(status_code=204)

def standing(req): return path_of(req.headers.get('hx-current-url', ''))  # the page that asks

@rt.get('/list')
async def listed(req):
    """A page of the list after another, or its first `count` rows anew, with the end of the path of the conversation
    that is open. Without a script, a page that has it."""
    asked, after = req.query_params, None
    with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
        pinned, updated, id = json.loads(asked.get('after', ''))
        if 0 <= float(updated) < LAST_DAY:
            after = pinned if pinned is None else float(pinned), float(updated), unbroken(str(id))
    count = asked.get('count', '')
    limit = max(50, min(500, int(count))) if re.fullmatch(r'\d{1,6}', count) else 50
    now = edition(req)
    found = await parley(req).store.conversations(owner(req), after, limit + 1)
    current, leaf = standing(req).removeprefix('/c/'), ''
    items = ListItems(found, look_of(req), current, after, limit)
    with contextlib.suppress(Refused): leaf = (await parley(req).store.path(owner(req), current, ENDLESS))[0].leaf
    if by_htmx(req): return (*filter(None, items), HttpHeader('x-edition', now),
                             *[HttpHeader('x-leaf', str(leaf))] * standing(req).startswith('/c/'))
    return await page(req, 'Conversations', Div(Ul(*items), id='empty', cls='listing'), to='/')

@rt.get('/actions/{conversation_id}')
async def actions(req, conversation_id: str):
    conversation, _ = await parley(req).store.path(owner(req), conversation_id, ENDLESS)
    here = standing(req) == show.to(conversation_id=conversation_id)
    menu = Menu(conversation, parley(req).settings.max_title_chars, here)
    if by_htmx(req): return menu
    return await page(req, conversation.title, Div(H2(conversation.title), *menu, id='empty', cls='listing'), to='/')

@rt.post('/c/{conversation_id}/seen')
async def seen(req, conversation_id: str):
    if await parley(req).store.see(owner(req), conversation_id): parley(req).turns.lists[owner(req)].tell()
    return Response(status_code=204)

@rt.post('/c/{conversation_id}/pin')
async def pin(req, conversation_id: str):
    await parley(req).store.pin(owner(req), conversation_id, bool((await form_of(req)).get('pinned')))
    return told(req, show.to(conversation_id=conversation_id))

@rt.post('/c/{conversation_id}/rename')
async def rename(req, conversation_id: str):
    conversation = await parley(req).store.rename(owner(req), conversation_id, (await form_of(req)).get('title', ''))
    place = show.to(conversation_id=conversation_id)
    return told(req, place, *[Title(conversation.title), Heading(conversation, hx_swap_oob='true')]
                * (standing(req) == place))

@rt.post('/c/{conversation_id}/delete')
async def delete(req, conversation_id: str): return await deleted(req, conversation_id)

@rt.post('/trash/all')
async def delete_all(req): return await deleted(req)

async def deleted(req, conversation=None):
    since = repr(await parley(req).turns.trash(owner(req), conversation))
    here, gone = standing(req), show.to(conversation_id=conversation)
    place = f'{"/trash" if here == "/trash" else "/"}?{urlencode({"deleted": since})}'
    if not conversation or here in (gone, '/trash'): return told(req, place, HtmxResponseHeaders(redirect=place))
    return told(req, place, Undo(since, hx_swap_oob='true'))

@rt.post('/c/{conversation_id}/restore')
async def restore(req, conversation_id: str): return await restored(req, conversation_id)

@rt.post('/trash/restore')
async def undelete(req): return await restored(req)

async def restored(req, conversation=None):
    "Back from the trash to the list; from the first page one goes on to what is back."
    back = await parley(req).store.restore(owner(req), conversation, None if conversation else await since_of(req))
    if conversation and not back: await parley(req).store.path(owner(req), conversation, ENDLESS)  # else a 404
    place, here = show.to(conversation_id=back[0]) if len(back) == 1 else '/', standing(req)
    if here in ('/', '/trash'): return told(req, place, HtmxResponseHeaders(redirect=place if here == '/' else here))
    return told(req, place, Undo(hx_swap_oob='true'))

async def since_of(req):
    try: return float((await form_of(req)).get('since', ''))
    except ValueError: raise Refused(422, 'This is no time.') from None

@rt.get('/trash')
async def trash(req):
    days = parley(req).settings.trash_days
    return await page(req, 'Trash', TrashPage(*await parley(req).store.trashed(owner(req)), days), to='/',
                      undo=req.query_params.get('deleted', '')[:40])

@rt.post('/trash/empty')
async def empty_trash(req): return await given_up(req)

@rt.post('/trash/{conversation_id}/delete')
async def discard(req, conversation_id: str): return await given_up(req, conversation_id)

async def given_up(req, conversation=None):
    await parley(req).store.give_up(owner(req), conversation)
    parley(req).turns.sweep()
    return told(req, trash.to(), HtmxResponseHeaders(redirect=trash.to()))

@rt.post('/')
async def begin(req):
    form, here = await form_of(req), parley(req)
    choices = choices_in(req, form) if 'model' in form else None
    question, reply = await here.turns.ask(owner(req), None, form.get('message', ''), form.get('key') or None, choices,
                                           after=form.get('after'), files=await files_of(req))
    answer = await sent(req, question, reply)  # at once: the bubble is there before its words
    if not by_htmx(req): return answer
    conversation, _ = await parley(req).store.path(owner(req), reply.conversation, reply.idx)
    place = show.to(conversation_id=conversation.id)
    return (*answer, Div(id='empty', hx_swap_oob='delete'), Title(conversation.title),
            Heading(conversation, hx_swap_oob='true'), HtmxResponseHeaders(push_url=place))

@rt.get('/search')
async def search(req):
    typed = req.query_params.get('q', '')[:parley(req).settings.max_field_chars]
    hits = await parley(req).store.search(owner(req), typed)
    if by_htmx(req): return tuple(HitOption(hit, n) for n, hit in enumerate(hits))
    return await page(req, 'Search', Hits(typed, hits), to='/')

@rt.get('/c/{conversation_id}.json')
async def as_json(req, conversation_id: str):
    told = exported(*await parley(req).store.tree(owner(req), conversation_id))
    return Response(await asyncio.to_thread(as_text, told), media_type='application/json')

@rt.get('/c/{conversation_id}.md')
async def as_markdown(req, conversation_id: str):
    conversation, path = await parley(req).store.path(owner(req), conversation_id)
    return PlainTextResponse(as_document(conversation, path), media_type='text/markdown', headers={
        'content-disposition': f'attachment; filename="parley-{conversation.id}.md"'})

SHOWN = 30  # messages on a page; older ones are loaded as the reader scrolls up

def depth(req, name):
    said = req.query_params.get(name, '')
    return int(said) if said.isdecimal() and len(said) < 9 else ENDLESS

@rt.get('/c/{conversation_id}')
async def show(req, conversation_id: str):
    if not by_htmx(req) or 'after' not in req.query_params: return await shown(req, conversation_id)
    return await caught_up(req, conversation_id, req.query_params['after']) or Response(status_code=204)

async def caught_up(req, conversation_id, after):
    "What is missing on a page whose path ends with the message `after`; all of it if another branch is shown now."
    _, path = await parley(req).store.path(owner(req), conversation_id, last=SHOWN)
    ids = [str(m.id) for m in path]
    if ids[-1] == after: return ()
    if after not in ids: new = Div(*await transcript(req, path), hx_swap_oob='innerHTML:#messages')
    else: new = Div(*[await bubble(req, m) for m in path[ids.index(after) + 1:]], hx_swap_oob='beforeend:#messages')
    return new, *await following(req, path[-1])

async def shown(req, conversation_id, **more):
    """The end of a conversation, from `?from=` a depth on if that is more, or what comes before `?before=` a depth;
    `?edit=` is the id of a question to be changed."""
    before, edit = depth(req, 'before'), req.query_params.get('edit')
    conversation, path = await parley(req).store.path(owner(req), conversation_id, before=before, last=SHOWN,
                                                      reach=depth(req, 'from') - 2)
    if by_htmx(req) and before < ENDLESS: return await transcript(req, path)
    later = A('To the end of the conversation', href=req.url.path, cls='quiet') if before < ENDLESS else None
    setup = more.pop('setup', None) or await setup_of(req, conversation.id, conversation.choices)
    again = again_of(req) if path and path[-1].status == RUNNING and not edit else ''
    return await page(req, conversation.title, *await transcript(req, path, edit), later, conversation=conversation,
                      again=again, after=conversation.leaf, setup=setup, **more)

@rt.get('/c/{conversation_id}/{idx}.md')
async def as_written(req, conversation_id: str, idx: int):
    """One message, to the letter; shown as text, not downloaded, so that without a script it can be copied too. `?at=`
    is its id, for a page that shows another branch than the last that was chosen."""
    message = await parley(req).store.message(owner(req), conversation_id, idx, req.query_params.get('at'))
    return PlainTextResponse(message.content)

@rt.get('/c/{conversation_id}/{idx}')
async def fragment(req, conversation_id: str, idx: int):
    "One message by itself, for a bubble that polls. `?at=` as above."
    message = await parley(req).store.message(owner(req), conversation_id, idx, req.query_params.get('at'))
    if not by_htmx(req): return await branch(req, conversation_id, idx)
    return await bubble(req, message, PollingBubble if message.status == RUNNING else Bubble)

@rt.post('/c/{conversation_id}')
async def ask(req, conversation_id: str):
    form, here = await form_of(req), parley(req)
    if 'model' in form and not by_htmx(req): await keep(req, form, conversation_id)  # else each was kept as it changed
    files = await files_of(req)
    try: return await sent(req, *await here.turns.ask(owner(req), conversation_id, form.get('message', ''),
                                                      form.get('key') or None, after=form.get('after'), files=files))
    except Refused as no:
        if no.words != ELSEWHERE or not by_htmx(req): raise
        return FtResponse((Span(no.words), *await caught_up(req, conversation_id, form.get('after'))), 409)

@rt.post('/c/{conversation_id}/edit')
async def edit(req, conversation_id: str):
    "Ask another question in place of `at`, which stays beside it."
    form = await form_of(req)
    files = await files_of(req) if 'upload' in dict(await fields_of(req)) else None
    question, _ = await parley(req).turns.ask(owner(req), conversation_id, form.get('message', ''), files=files,
                                              key=form.get('key') or None, instead=req.query_params.get('at', ''))
    return await branch(req, conversation_id, question.idx)

@rt.post('/c/{conversation_id}/choose')
async def choose_branch(req, conversation_id: str):
    depth = await parley(req).store.switch(owner(req), conversation_id, (await form_of(req)).get('message'))
    parley(req).turns.lists[owner(req)].tell()  # other pages that show it follow
    return await branch(req, conversation_id, depth)

@rt.post('/c/{conversation_id}/fork')
async def fork(req, conversation_id: str):
    copy = await parley(req).turns.fork(owner(req), conversation_id, (await form_of(req)).get('at'))
    return RedirectResponse(show.to(conversation_id=copy), 303)

@rt.post('/files')
async def attach(req): return tuple(map(Chip, await files_of(req)))

@rt.get('/files/{sha}')
async def serve_file(req, sha: str):
    "A file as what its bytes are: an image to look at, anything else to download, and nothing in it runs."
    kind, content = await parley(req).store.content(owner(req), sha)
    return Response(content, media_type=kind, headers={
        'content-disposition': 'inline' if kind in IMAGES else 'attachment', 'cache-control': 'private, max-age=3600',
        'content-security-policy': "sandbox; default-src 'none'"})

@rt.post('/c/{conversation_id}/stop')
async def stop(req, conversation_id: str):
    await parley(req).turns.stop(owner(req), conversation_id)
    place = show.to(conversation_id=conversation_id)
    return Response(status_code=204) if by_htmx(req) else RedirectResponse(place, 303)

@rt.post('/choices')
async def choose_first(req): return await chosen(req)

@rt.post('/c/{conversation_id}/choices')
async def choose(req, conversation_id: str): return await chosen(req, conversation_id)

def choices_in(req, form, before: Mapping = {}) -> dict:
    "What can be chosen of what a form says. Raises `Refused` 413."
    size, limit = len(form.get('system', '')), parley(req).settings.max_system_chars
    if size <= limit: return parley(req).claude.valid(form, before)
    raise Refused(413, f'The system prompt has {size:,} characters; {limit:,} are allowed.', form.get('message', ''))

async def keep(req, form, conversation=None) -> dict:
    """The same, kept for a conversation if there is one. What another page has changed since this one was loaded stays:
    set is only the field that asks, without a script whatever differs from what was shown."""
    if not conversation: return choices_in(req, form)
    by = req.headers.get('hx-trigger-name')
    def change(before):
        shown, now = dict(read_form(form.get('shown', urlencode(marks(before))).encode(), 99)), marks(form)
        changed = [{'instead': 'model', 'prompt': 'system', 'do': 'system'}.get(by, by)] if by else [
            name for name in {**now, **shown} if now.get(name, '0') != shown.get(name, '0')]  # nothing is 0
        return choices_in(req, before | {name: form.get(name, '') for name in changed}, before)
    return await parley(req).store.choose(owner(req), conversation, change)

async def chosen(req, conversation=None):
    "Keep what was chosen for a conversation, or show it for one that has not begun, and do what a button asks beside."
    form, here, me = await form_of(req), parley(req), owner(req)
    do, form['model'] = form.get('do'), form.get('instead') or form.get('model', '')
    if do == 'use':
        form['system'] = next((p.text for p in await here.store.prompts(me) if str(p.id) == form.get('prompt')),
                              form.get('system', ''))
    choices = await keep(req, form, conversation)
    if do == 'keep': await here.store.keep_prompt(me, form.get('prompt_name', '').strip()[:60], choices.get('system'))
    if do == 'drop': await here.store.drop_prompt(me, form.get('prompt'))
    model = here.claude.model_of(choices)
    lost = [name for name, has in (('effort', model.efforts), ('thinking', model.ways))
            if form.get(name, '') not in ('', *has)]
    said = f'{model.name} does not take this {" and ".join(lost)}.' if lost else ''
    if conversation and req.headers.get('hx-trigger-name') in (None, 'model', 'instead'):
        _, path = await here.store.path(me, conversation)
        unread = {(b.get('sha'), b['name']) for m in path if m.role == 'user' for b in m.blocks
                  if b['type'] == 'file' and not model.reads(b['kind'])}
        if unread: said += f' {model.name} can’t read {len(unread)} of the files here.'
    setup = await setup_of(req, conversation, choices, said)
    if by_htmx(req): return Fields(setup), Opener(setup, hx_swap_oob='true'), Said(setup, hx_swap_oob='innerHTML')
    more = {'setup': setup, 'typed': form.get('message', ''), 'notice': setup.said, 'to': home_of(req)}
    return await (shown(req, conversation, **more) if conversation else page(req, 'Parley', Empty(setup.model), **more))

@rt.post('/c/{conversation_id}/retry')
async def retry(req, conversation_id: str):
    form = await form_of(req)
    asked, reply = await parley(req).turns.retry(owner(req), conversation_id, form.get('at'), form.get('key') or None)
    return await branch(req, conversation_id, asked.idx if form.get('at') == str(asked.id) else reply.idx)

@rt.post('/c/{conversation_id}/summary')
async def summarise(req, conversation_id: str):
    key = (await form_of(req)).get('key') or None
    return await sent(req, *await parley(req).turns.ask(owner(req), conversation_id, SUMMARISING, key, summary=True))

@rt.post('/c/{conversation_id}/summary/use')
async def count_summary(req, conversation_id: str):
    form = await form_of(req)
    reply = await parley(req).store.summary(owner(req), conversation_id, form.get('message'),
                                            int(form.get('counts') != '0'))
    return await branch(req, conversation_id, reply.idx)

@rt.post('/draft')
async def keep_draft(req):
    form = await form_of(req)
    said = [form.get(name, '') for name in ('conversation', 'message', 'key')]
    await parley(req).store.keep_draft(owner(req), *said)
    return Response(status_code=204)

@rt.get('/connections')
async def connections(req): return await connected(req)

async def connected(req, status=200, **said):
    shown = Connections(await parley(req).store.servers(owner(req)), **said)
    return await page(req, 'Connections', shown, status=status, to='/')

@rt.post('/connections')
async def connect(req):
    "Keep a server, or drop one. What was typed comes back if that can't be, but not the token."
    form, store = await form_of(req), parley(req).store
    name, url, token = (form.get(name, '').strip() for name in ('name', 'url', 'token'))
    try: await (store.drop_server(owner(req), form['drop']) if 'drop' in form else
                store.keep_server(owner(req), name, url, token))
    except Refused as no: return await connected(req, no.status, said=no.words, name=name, url=url)
    return RedirectResponse(connections.to(), 303)

@rt.get('/data')
async def your_data(req):
    now = parley(req).imports.get(owner(req))
    return await page(req, 'Your data', YourData(now), to='/', again=again_of(req) if now and not now.status else '')

async def download(req, name, chunks):
    "Send something long as it is made, once at a time and to no other site. What fails at once is said in words."
    if req.headers.get('sec-fetch-site', 'none') not in ('none', 'same-origin'): raise Refused(403, 'Ask for it here.')
    who, sending = (owner(req), name), parley(req).sending
    if who in sending: raise Refused(429, 'This is being sent already. Wait until that is done.', retry_after=10)
    async def once():
        sending.add(who)
        try:
            first = await anext(chunks)
            yield b''  # taken below: a generator that has begun comes to its `finally` whatever happens
            yield first
            async for chunk in chunks: yield chunk
        finally: sending.discard(who)
    await anext(stream := once())
    return StreamingResponse(stream, media_type='application/octet-stream', headers={
        'content-disposition': f'attachment; filename="parley-{time.strftime("%Y-%m-%d")}.{name}"',
        'content-encoding': 'identity'})

@rt.get('/export.zip')
async def export(req): return await download(req, 'zip', everything(parley(req).store, owner(req)))

@rt.get('/backup')
async def backup(req):
    "The whole database, without what lets people in: it is one person's for now."
    async def copied(file):
        copy = file.with_name(f'{file.name}.{secrets.token_hex(4)}.part')  # swept up at the next start if we are killed
        spare = parley(req).settings.min_free_bytes
        try: opened = (await asyncio.to_thread(copy_database, file, copy, SECRETS, spare)).open('rb')
        finally: copy.unlink(missing_ok=True)
        with opened:
            while chunk := await asyncio.to_thread(opened.read, 1 << 18): yield chunk
    return await download(req, 'db', copied(parley(req).store.file))

@rt.get('/import')
async def importing(req):
    return Incoming(parley(req).imports.get(owner(req))) if by_htmx(req) else RedirectResponse(your_data.to(), 303)

@rt.post('/import')
async def bring(req):
    "Read a file that came; what takes more than a moment goes on by itself, and the page asks how far it is."
    file, imports = (await req.form()).get('file'), parley(req).imports
    if not getattr(file, 'size', 0): raise Refused(422, 'Choose a file that is not empty.')
    if (now := imports.get(owner(req))) and not now.status:
        raise Refused(429, 'Wait: another file is still coming in.', retry_after=10)
    now = imports[owner(req)] = Import()
    now.task = asyncio.create_task(take_in(parley(req).store, owner(req), file.file, file.size, now))
    now.task.add_done_callback(lambda _: parley(req).turns.lists[owner(req)].tell())
    await asyncio.wait([now.task], timeout=1)
    if by_htmx(req): return Incoming(now)
    if now.status > 400: raise Refused(now.status, now.words)
    return RedirectResponse(your_data.to(), 303)

@rt.get('/usage')
async def usage(req):
    here, zone = parley(req), zone_of(req)
    first = (time.time() + 60 * zone) // DAY - 29
    days = [time.strftime('%Y-%m-%d', time.gmtime((first + n) * DAY)) for n in range(30)]
    rows = await here.store.usage(owner(req), first * DAY - 60 * zone, zone)
    spent = await here.store.spent(owner(req))
    return await page(req, 'Usage', Usage(rows, days, spent, here.settings.monthly_usd), to='/')

@rt.get('/usage.csv')
async def usage_csv(req):
    "All sums as CSV. What a spreadsheet would take for a formula is text: the name of a model may be anything."
    file = io.StringIO()
    lines = csv.writer(file)
    lines.writerow(columns := ['day', 'model', 'purpose', 'calls', *TOKENS.values(), 'cost', 'unknown'])
    for row in await parley(req).store.usage(owner(req), zone=zone_of(req)):
        lines.writerow([re.sub(r'^(?=[=+@\t\r-])', "'", str(row[column])) for column in columns])
    return PlainTextResponse(file.getvalue(), media_type='text/csv', headers={
        'content-disposition': 'attachment; filename="parley-usage.csv"'})

@rt.post('/look')
async def remember(req):
    "Keep the theme or the sidebar's state for a year. The script writes the same cookies by itself."
    form = await form_of(req)
    answer = RedirectResponse(own_path(form.get('back', '/')), 303)
    for name, known in LOOKS.items():
        if form.get(name) in known: answer.set_cookie(name, form[name], max_age=31_536_000, samesite='lax')
    return answer

@rt.get('/login')
async def login(req):
    place = own_path(req.query_params.get('next', '/'))
    return RedirectResponse(place, 303) if owner(req) else HTMLResponse(to_xml(Login(place)))

@rt.post('/login')
async def enter(req):
    "Sign in, and go on. What was typed before comes back in the composer; nothing is sent by itself."
    form, door = await form_of(req), parley(req).door
    place, typed = own_path(form.get('next') or req.query_params.get('next', '/')), form.get('message', '')
    try:
        if 'password' not in form: raise Refused(401, 'Sign in first.')
        token = await door.enter(req, form['password'])
    except Refused as no:
        headers = {'retry-after': str(no.retry_after)} if no.retry_after else None
        return HTMLResponse(to_xml(Login(place, no.words, typed)), no.status, headers)
    answer = RedirectResponse(place, 303)
    if typed:
        answer = HTMLResponse(to_xml(Page(
            'Parley', await parley(req).store.conversations(OWNER), look=look_of(req) | {'here': place}, to=place,
            typed=typed, notice='You are signed in. This is not sent yet.')))
    answer.set_cookie(door.cookie(req.scope), token, max_age=int(door.settings.session_days * DAY), httponly=True,
                      samesite='lax', secure=door.secure(req.scope))
    return answer

@rt.post('/logout')
async def leave(req):
    await parley(req).door.leave(req.scope, 'everywhere' in await form_of(req))
    answer = RedirectResponse('/login', 303)
    answer.delete_cookie(parley(req).door.cookie(req.scope), secure=parley(req).door.secure(req.scope), httponly=True)
    return answer

@rt.get('/healthz')
async def healthz(req):
    "Whether the database can be written: one write at a time, however many ask, and nobody waits for it for long."
    here = parley(req)
    if not here.check or here.check.done(): here.check = asyncio.create_task(here.store.check())
    try: await asyncio.wait_for(asyncio.shield(here.check), 0.9)
    except Unusable as error: return JSONResponse({'ok': False, 'why': str(error)}, 503)
    except TimeoutError: return JSONResponse({'ok': False, 'why': 'the database is busy'}, 503)
    return JSONResponse({'ok': True})

@rt.get('/assets/{file}')
async def asset_file(req, file: str):
    for url, kind, content in assets().values():
        if url == req.url.path:
            return Response(content, media_type=kind, headers={'cache-control': 'public, max-age=31536000, immutable'})
    raise Refused(404, 'There is no such file here.')

async def refused(req, error):
    "A clear error, and nothing is lost: what the person typed is in the composer of the page that says no."
    if isinstance(error, Unusable):
        kept = '. Your text is still here.' if req.method == 'POST' else '. Try again in a moment.'
        error = Refused(503, f'{"Not saved" if req.method == "POST" else "Not to be read now"}: {error}{kept}')
    if isinstance(error, HTTPException):
        words = 'There is nothing here.' if error.status_code in (404, 405) else 'This is no form that can be read.'
        error = Refused(error.status_code, words)
    headers = {'retry-after': str(error.retry_after)} if error.retry_after else None
    if req.url.path.endswith('.json'): return JSONResponse({'error': error.words}, error.status, headers)
    if by_htmx(req): return PlainTextResponse(error.words, error.status, headers)
    typed = error.typed
    if req.method == 'POST' and not typed:
        with contextlib.suppress(Refused, HTTPException, RuntimeError):  # the body may have been read by half
            typed = (await form_of(req)).get('message', '')
    found = []
    with contextlib.suppress(Unusable): found = await parley(req).store.conversations(owner(req))
    files, trashed = getattr(req.state, 'files', ()), isinstance(error, Trashed)
    words = None if typed or files else Div(H2(error.words), P(
        A('A new conversation', href='/'), ' ', A('The trash', href=trash.to()) if trashed else None), id='empty')
    notice = '' if words else error.words  # beside the text that is still there, or in the middle of an empty page
    to = '' if req.url.path.endswith('/edit') else home_of(req)  # what was refused as an edit is sent again as one
    return HTMLResponse(to_xml(Page('Parley', found, words, look=look_of(req), typed=typed, notice=notice, to=to,
                                    files=files)), error.status, headers)

# %%
if NOTEBOOK:
    print(*sorted({path for _, path, *_ in rt.routes}))

# %% [markdown]
# ## 10 Socket
#
# A socket only watches. It sends a snapshot, then what is new, then how it ended, and closes with 1000; while it sends
# it hears `{"action": "stop"}`. Closing codes of ours, which no client reconnects after: 4400 a message that makes no
# sense, 4401 the session has ended, 4404 an unknown reply, 4500 a fault of ours.

# %%
async def chat(ws: WebSocket):
    "WS /ws/chat/{conversation_id}/{msg_idx}; `?at=` is the id of the reply that the page shows there."
    await attend(ws, watch(ws, **ws.path_params))

async def follow_list(ws: WebSocket):
    "WS /ws/list: the edition of the list now and whenever it is another, at most twice a second."
    await attend(ws, tell(ws))

async def attend(ws, showing):
    await ws.accept()
    task = asyncio.create_task(showing)
    try: await hear(ws, ws.path_params.get('conversation_id', ''))
    finally: task.cancel()

async def tell(ws):
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            changed = parley(ws).turns.lists[owner(ws)].changed
            await ws.send_text(edition(ws))
            await asyncio.sleep(0.5)
            await changed.wait()

async def hear(ws, conversation):
    "Read what the page says until it is gone; reading is also what lets the server see pongs and the end."
    while (frame := await ws.receive())['type'] != 'websocket.disconnect':
        text = frame.get('text') or ''  # a binary frame has none
        try: said = json.loads(text) if len(text) <= parley(ws).settings.max_frame_chars else None
        except (ValueError, RecursionError): said = None
        if not isinstance(said, dict): return await ws.close(4400)
        if said.get('action') == 'stop':
            with contextlib.suppress(Refused, Unusable): await parley(ws).turns.stop(owner(ws), conversation)

async def watch(ws, conversation_id, msg_idx):
    "Show the reply to its end, as it grows or as it stands, and close."
    here, idx = parley(ws), int(msg_idx) if msg_idx.isdecimal() and len(msg_idx) < 9 else -1
    place = owner(ws), conversation_id, idx, ws.query_params.get('at')
    try:
        message = await here.store.message(*place)
        if message.role != 'assistant': return await ws.close(4404)
        if turn := here.turns.find(message): await follow(ws, LiveReply.of(turn))
        else:
            message = await here.store.message(*place)
            if message.status == RUNNING: return await ws.close(1012)  # just begun anew: come again
            await ws.send_text(StepsFrame(idx, steps_of(message.blocks))
                               + Snapshot(idx, await here.shelf.content(message)) + StateFrame(message))
        await ws.close(1000)
    except Refused: await ws.close(4404)
    except WebSocketDisconnect: pass
    except Exception as error:  # noqa: BLE001 no close frame would be a loop of reconnections
        log.error('a socket failed: %s', type(error).__name__)
        with contextlib.suppress(WebSocketDisconnect, RuntimeError): await ws.close(4500)

async def follow(ws, live):
    "Send the reply as it grows; what is sent has been committed."
    cursor = None
    async for _ in live.turn.follow():
        cursor, frame = await live.now(functools.partial(live.since, cursor))
        if frame: await ws.send_text(frame)
    parley(ws).shelf.put(live.turn.reply, live.html())

# %% [markdown]
# ## 11 App

# %%
def create_app(settings: Settings, http: httpx2.AsyncClient | None = None) -> Door:
    "The app behind its door, with its database open. `http` is handed to the SDK. Raises `Unusable`."
    fh_cfg.indent = False  # white space that FastHTML adds would be seen in pre-wrapped text
    store, claude = Store(settings.database, settings), Claude(settings, http)
    turns = Turns(store, claude, settings)

    async def lifespan(app):
        await door.open()
        await turns.open()
        gc.collect()
        gc.freeze()  # what is here stays: a collection that looked at it again would stall every stream by 100 ms
        yield
        await turns.close()
        for coming in app.state.parley.imports.values(): coming.status = coming.status or 503  # its thread looks there
        await claude.sdk.close()
        store.close()

    app = FastHTML(lifespan=lifespan, default_hdrs=False, canonical=False, sess_cls=None,
                   secret_key=settings.session_secret or store.secret(), max_part_size=settings.max_body_bytes,
                   middleware=[Middleware(GZipMiddleware, minimum_size=1000)])
    door = Door(app, settings, store)
    app.state.parley = Parley(settings, store, claude, turns, Shelf(), door)
    rt.to_app(app)
    app.router.routes.append(WebSocketRoute('/ws/chat/{conversation_id}/{msg_idx}', chat))
    app.router.routes.append(WebSocketRoute('/ws/list', follow_list))
    for kind in (Refused, Unusable, HTTPException): app.add_exception_handler(kind, refused)
    return door

class Connection(HttpToolsProtocol):
    """uvicorn's, but what has no end there has one here: a head, what follows a body (trailers, of any number and
    length), silence after an answer, answers that nobody reads, requests that are sent before the answer is there."""
    def connection_made(self, transport):
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that whatever waits to be read is known of
        self.unread, self.cycles = None, []
        self.await_head()

    def await_head(self, limit=None):
        self.unsaid = 0  # bytes since the last that said something
        self.late = self.loop.call_later(limit or self.config.app.settings.header_seconds, self.transport.close)

    def on_message_begin(self):
        super().on_message_begin()
        self.late.cancel()
        self.await_head()

    def on_headers_complete(self):
        self.late.cancel()
        self.unsaid = 0
        size = len(self.url) + sum(len(part) for pair in self.headers for part in pair)
        if size > self.config.app.settings.max_header_bytes or len(self.pipeline) > 16: raise ValueError  # a 400
        if self.parser.should_upgrade(): self.transport.set_write_buffer_limits()  # a socket has rules of its own
        super().on_headers_complete()
        self.cycles = [cycle for cycle in (*self.cycles, self.cycle) if cycle and not cycle.response_complete]

    def on_body(self, body):
        self.unsaid = 0
        super().on_body(body)

    def data_received(self, data):
        self.unsaid += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self: return
        if self.unsaid > self.config.app.settings.max_header_bytes: self.send_400_response('Too long a head.')
        elif self.late.cancelled() and (not self.cycle or self.cycle.response_complete):
            self.await_head(self.config.app.settings.body_seconds)  # of a body that was refused the rest comes yet

    def pause_writing(self):
        super().pause_writing()
        self.await_reader()

    def await_reader(self, waiting=None):
        "Who reads nothing for so long is gone; who reads slowly is not."
        if (left := self.transport.get_write_buffer_size()) == waiting: return self.transport.abort()
        self.unread = self.loop.call_later(self.config.app.settings.body_seconds, self.await_reader, left)

    def resume_writing(self):
        super().resume_writing()
        self.unread.cancel()

    def connection_lost(self, error):
        self.late.cancel()
        if self.unread: self.unread.cancel()
        for cycle in self.cycles: cycle.disconnected = True  # uvicorn tells the last of them
        super().connection_lost(error)

def serving(app: Door) -> uvicorn.Config:
    "How uvicorn serves it: bounded, quiet, without banners. Proxies are the Door's matter."
    settings = app.settings
    return uvicorn.Config(app, settings.host, settings.port, log_config=None, access_log=False, server_header=False,
                          proxy_headers=False, http=Connection, ws_max_size=64 * settings.max_frame_chars,
                          timeout_graceful_shutdown=2)

class Server(uvicorn.Server):
    "Drains before it closes its sockets: SIGTERM lets running replies end for a while, Ctrl-C does not wait."
    async def shutdown(self, sockets=None):
        here = self.config.app.state.parley
        until = time.monotonic() + (here.settings.drain_seconds if signal.SIGTERM in self._captured_signals else 0)
        here.turns.closing = True
        while here.turns.running and time.monotonic() < until and not self.force_exit:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # uvicorn's flag for a second signal is no event to wait for
        await here.turns.close()
        await super().shutdown(sockets)

class JsonLines(logging.Formatter):
    "One JSON object a line. Of an exception only its type and where it rose: its text may quote a secret or a message."
    def format(self, record):
        line = {'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(record.created)), 'level': record.levelname,
                'logger': record.name, 'event': record.getMessage().partition('\n')[0], 'request': REQUEST.get()}
        if record.exc_info and (error := record.exc_info[1]):
            frames = traceback.extract_tb(error.__traceback__)
            line |= {'error': type(error).__name__, 'at': [f'{Path(f.filename).name}:{f.lineno}' for f in frames[-8:]]}
        return json.dumps(line | getattr(record, 'fields', {}))

def new_hash():
    "A password, typed or piped in but never an argument, which others on the machine could read, as it may be kept."
    password = typed_bytes(getpass('Password: ') if sys.stdin.isatty() else sys.stdin.readline())
    if len(password.decode()) < 12 or len(password) > LOUDEST:
        raise SystemExit(f'a password has at least 12 characters and at most {LOUDEST:,} bytes')
    print(scrypt(password, secrets.token_bytes(16)))

def command(name, *words):
    "`backup FILE` and `restore FILE [--replace]`: one line each, whether it is done or can't be."
    database, files = Settings.read(os.environ).database, [Path(word) for word in words if word != '--replace']
    if len(files) != 1 or len(words) > 1 + (name == 'restore'):
        raise SystemExit('say `backup FILE` or `restore FILE`, or `restore FILE --replace`')
    try:
        if name == 'backup':
            size = copy_database(database, files[0]).stat().st_size
            return print(f'{files[0]}: a copy of {database}, {size:,} bytes')
        kept = restore_database(files[0], database, '--replace' in words)
    except Unusable as error: raise SystemExit(f'{name} {files[0]}, {database}: {error}') from None
    print(f'{database}: restored from {files[0]}' + (f'; what was there is kept as {kept.name}' if kept else ''))

def main():
    "Run the server as the environment says."
    if sys.argv[1:] == ['hash']: return new_hash()
    if sys.argv[1:2] in (['backup'], ['restore']): return command(*sys.argv[1:])
    if sys.argv[1:]: raise SystemExit('say `hash`, `backup FILE` or `restore FILE`, or nothing to start')
    os.umask(0o077)
    settings = Settings.read(os.environ)
    lines = logging.StreamHandler()
    lines.setFormatter(JsonLines())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[lines])
    for chatty in ('anthropic', 'httpx2', 'httpcore2', 'httpx', 'uvicorn', 'asyncio'):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with contextlib.suppress(ValueError, OSError):  # as many sockets as we may have
        resource.setrlimit(resource.RLIMIT_NOFILE, [resource.getrlimit(resource.RLIMIT_NOFILE)[1]] * 2)
    try: app = create_app(settings)
    except Unusable as error: raise SystemExit(f'{settings.database}: {error}') from None
    tempfile.tempdir = str(settings.database.parent.resolve())  # where files that come wait: /tmp may be memory
    if settings.demo: log.info('no key is set: the demo model answers')
    family = socket.AF_INET6 if ':' in settings.host else socket.AF_INET
    try: door = socket.create_server((settings.host.strip('[]'), settings.port), family=family, backlog=2048)
    except OSError as error:
        raise SystemExit(f'HOST and PORT: {settings.host}:{settings.port} can not be had ({error.strerror})') from None
    log.info('Parley is at http://%s:%s', settings.host, door.getsockname()[1])
    with contextlib.suppress(KeyboardInterrupt): Server(serving(app)).run(sockets=[door])

if __name__ == '__main__' and not NOTEBOOK: main()
