"""The HTTP server: metrics for Prometheus at /metrics, the status page at /, and its numbers at /status."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import choose_encoder

from lovasz.server.access.certificates import Certificates
from lovasz.server.access.watched_files import WatchedFiles
from lovasz.server.addresses import free_addresses
from lovasz.server.observe.logs import Sparingly
from lovasz.server.web.guard import Guard
from lovasz.server.web.status_page import StatusPage

_log = logging.getLogger(__name__)

_MOST_CONNECTIONS = 128
"""At a time. Each has a thread. The oldest one makes room for a further one."""
_REQUEST_SECONDS = 10.0
"""How long a connection may last, from its first byte to the last byte of its answer."""
_PAUSE_SECONDS = 0.1
_MOMENT_SECONDS = 0.5
"""No connection makes room for another one before it has lasted this long."""

Environment = dict[str, Any]
StartResponse = Callable[..., Any]


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lock = threading.Lock()
        self._since: dict[socket.socket, float] = {}
        """When each connection began (``time.monotonic``), the oldest first."""
        self.certificates: WatchedFiles[Certificates] | None = None

    def get_request(self) -> tuple[socket.socket, Any]:
        """A connection; its TLS handshake is made in its own thread."""
        try:
            connection, address = super().get_request()
        except OSError:
            time.sleep(_PAUSE_SECONDS)  # Without file descriptors, it is asked again at once.
            raise
        if self.certificates is not None:
            context = self.certificates.value.context
            connection = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        if isinstance(request, ssl.SSLSocket):
            request.settimeout(_REQUEST_SECONDS)
            request.do_handshake()
        super().finish_request(request, client_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        now = time.monotonic()
        with self._lock:
            oldest, since = next(iter(self._since.items()), (None, now))
            is_full = len(self._since) >= _MOST_CONNECTIONS
            if is_full and now - since < _MOMENT_SECONDS:
                self.shutdown_request(request)
                return
            if is_full and oldest is not None:
                self._cut_off(oldest)
            self._since[request] = now
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._since.pop(request, None)

    def service_actions(self) -> None:
        """Ends the connections whose time is up; called twice a second."""
        until = time.monotonic() - _REQUEST_SECONDS
        with self._lock:
            for connection in [one for one, since in self._since.items() if since < until]:
                self._cut_off(connection)

    def _cut_off(self, connection: socket.socket) -> None:
        """Its thread sees the end of it, and closes it."""
        del self._since[connection]
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # Not TLS's own, which its thread may be using.

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Mostly because the caller went away."""
        _log.debug("an HTTP call failed", exc_info=True)


class _ThreadingServer6(_ThreadingServer):
    address_family = socket.AF_INET6


class _SilentHandler(WSGIRequestHandler):
    timeout = _REQUEST_SECONDS  # For each read; the server limits them all together.

    def log_message(self, *_: object) -> None:
        pass


class WebServer:
    """Serves metrics and status page, in threads of its own."""

    def __init__(
        self,
        page: StatusPage,
        strangers_page: StatusPage,
        guard: Guard,
        certificates: WatchedFiles[Certificates] | None,
    ) -> None:
        """Listens nowhere yet.

        Args:
            page: what is served, with its metrics.
            strangers_page: the same for those whom the guard does not show the names of runs.
            guard: says who may ask.
            certificates: for HTTPS; None: HTTP.
        """
        self._guard, self._certificates = guard, certificates
        self._pages = {True: page, False: strangers_page}
        self._metrics: dict[bool, Callable[..., Iterable[bytes]]] = {
            shows_names: make_wsgi_app(one.registry) for shows_names, one in self._pages.items()
        }
        self._servers: list[tuple[WSGIServer, threading.Thread]] = []
        self._failures = Sparingly(_log)

    def start(self, host: str, port: int) -> int:
        """Listens at all addresses of the host, and returns the port.

        Raises:
            OSError: an address cannot be bound.
        """
        found, port = free_addresses(host, port)
        for address in found:
            kind = _ThreadingServer6 if ":" in address else _ThreadingServer
            server = make_server(address, port, self._answer, server_class=kind, handler_class=_SilentHandler)
            server.certificates = self._certificates
            port = int(server.server_port)
            thread = threading.Thread(target=server.serve_forever, name="web", daemon=True)
            thread.start()
            self._servers.append((server, thread))
        return port

    def stop(self) -> None:
        while self._servers:
            server, thread = self._servers.pop()
            server.shutdown()
            server.server_close()
            thread.join()

    def _answer(self, environment: Environment, start_response: StartResponse) -> Iterable[bytes]:
        method = environment["REQUEST_METHOD"]
        if method not in ("GET", "HEAD"):
            return _refused(start_response, "405 Method Not Allowed", "expected GET")
        refusal = self._guard.refusal(environment)
        if refusal is not None:
            return _refused(start_response, *refusal)
        try:
            body = self._body({**environment, "REQUEST_METHOD": "GET"}, start_response)
        except Exception as error:
            _log.debug("an HTTP call could not be answered", exc_info=True)
            self._failures.warning("an HTTP call could not be answered", reason=f"{type(error).__name__}: {error}")
            return _refused(start_response, "500 Internal Server Error", "the server's log says why")
        return body if method == "GET" else []

    def _body(self, environment: Environment, start_response: StartResponse) -> Iterable[bytes]:
        path, shows_names = environment.get("PATH_INFO", "/"), self._guard.shows_names(environment)
        if path == "/metrics":
            return self._metrics[shows_names](_readable(environment), start_response)
        if path == "/":
            return _ok(start_response, "text/html; charset=utf-8", self._pages[shows_names].html)
        if path == "/status":
            return _ok(start_response, "application/json", self._pages[shows_names].numbers())
        there = "there are / (for people), /metrics (for Prometheus) and /status (what / shows, as JSON)"
        return _refused(start_response, "404 Not Found", there)


def _readable(environment: Environment) -> Environment:
    """A call for metrics, without the formats that it asks for if they cannot be read: it gets plain text then."""
    try:
        choose_encoder(environment.get("HTTP_ACCEPT", ""))
    except Exception:  # Of many kinds: the library trusts the header.
        return {**environment, "HTTP_ACCEPT": ""}
    return environment


def _ok(start_response: StartResponse, content_type: str, body: bytes) -> Iterable[bytes]:
    headers = [("Content-Type", content_type), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
    start_response("200 OK", headers)
    return [body]


def _refused(
    start_response: StartResponse, status: str, text: str, headers: Sequence[tuple[str, str]] = ()
) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [f"{text}\n".encode()]
