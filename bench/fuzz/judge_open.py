"""How a request of the Open Inference Protocol may end, read from docs/inference-protocol.md."""

import json
import math
from collections.abc import Mapping
from typing import Any

from bench.fuzz.judge import INVALID, LATE, NOT_FOUND, OK, Codes, Faults, Judge, has_unknown_fields
from bench.fuzz.subject import SPARE_VERSION, VERSIONS, Subject
from serve.pb.inference import grpc_service_pb2 as open_pb
from serve.pb.limelight.v1 import limelight_pb2 as pb

UNIMPLEMENTED, DENIED = "UNIMPLEMENTED", "PERMISSION_DENIED"

OUTPUTS = {"ENCODER_ATTENTION": 1, "DECODER_ATTENTION": 2, "CROSS_ATTENTION": 3} | dict.fromkeys(
    ("TEXT", "SCORE", "LOG_PROBABILITY", "FINISH_REASON", "TOKENS", "TARGET_LENGTH", "SOURCE_TOKENS", "SOURCE_LENGTH"),
    0,
)
"""And the family of attention that each is."""

MOST_TEXTS = 64

WHOLE = ("beam_size", "hypotheses", "longest", "shortest", "no_repeat_ngram", "top_k", "seed")
FRACTIONS = ("length_penalty", "coverage_penalty", "temperature", "top_p")
LISTS: Mapping[str, type] = {"suppressed": str, "layers": int, "heads": int}
FLAGS = ("shortlist", "binary_data_output", "triton_enable_empty_final_response")
SAMPLING = ("temperature", "top_k", "top_p", "seed")
REDUCTIONS = ("none", "mean", "max")

PATIENT = 30_000_000
"""Microseconds, within which everything is answered."""


class OpenJudge:
    """Judges requests of `inference.GRPCInferenceService`.

    Args:
        subject: what is asked.
        judge: of our own API, whose options these are.
    """

    def __init__(self, subject: Subject, judge: Judge) -> None:
        self._subject, self._judge = subject, judge

    def infer(self, request: open_pb.ModelInferRequest) -> Codes:
        """Of a batch."""
        faults = Faults()
        self._which(faults, request.model_name, request.model_version)
        self._inputs(faults, request)
        names = [output.name for output in request.outputs]
        faults.unless(len(set(names)) == len(names))
        for output in request.outputs:
            _layout(faults, output.parameters)
        if faults.unless(all(name in OUTPUTS for name in names)):
            self._parameters(faults, request.parameters, [OUTPUTS[name] for name in names if OUTPUTS[name]])
        return faults.codes

    def named(self, request: Any) -> Codes:
        """Of a model and version."""
        faults = Faults()
        self._which(faults, request.name, request.version)
        return faults.codes

    def ready(self, request: open_pb.ModelReadyRequest) -> Codes:
        """The same, where what is not there is just not ready."""
        return frozenset(OK if code == NOT_FOUND else code for code in self.named(request))

    def statistics(self, request: open_pb.ModelStatisticsRequest) -> Codes:
        """The same, where no name means all, and what is not there is a mistake."""
        if not request.name:
            return frozenset({OK})
        return frozenset(INVALID if code == NOT_FOUND else code for code in self.named(request))

    @staticmethod
    def index(request: open_pb.RepositoryIndexRequest) -> Codes:
        """Of what is served."""
        return frozenset({UNIMPLEMENTED if request.repository_name else OK})

    def load(self, request: Any, *, admin: bool) -> Codes:
        """Of what is to be loaded or unloaded."""
        if not admin:
            return frozenset({DENIED})
        faults = Faults()
        faults.unless(not request.repository_name, UNIMPLEMENTED)
        unloads = isinstance(request, open_pb.RepositoryModelUnloadRequest)
        faults.unless(set(request.parameters) <= ({"unload_dependents"} if unloads else set()))
        self._judge.entry_name(faults, request.model_name)
        return faults.codes

    def _which(self, faults: Faults, name: str, version: str) -> None:
        if name == self._subject.name and version == SPARE_VERSION:
            faults.maybe.add(NOT_FOUND)
            return
        faults.unless(name == self._subject.name, NOT_FOUND)
        if version and version not in VERSIONS:
            faults.unless(not version.isdecimal(), NOT_FOUND)
            if not version.isdecimal():
                faults.unless(False)

    def _inputs(self, faults: Faults, request: open_pb.ModelInferRequest) -> None:
        if not faults.unless([tensor.name for tensor in request.inputs] == ["SOURCE"]):
            return
        tensor, raw = request.inputs[0], request.raw_input_contents
        _layout(faults, tensor.parameters)
        shape = list(tensor.shape)
        right = tensor.datatype == "BYTES" and len(shape) in (1, 2) and shape[1:] in ([], [1])
        if not (faults.unless(right) and faults.unless(0 <= shape[0] <= MOST_TEXTS)):
            return
        typed = [name.name for name, _ in tensor.contents.ListFields()]
        if has_unknown_fields(tensor.contents):  # they may count as contents
            faults.maybe.add(INVALID)
        faults.unless(set(typed) <= {"bytes_contents"})
        faults.unless(not (typed and raw) and len(raw) <= 1)
        texts = _split(raw[0]) if raw else list(tensor.contents.bytes_contents)
        if not faults.unless(texts is not None and len(texts) == shape[0]):
            return
        for element in texts or ():
            self._text(faults, element)

    def _text(self, faults: Faults, element: bytes) -> None:
        try:
            text = element.decode()
        except UnicodeDecodeError:
            faults.unless(False)
            return
        self._judge.text(faults, text, self._subject.source, self._subject.manifest.limits.longest_source)

    def _parameters(
        self, faults: Faults, parameters: Mapping[str, open_pb.InferParameter], families: list[int]
    ) -> None:
        search = pb.SearchOptions()
        attention = pb.AttentionOptions(families=families)  # type: ignore[arg-type]
        for name, parameter in parameters.items():
            kind = parameter.WhichOneof("parameter_choice")
            if not faults.unless(kind is not None):
                continue
            value = getattr(parameter, str(kind))
            into: Any = attention if name in ("layers", "heads") else search.sampling if name in SAMPLING else search
            if name == "timeout":
                faults.unless(type(value) is int and value > 0)
                if type(value) is int and value < PATIENT:
                    faults.maybe.add(LATE)
            elif name == "reduction":
                faults.unless(value in REDUCTIONS)
            elif name in FLAGS:
                if faults.unless(type(value) is bool) and name == "shortlist":
                    search.shortlist = value
            else:
                _set(faults, into, name, value)
        self._judge.search(faults, search)
        self._judge.attention(faults, attention)


def _set(faults: Faults, message: Any, name: str, value: Any) -> None:
    """An option that has a value of its own."""
    if name in WHOLE:
        bits = 64 if name == "seed" else 32
        if faults.unless(type(value) is int and -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)):
            setattr(message, name, value)
    elif name in FRACTIONS:
        setattr(message, name, _fraction(value))  # what is none is in no range
    elif name == "prefix":
        if faults.unless(type(value) is str):
            message.prefix = value
    elif name in LISTS:
        elements = _list(value, LISTS[name])
        if faults.unless(elements is not None):
            getattr(message, name).extend(elements)
    else:
        faults.unless(False)  # there is no such option


def _fraction(value: Any) -> float:
    try:
        return math.nan if type(value) not in (int, float, str) else float(value)
    except (ValueError, OverflowError):
        return math.nan


def _list(value: Any, kind: type) -> list[Any] | None:
    """What a JSON list in a string holds; None where it is none of such elements."""
    try:
        found = json.loads(value) if type(value) is str else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or not all(type(one) is kind for one in found):
        return None
    fits = all(_is_text(one) if kind is str else -(2**31) <= one < 2**31 for one in found)
    return found if fits else None


def _is_text(found: str) -> bool:
    """It has no lone surrogate, which JSON lets through."""
    return not any("\ud800" <= character <= "\udfff" for character in found)


def _layout(faults: Faults, parameters: Mapping[str, Any]) -> None:
    """Of a tensor: only what says how its contents travel over HTTP."""
    faults.unless(set(parameters) <= {"binary_data", "binary_data_size"})


def _split(raw: bytes) -> list[bytes] | None:
    """Elements with their lengths before them; None where they do not come out even."""
    found, place = [], 0
    while place < len(raw):
        start = place + 4
        place = start + int.from_bytes(raw[place:start], "little")
        if start > len(raw) or place > len(raw):
            return None
        found.append(raw[start:place])
    return found
