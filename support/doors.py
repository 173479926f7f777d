"""support/doors.py -- between the network and vLLM's server: keys, limits, a log line a request
(docs/SERVING.md). vLLM imports it where it serves, right before it makes uvicorn's settings."""
import asyncio
import hmac
import logging
import os
import re
import traceback
from collections import Counter
from functools import partialmethod
from uuid import uuid4
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from support.cli import FLAGS

MB, MOST, SHARE, SECONDS, IDLE = (  # serve() puts its flags into the environment
    float(os.environ.get(f"BOREALIS_{k.upper()}", v["default"])) for k, v in FLAGS["doors"].items())
BYTES, TOO_LARGE, ID = int(MB * 2**20), f"more than {MB:g} MB in a request", "X-Request-Id"
LATE = f"not done within {SECONDS:g} s", "no event in time"  # the latter: of a live socket
HEADER = 2 ** 19  # bytes; uvicorn has no limit
PREFLIGHT = {"origin", "access-control-request-method"}  # what CORSMiddleware itself answers
LOG, plain_record = logging.getLogger("uvicorn.error"), logging.getLogRecordFactory()

class Door(HttpToolsProtocol):
    """uvicorn's connection. IDLE seconds without the whole header of a request, or without more of
    its body, close it; in eight steps, for if we were busy ourselves, no client is to blame."""
    def connection_made(self, transport):
        self.app_state = self.app_state | {"hang_up": transport.abort}  # for Visit, in the scope
        super().connection_made(transport)
        self.size = 0  # of a header so far
        self.tick(0, None)
    def data_received(self, data):
        before, self.size = self.cycle, self.size + len(data)
        super().data_received(data)
        if self.cycle is not before or before and before.more_body:  # it is whole; a body comes
            self.size = 0
        elif self.size > HEADER:
            self.transport.abort()
    def handle_websocket_upgrade(self):
        super().handle_websocket_upgrade()
        if not self.transport.get_protocol().handshake_initiated:  # refused, but left open
            self.transport.close()
    def tick(self, waited: int, before):
        request = self.cycle
        header = not request or request.response_complete
        now = request if header else request.body  # a new one whenever the app has read
        if now is not before or not header and (request.body or not request.more_body):
            waited = 0
        if waited == 8:
            self.transport.close()
        elif self in self.connections:  # neither closed nor a websocket by now
            self.loop.call_later(IDLE / 8, self.tick, waited + 1, now)

uvicorn.Config.__init__ = partialmethod(uvicorn.Config.__init__, http=Door, ws_max_size=BYTES)

def without_words(*args, **kwargs) -> logging.LogRecord:
    """Problems in the log without values and exceptions' messages: they may be a client's text."""
    record = plain_record(*args, **kwargs)
    if record.levelno >= logging.WARNING:
        kind, _, stack = record.exc_info or (None, None, None)
        kind = f" ({kind.__name__} {traceback.extract_tb(stack)[-1:]})" if kind else ""
        record.msg, record.args, record.exc_info = str(record.msg).split("\n")[0] + kind, (), None
    return record

class Visit:
    """A request or live socket, between uvicorn and the app."""
    def __init__(self, scope, receive, send):
        self.scope, self.uvicorn_receive, self.uvicorn_send = scope, receive, send
        self.headers, self.live = MutableHeaders(scope=scope), scope["type"] == "websocket"
        given = re.fullmatch(r"[\w.-]{1,64}", self.headers.get(ID, ""), re.ASCII)
        self.name = self.headers[ID] = given[0] if given else uuid4().hex  # for vLLM, too
        self.client = re.sub(r"[^\w.:]", "?", (scope["client"] or "-")[0])[:64]
        self.status, self.size, self.over = 0, 0, False
        self.began = asyncio.get_running_loop().time()
        self.until = self.began + (IDLE if self.live else SECONDS)
    async def receive(self) -> dict:
        try:
            async with asyncio.timeout_at(self.until):
                message = await self.uvicorn_receive()
        except TimeoutError:
            return await self.end(503, LATE[self.live])
        if message["type"] == "websocket.receive":
            self.until = asyncio.get_running_loop().time() + SECONDS
        self.status = message.get("code", self.status)
        self.size += len(message.get("body", b""))
        return message if self.size <= BYTES else await self.end(413, TOO_LARGE)
    async def send(self, message: dict) -> None:
        if self.over:
            return
        if "status" in message or message["type"] == "websocket.accept":
            message["headers"] = [*message.get("headers", [])]
            MutableHeaders(scope=message)[ID] = self.name
        self.status = message.get("status", message.get("code", self.status or 101))
        await self.uvicorn_send(message)
    async def end(self, status: int, why: str) -> dict:
        """Say why, and no more. To the app the client has gone, at which vLLM stops its work."""
        asyncio.get_running_loop().call_later(0.5, self.scope["state"]["hang_up"])
        error = dict(error=dict(message=why, type="refused", code=status))
        headers = {"connection": "close"} | ({"retry-after": "1"} if status == 429 else {})
        if not self.status:
            await JSONResponse(error, status, headers)(self.scope, self.receive, self.send)
        elif self.live:
            await self.send(dict(type="websocket.close", code=1008, reason=why))
        self.over = True
        return dict(type=f"{self.scope['type']}.disconnect", code=1008)

class Doors:
    """The ASGI middleware. What it counts is of one process."""
    def __init__(self, app):
        self.app, self.held = app, Counter()  # requests and live sockets now, by client
        logging.setLogRecordFactory(without_words)
        LOG.addFilter(lambda r: r.levelno > logging.INFO or "websockets" not in r.pathname)
    def refusal(self, visit: Visit) -> tuple[int, str] | None:  # status and reason
        scope, headers = visit.scope, visit.headers
        if scope["path"].removeprefix(scope.get("root_path", "")) == "/health":
            return None
        keys = [k for k in scope["app"].state.args.api_key or [os.environ.get("VLLM_API_KEY")] if k]
        told = headers.get("authorization", "").encode("latin-1")
        known = [hmac.compare_digest(told[7:], key.encode()) for key in keys]
        known = told[:7].lower() == b"bearer " and any(known)
        preflight = scope.get("method") == "OPTIONS" and {*headers} >= PREFLIGHT
        if keys and not known and not preflight:
            return 401, "no valid key in the header Authorization"
        if int(headers.get("content-length", 0)) > BYTES:
            return 413, TOO_LARGE
        if self.held.total() >= MOST:
            return 429, f"{MOST:g} requests at once already: try again"
        share = max(1, MOST * SHARE)
        return (429, "too many of yours: try again") if self.held[visit.client] >= share else None
    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        visit = Visit(scope, receive, send)
        refusal = self.refusal(visit)
        held = Counter([visit.client] * (not refusal))
        self.held += held
        try:
            await (visit.end(*refusal) if refusal else self.app(scope, visit.receive, visit.send))
        finally:
            self.held -= held
            seconds = asyncio.get_running_loop().time() - visit.began
            LOG.info("%s %s %s %s %s %.3f s", visit.name, visit.client, scope.get("method", "LIVE"),
                     scope["raw_path"].decode("latin-1")[:200], visit.status or "-", seconds)
