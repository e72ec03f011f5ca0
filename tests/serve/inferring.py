"""The Open Inference Protocol as the tests speak it: requests put together, tensors taken apart."""

from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np

from serve.pb.inference import grpc_service_pb2 as pb
from serve.pb.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.tensors import ARRAYS, pack_bytes, unpack_bytes
from tests.serve.running import PATIENCE, Running

MODEL = "reversal"


def parameter(value: bool | float | str) -> pb.InferParameter:
    """A value, in the field of its type."""
    kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
    return pb.InferParameter(**{kind: value})  # type: ignore[arg-type]


def request(
    texts: Sequence[str] = ("abcd",),
    outputs: Sequence[str] = (),
    *,
    typed: bool = False,
    shape: Sequence[int] | None = None,
    model: str = MODEL,
    version: str = "",
    **parameters: bool | float | str,
) -> pb.ModelInferRequest:
    """A request, in raw or in typed contents."""
    elements = [text.encode() for text in texts]
    tensor = pb.ModelInferRequest.InferInputTensor(name="SOURCE", datatype="BYTES", shape=shape or [len(texts), 1])
    if typed:
        tensor.contents.bytes_contents.extend(elements)
    return pb.ModelInferRequest(
        model_name=model,
        model_version=version,
        id="seven",
        inputs=[tensor],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        parameters={name: parameter(value) for name, value in parameters.items()},
        raw_input_contents=[] if typed else [pack_bytes(elements)],
    )


def tensors(response: pb.ModelInferResponse) -> dict[str, Any]:
    """The outputs of a response, texts decoded."""
    assert len(response.outputs) == len(response.raw_output_contents)
    return {
        output.name: _array(output.datatype, tuple(output.shape), raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def _array(datatype: str, shape: tuple[int, ...], raw: bytes) -> Any:
    if datatype != "BYTES":
        return np.frombuffer(raw, ARRAYS[datatype]).reshape(shape)
    texts = [element.decode() for element in unpack_bytes(raw, int(np.prod(shape)))]
    return np.array(texts, object).reshape(shape)


def stub(running: Running) -> GRPCInferenceServiceStub:
    """The service, on the server's channel."""
    return GRPCInferenceServiceStub(running.channel)


def infer(running: Running, asked: pb.ModelInferRequest) -> dict[str, Any]:
    """The outputs of a request that succeeds."""
    return tensors(stub(running).ModelInfer(asked, timeout=PATIENCE))


def stream(running: Running, asked: Sequence[pb.ModelInferRequest]) -> list[pb.ModelStreamInferResponse]:
    """All that a stream gives."""
    return list(stub(running).ModelStreamInfer(iter(asked), timeout=PATIENCE))


def refused(running: Running, call: str, asked: Any) -> tuple[grpc.StatusCode, str]:
    """Code and text of a call that fails; of a stream, of its only request."""
    try:
        if call == "ModelStreamInfer":
            (response,) = stream(running, [asked])
            assert response.error_message
            return grpc.StatusCode.OK, response.error_message
        answer = getattr(stub(running), call)(asked, timeout=PATIENCE)
    except grpc.RpcError as error:
        failed: Any = error
        return failed.code(), failed.details()
    raise AssertionError(f"{call} was answered: {answer}")
