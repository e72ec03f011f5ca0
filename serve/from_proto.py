"""Protobuf to plain Python, for the client; and the names of the API's enums, for both directions."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

import grpc
import numpy as np

from serve.answers import (
    Alignment,
    Answer,
    AttentionArray,
    End,
    FamilyName,
    FamilyShape,
    FinishReason,
    FloatName,
    Hypothesis,
    ModelInfo,
    ModelSummary,
    Piece,
    ReductionName,
    ServerError,
    Start,
    Timings,
    Token,
)
from serve.pb.limelight.v1 import limelight_pb2 as pb

Name = TypeVar("Name", bound=str)

FAMILIES: "Mapping[FamilyName, pb.AttentionFamily.ValueType]" = {
    "encoder": pb.ATTENTION_FAMILY_ENCODER,
    "decoder": pb.ATTENTION_FAMILY_DECODER,
    "cross": pb.ATTENTION_FAMILY_CROSS,
}
REDUCTIONS: "Mapping[ReductionName, pb.Reduction.ValueType]" = {
    "none": pb.REDUCTION_NONE,
    "mean": pb.REDUCTION_MEAN,
    "max": pb.REDUCTION_MAX,
}
FLOAT_TYPES: "Mapping[FloatName, pb.FloatType.ValueType]" = {
    "float32": pb.FLOAT_TYPE_FLOAT32,
    "float16": pb.FLOAT_TYPE_FLOAT16,
}
FINISH_REASONS: "Mapping[FinishReason, pb.FinishReason.ValueType]" = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}


Apart = Mapping[tuple[int | None, int], bytearray]
"""Values that came apart from their families, by hypothesis (None for encoder attention) and family."""

NONE_APART: Apart = MappingProxyType({})


def read_answer(message: pb.GenerateResponse, apart: Apart = NONE_APART) -> Answer:
    """The answer to a text.

    Args:
        message: the answer.
        apart: values that are not in it.

    Raises:
        ServerError: the message contradicts itself, or holds what this client does not know.
    """
    if not message.hypotheses:
        raise _unreadable("an answer without hypotheses")
    return Answer(
        model=message.model.name,
        version=message.model.version,
        source_tokens=_tokens(message.source_tokens),
        hypotheses=tuple(_hypothesis(one, apart, index) for index, one in enumerate(message.hypotheses)),
        attention=_attention(message.attention, apart),
        timings=_timings(message.timings),
    )


def read_chunked(messages: Iterable[pb.GenerateChunkedResponse]) -> Answer:
    """The answer to a text, put together from its chunks.

    Raises:
        ServerError: as `read_answer`, or something is missing, or comes where it does not belong.
    """
    answer: pb.GenerateResponse | None = None
    apart: dict[tuple[int | None, int], bytearray] = {}
    whole: Answer | None = None
    for message in messages:  # to the status behind the end, as `read_stream`
        event = message.WhichOneof("event")
        if whole is not None:
            raise _unreadable(f"the event {event} after the end of an answer in chunks")
        if event == "answer" and answer is None:
            answer = message.answer
            apart = _places(answer)
        elif event == "chunk":
            _put(apart, message.chunk)
        elif event == "end" and answer is not None:
            size = sum(map(len, apart.values()))
            if size != message.end.size:
                raise _unreadable(f"{size} bytes in chunks, and says that it sent {message.end.size}")
            whole = read_answer(answer, apart)
        else:
            raise _unreadable(f"the event {event} where it does not belong in an answer in chunks")
    if whole is None:
        raise _unreadable("an answer in chunks without its end")
    return whole


def _places(answer: pb.GenerateResponse) -> dict[tuple[int | None, int], bytearray]:
    """Where values are put: nothing is there yet."""
    places: dict[tuple[int | None, int], bytearray] = {(None, one.family): bytearray() for one in answer.attention}
    for index, hypothesis in enumerate(answer.hypotheses):
        places |= {(index, one.family): bytearray() for one in hypothesis.attention}
    return places


def _put(apart: Apart, chunk: pb.AttentionChunk) -> None:
    place = apart.get((chunk.hypothesis if chunk.HasField("hypothesis") else None, chunk.family))
    if place is None:
        raise _unreadable("a chunk of attention that the answer does not name")
    if chunk.offset != len(place):
        raise _unreadable(f"a chunk at {chunk.offset} where {len(place)} bytes had come")
    place += chunk.values


def read_item(message: pb.GenerateManyResponse) -> Answer | ServerError:
    """What became of one of many.

    Raises:
        ServerError: as `read_answer`, or the message says neither of both.
    """
    match message.WhichOneof("result"):
        case "answer":
            return read_answer(message.answer)
        case "error":
            error = message.error
            codes = {code.value[0]: code for code in grpc.StatusCode}
            return ServerError(
                codes.get(error.code, grpc.StatusCode.UNKNOWN),
                error.message,
                reason=error.reason,
                field=error.field or None,
                retry_after=error.retry_after_seconds or None,
            )
        case _:
            raise _unreadable(f"neither answer nor error for {message.id!r}")


def read_score(message: pb.ScoreResponse) -> Answer:
    """A scored pair, as an answer of one hypothesis.

    Raises:
        ServerError: as `read_answer`.
    """
    return Answer(
        model=message.model.name,
        version=message.model.version,
        source_tokens=_tokens(message.source_tokens),
        hypotheses=(_hypothesis(message.hypothesis),),
        attention=_attention(message.attention),
        timings=_timings(message.timings),
    )


def read_stream(messages: Iterable[pb.GenerateStreamResponse]) -> Iterator[Start | Piece | End]:
    """The events of a stream, each as soon as its message is there.

    Raises:
        ServerError: as `read_answer`, or the stream lacks its start or its end.
    """
    start: Start | None = None
    pieces: list[Piece] = []
    ended = False
    for message in messages:  # to the status behind the end: a call that is left before it counts as cancelled
        event = message.WhichOneof("event")
        if ended:
            raise _unreadable(f"a stream with the event {event} after its end")
        if event == "start":
            start = _start(message.start)
            yield start
        elif event == "token":
            pieces.append(_piece(message.token))
            yield pieces[-1]
        elif event == "end" and start and message.end.hypotheses:
            ended = True
            yield _end(start, pieces, message.end)
        else:
            raise _unreadable(f"a stream with the event {event} after {len(pieces)} tokens")
    if not ended:
        raise _unreadable(f"a stream that stopped after {len(pieces)} tokens, without its end")


def read_model(message: pb.GetModelResponse) -> ModelInfo:
    """A model's description.

    Raises:
        ServerError: as `read_answer`.
    """
    best = message.alignment
    return ModelInfo(
        name=message.model.name,
        version=message.model.version,
        task=message.task,
        architecture=message.architecture,
        longest_source=message.longest_source,
        longest_target=message.longest_target,
        attention={
            _name(FAMILIES, shape.family): FamilyShape(layers=shape.layers, heads=shape.heads)
            for shape in message.attention
        },
        alignment=(
            Alignment(layers=tuple(best.layers), heads=tuple(best.heads)) if message.HasField("alignment") else None
        ),
        precision=message.precision,
        provider=message.provider,
        quality=dict(message.quality),
        shortlist=message.shortlist or None,
    )


def read_models(message: pb.ListModelsResponse) -> list[ModelSummary]:
    """The models that are served."""
    return [
        ModelSummary(
            name=one.model.name,
            version=one.model.version,
            task=one.task,
            precision=one.precision,
            provider=one.provider,
        )
        for one in message.models
    ]


def _timings(message: pb.Timings) -> Timings:
    return Timings(queue=message.queue_seconds, decode=message.decode_seconds)


def _start(message: pb.StreamStart) -> Start:
    return Start(
        model=message.model.name,
        version=message.model.version,
        source_tokens=_tokens(message.source_tokens),
        attention=_attention(message.attention),
    )


def _piece(message: pb.StreamToken) -> Piece:
    return Piece(token=_token(message.token), text=message.text, attention=_attention(message.attention))


def _end(start: Start, pieces: Sequence[Piece], message: pb.StreamEnd) -> End:
    best, *others = map(_hypothesis, message.hypotheses)
    if len(pieces) != len(best.tokens):
        raise _unreadable(f"a stream of {len(pieces)} tokens for an answer of {len(best.tokens)}")
    answer = Answer(
        model=start.model,
        version=start.version,
        source_tokens=start.source_tokens,
        hypotheses=(replace(best, attention=_stack(pieces)), *others),
        attention=start.attention,
        timings=_timings(message.timings),
    )
    return End(answer=answer)


def _stack(pieces: Sequence[Piece]) -> dict[FamilyName, AttentionArray]:
    """The rows of a stream as one array for each family."""
    families = pieces[0].attention if pieces else {}
    return {family: _joined([piece.attention[family] for piece in pieces]) for family in families}


def _joined(rows: Sequence[AttentionArray]) -> AttentionArray:
    # The decoder's rows may end at what had been read by then; what came later is exactly zero.
    width = max(row.weights.shape[-1] for row in rows)
    shape = (*rows[0].weights.shape[:-2], len(rows), width)
    weights = np.zeros(shape, rows[0].weights.dtype)
    for index, row in enumerate(rows):
        weights[..., index, : row.weights.shape[-1]] = row.weights[..., 0, :]
    weights.flags.writeable = False
    return replace(rows[0], weights=weights)


def _hypothesis(message: pb.Hypothesis, apart: Apart = NONE_APART, index: int = 0) -> Hypothesis:
    return Hypothesis(
        text=message.text,
        tokens=_tokens(message.tokens),
        score=message.score,
        log_probability=message.log_probability,
        finish_reason=_name(FINISH_REASONS, message.finish_reason),
        attention=_attention(message.attention, apart, index),
    )


def _tokens(messages: Iterable[pb.Token]) -> tuple[Token, ...]:
    return tuple(map(_token, messages))


def _token(message: pb.Token) -> Token:
    log_probability = message.log_probability if message.HasField("log_probability") else None
    return Token(
        id=message.id, text=message.text, start=message.start, end=message.end, log_probability=log_probability
    )


def _attention(
    messages: Iterable[pb.Attention], apart: Apart = NONE_APART, hypothesis: int | None = None
) -> dict[FamilyName, AttentionArray]:
    arrays = (_array(message, apart.get((hypothesis, message.family), message.values)) for message in messages)
    return {array.family: array for array in arrays}


def _array(message: pb.Attention, held: bytes | bytearray) -> AttentionArray:
    # Not set means kept apart, and float32.
    reduction = _name(REDUCTIONS, message.reduction or pb.REDUCTION_NONE)
    values = np.dtype(_name(FLOAT_TYPES, message.float_type or pb.FLOAT_TYPE_FLOAT32)).newbyteorder("<")
    shape = tuple(message.shape)
    if len(shape) != (4 if reduction == "none" else 2) or len(held) != math.prod(shape) * values.itemsize:
        raise _unreadable(f"attention of shape {shape}, reduction {reduction}, in {len(held)} bytes")
    weights = np.frombuffer(held, values).reshape(shape).astype(values.newbyteorder("="), copy=False)
    weights.flags.writeable = False
    return AttentionArray(
        family=_name(FAMILIES, message.family),
        layers=tuple(message.layers),
        heads=tuple(message.heads),
        reduction=reduction,
        weights=weights,
    )


def _name(names: Mapping[Name, int], number: int) -> Name:
    for name, value in names.items():
        if value == number:
            return name
    raise _unreadable(f"the value {number} where {', '.join(names)} are known")


def _unreadable(what: str) -> ServerError:
    return ServerError(grpc.StatusCode.INTERNAL, f"the server sent {what}: client and server may differ in version")
