"""Frames that no client should send: each kind as a function of chance, and of the stream that they are about."""

import gzip
import random
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from bench.fuzz.http2 import (
    ACKNOWLEDGED,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW,
    LARGEST_FRAME,
    LARGEST_WINDOW,
    MAX_FRAME,
    MAX_HEADERS,
    MAX_STREAMS,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    block,
    call_headers,
    frame,
    integer,
    literal,
    message,
    settings,
    word,
)

Frames = list[bytes]
Wrong = Callable[[random.Random, int, bytes], Frames]
"""Frames of a kind.

Args:
    draw: what is random.
    stream: number of one that is not open yet.
    path: of a method.
"""

NUMBERS = (0, 1, 2, 3, 100, 2**16, 2**24 - 1, 2**24, LARGEST_WINDOW, 2**31, 2**32 - 1)


def wrong_settings(draw: random.Random, stream: int, path: bytes) -> Frames:  # noqa: ARG001
    """Settings out of range, unknown, cut off, very many, or of a stream."""
    names = (0, HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME, MAX_HEADERS, 7, 0xFE03, 0xFFFF)
    pairs = [(draw.choice(names), draw.choice(NUMBERS)) for _ in range(draw.choice((1, 1, 3, 50, 2700)))]
    return [
        draw.choice(
            (
                settings(pairs[:1]),
                settings(pairs),
                settings(pairs, ACKNOWLEDGED),
                settings(pairs, 0, stream),
                settings(flags=ACKNOWLEDGED) * 3,
                frame(SETTINGS, 0, 0, draw.randbytes(draw.choice((1, 5, 7, 11)))),
                settings([(INITIAL_WINDOW, 0)]) + settings([(INITIAL_WINDOW, LARGEST_WINDOW)]),
                settings([(HEADER_TABLE_SIZE, 0)]) + settings([(HEADER_TABLE_SIZE, 2**32 - 1)]),
                settings([(MAX_HEADERS, 1)]),
            )
        )
    ]


def wrong_blocks(draw: random.Random, stream: int, path: bytes) -> Frames:
    """Headers that HPACK does not allow, or only just (RFC 7541)."""
    good = block(call_headers(path).items())
    bad = draw.choice(
        (
            b"\x80",  # entry 0
            integer(62, 7, 0x80),  # beyond the table
            integer(2**20, 7, 0x80),
            b"\xff" + b"\xff" * 12,  # a number without end
            b"\xff\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",  # zeros before the end
            b"\x00\x7f\xff\xff\xff\x7f",  # a name that is longer than all
            b"\x00" + word(b"a") + b"\x05ab",  # a value that is cut off
            b"\x00\x81\xff" + word(b"b"),  # Huffman's padding alone
            b"\x00\x84\xff\xff\xff\xff" + word(b"b"),  # Huffman's end of string
            integer(2**20, 5, 0x20),  # a table larger than allowed
            integer(0, 5, 0x20) + integer(4096, 5, 0x20) + integer(0, 5, 0x20),
            good + integer(0, 5, 0x20),  # the table's size in the midst
            b"\x40" + word(b"x" * 4000) + word(b"y" * 4000),  # larger than the table
            b"\x00",
            draw.randbytes(draw.randint(1, 60)),
        )
    )
    payload = draw.choice((bad, bad + good, good + bad, good[: draw.randrange(len(good))] + bad))
    flags = draw.choice((END_HEADERS, END_HEADERS | END_STREAM))
    return [frame(HEADERS, flags, stream, payload)]


TIMEOUTS = (b"", b"1", b"S", b"-1S", b"99999999H", b"999999999999S", b"1X", b"0n", b"1e3S", b" 1S", b"1 S", b"\xff")
NOT_ASCII = (
    b"\xff\xfe",
    b"a\x80b",
    b"\xc3\xa9",
    b"\xed\xa0\x80",
    b"a\0b",
    b"a\nb",
    b"a\r\nb: c",
    b"\x7f",
    b" a ",
    b"\t",
)


def wrong_headers(draw: random.Random, stream: int, path: bytes) -> Frames:
    """Headers that can be read, and say what makes no sense."""
    about = call_headers(path)
    odd = draw.choice(NOT_ASCII)
    changes: Sequence[Mapping[bytes, bytes | None]] = (
        {b":method": draw.choice((b"GET", b"PUT", b"", b"post", odd))},
        {b":path": draw.choice((b"", b"*", b"/", path + odd, b"/" + odd, path + b"x" * 9000, b"http://x" + path))},
        {b":scheme": draw.choice((b"", b"ftp", odd))},
        {b":authority": draw.choice((b"", odd, b"x" * 5000))},
        {b"te": draw.choice((b"", b"gzip", odd))},
        {b"content-type": draw.choice((b"", b"text/html", b"application/grpc+json", b"application/grpcx", odd))},
        {draw.choice(list(about)): None},
        {b"grpc-timeout": draw.choice(TIMEOUTS)},
        {b"grpc-encoding": draw.choice((b"gzip", b"br", b"identity", b"", b"gzip,gzip", odd))},
        {b"grpc-accept-encoding": draw.choice((b"", b"x" * 3000, odd))},
        {b"x-request-id": odd},
        {b"traceparent": odd, b"authorization": odd},
        {odd: b"a"},
        {b"": b"a"},
        {b"Upper": b"Case", b"UPPER": b"CASE"},
        {b"x-bin": draw.choice((b"!", b"=", b"YQ", b"YQ==,YQ==", b"Y", b"\xff"))},
        {b"connection": b"close", b"transfer-encoding": b"chunked", b"upgrade": b"h2c"},
        {b":status": b"200"},
        {b":unknown": b"a"},
        {b"content-length": draw.choice((b"0", b"-1", b"5", b"99999999999999999999"))},
        {b"grpc-previous-rpc-attempts": odd, b"user-agent": odd},
        {b"grpc-status": b"0", b"grpc-message": odd},
        {b"grpc-internal-encoding-request": b"gzip", b"grpc-tags-bin": b"AAAA", b"grpc-trace-bin": b"AAAA"},
        {b"host": odd, b"cookie": b"a=b; " * 200},
        {b"x-%d" % number: b"y" * 50 for number in range(draw.choice((10, 200)))},
    )
    changed = draw.choice(changes)
    named = [(name, value) for name, value in {**about, **changed}.items() if value is not None]
    if draw.random() < 0.2:
        draw.shuffle(named)  # what begins with a colon is no longer first
    if draw.random() < 0.2:
        named.append(draw.choice(named))
    body = frame(DATA, END_STREAM, stream, message(b""))
    return [*in_frames(draw, stream, block(named), 0), body]


def in_frames(draw: random.Random, stream: int, octets: bytes, flags: int) -> Frames:
    """Headers, in one frame or in several."""
    cuts = sorted(draw.randrange(len(octets) + 1) for _ in range(draw.choice((0, 0, 0, 1, 3)))) if octets else []
    cuts += range(LARGEST_FRAME, len(octets), LARGEST_FRAME)
    edges = [0, *sorted(cuts), len(octets)]
    parts = [octets[first:last] for first, last in pairwise(edges)]
    kinds = [(HEADERS, flags), *[(CONTINUATION, 0)] * (len(parts) - 1)]
    kinds[-1] = (kinds[-1][0], kinds[-1][1] | END_HEADERS)
    return [frame(kind, flag, stream, part) for (kind, flag), part in zip(kinds, parts, strict=True)]


def wrong_streams(draw: random.Random, stream: int, path: bytes) -> Frames:
    """Headers and data of streams that cannot be, or are not any more."""
    good = block(call_headers(path).items())
    number = draw.choice((0, 2, stream + 1, 1, stream, 2**31 - 1, 2**31 + stream))
    opened = frame(HEADERS, END_HEADERS, stream, good)
    return draw.choice(
        (
            [frame(HEADERS, END_HEADERS, number, good)],
            [frame(DATA, draw.choice((0, END_STREAM)), number, message(b""))],
            [opened, frame(HEADERS, END_HEADERS | END_STREAM, stream, good)],  # trailers of a client
            [opened, frame(HEADERS, END_HEADERS, stream, good)],
            [opened, frame(DATA, END_STREAM, stream, message(b"")), frame(DATA, END_STREAM, stream, message(b""))],
            [frame(HEADERS, END_HEADERS | END_STREAM, stream, good)],  # a call without a message
            [opened, frame(DATA, END_STREAM, stream, b"")],
            [frame(HEADERS, END_HEADERS | WITH_PRIORITY, stream, struct.pack(">IB", stream, 5) + good)],
            [frame(HEADERS, END_HEADERS | PADDED, stream, b"\x07" + good + bytes(7))],  # which gRPC does not read
            [opened, frame(DATA, END_STREAM | PADDED, stream, b"\x07" + message(b"\x12\x01a") + bytes(7))],
            [frame(HEADERS, END_HEADERS | PADDED, stream, b"\xff" + good)],
            [frame(HEADERS, END_HEADERS | PADDED, stream, b"")],
            [frame(HEADERS, END_HEADERS | WITH_PRIORITY, stream, b"ab")],
            [frame(HEADERS, 0, stream, good), frame(PING, 0, 0, bytes(8))],  # in the midst of headers
            [frame(HEADERS, 0, stream, good), frame(CONTINUATION, END_HEADERS, stream + 2, b"")],
            [frame(CONTINUATION, END_HEADERS, stream, good)],
            [frame(HEADERS, 0, stream, good)],  # headers that never end
            [frame(PUSH_PROMISE, END_HEADERS, stream, struct.pack(">I", stream + 1) + good)],
        )
    )


def wrong_data(draw: random.Random, stream: int, path: bytes) -> Frames:
    """Messages whose prefix, length or compression is not so."""
    encoding = draw.choice((b"identity", b"gzip", b"gzip", b"deflate", b"br"))
    opened = frame(HEADERS, END_HEADERS, stream, block(call_headers(path, grpc_encoding=encoding).items()))
    bomb = gzip.compress(bytes(draw.choice((10_000, 8_000_000))), 9, mtime=0)
    octets = draw.choice(
        (
            b"\0",
            b"\0\0\0",
            message(b"", 1),
            message(b"\x12\x03abc", 1),
            message(b"", draw.choice((2, 3, 127, 128, 255))),
            b"\0" + (100).to_bytes(4) + b"abc",  # less than it says
            b"\0" + (2**32 - 1).to_bytes(4) + b"abc",
            b"\0" + (4 * 1024 * 1024 + 1).to_bytes(4) + b"abc",
            message(b"\x12\x01a") * draw.choice((2, 5)),
            message(b"\x12\x01a") + b"\0\0",
            message(gzip.compress(b"\x12\x01a", mtime=0), 1),
            message(gzip.compress(b"\x12\x01a", mtime=0)[:-3], 1),
            message(zlib.compress(b"\x12\x01a"), 1),
            message(bomb[: LARGEST_FRAME - 5], 1),
            draw.randbytes(draw.randint(1, 100)),
        )
    )
    ended = draw.choice((END_STREAM, END_STREAM, 0))
    pieces: Frames = draw.choice(
        (
            [frame(DATA, ended, stream, octets)],
            [
                *(frame(DATA, 0, stream, octets[place : place + 1]) for place in range(min(40, len(octets)))),
                frame(DATA, ended, stream, octets[40:]),
            ],
            [
                frame(DATA, ended | PADDED, stream, bytes((len(octets) + 9,)) + octets)
                if len(octets) < 200
                else frame(DATA, ended, stream, octets)
            ],
            [frame(DATA, PADDED, stream, b"")],
            [frame(DATA, ended, stream, octets), frame(RST_STREAM, 0, stream, struct.pack(">I", 8))],
        )
    )
    return [opened, *pieces]


def wrong_control(draw: random.Random, stream: int, path: bytes) -> Frames:  # noqa: ARG001
    """Frames about streams and connection, of wrong lengths, numbers and places."""
    number = struct.pack(">I", draw.choice(NUMBERS))
    return draw.choice(
        (
            [frame(RST_STREAM, 0, draw.choice((0, 2, stream, 2**31 - 1)), number)],
            [frame(RST_STREAM, 0, 1, number[: draw.randrange(4)])],
            [frame(PING, draw.choice((0, ACKNOWLEDGED, 255)), draw.choice((0, stream)), draw.randbytes(8))],
            [frame(PING, 0, 0, draw.randbytes(draw.choice((0, 7, 9))))],
            [frame(GOAWAY, 0, draw.choice((0, stream)), number + number + b"goodbye" * draw.choice((0, 1, 1000)))],
            [frame(GOAWAY, 0, 0, number)],
            [frame(WINDOW_UPDATE, 0, draw.choice((0, 1, stream)), number)],
            [frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGEST_WINDOW))] * 3,
            [frame(WINDOW_UPDATE, 0, 0, number[:2])],
            [frame(PRIORITY, 0, draw.choice((0, 1, stream)), number + b"\xff")],
            [frame(PRIORITY, 0, stream, struct.pack(">IB", stream, 0))],  # of itself
            [frame(PRIORITY, 0, stream, number)],
            [
                frame(
                    draw.randrange(10, 256),
                    draw.randrange(256),
                    draw.choice((0, stream)),
                    draw.randbytes(draw.choice((0, 8, 900))),
                )
            ],
            [
                frame(
                    draw.randrange(256), draw.randrange(256), draw.getrandbits(31), draw.randbytes(draw.randint(0, 40))
                )
            ],
            [frame(DATA, 0, stream, bytes(LARGEST_FRAME + 1))],
            [frame(draw.randrange(10), 0, 0, b"", length=2**24 - 1)],
            [frame(HEADERS, END_HEADERS, stream, draw.randbytes(9), length=draw.choice((8, 10, 100)))],
            [draw.randbytes(draw.randint(1, 200))],
        )
    )


KINDS: Mapping[str, Wrong] = {
    "settings": wrong_settings,
    "header blocks": wrong_blocks,
    "headers": wrong_headers,
    "streams": wrong_streams,
    "data": wrong_data,
    "control": wrong_control,
}
"""All kinds, by name."""


def flood(draw: random.Random, stream: int, path: bytes) -> tuple[str, Frames]:
    """Very many frames of one kind; returns which."""
    good = block(call_headers(path).items())
    count, number = draw.choice((50, 300, 1000, 3000)), range(stream, stream + 200_000, 2)
    floods: Mapping[str, Callable[[], Frames]] = {
        "rapid resets": lambda: [
            part
            for one in number[: count // 2]
            for part in (frame(HEADERS, END_HEADERS, one, good), frame(RST_STREAM, 0, one, struct.pack(">I", 8)))
        ],
        "headers without end": lambda: [frame(HEADERS, END_HEADERS, one, good) for one in number[:count]],
        "continuations": lambda: [
            frame(HEADERS, 0, stream, good),
            *[frame(CONTINUATION, 0, stream, draw.choice((b"", literal(b"a", b"b" * 50))))] * count,
        ],
        "pings": lambda: [frame(PING, 0, 0, bytes(8))] * count,
        "settings": lambda: [settings([(INITIAL_WINDOW, 65535)])] * count,
        "acknowledgements": lambda: [settings(flags=ACKNOWLEDGED)] * count,
        "priorities": lambda: [frame(PRIORITY, 0, one, struct.pack(">IB", 0, 1)) for one in number[:count]],
        "empty data": lambda: [frame(HEADERS, END_HEADERS, stream, good), *[frame(DATA, 0, stream, b"")] * count],
        "windows": lambda: [frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1))] * count,
        "resets of nothing": lambda: [frame(RST_STREAM, 0, stream, struct.pack(">I", 8))] * count,
        "unknown frames": lambda: [frame(200, 0, 0, bytes(draw.choice((0, 100))))] * count,
        "tiny messages": lambda: [
            frame(HEADERS, END_HEADERS, stream, good),
            *[frame(DATA, 0, stream, message(b"")[:1])] * count,
        ],
    }
    name = draw.choice(tuple(floods))
    return name, floods[name]()
