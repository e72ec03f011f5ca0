"""int8 graphs in standard operators, whose products give each row a result of its own.

    x ── QuantizeLinear ── DequantizeLinear ──┐
              │    │                        Gemm ──►
         its range │    int8 weights ── DequantizeLinear ──┘

ONNX Runtime turns the last three into one integer product. Weights have a scale for each output channel. Activations
have one for each tensor, known beforehand (`export.calibrate`): so the same row in gives the same row out, to the bit,
whatever rows are beside it, and a step does not have to look for scales. What goes in is float32, as attention is: its
sums depend in their last bits on how many columns a mask hides and where, and a last bit can tip a rounding to int8.
docs/decisions.md has what that comes to.
"""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from model.steps import Array

Ranges: TypeAlias = Mapping[str, tuple[float, float]]
"""Lowest and highest value of tensors; what lies beyond is cut off."""

WEIGHT_LEVELS = 63
"""Weights have seven bits: on processors without VNNI, the sum of two products of eight bits can overflow."""

MOST_BIAS = 2**30
"""Levels of a bias: a column of weights that are nearly zero would ask for more than there are."""

LEVELS = 255
"""Steps of an activation's eight bits."""


def quantise(model: ModelProto, ranges: Ranges) -> ModelProto:
    """The same graph with int8 weights in its matrix products and embeddings.

    Args:
        model: a traced and optimised float32 graph, its weights inside; it is left as it is.
        ranges: of each of `product_inputs`.
    """
    quantised = ModelProto()
    quantised.CopyFrom(model)
    graph = quantised.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    turned, weights = _turned(graph), _weights(graph)
    nodes: list[NodeProto] = []
    added: dict[str, Array] = {}
    for node in graph.node:
        if _is_product(node, weights):
            x = node.input[0]
            if f"{x}_scale" not in added:
                nodes.append(_levels_of(x, ranges[x], added))
            nodes += _product(node, values, turned, added)
        elif node.op_type == "Gather" and values.get(node.input[0], np.zeros(0)).ndim == 2:
            nodes += lookup(node, values[node.input[0]], added)
        elif node.output[0] not in turned:
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in added.items() if name in used)
    return quantised


def product_inputs(graph: GraphProto) -> list[str]:
    """Tensors that go into products with weights, in order, each once."""
    weights = _weights(graph)
    return list(dict.fromkeys(node.input[0] for node in graph.node if _is_product(node, weights)))


def _weights(graph: GraphProto) -> set[str]:
    return {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2} | _turned(graph).keys()


def _turned(graph: GraphProto) -> dict[str, str]:
    """Tables of embeddings that are weights too, the other way round: their names then, and now."""
    tables = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in tables
    }


def _is_product(node: NodeProto, weights: set[str]) -> bool:
    return node.op_type in ("MatMul", "Gemm") and node.input[1] in weights


def _levels_of(x: str, between: tuple[float, float], added: dict[str, Array]) -> NodeProto:
    """Eight bits for each value of a tensor; zero is exactly one of the levels."""
    low, high = between
    scale = (high - low) / LEVELS
    added |= {f"{x}_scale": np.array(scale, np.float32), f"{x}_zero": np.array(round(-low / scale), np.uint8)}
    return helper.make_node("QuantizeLinear", [x, f"{x}_scale", f"{x}_zero"], [f"{x}_levels"])


def _product(
    node: NodeProto, values: Mapping[str, Array], turned: Mapping[str, str], added: dict[str, Array]
) -> list[NodeProto]:
    """A product whose weights are its own, or those of an embedding table, the other way round."""
    x, name, table = node.input[0], node.output[0], turned.get(node.input[1])
    weight = values[node.input[1]] if table is None else values[table].T
    scale = _scale(weight, 0)
    if node.op_type == "Gemm":  # the bias, in units of both scales, has to fit 32 bits
        least = np.abs(values[node.input[2]]) / (added[f"{x}_scale"] * MOST_BIAS)
        scale = np.maximum(scale, least).astype(np.float32)
    added |= {f"{name}_scales": scale, f"{name}_zeros": np.zeros(len(scale), np.int8)}
    levels, nodes = f"{name}_weight", []
    if table is None:
        added[levels] = _levels(weight, scale)
    else:
        added[f"{table}_table"] = _levels(weight, scale).T.copy()
        nodes = [helper.make_node("Transpose", [f"{table}_table"], [levels], perm=[1, 0])]
    # Of each product its own, so that the runtime finds the nodes of its pattern with nobody else looking on.
    left, right = f"{name}_left", f"{name}_right"
    nodes += [
        helper.make_node("DequantizeLinear", [f"{x}_levels", f"{x}_scale", f"{x}_zero"], [left]),
        helper.make_node("DequantizeLinear", [levels, f"{name}_scales", f"{name}_zeros"], [right], axis=1),
    ]
    if node.op_type == "MatMul":
        return [*nodes, helper.make_node("MatMul", [left, right], [name])]
    bias = f"{name}_bias"
    scales = (scale * added[f"{x}_scale"]).astype(np.float32)
    added |= {f"{bias}_scales": scales, f"{bias}_zeros": np.zeros(len(scale), np.int32)}
    added[f"{bias}_levels"] = np.rint(values[node.input[2]] / scales).astype(np.int32)
    return [
        *nodes,
        helper.make_node("DequantizeLinear", [f"{bias}_levels", f"{bias}_scales", f"{bias}_zeros"], [bias], axis=0),
        helper.make_node("Gemm", [left, right, bias], [name]),
    ]


def lookup(node: NodeProto, table: Array, added: dict[str, Array]) -> list[NodeProto]:
    """An embedding: rows of bytes, each with its scale; only those that are looked up become floats.

    Args:
        node: a Gather from a table.
        table: its values.
        added: gets the constants that the nodes read.
    """
    (weight, ids), name = node.input, node.output[0]
    scale = _scale(table, 1)[:, None]
    added |= {f"{weight}_table": _levels(table, scale), f"{weight}_scales": scale}
    return [
        helper.make_node("Gather", [f"{weight}_table", ids], [f"{name}_bytes"]),
        helper.make_node("Cast", [f"{name}_bytes"], [f"{name}_values"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{weight}_scales", ids], [f"{name}_scales"]),
        helper.make_node("Mul", [f"{name}_values", f"{name}_scales"], [name]),
    ]


def _scale(weight: Array, axis: int) -> Array:
    largest = np.abs(weight).max(axis)
    none = largest < WEIGHT_LEVELS * np.finfo(np.float32).tiny
    scale: Array = np.where(none, 1.0, largest / WEIGHT_LEVELS).astype(np.float32)
    return scale


def _levels(weight: Array, scale: Array) -> Array:
    levels: Array = np.rint(weight / scale).clip(-WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8)
    return levels
