"""Continuous batching: whoever comes and goes, a sentence's answer is what it is alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InvalidRequestError
from model.forced import score
from model.search import Decoding, Hypothesis, Sampling, SearchOptions, Sentence, search
from model.steps import Family, StepModel, pad
from model.torch_steps import TorchStepModel
from model.vocabulary import END
from tests.model.searching import FAMILIES, REPEATABLE, alone, assert_near, assert_same, options
from tests.model.steps import RowModel, SeedModel
from tests.model.toy import SOURCE_VOCABULARY, TARGET_VOCABULARY, small_transformer


@dataclass(frozen=True)
class Arrival:
    """A sentence that is to be decoded."""

    clock: int
    """The step before which it joins."""
    source: list[int]
    chosen: SearchOptions
    attention: frozenset[Family]
    patience: int
    """Steps after which it is cancelled, if it is not done."""


@st.composite
def searches(draw: st.DrawFn, width: int, longest: int, words: int) -> SearchOptions:
    """Any options of a beam size that go together."""
    most, token = draw(st.integers(1, longest)), st.integers(4, 3 + words)
    often = st.one_of(st.just(True), st.booleans())
    plain = draw(often)
    sampling = None if plain or width > 1 else draw(samplings())
    return options(
        longest=most,
        shortest=1 if plain else draw(st.integers(1, most)),
        beam_size=width,
        hypotheses=draw(st.integers(1, width)),
        length_penalty=draw(st.sampled_from([0.0, 0.6, 1.0, 2.0])),
        coverage_penalty=0.0 if plain else draw(st.sampled_from([0.0, 0.3])),
        prefix=() if plain else tuple(draw(st.lists(token, max_size=min(4, most - 1)))),
        no_repeat_ngram=0 if plain else draw(st.integers(0, 3)),
        suppressed=frozenset() if plain else frozenset(draw(st.lists(token, max_size=2))),
        sampling=sampling,
    )


@st.composite
def samplings(draw: st.DrawFn) -> Sampling | None:
    if draw(st.booleans()):
        return None
    return Sampling(
        temperature=draw(st.sampled_from([0.5, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 2])),
        top_p=draw(st.sampled_from([0.6, 1.0])),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def arrivals(draw: st.DrawFn, width: int, longest: int, words: int, most: int = 9) -> list[Arrival]:
    """Sentences in the order in which they come, some of them at the same time."""
    found, clock = [], 0
    for _ in range(draw(st.integers(1, most))):
        clock += draw(st.sampled_from([0, 0, 1, 2, 7, 30]))
        length = draw(st.sampled_from([0, 1, 3, 7, 8, 20]))
        source = draw(st.lists(st.integers(4, SOURCE_VOCABULARY - 1), min_size=length, max_size=length))
        found.append(
            Arrival(
                clock=clock,
                source=[*source, END],
                chosen=draw(searches(width, longest, words)),
                attention=draw(st.sampled_from(FAMILIES)),
                patience=draw(st.sampled_from([999, 999, 999, 0, 1, 5, 20])),
            )
        )
    return found


def admit(model: StepModel, running: Decoding, together: Sequence[Arrival]) -> list[Sentence]:
    """Let some in out of one encoded batch, in which they lie in another order and not alone."""
    sources = [[4] * 5, *(one.source for one in reversed(together)), [5] * 11]
    places = range(len(together), 0, -1)
    memory = model.encode(*pad(sources), attention=False)
    return running.join(memory, places, [one.chosen for one in together], [one.attention for one in together])


def run(model: StepModel, width: int, expected: list[Arrival]) -> list[tuple[Arrival, Sentence]]:
    """Decode them all; those that were not cancelled come back."""
    running, under_way = Decoding(model, width), list[tuple[Arrival, Sentence, int]]()
    waiting, gone, clock = list(expected), set[Sentence](), 0
    while waiting or running.sentences:
        if not running.sentences:
            clock = max(clock, waiting[0].clock)
        together = [one for one in waiting if one.clock <= clock]
        if together:
            waiting = waiting[len(together) :]
            joined = admit(model, running, together)
            under_way += [(one, sentence, clock) for one, sentence in zip(together, joined, strict=True)]
        impatient = [
            sentence for one, sentence, since in under_way if not sentence.done and clock - since >= one.patience
        ]
        running.leave(impatient)
        gone |= set(impatient)
        if running.sentences:
            assert not gone & set(running.step())
        clock += 1
    assert all(sentence.done for _, sentence, _ in under_way)
    return [(one, sentence) for one, sentence, _ in under_way if sentence not in gone]


def outcome(sentence: Sentence) -> list[Hypothesis] | str:
    try:
        return sentence.results()
    except InvalidRequestError as error:
        return str(error)


def outcome_alone(model: StepModel, arrival: Arrival) -> list[Hypothesis] | str:
    try:
        return alone(model, arrival.source, arrival.chosen, arrival.attention)
    except InvalidRequestError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["past", "row"])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
@given(data=st.data(), seed=st.integers(0, 99), end=st.sampled_from([-50.0, -3.0, -1.0, 1.0]))
@REPEATABLE
def test_an_answer_does_not_depend_on_who_else_is_decoded(
    kind: str, width: int, data: st.DataObject, seed: int, end: float
) -> None:
    model = SeedModel(5, seed, end, unwritable=0.0) if kind == "past" else RowModel(5, seed, end, room=40)
    for arrival, sentence in run(model, width, data.draw(arrivals(width, longest=40, words=5))):
        together, expected = outcome(sentence), outcome_alone(model, arrival)
        if isinstance(together, str) or isinstance(expected, str):
            assert together == expected
        else:
            assert_same(together, expected)


@pytest.fixture(scope="module", params=["pre", "post"])
def network(request: pytest.FixtureRequest) -> TorchStepModel:
    return TorchStepModel(small_transformer(norm=request.param))


@pytest.mark.usefixtures("no_shape_checks")  # they would take most of the time
@pytest.mark.parametrize("width", [1, 3])
@given(data=st.data())
@settings(REPEATABLE, max_examples=12)
def test_a_networks_answer_does_not_depend_on_who_else_is_decoded(
    network: TorchStepModel, width: int, data: st.DataObject
) -> None:
    words = TARGET_VOCABULARY - 4
    for arrival, sentence in run(network, width, data.draw(arrivals(width, longest=20, words=words, most=5))):
        together, expected = outcome(sentence), outcome_alone(network, arrival)
        if isinstance(together, str) or isinstance(expected, str):
            assert together == expected
        else:
            for one, other in zip(together, expected, strict=True):
                assert_near(one, other)


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("prefix", [(5,), (9, 9, 9, 12, 4, 6)], ids=str)
def test_a_networks_answer_to_a_prefix_is_what_forced_decoding_says_of_it(
    network: TorchStepModel, beam_size: int, prefix: tuple[int, ...]
) -> None:
    sources, chosen = (
        [[5, 6, 7, END], [8, END]],
        options(longest=25, shortest=20, prefix=prefix, beam_size=beam_size, hypotheses=beam_size),
    )
    for source, found in zip(sources, search(network, sources, [chosen] * 2), strict=True):
        forced = score(network, [source] * len(found), [one.tokens for one in found])
        for one, expected in zip(found, forced, strict=True):
            assert one.tokens[: len(prefix)] == list(prefix)
            assert_near(one, expected)
