"""Rewrites of a traced graph that make a decoder step cheaper, in standard operators and without changing its values.

A step is short: what surrounds its matrix products costs as much as they do. So

- positions of all sentences become rows of one matrix (`flatten`), of which a product and its bias are one `Gemm`;
- attention's 1 / √width moves into the weights that make the queries (`fold_scales`);
- the best tokens are found by blocks (`best_tokens`): a block whose best is not among the best holds none of them.

`bench/profile_step.py` shows what a step consists of.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper, parser

from model.steps import Array

ELEMENTWISE = frozenset({"Add", "Div", "Erf", "LogSoftmax", "Mul", "Relu", "Sigmoid", "Sub", "Tanh"})
"""Operators that treat every row alike, whatever axes come before it."""

SMALLEST_VOCABULARY = 2048
"""Entries from which on it pays to look for the best tokens by blocks."""

BLOCKS = range(64, 257)
"""Sizes of a block: near the square root of common vocabularies."""

BEST = """
best () => () {
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  one_list = Constant <value_ints: ints = [1]> ()
  two_list = Constant <value_ints: ints = [2]> ()
  count = Constant <value_int: int = COUNT> ()
  count_list = Constant <value_ints: ints = [COUNT]> ()
  size = Constant <value_int: int = SIZE> ()
  row_block_token = Constant <value_ints: ints = [-1, COUNT, SIZE]> ()
  block_token = Constant <value_ints: ints = [-1, SIZE]> ()
  row_token = Constant <value_ints: ints = [0, -1]> ()
  cut = Reshape (values, row_block_token)
  block_best = ReduceMax <keepdims: int = 0> (cut, two_list)
  block_top = Min (top, count_list)
  block_values, blocks = TopK (block_best, block_top)
  rows = Shape <start: int = 0, end: int = 1> (values)
  rows_scalar = Squeeze (rows)
  row = Range (zero, rows_scalar, one)
  row_start = Mul (row, count)
  row_start_column = Unsqueeze (row_start, one_list)
  places = Add (blocks, row_start_column)
  flat = Reshape (values, block_token)
  found = Gather (flat, places)
  candidates = Reshape (found, row_token)
  best, best_place = TopK (candidates, top)
  best_rank = Div (best_place, size)
  best_block = GatherElements <axis: int = 1> (blocks, best_rank)
  best_start = Mul (best_block, size)
  best_inside = Mod (best_place, size)
  ids = Add (best_start, best_inside)
}
"""
"""The best of each row of `values` by blocks, in ONNX's own text."""

PAD = """
pad () => () {
  pads = Constant <value_ints: ints = [0, 0, 0, MISSING]> ()
  never = Constant <value_float: float = -inf> ()
  padded = Pad (values, pads, never)
}
"""
"""The last block, filled up."""


def optimise(model: ModelProto, like: str) -> None:
    """Make a traced graph cheaper, in place; what goes in and comes out stays as it is.

    Args:
        model: the graph, its weights inside.
        like: a tensor whose first two axes are those of the positions.
    """
    flatten(model.graph, like)
    join_biases(model.graph)
    fold_scales(model.graph)
    drop_unused(model.graph)


class _Flattening:
    """The state of one `flatten`."""

    def __init__(self, graph: GraphProto, like: str) -> None:
        self.graph, self.like = graph, like
        self.sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        tables = {name for name, shape in self.sizes.items() if len(shape) == 2}
        turned = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in tables]
        self.sizes |= {node.output[0]: self.sizes[node.input[0]][::-1] for node in turned}
        self.weights = tables | {node.output[0] for node in turned}
        self.reshapes = {node.output[0]: node for node in graph.node if node.op_type == "Reshape"}
        self.nodes: list[NodeProto] = []
        self.widths: dict[str, int] = {}
        """Width of every tensor that is rows now, under its old name."""
        self.entered: dict[str, str] = {}
        """Tensors that have axes of their own and a twin that is rows."""
        self.left: dict[str, str] = {}
        """Tensors that are rows and have a twin with all axes."""

    def rows(self, name: str, width: int) -> str:
        """The tensor as rows."""
        if name in self.widths:
            return name
        if name not in self.entered:
            origin = self.reshapes[name].input[0] if name in self.reshapes else name
            self.entered[name] = f"{name}_rows"
            shape = self.constant(f"rows_of_{width}", np.array([-1, width]))
            self.nodes.append(helper.make_node("Reshape", [origin, shape], [f"{name}_rows"]))
            self.widths[f"{name}_rows"] = width
        return self.entered[name]

    def axes(self, name: str, as_name: str | None = None) -> str:
        """The tensor with all its axes."""
        if name not in self.widths or (as_name is None and name in self.left):
            return self.left.get(name, name)
        first, width = "positions_of_rows", self.widths[name]
        if not self.left:
            self.nodes.append(helper.make_node("Shape", [self.like], [first], start=0, end=2))
        whole = self.constant(f"width_{width}", np.array([width]))
        self.left[name] = as_name or f"{name}_axes"
        shape = f"{self.left[name]}_shape"
        self.nodes.append(helper.make_node("Concat", [first, whole], [shape], axis=0))
        self.nodes.append(helper.make_node("Reshape", [name, shape], [self.left[name]]))
        return self.left[name]

    def constant(self, name: str, value: Array) -> str:
        """A constant of the graph, made once."""
        if name not in self.sizes:
            self.sizes[name] = value.shape
            self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def rename(self, before: str, after: str) -> None:
        """Give a tensor that is rows another name."""
        for node in self.nodes:
            node.input[:] = [after if name == before else name for name in node.input]
            node.output[:] = [after if name == before else name for name in node.output]
        self.widths[after] = self.widths.pop(before)

    def take(self, node: NodeProto) -> None:
        """Emit a node, on rows if it can."""
        width = self._width(node)
        if width is None:
            inputs = [name if node.op_type == "Reshape" else self.axes(name) for name in node.input]
            node.input[:] = inputs
        else:
            node.input[:] = [
                name if name in self.sizes or (node.op_type == "MatMul" and index) else self.rows(name, width)
                for index, name in enumerate(node.input)
            ]
            if attribute(node, "axis") is not None:
                _set(node, "axis", -1)
            if node.op_type == "Split":
                width //= len(node.output)
            elif node.op_type == "MatMul":
                width = self.sizes[node.input[1]][1]
            self.widths |= dict.fromkeys(node.output, width)
        self.nodes.append(node)

    def _width(self, node: NodeProto) -> int | None:
        """Width of the rows that a node takes; None where it needs all axes."""
        kind, first = node.op_type, node.input[0] if node.input else ""
        if kind == "MatMul" and node.input[1] in self.weights:
            return self.sizes[node.input[1]][0]
        last = attribute(node, "axis") in (None, -1, 2)
        if kind == "LayerNormalization" and last:
            return self.sizes[node.input[1]][0]
        if kind == "Split" and first in self.widths and len(node.input) == 1 and last:
            return self.widths[first]
        if kind not in ELEMENTWISE or not last:
            return None
        changing = [name for name in node.input if name not in self.sizes]
        constants = [self.sizes[name] for name in node.input if name in self.sizes]
        widths = {self.widths.get(name, self.widths.get(self.entered.get(name, ""))) for name in changing}
        alike = len(widths) == 1 and all(len(shape) < 2 for shape in constants)
        return widths.pop() if alike else None


def flatten(graph: GraphProto, like: str) -> None:
    """Let the positions of all sentences be rows of one matrix between attention and attention, in place.

    Args:
        graph: traced, [sentence position width] around matrices of weights.
        like: a tensor whose first two axes are those of the positions.
    """
    work = _Flattening(graph, like)
    for node in list(graph.node):
        work.take(node)
    for name in [value.name for value in graph.output if value.name in work.widths]:
        work.rename(name, f"{name}_as_rows")
        work.axes(f"{name}_as_rows", name)
    del graph.node[:]
    graph.node.extend(work.nodes)


def join_biases(graph: GraphProto) -> None:
    """Make a product of rows and the sum with its bias one Gemm, in place."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    readers = Counter([*reads(graph), *(value.name for value in graph.output)])
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    gone: set[str] = set()
    nodes = []
    for node in graph.node:
        x, bias = node.input[:2] if node.op_type == "Add" else ("", "")
        if x in shapes:
            x, bias = bias, x
        product = products.get(x)
        if product is not None and readers[x] == 1 and shapes.get(bias) == (shapes.get(product.input[1]) or (0, 0))[1:]:
            gone.add(x)
            nodes.append(helper.make_node("Gemm", [*product.input, bias], node.output, node.name))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(node for node in nodes if not gone & set(node.output))


def fold_scales(graph: GraphProto) -> None:
    """Move a constant factor of heads into the weights and the bias that make them, in place."""
    values = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter([*reads(graph), *(value.name for value in graph.output)])
    gone: dict[str, str] = {}
    for node in graph.node:
        factor = values.get(node.input[1]) if node.op_type == "Mul" else None
        if factor is None or math.prod(factor.dims) != 1:
            continue
        source, part, parts = _before_heads(node.input[0], makers, readers), 0, 1
        split = makers.get(source)
        if split is not None and split.op_type == "Split" and len(split.input) == 1 and readers[source] == 1:
            part, parts = list(split.output).index(source), len(split.output)
            source = _before_heads(split.input[0], makers, readers)
        maker = makers.get(source)
        if maker is None or maker.op_type != "Gemm" or readers[source] != 1:
            continue
        for index in (1, 2):
            before = numpy_helper.to_array(values[maker.input[index]])
            after = np.stack(np.split(before, parts, -1))
            after[part] *= numpy_helper.to_array(factor).item()
            scaled = numpy_helper.from_array(np.concatenate(list(after), -1), f"{maker.output[0]}_scaled_{index}")
            graph.initializer.append(scaled)
            values[scaled.name] = scaled
            maker.input[index] = scaled.name
        gone[node.output[0]] = node.input[0]
    kept = [node for node in graph.node if node.output[0] not in gone]
    for node in kept:
        node.input[:] = [gone.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(kept)


def _before_heads(name: str, makers: Mapping[str, NodeProto], readers: Mapping[str, int]) -> str:
    """What a tensor was before it was cut into heads, if nothing else reads it on the way."""
    while readers[name] == 1 and name in makers and makers[name].op_type in ("Transpose", "Reshape"):
        name = makers[name].input[0]
    return name


def best_tokens(values: str, top: str, outputs: Sequence[str], vocabulary: int) -> list[NodeProto]:
    """Nodes that find the best of each row.

    A large vocabulary is cut into blocks. The k best lie in the k blocks whose own best are the best, so only these are
    looked through.

    Args:
        values: name of the values, [row vocabulary], all finite.
        top: name of k, [1].
        outputs: names for the best values and their ids, [row k], best first.
        vocabulary: entries of each row.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        return [helper.make_node("TopK", [values, top], outputs, axis=-1)]
    divisors = [size for size in BLOCKS if vocabulary % size == 0]
    size = min(divisors, key=lambda one: abs(one - math.isqrt(vocabulary)), default=BLOCKS[len(BLOCKS) // 2])
    missing = -vocabulary % size
    pad = parsed(PAD.replace("MISSING", str(missing)), {"values": values}) if missing else []
    text = BEST.replace("COUNT", str((vocabulary + missing) // size)).replace("SIZE", str(size))
    names = {"values": "best_tokens/padded" if missing else values, "top": top, "best": outputs[0], "ids": outputs[1]}
    return [*pad, *parsed(text, names)]


def parsed(text: str, names: Mapping[str, str]) -> list[NodeProto]:
    """Nodes from ONNX's own text, some of their tensors renamed, the others set apart by a prefix."""
    nodes = list(parser.parse_graph(text).node)
    for node in nodes:
        node.input[:] = [names.get(name, f"best_tokens/{name}") for name in node.input]
        node.output[:] = [names.get(name, f"best_tokens/{name}") for name in node.output]
    return nodes


def drop_unused(graph: GraphProto) -> None:
    """Leave out, in place, what nothing needs any more."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(reads_of(node))
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept[::-1])
    graph.initializer.extend(weights)


def reads(graph: GraphProto) -> Iterator[str]:
    """What nodes take in, once for each time, in the branches of an If too."""
    for node in graph.node:
        yield from reads_of(node)


def reads_of(node: NodeProto) -> Iterator[str]:
    """What one node reads."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from reads(attribute.g)


def rename(nodes: Iterable[NodeProto], renamed: Callable[[str], str]) -> None:
    """Give every tensor another name, in place, in the branches of an If too."""
    for node in nodes:
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)
        for branch in (one.g for one in node.attribute if one.HasField("g")):
            rename(branch.node, renamed)
            for value in branch.output:
                value.name = renamed(value.name)


def attribute(node: NodeProto, name: str) -> Any:
    """Value of a node's attribute; None where it has none of that name."""
    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), None)


def _set(node: NodeProto, name: str, value: Any) -> None:
    kept = [one for one in node.attribute if one.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
