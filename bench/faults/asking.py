"""The Open Inference Protocol as a client of any of the three speaks it: requests, calls, and how they ended."""

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from bench.faults.passes import PATIENCE
from model.errors import InvalidRequestError
from serve.pb.inference import grpc_service_pb2 as pb
from serve.pb.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.tensors import pack_bytes, unpack_bytes

SERVICE = "/inference.GRPCInferenceService"

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Ended:
    """How a call ended.

    Attributes:
        code: name of its status.
        said: the status's message.
        seconds: that it took.
        texts: of its answer.
        version: of the model that answered.
        trailing: metadata that came with the status.
    """

    code: str
    said: str = ""
    seconds: float = 0.0
    texts: tuple[str, ...] = ()
    version: str = ""
    trailing: dict[str, str | bytes] = field(default_factory=dict)


class Call:
    """A call that is under way.

    Args:
        begin: begins it; gives gRPC's future.
    """

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begun, self._over, self._seconds = time.monotonic(), threading.Event(), 0.0
        self._future = begin()
        self._future.add_done_callback(self._note)

    def _note(self, _: Any) -> None:
        self._seconds = time.monotonic() - self._begun
        self._over.set()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set()

    def cancel(self) -> None:
        """Want it no more."""
        self._future.cancel()

    def end(self, patience: float = PATIENCE) -> Ended:
        """How it ended; "NONE" where it has not within so many seconds."""
        if not self._over.wait(patience):
            return Ended("NONE", "no status came", time.monotonic() - self._begun)
        code = self._future.code()
        trailing = dict(self._future.trailing_metadata() or ())
        if code is not grpc.StatusCode.OK:
            return Ended(code.name, self._future.details() or "", self._seconds, trailing=trailing)
        response = self._future.result()
        if not isinstance(response, pb.ModelInferResponse):
            return Ended("OK", seconds=self._seconds, trailing=trailing)
        return Ended("OK", "", self._seconds, texts_of(response), response.model_version, trailing)


class Asker:
    """A channel to a server.

    Args:
        channel: this.
        model: that is asked.
        metadata: of every call.
    """

    def __init__(self, channel: grpc.Channel, model: str, metadata: Metadata = ()) -> None:
        self.channel, self.model, self.metadata = channel, model, metadata
        self.stub = GRPCInferenceServiceStub(channel)

    def request(self, *texts: str, **fields: Any) -> pb.ModelInferRequest:
        """A good request."""
        return infer_request(self.model, [text.encode() for text in texts], **fields)

    def begin(
        self, request: Any, *, timeout: float | None = None, call: str = "ModelInfer", metadata: Metadata | None = None
    ) -> Call:
        """Begin a call."""
        method = getattr(self.stub, call)
        brought = self.metadata if metadata is None else metadata
        return Call(lambda: method.future(request, timeout=timeout, metadata=brought))

    def raw(self, method: str, message: bytes, **options: Any) -> Call:
        """Begin a call of a message as it stands; its answer is not read."""
        call: Any = self.channel.unary_unary(method)
        return Call(lambda: call.future(message, timeout=PATIENCE, metadata=self.metadata, **options))

    def stream(self, message: bytes, timeout: float | None = None) -> Any:
        """Begin a stream of one request; answers are not parsed, because the servers differ in their type."""
        method: Any = self.channel.stream_stream(f"{SERVICE}/ModelStreamInfer")
        return method(iter([message]), timeout=timeout, metadata=self.metadata)

    def live(self, patience: float = 1.0) -> bool:
        """Whether it says that it lives."""
        try:
            return bool(self.stub.ServerLive(pb.ServerLiveRequest(), timeout=patience, metadata=self.metadata).live)
        except grpc.RpcError:
            return False

    def ready(self, patience: float = 1.0) -> bool:
        """Whether it says that it and its model are ready."""
        asked = pb.ModelReadyRequest(name=self.model)
        try:
            server = self.stub.ServerReady(pb.ServerReadyRequest(), timeout=patience, metadata=self.metadata)
            model = self.stub.ModelReady(asked, timeout=patience, metadata=self.metadata)
        except grpc.RpcError:
            return False
        return bool(server.ready and model.ready)


def infer_request(model: str, elements: Sequence[bytes], **fields: Any) -> pb.ModelInferRequest:
    """A request for the texts' answers; `fields` stand in place of its own."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="SOURCE", datatype="BYTES", shape=[len(elements), 1])
    wanted = [pb.ModelInferRequest.InferRequestedOutputTensor(name="TEXT")]
    values = {"model_name": model, "inputs": [tensor], "outputs": wanted, "raw_input_contents": [pack_bytes(elements)]}
    return pb.ModelInferRequest(**values | fields)


def texts_of(response: pb.ModelInferResponse) -> tuple[str, ...]:
    """The texts of an answer, in raw or typed contents."""
    for number, output in enumerate(response.outputs):
        if output.name == "TEXT":
            elements: Sequence[bytes] = output.contents.bytes_contents
            if response.raw_output_contents:
                try:
                    elements = unpack_bytes(response.raw_output_contents[number], output.shape[0])
                except InvalidRequestError:
                    return ("contents that are not of its shape",)
            return tuple(element.decode() for element in elements)
    return ()


def status_of(payloads: bytes) -> str:
    """The status in frames of HTTP/2, "NONE" without one; gRPC's core writes it without compression."""
    found = re.search(rb"grpc-status.(\d+)", payloads, re.DOTALL)
    return "NONE" if found is None else next(code.name for code in grpc.StatusCode if code.value[0] == int(found[1]))
