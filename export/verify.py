"""Hold a bundle's graphs to the PyTorch network they came from, before anything is written.

Values are compared at shapes that were not traced, with padding, pasts, several beams and several new positions; then
whole outputs are decoded by both, with the one search.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from export.manifest import Precision
from model.checkpoint import Checkpoint
from model.errors import LimelightError
from model.evaluate import Decoder, Evaluation, evaluate
from model.options import LARGEST_BEAM
from model.pairs import Pair
from model.steps import ALL_FAMILIES, Memory, Question, StepModel, causal
from model.torch_steps import TorchStepModel
from model.vocabulary import END, SPECIAL_TOKENS

TOLERANCES: Mapping[Precision, Mapping[str, float]] = {
    "fp32": {
        "log_probabilities": 1e-4,
        "encoder_attention": 1e-5,
        "decoder_attention": 1e-5,
        "cross_attention": 1e-5,
        "state": 1e-4,
    },
    # int8 changes values by design: it is held to its answers, below. What it changes is measured and published.
    "int8": {},
    # Ten bits of mantissa, and a sum's order that differs from device to device.
    "fp16": {
        "log_probabilities": 0.1,
        "encoder_attention": 0.02,
        "decoder_attention": 0.02,
        "cross_attention": 0.02,
        "state": 0.05,
    },
}
"""Largest allowed difference of each output from PyTorch."""

METRIC_LOSS: Mapping[str, float] = {"wer": 1.0, "per": 0.5, "bleu": 0.7, "chrf": 0.7}
"""How many points int8 and fp16 may lose against PyTorch's float32."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one comparison."""

    sources: tuple[int, ...]
    """Length of each sentence's source."""
    past: int
    """Columns of the past."""
    query: int
    """New positions of each sentence."""


SHAPES = (
    Shape(sources=(1,), past=1, query=1),
    Shape(sources=(2, 9, 4), past=16, query=1),
    Shape(sources=(13, 6), past=64, query=4),
    Shape(sources=(31, 1, 17, 8), past=1, query=11),
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
        tokens: ids of each precision's answers.
    """

    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: int = 0
    equal: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict, repr=False)


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
        problems += over_tolerance(precision, parity.differences[precision])
    expected = decode_pairs(reference, checkpoint, pairs, lambda count: progress("PyTorch", count))
    parity.answers, parity.quality["torch"] = len(expected.answers), dict(expected.metrics)
    for precision, model in models.items():
        found = decode_pairs(model, checkpoint, pairs, lambda count, name=precision: progress(name, count))  # type: ignore[misc]
        parity.quality[precision], parity.tokens[precision] = dict(found.metrics), found.tokens
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
    return Shape(sources=(min(limits.longest_source, 512), 7), past=1, query=min(limits.longest_target, 512))


def _compare_shape(
    reference: StepModel, model: StepModel, checkpoint: Checkpoint, shape: Shape, random: np.random.Generator
) -> dict[str, float]:
    # As a tokenizer makes them. Entries that training never showed make of float32's last digits what they like.
    mask = np.arange(max(shape.sources)) < np.array(shape.sources)[:, None]
    sources = random.integers(len(SPECIAL_TOKENS), len(checkpoint.source), mask.shape) * mask
    sources[np.arange(len(sources)), np.array(shape.sources) - 1] = END
    memories = [side.encode(sources, mask) for side in (reference, model)]
    encoder = [memory.encoder_attention for memory in memories]
    steps = [
        side.step(question)
        for side, question in zip(
            (reference, model), _questions((reference, model), memories, checkpoint, shape), strict=True
        )
    ]
    found = {"encoder_attention": _distance(*encoder)}
    for family in ("cross_attention", "decoder_attention"):
        found[family] = _distance(*(getattr(step, family) for step in steps))
    found["log_probabilities"] = max(
        _distance(*(getattr(step, name) for step in steps))
        for name in ("top_log_probabilities", "next_log_probabilities")
    )
    found["state"] = max(_distance(*sides) for sides in zip(*(step.state for step in steps), strict=True))
    return found


def _questions(
    sides: tuple[StepModel, ...], memories: list[Memory], checkpoint: Checkpoint, shape: Shape
) -> Iterator[Question]:
    """The same random question to both sides, each with its own memory: pasts with gaps, hypotheses of all ages."""
    for side, memory in zip(sides, memories, strict=True):
        random = np.random.default_rng(1)
        batch, query = len(shape.sources), shape.query
        alone = np.eye(query, dtype=bool)[None].repeat(batch, 0)
        sizes = {"past": shape.past, "row": query, "source": 0}
        yield Question(
            target_ids=random.integers(1, len(checkpoint.target), (batch, query)),
            positions=random.integers(0, checkpoint.config.model.longest_target, (batch, query)),
            new_visible=causal(query).repeat(batch, 0) if query > LARGEST_BEAM // 2 else alone,
            past_visible=random.random((batch, query, shape.past)) < 0.5,
            next_ids=random.integers(1, len(checkpoint.target), (batch, query)),
            top=len(checkpoint.target),
            memory=memory,
            state=tuple(
                random.normal(size=(batch, *(sizes[size] if isinstance(size, str) else size for size in kept))).astype(
                    side.dtype
                )
                for kept in side.state
            ),
            attention=ALL_FAMILIES,
        )


def _distance(left: np.ndarray | None, right: np.ndarray | None) -> float:
    if left is None or right is None:
        raise VerificationError("the export differs from the checkpoint: attention is missing")
    if left.shape != right.shape:
        raise VerificationError(
            f"the export differs from the checkpoint: a shape of {right.shape}, expected {left.shape}"
        )
    # Where both rule something out, both are minus infinity.
    difference = float(np.abs(np.subtract(left, right, where=left != right, out=np.zeros(left.shape))).max(initial=0.0))
    return difference if np.isfinite(difference) else float("inf")


def over_tolerance(precision: Precision, differences: Mapping[str, float]) -> list[str]:
    """What to say of each output that differs by more than TOLERANCES allows."""
    return [
        f"{precision} {name} by {differences[name]:.2e}, the limit is {limit:.0e}"
        for name, limit in TOLERANCES[precision].items()
        if not differences[name] <= limit
    ]


def decode_pairs(
    model: StepModel, checkpoint: Checkpoint, pairs: Sequence[Pair], progress: Callable[[int], None]
) -> Evaluation:
    """Decode the sources, greedily, and score the answers."""
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
