"""From an exported module to an ONNX file: trace, name the axes, add the top-k and the switches, share the weights."""

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch.export import Dim
from torch.utils._pytree import tree_map_with_path

from export.graph_bytes import OPSET
from export.graphs import CANDIDATE_IDS, LOG_PROBABILITIES, TOP_INPUT, TOP_OUTPUTS, Exported, wanted_input
from export.manifest import TensorSpec
from export.optimise import best_tokens, drop_unused, reads
from model.options import LARGEST_BEAM

WEIGHTS = "weights.bin"
"""The file that both graphs of a precision keep their weights in; a table they share is stored once."""

SMALLEST_EXTERNAL = 1024
"""Bytes under which a constant stays inside its graph."""

SWITCHED = ("encoder_attention", "cross_attention", "decoder_attention")
"""Roles of outputs that cost nothing where nobody asks for them."""

_DTYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


def trace(exported: Exported) -> ModelProto:
    """Trace a module into an ONNX model whose inputs, outputs and axes are named as its contract says."""
    program = torch.export.export(
        exported.module,
        exported.example,
        dynamic_shapes=_dynamic_shapes(exported),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    with warnings.catch_warnings(), _quiet("torch.onnx"):  # it logs that torchvision, which is not needed, is absent
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its deprecated tree specifications
        warnings.simplefilter("ignore", DeprecationWarning)
        onnx_program = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    if onnx_program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model: ModelProto = onnx_program.model_proto
    return _with_contract(model, exported.inputs, exported.outputs)


def finish(model: ModelProto, exported: Exported) -> Exported:
    """Add to a traced graph, in place, what tracing cannot: the choice of the best tokens, switches for attention.

    Returns:
        The contract that the graph has now.
    """
    outputs: list[TensorSpec] = []
    for spec in exported.outputs:
        if spec.name == LOG_PROBABILITIES:
            positions = next(one.name for one in exported.inputs if one.role == "target_ids")
            _add_top(model, int(spec.axes[-1]), positions)
            if any(one.name == CANDIDATE_IDS for one in exported.inputs):
                _name_candidates(model)
            outputs += TOP_OUTPUTS
        else:
            outputs.append(spec)
    switched = [spec for spec in outputs if spec.role in SWITCHED]
    for spec in switched:
        _add_switch(model, spec)
    top = [TOP_INPUT] if TOP_OUTPUTS[0] in outputs else []
    inputs = (*exported.inputs, *top, *map(wanted_input, switched))
    del model.graph.input[:], model.graph.output[:]
    model.graph.input.extend(map(value_info, inputs))
    model.graph.output.extend(map(value_info, outputs))
    drop_unused(model.graph)
    return exported._replace(inputs=inputs, outputs=tuple(outputs))


def _add_top(model: ModelProto, vocabulary: int, positions: str) -> None:
    """Find the best tokens of each row; `positions` is an input [batch query]."""
    rows, best = "log_probability_rows", [f"{spec.name}_rows" for spec in TOP_OUTPUTS]
    maker = next(node for node in model.graph.node if LOG_PROBABILITIES in node.output)
    if maker.op_type == "Reshape":  # they were rows before
        rows = maker.input[0]
    else:
        everything = numpy_helper.from_array(np.array([-1, vocabulary]), "vocabulary_rows")
        model.graph.initializer.append(everything)
        model.graph.node.append(helper.make_node("Reshape", [LOG_PROBABILITIES, everything.name], [rows]))
    model.graph.node.extend(
        [
            *best_tokens(rows, TOP_INPUT.name, best, vocabulary),
            helper.make_node("Shape", [positions], ["batch_query"]),
            helper.make_node("Concat", ["batch_query", TOP_INPUT.name], ["batch_query_top"], axis=0),
        ]
    )
    for made, spec in zip(best, TOP_OUTPUTS, strict=True):
        model.graph.node.append(helper.make_node("Reshape", [made, "batch_query_top"], [spec.name]))


def _name_candidates(model: ModelProto) -> None:
    """Let the best tokens be ids of the vocabulary where they are places among a sentence's candidates."""
    places, name = "top_places", TOP_OUTPUTS[1].name
    maker = next(node for node in model.graph.node if name in node.output)
    maker.output[:] = [places]
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, -1]), "sentence_rows"))
    model.graph.node.extend(
        [
            helper.make_node("Reshape", [places, "sentence_rows"], [f"{places}_rows"]),
            helper.make_node("GatherElements", [CANDIDATE_IDS, f"{places}_rows"], [f"{name}_of_sentence"], axis=1),
            helper.make_node("Reshape", [f"{name}_of_sentence", "batch_query_top"], [name]),
        ]
    )


def _add_switch(model: ModelProto, spec: TensorSpec) -> None:
    """Put everything that only this output needs into one branch of an If; the other makes an empty tensor."""
    graph = model.graph
    alone = needed_alone(graph, spec.name)
    moved = {name for node in alone for name in node.output}
    kept = [node for node in graph.node if not moved & set(node.output)]
    del graph.node[:]
    graph.node.extend([*kept, switch(spec, alone)])


def switch(spec: TensorSpec, nodes: Sequence[NodeProto]) -> NodeProto:
    """An If that runs the nodes which make an output where it is wanted, and else makes an empty one."""
    output = helper.make_tensor_value_info(spec.name, _DTYPES[spec.dtype], [None] * len(spec.axes))
    nothing = helper.make_tensor("nothing", _DTYPES[spec.dtype], [0] * len(spec.axes), [])
    empty = helper.make_node("Constant", [], [spec.name], value=nothing)
    branches: dict[str, Any] = {
        "then_branch": helper.make_graph(nodes, f"{spec.name}_wanted", [], [output]),
        "else_branch": helper.make_graph([empty], f"{spec.name}_not_wanted", [], [output]),
    }
    return helper.make_node("If", [wanted_input(spec).name], [spec.name], f"switch_{spec.name}", **branches)


def needed_alone(graph: onnx.GraphProto, output: str) -> list[onnx.NodeProto]:
    """Nodes whose results go into this output and nowhere else, in order."""
    results = {value.name for value in graph.output} - {output}
    readers = Counter(reads(graph))
    inside: set[str] = set() if readers[output] else {output}
    alone: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if not set(node.output) <= inside or set(node.output) & results:
            continue
        alone.append(node)
        for name in node.input:
            readers[name] -= 1
            if not readers[name]:
                inside.add(name)
    if not alone:
        raise RuntimeError(f"{output} cannot be switched: it is computed for something else too")
    return alone[::-1]


def save_graphs(folder: Path, models: dict[str, ModelProto]) -> None:
    """Write graphs that share one weight file; equal tensors are stored once.

    Args:
        folder: where to; made if missing.
        models: file name of each graph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    offsets: dict[str, int] = {}
    with (folder / WEIGHTS).open("wb") as file:
        for model in models.values():
            for tensor in model.graph.initializer:
                _move_out(tensor, file, offsets)
    for name, model in models.items():
        path = folder / name
        path.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(path), full_check=True)


def _move_out(tensor: TensorProto, file: Any, offsets: dict[str, int]) -> None:
    content = numpy_helper.to_array(tensor).tobytes()
    if len(content) < SMALLEST_EXTERNAL:
        return
    digest = hashlib.sha256(content).hexdigest()
    if digest not in offsets:
        file.write(b"\0" * (-file.tell() % 64))  # aligned, so that a runtime may map it
        offsets[digest] = file.tell()
        file.write(content)
    tensor.ClearField("raw_data")
    for field in ("float_data", "int32_data", "int64_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS), ("offset", offsets[digest]), ("length", len(content))):
        tensor.external_data.add(key=key, value=str(value))


def _dynamic_shapes(exported: Exported) -> Any:
    specs = iter(exported.inputs)
    dims: dict[str, Any] = {}

    def shape(_: Any, tensor: torch.Tensor) -> dict[int, Any]:
        spec = next(specs)
        if tensor.dim() != len(spec.axes):
            raise ValueError(f"{spec.name} has {tensor.dim()} axes, its contract {spec.axes}")
        return {
            index: dims.setdefault(axis, _dim(axis)) for index, axis in enumerate(spec.axes) if isinstance(axis, str)
        }

    return tree_map_with_path(shape, exported.example)


def _dim(axis: str) -> Any:
    return Dim(axis, max=LARGEST_BEAM) if axis == "beam" else Dim(axis)


def _with_contract(model: ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> ModelProto:
    graph = model.graph
    if (len(graph.input), len(graph.output)) != (len(inputs), len(outputs)):
        raise RuntimeError(f"the traced graph has {len(graph.input)} inputs and {len(graph.output)} outputs")
    found = [*(value.name for value in graph.input), *(value.name for value in graph.output)]
    if len(set(found)) != len(found):
        raise RuntimeError(f"the traced graph uses a name twice: {found}")
    names = dict(zip(found, (spec.name for spec in (*inputs, *outputs)), strict=True))
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    del graph.input[:], graph.output[:], graph.value_info[:]
    graph.input.extend(map(value_info, inputs))
    graph.output.extend(map(value_info, outputs))
    del model.metadata_props[:], graph.metadata_props[:]
    for node in graph.node:  # traces of this machine's files
        del node.metadata_props[:]
        node.doc_string = ""
    return model


def value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    """An input or output as its graph declares it."""
    return helper.make_tensor_value_info(spec.name, _DTYPES[spec.dtype], list(spec.axes))


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
