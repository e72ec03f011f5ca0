"""Sources are read in groups of like length: padding costs the encoder as much as words do. Torch-free."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from model.grid import KeepsState
from model.steps import Array, Kept, Memory, StepModel, pad

WASTE = 48
"""Padded tokens that are as dear as one more pass of the encoder, about: a group may have so many."""


def read(model: StepModel, sources: Sequence[Sequence[int]], attention: bool = False) -> Memory:
    """Encode some sources, with little padding.

    Args:
        model: what reads them.
        sources: token ids of each, the end token last.
        attention: return encoder attention too.

    Returns:
        The memory of all, in the order given, padded to the longest; what is in the padding means nothing.
    """
    groups = alike([len(source) for source in sources])
    if len(groups) == 1 or isinstance(model, KeepsState):  # a device is slowed by passes rather than by padding
        return model.encode(*pad(sources), attention)
    read = [(group, model.encode(*pad([sources[index] for index in group]), attention)) for group in groups]
    _, mask = pad(sources)
    tensors = tuple(
        _together(kept, mask, [(group, memory.tensors[place]) for group, memory in read])
        for place, kept in enumerate(model.memory)
    )
    if not attention:
        return Memory(tensors, mask)
    weights = [(group, memory.encoder_attention) for group, memory in read if memory.encoder_attention is not None]
    layers, heads = weights[0][1].shape[1:3]
    return Memory(tensors, mask, _together((layers, heads, "source", "source"), mask, weights))


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by groups, each of which wastes little when it is padded to its longest; the longest group first."""
    groups: list[list[int]] = []
    wasted = longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        wasted += longest - lengths[index]
        if not groups or wasted > WASTE:
            groups.append([])
            wasted, longest = 0, lengths[index]
        groups[-1].append(index)
    return groups


def _together(kept: Kept, mask: Array, parts: Sequence[tuple[list[int], Array]]) -> Array:
    """Tensors of some groups as one of all sentences, padded with zeros."""
    _, first = parts[0]
    sizes = [mask.shape[1] if size == "source" else int(size) for size in kept]
    whole: Array = np.zeros((len(mask), *sizes), first.dtype)
    for group, part in parts:
        inside: tuple[Any, ...] = (group, *map(slice, part.shape[1:]))
        whole[inside] = part
    return whole
