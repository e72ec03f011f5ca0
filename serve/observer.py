"""What is told of every call, in one place: figures, a line of the log, a span."""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import logging
import time
from typing import TYPE_CHECKING, Any

import grpc

from serve.logs import CALL, FIELDS
from serve.metrics import Metrics
from serve.request import ID_KEY, Request, enter, request_id
from serve.service import client_of

if TYPE_CHECKING:
    from serve.tracing import CallSpan, Tracing

log = logging.getLogger("serve.access")


class Observer:
    """Looks on while calls are answered.

    Args:
        metrics: told of each call's end.
        client_header: metadata key that names the client, as for the service.
        tracing: where calls are traced.
    """

    def __init__(self, metrics: Metrics, client_header: str | None = None, tracing: Tracing | None = None) -> None:
        self._metrics, self._client_header, self._tracing = metrics, client_header, tracing

    def begun(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> Observed:
        """A call has come; what its task does from now on is done for it.

        Args:
            method: with its service: /package.Service/Method.
            context: of the call, which is told its id.
        """
        metadata = dict(context.invocation_metadata() or ())
        identity, span = request_id(metadata), None
        request = Request(identity)
        if self._tracing is not None:
            span = self._tracing.begun(method, metadata, identity)
            request = Request(identity, span.trace_id, span.job)
        enter(request)
        context.set_trailing_metadata(((ID_KEY, identity),))
        return Observed(method, client_of(context, self._client_header), request, self._metrics, span)

    def stop(self, seconds: float) -> None:
        """Hand over what was not yet, as far as that can be done in time."""
        if self._tracing is not None:
            self._tracing.stop(seconds)


class Observed:
    """A call that is being answered.

    Attributes:
        client: whose it is, as far as is known.
    """

    def __init__(self, method: str, client: str, request: Request, metrics: Metrics, span: CallSpan | None) -> None:
        self._method, self.client, self._request = method.rpartition("/")[2], client, request
        self._metrics, self._span = metrics, span
        self._arrived = time.monotonic()

    def ended(self, code: grpc.StatusCode, reason: str) -> None:
        """It has ended so."""
        seconds = time.monotonic() - self._arrived
        self._metrics.ended(self._method, code.name, reason, seconds)
        if self._span is not None:
            self._span.ended(code, reason)
        fields = {
            "method": self._method,
            "code": code.name,
            "reason": reason,
            "seconds": round(seconds, 6),
            "client": self.client,
        }
        # The call by name: a stream that was cancelled may be cleaned up by another task.
        about = {CALL: self._request, FIELDS: fields}
        log.info("%s %s %s %.4f s %s", self._method, code.name, reason, seconds, self.client, extra=about)
