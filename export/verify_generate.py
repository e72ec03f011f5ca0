"""Run `generate.onnx`, and hold it to the answers of the engine's own graphs and search."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from export.manifest import Precision
from export.runtime import RuntimeOptions
from export.verify import TOLERANCES, VerificationError
from model.hypotheses import Hypothesis
from model.search import SearchOptions, search
from model.steps import Array, Family, StepModel, pad

CHECKED = 16
"""Sources that are decoded by both."""

BEAM_SIZES = (1, 4)
"""Each time with so many hypotheses."""

MAY_DIFFER: Mapping[Precision, int] = {"fp32": 0, "int8": 2, "fp16": 2}
"""Answers that may be others. A sum's last bit, which depends on how many columns a mask hides, can tip a rounding to
int8 or float16, and where two hypotheses are nearly as good as each other, the answer."""

CROSS: frozenset[Family] = frozenset({"cross"})


def open_generate(path: Path, options: RuntimeOptions | None = None) -> ort.InferenceSession:
    """Load the graph."""
    return (options or RuntimeOptions()).session(str(path))


def generate(
    session: ort.InferenceSession, sources: Sequence[Sequence[int]], options: SearchOptions
) -> dict[str, Array]:
    """Run the graph.

    Args:
        session: of the graph.
        sources: token ids of each sentence, the end token last.
        options: of which it reads beam size, longest and length penalty.

    Returns:
        What the graph returns, by name.
    """
    ids, mask = pad(sources)
    feeds = {
        "source_ids": ids,
        "source_mask": mask,
        "beam_size": np.array(options.beam_size),
        "longest": np.array(options.longest),
        "length_penalty": np.array(options.length_penalty, np.float32),
    }
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def verify_generate(
    path: Path, precision: Precision, model: StepModel, sources: Sequence[Sequence[int]], longest: int
) -> None:
    """Compare answers.

    Args:
        path: of the graph.
        precision: that it computes in.
        model: the engine's graphs of the same precision.
        sources: token ids of each sentence; of many the first are taken.
        longest: most tokens to generate.

    Raises:
        VerificationError: they differ.
    """
    session, taken = open_generate(path), sources[:CHECKED]
    for beam_size in BEAM_SIZES if taken else ():
        options = SearchOptions(longest=longest, beam_size=beam_size)
        found = generate(session, taken, options)
        expected = search(model, taken, [options] * len(taken), CROSS)
        problems = [
            f"{precision} generate.onnx, beam size {beam_size}, source {list(source)}: {problem}"
            for index, (source, [hypothesis]) in enumerate(zip(taken, expected, strict=True))
            if (problem := _problem(found, index, hypothesis, TOLERANCES[precision]))
        ]
        if len(problems) > MAY_DIFFER[precision]:
            raise VerificationError(f"the export differs from the checkpoint: {problems[0]} ({len(problems)} differ)")


def _problem(
    found: Mapping[str, Array], index: int, expected: Hypothesis, tolerances: Mapping[str, float]
) -> str | None:
    """What is wrong with one answer."""
    count = len(expected.tokens)
    tokens = found["target_ids"][index]
    if tokens[:count].tolist() != expected.tokens or tokens[count:].any():
        return f"{tokens.tolist()}, the engine's answer is {expected.tokens}"
    if expected.cross_attention is None:
        raise ValueError("the search was not asked for cross-attention")
    columns = expected.cross_attention.shape[-1]
    differences = {
        "log_probabilities": max(
            _largest(found["log_probabilities"][index, :count] - expected.log_probabilities),
            _largest(found["score"][index] - expected.score),
        ),
        "cross_attention": _largest(found["cross_attention"][index, :, :, :count, :columns] - expected.cross_attention),
    }
    for name, difference in differences.items():
        if name in tolerances and not difference <= tolerances[name]:
            return f"{name} differs from the engine's by {difference:.2e}, the limit is {tolerances[name]:.0e}"
    return None


def _largest(difference: Array) -> float:
    return float(np.abs(difference).max(initial=0.0))
