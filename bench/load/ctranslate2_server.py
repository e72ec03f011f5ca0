"""CTranslate2 behind the thinnest possible grpc.aio server: peer (a).

    python -m bench.load.ctranslate2_server MODEL FOLDER --threads=1 ...

Run in the environment that has ctranslate2. `limelight.v1.Generate` alone, and of its answer only text and score: what
it leaves out (spans, checks, attention, health) is time that it saves. While a batch is computed on a thread of its
own, arrivals wait in a queue; the next batch is what fits of it.
"""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
import signal
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ctranslate2
import grpc

from bench.load.options import Peer, Precision, ServingOptions, read_peer, write_port
from model.tokenizer import Tokenizer
from serve.pb.limelight.v1 import limelight_pb2 as pb


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    text: str
    score: float


@dataclass(frozen=True)
class Waiting:
    """A request in the queue: its source, how to search, and who waits."""

    tokens: list[str]
    beam: int
    longest: int
    answer: asyncio.Future[Answer]


class Decoder:
    """Texts to texts.

    Args:
        folder: of the model, its tokenizers beside it.
        options: how it serves.
    """

    def __init__(self, folder: Path, options: ServingOptions) -> None:
        self._source = Tokenizer.load(folder / "tokenizer.source.json")
        self._target = Tokenizer.load(folder / "tokenizer.target.json")
        self._names = [self._source.token_text(index) for index in range(len(self._source))]
        self._ids = {self._target.token_text(index): index for index in range(len(self._target))}
        self._translator = ctranslate2.Translator(
            str(folder),
            device="cpu",
            compute_type="float32" if options.precision is Precision.FP32 else "int8",
            inter_threads=1,
            intra_threads=options.threads,
        )

    def tokens(self, text: str) -> list[str]:
        """The source's tokens, an end token last."""
        return [self._names[index] for index in self._source.encode_ids([text])[0]]

    def decode(self, batch: list[Waiting]) -> list[Answer]:
        """Answer a batch of one beam size and length."""
        found = self._translator.translate_batch(
            [waiting.tokens for waiting in batch],
            beam_size=batch[0].beam,
            max_decoding_length=batch[0].longest,
            min_decoding_length=0,
            length_penalty=1,
            return_scores=True,
        )
        return [Answer(self._text(result.hypotheses[0]), result.scores[0]) for result in found]

    def _text(self, tokens: list[str]) -> str:
        return self._target.decode([self._ids[token] for token in tokens])


SERVICE = pb.DESCRIPTOR.services_by_name["LimelightService"].full_name


class Service:
    """Queues requests and decodes them in batches."""

    def __init__(self, decoder: Decoder, options: ServingOptions) -> None:
        self._decoder, self._options = decoder, options
        self._queue: deque[Waiting] = deque()
        self._arrived = asyncio.Event()
        self._pool = ThreadPoolExecutor(1)

    async def generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> pb.GenerateResponse:
        """See limelight.proto."""
        if len(self._queue) >= self._options.queue:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        search = request.search
        waiting = Waiting(
            self._decoder.tokens(request.source),
            search.beam_size or self._options.beam,
            search.longest or self._options.longest,
            asyncio.get_running_loop().create_future(),
        )
        self._queue.append(waiting)
        self._arrived.set()
        answer = await waiting.answer
        return pb.GenerateResponse(hypotheses=[pb.Hypothesis(text=answer.text, score=answer.score)])

    async def work(self) -> None:
        """Decode whatever waits, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._take():
                try:
                    answers = await loop.run_in_executor(self._pool, self._decoder.decode, batch)
                except RuntimeError as error:  # CTranslate2's own errors
                    self._fail(batch, error)
                else:
                    self._answer(batch, answers)

    def _take(self) -> list[Waiting]:
        """The next batch, in order of arrival, without those whose callers have gone."""
        batch: list[Waiting] = []
        longest = 0
        while self._queue:
            first = self._queue[0]
            if first.answer.done():
                self._queue.popleft()
                continue
            longest = max(longest, len(first.tokens))
            alike = not batch or (first.beam, first.longest) == (batch[0].beam, batch[0].longest)
            if batch and not (alike and self._options.fits(len(batch) + 1, longest)):
                break
            batch.append(self._queue.popleft())
        return batch

    @staticmethod
    def _answer(batch: list[Waiting], answers: list[Answer]) -> None:
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)

    @staticmethod
    def _fail(batch: list[Waiting], error: RuntimeError) -> None:
        for waiting in batch:
            if not waiting.answer.done():
                waiting.answer.set_exception(error)


async def serve(peer: Peer) -> None:
    """Serve until SIGTERM."""
    service = Service(Decoder(peer.model, peer.options), peer.options)
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        service.generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Generate": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    working = asyncio.create_task(service.work())
    write_port(peer.port_file, port)
    await stop.wait()
    working.cancel()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(serve(read_peer()))
