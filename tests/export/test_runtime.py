"""The exported graphs compute what the network computes, at once or step by step."""

from collections.abc import Callable

import numpy as np
import pytest

from export.manifest import Precision
from model.grid import Grid
from model.steps import StepModel
from model.vocabulary import BEGIN
from tests.export.case import (
    LENGTH,
    SOURCES,
    Case,
    Past,
    ask,
    assert_near,
    blank,
    case_of,
    longer,
    values,
    whole_pass,
    width,
)
from tests.export.toy import Toy
from tests.reversal import Reversal

EVERYONE = range(len(SOURCES))
POSITIONS = np.arange(LENGTH)[None].repeat(len(SOURCES), 0)


@pytest.fixture
def case(exported: Toy | Reversal) -> Case:
    return case_of(exported)


def test_reading_whole_targets_equals_the_uncached_network(case: Case) -> None:
    whole = whole_pass(case)
    next_ids = np.roll(case.target_ids, -1, 1)
    step = ask(case.onnx, case.memory, case.target_ids, POSITIONS, next_ids=next_ids)
    expected = np.take_along_axis(whole["log_probabilities"], next_ids[..., None], -1)[..., 0]
    assert step.decoder_attention is not None
    assert_near("log_probabilities", step.next_log_probabilities, expected)
    assert_near("log_probabilities", values(step), whole["log_probabilities"])
    assert_near("cross", step.cross_attention, whole["cross"])
    assert_near("decoder", step.decoder_attention[..., 1:], whole["decoder"])
    assert np.count_nonzero(step.decoder_attention[..., 0]) == 0
    assert_near("encoder", case.memory.encoder_attention, whole["encoder"])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (3, 1, 2), (6,)], ids=str)
def test_steps_from_a_cache_equal_the_uncached_network(case: Case, sizes: tuple[int, ...]) -> None:
    whole, start, state = whole_pass(case), 0, blank(case.onnx, len(SOURCES), 1)
    for size in sizes:
        new = slice(start, start + size)
        visible = np.ones((len(SOURCES), size, 1 + start), bool)
        visible[..., 0] = False
        step = ask(case.onnx, case.memory, case.target_ids[:, new], POSITIONS[:, new], Past(state, visible))
        assert step.decoder_attention is not None
        assert_near("log_probabilities", values(step), whole["log_probabilities"][:, new])
        assert_near("cross", step.cross_attention, whole["cross"][:, :, :, new])
        assert_near("decoder", step.decoder_attention[..., 1:], whole["decoder"][:, :, :, new, : start + size])
        assert np.count_nonzero(step.decoder_attention[..., 0]) == 0
        start, state = start + size, longer(case.onnx, state, step.state)
    assert start == LENGTH
    assert width(case.onnx, state) == 1 + LENGTH


@pytest.mark.parametrize("sizes", [(1, 2), (4,)], ids=str)
def test_steps_equal_the_networks_own_cached_steps(case: Case, sizes: tuple[int, ...]) -> None:
    sides: tuple[StepModel, ...] = (case.onnx, case.torch)
    memories = [side.encode(case.source_ids, case.source_mask) for side in sides]
    for pair in zip(*(memory.tensors for memory in memories), strict=True):
        assert_near("state", *pair)
    start, states = 0, [blank(side, len(SOURCES), 1) for side in sides]
    random = np.random.default_rng(2)
    for size in sizes:
        new, visible = slice(start, start + size), random.random((len(SOURCES), size, 1 + start)) < 0.5
        visible[..., 0] = False
        steps = [
            ask(side, memory, case.target_ids[:, new], POSITIONS[:, new], Past(state, visible))
            for side, memory, state in zip(sides, memories, states, strict=True)
        ]
        assert_near("log_probabilities", *map(values, steps))
        assert_near("log_probabilities", *(step.next_log_probabilities for step in steps))
        assert_near("cross", *(step.cross_attention for step in steps))
        assert_near("decoder", *(step.decoder_attention for step in steps))
        for pair in zip(*(step.state for step in steps), strict=True):
            assert_near("state", *pair)
        states = [longer(side, state, step.state) for side, state, step in zip(sides, states, steps, strict=True)]
        start += size


def test_the_layout_of_what_is_remembered_is_the_networks(case: Case) -> None:
    assert list(case.onnx.memory) == list(case.torch.memory)
    assert list(case.onnx.state) == list(case.torch.state)
    assert case.onnx.vocabulary == case.torch.vocabulary == case.vocabulary


@pytest.mark.parametrize("top", [1, 3, 1000])
def test_the_best_candidates_are_chosen_in_the_graph(case: Case, top: int) -> None:
    kept = min(top, case.vocabulary)
    step, everything = (
        ask(case.onnx, case.memory, case.target_ids[:, :2], POSITIONS[:, :2], top=count)
        for count in (kept, case.vocabulary)
    )
    assert step.top_ids.shape == step.top_log_probabilities.shape == (3, 2, kept)
    np.testing.assert_array_equal(step.top_ids, everything.top_ids[..., :kept])
    np.testing.assert_array_equal(step.top_log_probabilities, everything.top_log_probabilities[..., :kept])
    assert np.all(np.diff(everything.top_log_probabilities, axis=-1) <= 0)
    np.testing.assert_allclose(np.exp(everything.top_log_probabilities).sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(np.sort(everything.top_ids, -1)[0, 0], np.arange(case.vocabulary))


@pytest.mark.parametrize("top", [1, 1000])
def test_a_search_may_ask_for_more_candidates_than_there_are_words(case: Case, top: int) -> None:
    grid = Grid(case.onnx, 2)
    grid.join(case.memory, EVERYONE)
    begin = np.full((len(SOURCES), 2), BEGIN)
    step = grid.step(begin, np.zeros_like(begin), begin, top)
    assert step.top_ids.shape == (len(SOURCES), 2, min(top, case.vocabulary))


def test_the_log_probability_of_any_token_can_be_asked_for(case: Case) -> None:
    ids = np.random.default_rng(4).integers(0, case.vocabulary, (len(SOURCES), LENGTH))
    step = ask(case.onnx, case.memory, case.target_ids, POSITIONS, next_ids=ids)
    expected = np.take_along_axis(values(step), ids[..., None], -1)[..., 0]
    np.testing.assert_array_equal(step.next_log_probabilities, expected)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rows_of_attention_sum_to_one_and_padding_is_exactly_zero(
    exported: Toy | Reversal, precision: Precision
) -> None:
    case = case_of(exported, precision)
    step = ask(case.onnx, case.memory, case.target_ids, POSITIONS)
    assert step.cross_attention is not None
    assert step.decoder_attention is not None
    real = case.source_mask[:, None, None, :, None] & case.source_mask[:, None, None, None, :]
    encoder = case.memory.encoder_attention
    assert encoder is not None
    assert np.count_nonzero(np.where(real, 0, encoder)) == 0
    np.testing.assert_allclose(encoder.sum(-1), np.broadcast_to(real.any(-1), encoder.shape[:-1]), atol=1e-5)
    assert np.count_nonzero(np.where(case.source_mask[:, None, None, None], 0, step.cross_attention)) == 0
    np.testing.assert_allclose(step.cross_attention.sum(-1), 1, atol=1e-5)
    assert np.count_nonzero(step.decoder_attention[..., 0]) == 0
    assert np.count_nonzero(np.triu(step.decoder_attention[..., 1:], 1)) == 0
    np.testing.assert_allclose(step.decoder_attention.sum(-1), 1, atol=1e-5)


IDS: dict[str, tuple[Callable[[Case], object], str]] = {
    "a negative source": (lambda case: case.onnx.encode(case.source_ids - 30_000, case.source_mask), "source_ids: -"),
    "a source beyond": (
        lambda case: case.onnx.encode(case.source_ids + case.onnx.source_vocabulary, case.source_mask),
        r"source_ids: \d+ is no id of a vocabulary of \d+: ids run from 0 to \d+$",
    ),
    "a negative target": (lambda case: ask(case.onnx, case.memory, case.target_ids - 30_000, POSITIONS), "target_ids"),
    "a target beyond": (
        lambda case: ask(case.onnx, case.memory, case.target_ids + case.vocabulary, POSITIONS),
        r"target_ids: \d+ is no id",
    ),
    "a next one beyond": (
        lambda case: ask(
            case.onnx, case.memory, case.target_ids, POSITIONS, next_ids=np.full_like(POSITIONS, case.vocabulary)
        ),
        r"next_ids: (\d+) is no id of a vocabulary of \1: ",
    ),
}
"""Ids that no table has, which the CUDA provider would read all the same, and what is said of them."""


@pytest.mark.parametrize("what", IDS)
def test_ids_are_checked_before_they_reach_the_graphs(case: Case, what: str) -> None:
    call, message = IDS[what]
    with pytest.raises(ValueError, match=message):
        call(case)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_the_encoders_padding_looks_at_is_exactly_nothing(exported: Toy | Reversal, precision: Precision) -> None:
    case = case_of(exported, precision)
    encoder = case.memory.encoder_attention
    assert encoder is not None
    assert encoder.shape[3:] == (max(SOURCES), max(SOURCES))
    for own, length in zip(encoder, SOURCES, strict=True):
        padding = own[:, :, length:]
        np.testing.assert_array_equal(padding, np.zeros_like(padding))
        np.testing.assert_allclose(own[:, :, :length, :length].sum(-1), 1, atol=1e-5)
