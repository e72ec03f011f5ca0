"""Unruly clients: a process of its own that keeps a server busy with what no good client does.

    python -m bench.load.crowds KIND PORT COUNT

It writes one line once the crowd is there, goes on until its standard input ends, and writes what it did as one line of
JSON. The kinds are

    idle     COUNT connections that begin with HTTP/2 and then say nothing; who is hung up on stays away
    silent   COUNT connections that say nothing at all, so that each waits for the handshake's end; who is hung up on
             comes again, so many times a second at most
    resets   COUNT connections, each of which begins calls and resets them at once, as fast as they are taken
"""

import json
import os
import resource
import selectors
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from enum import StrEnum

from bench.load import frames
from bench.load.frames import Frame
from serve.pb.limelight.v1 import limelight_pb2 as pb

ADDRESSES = [f"127.0.0.{number}" for number in range(2, 10)]
"""Of this machine, that connections come from in turn: others than good clients come from."""

AGAIN = 1000
"""Connections a second that come again at most."""

BATCH = 100
"""Calls that are begun and reset with one write."""

PATIENCE = 30.0
"""Seconds for a connection to be taken by the system."""

SPARE = 64
"""Open files besides connections."""

BEGINNING = frames.PREFACE + frames.encoded(Frame(frames.SETTINGS))


class Kind(StrEnum):
    """The kinds of crowds."""

    IDLE = "idle"
    SILENT = "silent"
    RESETS = "resets"


class Crowd:
    """Connections to one port, none of which blocks.

    Args:
        port: of a server on this machine.

    Attributes:
        counts: what was done: "opened", "hung up", "resets".
        there: connections that are open.
    """

    def __init__(self, port: int) -> None:
        self._port, self.there = port, 0
        self._selector = selectors.DefaultSelector()
        self.counts = Counter[str]()

    def open(self, first: bytes, events: int = selectors.EVENT_READ) -> None:
        """Another connection, and what it says at first."""
        source = ADDRESSES[self.counts["opened"] % len(ADDRESSES)]
        self.counts["opened"] += 1
        opened = socket.create_connection(("127.0.0.1", self._port), PATIENCE, (source, 0))
        try:
            opened.sendall(first)
        except OSError:  # hung up on already
            opened.close()
            self.counts["hung up"] += 1
            return
        opened.setblocking(False)
        self._selector.register(opened, events, 1)
        self.there += 1

    def heed(self, timeout: float, write: Callable[[socket.socket, int], int] | None = None) -> None:
        """Take what the server says, close what it has hung up on, and write where there is room.

        Args:
            timeout: seconds to wait for anything.
            write: given a connection and the number of its next stream; returns the one after what it has written.
        """
        for key, events in self._selector.select(timeout):
            opened = key.fileobj
            if not isinstance(opened, socket.socket):
                continue
            try:
                if events & selectors.EVENT_READ and not opened.recv(65536):
                    raise ConnectionResetError
                if write is not None and events & selectors.EVENT_WRITE:
                    self._selector.modify(opened, key.events, write(opened, key.data))
            except OSError:
                self._selector.unregister(opened)
                opened.close()
                self.counts["hung up"] += 1
                self.there -= 1

    def close(self) -> None:
        """All of them."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()


class Resetting:
    """Begins calls and resets them; what a connection has no room for is written later."""

    def __init__(self, counts: Counter[str]) -> None:
        service = pb.DESCRIPTOR.services_by_name["LimelightService"].full_name
        self._headers, self._counts = frames.headers(f"/{service}/Generate", 1), counts
        self._left: dict[socket.socket, bytes] = {}

    def __call__(self, opened: socket.socket, stream: int) -> int:
        """Write once; returns the next stream's number."""
        data = self._left.pop(opened, b"")
        if not data:
            for number in range(stream, stream + 2 * BATCH, 2):
                data += frames.encoded(
                    self._headers._replace(stream=number),
                    Frame(frames.RST_STREAM, 0, frames.CANCEL.to_bytes(4), number),
                )
            self._counts["resets"] += BATCH
            stream += 2 * BATCH
        if left := data[opened.send(data) :]:
            self._left[opened] = left
        return stream


def allow_files(count: int) -> None:
    """Let this process open so many connections.

    Raises:
        OSError: it may not.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + SPARE, most))


def unruly(kind: Kind, port: int, count: int, ready: Callable[[], None], ended: Callable[[], bool]) -> Counter[str]:
    """Be such a crowd.

    Args:
        kind: of which kind.
        port: of the server.
        count: connections.
        ready: told once they are there.
        ended: asked all the time whether to stop.

    Returns:
        What was done, counted.
    """
    crowd = Crowd(port)
    first = b"" if kind is Kind.SILENT else BEGINNING
    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if kind is Kind.RESETS else 0)
    write = Resetting(crowd.counts) if kind is Kind.RESETS else None
    for _ in range(count):
        crowd.open(first, events)
        crowd.heed(0.0)
    ready()
    begun, again = time.monotonic(), 0
    while not ended():
        crowd.heed(0.01, write)
        while kind is Kind.SILENT and crowd.there < count and again < AGAIN * (time.monotonic() - begun):
            crowd.open(first)
            again += 1
    crowd.counts["there"] = crowd.there
    crowd.close()
    return crowd.counts


def main(kind: str, port: str, count: str) -> None:
    """See the module."""
    allow_files(int(count))
    os.set_blocking(0, False)

    def ended() -> bool:
        try:
            return os.read(0, 1) == b""
        except BlockingIOError:
            return False

    counts = unruly(Kind(kind), int(port), int(count), lambda: print("ready", flush=True), ended)
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
