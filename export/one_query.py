"""Rewrites of a decoder that reads one new position of each sentence, in a loop that lengthens the past by itself.

- Past and new position lie in one tensor there after every step: attention to each of them apart, put together again,
  becomes attention to the whole (`attend_once`).
- Cutting one position into heads moves nothing in memory: the transposes are left out (`drop_transposes`).

What is not found in a graph is left as it is.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper, shape_inference

from export.optimise import attribute, drop_unused, reads, reads_of, rename
from model.steps import Array


class Grown(NamedTuple):
    """What gets longer with every step: a state, or who sees it."""

    new: str
    """Name of what the step adds to it."""
    whole: str
    """Name for both together."""
    axis: int
    """Along which they are joined."""
    rank: int
    """How many axes it has."""


def for_one_query(decoder: ModelProto, states: Mapping[str, Grown]) -> None:
    """Rewrite a finished decoder, in place, for one new position of each sentence.

    Args:
        decoder: its inputs and outputs name their axes.
        states: by the names of the inputs; `whole` is made of each.
    """
    graph = decoder.graph
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "query":
                dim.dim_value = 1
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    outputs = len(graph.output)
    for name, grown in states.items():
        graph.node.append(helper.make_node("Concat", [name, grown.new], [grown.whole], axis=grown.axis))
        graph.output.append(helper.make_tensor_value_info(grown.whole, types[name], None))
    join_once(graph, states)
    attend_once(graph, states)
    _put_in_order(graph)
    drop_unused(graph)
    drop_transposes(graph, _sizes(decoder))
    drop_unused(graph)
    del graph.output[outputs:]


def join_once(graph: GraphProto, states: Mapping[str, Grown]) -> None:
    """Let what joins a state and its new part read the whole, where that is the same; in place."""
    wholes = {grown.whole for grown in states.values()}
    renamed: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        grown = states.get(node.input[0]) if node.op_type == "Concat" and node.output[0] not in wholes else None
        axes = () if grown is None else (grown.axis, grown.axis - grown.rank)
        if grown is not None and list(node.input[1:]) == [grown.new] and attribute(node, "axis") in axes:
            renamed[node.output[0]] = grown.whole
        else:
            nodes.append(node)
    rename(nodes, lambda name: renamed.get(name, name))
    del graph.node[:]
    graph.node.extend(nodes)


def attend_once(graph: GraphProto, states: Mapping[str, Grown]) -> None:
    """Let one product with the whole take the place of two, with the past and with what is new; in place.

        q · pastᵀ ┐                                    w[:past] · past ┐
                  ├ Concat  =  q · wholeᵀ      and                     ├ Add  =  w · whole
        q · newᵀ  ┘                                    w[past:] · new  ┘

    The nodes are left in no order, and what is of no use any more is left in.
    """
    work = _Parts(graph, states)
    for node in list(graph.node):
        nodes = work.scores(node) if node.op_type == "Concat" else work.values(node) if node.op_type == "Add" else []
        if nodes:
            graph.node.remove(node)
            graph.node.extend(nodes)


class _Parts:
    """Where the parts of a state are read."""

    def __init__(self, graph: GraphProto, states: Mapping[str, Grown]) -> None:
        self.makers = _makers(graph.node)
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.states = states

    def scores(self, node: NodeProto) -> list[NodeProto]:
        """For q · pastᵀ and q · newᵀ, put together: q · wholeᵀ."""
        past, new = self.both(node)
        if past is None or new is None or past.input[0] != new.input[0]:
            return []
        turns = [self.makers.get(product.input[1]) for product in (past, new)]
        if turns[0] is None or turns[1] is None or not turns[0].op_type == turns[1].op_type == "Transpose":
            return []
        perms: list[list[int]] = [attribute(turn, "perm") for turn in turns if turn is not None]
        if perms[0] != perms[1]:
            return []
        grown = self.states.get(turns[0].input[0])
        # Along its last axis the product has the past's columns: there the whole must be longer, and there alone.
        if grown is None or turns[1].input[0] != grown.new or perms[0][-1] != grown.axis:
            return []
        if attribute(node, "axis") not in (-1, len(perms[0]) - 1):
            return []
        turned = f"{node.output[0]}_whole"
        return [
            helper.make_node("Transpose", [grown.whole], [turned], perm=perms[0]),
            helper.make_node("MatMul", [past.input[0], turned], node.output),
        ]

    def values(self, node: NodeProto) -> list[NodeProto]:
        """For w[:past] · past + w[past:] · new: w · whole."""
        past, new = self.both(node)
        grown = self.states.get(past.input[1]) if past is not None else None
        if past is None or new is None or grown is None or new.input[1] != grown.new:
            return []
        cuts = [self.makers.get(product.input[0]) for product in (past, new)]
        first, second = cuts
        if first is None or second is None or not first.op_type == second.op_type == "Slice":
            return []
        (weights, begin, count, *axes), (others, middle, end, *other_axes) = first.input, second.input
        length = self.makers.get(count)
        whole = (
            weights == others
            and grown.axis == grown.rank - 2
            and count == middle
            and bool(axes)
            and axes == other_axes
            and self.is_number(axes[0], lambda one: one in (-1, grown.rank - 1))
            and all(self.is_number(step, lambda one: one == 1) for step in axes[1:])
            and self.is_number(begin, lambda one: one == 0)
            and self.is_number(end, lambda one: one >= np.iinfo(np.int32).max)
            and length is not None
            and length.op_type == "Shape"
            and length.input[0] in self.states
            and attribute(length, "start") == self.states[length.input[0]].axis
        )
        return [helper.make_node("MatMul", [weights, grown.whole], node.output)] if whole else []

    def both(self, node: NodeProto) -> tuple[NodeProto | None, NodeProto | None]:
        """The two products that a node takes in; None for what is none."""
        if len(node.input) != 2:
            return None, None
        makers = [self.makers.get(name) for name in node.input]
        past, new = (maker if maker is not None and maker.op_type == "MatMul" else None for maker in makers)
        return past, new

    def is_number(self, name: str, holds: Callable[[float], bool]) -> bool:
        """Whether this is a constant of one number of which something holds."""
        value = self.constants.get(name)
        return value is not None and value.size == 1 and holds(value.item())


def drop_transposes(graph: GraphProto, sizes: Mapping[str, Sequence[int]]) -> None:
    """Leave out, in place, transposes that move only axes of one entry, where a Reshape before or after does the same.

    Args:
        graph: the graph.
        sizes: of each tensor's axes, as far as they are known; 0 for any other.
    """
    makers, readers = _makers(graph.node), Counter([*reads(graph), *(value.name for value in graph.output)])
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        perm = attribute(node, "perm") if node.op_type == "Transpose" else None
        known = sizes.get(node.input[0], ()) if perm else ()
        if perm is None or len(known) != len(perm) or not _moves_nothing(perm, known):
            nodes.append(node)
            continue
        reshape = makers.get(node.input[0])
        if _only_reshaped(graph, node.output[0], readers, constants):
            renamed[node.output[0]] = node.input[0]
        elif (
            reshape is not None
            and reshape.op_type == "Reshape"
            and readers[node.input[0]] == 1
            and list(known).count(0) <= 1
        ):
            shape = numpy_helper.from_array(np.array([known[axis] or -1 for axis in perm]), f"{node.output[0]}_shape")
            graph.initializer.append(shape)
            nodes.remove(reshape)
            nodes.append(helper.make_node("Reshape", [reshape.input[0], shape.name], node.output))
        else:
            nodes.append(node)
    rename(nodes, lambda name: renamed.get(name, name))
    del graph.node[:]
    graph.node.extend(nodes)


def _moves_nothing(perm: Sequence[int], sizes: Sequence[int]) -> bool:
    """The axes with several entries keep their order."""
    moved = [axis for axis in perm if sizes[axis] != 1]
    return moved == sorted(moved)


def _only_reshaped(graph: GraphProto, name: str, readers: Mapping[str, int], constants: Mapping[str, Array]) -> bool:
    """Whether a tensor is read by Reshapes alone whose shapes do not depend on its axes."""
    reshapes = [
        node
        for node in graph.node
        if node.op_type == "Reshape"
        and node.input[0] == name
        and np.all(constants.get(node.input[1], np.zeros(1)) != 0)
    ]
    return len(reshapes) == readers[name]


def _sizes(model: ModelProto) -> dict[str, list[int]]:
    """Sizes of every tensor's axes that are always the same; 0 for any other."""
    found = shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*found.input, *found.output, *found.value_info)
        if value.type.tensor_type.HasField("shape")
    }


def _makers(nodes: Iterable[NodeProto]) -> dict[str, NodeProto]:
    return {name: node for node in nodes for name in node.output}


def _put_in_order(graph: GraphProto) -> None:
    """Every node after those that make what it reads, and otherwise as they stand; in place."""
    makers, placed, nodes = _makers(graph.node), set[str](), list[NodeProto]()

    def place(node: NodeProto) -> None:
        if node.output[0] in placed:
            return
        placed.add(node.output[0])
        for name in reads_of(node):
            if name in makers:
                place(makers[name])
        nodes.append(node)

    for node in graph.node:
        place(node)
    del graph.node[:]
    graph.node.extend(nodes)
