"""What is told of every call, in one place: figures, a line of the log, a span."""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import grpc

from serve.logs import CALL, FIELDS
from serve.metrics import Metrics
from serve.request import ID_KEY, Request, enter, request_id
from serve.service import client_of
from serve.status import Refusal, refusal

if TYPE_CHECKING:
    from serve.tracing import CallSpan, Tracing

log = logging.getLogger("serve.access")

LINES = 10
"""Calls turned away within a second that have a line in the log each; of the others, only how many they were."""


class Observer:
    """Looks on while calls are answered.

    Args:
        metrics: told of each call's end.
        client_header: metadata key that names the client, as for the service.
        tracing: where calls are traced.
    """

    def __init__(self, metrics: Metrics, client_header: str | None = None, tracing: Tracing | None = None) -> None:
        self._metrics, self._client_header, self._tracing = metrics, client_header, tracing
        self._away = 0  # calls turned away in this second

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

    def turned_away(self, method: str, context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> Refusal:
        """A call has ended before anything of it was read; returns what to tell it. Such calls are not traced.

        Args:
            method: as before.
            context: of the call.
            error: why.
        """
        identity = request_id(dict(context.invocation_metadata() or ()))
        refused = refusal(error, None, identity)
        name = _name(method)
        self._metrics.ended(name, refused.code.name, refused.reason, 0.0)
        if not self._away:
            asyncio.get_running_loop().call_later(1.0, self._tell_of_others)
        self._away += 1
        if self._away <= LINES:
            client = client_of(context, self._client_header)
            _tell(Request(identity), name, refused.code, refused.reason, 0.0, client)
        return refused

    def _tell_of_others(self) -> None:
        if (others := self._away - LINES) > 0:
            log.warning("%d more calls were turned away in this second", others)
        self._away = 0

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
        self._method, self.client, self._request = _name(method), client, request
        self._metrics, self._span = metrics, span
        self._arrived = time.monotonic()

    def ended(self, code: grpc.StatusCode, reason: str) -> None:
        """It has ended so."""
        seconds = time.monotonic() - self._arrived
        self._metrics.ended(self._method, code.name, reason, seconds)
        if self._span is not None:
            self._span.ended(code, reason)
        # The call by name: a stream that was cancelled may be cleaned up by another task.
        _tell(self._request, self._method, code, reason, seconds, self.client)


def _name(method: str) -> str:
    return method.rpartition("/")[2]


def _tell(request: Request, method: str, code: grpc.StatusCode, reason: str, seconds: float, client: str) -> None:
    """Log a call that has ended."""
    fields = {
        "method": method,
        "code": code.name,
        "reason": reason,
        "seconds": round(seconds, 6),
        "client": client,
    }
    about = {CALL: request, FIELDS: fields}
    log.info("%s %s %s %.4f s %s", method, code.name, reason, seconds, client, extra=about)
