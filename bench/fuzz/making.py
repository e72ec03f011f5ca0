"""Makes calls: each from a seed and a number of its own, so that any can be made again without those before it."""

import random
from collections.abc import Set as AbstractSet

from google.protobuf.message import DecodeError

from bench.fuzz.calls import Call
from bench.fuzz.grammar import change, fill
from bench.fuzz.octets import spoil
from bench.fuzz.sound import Sound
from bench.fuzz.subject import METHODS, OURS, VERSIONS, Method, Subject

ORIGINS = {"sound": 45, "changed": 25, "any": 10, "octets": 16, "noise": 3, "elsewhere": 1}
"""What messages come from, and how often: right ones; those with something in them changed; whatever protobuf's
description allows; right ones whose bytes were spoilt; bytes; and calls that there are not."""

OFTEN = {
    "Generate": 6.0,
    "GenerateStream": 3.0,
    "GenerateMany": 3.0,
    "GenerateChunked": 2.0,
    "Score": 2.0,
    "ModelInfer": 8.0,
    "ModelStreamInfer": 3.0,
    "ServerReflectionInfo": 0.2,
}
"""How often a call is made, where it is not as often as the others."""

SELDOM = {"LoadEntry": 0.02, "Reload": 0.05, "RepositoryModelLoad": 0.02}
"""The same of what costs the server a model: checked, copied and warmed up."""

ELSEWHERE = ("/", "/../etc", f"/{OURS}/Explain", "/limelight.v2.LimelightService/Generate", f"/{OURS}/", f"/{OURS}")

TIMEOUTS = (0.0, 0.000_001, 0.001, 0.003, 0.01, 0.05, 30.0)
CANCELS = (0.0, 0.001, 0.003, 0.01, 0.05)

METADATA: tuple[tuple[str, str | bytes], ...] = (
    ("x-request-id", "mine"),
    ("x-request-id", ""),
    ("x-request-id", "a b c%0a%s{}"),
    ("x-request-id", "x" * 2000),
    ("x-request-id-bin", b"\xff\x00"),
    ("traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"),
    ("traceparent", "00-zz"),
    ("authorization", "Bearer x"),
    ("authorization", ""),
    ("grpc-status-details-bin", b"\x08\x03"),
    ("grpc-previous-rpc-attempts", "5"),
    ("any-bin", bytes(range(256))),
    ("x" * 200, "y" * 200),
)
"""That may go with a call; one key more than once, too."""


class Maker:
    """Makes calls.

    Args:
        subject: what is asked.
        seed: of all that is random.
    """

    def __init__(self, subject: Subject, seed: int) -> None:
        self._subject, self._seed = subject, seed
        self._kept = {subject.name, *(f"entry-{version}" for version in VERSIONS)}
        self._weights = [OFTEN.get(one.name, SELDOM.get(one.name, 0.5)) for one in METHODS]

    def call(self, number: int) -> Call:
        """The call of a number."""
        draw = random.Random(f"call {self._seed} {number}")
        origin = draw.choices(tuple(ORIGINS), tuple(ORIGINS.values()))[0]
        if origin == "elsewhere":
            return self._elsewhere(draw)
        method = draw.choices(METHODS, self._weights)[0]
        messages = tuple(self._message(draw, method, origin) for _ in range(_count(draw, method)))
        given_up = draw.random() < 0.04 or method.name == "Watch"  # which never ends of itself
        return Call(
            path=method.path,
            messages=messages,
            origin=origin,
            admin=method.admin,
            streams=(method.streams_in or len(messages) != 1, method.streams_out or draw.random() < 0.02),
            timeout=draw.choice(TIMEOUTS) if draw.random() < 0.05 else None,
            cancel_after=draw.choice(CANCELS) if given_up else None,
            metadata=tuple(draw.choices(METADATA, k=draw.randint(1, 4))) if draw.random() < 0.05 else (),
            compression=draw.choice((1, 2)) if draw.random() < 0.05 else 0,
        )

    def _elsewhere(self, draw: random.Random) -> Call:
        path = draw.choice(ELSEWHERE)
        streams = (draw.random() < 0.2, draw.random() < 0.2)
        return Call(path=path, messages=(draw.randbytes(5),), origin="elsewhere", streams=streams)

    def _message(self, draw: random.Random, method: Method, origin: str) -> bytes:
        """A message; never one that would take away what every other call is to be answered by."""
        for _ in range(3):
            made = self._made(draw, method, origin)
            if not _takes_away(method, made, self._kept):
                return made
        return b""

    def _made(self, draw: random.Random, method: Method, origin: str) -> bytes:
        if origin == "noise":
            return draw.randbytes(draw.choice((0, 1, 2, 10, 100, 5000)))
        if origin == "any":
            message = method.request()
            fill(draw, message, self._subject.words)
            return message.SerializeToString()
        message = Sound(self._subject, draw).request(method)
        if origin == "changed":
            for _ in range(draw.choice((1, 1, 1, 2))):
                change(draw, message, self._subject.words)
        octets = message.SerializeToString()
        return spoil(draw, octets, message.DESCRIPTOR) if origin == "octets" else octets


def _count(draw: random.Random, method: Method) -> int:
    """Messages of a call: of those that take one, now and then not one."""
    if method.streams_in:
        return draw.choices((0, 1, 2, 5, 10, 20, 70), (3, 20, 20, 25, 20, 10, 1))[0]
    return draw.choices((1, 0, 2), (98, 1, 1))[0]


def _takes_away(method: Method, message: bytes, kept: AbstractSet[str]) -> bool:
    """It unloads what has one of these names."""
    if "Unload" not in method.name:
        return False
    try:
        request = method.request.FromString(message)
    except DecodeError:
        return False
    return any(value in kept for field, value in request.ListFields() if field.name.endswith("name"))
