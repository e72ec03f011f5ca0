"""What is wrong with the answers that a call has given."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message

from bench.fuzz.calls import Call, Verdict
from bench.fuzz.judge import INVALID, LONGEST_ID, OK, Codes, has_unknown_fields
from bench.fuzz.subject import REFLECTION
from serve.pb.inference import grpc_service_pb2 as open_pb
from serve.pb.limelight.v1 import limelight_pb2 as pb

OWN = re.compile(
    r"Traceback|site-packages|\.py\b|\.pyx\b|onnxruntime|Non-zero status|RUNTIME_EXCEPTION|<class|object at 0x|Errno"
)
"""Of a file, an exception or the runtime: not for clients. No request has any of it."""

TOLERANCE = {pb.FLOAT_TYPE_FLOAT32: 1e-4, pb.FLOAT_TYPE_FLOAT16: 1e-2}
"""Of the sum of a row of attention, by the type of its values."""

CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def told(text: str, secrets: Iterable[str] = ()) -> list[str]:
    """What a client is told and should not be.

    Args:
        text: a status message.
        secrets: folders that it must not name.
    """
    found = OWN.search(text)
    told = [found[0]] if found else []
    return [f"tells {one!r}" for one in (*told, *(secret for secret in secrets if secret in text))]


def wrong_answers(call: Call, answers: Sequence[bytes], verdict: Verdict, secrets: Iterable[str] = ()) -> list[str]:
    """What is wrong with the answers of a call that has ended well.

    Args:
        call: that was made.
        answers: that it gave.
        verdict: how each of its messages may end.
        secrets: as for `told`.
    """
    method = call.method
    if method is None:
        return ["there is no such call, and it is answered"]
    try:
        messages = [method.response.FromString(answer) for answer in answers]
    except DecodeError:
        return ["an answer is no message"]
    if method.service != REFLECTION and any(map(has_unknown_fields, messages)):  # it gives back what it was asked
        return ["an answer has fields that its type has not"]
    if not method.streams_out and len(messages) != 1:
        return [f"{len(messages)} answers to one request"]
    if method.streams_in and verdict.items:
        return [*_of_items(call, messages, verdict.items, secrets)]
    check = CHECKS.get(method.response.DESCRIPTOR.full_name)
    return [] if check is None else [*check(method.request.FromString(call.messages[0]), messages)]


def _of_items(call: Call, messages: Sequence[Message], items: Sequence[Codes], secrets: Iterable[str]) -> Iterator[str]:
    method = call.method
    if method is None or method.name not in ("GenerateMany", "ModelStreamInfer"):
        return
    requests: list[Any] = [method.request.FromString(message) for message in call.messages]
    if len(messages) != len(requests):
        yield f"{len(messages)} answers to {len(requests)} requests"
        return
    together = _by_id(requests, messages) if method.name == "GenerateMany" else zip(requests, messages, strict=True)
    allowed = {id(request): codes for request, codes in zip(requests, items, strict=True)}
    for request, message in together:
        yield from _of_item(request, message, allowed[id(request)], secrets)
    answered: list[Any] = [*messages]
    if method.name == "GenerateMany" and Counter(one.id[:LONGEST_ID] for one in requests) != Counter(
        one.id for one in answered
    ):
        yield "ids of answers are not those of the requests"


def _by_id(requests: Sequence[Any], messages: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Each request with its answer, of those whose id is theirs alone."""
    often = Counter(one.id[:LONGEST_ID] for one in requests)
    known = {one.id[:LONGEST_ID]: one for one in requests if often[one.id[:LONGEST_ID]] == 1}
    return ((known[message.id], message) for message in messages if message.id in known)


def _of_item(request: Any, message: Any, codes: Codes, secrets: Iterable[str]) -> Iterator[str]:
    if isinstance(message, pb.GenerateManyResponse):
        code, text = CODES.get(message.error.code, "?"), message.error.message
        if message.WhichOneof("result") is None:
            yield "an item has neither an answer nor an error"
        inner, answer = request.request, message.answer
    else:  # the protocol has no place for a code: that there is an error, is all that can be compared
        text = message.error_message
        code = OK if not text else next(iter(sorted(codes - {OK})), INVALID)
        if message.infer_response.id != request.id:
            yield f"the answer to {request.id!r} has the id {message.infer_response.id!r}"
        inner, answer = request, message.infer_response
    if code not in codes:
        yield f"an item ends with {code} ({text[:200]}), not {' or '.join(sorted(codes))}"
    yield from told(text, secrets)
    if code == OK:
        yield from CHECKS[answer.DESCRIPTOR.full_name](inner, [answer])


def _generated(request: Any, messages: Sequence[Any]) -> Iterator[str]:
    (message,) = messages
    yield from _hypotheses(request, message.hypotheses)
    yield from _attention([*message.attention, *(one for each in message.hypotheses for one in each.attention)])


def _hypotheses(request: Any, hypotheses: Sequence[pb.Hypothesis]) -> Iterator[str]:
    search = request.search
    if not 1 <= len(hypotheses) <= max(1, search.hypotheses):
        yield f"{len(hypotheses)} hypotheses where {search.hypotheses} are asked for"
    for one in hypotheses:
        if search.longest and len(one.tokens) > search.longest:
            yield f"{len(one.tokens)} tokens where {search.longest} are the most"
        if len(one.tokens) < search.shortest:
            yield f"{len(one.tokens)} tokens where {search.shortest} are the fewest"
        if not search.prefix and any(token.text in search.suppressed for token in one.tokens):
            yield "a token that was suppressed"
        if not (math.isfinite(one.score) and one.log_probability <= 0):
            yield f"a score of {one.score}, a log-probability of {one.log_probability}"


def _attention(families: Iterable[pb.Attention]) -> Iterator[str]:
    for one in families:
        half = one.float_type == pb.FLOAT_TYPE_FLOAT16
        if len(one.values) != math.prod(one.shape) * (2 if half else 4):
            yield f"{len(one.values)} bytes of attention of the shape {list(one.shape)}"
            continue
        weights = np.frombuffer(one.values, "<f2" if half else "<f4").reshape(one.shape).astype(np.float64)
        if one.reduction == pb.REDUCTION_MAX:
            continue
        if weights.size and not np.allclose(weights.sum(-1), 1.0, atol=TOLERANCE[one.float_type]):
            yield f"a row of attention sums to {weights.sum(-1).ravel()[np.abs(weights.sum(-1) - 1).argmax()]}"


def _streamed(request: Any, messages: Sequence[Any]) -> Iterator[str]:
    kinds = [message.WhichOneof("event") for message in messages]
    if kinds != ["start", *["token"] * (len(kinds) - 2), "end"]:
        yield f"the events are {kinds}"
        return
    first, *tokens, last = messages
    yield from _attention([*first.start.attention, *(one for each in tokens for one in each.token.attention)])
    yield from _hypotheses(request, last.end.hypotheses)
    best = [token.text for token in last.end.hypotheses[0].tokens]
    if [token.token.token.text for token in tokens] != best:
        yield f"{len(tokens)} tokens are streamed of the answer's {len(best)}, or others"


def _chunked(request: Any, messages: Sequence[Any]) -> Iterator[str]:
    kinds = [message.WhichOneof("event") for message in messages]
    if kinds != ["answer", *["chunk"] * (len(kinds) - 2), "end"]:
        yield f"the events are {kinds}"
        return
    answer, end = messages[0].answer, messages[-1].end
    families = [*answer.attention, *(one for each in answer.hypotheses for one in each.attention)]
    size = sum(math.prod(one.shape) * (2 if one.float_type == pb.FLOAT_TYPE_FLOAT16 else 4) for one in families)
    sent = sum(len(message.chunk.values) for message in messages[1:-1])
    if not size == sent == end.size or end.chunks != len(messages) - 2:
        yield f"{size} bytes of attention, {sent} in chunks, {end.size} told of"
    yield from _hypotheses(request, answer.hypotheses)


def _scored(request: pb.ScoreRequest, messages: Sequence[Any]) -> Iterator[str]:
    (message,) = messages
    yield from _attention([*message.attention, *message.hypothesis.attention])
    if message.hypothesis.text != request.target:
        yield f"the target {request.target!r} is told as {message.hypothesis.text!r}"


SIZES = {"FP32": 4, "INT64": 8}


def _inferred(request: open_pb.ModelInferRequest, messages: Sequence[Any]) -> Iterator[str]:
    (message,) = messages
    asked = [output.name for output in request.outputs] or ["TEXT", "SCORE"]
    if [output.name for output in message.outputs] != asked or len(message.raw_output_contents) != len(asked):
        yield f"the outputs are {[output.name for output in message.outputs]}, not {asked}"
        return
    if message.id != request.id:
        yield f"the answer to {request.id!r} has the id {message.id!r}"
    texts = request.inputs[0].shape[0]
    for output, raw in zip(message.outputs, message.raw_output_contents, strict=True):
        size = SIZES.get(output.datatype)
        if output.shape[0] != texts:
            yield f"{output.name} has the shape {list(output.shape)} for {texts} texts"
        elif size is not None and len(raw) != size * math.prod(output.shape):
            yield f"{output.name} of the shape {list(output.shape)} has {len(raw)} bytes"


Check = Callable[[Any, Sequence[Any]], Iterator[str]]

CHECKS: Mapping[str, Check] = {
    pb.GenerateResponse.DESCRIPTOR.full_name: _generated,
    pb.GenerateStreamResponse.DESCRIPTOR.full_name: _streamed,
    pb.GenerateChunkedResponse.DESCRIPTOR.full_name: _chunked,
    pb.ScoreResponse.DESCRIPTOR.full_name: _scored,
    open_pb.ModelInferResponse.DESCRIPTOR.full_name: _inferred,
}
"""By the full name of an answer, what is looked at; of the others, that they are messages of their type."""
