"""The `limelight.v1` service: convert, call the engine, convert back. It knows no ONNX Runtime."""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import grpc

from model.metrics import LOWER_IS_BETTER
from model.search import SearchOptions
from model.tokenizer import Token
from serve.bundle import ServedModel
from serve.convert import (
    FAMILY_NUMBERS,
    Asked,
    attention_wanted,
    check_size,
    encode_text,
    encoder_attention,
    hypothesis_message,
    refuse_unknown_fields,
    search_options,
    timings_message,
    token_message,
)
from serve.engine import Engine
from serve.errors import ModelNotFoundError
from serve.jobs import Caller, Decoded, Ticket, deadline_in
from serve.many import answer_many
from serve.metrics import Metrics
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1 import limelight_pb2_grpc as rpc
from serve.stream import TokenStream

Result = TypeVar("Result")


class LimelightService(rpc.LimelightServiceServicer):
    """Answers from one model.

    Args:
        model: what is served.
        engine: what decodes for it.
        stopping: set when the server takes nothing new any more.
        metrics: told of answers.
        client_header: metadata key that names the client; without it, it is the address that a call came from.
    """

    def __init__(
        self,
        model: ServedModel,
        engine: Engine,
        stopping: asyncio.Event,
        metrics: Metrics,
        client_header: str | None = None,
    ) -> None:
        self._model, self._engine, self._stopping, self._metrics = model, engine, stopping, metrics
        self._client_header = client_header
        self._version = pb.ModelVersion(name=model.manifest.name, version=model.manifest.version)
        # Tokenising and packing take time in proportion to the text: not on the event loop.
        self._pool = ThreadPoolExecutor(2, "limelight-convert")

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
        asked = await self._off_loop(lambda: self._understand(request))
        stream = TokenStream(self._model, asked, self._version, self._off_loop)
        ticket = self._engine.submit(asked.job(self._caller(context), on_settled=stream.on_settled))
        try:
            async for event in stream.events(ticket):
                if event.HasField("token"):
                    before, first = self._metrics.token(before, first=first), False
                yield event
            self._metrics.answered(ticket, ticket.future.result())
        finally:
            ticket.cancel()

    async def Score(
        self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext[pb.ScoreRequest, pb.ScoreResponse]
    ) -> pb.ScoreResponse:
        """See limelight.proto."""
        asked, target = await self._off_loop(lambda: self._understand_pair(request))
        ids = [token.id for token in target]
        ticket = self._engine.submit(asked.job(self._caller(context), target=ids))
        decoded = await self._result(ticket)
        return await self._off_loop(lambda: self._scored(asked, request.target, decoded, ticket))

    async def GetModel(
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[pb.GetModelRequest, pb.GetModelResponse]
    ) -> pb.GetModelResponse:
        """See limelight.proto."""
        refuse_unknown_fields(request)
        self._check_name(request.model)
        return describe_model(self._model)

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse],
    ) -> pb.ListModelsResponse:
        """See limelight.proto."""
        refuse_unknown_fields(request)
        described = describe_model(self._model)
        summary = pb.ModelSummary(
            model=described.model, task=described.task, precision=described.precision, provider=described.provider
        )
        return pb.ListModelsResponse(models=[summary])

    def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        return Caller(client_of(context, self._client_header), deadline_in(context.time_remaining()))

    async def _generate(self, request: pb.GenerateRequest, caller: Caller) -> pb.GenerateResponse:
        asked = await self._off_loop(lambda: self._understand(request))
        ticket = self._engine.submit(asked.job(caller))
        decoded = await self._result(ticket)
        return await self._off_loop(lambda: self._answer(asked, decoded, ticket))

    async def _result(self, ticket: Ticket) -> Decoded:
        try:
            decoded = await asyncio.wrap_future(ticket.future)
        finally:
            ticket.cancel()  # harmless when done; frees the row when the caller is gone
        self._metrics.answered(ticket, decoded)
        return decoded

    async def _off_loop(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _check_name(self, name: str) -> None:
        if name not in ("", self._model.manifest.name):
            raise ModelNotFoundError(f"model {name!r} is not served here; {self._model.manifest.name!r} is")

    def _understand(self, request: pb.GenerateRequest | pb.GenerateStreamRequest) -> Asked:
        options = search_options(request.search, self._model.manifest.limits.longest_target, self._model.target)
        return replace(self._asked(request, options), shortlist=request.search.shortlist)

    def _understand_pair(self, request: pb.ScoreRequest) -> tuple[Asked, list[Token]]:
        longest = self._model.manifest.limits.longest_target
        penalty = request.length_penalty if request.HasField("length_penalty") else 1.0
        asked = self._asked(request, SearchOptions(longest=longest, length_penalty=penalty))
        return asked, encode_text("target", request.target, self._model.target, longest)

    def _asked(
        self, request: pb.GenerateRequest | pb.GenerateStreamRequest | pb.ScoreRequest, options: SearchOptions
    ) -> Asked:
        refuse_unknown_fields(request)
        self._check_name(request.model)
        manifest = self._model.manifest
        source = encode_text("source", request.source, self._model.source, manifest.limits.longest_source)
        asked = Asked(source, options, attention_wanted(request.attention, manifest), size=request.ByteSize())
        asked.check_encoder_attention()
        return asked

    def _answer(self, asked: Asked, decoded: Decoded, ticket: Ticket) -> pb.GenerateResponse:
        hypotheses = [
            hypothesis_message(hypothesis, self._model.target, asked.wanted) for hypothesis in decoded.hypotheses
        ]
        attention = encoder_attention(asked.wanted, decoded.encoder_attention)
        check_size([*attention, *(one for hypothesis in hypotheses for one in hypothesis.attention)])
        return pb.GenerateResponse(
            model=self._version,
            source_tokens=map(token_message, asked.source),
            attention=attention,
            hypotheses=hypotheses,
            timings=timings_message(ticket),
        )

    def _scored(self, asked: Asked, target: str, decoded: Decoded, ticket: Ticket) -> pb.ScoreResponse:
        hypothesis = hypothesis_message(decoded.hypotheses[0], self._model.target, asked.wanted, target)
        attention = encoder_attention(asked.wanted, decoded.encoder_attention)
        check_size([*attention, *hypothesis.attention])
        return pb.ScoreResponse(
            model=self._version,
            source_tokens=map(token_message, asked.source),
            attention=attention,
            hypothesis=hypothesis,
            timings=timings_message(ticket),
        )


def client_of(context: grpc.aio.ServicerContext[Any, Any], header: str | None) -> str:
    """Whose call it is: as a header of it says, or else the address that it came from, without the port."""
    named = dict(context.invocation_metadata() or ()).get(header) if header else None
    return context.peer().rpartition(":")[0] if named is None else f"{header}:{named!s}"


def describe_model(model: ServedModel) -> pb.GetModelResponse:
    """What the served model is, on the wire."""
    manifest = model.manifest
    shortlist = manifest.graphs[model.precision].shortlist
    families = [
        pb.FamilyShape(family=FAMILY_NUMBERS[family], layers=shape.layers, heads=shape.heads)
        for family, shape in manifest.attention.items()
    ]
    return pb.GetModelResponse(
        model=pb.ModelVersion(name=manifest.name, version=manifest.version),
        task=manifest.task,
        architecture=manifest.architecture,
        longest_source=manifest.limits.longest_source,
        longest_target=manifest.limits.longest_target,
        attention=families,
        alignment=pb.Alignment(**manifest.alignment) if manifest.alignment else None,
        precision=model.precision,
        provider=model.provider,
        quality={name: value for name, value in manifest.provenance.training.items() if name in LOWER_IS_BETTER},
        shortlist=0 if shortlist is None else shortlist.size,
    )
