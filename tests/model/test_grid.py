"""The running batch: who is where, how long its past is, and how wide its sources are."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from model.grid import SMALLEST_RING, Grid
from model.search import Decoding, SearchOptions, Sentence
from model.steps import ALL_FAMILIES, Array, pad
from model.store import ArrayStore
from model.vocabulary import BEGIN, END
from tests.model.searching import SOURCES, alone, assert_same, options, steps
from tests.model.steps import Prefix, RowModel, SeedModel

MODELS: dict[str, type[SeedModel]] = {"past": SeedModel, "row": RowModel}


class Follower:
    """A grid, and what each of its rows should have read, in plain lists."""

    def __init__(self, model: SeedModel, width: int) -> None:
        self.grid, self.model, self.width = Grid(model, width), model, width
        self.sources: list[list[int]] = []
        self.read: list[list[Prefix]] = []
        self._draw = np.random.default_rng(width)

    def join(self, *sources: list[int]) -> None:
        self.grid.join(self.model.encode(*pad(sources)), range(len(sources)))
        self.sources += sources
        self.read += [[()] * self.width for _ in sources]

    def leave(self, *places: int) -> list[int]:
        order = self.grid.leave(places)
        self.sources = [self.sources[before] for before in order]
        self.read = [self.read[before] for before in order]
        return order

    def step(self) -> None:
        """Go on from random rows with random words, and see that the model was asked about exactly that."""
        shape = (self.grid.count, self.width)
        words = self._draw.choice(self.model.words, shape)
        tokens = np.where(self.grid.age[:, None] > 0, words, BEGIN)
        parents = self._draw.integers(0, self.width, shape)
        step = self.grid.step(tokens, parents, tokens, self.model.vocabulary)
        self.read = [
            [(*before[parent], token) for parent, token in zip(row, new, strict=True)]
            for before, row, new in zip(self.read, parents.tolist(), tokens.tolist(), strict=True)
        ]
        assert self.grid.age.tolist() == [len(rows[0]) for rows in self.read]
        self._compare(step.next_log_probabilities, tokens)

    def _compare(self, values: Array, tokens: Array) -> None:
        for place, (source, rows) in enumerate(zip(self.sources, self.read, strict=True)):
            for row, prefix in enumerate(rows):
                expected = self.model.next_log_probabilities(tuple(source), prefix)
                assert values[place, row] == expected.get(int(tokens[place, row]), -np.inf)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_last_move_into_the_gaps_and_nobody_else_moves(count: int) -> None:
    for size in range(count + 1):
        for gone in itertools.permutations(range(count), size):
            follower = Follower(SeedModel(4), 1)
            follower.join(*SOURCES[:count])
            order = follower.leave(*gone)
            assert sorted(order) == sorted(set(range(count)) - set(gone))
            assert follower.grid.count == len(order) == count - size
            for place, before in enumerate(order):
                assert place == before or (place in gone and before >= len(order))
            if order:
                follower.step()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("width", [1, 2, 5])
def test_every_row_goes_on_from_its_parent_whoever_comes_and_goes(width: int, kind: str) -> None:
    follower, draw = Follower(MODELS[kind](3), width), np.random.default_rng(3)
    for _ in range(60):
        if not follower.sources or (len(follower.sources) < 6 and draw.random() < 0.3):
            lengths = draw.integers(0, 12, draw.integers(1, 4))
            follower.join(*([*draw.integers(4, 7, length).tolist(), END] for length in lengths))
        elif draw.random() < 0.25:
            count = len(follower.sources)
            follower.leave(*draw.choice(count, draw.integers(0, count + 1), replace=False).tolist())
        if follower.sources:
            follower.step()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("width", [1, 3])
def test_the_ring_grows_with_the_oldest_and_shrinks_when_it_has_left(width: int, kind: str) -> None:
    follower = Follower(RowModel(3, room=80) if kind == "row" else SeedModel(3), width)
    follower.join(SOURCES[0])
    rings = []
    for step in range(70):
        if step % 20 == 10:
            follower.join(SOURCES[step // 20])
        rings.append(follower.grid.ring)
        follower.step()
        assert follower.grid.age.max() <= follower.grid.ring
    assert rings == sorted(rings)
    assert [rings[0], rings[16], rings[17], rings[33], rings[69]] == [16, 16, 32, 64, 112]
    follower.leave(0)  # 60 steps old is the next
    assert follower.grid.ring == 112
    for _ in range(3):
        follower.step()
    follower.leave(follower.sources.index(SOURCES[0]))
    assert follower.grid.ring == 48
    for _ in range(30):
        follower.step()
    follower.leave(*range(1, len(follower.sources)))
    follower.step()


def test_an_empty_grid_begins_anew() -> None:
    model = SeedModel(3)
    follower = Follower(model, 2)
    follower.join([4] * 20 + [END])
    for _ in range(40):
        follower.step()
    follower.leave(0)
    follower.join([END], [4, END])
    assert (follower.grid.count, follower.grid.clock, follower.grid.ring) == (2, 0, SMALLEST_RING)
    follower.step()
    assert model.shapes[-1] == (2 * SMALLEST_RING, 2)


def test_sources_are_as_wide_as_the_longest_and_little_wider() -> None:
    model = SeedModel(3)
    follower = Follower(model, 1)
    widths = []
    for source in ([END], [4] * 6 + [END], [4] * 7 + [END], [4] * 8 + [END], [4] * 39 + [END], [5, END]):
        follower.join(source)
        follower.step()
        widths.append(model.shapes[-1][1])
    assert widths == [1, 8, 8, 16, 40, 40]
    follower.leave(4)
    follower.step()
    assert model.shapes[-1][1] == 9
    follower.join([6] * 30 + [END])
    follower.step()
    assert model.shapes[-1][1] == 32
    follower.leave(1, 2, 3, len(follower.sources) - 1)
    follower.step()
    assert (model.shapes[-1][1], model.widths[-1]) == (2, len(follower.sources))


@pytest.mark.parametrize("wanted", [(1,), (3, 0), (4, 1, 2), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("running", [True, False])
def test_only_the_sentences_that_are_named_join(wanted: Sequence[int], running: bool) -> None:
    follower = Follower(SeedModel(3), 1)
    if running:
        follower.join([7, END])
        follower.step()
    follower.grid.join(follower.model.encode(*pad(SOURCES)), wanted)
    follower.sources += [SOURCES[index] for index in wanted]
    follower.read += [[()] for _ in wanted]
    follower.step()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("longest", [16, 17, 33, 65, 80])
def test_long_answers_and_short_ones_are_what_they_are_alone(longest: int, beam_size: int, kind: str) -> None:
    def fresh() -> SeedModel:
        return RowModel(4, seed=longest, end=-50, room=longest) if kind == "row" else SeedModel(4, longest, end=-50)

    model = fresh()
    running = Decoding(model, beam_size)
    long, short = (options(longest=most, beam_size=beam_size, hypotheses=beam_size) for most in (longest, 5))
    joined = list[tuple[list[int], SearchOptions, Sentence]]()

    def join(source: list[int], chosen: SearchOptions) -> None:
        (sentence,) = running.join(model.encode(*pad([source])), [0], [chosen], [ALL_FAMILIES])
        joined.append((source, chosen, sentence))

    join(SOURCES[0], long)
    waiting = [SOURCES[index % 5] for index in range(longest // 4 + 2)]
    for count in steps(running):
        if count % 4 == 3 and waiting:
            join(waiting.pop(), short)
    assert not waiting
    assert max(columns for columns, _ in model.shapes) >= min(longest, 16) * beam_size
    assert model.shapes[-1][0] == SMALLEST_RING * beam_size, "the long one has left"
    for source, chosen, sentence in joined:
        assert_same(sentence.results(), alone(fresh(), source, chosen))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("width", [1, 3])
def test_what_never_runs_empty_keeps_room_for_few_more_than_there_are(width: int, kind: str) -> None:
    """Whatever lengths come and go: room made for wider sources is not room for more of them."""
    follower, draw, most = Follower(MODELS[kind](3), width), np.random.default_rng(5), 6
    for _ in range(300):
        while len(follower.sources) < most:
            follower.join([*draw.integers(4, 7, draw.integers(0, 40)).tolist(), END])
        follower.step()
        grid, store = follower.grid, follower.grid._store
        assert isinstance(store, ArrayStore)
        rooms = [len(array) for array in (grid._mask, grid._visible, *store._memory, *store._state)]
        assert max(rooms) <= most * 3 // 2
        follower.leave(*draw.choice(most, draw.integers(1, most), replace=False).tolist())
