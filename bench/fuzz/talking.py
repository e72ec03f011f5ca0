"""Opens connections, sends what they are to send, and tells what has come back."""

import asyncio
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress

from bench.fuzz.http2 import Received
from bench.fuzz.sessions import Session

QUIET = 0.02
"""Seconds for which whoever sent something wrong waits for an answer."""

PATIENCE = 60.0
"""Seconds within which everything that is right is answered, and all that is sent is taken or refused."""

CUT_OFF = (ConnectionError, BrokenPipeError)
"""How a server that has hung up is noticed."""


class _Line(asyncio.Protocol):
    """One connection: what comes is read at once."""

    def __init__(self, session: Session) -> None:
        self.received, self._session = Received(), session
        self.answered, self.lost = asyncio.Event(), asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()

    def data_received(self, data: bytes) -> None:
        self.received.feed(data)
        if self._session.answered and set(self._session.answered) <= self.received.ended:
            self.answered.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.lost.set()
        self.room.set()
        self.answered.set()

    def pause_writing(self) -> None:
        self.room.clear()

    def resume_writing(self) -> None:
        self.room.set()


async def talk(session: Session, ports: Mapping[str, int]) -> tuple[Received, list[str]]:
    """Open a connection, and close it at the end.

    Args:
        session: what is sent.
        ports: of the server, by name.

    Returns:
        What came back, and what is wrong with it.
    """
    loop = asyncio.get_running_loop()
    try:
        transport, line = await asyncio.wait_for(
            loop.create_connection(lambda: _Line(session), "127.0.0.1", ports[session.port]), PATIENCE
        )
    except CUT_OFF as error:
        return Received(), [f"no connection: {type(error).__name__}"]
    except TimeoutError:
        return Received(), [f"no connection in {PATIENCE:g} s"]
    try:
        taken = await _sent(session, transport, line)
        if taken:
            with suppress(TimeoutError):
                await asyncio.wait_for(line.answered.wait(), PATIENCE if session.answered else QUIET)
    finally:
        _leave(session, transport, line)
    with suppress(TimeoutError):
        await asyncio.wait_for(line.lost.wait(), 1.0)
    failures = [] if taken else [f"what is sent was neither taken nor refused in {PATIENCE:g} s"]
    return line.received, [*failures, *_unanswered(session, line.received)]


async def _sent(session: Session, transport: asyncio.Transport, line: _Line) -> bool:
    """Send all of it, as far as the server takes it; returns whether it did, or hung up."""
    for write in session.writes:
        if line.lost.is_set():
            return True
        transport.write(write)
        try:
            await asyncio.wait_for(line.room.wait(), PATIENCE)
        except TimeoutError:
            return False
        await asyncio.sleep(0)
    return True


def _leave(session: Session, transport: asyncio.Transport, line: _Line) -> None:
    if session.end == "reset":
        opened = transport.get_extra_info("socket")
        if opened is not None and not line.lost.is_set():
            with suppress(OSError):
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    elif session.end == "half" and transport.can_write_eof() and not line.lost.is_set():
        with suppress(OSError):
            transport.write_eof()
        asyncio.get_running_loop().call_later(QUIET, transport.close)
    else:
        transport.close()


def _unanswered(session: Session, received: Received) -> list[str]:
    if not session.answered:
        return []
    if received.damage:
        return [f"the server sent {received.damage}"]
    ended = {stream: received.statuses.get(stream) for stream in session.answered}
    return [
        f"a call in frames that are right ended with {status if status is None else tuple(status)}"
        for status in ended.values()
        if status is None or status.code != "0"
    ][:1]
