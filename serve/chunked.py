"""An answer with attention of any size: all but the values of it, then these in chunks, then what they amounted to."""

from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from model.steps import Family
from serve.aside import Aside
from serve.convert import FAMILY_NUMBERS, AttentionWanted, attention_values
from serve.jobs import Decoded
from serve.pb.limelight.v1 import limelight_pb2 as pb

CHUNK = 256 * 1024
"""Most bytes of values in a chunk: what is held for a client that does not read, beside the answer itself."""


class Weights(NamedTuple):
    """One family of attention."""

    family: Family
    hypothesis: int | None
    """Index of the hypothesis that it belongs to; None for the encoder's."""
    weights: Any
    """[layer, head, row, column], all of them."""


async def in_chunks(
    answer: pb.GenerateResponse, wanted: AttentionWanted, decoded: Decoded, aside: Aside
) -> AsyncIterator[pb.GenerateChunkedResponse]:
    """The events, each made when it is asked for: only one family at a time is laid out for the wire.

    Args:
        answer: without values.
        wanted: which attention was asked for.
        decoded: what it was made of.
        aside: runs what takes long.
    """
    yield pb.GenerateChunkedResponse(answer=answer)
    end = pb.ChunkedEnd()
    for one in _attention(wanted, decoded):
        values = await aside.run(partial(_laid_out, wanted, one), one.weights.nbytes // 256)
        for offset in range(0, len(values), CHUNK):
            chunk = pb.AttentionChunk(
                family=FAMILY_NUMBERS[one.family],
                hypothesis=one.hypothesis,
                offset=offset,
                values=values[offset : offset + CHUNK].tobytes(),
            )
            end.chunks += 1
            end.size += len(chunk.values)
            yield pb.GenerateChunkedResponse(chunk=chunk)
    yield pb.GenerateChunkedResponse(end=end)


def _laid_out(wanted: AttentionWanted, one: Weights) -> Any:
    """The bytes."""
    return attention_values(wanted, one.family, one.weights).reshape(-1).view(np.uint8)


def _attention(wanted: AttentionWanted, decoded: Decoded) -> Iterator[Weights]:
    """In the order in which the answer names them."""
    if "encoder" in wanted.families:
        yield Weights("encoder", None, decoded.encoder_attention)
    for index, hypothesis in enumerate(decoded.hypotheses):
        weights = {"cross": hypothesis.cross_attention, "decoder": hypothesis.decoder_attention}
        for family in wanted.families:
            if family in weights:
                yield Weights(family, index, weights[family])
