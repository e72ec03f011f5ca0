"""Requests that are right: most of what is sent, or what it was before something in it was changed."""

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from bench.fuzz.grammar import fill
from bench.fuzz.subject import HEALTH, INFERENCE, OURS, SPARE_ENTRY, VERSIONS, Method, Subject
from bench.fuzz.values import Field
from serve.pb.inference import grpc_service_pb2 as open_pb
from serve.pb.limelight.v1 import admin_pb2 as admin_pb
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.tensors import OUTPUTS, SOURCE, pack_bytes

FAMILIES = ("encoder", "decoder", "cross")


class Sound:
    """Makes requests that are right.

    Args:
        subject: what is asked.
        draw: what is random.
    """

    def __init__(self, subject: Subject, draw: random.Random) -> None:
        self._subject, self._draw = subject, draw
        self._limits = subject.manifest.limits

    def request(self, method: Method) -> Message:
        """A request of a call; of one that there is no more to say about, whatever its fields may hold."""
        make = MAKERS.get(method.request.DESCRIPTOR.full_name)
        if make is not None:
            made: Message = make(self)
            return made
        message = method.request()
        if not method.service.startswith("limelight."):
            fill(self._draw, message, self._subject.words)
        return message

    def _some(self, share: float) -> bool:
        return self._draw.random() < share

    def _text(self, longest: int) -> str:
        """Letters; now and then as many as there may be."""
        draw = self._draw
        count = longest if self._some(0.05) else draw.randint(1, min(longest, 8))
        return "".join(draw.choices(self._subject.letters, k=count))

    def _which(self) -> dict[str, Any]:
        return {
            "model": self._draw.choice(("", self._subject.name)),
            "version": self._draw.choice(("", *VERSIONS)),
        }

    def search(self) -> pb.SearchOptions:
        """How to search."""
        draw, asked = self._draw, pb.SearchOptions()
        if self._some(0.4):
            asked.beam_size = draw.choices((1, 2, 3, 4, 8, 16), (8, 4, 4, 4, 1, 1))[0]
        if self._some(0.3):
            asked.hypotheses = draw.randint(1, asked.beam_size or 1)
        if self._some(0.2):
            asked.length_penalty = draw.choice((0.0, 0.5, 1.0, 10.0))
        if self._some(0.1):
            asked.coverage_penalty = draw.choice((0.0, 0.3, 10.0))
        if self._some(0.4):
            asked.longest = draw.randint(1, self._limits.longest_target)
        longest = asked.longest or self._limits.longest_target
        if self._some(0.1):
            asked.shortest = draw.randint(1, longest)
        if self._some(0.1):
            asked.no_repeat_ngram = draw.choice((0, 1, 2, 3, 100, 2**31 - 1))
        if self._some(0.1):
            asked.suppressed.extend(draw.choices(self._subject.letters, k=draw.randint(1, 3)))
        if self._some(0.15) and longest > 1:
            asked.prefix = self._text(longest - 1)
        elif self._some(0.2) and self._subject.shortlist:
            asked.shortlist = True
        if self._some(0.15) and asked.beam_size in (0, 1):
            asked.sampling.CopyFrom(self._sampling())
        return asked

    def _sampling(self) -> pb.Sampling:
        draw, asked = self._draw, pb.Sampling()
        if self._some(0.5):
            asked.temperature = draw.choice((0.01, 0.7, 1.0, 100.0))
        if self._some(0.5):
            asked.top_k = draw.choice((0, 1, 5, 2**31 - 1))
        if self._some(0.5):
            asked.top_p = draw.choice((0.1, 0.9, 1.0))
        if self._some(0.5):
            asked.seed = draw.choice((0, 7, 2**63 - 1))
        return asked

    def attention(self) -> pb.AttentionOptions:
        """Which attention to return."""
        draw, shapes = self._draw, self._subject.manifest.attention
        families = draw.sample(FAMILIES, draw.randint(0, 3))
        asked = pb.AttentionOptions(
            families=[FAMILIES.index(one) + 1 for one in families],  # type: ignore[misc]
            reduction=draw.randrange(4),  # type: ignore[arg-type]
            float_type=draw.randrange(3),  # type: ignore[arg-type]
        )
        if families and self._some(0.3):
            asked.layers.extend(_some_of(draw, min(shapes[one].layers for one in families)))  # type: ignore[index]
            asked.heads.extend(_some_of(draw, min(shapes[one].heads for one in families)))  # type: ignore[index]
        return asked

    def generate(self, kind: Any = pb.GenerateRequest) -> Any:
        """A text to answer."""
        asked = kind(source=self._text(self._limits.longest_source - 1), **self._which())
        if self._some(0.6):
            asked.search.CopyFrom(self.search())
        if self._some(0.4):
            asked.attention.CopyFrom(self.attention())
        return asked

    def many(self) -> pb.GenerateManyRequest:
        """One of many."""
        return pb.GenerateManyRequest(id=f"{self._draw.getrandbits(40):x}", request=self.generate())

    def score(self) -> pb.ScoreRequest:
        """A pair to score."""
        limits = self._limits
        source, target = self._text(limits.longest_source - 1), self._text(limits.longest_target - 1)
        asked = pb.ScoreRequest(source=source, target=target, **self._which())
        if self._some(0.3):
            asked.length_penalty = self._draw.choice((0.0, 1.0, 10.0))
        if self._some(0.4):
            asked.attention.CopyFrom(self.attention())
        return asked

    def describe(self) -> pb.GetModelRequest:
        """A model to describe."""
        return pb.GetModelRequest(**self._which())

    def infer(self) -> open_pb.ModelInferRequest:
        """A batch of the Open Inference Protocol."""
        draw = self._draw
        count = draw.choices((0, 1, 2, 5, 64), (3, 60, 20, 5, 0.5))[0]
        texts = [self._text(self._limits.longest_source - 1).encode() for _ in range(count)]
        tensor = open_pb.ModelInferRequest.InferInputTensor(
            name=SOURCE, datatype="BYTES", shape=draw.choice(([count], [count, 1]))
        )
        version = draw.choice(("", *VERSIONS))
        asked = open_pb.ModelInferRequest(
            model_name=self._subject.name, model_version=version, id=f"{draw.getrandbits(40):x}"
        )
        if self._some(0.5):
            tensor.contents.bytes_contents.extend(texts)
        else:
            asked.raw_input_contents.append(pack_bytes(texts))
        asked.inputs.append(tensor)
        for name in draw.sample(list(OUTPUTS), draw.choice((0, 0, 1, 2, 4, len(OUTPUTS)))):
            asked.outputs.add(name=name)
        if self._some(0.4):
            self._parameters(asked)
        return asked

    def _parameters(self, asked: open_pb.ModelInferRequest) -> None:
        search = self.search()
        for field, value in (*search.ListFields(), *search.sampling.ListFields()):
            if field.name == "suppressed":
                asked.parameters[field.name].string_param = json.dumps(list(value))
            elif field.name != "sampling":
                _put(asked.parameters[field.name], value)
        if self._some(0.2):
            asked.parameters["reduction"].string_param = self._draw.choice(("none", "mean", "max"))
        if self._some(0.1):
            asked.parameters["timeout"].int64_param = self._draw.choice((1, 2000, 60_000_000))

    def named(self, kind: Any) -> Any:
        """A model of the Open Inference Protocol."""
        return kind(name=self._subject.name, version=self._draw.choice(("", *VERSIONS)))

    def entry(self, kind: Any) -> Any:
        """The entry that comes and goes."""
        name = "model_name" if "model_name" in kind.DESCRIPTOR.fields_by_name else "name"
        return kind(**{name: SPARE_ENTRY})

    def health(self) -> Message:
        """A service to look after."""
        request: Message = health_pb2.HealthCheckRequest(service=self._draw.choice(("", OURS, INFERENCE, HEALTH)))
        return request

    def reflection(self) -> Message:
        """A symbol to look up."""
        request: Message = reflection_pb2.ServerReflectionRequest()
        field: Field = self._draw.choice(request.DESCRIPTOR.fields)
        if field.message_type is None:
            setattr(request, field.name, self._draw.choice(self._subject.words[field.full_name]))
        else:
            getattr(request, field.name).SetInParent()
        return request


def _some_of(draw: random.Random, count: int) -> list[int]:
    return draw.sample(range(count), draw.randint(0, count))


def _put(parameter: open_pb.InferParameter, value: Any) -> None:
    """A value, in the field of its type."""
    fields = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    setattr(parameter, fields[type(value)], value)


def _of(kind: Any, make: Callable[[Sound, Any], Any]) -> tuple[str, Callable[[Sound], Any]]:
    return kind.DESCRIPTOR.full_name, lambda sound: make(sound, kind)


MAKERS: Mapping[str, Callable[[Sound], Any]] = dict(
    (
        _of(pb.GenerateRequest, Sound.generate),
        _of(pb.GenerateStreamRequest, Sound.generate),
        _of(pb.GenerateChunkedRequest, Sound.generate),
        _of(pb.GenerateManyRequest, lambda sound, _: sound.many()),
        _of(pb.ScoreRequest, lambda sound, _: sound.score()),
        _of(pb.GetModelRequest, lambda sound, _: sound.describe()),
        _of(open_pb.ModelInferRequest, lambda sound, _: sound.infer()),
        *(
            _of(kind, Sound.named)
            for kind in (
                open_pb.ModelReadyRequest,
                open_pb.ModelMetadataRequest,
                open_pb.ModelConfigRequest,
                open_pb.ModelStatisticsRequest,
            )
        ),
        *(
            _of(kind, Sound.entry)
            for kind in (
                open_pb.RepositoryModelLoadRequest,
                open_pb.RepositoryModelUnloadRequest,
                admin_pb.LoadEntryRequest,
                admin_pb.UnloadEntryRequest,
            )
        ),
        _of(health_pb2.HealthCheckRequest, lambda sound, _: sound.health()),
        _of(reflection_pb2.ServerReflectionRequest, lambda sound, _: sound.reflection()),
    )
)
"""By the full name of a request: what makes it. Requests without fields need none."""
