"""From an exported module to an ONNX file: trace, name the axes, add the top-k, share the weights, quantise."""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto, TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch.export import Dim
from torch.utils._pytree import tree_map_with_path

from export.graphs import TOP_INPUT, TOP_OUTPUTS, Exported
from export.manifest import TensorSpec

OPSET = 18
"""First operator set with everything in use here; every later runtime reads it."""

WEIGHTS = "weights.bin"
"""The file that both graphs of a precision keep their weights in; a table they share is stored once."""

SMALLEST_EXTERNAL = 1024
"""Bytes under which a constant stays inside its graph."""

_DTYPES = {
    "float32": TensorProto.FLOAT,
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


def add_top(model: ModelProto) -> ModelProto:
    """Add the choice of the best next tokens: an input `top`, outputs `top_log_probabilities` and `top_ids`."""
    outputs = [spec.name for spec in TOP_OUTPUTS]
    model.graph.node.append(
        helper.make_node("TopK", ["log_probabilities", TOP_INPUT.name], outputs, "top_k", axis=-1, largest=1, sorted=1)
    )
    model.graph.input.append(_value(TOP_INPUT))
    model.graph.output.extend(map(_value, TOP_OUTPUTS))
    return model


def quantise(source: Path, target: Path) -> ModelProto:
    """int8 weights, a scale for each output channel, and activations quantised as they come.

    Seven bits of range keep the products of 8-bit processors without VNNI from saturating, so that a bundle gives the
    same answers on older machines.
    """
    with _quiet(""):  # it advises, on the root logger, to do what is not needed here
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
    return onnx.load(target)


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
    content = onnx.numpy_helper.to_array(tensor).tobytes()
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
    # row is batch * beam, a relation that named dimensions cannot state.
    return Dim.DYNAMIC if axis == "row" else Dim(axis)


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
    graph.input.extend(map(_value, inputs))
    graph.output.extend(map(_value, outputs))
    del model.metadata_props[:], graph.metadata_props[:]
    for node in graph.node:  # traces of this machine's files
        del node.metadata_props[:]
        node.doc_string = ""
    return model


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
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
