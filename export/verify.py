"""Hold a bundle's graphs to the PyTorch network they came from, before anything is written.

Values are compared at shapes that were not traced, with padding, pasts, several beams and several new positions; then
whole outputs are decoded by both, with the one search.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from export.manifest import Precision
from model.checkpoint import Checkpoint
from model.errors import LimelightError
from model.evaluate import Decoder, Evaluation, evaluate
from model.pairs import Pair
from model.steps import StepModel
from model.torch_steps import TorchStepModel

TOLERANCES: Mapping[Precision, Mapping[str, float]] = {
    "fp32": {
        "log_probabilities": 1e-4,
        "encoder_attention": 1e-5,
        "decoder_attention": 1e-5,
        "cross_attention": 1e-5,
    },
    # int8 changes values by design: it is held to its answers, below. What it changes is measured and published.
    "int8": {},
}
"""Largest allowed difference of each output from PyTorch."""

METRIC_LOSS: Mapping[str, float] = {"wer": 1.0, "per": 0.5, "bleu": 0.7, "chrf": 0.7}
"""How many points int8 may lose against PyTorch's float32."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one comparison."""

    sources: tuple[int, ...]
    """Length of each sentence's source."""
    beam: int
    """Rows of each sentence."""
    news: tuple[int, ...]
    """New positions of each step."""


SHAPES = (
    Shape(sources=(1,), beam=1, news=(1, 1)),
    Shape(sources=(2, 9, 4), beam=1, news=(1, 1, 1)),
    Shape(sources=(13, 6), beam=4, news=(3, 1, 2)),
    Shape(sources=(31, 1, 17, 8), beam=2, news=(11,)),
)
"""None of them the traced one; among them a single sentence, padding, beams and several new positions."""


class VerificationError(LimelightError):
    """An exported graph that differs from the network it came from."""


@dataclass
class Parity:
    """What a verification found.

    Attributes:
        differences: largest difference from PyTorch, of each precision's outputs.
        quality: metrics of PyTorch and of each precision on the same sources.
        answers: how many sources were decoded.
        equal: how many of each precision's answers equal PyTorch's.
    """

    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: int = 0
    equal: dict[str, int] = field(default_factory=dict)


def verify(
    checkpoint: Checkpoint,
    models: Mapping[Precision, StepModel],
    pairs: Sequence[Pair],
    progress: Callable[[str, int], None] = lambda what, count: None,
) -> Parity:
    """Compare every precision with PyTorch.

    Args:
        checkpoint: the network.
        models: the exported graphs, by precision.
        pairs: what to decode; the validation set.
        progress: told what was decoded, and how many more sources.

    Raises:
        VerificationError: with every difference over its limit.
    """
    parity, problems = Parity(), []
    reference = TorchStepModel(checkpoint.model)
    for precision, model in models.items():
        parity.differences[precision] = compare_values(reference, model, checkpoint)
        problems += _over_tolerance(precision, parity.differences[precision])
    expected = _evaluate(reference, checkpoint, pairs, lambda count: progress("PyTorch", count))
    parity.answers, parity.quality["torch"] = len(expected.answers), dict(expected.metrics)
    for precision, model in models.items():
        found = _evaluate(model, checkpoint, pairs, lambda count, name=precision: progress(name, count))  # type: ignore[misc]
        parity.quality[precision] = dict(found.metrics)
        parity.equal[precision] = sum(a == b for a, b in zip(expected.tokens, found.tokens, strict=True))
        problems += _wrong_answers(precision, expected, found)
    if problems:
        raise VerificationError("the export differs from the checkpoint: " + "; ".join(problems))
    return parity


def compare_values(reference: StepModel, model: StepModel, checkpoint: Checkpoint) -> dict[str, float]:
    """Largest absolute difference of each output over SHAPES and a long one, for the same random inputs."""
    random = np.random.default_rng(0)
    largest: dict[str, float] = {}
    for shape in (*SHAPES, _long_shape(checkpoint)):
        for name, difference in _compare_shape(reference, model, checkpoint, shape, random).items():
            largest[name] = max(largest.get(name, 0.0), difference)
    return largest


def _long_shape(checkpoint: Checkpoint) -> Shape:
    # Far positions too, as far as the quadratic size of attention lets a verification go.
    limits = checkpoint.config.model
    return Shape(sources=(min(limits.longest_source, 512), 7), beam=1, news=(min(limits.longest_target, 512) - 1, 1))


def _compare_shape(
    reference: StepModel, model: StepModel, checkpoint: Checkpoint, shape: Shape, random: np.random.Generator
) -> dict[str, float]:
    mask = np.arange(max(shape.sources)) < np.array(shape.sources)[:, None]
    sources = random.integers(1, len(checkpoint.source), mask.shape) * mask
    rows = len(shape.sources) * shape.beam
    memories = [side.encode(sources, mask) for side in (reference, model)]
    found = {"encoder_attention": _distance(*(memory.encoder_attention for memory in memories))}
    states: list[object] = [None, None]
    position = 0
    for new in shape.news:
        ids = random.integers(1, len(checkpoint.target), (rows, new))
        ages = np.maximum(position - np.arange(rows) % 3, 0)  # rows of different ages, their pasts right-aligned
        positions = ages[:, None] + np.arange(new)
        parents = random.integers(0, rows, rows)
        top = min(5, len(checkpoint.target))
        left, right = (
            side.step(ids, positions, memory, state, parents, top)
            for side, memory, state in zip((reference, model), memories, states, strict=True)
        )
        states, position = [left.state, right.state], position + new
        for name in ("cross_attention", "decoder_attention"):
            found[name] = max(found.get(name, 0.0), _distance(getattr(left, name), getattr(right, name)))
        best = _distance(left.top_log_probabilities, right.top_log_probabilities)
        found["log_probabilities"] = max(found.get("log_probabilities", 0.0), best)
    given, wanted = (random.integers(1, len(checkpoint.target), (len(shape.sources), 6)) for _ in range(2))
    scores = [side.score(given, wanted, memory) for side, memory in zip((reference, model), memories, strict=True)]
    scored = _distance(*(side.log_probabilities for side in scores))
    found["log_probabilities"] = max(found["log_probabilities"], scored)
    return found


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    if left.shape != right.shape:
        raise VerificationError(
            f"the export differs from the checkpoint: a shape of {right.shape}, expected {left.shape}"
        )
    difference = float(np.abs(left - right).max(initial=0.0))
    return difference if np.isfinite(difference) else float("inf")


def _over_tolerance(precision: Precision, differences: Mapping[str, float]) -> list[str]:
    return [
        f"{precision} {name} by {differences[name]:.2e}, the limit is {limit:.0e}"
        for name, limit in TOLERANCES[precision].items()
        if not differences[name] <= limit
    ]


def _evaluate(
    model: StepModel, checkpoint: Checkpoint, pairs: Sequence[Pair], progress: Callable[[int], None]
) -> Evaluation:
    limits = checkpoint.config.model
    decoder = Decoder(model, checkpoint.source, checkpoint.target, limits.longest_source, limits.longest_target)
    return evaluate(decoder, checkpoint.config.task, pairs, progress=progress)


def _wrong_answers(precision: Precision, expected: Evaluation, found: Evaluation) -> list[str]:
    if precision == "fp32":
        different = [
            f"{source!r}: {right!r}, exported {answer!r}"
            for source, right, answer in zip(expected.sources, expected.tokens, found.tokens, strict=True)
            if answer != right
        ]
        return [f"fp32 decodes {len(different)} sources differently, such as {different[0]}"] if different else []
    return [
        f"{precision} {name} {found.metrics[name]:.2f} against {value:.2f}, more than {METRIC_LOSS[name]} points worse"
        for name, value in expected.metrics.items()
        if _loss(name, value, found.metrics[name]) > METRIC_LOSS[name]
    ]


def _loss(name: str, expected: float, found: float) -> float:
    return found - expected if name in ("wer", "per") else expected - found
