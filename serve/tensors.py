"""Tensors of the Open Inference Protocol: what a request holds, checked; what an answer holds, laid out. No gRPC.

    SOURCE  BYTES [text] or [text 1]  ──►  texts  ──►  engine  ──►  TEXT, SCORE, ... CROSS_ATTENTION, as asked for

Answers differ in length: what is shorter than the longest of its batch is filled up, and `SOURCE_LENGTH` and
`TARGET_LENGTH` say where it ends.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from export.manifest import Manifest
from model.errors import InvalidRequestError
from model.steps import Family
from serve.pb.inference import grpc_service_pb2 as pb

SOURCE = "SOURCE"
"""The only input."""

MOST_TEXTS = 64
"""Texts of one request."""

DEFAULT_OUTPUTS = ("TEXT", "SCORE")
"""Of a request that names none."""


LAYOUT = frozenset({"binary_data", "binary_data_size"})
"""Parameters of tensors that KServe's clients send as over HTTP: here contents say their size themselves."""


class Output(NamedTuple):
    """An output that requests may name."""

    datatype: str
    """Its elements, as the protocol calls them."""
    axes: tuple[str, ...]
    """What it counts for each text: the batch comes first."""
    family: Family | None = None
    """Of attention, where it is one."""


OUTPUTS: Mapping[str, Output] = {
    "TEXT": Output("BYTES", ("hypothesis",)),
    "SCORE": Output("FP32", ("hypothesis",)),
    "LOG_PROBABILITY": Output("FP32", ("hypothesis",)),
    "FINISH_REASON": Output("BYTES", ("hypothesis",)),
    "TOKENS": Output("BYTES", ("hypothesis", "target")),
    "TARGET_LENGTH": Output("INT64", ("hypothesis",)),
    "SOURCE_TOKENS": Output("BYTES", ("source",)),
    "SOURCE_LENGTH": Output("INT64", ("1",)),
    "CROSS_ATTENTION": Output("FP32", ("hypothesis", "layer", "head", "target", "source"), "cross"),
    "DECODER_ATTENTION": Output("FP32", ("hypothesis", "layer", "head", "target", "target"), "decoder"),
    "ENCODER_ATTENTION": Output("FP32", ("layer", "head", "source", "source"), "encoder"),
}
"""All that there are; attention only of families that the model has."""

ARRAYS = {"BYTES": np.dtype(object), "FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}
"""What holds the elements of each data type."""


def outputs_of(manifest: Manifest) -> dict[str, Output]:
    """The outputs that a model has."""
    return {
        name: output for name, output in OUTPUTS.items() if output.family is None or output.family in manifest.attention
    }


def read_texts(request: pb.ModelInferRequest, model: str) -> list[str]:
    """The texts of a request.

    Args:
        request: as it came.
        model: name of the model, for what is said of mistakes.

    Raises:
        InvalidRequestError: naming model and input, what was expected and what came.
    """
    tensor = _only_input(request, model)
    count = _texts_in(tensor, model)
    elements = _elements(request, tensor, count, model)
    return [_text(element, index) for index, element in enumerate(elements)]


def read_outputs(request: pb.ModelInferRequest, manifest: Manifest) -> tuple[str, ...]:
    """Names of the outputs that a request asks for, in its order.

    Raises:
        InvalidRequestError: one that the model does not have, one asked for twice, or one asked for in a way that this
            server does not know.
    """
    names, known = [output.name for output in request.outputs], outputs_of(manifest)
    for output in request.outputs:
        if output.name not in known:
            raise InvalidRequestError(
                "outputs", f"model {manifest.name!r} has no output {output.name!r}, only {', '.join(known)}"
            )
        _refuse_parameters("outputs", output.name, output.parameters)
    if len(set(names)) < len(names):
        raise InvalidRequestError("outputs", f"model {manifest.name!r} is asked for one twice: {', '.join(names)}")
    return tuple(names) or DEFAULT_OUTPUTS


def _only_input(request: pb.ModelInferRequest, model: str) -> pb.ModelInferRequest.InferInputTensor:
    names = [tensor.name for tensor in request.inputs]
    if unknown := [name for name in names if name != SOURCE]:
        raise InvalidRequestError("inputs", f"model {model!r} has no input {unknown[0]!r}, only {SOURCE!r}")
    if len(names) != 1:
        raise InvalidRequestError(
            "inputs", f"model {model!r} takes the input {SOURCE!r} once, got it {len(names)} times"
        )
    _refuse_parameters("inputs", SOURCE, request.inputs[0].parameters)
    return request.inputs[0]


def _texts_in(tensor: pb.ModelInferRequest.InferInputTensor, model: str) -> int:
    """How many texts its shape says that it holds."""
    if tensor.datatype != "BYTES":
        raise InvalidRequestError(
            "inputs", f"{SOURCE!r} of model {model!r} has the data type BYTES, got {tensor.datatype!r}"
        )
    shape = list(tensor.shape)
    if len(shape) not in (1, 2) or shape[1:] not in ([], [1]) or shape[0] < 0:
        raise InvalidRequestError(
            "inputs", f"{SOURCE!r} of model {model!r} has the shape [texts] or [texts, 1], got {shape}"
        )
    if shape[0] > MOST_TEXTS:
        raise InvalidRequestError(
            "inputs", f"{SOURCE!r} of model {model!r} takes at most {MOST_TEXTS} texts in a request, got {shape[0]}"
        )
    return shape[0]


def _elements(
    request: pb.ModelInferRequest, tensor: pb.ModelInferRequest.InferInputTensor, count: int, model: str
) -> Sequence[bytes]:
    """Its elements, wherever they stand."""
    raw, typed = request.raw_input_contents, tensor.contents
    if raw and typed.ByteSize():
        raise InvalidRequestError("inputs", f"{SOURCE!r} of model {model!r} has both raw and typed contents: send one")
    if len(raw) > 1:
        raise InvalidRequestError("raw_input_contents", f"model {model!r} takes one input, got contents of {len(raw)}")
    if raw:
        return unpack_bytes(raw[0], count)
    others = [field.name for field, _ in typed.ListFields() if field.name != "bytes_contents"]
    if others:
        raise InvalidRequestError("inputs", f"{SOURCE!r} of model {model!r} is in bytes_contents, got {others[0]}")
    if len(typed.bytes_contents) != count:
        raise InvalidRequestError(
            "inputs", f"{SOURCE!r} of model {model!r} has {count} texts by its shape, got {len(typed.bytes_contents)}"
        )
    return typed.bytes_contents


def _text(element: bytes, index: int) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"inputs.{SOURCE}[{index}]", f"is not UTF-8: {error.reason}") from None


def _refuse_parameters(field: str, name: str, parameters: Mapping[str, pb.InferParameter]) -> None:
    for parameter in parameters.keys() - LAYOUT:
        why = "tensors travel in messages" if parameter.startswith("shared_memory") else "tensors take none"
        raise InvalidRequestError(field, f"{name!r} has the parameter {parameter!r}, but {why} here")


def unpack_bytes(raw: bytes, count: int) -> list[bytes]:
    """The elements of a BYTES tensor: each with its length before it, in four bytes, the lowest first.

    Raises:
        InvalidRequestError: there are fewer or more bytes than so many elements have.
    """
    elements, end = [], 0
    for index in range(count):
        start = end + 4
        end = start + int.from_bytes(raw[end:start], "little")
        if max(start, end) > len(raw):
            raise InvalidRequestError(
                "raw_input_contents", f"element {index} of {count} ends at byte {max(start, end)}, got {len(raw)} bytes"
            )
        elements.append(raw[start:end])
    if end < len(raw):
        raise InvalidRequestError("raw_input_contents", f"{count} elements end at byte {end}, got {len(raw)} bytes")
    return elements


def pack_bytes(elements: Sequence[bytes]) -> bytes:
    """A BYTES tensor on the wire, as `unpack_bytes` reads it."""
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def pack(values: "np.ndarray[Any, Any]") -> bytes:
    """A tensor on the wire: row by row, the lowest byte of a number first."""
    if values.dtype == ARRAYS["BYTES"]:
        return pack_bytes(values.ravel().tolist())
    return values.tobytes()


def padded(
    parts: "Sequence[np.ndarray[Any, Any]]", least: tuple[int, ...], datatype: str, filling: Any
) -> "np.ndarray[Any, Any]":
    """Arrays of the same rank as one, each filled up to the longest along every axis.

    Args:
        parts: what to put side by side.
        least: fewest elements along each axis, and so the shape where there are no parts.
        datatype: of the result.
        filling: of what a part does not have.
    """
    shape = np.max([least, *(part.shape for part in parts)], 0)
    result = np.full((len(parts), *shape), filling, ARRAYS[datatype])
    for index, part in enumerate(parts):
        result[index][tuple(map(slice, part.shape))] = part
    return result
