"""Values worth trying, by the type that protobuf gives a field."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

Field = Any  # a field's descriptor: protobuf has two classes of them, of which its types know one

NEAR = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 20, 24, 25, 63, 64, 65, 127, 128, 255, 256, 257, 1000, 32767, 65535, 65536)
"""Numbers at which something here, or in most programs, has a limit."""

INTEGERS: Mapping[int, Sequence[int]] = {
    FieldDescriptor.CPPTYPE_INT32: (*NEAR, -1, -2, 1_000_000, 2**31 - 2, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_UINT32: (*NEAR, 1_000_000, 2**31, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (*NEAR, -1, -2, 2**31, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_UINT64: (*NEAR, 2**32, 2**62, 2**63, 2**64 - 1),
}
"""Of each integer type."""

FRACTIONS = (
    *(0.0, -0.0, 0.5, 1.0, -1.0, 0.01, 0.009999, 1e-6, 9e-7, 5e-324, 1e-300, 1.0000001, 10.0, 10.000001, 100.0),
    *(100.00001, 1e38, 1e308, -1e308, math.inf, -math.inf, math.nan),
)

LONGEST_TEXT = 100_000
"""Characters, of all but the rarest."""

HUGE_TEXT = 3_900_000
"""The same, of the rarest: a little less than gRPC takes."""

STRINGS = (
    *("", " ", "\n\t \u3000", "a", "abc", "x" * 63, "x" * 64, "a" * 24, "a" * 25, "x" * 256, "x" * 257),
    *("a\0b", "\0", "\0\0\0", "".join(map(chr, range(1, 32))), "\x7f\x80\x9f", "\ufeffabc", "\ufffe\uffff"),
    *(
        "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
        "\u202eabc\u202c",
        "\u05d0\u05d1\u05d2",
        "\u200f\u200e",
    ),
    *(
        "e\u0301",
        "a" + "\u0301" * 300,
        "\u0301\u0302",
        "\u6f22\u5b57\u304b\u306a",
        "\U0010ffff" * 8,
        "\ufdfa" * 4,
        "\u0130I\u0131i",
    ),
    *(
        "</s>",
        "<s>",
        "<pad>",
        "<unk>",
        "<s>abc</s>",
        "%s%n%x",
        "${jndi:x}",
        "{0}",
        "'; DROP TABLE rows; --",
        "a\r\nb: c",
    ),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "a/../b",
        "C:\\boot.ini",
        "~",
        "-1",
        "0",
        "1",
        "\u0661",
        "1e9",
        "nan",
    ),
    *("[1, 2]", "[0]", "[[]]", "[" * 2000, '["a"]', '{"a": 1}', "[1e999]", "[NaN]", "true", "null", "mean", "[0, 0]"),
    *('["\\ud800"]', "9" * 5000, "[" + "9" * 5000 + "]", "1_0", "\u00bd", "0x10", " 1 "),
)
"""Texts of the sorts of faults 1 to 7 and 15, and what is read as a number or a list."""

Words = Mapping[str, Sequence[str]]
"""By the full name of a string field: what it may well hold."""


def text(draw: random.Random) -> str:
    """Some text."""
    chosen = draw.random()
    if chosen < 0.7:
        return draw.choice(STRINGS)
    if chosen < 0.995:
        return "".join(map(chr, (_character(draw) for _ in range(draw.choice((1, 3, 10, 40))))))
    if chosen < 0.9999:
        return draw.choice(("a", "\u0301", "\U0001f600", "\0", " ")) * draw.randint(1000, LONGEST_TEXT // 4)
    return "a" * HUGE_TEXT


def _character(draw: random.Random) -> int:
    """Of any plane; surrogates, which no text has, left out."""
    number = draw.choice(
        (draw.randrange(128), draw.randrange(0x800), draw.randrange(0x10000), draw.randrange(0x110000))
    )
    return number if not 0xD800 <= number < 0xE000 else 0xFFFD


def binary(draw: random.Random) -> bytes:
    """Some bytes."""
    return draw.randbytes(draw.choice((0, 1, 3, 4, 5, 8, 9, 40)))


def value(draw: random.Random, field: Field, words: Words) -> Any:
    """A value of a field that is no message, as an element of it where it is repeated."""
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return binary(draw)
        known = words.get(field.full_name, ())
        return draw.choice(known) if known and draw.random() < 0.6 else text(draw)
    return SIMPLE[kind](draw) if kind in SIMPLE else _number(draw, field)


def _number(draw: random.Random, field: Field) -> int:
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        there = [one.number for one in field.enum_type.values]
        return int(draw.choice((*there, *there, -1, len(there), 99, 2**31 - 1, -(2**31))))
    return draw.choice(INTEGERS[field.cpp_type])


SIMPLE: Mapping[int, Callable[[random.Random], Any]] = {
    FieldDescriptor.CPPTYPE_BOOL: lambda draw: draw.random() < 0.5,
    FieldDescriptor.CPPTYPE_DOUBLE: lambda draw: draw.choice(FRACTIONS),
    FieldDescriptor.CPPTYPE_FLOAT: lambda draw: draw.choice((*FRACTIONS[:15], math.inf, math.nan)),
}


def count(draw: random.Random) -> int:
    """Elements of a repeated field."""
    return draw.choices((0, 1, 2, 3, 8, 65, 300, 5000), (10, 40, 20, 10, 8, 3, 2, 0.1))[0]
