"""What clients may hold of a server at a time: calls that have begun, and answers that they have not read.

Counted before anything of a call is read, so that calls that never say anything count too, and until gRPC has sent all
of its answer. A client here is an address: tokens are not looked at before there is a message.
"""

from __future__ import annotations  # grpc's classes are generic to mypy alone

from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc

from serve.errors import QueueFullError
from serve.room import peer_named

EIGHTHS = 7
"""Of what there is of each thing, that one client may have: others can always get in."""

UNREAD = 256 * 1024 * 1024
"""Bytes of answers that may wait to be read. HTTP/2 lets a client take as long as it likes."""

RETRY_AFTER = 1.0
"""Seconds after which who was refused is to try again."""


class Shares:
    """Counts them.

    Args:
        most: calls that may have begun and not ended; asked each time.
        unread: bytes of answers with one message that may wait to be read; streams have a timeout instead.
    """

    def __init__(self, most: Callable[[], int], unread: int) -> None:
        self._most, self._most_unread = most, unread
        self._calls, self._unread = Counter[str](), Counter[str]()

    def begun(self, context: grpc.aio.ServicerContext[Any, Any], *, bounded: bool = True) -> QueueFullError | None:
        """A call has begun; returns why it is to be refused, if it is.

        Args:
            context: of the call.
            bounded: it may be refused because of how many there are in all, not only of its own client.
        """
        host = peer_named(context.peer()).host
        _count(self._calls, host, 1, context)
        most = self._most()
        if bounded and self._calls.total() > most:
            return QueueFullError(
                f"{most} calls have begun and not ended, which is the limit: retry later", RETRY_AFTER
            )
        if self._calls[host] > _share(most):
            return QueueFullError(
                f"{_share(most)} calls of one client have begun and not ended, which is the limit: retry later",
                RETRY_AFTER,
            )
        return self._too_much_unread(host, 0)

    def answered(self, context: grpc.aio.ServicerContext[Any, Any], size: int) -> None:
        """An answer of so many bytes is about to be sent.

        Raises:
            QueueFullError: too much of what was answered before has not been read.
        """
        host = peer_named(context.peer()).host
        if self._unread[host] and (error := self._too_much_unread(host, size)):
            raise error
        _count(self._unread, host, size, context)

    def _too_much_unread(self, host: str, size: int) -> QueueFullError | None:
        own = self._unread[host] + size
        if own <= _share(self._most_unread) and self._unread.total() + size <= self._most_unread:
            return None
        megabytes = self._unread.total() / 2**20
        return QueueFullError(
            f"answers of {megabytes:.0f} MiB have not been read by their clients: read them first", RETRY_AFTER
        )


def _share(of: int) -> int:
    return of - of // (EIGHTHS + 1)


def _count(counts: Counter[str], host: str, size: int, context: Any) -> None:
    def ended(_: object) -> None:
        counts[host] -= size
        if not counts[host]:
            del counts[host]

    counts[host] += size
    context.add_done_callback(ended)
