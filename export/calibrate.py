"""Between which values the inputs of a network's matrix products lie, seen on real pairs: what int8 needs to know."""

import random
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnxruntime as ort
from onnx import GraphProto, ModelProto, TensorProto, helper

from export.graphs import Exported
from export.quantise import LEVELS, Ranges, product_inputs
from export.runtime import RuntimeOptions
from model.checkpoint import Checkpoint
from model.errors import DataError
from model.pairs import Pair
from model.steps import Array, causal, pad
from model.vocabulary import BEGIN

MOST_PAIRS = 256
"""Pairs that are looked at: the ranges of more differ by little."""

LONGEST = 512
"""Tokens of source or target beyond which a pair is not looked at: its attention would fill the memory."""

TOKENS = 2048
"""Padded tokens in one pass."""

SAMPLE = 1 << 13
"""Values that are kept of one tensor in one pass, drawn at random, besides the extremes."""

SHARES = np.linspace(0.3, 1.0, 36)
"""Shares of the full range that are tried: to cut off the rarest values makes all others finer."""

Feeds: TypeAlias = dict[str, Array]


def calibrate(
    models: Mapping[str, ModelProto], contracts: Mapping[str, Exported], checkpoint: Checkpoint, pairs: Sequence[Pair]
) -> dict[str, Ranges]:
    """Ranges for `export.quantise.quantise`.

    Args:
        models: traced and optimised "encoder" and "decoder", their weights inside.
        contracts: of these.
        checkpoint: the network, for its tokenizers and limits.
        pairs: real ones; the decoder reads their targets.

    Returns:
        For each graph and each tensor that goes into a product with weights, its lowest and highest value: those that
        make the mean squared error of rounding to 256 levels least.

    Raises:
        DataError: there is no pair to look at.
    """
    batches = _batches(checkpoint, pairs)
    if not batches:
        raise DataError(
            f"none of {len(pairs)} pairs has 2 to {LONGEST} tokens on either side within the model's limits: int8 "
            "needs some, to see between which values activations lie; name other data with --set data..."
        )
    memory = [spec.name for spec in contracts["encoder"].outputs if spec.role == "memory"]
    sessions = {name: _session(model) for name, model in models.items()}
    seen: dict[str, dict[str, list[Array]]] = {
        name: {tensor: [] for tensor in product_inputs(model.graph)} for name, model in models.items()
    }
    for sources, targets in batches:
        ids, mask = pad(sources)
        encoded = _run(sessions["encoder"], {"source_ids": ids, "source_mask": mask}, [*seen["encoder"], *memory])
        _keep(seen["encoder"], encoded, mask)
        read, real = pad([[BEGIN, *target[:-1]] for target in targets])
        feeds = _decoder_feeds(contracts["decoder"], encoded, mask, read)
        _keep(seen["decoder"], _run(sessions["decoder"], feeds, list(seen["decoder"])), real)
    return {
        name: {tensor: _range(np.concatenate(kept)) for tensor, kept in found.items()} for name, found in seen.items()
    }


def renamed(ranges: Ranges, before: GraphProto, after: GraphProto) -> Ranges:
    """Ranges of one graph's tensors for another with the same products in the same order, or with the first of them."""
    names, others = product_inputs(before), product_inputs(after)
    return {other: ranges[name] for name, other in zip(names[: len(others)], others, strict=True)}


def _batches(checkpoint: Checkpoint, pairs: Sequence[Pair]) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Token ids of some pairs, drawn with a fixed seed, those of like length together."""
    chosen = random.Random(0).sample(list(pairs), min(len(pairs), MOST_PAIRS))
    limits = checkpoint.config.model
    most = (min(LONGEST, limits.longest_source), min(LONGEST, limits.longest_target))
    encoded = zip(
        checkpoint.source.encode_ids([pair.source for pair in chosen]),
        checkpoint.target.encode_ids([pair.target for pair in chosen]),
        strict=True,
    )
    fitting = [pair for pair in encoded if all(1 < len(ids) <= limit for ids, limit in zip(pair, most, strict=True))]
    batches: list[tuple[list[list[int]], list[list[int]]]] = []
    for source, target in sorted(fitting, key=lambda pair: max(map(len, pair))):
        if not batches or (len(batches[-1][0]) + 1) * max(len(source), len(target)) > TOKENS:
            batches.append(([], []))
        batches[-1][0].append(source)
        batches[-1][1].append(target)
    return batches


def _session(model: ModelProto) -> ort.InferenceSession:
    """The graph, with the inputs of its products as outputs."""
    wider = ModelProto()
    wider.CopyFrom(model)
    results = {value.name for value in wider.graph.output}
    wider.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in product_inputs(model.graph)
        if name not in results
    )
    return RuntimeOptions().session(wider.SerializeToString())


def _run(session: ort.InferenceSession, feeds: Feeds, names: Sequence[str]) -> Feeds:
    taken = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, taken), strict=True))


def _decoder_feeds(contract: Exported, encoded: Feeds, mask: Array, read: Array) -> Feeds:
    """A whole target at once, each position seeing those before it; a past of one column that nobody sees."""
    count, length = read.shape
    state = [spec for spec in contract.inputs if spec.role == "state"]
    sizes = {"batch": count, "past": 1}
    return {
        **encoded,
        "source_mask": mask,
        "target_ids": read,
        "next_ids": read,
        "positions": np.broadcast_to(np.arange(length), read.shape).copy(),
        "new_visible": causal(length).repeat(count, 0),
        "past_visible": np.zeros((count, length, 1), bool),
        **{
            spec.name: np.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes], np.float32)
            for spec in state
        },
    }


def _keep(seen: Mapping[str, list[Array]], found: Feeds, real: Array) -> None:
    """Some values of each tensor, padding left out, the extremes among them."""
    draw = np.random.default_rng(0)
    for name, kept in seen.items():
        values = found[name].reshape(real.size, -1)[real.ravel()].ravel()
        some = draw.choice(values, SAMPLE) if values.size > SAMPLE else values
        kept.append(np.append(some, [values.min(), values.max()]))


def _range(values: Array) -> tuple[float, float]:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if low == high:
        return 0.0, 1.0
    errors = [_error(values, low * share, high * share) for share in SHARES]
    share = float(SHARES[int(np.argmin(errors))])
    return low * share, high * share


def _error(values: Array, low: float, high: float) -> float:
    step = (high - low) / LEVELS
    rounded = np.rint((values.clip(low, high) - low) / step) * step + low
    return float(np.square(rounded - values).mean())
