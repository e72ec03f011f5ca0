"""The graphs that a device's store moves tensors with: one for each thing that it does, made for a model's own axes.

    blank    shapes ──► state                                   zeros
    join     memory, arriving, state ──► memory, state          new sentences after the others
    leave    memory, state, order ──► memory, state             sentences by place
    narrow   memory, columns ──► memory                         source columns
    resize   state, columns ──► state                           columns of the past
    follow   state, parents ──► state                           each row's own part as its parent had it
    write    state, next, here ──► state                        new columns of the past

Each takes and gives all tensors at once, so that a step costs one run more and not one for each tensor. Index arrays
come from the host: they are small, and which sentence lies where is decided there. Where an index says 0 for want of
anything to take, nobody sees what is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.graph_bytes import GraphBytes
from model.steps import Array, Kept


@dataclass(frozen=True)
class Tensor:
    """One tensor of memory or state."""

    name: str
    """Unlike that of any other."""
    dtype: str
    """Its element type."""
    kept: Kept
    """Its axes without the sentence."""

    @property
    def rank(self) -> int:
        """Axes with the sentence."""
        return 1 + len(self.kept)

    def axis(self, size: str) -> int | None:
        """Which axis is of a size that changes, if one is."""
        return 1 + self.kept.index(size) if size in self.kept else None


Tensors = Sequence[Tensor]


def arriving(tensor: Tensor) -> str:
    """Name of a tensor of those that join."""
    return f"arriving.{tensor.name}"


def shape_of(tensor: Tensor) -> str:
    """Name of the shape that a blank tensor is to have."""
    return f"shape.{tensor.name}"


def parents_of(tensor: Tensor) -> str:
    """Name of each row's parent, laid out so that it fits the tensor."""
    return f"parents.{tensor.name}"


def result(tensor: Tensor) -> str:
    """Name of a tensor that is returned."""
    return f"new.{tensor.name}"


def news(tensor: Tensor) -> str:
    """Name of what is new of a tensor."""
    return f"next.{tensor.name}"


def blank(state: Tensors) -> bytes:
    """Zeros of the shapes that are asked for."""
    graph = GraphBytes()
    for tensor in state:
        _output(graph, tensor, _zeros(graph, tensor, result(tensor)))
    return graph.model()


def join(memory: Tensors, state: Tensors) -> bytes:
    """Some sentences of a batch after those that are there, all as wide as `columns` says; with a blank state."""
    graph = GraphBytes()
    for name in ("sentences", "columns", "arriving_columns"):
        graph.input(name, "int64", 1)
    for tensor in memory:
        there = graph.input(tensor.name, tensor.dtype, tensor.rank)
        new = graph.input(arriving(tensor), tensor.dtype, tensor.rank)
        new = graph.node("Gather", [new, "sentences"], f"{new}.taken", axis=0)
        if (axis := tensor.axis("source")) is not None:
            there = graph.node("Gather", [there, "columns"], f"{there}.fit", axis=axis)
            new = graph.node("Gather", [new, "arriving_columns"], f"{new}.fit", axis=axis)
        _output(graph, tensor, graph.node("Concat", [there, new], result(tensor), axis=0))
    for tensor in state:
        there = graph.input(tensor.name, tensor.dtype, tensor.rank)
        new = _zeros(graph, tensor, arriving(tensor))
        _output(graph, tensor, graph.node("Concat", [there, new], result(tensor), axis=0))
    return graph.model()


def take(tensors: Tensors, size: str | None, index: str) -> bytes:
    """Sentences (without a size), or columns of an axis, as an index says; tensors without that axis are left out."""
    graph = GraphBytes()
    graph.input(index, "int64", 1)
    for tensor in tensors:
        axis = 0 if size is None else tensor.axis(size)
        if axis is not None:
            there = graph.input(tensor.name, tensor.dtype, tensor.rank)
            _output(graph, tensor, graph.node("Gather", [there, index], result(tensor), axis=axis))
    return graph.model()


def follow(state: Tensors) -> bytes:
    """Each row's own part as its parent had it; tensors without rows are left out."""
    graph = GraphBytes()
    for tensor in state:
        if (axis := tensor.axis("row")) is not None:
            there = graph.input(tensor.name, tensor.dtype, tensor.rank)
            parents = graph.input(parents_of(tensor), "int64", tensor.rank)
            shape = graph.node("Shape", [there], f"{there}.shape")
            index = graph.node("Expand", [parents, shape], f"{there}.index")
            _output(graph, tensor, graph.node("GatherElements", [there, index], result(tensor), axis=axis))
    return graph.model()


def write(state: Tensors, width: int) -> bytes:
    """What is new in the column of the ring that `here` is true for; tensors without a past are left out.

    A ring of columns of `width` rows each is looked at as [ring width], so that what is new fits every column, and is
    chosen where it belongs: one pass over the past, and no index of its size.
    """
    graph = GraphBytes()
    graph.input("here", "bool", 1)
    for tensor in state:
        if (axis := tensor.axis("past")) is None:
            continue
        there = graph.input(tensor.name, tensor.dtype, tensor.rank)
        new = graph.input(news(tensor), tensor.dtype, tensor.rank)
        before, after = [0] * axis, [size if isinstance(size, int) else width for size in tensor.kept[axis:]]
        rows, one, flat, mask = (
            graph.constant(f"{there}.{name}", np.array(shape, np.int64))
            for name, shape in (
                ("rows", [*before, -1, width, *after]),
                ("one", [*before, 1, width, *after]),
                ("flat", [*before, -1, *after]),
                ("mask", [-1, *[1] * (1 + len(after))]),
            )
        )
        chosen = graph.node(
            "Where",
            [
                graph.node("Reshape", ["here", mask], f"{there}.here"),
                graph.node("Reshape", [new, one], f"{new}.column"),
                graph.node("Reshape", [there, rows], f"{there}.columns"),
            ],
            f"{there}.written",
        )
        _output(graph, tensor, graph.node("Reshape", [chosen, flat], result(tensor)))
    return graph.model()


def _zeros(graph: GraphBytes, tensor: Tensor, name: str) -> str:
    zero: Array = np.array(0, tensor.dtype)
    shape = graph.input(shape_of(tensor), "int64", 1)
    return graph.node("Expand", [graph.constant(f"{tensor.name}.zero", zero), shape], name)


def _output(graph: GraphBytes, tensor: Tensor, name: str) -> None:
    graph.output(name, tensor.dtype, tensor.rank)
