"""Messages of any type, from protobuf's own description of it; and sound ones with something in them changed."""

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from bench.fuzz.values import Field, Words, count, value

DEEPEST = 6
"""Messages within each other, of those that are made at random."""


def fill(draw: random.Random, message: Message, words: Words, share: float = 0.5, depth: int = 0) -> None:
    """Set fields of a message at random, and of those within it.

    Args:
        draw: what is random.
        message: to be filled.
        words: what string fields may well hold.
        share: of the fields that are set.
        depth: messages around it.
    """
    for field in message.DESCRIPTOR.fields:
        if draw.random() < share:
            put(draw, message, field, words, depth)


def put(draw: random.Random, message: Message, field: Field, words: Words, depth: int = 0) -> None:
    """Give a field another value, or other elements."""
    if is_map(field):
        _put_entries(draw, message, field, words, depth)
    elif field.is_repeated:
        elements = getattr(message, field.name)
        if elements and draw.random() < 0.7:
            _disorder(draw, elements)
        else:
            _put_elements(draw, elements, field, words, depth)
    elif field.message_type is None:
        setattr(message, field.name, value(draw, field, words))
    elif depth < DEEPEST:
        inner = getattr(message, field.name)
        inner.SetInParent()
        fill(draw, inner, words, depth=depth + 1)


def _disorder(draw: random.Random, elements: Any) -> None:
    """One element twice, one fewer, all twice over, or none."""
    chosen = draw.randrange(4)
    if chosen == 0:
        elements.append(draw.choice(list(elements)))
    elif chosen == 1:
        del elements[draw.randrange(len(elements))]
    elif chosen == 2:
        elements.extend(list(elements))
    else:
        del elements[:]


def _put_elements(draw: random.Random, elements: Any, field: Field, words: Words, depth: int) -> None:
    for _ in range(count(draw) if field.message_type is None else draw.randrange(4)):
        if field.message_type is None:
            elements.append(value(draw, field, words))
        elif depth < DEEPEST:
            fill(draw, elements.add(), words, depth=depth + 1)


def _put_entries(draw: random.Random, message: Message, field: Field, words: Words, depth: int) -> None:
    entries, entry = getattr(message, field.name), field.message_type
    key_field, value_field = entry.fields_by_name["key"], entry.fields_by_name["value"]
    for _ in range(draw.choice((1, 1, 1, 2, 3, 40))):
        key = draw.choice(words[field.full_name]) if field.full_name in words and draw.random() < 0.8 else None
        key = value(draw, key_field, words) if key is None else key
        if value_field.message_type is None:
            entries[key] = value(draw, value_field, words)
        elif depth < DEEPEST:
            fill(draw, entries[key], words, depth=depth + 1)


def is_map(field: Field) -> bool:
    """Its elements have keys."""
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def change(draw: random.Random, message: Message, words: Words) -> None:
    """Change something in a message, or in one within it."""
    where = draw.choice(_within(message))
    if not where.DESCRIPTOR.fields:
        return
    field: Field = draw.choice(where.DESCRIPTOR.fields)
    if draw.random() < 0.15:
        where.ClearField(field.name)
    else:
        put(draw, where, field, words, DEEPEST - 2)


def _within(message: Message) -> list[Message]:
    """A message, and all that are set within it."""
    found = [message]
    for field, held in message.ListFields():
        if field.message_type is None:
            continue
        if is_map(field):
            if field.message_type.fields_by_name["value"].message_type is not None:
                found += [inner for key in held for inner in _within(held[key])]
        elif field.is_repeated:
            found += [inner for element in held for inner in _within(element)]
        else:
            found += _within(held)
    return found


def string_fields(descriptor: Any) -> list[Field]:
    """The fields of a message that hold text."""
    return [field for field in descriptor.fields if field.type == FieldDescriptor.TYPE_STRING]
