"""What a client is told of an error: a status code, a text for people, and `google.rpc` details for programs.

Details are what https://cloud.google.com/apis/design/errors names: `ErrorInfo` always; `BadRequest` with the field at
fault; `RetryInfo`, and the metadata that gRPC's own retries obey, where trying again may help.
"""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.descriptor import Descriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from model.errors import InvalidRequestError
from serve.errors import UNKNOWN_FAULT, QueueFullError, outcome_of
from serve.request import ID_KEY, current

log = logging.getLogger(__name__)

DOMAIN = "limelight"
"""Whose reasons they are: `google.rpc.ErrorInfo.domain`."""

LONGEST_MESSAGE = 1000
"""Bytes of a message; what a client sent may be quoted in it. In metadata it is up to three times as long, and details
hold it twice: clients take 8 KiB of metadata, and beyond that they tell of it instead of what was wrong."""

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"


@dataclass(frozen=True)
class Refusal:
    """The end of a call that failed."""

    code: grpc.StatusCode
    message: str
    reason: str
    field: str = ""
    """Path of the field at fault; empty where none is."""
    retry_after: float = 0.0
    """Seconds after which to try again; 0 where that does not help."""
    request_id: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Trailing metadata that say all of it."""
        about = {"request_id": self.request_id}
        details: list[Message] = []
        pushback = []
        if self.field:
            about["field"] = self.field
            violation = BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(BadRequest(field_violations=[violation]))
        if self.retry_after:
            milliseconds = round(1000 * self.retry_after)
            delay = Duration()
            delay.FromMilliseconds(milliseconds)
            details.append(RetryInfo(retry_delay=delay))
            pushback.append((PUSHBACK_KEY, str(milliseconds)))
        details.append(ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=about))
        status = Status(code=self.code.value[0], message=self.message, details=map(_packed, details))
        return ((DETAILS_KEY, status.SerializeToString()), (ID_KEY, self.request_id), *pushback)

    @property
    def unexpected(self) -> bool:
        """No fault of the client's, and none that was foreseen."""
        return self.code is UNKNOWN_FAULT.code


def refuse(error: Exception, request: object) -> Refusal:
    """What to tell of an error, as `refusal`; what is no client's fault is logged, under the call's id."""
    called = current()
    request_id = secrets.token_hex(6) if called is None else called.id
    refused = refusal(error, request, request_id)
    if refused.unexpected:
        log.error("request %s failed", request_id, exc_info=error)
    return refused


def refusal(error: Exception, request: object, request_id: str) -> Refusal:
    """What to tell of an error.

    Args:
        error: what went wrong; where it is not of `serve.errors.OUTCOMES`, nothing of it is told.
        request: the message that it went wrong with, if there was one: says where in it the field at fault is.
        request_id: what the server's log calls the request.
    """
    outcome = outcome_of(error)
    message = _short(str(error))
    if outcome is UNKNOWN_FAULT:
        message = f"internal error (request {request_id} in the server's log)"
    return Refusal(
        outcome.code,
        message,
        outcome.reason,
        field=_path(error.field, request) if isinstance(error, InvalidRequestError) else "",
        retry_after=error.retry_after if isinstance(error, QueueFullError) else 0.0,
        request_id=request_id,
    )


def _short(message: str) -> str:
    """A message, or as much of it as goes into metadata."""
    written = message.encode("utf-8", "replace")
    if len(written) <= LONGEST_MESSAGE:
        return message
    return f"{written[:LONGEST_MESSAGE].decode('utf-8', 'ignore')}…"


def _packed(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _path(field: str, request: object) -> str:
    """Where in the request a field is that an error names without the message around it."""
    if not isinstance(request, Message):
        return field
    first = field.split(".", maxsplit=1)[0]
    fields: Mapping[str, Any] = request.DESCRIPTOR.fields_by_name
    if first in fields:
        return field
    for name, descriptor in fields.items():
        inner: Descriptor | None = descriptor.message_type
        if inner is not None and first in inner.fields_by_name:
            return f"{name}.{field}"
    return field
