"""The call that is being answered: its id and its trace, known wherever something is done for it."""

from __future__ import annotations  # a request knows of tickets, and these of requests

import random
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.jobs import Ticket
    from serve.models import Serving

ID_KEY = "x-request-id"
"""Metadata key of the id: a client may send its own, and is told it with the answer."""

GIVEN = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What an id may look like that a client sends: it stands in every line of the log."""


@dataclass(frozen=True)
class Request:
    """One call.

    Attributes:
        id: the client's own, or a new one of 12 hexadecimal digits.
        trace_id: 32 hexadecimal digits; empty where the call is not traced.
        on_job: told of each of its jobs in an engine, and the model, when the call waits for it no longer.
    """

    id: str
    trace_id: str = ""
    on_job: Callable[[Ticket, Serving], None] | None = None


_current: ContextVar[Request | None] = ContextVar("limelight_request", default=None)


def request_id(metadata: Mapping[str, str | bytes]) -> str:
    """The id that a client sent, or a new one."""
    given = metadata.get(ID_KEY)
    return given if isinstance(given, str) and GIVEN.fullmatch(given) else f"{random.getrandbits(48):012x}"


def enter(request: Request) -> None:
    """Let all that the task does from now on be done for a call."""
    _current.set(request)


def current() -> Request | None:
    """The call that something is being done for; None outside of all calls."""
    return _current.get()


def job_ended(ticket: Ticket, serving: Serving) -> None:
    """A call waits for one of its jobs no longer, whatever has come of it."""
    if ticket.request is not None and ticket.request.on_job is not None:
        ticket.request.on_job(ticket, serving)
