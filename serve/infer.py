"""A batch of the Open Inference Protocol as jobs of the engine, and what these decoded as tensors. No gRPC."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.errors import InvalidRequestError
from model.hypotheses import Hypothesis
from model.options import SearchOptions
from model.steps import Family
from model.tokenizer import Token
from serve.bundle import ServedModel
from serve.convert import (
    LARGEST_ANSWER,
    Asked,
    AttentionWanted,
    attention_message,
    attention_wanted,
    encode_text,
    search_options,
    target_tokens,
)
from serve.jobs import Caller, Decoded, Job, deadline_in
from serve.parameters import Parameters, read_parameters
from serve.pb.inference import grpc_service_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2 import REDUCTION_NONE
from serve.tensors import OUTPUTS, SOURCE, pack, padded, read_outputs, read_texts

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    """A request, understood and checked.

    Attributes:
        model: that it is for.
        sources: tokens of each text, an end token last.
        outputs: names of those asked for, in that order.
        parameters: what else it says.
        options: how to search.
        wanted: the attention among its outputs.
    """

    model: ServedModel
    sources: Sequence[Sequence[Token]]
    outputs: tuple[str, ...]
    parameters: Parameters
    options: SearchOptions
    wanted: AttentionWanted

    def jobs(self, caller: Caller, size: int) -> list[Job]:
        """For the engine, one for each text.

        Args:
            caller: who asks.
            size: bytes of the request.
        """
        waits = deadline_in(self.parameters.seconds)
        deadline = min((one for one in (caller.deadline, waits) if one is not None), default=None)
        share = size // max(1, len(self.sources))
        return [
            Asked(list(source), self.options, self.wanted, self.parameters.search.shortlist, share).job(
                caller._replace(deadline=deadline)
            )
            for source in self.sources
        ]

    def matrices(self, family: Family) -> tuple[int, ...]:
        """Layers and heads that are sent of a family; none where they are reduced to one matrix."""
        if self.wanted.reduction != REDUCTION_NONE:
            return ()
        return len(self.wanted.layers[family]), len(self.wanted.heads[family])


def understand_batch(model: ServedModel, request: pb.ModelInferRequest) -> Batch:
    """What a request asks of a model.

    Raises:
        InvalidRequestError: naming the tensor, text or parameter at fault; or its attention might not fit an answer.
    """
    manifest = model.manifest
    texts, outputs = read_texts(request, manifest.name), read_outputs(request, manifest)
    families = [family for name in outputs if (family := OUTPUTS[name].family) is not None]
    parameters = read_parameters(request.parameters, families)
    longest = manifest.limits.longest_source
    sources = [_encoded(index, text, model, longest) for index, text in enumerate(texts)]
    try:
        options = search_options(parameters.search, manifest.limits.longest_target, model.target)
        wanted = attention_wanted(parameters.attention, manifest)
    except InvalidRequestError as error:
        raise _moved(error, f"parameters.{error.field.rpartition('.')[2]}") from None
    batch = Batch(model, sources, outputs, parameters, options, wanted)
    _refuse_large(batch)
    return batch


def _encoded(index: int, text: str, model: ServedModel, longest: int) -> list[Token]:
    try:
        return encode_text("source", text, model.source, longest)
    except InvalidRequestError as error:
        raise _moved(error, f"inputs.{SOURCE}[{index}]") from None


def _moved(error: InvalidRequestError, field: str) -> InvalidRequestError:
    """The same mistake, where this protocol has the field."""
    return InvalidRequestError(field, str(error).removeprefix(f"{error.field}: "))


def _refuse_large(batch: Batch) -> None:
    """Refuse attention that might not fit an answer, before anything is computed for it."""
    source, target = max(map(len, batch.sources), default=0), batch.options.longest
    sizes = {"encoder": source**2, "cross": target * source, "decoder": target**2}
    size = 0
    for family in batch.wanted.families:
        answers = 1 if family == "encoder" else batch.options.hypotheses
        size += 4 * len(batch.sources) * answers * math.prod(batch.matrices(family)) * sizes[family]
    if size > LARGEST_ANSWER:
        raise InvalidRequestError(
            "outputs",
            f"their attention can come to {size} bytes, over the limit of {LARGEST_ANSWER} for one answer; ask for "
            "fewer texts, hypotheses, families, layers or heads, reduce them, or set longest",
        )


@dataclass(frozen=True)
class Answers:
    """What the engine gave back for a batch.

    Attributes:
        batch: as asked.
        decoded: of each text.
    """

    batch: Batch
    decoded: Sequence[Decoded]

    def each(self, value: Callable[[Hypothesis], Any]) -> list[list[Any]]:
        """A value of each text's hypotheses, best first."""
        return [[value(one) for one in decoded.hypotheses] for decoded in self.decoded]

    def weights(self, family: Family, all_weights: Array | None) -> Array:
        """The layers and heads that were asked for, reduced as asked: [layer, head, row, column] or [row, column]."""
        message = attention_message(self.batch.wanted, family, all_weights)
        return np.frombuffer(message.values, "<f4").reshape(message.shape)

    def tensor(self, name: str) -> Array:
        """An output: its batch first."""
        return TENSORS[name](self)

    def by_hypothesis(self, values: Sequence[Sequence[Any]], datatype: str, filling: Any) -> Array:
        """One value of each hypothesis: [text, hypothesis]."""
        dtype = object if datatype == "BYTES" else None
        parts = [np.array(row, dtype) for row in values]
        return padded(parts, (self.batch.options.hypotheses,), datatype, filling)

    def of_hypotheses(
        self, values: Sequence[Sequence[Array]], least: tuple[int, ...], datatype: str, filling: Any
    ) -> Array:
        """An array of each hypothesis: [text, hypothesis, *least or more]."""
        count = self.batch.options.hypotheses
        missing = np.zeros(least, object if datatype == "BYTES" else np.float32)
        parts = [part for row in values for part in (*row, *[missing] * (count - len(row)))]
        together = padded(parts, least, datatype, filling)
        return together.reshape(len(values), count, *together.shape[1:])


def _text(answers: Answers) -> Array:
    target = answers.batch.model.target
    texts = answers.each(lambda one: target_tokens(one.tokens, target)[0].encode())
    return answers.by_hypothesis(texts, "BYTES", b"")


def _score(answers: Answers) -> Array:
    return answers.by_hypothesis(answers.each(lambda one: one.score), "FP32", -math.inf)


def _log_probability(answers: Answers) -> Array:
    return answers.by_hypothesis(answers.each(lambda one: one.log_probability), "FP32", -math.inf)


def _finish_reason(answers: Answers) -> Array:
    return answers.by_hypothesis(answers.each(lambda one: one.finish_reason.encode()), "BYTES", b"")


def _target_length(answers: Answers) -> Array:
    return answers.by_hypothesis(answers.each(lambda one: len(one.tokens)), "INT64", 0)


def _tokens(answers: Answers) -> Array:
    target = answers.batch.model.target
    return answers.of_hypotheses(
        answers.each(lambda one: np.array([target.token_text(index).encode() for index in one.tokens], object)),
        (0,),
        "BYTES",
        b"",
    )


def _source_tokens(answers: Answers) -> Array:
    parts = [np.array([token.text.encode() for token in source], object) for source in answers.batch.sources]
    return padded(parts, (0,), "BYTES", b"")


def _source_length(answers: Answers) -> Array:
    return padded([np.array([len(source)]) for source in answers.batch.sources], (1,), "INT64", 0)


def _cross_attention(answers: Answers) -> Array:
    values = answers.each(lambda one: answers.weights("cross", one.cross_attention))
    return answers.of_hypotheses(values, (*answers.batch.matrices("cross"), 0, 0), "FP32", 0.0)


def _decoder_attention(answers: Answers) -> Array:
    values = answers.each(lambda one: answers.weights("decoder", one.decoder_attention))
    return answers.of_hypotheses(values, (*answers.batch.matrices("decoder"), 0, 0), "FP32", 0.0)


def _encoder_attention(answers: Answers) -> Array:
    parts = [answers.weights("encoder", decoded.encoder_attention) for decoded in answers.decoded]
    return padded(parts, (*answers.batch.matrices("encoder"), 0, 0), "FP32", 0.0)


TENSORS: Mapping[str, Callable[[Answers], Array]] = {
    "TEXT": _text,
    "SCORE": _score,
    "LOG_PROBABILITY": _log_probability,
    "FINISH_REASON": _finish_reason,
    "TOKENS": _tokens,
    "TARGET_LENGTH": _target_length,
    "SOURCE_TOKENS": _source_tokens,
    "SOURCE_LENGTH": _source_length,
    "CROSS_ATTENTION": _cross_attention,
    "DECODER_ATTENTION": _decoder_attention,
    "ENCODER_ATTENTION": _encoder_attention,
}
"""How each output of `OUTPUTS` comes about."""


def infer_response(request_id: str, answers: Answers) -> pb.ModelInferResponse:
    """The answer to a request."""
    manifest = answers.batch.model.manifest
    response = pb.ModelInferResponse(model_name=manifest.name, model_version=manifest.version, id=request_id)
    for name in answers.batch.outputs:
        tensor = answers.tensor(name)
        response.outputs.add(name=name, datatype=OUTPUTS[name].datatype, shape=tensor.shape)
        response.raw_output_contents.append(pack(tensor))
    return response


def mark_final(response: pb.ModelInferResponse) -> None:
    """Say of an answer in a stream that it is the last to its request: here each is the only one."""
    response.parameters["triton_final_response"].bool_param = True
