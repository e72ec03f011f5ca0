"""Write small ONNX graphs without the onnx package, which a server does not have: a graph is a protobuf message.

Field numbers are those of `onnx.proto`, which never change; the tests hold every graph to onnx's own checker.
"""

from collections.abc import Sequence
from typing import Any

from model.steps import Array

OPSET = 18
"""First operator set with everything in use here and in the exported graphs; every later runtime reads it."""

IR_VERSION = 8
"""First version of the format that every operator of OPSET may stand in."""

TYPES = {"float32": 1, "int64": 7, "bool": 9, "float16": 10, "float64": 11}
"""`TensorProto.DataType` of each element type."""

_INT, _INTS = 2, 7
"""`AttributeProto.AttributeType`."""


class GraphBytes:
    """A graph under construction."""

    def __init__(self) -> None:
        self._nodes: list[bytes] = []
        self._inputs: list[bytes] = []
        self._outputs: list[bytes] = []
        self._constants: list[bytes] = []

    def input(self, name: str, dtype: str, rank: int) -> str:
        """Add an input whose axes are of any size; returns its name."""
        self._inputs.append(_value(name, dtype, rank))
        return name

    def output(self, name: str, dtype: str, rank: int) -> None:
        """Say that a result is an output."""
        self._outputs.append(_value(name, dtype, rank))

    def constant(self, name: str, value: Array) -> str:
        """Add a constant; returns its name."""
        dims = b"".join(_number(1, size) for size in value.shape)
        kind = _number(2, TYPES[value.dtype.name])
        self._constants.append(dims + kind + _text(8, name) + _field(9, value.tobytes()))
        return name

    def node(self, operator: str, inputs: Sequence[str], result: str, **attributes: int | Sequence[int]) -> str:
        """Add an operator; returns the name of its one result."""
        fields = b"".join(_text(1, name) for name in inputs) + _text(2, result) + _text(4, operator)
        self._nodes.append(fields + b"".join(_field(5, _attribute(*item)) for item in attributes.items()))
        return result

    def model(self) -> bytes:
        """The graph as the content of a file; nothing, where no operator stands in it."""
        if not self._nodes:
            return b""
        parts = ((1, self._nodes), (5, self._constants), (11, self._inputs), (12, self._outputs))
        graph = _text(2, "store") + b"".join(_field(number, one) for number, some in parts for one in some)
        return _number(1, IR_VERSION) + _field(7, graph) + _field(8, _number(2, OPSET))


def _value(name: str, dtype: str, rank: int) -> bytes:
    shape = _field(1, b"") * rank
    tensor = _number(1, TYPES[dtype]) + _field(2, shape)
    return _text(1, name) + _field(2, _field(1, tensor))


def _attribute(name: str, value: Any) -> bytes:
    if isinstance(value, int):
        return _text(1, name) + _number(3, value) + _number(20, _INT)
    return _text(1, name) + b"".join(_number(8, one) for one in value) + _number(20, _INTS)


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode())


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative number is its two's complement
    content = bytearray()
    while value > 127:
        content.append(value & 127 | 128)
        value >>= 7
    return bytes((*content, value))
