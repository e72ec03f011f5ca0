"""What is kept of a step belongs to one sentence: the arrays of the whole batch go some steps later, or with it."""

import dataclasses
import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from model.forced import score
from model.search import Decoding
from model.steps import ALL_FAMILIES, Array, Memory, Question, Step, pad
from model.trail import SEEN
from model.vocabulary import END
from tests.model.searching import SOURCES, assert_same, options
from tests.model.steps import RowModel, SeedModel


class Watched(SeedModel):
    """Remembers, without keeping them, the arrays of attention that it has handed out."""

    def __init__(self) -> None:
        super().__init__(5, seed=2, end=-4)
        self.given: list[weakref.ref[Array]] = []

    def step(self, question: Question) -> Step:
        step = super().step(question)
        cross, decoder = np.array(step.cross_attention), np.array(step.decoder_attention)
        self.given += [weakref.ref(cross), weakref.ref(decoder)]
        return dataclasses.replace(step, cross_attention=cross, decoder_attention=decoder)

    @property
    def alive(self) -> int:
        """Arrays that somebody keeps."""
        gc.collect()
        return sum(one() is not None for one in self.given)


@pytest.fixture(autouse=True)
def _only_what_is_new_is_collected() -> Iterator[None]:
    """Collecting takes half a second where all the libraries of a whole test run are looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_search_keeps_nothing_of_its_batch(beam_size: int) -> None:
    model, chosen = Watched(), options(beam_size=beam_size, hypotheses=beam_size)
    decoding = Decoding(model, beam_size)
    memory = model.encode(*pad(SOURCES))
    sentences = decoding.join(memory, range(len(SOURCES)), [chosen] * len(SOURCES), [ALL_FAMILIES] * len(SOURCES))
    while decoding.sentences:
        decoding.step()
        settled = [decoding.settled(sentence) for sentence in sentences]
        assert model.alive == (decoding.clock % SEEN if decoding.sentences else 0)
    answers = [sentence.results() for sentence in sentences]
    assert model.alive == 0
    assert len(model.given) >= 2 * max(len(nodes) for nodes in settled) > 0
    assert {one.cross_attention is not None for answer in answers for one in answer} == {True}


def test_what_is_kept_is_as_large_as_what_was_looked_at() -> None:
    """Beside a long source in an old batch, with columns for many tokens, a short one keeps what it does alone."""
    model, chosen = SeedModel(5, seed=2, end=-4), options(beam_size=3, longest=9)
    decoding = Decoding(model, 3)
    decoding.join(model.encode(*pad([[4] * 30 + [END]])), [0], [options(beam_size=3, longest=40, shortest=40)])
    for _ in range(20):
        decoding.step()
    (short,) = decoding.join(model.encode(*pad([[5, END]])), [0], [chosen], [ALL_FAMILIES])
    for age in range(1, 5):
        decoding.step()
        assert len(decoding.settled(short)) <= age
        cross, decoder = (glimpses[-1].weights for glimpses in (short._trail._cross, short._trail._decoder))
        assert cross.shape == (1, 2, 1, 3, 2)
        assert decoder.shape == (1, 1, 1, 3, age)
        assert [array.base is None or array.base.size == array.size for array in (cross, decoder)] == [True, True]


def test_a_score_keeps_nothing_of_its_batch() -> None:
    model = Watched()
    found = score(model, SOURCES[:2], [[4, 5, 6, END], [7, END]])
    assert model.alive == 0
    assert found[1].cross_attention is not None
    assert found[1].cross_attention.shape == (1, 2, 2, 2)


def test_nobody_joins() -> None:
    """An empty list changes nothing, neither before the others come nor beside them."""
    model, chosen = SeedModel(5, seed=2, end=-4), options(beam_size=3, hypotheses=3)
    nobody: Memory = model.encode(*pad(SOURCES[:1]))

    def answers(interrupted: bool) -> list[object]:
        decoding = Decoding(model, 3)
        if interrupted:
            assert decoding.join(nobody, [], []) == []
            assert (decoding.rows, decoding.sentences) == (0, [])
        sentences = decoding.join(model.encode(*pad(SOURCES)), range(5), [chosen] * 5, [ALL_FAMILIES] * 5)
        while decoding.sentences:
            decoding.step()
            if interrupted:
                assert decoding.join(nobody, [], []) == []
        return [sentence.results() for sentence in sentences]

    for one, other in zip(answers(True), answers(False), strict=True):
        assert_same(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_network_without_self_attention_has_none_to_tell(beam_size: int) -> None:
    """It is asked for all families and returns no decoder attention: answers and streams go without it."""
    model = RowModel(5, seed=2, end=-4)
    decoding = Decoding(model, beam_size)
    chosen = options(beam_size=beam_size)
    (sentence,) = decoding.join(model.encode(*pad(SOURCES[:1])), [0], [chosen], [ALL_FAMILIES])
    while decoding.sentences:
        decoding.step()
        nodes = decoding.settled(sentence)
    [best] = sentence.results()
    assert [node.token for node in nodes] == best.tokens
    assert best.decoder_attention is None
    assert {node.decoder_attention is None for node in nodes} == {True}
    assert best.cross_attention is not None
    for t, node in enumerate(nodes):
        np.testing.assert_array_equal(node.cross_attention, best.cross_attention[:, :, t])


def test_coverage_needs_cross_attention() -> None:
    class Blind(SeedModel):
        def step(self, question: Question) -> Step:
            return dataclasses.replace(super().step(question), cross_attention=None)

    model = Blind(5, seed=2)
    decoding = Decoding(model, 1)
    decoding.join(model.encode(*pad(SOURCES[:1])), [0], [options(coverage_penalty=0.3, longest=1)])
    with pytest.raises(ValueError, match=r"^coverage_penalty needs cross-attention, and the model returned none$"):
        decoding.step()


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_search_that_nobody_looks_into_keeps_its_batch_for_some_steps_only(beam_size: int) -> None:
    model, chosen = Watched(), options(beam_size=beam_size, longest=40, shortest=40)
    decoding = Decoding(model, beam_size)
    (sentence,) = decoding.join(model.encode(*pad(SOURCES[:1])), [0], [chosen], [ALL_FAMILIES])
    most = 0
    while decoding.sentences:
        decoding.step()
        most = max(most, model.alive)
    assert most == SEEN - 1
    (first, *_) = sentence.results()
    assert first.cross_attention is not None
    assert first.cross_attention.shape[2] == len(first.tokens) == 40
    assert model.alive == 0
