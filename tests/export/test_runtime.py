"""The exported graphs compute what the network computes, however rows, pasts and beams are laid out."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from export.manifest import Precision
from export.runtime import Array, OnnxStepModel
from model.steps import Memory, Step, StepModel, pad
from model.torch_steps import TorchStepModel
from model.transformer import Transformer
from tests.export.toy import Toy, network
from tests.reversal import Reversal

TOLERANCES = {"log_probabilities": 1e-4, "encoder": 1e-5, "cross": 1e-5, "decoder": 1e-5, "state": 1e-4}
"""Largest difference between two ways to one value. Measured: 3e-5 of log-probabilities, 3e-6 of attention."""

SOURCES = (7, 4, 1)
"""Lengths of three sources, one of them padded by much."""
LENGTH = 6
JUNK = 1e4
"""Finite rubbish in the cache's padding, far larger than any key or value."""


@dataclass
class Case:
    """Graphs of one bundle, the network they came from, and a batch of random tokens for both."""

    onnx: OnnxStepModel
    torch: Transformer
    source_ids: Array
    source_mask: Array
    target_ids: Array
    vocabulary: int

    @property
    def memory(self) -> Memory:
        return self.onnx.encode(self.source_ids, self.source_mask)

    def step(
        self, rows: list[int], ids: Array, first: list[int], state: Mapping[str, Array] | None = None, top: int = 5
    ) -> Step:
        """Read `ids` for some of the sentences, each row's first at its own position."""
        positions = np.array(first)[:, None] + np.arange(ids.shape[1])
        memory = self.onnx.select(self.memory, np.array(rows))
        return self.onnx.step(ids, positions, memory, state, np.arange(len(rows)), top)


def case_of(exported: Toy | Reversal, precision: Precision = "fp32") -> Case:
    checkpoint = network(exported)
    random = np.random.default_rng(1)
    ids, mask = pad([random.integers(1, len(checkpoint.source), length).tolist() for length in SOURCES])
    targets = random.integers(1, len(checkpoint.target), (len(SOURCES), LENGTH))
    model = OnnxStepModel(exported.bundle, exported.manifest, precision)
    return Case(model, checkpoint.model, ids, mask, targets, len(checkpoint.target))


@pytest.fixture
def case(exported: Toy | Reversal) -> Case:
    return case_of(exported)


def assert_near(what: str, actual: Array, expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCES[what], err_msg=what)


@torch.inference_mode()
def whole_pass(case: Case) -> dict[str, Array]:
    """What the network says of all three pairs at once, without a cache."""
    output = case.torch(*map(torch.from_numpy, (case.source_ids, case.source_mask, case.target_ids)))
    return {
        "log_probabilities": output.logits.log_softmax(-1).numpy(),
        "encoder": torch.stack(output.encoder_attention, 1).numpy(),
        "decoder": torch.stack(output.decoder_attention, 1).numpy(),
        "cross": torch.stack(output.cross_attention, 1).numpy(),
    }


def test_scoring_equals_the_uncached_network(case: Case) -> None:
    whole = whole_pass(case)
    next_ids = np.roll(case.target_ids, -1, 1)
    scores = case.onnx.score(case.target_ids, next_ids, case.memory)
    expected = np.take_along_axis(whole["log_probabilities"], next_ids[..., None], -1)[..., 0]
    assert_near("log_probabilities", scores.log_probabilities, expected)
    assert_near("cross", scores.cross_attention, whole["cross"])
    assert_near("decoder", scores.decoder_attention, whole["decoder"])
    assert_near("encoder", case.memory.encoder_attention, whole["encoder"])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (3, 1, 2), (6,)], ids=str)
def test_steps_from_a_cache_equal_the_uncached_network(case: Case, sizes: tuple[int, ...]) -> None:
    whole, rows, start, state = whole_pass(case), list(range(len(SOURCES))), 0, None
    for size in sizes:
        end = start + size
        step = case.step(rows, case.target_ids[:, start:end], [start] * len(rows), state, top=case.vocabulary)
        values = np.empty_like(step.top_log_probabilities)
        np.put_along_axis(values, step.top_ids, step.top_log_probabilities, -1)
        assert_near("log_probabilities", values, whole["log_probabilities"][:, start:end])
        assert_near("cross", step.cross_attention, whole["cross"][:, :, :, start:end])
        assert_near("decoder", step.decoder_attention, whole["decoder"][:, :, :, start:end, :end])
        start, state = end, step.state
    assert start == LENGTH


@pytest.mark.parametrize("sizes", [(1, 2), (4,)], ids=str)
def test_steps_equal_the_networks_own_cached_steps(case: Case, sizes: tuple[int, ...]) -> None:
    sides: tuple[StepModel, ...] = (case.onnx, TorchStepModel(case.torch))
    start = 0
    states: list[object] = [None, None]
    for size in sizes:
        positions = np.arange(start, start + size)[None].repeat(len(SOURCES), 0)
        ids, reorder = case.target_ids[:, start : start + size], np.array([1, 1, 0])
        steps = [
            side.step(ids, positions, side.encode(case.source_ids, case.source_mask), state, reorder, 5)
            for side, state in zip(sides, states, strict=True)
        ]
        assert_near("log_probabilities", steps[0].top_log_probabilities, steps[1].top_log_probabilities)
        assert_near("cross", steps[0].cross_attention, steps[1].cross_attention)
        assert_near("decoder", steps[0].decoder_attention, steps[1].decoder_attention)
        start, states = start + size, [step.state for step in steps]


def right_aligned(states: list[Mapping[str, Array]], ages: tuple[int, ...]) -> dict[str, Array]:
    """Each row's past in one batch, with junk before the younger ones."""
    longest = max(ages)

    def one(name: str) -> Array:
        rows = [
            np.pad(state[name], ((0, 0), (0, 0), (longest - age, 0), (0, 0)), constant_values=JUNK)
            for state, age in zip(states, ages, strict=True)
        ]
        return np.concatenate(rows)

    return {name: one(name) for name in states[0]}


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("ages", [(1, 2, 4), (4, 2, 1), (3, 3, 3)], ids=str)
def test_rows_of_different_ages_share_a_batch(case: Case, ages: tuple[int, ...], new: int) -> None:
    pasts, alone = [], []
    for row, age in enumerate(ages):
        past = case.step([row], case.target_ids[row : row + 1, :age], [0]).state
        pasts.append(past)
        alone.append(case.step([row], case.target_ids[row : row + 1, age : age + new], [age], past))
    ids = np.stack([case.target_ids[row, age : age + new] for row, age in enumerate(ages)])
    together = case.step([0, 1, 2], ids, list(ages), right_aligned(pasts, ages))
    for row, expected in enumerate(alone):
        padding = max(ages) - ages[row]
        own = together.decoder_attention[row : row + 1]
        assert_near("log_probabilities", together.top_log_probabilities[row : row + 1], expected.top_log_probabilities)
        assert_near("cross", together.cross_attention[row : row + 1], expected.cross_attention)
        assert_near("decoder", own[..., padding:], expected.decoder_attention)
        assert np.count_nonzero(own[..., :padding]) == 0


def test_the_state_is_gathered_by_row_inside_the_graph(case: Case) -> None:
    first = case.step([0, 0, 0], case.target_ids[:, :2], [0, 0, 0])
    parents, memory = np.array([2, 0, 2]), case.onnx.select(case.memory, np.array([0, 0, 0]))
    ids, positions = case.target_ids[:, 2:3], np.full((3, 1), 2)
    gathered = case.onnx.step(ids, positions, memory, first.state, parents, 5)
    chosen = {name: tensor[parents] for name, tensor in first.state.items()}
    copied = case.onnx.step(ids, positions, memory, chosen, np.arange(3), 5)
    kept = case.onnx.step(ids, positions, memory, first.state, np.arange(3), 5)
    np.testing.assert_array_equal(gathered.top_log_probabilities, copied.top_log_probabilities)
    np.testing.assert_array_equal(gathered.decoder_attention, copied.decoder_attention)
    assert np.abs(gathered.decoder_attention - kept.decoder_attention).max() > 1e-3


@pytest.mark.parametrize("beam", [2, 4])
def test_beams_look_at_one_memory_as_at_copies_of_it(case: Case, beam: int) -> None:
    rows = len(SOURCES) * beam
    ids = np.random.default_rng(3).integers(1, case.vocabulary, (rows, 3))
    positions, parents = np.arange(3)[None].repeat(rows, 0), np.zeros(rows, np.int64)
    copies = case.onnx.select(case.memory, np.repeat(np.arange(len(SOURCES)), beam))
    assert copies.source_mask.shape[0] == beam * case.memory.source_mask.shape[0]
    shared, copied = (case.onnx.step(ids, positions, memory, None, parents, 5) for memory in (case.memory, copies))
    assert_near("log_probabilities", shared.top_log_probabilities, copied.top_log_probabilities)
    assert_near("cross", shared.cross_attention, copied.cross_attention)
    for name, tensor in shared.state.items():
        assert_near("state", tensor, copied.state[name])


@pytest.mark.parametrize("top", [1, 3, 1000])
def test_the_best_candidates_are_chosen_in_the_graph(case: Case, top: int) -> None:
    step = case.step([0, 1, 2], case.target_ids[:, :2], [0, 0, 0], top=top)
    everything = case.step([0, 1, 2], case.target_ids[:, :2], [0, 0, 0], top=case.vocabulary)
    kept = min(top, case.vocabulary)
    assert step.top_ids.shape == (3, 2, kept)
    np.testing.assert_array_equal(step.top_ids, everything.top_ids[..., :kept])
    assert np.all(np.diff(everything.top_log_probabilities, axis=-1) <= 0)
    np.testing.assert_allclose(np.exp(everything.top_log_probabilities).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rows_of_attention_sum_to_one_and_padding_is_exactly_zero(
    exported: Toy | Reversal, precision: Precision
) -> None:
    case = case_of(exported, precision)
    scores = case.onnx.score(case.target_ids, case.target_ids, case.memory)
    real = case.source_mask[:, None, None, :, None] & case.source_mask[:, None, None, None, :]
    encoder = case.memory.encoder_attention
    assert np.count_nonzero(np.where(real, 0, encoder)) == 0
    np.testing.assert_allclose(encoder.sum(-1), np.broadcast_to(real.any(-1), encoder.shape[:-1]), atol=1e-5)
    assert np.count_nonzero(np.where(case.source_mask[:, None, None, None], 0, scores.cross_attention)) == 0
    np.testing.assert_allclose(scores.cross_attention.sum(-1), 1, atol=1e-5)
    assert np.count_nonzero(np.triu(scores.decoder_attention, 1)) == 0
    np.testing.assert_allclose(scores.decoder_attention.sum(-1), 1, atol=1e-5)
