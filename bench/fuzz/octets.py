"""Messages as bytes, and what can be wrong with them there: https://protobuf.dev/programming-guides/encoding/."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from bench.fuzz.grammar import string_fields
from bench.fuzz.values import binary

Descriptor = Any  # of a message: protobuf has two classes of them, of which its types know one

VARINT, FIXED64, LENGTH, GROUP, GROUP_END, FIXED32 = range(6)

NOT_UTF8 = (b"\xff", b"\xff\xfe", b"\xed\xa0\x80", b"ab\xc0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"abc\x80")
"""Bytes that are no text: no UTF-8 at all, a lone surrogate, too long for what they say, beyond Unicode, cut off."""


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    number &= 2**64 - 1
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    return bytes((*written, number))


def tag(number: int, kind: int) -> bytes:
    """What stands before a field's value."""
    return varint(number << 3 | kind)


def _anything(draw: random.Random, descriptor: Descriptor) -> bytes:
    """A field that is known, or not, with a value of some wire type."""
    known = [field.number for field in descriptor.fields]
    number = draw.choice((*known, *known, 15, 100, 1000, 19000, 2**28, 2**29 - 1))
    kind = draw.randrange(6)
    values = {
        VARINT: varint(draw.choice((0, 1, 2**31, 2**63, 2**64 - 1))),
        FIXED64: draw.randbytes(8),
        LENGTH: varint(len(payload := binary(draw))) + payload,
        GROUP: tag(number, GROUP_END),
        GROUP_END: b"",
        FIXED32: draw.randbytes(4),
    }
    return tag(number, kind) + values[kind]


def _no_text(draw: random.Random, descriptor: Descriptor) -> bytes:
    """A text in which no text is."""
    fields = string_fields(descriptor)
    number = draw.choice(fields).number if fields else 1
    wrong = draw.choice(NOT_UTF8)
    return tag(number, LENGTH) + varint(len(wrong)) + wrong


def _odd(draw: random.Random, descriptor: Descriptor) -> bytes:  # noqa: ARG001
    """What no writer would write."""
    return draw.choice(
        (
            b"\0",  # field 0
            b"\x08" + b"\xff" * 9 + b"\x7f",  # a number of more than 64 bits
            b"\xff" * 11,  # a tag without end
            b"\x0f\x00",  # wire type 7
            b"\x0e\x00",
            tag(1, LENGTH) + varint(2**31),  # longer than there is room
            tag(2, LENGTH) + varint(2**63),
            tag(100, GROUP) * 200,  # deeper than anybody reads
            tag(100, GROUP) * 50 + tag(100, GROUP_END) * 50,
            tag(3, LENGTH) + b"\x80\x80\x80\x80\x00",  # a length written too long
        )
    )


def _cut(draw: random.Random, message: bytes) -> bytes:
    return message[: draw.randrange(len(message) + 1)]


def _flip(draw: random.Random, message: bytes) -> bytes:
    changed = bytearray(message)
    for _ in range(draw.choice((1, 1, 2, 5)) if message else 0):
        changed[draw.randrange(len(message))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _repeat(draw: random.Random, message: bytes) -> bytes:
    """A stretch of it twice, or the whole: of what is no list, the last counts."""
    first, last = sorted(draw.randrange(len(message) + 1) for _ in range(2))
    return draw.choice((message + message, message[:last] + message[first:]))


def _drop(draw: random.Random, message: bytes) -> bytes:
    first, last = sorted(draw.randrange(len(message) + 1) for _ in range(2))
    return message[:first] + message[last:]


def _insert(draw: random.Random, message: bytes) -> bytes:
    place = draw.randrange(len(message) + 1)
    return message[:place] + draw.randbytes(draw.randint(1, 6)) + message[place:]


Change = Callable[[random.Random, bytes], bytes]
Addition = Callable[[random.Random, Descriptor], bytes]

CHANGES: Sequence[Change] = (_cut, _flip, _flip, _repeat, _drop, _insert)
ADDITIONS: Sequence[Addition] = (_anything, _anything, _anything, _no_text, _odd)


def spoil(draw: random.Random, message: bytes, descriptor: Descriptor) -> bytes:
    """A message with something wrong in it, or something that only looks wrong.

    Args:
        draw: what is random.
        message: as bytes.
        descriptor: of its type.
    """
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if draw.random() < 0.5:
            message = draw.choice(CHANGES)(draw, message)
        else:
            added = draw.choice(ADDITIONS)(draw, descriptor)
            message = draw.choice((added + message, message + added))
    return message
