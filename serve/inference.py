"""Open Inference Protocol v2 with Triton's additions, `inference.GRPCInferenceService`: convert, call, convert back."""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
import copy
import importlib.metadata
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from model.errors import InvalidRequestError
from serve.aside import Aside, size_of
from serve.errors import STOPPING, ModelNotFoundError, NotAllowedError, NotOfferedError, ShuttingDownError
from serve.folder import ModelFolder
from serve.in_order import answer_in_order
from serve.infer import Answers, infer_response, mark_final, understand_batch
from serve.jobs import Caller, Decoded, Job, Ticket, deadline_in
from serve.metrics import Metrics
from serve.model_config import model_config, model_metadata
from serve.models import Models, Serving, is_number
from serve.pb.inference import grpc_service_pb2 as pb
from serve.pb.inference import grpc_service_pb2_grpc as rpc
from serve.repository import load_model, model_index, unload_model
from serve.request import job_ended
from serve.service import client_of
from serve.statistics import Statistics
from serve.status import refuse

Context = grpc.aio.ServicerContext[Any, Any]

INFERENCE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

EXTENSIONS = ("model_repository", "model_configuration", "parameters", "statistics")
"""Of the protocol, that this server has."""


def _never(why: str) -> Any:
    """A call of the protocol that this server does not answer."""

    async def refuse_call(service: InferenceService, request: Any, context: Context) -> Any:  # noqa: ARG001
        raise NotOfferedError(why)

    return refuse_call


class InferenceService(rpc.GRPCInferenceServiceServicer):
    """Answers from the models that are served.

    Args:
        models: these.
        stopping: set when the server takes nothing new any more.
        metrics: told of answers.
        client_header: metadata key that names the client; without it, it is the address that a call came from.
    """

    def __init__(
        self, models: Models, stopping: asyncio.Event, metrics: Metrics, client_header: str | None = None
    ) -> None:
        self._models, self._stopping, self._metrics = models, stopping, metrics
        self._client_header = client_header
        self._statistics = Statistics()
        self._folder: ModelFolder | None = None
        self._aside = Aside("limelight-tensors")

    def administered(self, folder: ModelFolder) -> InferenceService:
        """The same service, which also loads and unloads what is in a folder."""
        other = copy.copy(self)
        other._folder = folder  # noqa: SLF001
        return other

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """See grpc_service.proto."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """See grpc_service.proto."""
        return pb.ServerReadyResponse(ready=not self._stopping.is_set() and all(map(_ready, self._models)))

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """See grpc_service.proto."""
        try:
            serving = self._find(request.name, request.version)
        except ModelNotFoundError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._stopping.is_set() and _ready(serving))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """See grpc_service.proto."""
        version = importlib.metadata.version("limelight")
        return pb.ServerMetadataResponse(name="limelight", version=version, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """See grpc_service.proto."""
        serving = self._find(request.name, request.version)
        return model_metadata(serving, [one.version for one in self._models if one.name == serving.name])

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """See grpc_service.proto."""
        return pb.ModelConfigResponse(config=model_config(self._find(request.name, request.version)))

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        """See grpc_service.proto."""
        if request.name:
            try:
                self._find(request.name, request.version)
            except ModelNotFoundError as error:  # of this call alone, Triton says so
                raise InvalidRequestError("name", str(error)) from None
        asked = [
            serving
            for serving in self._models
            if request.name in ("", serving.name) and request.version in ("", serving.version)
        ]
        return pb.ModelStatisticsResponse(model_stats=map(self._statistics.of, asked))

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """See grpc_service.proto."""
        return await self._infer(request, self._caller(context))

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """See grpc_service.proto."""
        caller = self._caller(context)
        async for response in answer_in_order(
            request_iterator, lambda request: self._answered(request, caller), self._stopping
        ):
            yield response

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """See grpc_service.proto."""
        entries = [] if self._folder is None else self._folder.entries
        return model_index(request, self._models, entries, _ready)

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """See grpc_service.proto."""
        await load_model(self._own_folder, request)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """See grpc_service.proto."""
        await unload_model(self._own_folder, request)
        return pb.RepositoryModelUnloadResponse()

    SystemSharedMemoryStatus = _never("this server shares no memory with its clients: send tensors in messages")
    SystemSharedMemoryRegister = SystemSharedMemoryUnregister = SystemSharedMemoryStatus
    CudaSharedMemoryStatus = CudaSharedMemoryRegister = CudaSharedMemoryUnregister = SystemSharedMemoryStatus
    TraceSetting = _never("what is traced is set when this server is started")
    LogSettings = _never("what is logged is set when this server is started")

    @property
    def _own_folder(self) -> ModelFolder:
        if self._folder is None:
            raise NotAllowedError("models are loaded and unloaded on the administrative port only")
        return self._folder

    def _find(self, name: str, version: str, field: str = "version") -> Serving:
        """The model of a name and version, or the newest version.

        Raises:
            ModelNotFoundError: there is none.
            InvalidRequestError: the version is neither served nor a number.
        """
        versions = [one.version for one in self._models if one.name == name]
        if version and not is_number(version) and version not in versions:
            raise InvalidRequestError(field, f"{version!r} is no version of model {name!r} here, nor a number")
        if not versions:
            raise ModelNotFoundError(f"model {name!r} is not served here")
        return self._models.find(name, version)

    def _caller(self, context: Context) -> Caller:
        return Caller(client_of(context, self._client_header), deadline_in(context.time_remaining()))

    async def _infer(self, request: pb.ModelInferRequest, caller: Caller) -> pb.ModelInferResponse:
        with (
            self._find(request.model_name, request.model_version, "model_version").held() as serving,
            self._statistics.request(serving) as counted,
        ):
            size = request.ByteSize()
            batch = await self._aside.run(lambda: understand_batch(serving.model, request), size)
            counted.read()
            tickets: list[Ticket] = []
            decoded = await self._decoded(serving, batch.jobs(caller, size), tickets)
            counted.decoded(tickets)
            answers = Answers(batch, decoded)
            return await self._aside.run(lambda: infer_response(request.id, answers), sum(map(size_of, decoded)))

    async def _decoded(self, serving: Serving, jobs: Sequence[Job], tickets: list[Ticket]) -> list[Decoded]:
        """What the engine makes of all texts of a request; if one fails, all are given up."""
        try:
            for job in jobs:
                tickets.append(serving.engine.submit(job))  # noqa: PERF401  # one may be refused
            found = await asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in tickets))
        finally:
            for ticket in tickets:
                ticket.cancel()  # harmless when done; frees the rows when the caller is gone
                job_ended(ticket, serving)
        for ticket, decoded in zip(tickets, found, strict=True):
            self._metrics.answered(ticket, decoded)
        return found

    async def _answered(self, request: pb.ModelInferRequest, caller: Caller) -> pb.ModelStreamInferResponse:
        """The end of a request of a stream: its answer, or why it has none."""
        try:
            if self._stopping.is_set():
                raise ShuttingDownError(STOPPING)
            response = await self._infer(request, caller)
        except Exception as error:
            refused = refuse(error, request)
            self._metrics.item_ended(refused.code.name, refused.reason)
            about = pb.ModelInferResponse(id=request.id)
            return pb.ModelStreamInferResponse(error_message=refused.message, infer_response=about)
        self._metrics.item_ended("OK", "OK")
        mark_final(response)
        return pb.ModelStreamInferResponse(infer_response=response)


def _ready(serving: Serving) -> bool:
    return serving.engine.alive and not serving.engine.stopping
