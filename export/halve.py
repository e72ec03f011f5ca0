"""float16 graphs for GPUs: the traced ones with weights, activations, memory and state in half the bytes.

    memory, state, weights ── float16 ──► MatMul, LayerNormalization, ... ── float16 ──► memory, state
                                              │
                                         Cast ▼ float32
                                  scores + mask ── Softmax ──► attention
                                  logits ── LogSoftmax ──► log-probabilities

What is short of range or digits in float16 stays as it was: masks, softmax and what comes of it, and the angles of the
positions. So attention and log-probabilities leave the graph in float32, and what is masked is exactly zero. Layer
normalisation computes its mean and variance in float32 by itself (`stash_type`).
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from export.manifest import BundleError, TensorSpec
from model.steps import Array

IN_HALF = frozenset({"MatMul", "Gemm", "LayerNormalization"})
"""Operators that are always computed in float16: they read the weights."""

IN_FULL = frozenset({"Softmax", "LogSoftmax", "Sin", "Cos"})
"""Operators that are always computed in float32."""

WEIGHT_READERS = frozenset({"Gather", "Transpose"})
"""Operators that are computed in float16 where they read nothing but a constant: an embedding, a tied projection."""


def halve_specs(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs as the float16 graph has them: what the network remembers is float16.

    What a search remembers (`export.search_step`) stays as it is: no axis of it has a fixed size.
    """
    return tuple(
        spec.model_copy(update={"dtype": "float16"})
        if spec.role in ("memory", "state") and spec.dtype == "float32" and any(isinstance(a, int) for a in spec.axes)
        else spec
        for spec in specs
    )


def halve(model: ModelProto, half: Collection[str]) -> ModelProto:
    """The same graph computed in float16.

    Args:
        model: a traced float32 graph, its weights inside; it is left as it is.
        half: inputs and outputs that are to be float16; the others stay float32.

    Raises:
        RuntimeError: an output is not computed in the type that it is to have.
        ValueError: a weight is too large for float16.
    """
    halved = ModelProto()
    halved.CopyFrom(model)
    graph = halved.graph
    pass_ = _Pass(model, half)
    nodes = [one for node in model.graph.node for one in pass_.convert(node)]
    for value in (*graph.input, *graph.output):
        if value.name in pass_.floats and (value.name in pass_.half) != (value.name in half):
            raise RuntimeError(f"{value.name} is {'not ' if value.name in half else ''}computed in float16")
        if value.name in half:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in pass_.weights.items())
    return halved


class _Pass:
    """Goes through the nodes in order, and remembers which results are float16.

    Args:
        model: the float32 graph.
        half: inputs and outputs that are to be float16.

    Attributes:
        floats: everything that is float32 in the float32 graph.
        half: what of it is float16 now.
        weights: float16 copies of constants, by name.
    """

    def __init__(self, model: ModelProto, half: Collection[str]) -> None:
        self.floats = _floats(model)
        self.half = {value.name for value in model.graph.input if value.name in half}
        self.weights: dict[str, Array] = {}
        self._constants = {
            tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT
        }
        self._readers = _readers(model)
        self._cast: set[str] = set()

    def convert(self, node: NodeProto) -> list[NodeProto]:
        """The node in its new type, after the casts that it needs."""
        if node.op_type == "Cast" or not self.floats & {*node.input, *node.output}:
            return [node]
        half, casts = self._in_half(node), []
        converted = NodeProto()
        converted.CopyFrom(node)
        for index, name in enumerate(node.input):
            if name in self._constants:
                converted.input[index] = self._weight(name) if half else name
            elif name in self.floats and (name in self.half) != half:
                converted.input[index] = f"{name}_{'half' if half else 'full'}"
                casts += self._cast_once(name, converted.input[index], half)
        if half:
            self.half |= self.floats & set(node.output)
        return [*casts, converted]

    def _in_half(self, node: NodeProto) -> bool:
        read = [name for name in node.input if name in self.floats]
        computed = [name for name in read if name not in self._constants]
        if node.op_type in IN_HALF | IN_FULL or not read:
            return node.op_type in IN_HALF
        if not computed:
            return node.op_type in WEIGHT_READERS
        # Scores and what hides some of them are added in float32: hidden ones are as low as only float32 goes.
        if node.op_type == "Add" and self._readers[node.output[0]] <= IN_FULL:
            return False
        return any(name in self.half for name in computed)

    def _weight(self, name: str) -> str:
        value = numpy_helper.to_array(self._constants[name])
        with np.errstate(over="ignore"):
            weight = value.astype(np.float16)
        if not np.isfinite(weight).all():
            largest = float(np.abs(value).max())
            raise BundleError(
                f"a weight is {largest:g} ({name}), the most that float16 takes is {np.finfo(np.float16).max:g}: "
                "export without --fp16"
            )
        self.weights[f"{name}_half"] = weight
        return f"{name}_half"

    def _cast_once(self, name: str, to: str, half: bool) -> list[NodeProto]:
        if to in self._cast:
            return []
        self._cast.add(to)
        return [helper.make_node("Cast", [name], [to], to=TensorProto.FLOAT16 if half else TensorProto.FLOAT)]


def _floats(model: ModelProto) -> set[str]:
    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    unknown = [name for node in graph.node for name in node.output if name and name not in types]
    if unknown:
        raise RuntimeError(f"the type of {unknown[0]} is not known, nor of {len(unknown) - 1} others")
    return {name for name, kind in types.items() if kind == TensorProto.FLOAT}


def _readers(model: ModelProto) -> Mapping[str, set[str]]:
    """Operators that read each result; an output of the graph is read by something else too."""
    readers: dict[str, set[str]] = {name: set() for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for value in model.graph.output:
        readers.setdefault(value.name, set()).add("output")
    return readers
