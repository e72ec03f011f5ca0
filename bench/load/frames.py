"""HTTP/2 by hand, for clients that gRPC would not be: a connection, frame by frame (RFC 9113)."""

import socket
import struct
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

PATIENCE = 60.0
"""Seconds that connecting, and each wait for a frame, may take."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACKNOWLEDGED, END_STREAM, END_HEADERS = 1, 1, 4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4
INTERNAL_ERROR, CANCEL, ENHANCE_YOUR_CALM = 2, 8, 11


class Frame(NamedTuple):
    """One frame."""

    kind: int
    flags: int = 0
    payload: bytes = b""
    stream: int = 0

    @property
    def error(self) -> int:
        """Of a GOAWAY: the error code."""
        return int.from_bytes(self.payload[4:8])

    @property
    def settings(self) -> dict[int, int]:
        """Of SETTINGS."""
        return dict(struct.iter_unpack(">HI", self.payload))


@contextmanager
def connection(port: int, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    """A connection to this machine, from one of its addresses, on which nothing has been sent."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE, (source, 0)) as opened:
        yield opened


def begin(opened: socket.socket, settings: Frame | None = None) -> Generator[Frame, None, None]:
    """Say what is to be spoken, and how; gives what `received` does."""
    opened.sendall(PREFACE)
    send(opened, settings or Frame(SETTINGS))
    return received(opened)


def send(opened: socket.socket, *frames: Frame) -> None:
    """All at once."""
    opened.sendall(encoded(*frames))


def call(
    opened: socket.socket, method: str, message: bytes, stream: int = 1, metadata: Mapping[str, str] | None = None
) -> None:
    """Begin a call with one message."""
    data = b"\0" + len(message).to_bytes(4) + message
    send(opened, headers(method, stream, metadata), Frame(DATA, END_STREAM, data, stream))


def headers(method: str, stream: int, metadata: Mapping[str, str] | None = None) -> Frame:
    """How a call begins; what it says is in Latin-1, so that bytes can be sent that are no text."""
    about = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "test",
        "te": "trailers",
        "content-type": "application/grpc",
        **(metadata or {}),
    }
    block = b"".join(b"\0" + _word(name) + _word(value) for name, value in about.items())
    return Frame(HEADERS, END_HEADERS, block, stream)


def encoded(*frames: Frame) -> bytes:
    """As they are sent."""
    return b"".join(map(_encoded, frames))


def _encoded(frame: Frame) -> bytes:
    head = len(frame.payload).to_bytes(3) + bytes((frame.kind, frame.flags)) + frame.stream.to_bytes(4)
    return head + frame.payload


def _word(text: str) -> bytes:
    """As HPACK writes it without compression (RFC 7541, 5.2)."""
    return bytes((len(text),)) + text.encode("latin-1")


def received(opened: socket.socket) -> Generator[Frame, None, None]:
    """Each frame that comes, until the server hangs up."""
    with opened.makefile("rb") as stream, suppress(ConnectionResetError):
        while head := stream.read(9):
            yield Frame(head[3], head[4], stream.read(int.from_bytes(head[:3])), int.from_bytes(head[5:]))
