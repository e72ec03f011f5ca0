"""Connections as data: what is sent over each, and what must come of it. Each is made from a seed and a number."""

import base64
import random
import struct
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from hpack import Encoder

from bench.fuzz.calls import Call, Judges
from bench.fuzz.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW,
    LARGEST_FRAME,
    MAX_FRAME,
    MAX_HEADERS,
    MAX_STREAMS,
    PING,
    PREFACE,
    PRIORITY,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    block,
    call_headers,
    frame,
    message,
    settings,
)
from bench.fuzz.judge import OK
from bench.fuzz.sound import Sound
from bench.fuzz.subject import METHODS, OURS, Method, Subject
from bench.fuzz.wrong import KINDS, Frames, flood, in_frames

SHARES = {"right": 20, "wrong": 60, "flood": 4, "shuffled": 10, "bytes": 6}
"""What a connection is made of: only what is right; the same with wrong frames among it; very many frames of one kind;
right frames in no order, or damaged; bytes of no kind, or of other protocols."""

OPENINGS = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
    b"POST /limelight.v1.LimelightService/Generate HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    b"GET /" + b"a" * 70_000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
    b"SSH-2.0-OpenSSH_9.7\r\n",
    b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + PREFACE,
    b"\r\n\r\n\0\r\nQUIT\n" + b"\x21\x11\0\x0c" + bytes(12),  # PROXY protocol, version 2
    b"*1\r\n$4\r\nPING\r\n",
    b"EHLO example\r\n",
    b"\x05\x01\x00",
    b"\x10\x20\x00\x04MQTT\x04\x02\x00\x3c",
    b"\0\0\0\x08\x04\xd2\x16\x2f",
    PREFACE[:10],
    PREFACE[:-1] + b"x",
    PREFACE,
    PREFACE * 2,
    PREFACE + settings() + PREFACE,
    settings() + PREFACE,
    PREFACE + frame(PING, 0, 0, bytes(8)),  # before any settings
    b"",
)
"""How other protocols begin, and HTTP/2 nearly."""

ENDS = ("finish", "finish", "half", "reset")
"""How the client leaves: with all in order, with its own half closed first, or with a reset."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One connection.

    Attributes:
        origin: what it is made of.
        writes: what is sent, one after the other.
        frames: how many those are, or writes, where they are no frames.
        port: of the server: "port", "admin_port" or "metrics_port".
        end: how the client leaves.
        answered: streams that must end with status 0; none where something is wrong.
    """

    origin: str
    writes: tuple[bytes, ...]
    frames: int
    port: str = "port"
    end: str = "finish"
    answered: tuple[int, ...] = ()

    def written(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"writes": [base64.b64encode(one).decode() for one in self.writes]}

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Session":
        """From JSON."""
        writes = tuple(map(base64.b64decode, values["writes"]))
        return cls(**values | {"writes": writes, "answered": tuple(values["answered"])})


class Sessions:
    """Makes connections.

    Args:
        subject: what is asked.
        judges: say which requests are answered for certain.
        seed: of all that is random.
    """

    def __init__(self, subject: Subject, judges: Judges, seed: int) -> None:
        self._subject, self._judges, self._seed = subject, judges, seed

    def session(self, number: int) -> Session:
        """The connection of a number."""
        draw = random.Random(f"session {self._seed} {number}")
        origin = draw.choices(tuple(SHARES), tuple(SHARES.values()))[0]
        if origin == "bytes":
            return _bytes(draw)
        if origin == "flood":
            kind, frames = flood(draw, 1, _path(draw))
            return _session(draw, f"flood of {kind}", [settings(), *frames])
        streams = range(1, 2 * draw.choice((1, 2, 3, 8)), 2)
        frames = self._right(draw, streams)
        if origin == "right":
            return _session(draw, origin, frames, answered=tuple(streams))
        if origin == "shuffled":
            return _session(draw, origin, _shuffled(draw, frames))
        names = []
        for _ in range(draw.choice((1, 1, 2, 3))):
            names.append(draw.choice(tuple(KINDS)))
            place = draw.randrange(len(frames) + 1)
            stream = 2 * draw.randint(0, 12) + 1
            frames[place:place] = KINDS[names[-1]](draw, stream, _path(draw))
        return _session(draw, f"wrong {names[0]}", frames)

    def _right(self, draw: random.Random, streams: range) -> Frames:
        """Calls that must be answered, their frames between each other's as far as they may be."""
        encoder = Encoder()
        made = [self._call(draw, stream, encoder) for stream in streams]
        frames = [settings(_settings(draw)), frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**24))]
        opened: list[Frames] = []
        while made or any(opened):
            waiting = [one for one in opened if one]
            if made and (not waiting or draw.random() < 0.4):
                head, body = made.pop(0)
                frames += head
                opened.append(body)
            else:
                frames.append(draw.choice(waiting).pop(0))
            if draw.random() < 0.1:
                frames.append(_harmless(draw))
        return frames

    def _call(self, draw: random.Random, stream: int, encoder: Encoder) -> tuple[Frames, Frames]:
        """The frames of a call that is answered: its headers, which nothing may come between, and its message."""
        method, octets = self._request(draw)
        headers = call_headers(method.path.encode())
        if draw.random() < 0.2:
            headers = {**headers, b"x-request-id": b"mine", b"user-agent": b"by-hand", b"any-bin": b"AAAA"}
        if draw.random() < 0.2:
            headers[b"grpc-timeout"] = draw.choice((b"60S", b"1H", b"99999999m"))
        packed = encoder.encode(headers.items()) if draw.random() < 0.5 else block(headers.items())
        head = in_frames(draw, stream, packed, 0)
        if len(head) == 1 and draw.random() < 0.2:
            payload = struct.pack(">IB", 0, 16) + packed
            head = [frame(HEADERS, END_HEADERS | WITH_PRIORITY, stream, payload)]
        return head, _pieces(draw, stream, message(octets))

    def _request(self, draw: random.Random) -> tuple[Method, bytes]:
        """A request that is answered for certain, of a call that takes one."""
        while True:
            method = draw.choice([one for one in METHODS if one.service == OURS and not one.streams_in])
            octets = Sound(self._subject, draw).request(method).SerializeToString()
            if self._judges.verdict(Call(path=method.path, messages=(octets,), origin="")).codes == {OK}:
                return method, octets


def _session(draw: random.Random, origin: str, frames: Frames, answered: tuple[int, ...] = ()) -> Session:
    """The frames after the preface, in writes of any size."""
    count, writes, together = len(frames), [PREFACE], draw.choice((1, 2, 5, 1000))
    writes += [b"".join(frames[first : first + together]) for first in range(0, count, together)]
    if draw.random() < 0.1:  # cut up where no frame ends
        whole = b"".join(writes)
        size = draw.choice((1, 7, 100)) if len(whole) < 2000 else 1000
        writes = [whole[first : first + size] for first in range(0, len(whole), size)]
    admin = not answered and draw.random() < 0.15
    end = "finish" if answered else draw.choice(ENDS)
    port = "admin_port" if admin else "port"
    return Session(origin=origin, writes=tuple(writes), frames=count, port=port, end=end, answered=answered)


def _bytes(draw: random.Random) -> Session:
    """What is no HTTP/2."""
    opening = draw.choice((*OPENINGS, draw.randbytes(draw.choice((1, 9, 24, 500)))))
    writes = (opening, *(draw.randbytes(draw.choice((1, 9, 300, 5000))) for _ in range(draw.randrange(4))))
    port = draw.choice(("port", "port", "port", "admin_port", "metrics_port"))
    return Session(origin="bytes", writes=writes, frames=len(writes), port=port, end=draw.choice(ENDS))


def _path(draw: random.Random) -> bytes:
    return draw.choice(METHODS).path.encode()


def _settings(draw: random.Random) -> list[tuple[int, int]]:
    """What a client may say of itself, with room enough for every answer."""
    may = (
        (HEADER_TABLE_SIZE, draw.choice((0, 100, 4096, 65536))),
        (MAX_STREAMS, draw.choice((0, 100))),
        (MAX_FRAME, draw.choice((LARGEST_FRAME, 2**20, 2**24 - 1))),
        (MAX_HEADERS, 65536),
        (0xFE03, 1),
        (0x4A4A, 7),
    )
    return [(INITIAL_WINDOW, 2**24), *(pair for pair in may if draw.random() < 0.2)]


def _harmless(draw: random.Random) -> bytes:
    """A frame that changes nothing."""
    return draw.choice(
        (
            frame(PRIORITY, 0, draw.choice((1, 3, 101)), struct.pack(">IB", 0, 7)),
            frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 5)),
            frame(99, 3, 0, b"of a kind that nobody knows"),
            settings([(INITIAL_WINDOW, 2**24)]),
        )
    )


def _pieces(draw: random.Random, stream: int, octets: bytes) -> Frames:
    """A message in one frame or in several, some of them empty. Not padded: gRPC reads no padding."""
    cuts = sorted(draw.randrange(len(octets) + 1) for _ in range(draw.choice((0, 0, 1, 2, 6))))
    *parts, last = (octets[first:last] for first, last in pairwise([0, *cuts, len(octets)]))
    return [*(frame(DATA, 0, stream, part) for part in parts), frame(DATA, END_STREAM, stream, last)]


def _shuffled(draw: random.Random, frames: Frames) -> Frames:
    """Right frames that are not right together."""
    chosen = draw.randrange(4)
    if chosen == 0:
        draw.shuffle(frames)
    elif chosen == 1:
        frames = [one for one in frames if draw.random() < 0.7]
    elif chosen == 2:
        frames = [one for one in frames for _ in range(draw.choice((1, 1, 2)))]
    else:
        frames = [_damaged(draw, one) if draw.random() < 0.2 else one for one in frames]
    return frames


def _damaged(draw: random.Random, octets: bytes) -> bytes:
    changed = bytearray(octets)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)
