"""Attention that is written down for a batch, and copied by each of its sentences when it must be."""

from typing import cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float

from model.looks import ROOM, Looks
from model.sentence import Sentence

LAYERS, HEADS, ROWS = 2, 3, 2


class Reader:
    """Stands for a sentence: has a place, a length and a number, and remembers what it was handed."""

    def __init__(self, number: int, place: int, length: int) -> None:
        self.number, self.place, self.length = number, place, length
        self.expected: list[Float[np.ndarray, "layer head row source"]] = []
        self.got: list[Float[np.ndarray, "layer head step row source"]] = []

    def look_at_source(self, looks: Float[np.ndarray, "layer head step row source"]) -> None:
        """As a sentence does."""
        self.got.append(looks[..., : self.length].copy())


class Batch:
    """Sentences that come, are looked at, and leave as in a running batch: the last ones move into the gaps."""

    def __init__(self) -> None:
        self.looks, self.readers, self.gone, self.made = Looks(), list[Reader](), list[Reader](), 0
        self.values = np.random.default_rng(0)

    def join(self, length: int) -> None:
        self.readers.append(Reader(self.made, len(self.readers), length))
        self.made += 1

    def step(self) -> None:
        if not self.readers:
            return
        source = max(reader.length for reader in self.readers)
        looks = self.values.random((len(self.readers), LAYERS, HEADS, ROWS, source), np.float32)
        for reader in self.readers:
            reader.expected.append(looks[reader.place, ..., : reader.length])
        self.looks.write(cast("list[Sentence]", self.readers), looks)

    def show(self, place: int) -> None:
        """Somebody wants to see one before it is done."""
        self.looks.hand_over(cast("list[Sentence]", self.readers[place : place + 1]))

    def leave(self, place: int) -> None:
        if place >= len(self.readers):
            return
        self.show(place)
        self.gone.append(self.readers[place])
        order = list(range(len(self.readers) - 1))
        if place < len(order):
            order[place] = len(order)
        self.looks.keep(order)
        self.readers = [self.readers[before] for before in order]
        for now, reader in enumerate(self.readers):
            reader.place = now


EVENTS = st.one_of(
    st.tuples(st.just("join"), st.integers(1, 9)),
    st.tuples(st.just("step"), st.integers(1, ROOM + 2)),
    st.tuples(st.sampled_from(["leave", "show"]), st.integers(0, 4)),
)


@given(st.lists(EVENTS, max_size=40))
def test_each_sentence_gets_what_its_own_rows_looked_at(events: list[tuple[str, int]]) -> None:
    batch = Batch()
    for what, number in events:
        if what == "step":
            for _ in range(number):
                batch.step()
        else:
            {"join": batch.join, "leave": batch.leave, "show": batch.show}[what](number)
    while batch.readers:
        batch.leave(0)
    for reader in batch.gone:
        assert sum(part.shape[2] for part in reader.got) == len(reader.expected)
        if reader.expected:
            np.testing.assert_array_equal(np.concatenate(reader.got, 2), np.stack(reader.expected, 2))


def test_what_was_a_large_batch_takes_no_more_room_than_a_small_one_needs() -> None:
    batch = Batch()
    for length in (40, *[3] * 20):
        batch.join(length)
    batch.step()
    assert batch.looks._block.shape == (ROOM, 21, LAYERS, HEADS, ROWS, 40)
    for _ in range(20):
        batch.leave(0)
    for _ in range(ROOM):
        batch.step()
    assert batch.looks._block.shape == (ROOM, 1, LAYERS, HEADS, ROWS, 3)


def test_sentences_copy_at_the_latest_when_there_is_no_more_room() -> None:
    batch = Batch()
    batch.join(5)
    for _ in range(ROOM):
        batch.step()
    assert batch.readers[0].got == []
    batch.step()
    assert [part.shape[2] for part in batch.readers[0].got] == [ROOM]
