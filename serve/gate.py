"""Who is turned away at the door, before anything of a call is read.

When many times more is asked than can be answered, most of what a server does is to refuse, and what that takes, the
answers lack. So calls that find the queue full, or cannot be answered in time, are known by their client and deadline
alone, as far as these tell. Whoever is let in is looked at again, exactly, when it is known what is asked for.
"""

from __future__ import annotations  # grpc's classes are generic to mypy alone

from typing import Any

import grpc

from serve.access import Access
from serve.errors import PermissionDeniedError, QueueFullError, ServeError, UnauthenticatedError
from serve.jobs import deadline_in
from serve.models import Models
from serve.service import client_of

GUARDED = frozenset(
    (
        "/limelight.v1.LimelightService/Generate",
        "/limelight.v1.LimelightService/GenerateChunked",
        "/limelight.v1.LimelightService/GenerateStream",
        "/inference.GRPCInferenceService/ModelInfer",
    )
)
"""Calls of one search. Streams of many have an answer for each, and scoring takes less time than searches tell."""


class Gate:
    """Stands there.

    Args:
        models: that answer. Which one a call is for is not known yet: one that has room is enough to let it in.
        access: says whose call it is.
        client_header: see `ServerOptions`.
    """

    def __init__(self, models: Models, access: Access, client_header: str | None) -> None:
        self._models, self._access, self._client_header = models, access, client_header

    def refusal(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> ServeError | None:
        """Why a call is turned away; None where it is let in."""
        if method not in GUARDED:
            return None
        engines = [serving.engine for serving in self._models]
        if not engines or not all(engine.waiting for engine in engines):
            return None
        try:
            self._access.let_in(method, context.invocation_metadata() or ())
        except (UnauthenticatedError, PermissionDeniedError):
            return None  # it is told that inside, as always
        client, deadline = client_of(context, self._client_header), deadline_in(context.time_remaining())
        refusals = [engine.refusal(client, deadline) for engine in engines]
        if None in refusals:
            return None
        full = [refusal for refusal in refusals if isinstance(refusal, QueueFullError)]
        return min(full, key=lambda refusal: refusal.retry_after) if full else refusals[0]
