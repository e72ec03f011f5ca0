"""What is fuzzed: the calls that there are, and what may be known from outside of the models that answer them."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from bench.fuzz.values import Words
from bench.load.servers import run_tool
from export.manifest import MANIFEST, Manifest, read_manifest
from model.tokenizer import Tokenizer
from model.vocabulary import SPECIAL_TOKENS
from serve.parameters import KNOWN
from serve.pb.inference import grpc_service_pb2
from serve.pb.limelight.v1 import admin_pb2, limelight_pb2
from serve.tensors import OUTPUTS, SOURCE

VERSIONS = ("1", "2")
"""That are served all the time."""

SPARE_ENTRY, SPARE_VERSION = "spare", "3"
"""What administrative calls load and unload: its place in the model folder, and its version."""

OURS, INFERENCE, ADMIN = "limelight.v1.LimelightService", "inference.GRPCInferenceService", "limelight.v1.AdminService"
HEALTH, REFLECTION = "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"


@dataclass(frozen=True)
class Method:
    """A call that there is.

    Attributes:
        service: full name of the service.
        name: of the call.
        request: type of its messages.
        response: type of the answers.
        streams_in: it takes many messages.
        streams_out: it gives many.
        admin: it is on the administrative port.
    """

    service: str
    name: str
    request: type[Message]
    response: type[Message]
    streams_in: bool
    streams_out: bool
    admin: bool = False

    @property
    def path(self) -> str:
        """As HTTP/2 names it."""
        return f"/{self.service}/{self.name}"


def _methods(service: ServiceDescriptor, *, admin: bool = False) -> list[Method]:
    return [
        Method(
            service.full_name,
            one.name,
            GetMessageClass(one.input_type),
            GetMessageClass(one.output_type),
            one.client_streaming,
            one.server_streaming,
            admin,
        )
        for one in service.methods
    ]


METHODS: Sequence[Method] = (
    *_methods(limelight_pb2.DESCRIPTOR.services_by_name["LimelightService"]),
    *_methods(grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]),
    *_methods(health_pb2.DESCRIPTOR.services_by_name["Health"]),
    *_methods(reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]),
    *_methods(admin_pb2.DESCRIPTOR.services_by_name["AdminService"], admin=True),
    *(
        one
        for one in _methods(grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"], admin=True)
        if one.name.startswith(("Repository", "Model", "Server"))
    ),
)
"""All that there are, on both ports."""

BY_PATH = {(one.path, one.admin): one for one in METHODS}


@dataclass(frozen=True)
class Subject:
    """The models that are served: one by name, in several versions with the same weights.

    Attributes:
        bundle: what was copied for every version.
        manifest: of it.
        source: tokenizer of what is asked.
        target: tokenizer of the answers.
        letters: that both vocabularies have.
    """

    bundle: Path
    manifest: Manifest
    source: Tokenizer
    target: Tokenizer
    letters: str

    @classmethod
    def of(cls, bundle: Path) -> "Subject":
        """Of a bundle whose tokens are characters."""
        manifest = read_manifest(bundle)
        source, target = (
            Tokenizer.load(bundle / file) for file in (manifest.source_tokenizer, manifest.target_tokenizer)
        )
        both = set.intersection(
            *({side.token_text(index) for index in range(4, len(side))} for side in (source, target))
        )
        return cls(bundle, manifest, source, target, "".join(sorted(one for one in both if len(one) == 1)))

    @property
    def name(self) -> str:
        """Of the model."""
        return self.manifest.name

    @property
    def shortlist(self) -> bool:
        """It has one."""
        return self.manifest.graphs["fp32"].shortlist is not None

    def shelve(self, folder: Path) -> None:
        """Write the model folder: an entry for each version."""
        for place, version in (*((f"entry-{one}", one) for one in VERSIONS), (SPARE_ENTRY, SPARE_VERSION)):
            shutil.copytree(self.bundle, folder / place)
            path = folder / place / MANIFEST
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(values | {"version": version}), encoding="utf-8")

    @cached_property
    def words(self) -> Words:
        """What string fields may well hold, by their full names."""
        names = (self.name, self.name, self.name, self.name, "", "no such model", "../" + self.name)
        versions = ("", *VERSIONS, *VERSIONS, SPARE_VERSION, "7", "01", "x")
        texts = (self.letters[:5], self.letters[:1], self.letters[::-1][:8], self.letters * 3)
        ours, theirs, admin = "limelight.v1.", "inference.", "limelight.v1."
        found: dict[str, Sequence[str]] = {
            f"{ours}SearchOptions.prefix": (*texts, self.letters[0], "</s>"),
            f"{ours}SearchOptions.suppressed": (*self.letters, *SPECIAL_TOKENS, "nothing"),
            f"{ours}ScoreRequest.target": texts,
            f"{theirs}ModelInferRequest.model_name": names,
            f"{theirs}ModelInferRequest.model_version": versions,
            f"{theirs}ModelInferRequest.parameters": (*KNOWN, "unknown", ""),
            f"{theirs}ModelInferRequest.InferInputTensor.name": (SOURCE, SOURCE, "source", "TEXT"),
            f"{theirs}ModelInferRequest.InferInputTensor.datatype": DATATYPES,
            f"{theirs}ModelInferRequest.InferInputTensor.parameters": TENSOR_PARAMETERS,
            f"{theirs}ModelInferRequest.InferRequestedOutputTensor.name": (*OUTPUTS, "LOGITS"),
            f"{theirs}ModelInferRequest.InferRequestedOutputTensor.parameters": TENSOR_PARAMETERS,
            f"{theirs}InferParameter.string_param": ("[0]", "[1, 0]", "none", "mean", "max", '["a"]', "0.5", "3"),
            f"{theirs}RepositoryIndexRequest.repository_name": ("", "", "models"),
            f"{admin}LoadEntryRequest.name": ENTRIES,
            f"{admin}UnloadEntryRequest.name": ENTRIES,
            "grpc.health.v1.HealthCheckRequest.service": ("", OURS, INFERENCE, "no such service"),
        }
        for call in ("Load", "Unload"):
            found[f"{theirs}RepositoryModel{call}Request.model_name"] = ENTRIES
            found[f"{theirs}RepositoryModel{call}Request.parameters"] = ("unload_dependents", "config", "file:1/x")
        for call in ("Generate", "GenerateStream", "GenerateChunked", "Score", "GetModel"):
            found |= {f"{ours}{call}Request.model": names, f"{ours}{call}Request.version": versions}
            found[f"{ours}{call}Request.source"] = texts
        for call in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
            found |= {f"{theirs}{call}Request.name": names, f"{theirs}{call}Request.version": versions}
        for field in reflection_pb2.ServerReflectionRequest.DESCRIPTOR.fields:
            found[field.full_name] = (OURS, INFERENCE, f"{OURS}.Generate", "inference/grpc_service.proto", "")
        return found


ENTRIES = (SPARE_ENTRY, SPARE_ENTRY, SPARE_ENTRY, "entry-7", "../spare", "spare/", "./spare", "")
"""Of the model folder, right and wrong; what every other call needs is not among them."""

DATATYPES = ("BYTES", "BYTES", "BYTES", "bytes", "FP32", "INT64", "INT32", "BOOL", "FP16", "BF16", "STRING")

TENSOR_PARAMETERS = ("binary_data", "binary_data_size", "shared_memory_region", "classification")


def prepare(folder: Path) -> Subject:
    """The tiny model, made if it is not there."""
    if not (folder / "bundle" / MANIFEST).is_file():
        run_tool(sys.executable, "bench.fuzz.tiny", str(folder))
    return Subject.of(folder / "bundle")
