"""HTTP/2 by hand (RFC 9113): frames as they are written, right or wrong, and what a server sends back."""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote

from hpack import Decoder, HPACKError

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

END_STREAM, ACKNOWLEDGED, END_HEADERS, PADDED, WITH_PRIORITY = 1, 1, 4, 8, 32

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME, MAX_HEADERS = range(1, 7)

LARGEST_FRAME = 16384
"""Bytes of a payload that every peer takes."""

LARGEST_WINDOW = 2**31 - 1


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", length: int | None = None) -> bytes:
    """A frame; its length is that of the payload, unless another is told."""
    said = len(payload) if length is None else length
    return said.to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def settings(values: Iterable[tuple[int, int]] = (), flags: int = 0, stream: int = 0) -> bytes:
    """SETTINGS."""
    return frame(SETTINGS, flags, stream, b"".join(struct.pack(">HI", *pair) for pair in values))


def integer(value: int, prefix: int, pattern: int = 0) -> bytes:
    """A number as HPACK writes it, in the lowest bits of a byte that begins with a pattern (RFC 7541, 5.1)."""
    most = (1 << prefix) - 1
    if value < most:
        return bytes((pattern | value,))
    written, value = bytearray((pattern | most,)), value - most
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes((*written, value))


def word(octets: bytes) -> bytes:
    """A string as HPACK writes it without compression (RFC 7541, 5.2)."""
    return integer(len(octets), 7) + octets


def literal(name: bytes, value: bytes, pattern: int = 0) -> bytes:
    """A header by name and value: by default one that is not kept in the table (RFC 7541, 6.2)."""
    return bytes((pattern,)) + word(name) + word(value)


def block(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers, compressed as little as can be."""
    return b"".join(literal(*pair) for pair in headers)


def call_headers(path: bytes, **others: bytes) -> dict[bytes, bytes]:
    """What gRPC wants to know of a call."""
    about = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"fuzz",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    return about | {name.replace("_", "-").encode(): value for name, value in others.items()}


def message(octets: bytes, flag: int = 0) -> bytes:
    """A message with its prefix: whether it is compressed, and how long it is."""
    return bytes((flag,)) + len(octets).to_bytes(4) + octets


class Status(NamedTuple):
    """How a stream has ended."""

    code: str
    """`grpc-status`, or, where there is none, what HTTP says."""
    text: str
    """`grpc-message`."""


@dataclass
class Received:
    """What a server has sent over a connection.

    Attributes:
        frames: that came.
        statuses: how streams have ended, by their numbers.
        ended: streams that the server has ended, with or without a status.
        goaway: error code with which it gave the connection up; None where it has not.
        damage: why nothing more of it can be understood; empty where it can.
    """

    frames: int = 0
    statuses: dict[int, Status] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    goaway: int | None = None
    damage: str = ""
    _left: bytes = b""
    _block: bytes = b""
    _flags: int = 0
    _decoder: Decoder = field(default_factory=lambda: Decoder(2**24))

    def __post_init__(self) -> None:
        self._decoder.max_allowed_table_size = 2**32

    def feed(self, octets: bytes) -> None:
        """Take in more bytes."""
        self._left += octets
        while not self.damage and len(self._left) >= 9:
            size = int.from_bytes(self._left[:3])
            if len(self._left) < 9 + size:
                return
            head, payload, self._left = self._left[:9], self._left[9 : 9 + size], self._left[9 + size :]
            self.frames += 1
            self._take(head[3], head[4], int.from_bytes(head[5:]), payload)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind > CONTINUATION:
            self.damage = f"a frame of type {kind}"
        elif kind in (HEADERS, CONTINUATION):
            if kind == HEADERS:
                self._block, self._flags = b"", flags
            self._block += payload  # gRPC neither pads nor gives priorities
            if flags & END_HEADERS:
                self._read_headers(stream)
        elif kind == GOAWAY and len(payload) >= 8:
            self.goaway = int.from_bytes(payload[4:8])
        elif kind == RST_STREAM or (kind == DATA and flags & END_STREAM):
            self.ended.add(stream)

    def _read_headers(self, stream: int) -> None:
        try:
            found: Mapping[bytes, bytes] = dict(self._decoder.decode(self._block, raw=True))
        except HPACKError as error:
            self.damage = f"headers that cannot be read: {error}"
            return
        if self._flags & END_STREAM:
            code = found.get(b"grpc-status", b"HTTP " + found.get(b":status", b"?"))
            text = unquote(found.get(b"grpc-message", b"").decode("utf-8", "replace"))
            self.statuses[stream] = Status(code.decode(), text)
            self.ended.add(stream)
