"""Where Prometheus asks: HTTP, or HTTPS with the server's certificate, each scrape on a thread of its own."""

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from serve.errors import AddressError

log = logging.getLogger(__name__)

MOST = 16
"""Connections at a time; one more is hung up on."""

TIMEOUT = 10.0
"""Seconds that a scraper may be silent, also before it has said what it wants."""

BREATH = 0.1
"""Seconds until a connection is looked at again that could not be taken, for want of open files."""

Context = Callable[[], ssl.SSLContext]
"""TLS for the next connection."""


class Scraped:
    """Answers scrapes, until it is stopped.

    Args:
        registry: what is told.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        context: TLS; None for none.

    Attributes:
        port: that it listens on.
        scheme: that it speaks.

    Raises:
        AddressError: the address cannot be listened on.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int, context: Context | None = None) -> None:
        try:
            self._server = _Server(host, port, context)
        except OSError as error:
            raise AddressError(f"cannot listen on {host}:{port} for metrics: {error.strerror or error}") from None
        self._server.set_app(make_wsgi_app(registry))
        self.port, self.scheme = self._server.server_port, "http" if context is None else "https"
        self._thread = threading.Thread(target=self._server.serve_forever, name="scrapes", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    timeout = TIMEOUT

    def log_message(self, *_: Any) -> None:
        """Scrapes are not logged."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, context: Context | None) -> None:
        self._context, self._free = context, threading.Semaphore(MOST)
        (self.address_family, *_), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        super().__init__((host, port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection."""
        try:
            return super().get_request()
        except OSError:  # it stays where it is, so that without a pause this would be tried all the time
            time.sleep(BREATH)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread for a connection, if there is room."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, on the connection's own thread: a handshake holds up nobody else."""
        try:
            request.settimeout(TIMEOUT)
            if self._context is not None:
                request = self._context().wrap_socket(request, server_side=True)
        except OSError as error:  # ssl.SSLError is one
            log.debug("a scrape failed: %s", error)
            self.shutdown_request(request)
        else:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Whoever scrapes has gone."""
        log.debug("a scrape failed", exc_info=True)
