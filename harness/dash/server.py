"""The live page's server: Starlette on uvicorn, GET alone, loopback unless told otherwise.

A page in the user's browser must not be able to read it by a name that it points at 127.0.0.1 (DNS
rebinding): only names that are meant are answered to. No CORS header is ever sent.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from device_agents.errors import InfrastructureError
from harness.dash.gathering import Gatherer
from harness.dash.metrics import FarmCollector, exposition
from harness.errors import HarnessError, StoreError
from harness.reaching import is_loopback
from harness.reporting import finite, junit
from harness.timeline import trace
from kvengine.codec import encode
from reports import farm_page, gate_page, page

if TYPE_CHECKING:
    from harness.store import Store
    from reports.results import RunResults

T = TypeVar("T")
PORT = 8347
_MOST_AT_ONCE = 64  # connections
_TOTALS_S = 30.0  # what adds up over the whole audit log is counted so often
_log = logging.getLogger(__name__)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), usb=()",
}
# Of what is not one of our pages: nothing in it may load or run anything.
_NOTHING = "default-src 'none'; frame-ancestors 'none'"


class PublicInterface(HarnessError):
    """The page would be open to the network, and nobody has said that it should be."""


@dataclass(frozen=True)
class Address:
    """Where to listen. names: further ones that the page may be asked for by, such as a proxy's."""

    host: str = "127.0.0.1"
    port: int = PORT
    public: bool = False
    names: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises PublicInterface: others could reach it, and ``public`` is not set."""
        if not self.public and not is_loopback(self.host):
            raise PublicInterface(
                f"--host {self.host} opens this page to the network: whoever reaches port {self.port} sees "
                "devices, people's names, evidence, logs and reports, without a password and unencrypted. "
                "Say --public if that is meant; better: `ssh -L` to the loopback interface, or a proxy with "
                "TLS and a login before it"
            )

    def is_meant(self, asked: str) -> bool:
        """Whether the Host header ``asked`` names this server: by an address, which no DNS can make up, or by
        one of its names."""
        name, port = _split(asked)
        if name in self.names:
            return True  # whatever port a proxy has
        if (port or "80") != str(self.port):
            return False
        if name == "localhost":
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.public or address.is_loopback


class Guard:
    """Before everything: only who asked for us by name is answered, with strict headers on every answer."""

    def __init__(self, app: ASGIApp, address: Address) -> None:
        self._app = app
        self._address = address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                have = {name for name, _ in message["headers"]}
                extra = {**_HEADERS, "content-security-policy": _NOTHING}
                add = [(k.encode(), v.encode()) for k, v in extra.items() if k.encode() not in have]
                message = {**message, "headers": [*message["headers"], *add]}
            await send(message)

        if scope["type"] != "http":
            return
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        app = self._app
        if len(hosts) != 1 or not self._address.is_meant(hosts[0]):
            text = "421: this server is not asked for by that name; see kvfarm dash --allow-host\n"
            app = PlainTextResponse(text, 421)
        await app(scope, receive, with_headers)


class Dash:
    """The page's routes."""

    def __init__(self, gatherer: Gatherer, store: Store | None, collector: FarmCollector) -> None:
        self._gatherer, self._store, self._collector = gatherer, store, collector

    def app(self, address: Address) -> ASGIApp:
        routes = [
            Route("/", self._page),
            Route("/api/state", self._state),
            Route("/api/sections", self._sections),
            Route("/metrics", self._metrics),
            Route("/runs/{run}/", self._report),
            Route("/runs/{run}/results.json", self._results),
            Route("/runs/{run}/junit.xml", self._junit),
            Route("/runs/{run}/trace.json", self._trace),
        ]
        handlers = {StoreError: _missing, InfrastructureError: _failed}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), address)

    def _page(self, _: Request) -> Response:
        headers = {"content-security-policy": farm_page.policy()}
        return HTMLResponse(farm_page.html(self._gatherer.state()), headers=headers)

    def _state(self, _: Request) -> Response:
        return JSONResponse(finite(encode(self._gatherer.state())))

    def _sections(self, _: Request) -> Response:
        return JSONResponse(farm_page.sections(self._gatherer.state()))

    def _metrics(self, _: Request) -> Response:
        try:
            return Response(exposition(self._collector), media_type=CONTENT_TYPE_LATEST)
        except StoreError as error:
            return PlainTextResponse(f"503: {error}\n", 503)

    def _report(self, request: Request) -> Response:
        results = self._run(request)
        made = page.html(results) if results.gate is None else gate_page.html(results)
        # The page has a policy of its own inside, which knows its scripts.
        return HTMLResponse(made, headers={"content-security-policy": "frame-ancestors 'none'"})

    def _results(self, request: Request) -> Response:
        return JSONResponse(finite(encode(self._run(request))))

    def _junit(self, request: Request) -> Response:
        return Response(junit(self._run(request)), media_type="application/xml")

    def _trace(self, request: Request) -> Response:
        results = self._run(request)
        assert self._store is not None
        made = json.dumps(trace(results, self._store.spans(results.run_id)))
        name = "".join(each if each.isalnum() or each in "-_" else "_" for each in results.run_id)
        headers = {"content-disposition": f'attachment; filename="trace-{name}.json"'}
        return Response(made, media_type="application/json", headers=headers)

    def _run(self, request: Request) -> RunResults:
        if self._store is None:
            raise StoreError("there is no store; give --store")
        return self._store.results(request.path_params["run"])


class Remembered(Generic[T]):
    """What ``find`` found, at most ``seconds`` old; thread-safe."""

    def __init__(self, find: Callable[[], T], seconds: float = _TOTALS_S) -> None:
        self._find, self._seconds = find, seconds
        self._lock = threading.Lock()
        self._last: tuple[float, T] | None = None

    def __call__(self) -> T:
        with self._lock:
            now = time.monotonic()
            if self._last is None or now - self._last[0] >= self._seconds:
                self._last = now, self._find()
            return self._last[1]


def listen(address: Address) -> socket.socket:
    """Raises PublicInterface; OSError: the port is taken."""
    address.check()
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    return socket.create_server((address.host, address.port), family=family)


def serve(app: ASGIApp) -> uvicorn.Server:
    """A server that ``run(sockets=...)`` starts and SIGINT and SIGTERM end."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # whoever asks is nobody else
        lifespan="off",
        ws="none",
        limit_concurrency=_MOST_AT_ONCE,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=16 << 10,
    )
    return uvicorn.Server(config)


async def _missing(_: Request, error: Exception) -> Response:
    return PlainTextResponse(f"404: {error}\n", 404)


async def _failed(_: Request, error: Exception) -> Response:
    return PlainTextResponse(f"503: {error}\n", 503)


def _split(asked: str) -> tuple[str, str]:
    """Name and port of a Host header; the name of an IPv6 address without its brackets."""
    asked = asked.strip().lower()
    if asked.startswith("["):
        name, _, rest = asked[1:].partition("]")
        return name, rest.removeprefix(":")
    name, _, port = asked.partition(":")
    return name, port
