"""int8 graphs in standard operators, whose products give each row a result of its own.

    x ── / its row's largest ── QuantizeLinear ── DequantizeLinear ──┐
                    │                                                MatMul ── · its row's largest ──►
                    │              int8 weights ── DequantizeLinear ──┘   │
                    └──────────────────────────────────────────────────────┘

ONNX Runtime turns the three in the middle into one integer product. Weights have a scale for each output channel,
activations one for each row, so that the same row in gives the same row out, to the bit, whatever rows are beside it.
What goes in is float32, as attention is: its sums depend in their last bits on how many columns a mask hides and where,
and a last bit can tip a rounding to int8. docs/decisions.md has what that comes to.
"""

from typing import Any, TypeAlias

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array: TypeAlias = np.ndarray[Any, Any]

WEIGHT_LEVELS = 63
"""Weights have seven bits: on processors without VNNI, the sum of two products of eight bits can overflow."""

ACTIVATION_LEVELS = 127
"""Activations have eight, around a zero of 128."""

LEAST = 1e-9
"""What a row of zeros is divided by."""

_CONSTANTS: dict[str, Array] = {
    "quantise_axis": np.array([-1], np.int64),
    "quantise_least": np.array(LEAST, np.float32),
    "quantise_scale": np.array(1 / ACTIVATION_LEVELS, np.float32),
    "quantise_zero": np.array(128, np.uint8),
}


def quantise(model: ModelProto) -> ModelProto:
    """The same graph with int8 weights in its matrix products and embeddings.

    Args:
        model: a traced float32 graph, its weights inside; it is left as it is.
    """
    quantised = ModelProto()
    quantised.CopyFrom(model)
    graph = quantised.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 2}
    transposed = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights
    }
    nodes: list[NodeProto] = []
    rows: set[str] = set()
    added: dict[str, Array] = dict(_CONSTANTS)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights | transposed:
            nodes += _quantised_rows(node.input[0]) if node.input[0] not in rows else []
            rows.add(node.input[0])
            table = transposed.get(node.input[1])
            weight = weights[node.input[1]] if table is None else weights[table].T
            nodes += _product(node, weight, table, added)
        elif node.op_type == "Gather" and node.input[0] in weights:
            nodes += _lookup(node, weights[node.input[0]], added)
        elif node.output[0] not in transposed:
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in added.items() if name in used)
    return quantised


def _product(node: NodeProto, weight: Array, table: str | None, added: dict[str, Array]) -> list[NodeProto]:
    """A product whose weights are its own, or those of an embedding table, the other way round."""
    x, name = node.input[0], node.output[0]
    scale = _scale(weight, 0)
    added |= {f"{name}_scale": scale, f"{name}_zero": np.zeros(len(scale), np.int8)}
    levels, turned = f"{name}_weight", []
    if table is None:
        added[levels] = _levels(weight, scale)
    else:
        added[f"{table}_table"] = _levels(weight, scale).T.copy()
        turned = [helper.make_node("Transpose", [f"{table}_table"], [levels], perm=[1, 0])]
    # Of each product its own, so that the runtime finds the three nodes of its pattern with nobody else looking on.
    dequantised = [f"{x}_levels", "quantise_scale", "quantise_zero"]
    return [
        *turned,
        helper.make_node("DequantizeLinear", dequantised, [f"{name}_left"]),
        helper.make_node("DequantizeLinear", [levels, f"{name}_scale", f"{name}_zero"], [f"{name}_right"], axis=1),
        helper.make_node("MatMul", [f"{name}_left", f"{name}_right"], [f"{name}_part"]),
        helper.make_node("Mul", [f"{name}_part", f"{x}_largest"], [name]),
    ]


def _quantised_rows(x: str) -> list[NodeProto]:
    return [
        helper.make_node("Abs", [x], [f"{x}_magnitude"]),
        helper.make_node("ReduceMax", [f"{x}_magnitude", "quantise_axis"], [f"{x}_most"], keepdims=1),
        helper.make_node("Max", [f"{x}_most", "quantise_least"], [f"{x}_largest"]),
        helper.make_node("Div", [x, f"{x}_largest"], [f"{x}_unit"]),
        helper.make_node("QuantizeLinear", [f"{x}_unit", "quantise_scale", "quantise_zero"], [f"{x}_levels"]),
    ]


def _lookup(node: NodeProto, table: Array, added: dict[str, Array]) -> list[NodeProto]:
    """An embedding: rows of bytes, each with its scale; only those that are looked up become floats."""
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
    scale: Array = np.where(largest == 0, 1.0, largest / WEIGHT_LEVELS).astype(np.float32)
    return scale


def _levels(weight: Array, scale: Array) -> Array:
    levels: Array = np.rint(weight / scale).clip(-WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8)
    return levels
