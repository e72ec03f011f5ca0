"""Parameters of an Open Inference Protocol request: the options of `limelight.v1`, by their names there. No gRPC.

beam_size=4, hypotheses=2      ──► limelight.v1.SearchOptions
temperature=0.8, seed=7        ──► limelight.v1.Sampling, which is in it
layers="[0, 1]", reduction=max ──► limelight.v1.AttentionOptions, whose families the requested outputs say
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor

from model.errors import InvalidRequestError
from model.steps import Family
from serve.convert import FAMILY_NUMBERS
from serve.pb.inference.grpc_service_pb2 import InferParameter
from serve.pb.limelight.v1 import limelight_pb2 as pb

FINAL_RESPONSE = "triton_enable_empty_final_response"
"""Asks for an empty response after the last one, where that could not say so itself: here each is the only one."""

BINARY_OUTPUT = "binary_data_output"
"""Asks for raw contents, over HTTP: here answers always have them."""

TIMEOUT = "timeout"
"""Microseconds after which the caller does not want the answer any more."""

SEARCH = {field.name: field for field in pb.SearchOptions.DESCRIPTOR.fields if field.name != "sampling"}
SAMPLING = {field.name: field for field in pb.Sampling.DESCRIPTOR.fields}
ATTENTION = {name: pb.AttentionOptions.DESCRIPTOR.fields_by_name[name] for name in ("layers", "heads", "reduction")}
KNOWN = (*SEARCH, *SAMPLING, *ATTENTION, TIMEOUT, FINAL_RESPONSE, BINARY_OUTPUT)

REDUCTIONS = {"none": pb.REDUCTION_NONE, "mean": pb.REDUCTION_MEAN, "max": pb.REDUCTION_MAX}

KINDS: Mapping[int, tuple[type, ...]] = {
    FieldDescriptor.CPPTYPE_BOOL: (bool,),
    FieldDescriptor.CPPTYPE_INT32: (int,),
    FieldDescriptor.CPPTYPE_INT64: (int,),
    FieldDescriptor.CPPTYPE_DOUBLE: (float, int),
    FieldDescriptor.CPPTYPE_STRING: (str,),
}
"""What a field takes, by the type that protobuf gives it."""

Field = Any  # a field's descriptor: protobuf has two classes of them, of which its types know one


class Parameters(NamedTuple):
    """What the parameters of a request say."""

    search: pb.SearchOptions
    """How to search."""
    attention: pb.AttentionOptions
    """Layers, heads and reduction; the families are the outputs'."""
    seconds: float | None
    """For which the caller waits; None for ever."""


def read_parameters(parameters: Mapping[str, InferParameter], families: Sequence[Family]) -> Parameters:
    """What a request's parameters say.

    Args:
        parameters: of the request.
        families: of attention that its outputs name.

    Raises:
        InvalidRequestError: one that is not known, or of another type than it has. Ranges are not looked at.
    """
    values = {name: _value(parameter) for name, parameter in parameters.items()}
    for name in values:
        if name not in KNOWN:
            raise InvalidRequestError("parameters", f"{name!r} is not known; known: {', '.join(KNOWN)}")
    search = pb.SearchOptions()
    attention = pb.AttentionOptions(families=[FAMILY_NUMBERS[family] for family in families])
    for message, fields in ((search, SEARCH), (search.sampling, SAMPLING), (attention, ATTENTION)):
        for name in fields.keys() & values.keys():
            _set(message, fields[name], values[name])
    for name in (FINAL_RESPONSE, BINARY_OUTPUT):
        _checked(name, values.get(name, False), bool)
    return Parameters(search, attention, _seconds(values[TIMEOUT]) if TIMEOUT in values else None)


def _value(parameter: InferParameter) -> Any:
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)


def _set(message: Any, field: Field, value: Any) -> None:
    name = field.name
    try:
        if name == "reduction":
            message.reduction = _reduction(value)
        elif field.is_repeated:
            getattr(message, name).extend(_list(field, value))
        else:
            setattr(message, name, _checked(name, _number(field, value), *KINDS[field.cpp_type]))
    except ValueError:  # also what protobuf says of a number that the field cannot hold
        raise InvalidRequestError(f"parameters.{name}", f"{value!r} is no number that it takes") from None


def _number(field: Field, value: Any) -> Any:
    """A fraction may come as a string, from clients that have no other way to send one."""
    return float(value) if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE and isinstance(value, str) else value


def _list(field: Field, value: Any) -> list[Any]:
    """Several values are a JSON list in a string."""
    try:
        values = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):  # lists within lists, deeper than anybody reads
        values = None
    kinds = KINDS[field.cpp_type]
    if not isinstance(values, list) or not all(type(one) in kinds for one in values):
        raise InvalidRequestError(
            f"parameters.{field.name}", f"is a JSON list of {kinds[0].__name__} in a string, got {value!r}"
        )
    return values


def _reduction(value: Any) -> "pb.Reduction.ValueType":
    if value not in REDUCTIONS:
        raise InvalidRequestError("parameters.reduction", f"{value!r} is not one of {', '.join(REDUCTIONS)}")
    return REDUCTIONS[value]


def _seconds(microseconds: Any) -> float:
    if (value := _checked(TIMEOUT, microseconds, int)) <= 0:
        raise InvalidRequestError(f"parameters.{TIMEOUT}", f"{value} is no number of microseconds above 0")
    return float(value) / 1e6


def _checked(name: str, value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise InvalidRequestError(
            f"parameters.{name}", f"is of the type {kinds[0].__name__}, got {value!r} ({type(value).__name__})"
        )
    return value
