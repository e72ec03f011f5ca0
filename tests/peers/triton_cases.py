"""What both servers are asked: of every call the good requests, and every way to get one wrong."""

from collections.abc import Sequence
from typing import Any

from serve.pb.inference import grpc_service_pb2 as pb
from serve.tensors import MOST_TEXTS, OUTPUTS, pack_bytes
from tests.serve.inferring import parameter, request

Input = pb.ModelInferRequest.InferInputTensor
Case = tuple[str, Any]
"""A call and its request."""

AB = pack_bytes([b"ab"])


def infer(
    inputs: Sequence[pb.ModelInferRequest.InferInputTensor],
    raw: Sequence[bytes] = (AB,),
    outputs: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor] = (),
) -> Case:
    """A request as it stands, right or wrong."""
    return "ModelInfer", pb.ModelInferRequest(
        model_name="reversal", inputs=inputs, raw_input_contents=raw, outputs=outputs
    )


def source(shape: Sequence[int] = (1, 1), datatype: str = "BYTES", name: str = "SOURCE", **contents: Any) -> Input:
    """An input as it stands."""
    typed = pb.InferTensorContents(**contents) if contents else None
    return Input(name=name, datatype=datatype, shape=shape, contents=typed)


def with_parameter(name: str) -> Input:
    tensor = source()
    tensor.parameters[name].CopyFrom(parameter("x"))
    return tensor


def requested(name: str, **parameters: bool | float | str) -> pb.ModelInferRequest.InferRequestedOutputTensor:
    given = {key: parameter(value) for key, value in parameters.items()}
    return pb.ModelInferRequest.InferRequestedOutputTensor(name=name, parameters=given)


INFER: dict[str, Case] = {
    "raw contents": ("ModelInfer", request(["abcd", "ab"], ["TEXT", "SCORE"])),
    "typed contents": ("ModelInfer", request(["abcd", "ab"], ["TEXT", "SCORE"], typed=True)),
    "one output": ("ModelInfer", request(["abcd", "ab"], ["SCORE"])),
    "outputs in another order": ("ModelInfer", request(["abcd", "ab"], ["SCORE", "TEXT"])),
    "every output": ("ModelInfer", request(["abcd", "ab"], list(OUTPUTS))),
    "most texts": ("ModelInfer", request(["ab"] * MOST_TEXTS, ["TEXT"])),
    "a version": ("ModelInfer", request(["ab"], ["TEXT"], version="1")),
    "no outputs named": ("ModelInfer", request(["ab"])),
    "one axis": ("ModelInfer", request(["ab"], ["TEXT"], shape=[1])),
    "an empty batch": infer([source((0, 1))], [b""]),
    "an unknown model": ("ModelInfer", request(model="x")),
    "no model": ("ModelInfer", request(model="")),
    "an unknown version": ("ModelInfer", request(version="7")),
    "a version that is no number": ("ModelInfer", request(version="x")),
    "an unknown model, a version that is no number": ("ModelInfer", request(model="x", version="x")),
    "no input": infer([], []),
    "contents without an input": infer([]),
    "an unknown input": infer([source(name="TEXT")]),
    "an extra input": infer([source(), source(name="MORE")], [AB, AB]),
    "an input twice": infer([source(), source()], [AB, AB]),
    "another data type": infer([source(datatype="FP32")], [b"\0\0\0\0"]),
    "a bogus data type": infer([source(datatype="TEXT")]),
    "no data type": infer([source(datatype="")]),
    "no axis": infer([source(())]),
    "three axes": infer([source((1, 1, 1))]),
    "two texts in a row": infer([source((1, 2))], [AB * 2]),
    "no text in a row": infer([source((1, 0))], [b""]),
    "too many texts": ("ModelInfer", request(["ab"] * (MOST_TEXTS + 1))),
    "a negative size": infer([source((-1, 1))]),
    "negative sizes": infer([source((-1, -1))]),
    "a product of 2 ^ 64": infer([source((2**32, 2**32))]),
    "a product of 2 ^ 64 in three": infer([source((2**62, 4, 1))]),
    "a size of 2 ^ 62": infer([source((2**62, 1))]),
    "too few elements": infer([source((2, 1))]),
    "too many elements": infer([source((1, 1))], [AB * 2]),
    "a length beyond the end": infer([source()], [b"\x09\0\0\0ab"]),
    "half a length": infer([source()], [b"\x09\0"]),
    "bytes after the end": infer([source()], [AB + b"x"]),
    "a length of 2 ^ 32 - 1": infer([source()], [b"\xff\xff\xff\xffab"]),
    "raw and typed contents": infer([source(bytes_contents=[b"ab"])]),
    "neither contents": infer([source()], []),
    "contents of two inputs": infer([source()], [AB, AB]),
    "contents of another type": infer([source(int_contents=[1])], []),
    "too few typed elements": infer([source((2, 1), bytes_contents=[b"ab"])], []),
    "too many typed elements": infer([source(bytes_contents=[b"ab", b"ab"])], []),
    "an unknown output": infer([source()], outputs=[requested("x")]),
    "an output twice": infer([source()], outputs=[requested("TEXT"), requested("TEXT")]),
    "an input in shared memory": infer([with_parameter("shared_memory_region")], []),
    "an output in shared memory": infer([source()], outputs=[requested("TEXT", shared_memory_region="x")]),
    "an unknown parameter": ("ModelInfer", request(["ab"], ["TEXT"], colour="red")),
    "a parameter of another type": ("ModelInfer", request(["ab"], ["TEXT"], timeout="soon")),
}
"""Batches, right and wrong."""

OF_A_MODEL: dict[str, tuple[str, str]] = {
    "the model": ("reversal", ""),
    "its version": ("reversal", "1"),
    "an unknown model": ("x", ""),
    "no model": ("", ""),
    "an unknown version": ("reversal", "7"),
    "a version that is no number": ("reversal", "x"),
    "an unknown model, a version that is no number": ("x", "x"),
}
"""Names and versions of models."""

CALLS = ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics")
"""Those that take these."""

REST: dict[str, Case] = {
    "live": ("ServerLive", pb.ServerLiveRequest()),
    "ready": ("ServerReady", pb.ServerReadyRequest()),
    "metadata": ("ServerMetadata", pb.ServerMetadataRequest()),
    "index": ("RepositoryIndex", pb.RepositoryIndexRequest()),
    "index of what is ready": ("RepositoryIndex", pb.RepositoryIndexRequest(ready=True)),
    "index of another repository": ("RepositoryIndex", pb.RepositoryIndexRequest(repository_name="x")),
}

CASES: dict[str, Case] = {
    **{f"ModelInfer: {name}": case for name, case in INFER.items()},
    **{f"ModelStreamInfer: {name}": ("ModelStreamInfer", asked) for name, (_, asked) in INFER.items()},
    **{
        f"{call}: {name}": (call, getattr(pb, f"{call}Request")(name=model, version=version))
        for call in CALLS
        for name, (model, version) in OF_A_MODEL.items()
    },
    **{f"Server: {name}": case for name, case in REST.items()},
}
"""All of them."""
