"""Questions to a step model: a batch of random tokens, and pasts whose columns lie in any order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from export.manifest import Precision
from export.runtime import OnnxStepModel
from model.steps import ALL_FAMILIES, Array, Family, Memory, Question, Step, StepModel, causal, pad
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
"""Finite rubbish in columns that nobody sees, far larger than any key or value."""


@dataclass(frozen=True)
class Case:
    """Graphs of one bundle, the network they came from, and a batch of random tokens for both."""

    onnx: OnnxStepModel
    network: Transformer
    source_ids: Array
    source_mask: Array
    target_ids: Array
    vocabulary: int

    @property
    def torch(self) -> TorchStepModel:
        return TorchStepModel(self.network)

    @property
    def memory(self) -> Memory:
        return self.onnx.encode(self.source_ids, self.source_mask)

    def read(self, sentences: Sequence[int], ids: Array, first: Sequence[int], state: tuple[Array, ...] = ()) -> Step:
        """Read `ids` for some of the sentences, each one's first at its own position, after a past that all see."""
        positions = np.array(first)[:, None] + np.arange(ids.shape[1])
        past = Past(state, np.ones((*ids.shape, width(self.onnx, state)), bool)) if state else None
        return ask(self.onnx, of_sentences(self.memory, sentences), ids, positions, past)


@dataclass(frozen=True)
class Past:
    """What new tokens are read after: keys and values, and who sees which of their columns [batch query past]."""

    state: tuple[Array, ...]
    visible: Array


def case_of(exported: Toy | Reversal, precision: Precision = "fp32") -> Case:
    checkpoint = network(exported)
    random = np.random.default_rng(1)
    ids, mask = pad([random.integers(1, len(checkpoint.source), length).tolist() for length in SOURCES])
    targets = random.integers(1, len(checkpoint.target), (len(SOURCES), LENGTH))
    model = OnnxStepModel(exported.bundle, exported.manifest, precision)
    return Case(model, checkpoint.model, ids, mask, targets, len(checkpoint.target))


def assert_near(what: str, actual: Array | None, expected: Array | None) -> None:
    assert actual is not None
    assert expected is not None
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCES[what], err_msg=what)


def ask(
    model: StepModel,
    memory: Memory,
    ids: Array,
    positions: Array,
    past: Past | None = None,
    *,
    new_visible: Array | None = None,
    next_ids: Array | None = None,
    top: int | None = None,
    attention: frozenset[Family] = ALL_FAMILIES,
) -> Step:
    """One step; without a past after one column that nobody sees, and unless told otherwise many positions of one."""
    past = past or Past(blank(model, len(ids), 1), np.zeros((*ids.shape, 1), bool))
    return model.step(
        Question(
            target_ids=ids,
            positions=positions,
            new_visible=causal(ids.shape[1]).repeat(len(ids), 0) if new_visible is None else new_visible,
            past_visible=past.visible,
            next_ids=np.zeros_like(ids) if next_ids is None else next_ids,
            top=model.vocabulary if top is None else top,
            memory=memory,
            state=past.state,
            attention=attention,
        )
    )


def apart(batch: int, count: int) -> Array:
    """New positions of which none sees another: hypotheses."""
    return np.eye(count, dtype=bool)[None].repeat(batch, 0)


def values(step: Step) -> Array:
    """The log-probability of every token, in the order of the vocabulary."""
    found = np.empty_like(step.top_log_probabilities)
    np.put_along_axis(found, step.top_ids, step.top_log_probabilities, -1)
    return found


def of_sentences(memory: Memory, sentences: Sequence[int]) -> Memory:
    """The memory of some of the sentences, any of them more than once."""
    chosen = list(sentences)
    return Memory(tuple(tensor[chosen] for tensor in memory.tensors), memory.source_mask[chosen])


def blank(model: StepModel, batch: int, columns: int, value: float = JUNK) -> tuple[Array, ...]:
    """Columns that hold nothing of use."""
    return tuple(
        np.full((batch, *(columns if size == "past" else size for size in kept)), value, model.dtype)
        for kept in model.state
    )


def width(model: StepModel, state: tuple[Array, ...]) -> int:
    """Columns of a past."""
    return int(state[0].shape[_axis(model)])


def longer(model: StepModel, state: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, ...]:
    """A past with columns after it."""
    return tuple(np.concatenate(pair, _axis(model)) for pair in zip(state, new, strict=True))


def columns(model: StepModel, state: tuple[Array, ...], order: Sequence[int] | Array) -> tuple[Array, ...]:
    """Some columns of a past, in this order."""
    return tuple(tensor.take(list(order), _axis(model)) for tensor in state)


def put(
    model: StepModel, state: tuple[Array, ...], sentence: int, places: Sequence[int] | Array, own: tuple[Array, ...]
) -> None:
    """Write a single sentence's columns into places of a batch."""
    for tensor, new in zip(state, own, strict=True):
        np.moveaxis(tensor[sentence], _axis(model) - 1, 0)[list(places)] = np.moveaxis(new[0], _axis(model) - 1, 0)


def _axis(model: StepModel) -> int:
    axes = {1 + kept.index("past") for kept in model.state}
    assert len(axes) == 1
    return axes.pop()


@torch.inference_mode()
def whole_pass(case: Case) -> dict[str, Array]:
    """What the network says of all three pairs at once, without a cache."""
    output = case.network(*map(torch.from_numpy, (case.source_ids, case.source_mask, case.target_ids)))
    return {
        "log_probabilities": output.logits.log_softmax(-1).numpy(),
        "encoder": torch.stack(output.encoder_attention, 1).numpy(),
        "decoder": torch.stack(output.decoder_attention, 1).numpy(),
        "cross": torch.stack(output.cross_attention, 1).numpy(),
    }
