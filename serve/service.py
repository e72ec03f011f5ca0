"""The `limelight.v1` service: convert, call the engine, convert back. It knows no ONNX Runtime."""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc

from serve.access import caller_name
from serve.aside import Aside, size_of
from serve.chunked import in_chunks
from serve.convert import refuse_unknown_fields
from serve.jobs import Caller, Decoded, Ticket, deadline_in
from serve.many import answer_many
from serve.messages import (
    describe_model,
    generate_response,
    score_response,
    summarise_model,
    understand,
    understand_pair,
    version_message,
)
from serve.metrics import Metrics
from serve.models import Models, Serving
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1 import limelight_pb2_grpc as rpc
from serve.request import job_ended
from serve.stream import TokenStream


class LimelightService(rpc.LimelightServiceServicer):
    """Answers from the models that are served.

    Args:
        models: these.
        stopping: set when the server takes nothing new any more.
        metrics: told of answers.
        client_header: metadata key that names the client; without it, it is the address that a call came from.
    """

    def __init__(
        self,
        models: Models,
        stopping: asyncio.Event,
        metrics: Metrics,
        client_header: str | None = None,
    ) -> None:
        self._models, self._stopping, self._metrics = models, stopping, metrics
        self._client_header = client_header
        self._aside = Aside("limelight-convert")

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> pb.GenerateResponse:
        """See limelight.proto."""
        return await self._generate(request, self._caller(context))

    async def GenerateMany(
        self,
        request_iterator: AsyncIterator[pb.GenerateManyRequest],
        context: grpc.aio.ServicerContext[pb.GenerateManyRequest, pb.GenerateManyResponse],
    ) -> AsyncIterator[pb.GenerateManyResponse]:
        """See limelight.proto."""
        caller = self._caller(context)
        answers = answer_many(
            request_iterator,
            lambda request: self._generate(request, caller),
            self._stopping,
            self._metrics.item_ended,
        )
        async for response in answers:
            yield response

    async def GenerateStream(
        self,
        request: pb.GenerateStreamRequest,
        context: grpc.aio.ServicerContext[pb.GenerateStreamRequest, pb.GenerateStreamResponse],
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """See limelight.proto."""
        before, first = time.monotonic(), True
        with self._models.use(request.model, request.version) as serving:
            asked = await self._aside.run(lambda: understand(serving.model, request), request.ByteSize())
            stream = TokenStream(serving.model, asked, version_message(serving.model), self._aside)
            ticket = serving.engine.submit(asked.job(self._caller(context), on_settled=stream.on_settled))
            try:
                async for event in stream.events(ticket):
                    if event.HasField("token"):
                        before, first = self._metrics.token(before, first=first), False
                    yield event
                self._metrics.answered(ticket, ticket.future.result())
            finally:
                ticket.cancel()
                job_ended(ticket, serving)

    async def GenerateChunked(
        self,
        request: pb.GenerateChunkedRequest,
        context: grpc.aio.ServicerContext[pb.GenerateChunkedRequest, pb.GenerateChunkedResponse],
    ) -> AsyncIterator[pb.GenerateChunkedResponse]:
        """See limelight.proto."""
        with self._models.use(request.model, request.version) as serving:
            model = serving.model
            asked = await self._aside.run(lambda: understand(model, request), request.ByteSize())
            ticket = serving.engine.submit(asked.job(self._caller(context)))
            decoded = await self._result(serving, ticket)
            answer = await self._aside.run(lambda: generate_response(model, asked, decoded, ticket), size_of(decoded))
        async for event in in_chunks(answer, asked.wanted, decoded, self._aside):
            yield event

    async def Score(
        self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext[pb.ScoreRequest, pb.ScoreResponse]
    ) -> pb.ScoreResponse:
        """See limelight.proto."""
        with self._models.use(request.model, request.version) as serving:
            model = serving.model
            asked, target = await self._aside.run(lambda: understand_pair(model, request), request.ByteSize())
            ids = [token.id for token in target]
            ticket = serving.engine.submit(asked.job(self._caller(context), target=ids))
            decoded = await self._result(serving, ticket)
            work = partial(score_response, model, asked, request.target, decoded, ticket)
            return await self._aside.run(work, size_of(decoded))

    async def GetModel(
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[pb.GetModelRequest, pb.GetModelResponse]
    ) -> pb.GetModelResponse:
        """See limelight.proto."""
        refuse_unknown_fields(request)
        return describe_model(self._models.find(request.model, request.version).model)

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse],
    ) -> pb.ListModelsResponse:
        """See limelight.proto."""
        refuse_unknown_fields(request)
        return pb.ListModelsResponse(models=[summarise_model(serving.model) for serving in self._models])

    def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        return Caller(client_of(context, self._client_header), deadline_in(context.time_remaining()))

    async def _generate(self, request: pb.GenerateRequest, caller: Caller) -> pb.GenerateResponse:
        with self._models.use(request.model, request.version) as serving:
            model = serving.model
            asked = await self._aside.run(lambda: understand(model, request), request.ByteSize())
            ticket = serving.engine.submit(asked.job(caller))
            decoded = await self._result(serving, ticket)
            return await self._aside.run(lambda: generate_response(model, asked, decoded, ticket), size_of(decoded))

    async def _result(self, serving: Serving, ticket: Ticket) -> Decoded:
        try:
            decoded = await asyncio.wrap_future(ticket.future)
        finally:
            ticket.cancel()  # harmless when done; frees the row when the caller is gone
            job_ended(ticket, serving)
        self._metrics.answered(ticket, decoded)
        return decoded


def client_of(context: grpc.aio.ServicerContext[Any, Any], header: str | None) -> str:
    """Whose call it is: as its token says, or a header, or else the address that it came from, without the port."""
    if (name := caller_name()) is not None:
        return f"token:{name}"
    named = dict(context.invocation_metadata() or ()).get(header) if header else None
    return context.peer().rpartition(":")[0] if named is None else f"{header}:{named!s}"
