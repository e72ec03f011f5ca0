"""One stream of tokens: from the engine's thread, which must not wait, to the event loop, where it is written."""

from __future__ import annotations  # grpc's and asyncio's classes are generic to mypy alone

import asyncio
from collections.abc import AsyncIterator, Sequence

from model.hypotheses import Node
from model.tokenizer import SpanStream, Token
from serve.aside import Aside, size_of
from serve.bundle import ServedModel
from serve.convert import (
    Asked,
    check_size,
    encoder_attention,
    hypothesis_message,
    target_attention,
    timings_message,
    token_message,
)
from serve.errors import EngineError
from serve.jobs import Decoded, Ticket
from serve.pb.limelight.v1 import limelight_pb2 as pb


class TokenStream:
    """Collects what the engine has settled, and makes the stream's events of it.

    Args:
        model: what is served.
        asked: the request.
        version: which model answers.
        aside: runs what takes long.
    """

    def __init__(self, model: ServedModel, asked: Asked, version: pb.ModelVersion, aside: Aside) -> None:
        self._model, self._asked, self._version, self._aside = model, asked, version, aside
        self._loop = asyncio.get_running_loop()
        self._spans = SpanStream(model.target)
        self._told: list[int] = []
        # At most one item a token waits here, so the longest target bounds it.
        self._queue: asyncio.Queue[Decoded | Node] = asyncio.Queue()

    def on_settled(self, begun: Decoded, nodes: Sequence[Node]) -> None:
        """Called by the engine after each step: pass on what is new, without working on it.

        Raises:
            EngineError: tried anew, the search answers otherwise than was already told.
        """
        told = len(self._told)
        if any(node.token != before for node, before in zip(nodes, self._told, strict=False)):
            raise EngineError(f"a second try differs within the {told} tokens that were told already")
        new: list[Decoded | Node] = [*nodes[told:]]
        if not told and new:
            new.insert(0, begun)
        self._told += [node.token for node in nodes[told:]]
        for item in new:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def events(self, ticket: Ticket) -> AsyncIterator[pb.GenerateStreamResponse]:
        """The stream, in order: a start, the tokens, an end; raises what the engine raised."""
        future = asyncio.wrap_future(ticket.future)
        future.add_done_callback(_looked_at)
        while not (future.done() and self._queue.empty()):
            getter = asyncio.ensure_future(self._queue.get())
            try:
                await asyncio.wait((getter, future), return_when=asyncio.FIRST_COMPLETED)
                if getter.done():
                    yield await self._event(getter.result())
            finally:
                getter.cancel()
        decoded = future.result()
        yield await self._aside.run(lambda: self._end(decoded, ticket), size_of(decoded))

    async def _event(self, item: Decoded | Node) -> pb.GenerateStreamResponse:
        if isinstance(item, Node):
            return self._token(item)
        return await self._aside.run(lambda: self._start(item), len(self._asked.source) + size_of(item))

    def _start(self, begun: Decoded) -> pb.GenerateStreamResponse:
        attention = encoder_attention(self._asked.wanted, begun.encoder_attention)
        tokens = map(token_message, self._asked.source)
        return pb.GenerateStreamResponse(
            start=pb.StreamStart(model=self._version, source_tokens=tokens, attention=attention)
        )

    def _token(self, node: Node) -> pb.GenerateStreamResponse:
        before = len(self._spans.text)
        token = Token(node.token, self._model.target.token_text(node.token), *self._spans.add(node.token))
        cross, decoder = (
            None if weights is None else weights[:, :, None]
            for weights in (node.cross_attention, node.decoder_attention)
        )
        return pb.GenerateStreamResponse(
            token=pb.StreamToken(
                token=token_message(token, node.log_probability),
                text=self._spans.text[before:],
                attention=target_attention(self._asked.wanted, cross, decoder),
            )
        )

    def _end(self, decoded: Decoded, ticket: Ticket) -> pb.GenerateStreamResponse:
        best, *others = decoded.hypotheses
        messages = [hypothesis_message(best, self._model.target, None)]
        messages += [hypothesis_message(other, self._model.target, self._asked.wanted) for other in others]
        check_size(one for message in messages for one in message.attention)
        return pb.GenerateStreamResponse(end=pb.StreamEnd(hypotheses=messages, timings=timings_message(ticket)))


def _looked_at(future: asyncio.Future[Decoded]) -> None:
    """Look at what came of it, though nobody may be left who waits for it: asyncio would complain."""
    if not future.cancelled():
        future.exception()
