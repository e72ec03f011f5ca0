"""What the Open Inference Protocol says of a model: its metadata, and its configuration in Triton's terms. No gRPC."""

from collections.abc import Iterable

from serve.models import Serving
from serve.pb.inference import grpc_service_pb2 as pb
from serve.tensors import MOST_TEXTS, SOURCE, Output, outputs_of

PLATFORM = "limelight"

TYPES = {"BYTES": pb.TYPE_STRING, "FP32": pb.TYPE_FP32, "INT64": pb.TYPE_INT64}
"""Data types as configurations call them."""


def model_metadata(serving: Serving, versions: Iterable[str]) -> pb.ModelMetadataResponse:
    """Inputs and outputs of a model.

    Args:
        serving: one version of it.
        versions: all that are served.
    """
    manifest = serving.model.manifest
    response = pb.ModelMetadataResponse(name=manifest.name, versions=versions, platform=PLATFORM)
    response.inputs.add(name=SOURCE, datatype="BYTES", shape=[-1, 1])
    for name, output in outputs_of(manifest).items():
        response.outputs.add(name=name, datatype=output.datatype, shape=[-1, *_dims(output)])
    return response


def model_config(serving: Serving) -> pb.ModelConfig:
    """Configuration of a model."""
    model, manifest = serving.model, serving.model.manifest
    about = {
        "task": manifest.task,
        "architecture": manifest.architecture,
        "precision": model.precision,
        "provider": model.provider,
        "longest_source": str(manifest.limits.longest_source),
        "longest_target": str(manifest.limits.longest_target),
    }
    config = pb.ModelConfig(
        name=manifest.name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=MOST_TEXTS,
        dynamic_batching=pb.ModelDynamicBatching(),
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
        parameters={name: pb.ModelParameter(string_value=value) for name, value in about.items()},
    )
    config.input.add(name=SOURCE, data_type=pb.TYPE_STRING, dims=[1])
    for name, output in outputs_of(manifest).items():
        config.output.add(name=name, data_type=TYPES[output.datatype], dims=_dims(output))
    return config


def _dims(output: Output) -> list[int]:
    """Sizes of its axes; -1 for those that depend on the request: layers and heads may be chosen."""
    return [1 if axis == "1" else -1 for axis in output.axes]
