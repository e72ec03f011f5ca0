"""Between protobuf and the engine: check what a client asks, and put answers on the wire. No gRPC, no ONNX Runtime."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from export.manifest import FamilyShape, Manifest
from model.errors import InvalidRequestError
from model.search import Hypothesis, Sampling, SearchOptions
from model.steps import Family
from model.tokenizer import Token, Tokenizer
from model.vocabulary import UNKNOWN
from serve.jobs import Caller, Job, Settled, Ticket
from serve.pb.limelight.v1 import limelight_pb2 as pb

FAMILIES: "dict[pb.AttentionFamily.ValueType, Family]" = {
    pb.ATTENTION_FAMILY_ENCODER: "encoder",
    pb.ATTENTION_FAMILY_DECODER: "decoder",
    pb.ATTENTION_FAMILY_CROSS: "cross",
}
"""The families of attention, as the API numbers them."""

FAMILY_NUMBERS = {name: number for number, name in FAMILIES.items()}

CHARACTERS_PER_TOKEN = 64
"""A text with more characters than this for each token of the limit is refused before it is tokenised."""

LARGEST_ANSWER = 64 * 1024 * 1024
"""Most bytes of attention in one answer: larger messages stall every other call on the connection."""


@dataclass(frozen=True)
class AttentionWanted:
    """What a client asked to see.

    Attributes:
        families: in the order asked for.
        layers: chosen layers of each family.
        heads: chosen heads of each family.
        reduction: the API's number.
        half: float16 instead of float32.
        apart: values are sent apart from the answer, in chunks.
    """

    families: tuple[Family, ...]
    layers: dict[Family, tuple[int, ...]]
    heads: dict[Family, tuple[int, ...]]
    reduction: "pb.Reduction.ValueType"
    half: bool
    apart: bool = False

    def size(self, family: Family, matrix: int) -> int:
        """Bytes of a family whose matrices of one head have so many weights."""
        count = len(self.layers[family]) * len(self.heads[family]) if self.reduction == pb.REDUCTION_NONE else 1
        return count * matrix * (2 if self.half else 4)


@dataclass(frozen=True)
class Asked:
    """A request, understood and checked."""

    source: list[Token]
    options: SearchOptions
    wanted: AttentionWanted
    shortlist: bool = False
    size: int = 0
    """Bytes of the request."""

    def job(self, caller: Caller, target: list[int] | None = None, on_settled: Settled | None = None) -> Job:
        """For the engine.

        Args:
            caller: who asks.
            target: ids to score instead of searching.
            on_settled: told of tokens as they become certain.
        """
        return Job(
            source=[token.id for token in self.source],
            options=self.options,
            shortlist=self.shortlist,
            target=target,
            attention=frozenset(self.wanted.families),
            deadline=caller.deadline,
            client=caller.client,
            size=self.size,
            on_settled=on_settled,
        )

    def check_attention(self, rows: int = 0) -> None:
        """Refuse, before anything is computed, attention that would not fit an answer.

        Args:
            rows: tokens of the target; 0 where they are not known yet, and only the encoder's attention is.

        Raises:
            InvalidRequestError: with the size, the limit and the way out.
        """
        columns = len(self.source)
        matrices: dict[Family, int] = {"encoder": columns**2, "decoder": rows**2, "cross": rows * columns}
        if not self.wanted.apart:
            refuse_large(sum(self.wanted.size(family, matrices[family]) for family in self.wanted.families))


def refuse_unknown_fields(message: Message, path: str = "") -> None:
    """Refuse fields that this server does not know, at any depth.

    Raises:
        InvalidRequestError: an option would otherwise silently have no effect.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        raise InvalidRequestError(path or "request", f"field number {number} is not known to this server")
    for descriptor, value in message.ListFields():
        if isinstance(value, Message):
            refuse_unknown_fields(value, f"{path}.{descriptor.name}".lstrip("."))


def encode_text(field: str, text: str, tokenizer: Tokenizer, longest: int) -> list[Token]:
    """Tokens of a text, an end token last.

    Raises:
        InvalidRequestError: the text is empty, or has more tokens than the model takes.
    """
    if not text.strip():
        raise InvalidRequestError(field, "is empty")
    if len(text) > longest * CHARACTERS_PER_TOKEN:
        raise InvalidRequestError(
            field, f"{len(text)} characters cannot be within the limit of {longest} tokens; split the text"
        )
    tokens = tokenizer.encode(text)
    if len(tokens) == 1:
        raise InvalidRequestError(field, "holds no tokens")
    if len(tokens) > longest:
        raise InvalidRequestError(
            field, f"{len(tokens)} tokens, the end token among them, are over the limit of {longest}; split the text"
        )
    return tokens


def search_options(message: pb.SearchOptions, longest: int, target: Tokenizer) -> SearchOptions:
    """The options of a search, defaults filled in.

    Args:
        message: as asked.
        longest: most tokens that the model generates.
        target: tokenizer of the answers.

    Raises:
        InvalidRequestError: a value is out of its range, or a token is not in the vocabulary.
    """
    asked = message.longest if message.HasField("longest") else longest
    if asked > longest:
        raise InvalidRequestError("longest", f"{asked} is over the model's limit of {longest} tokens")
    return SearchOptions(
        longest=asked,
        prefix=_prefix(message.prefix, longest, target),
        suppressed=frozenset(_token_id("suppressed", token, target) for token in message.suppressed),
        sampling=Sampling(**_given(message.sampling, SAMPLING)) if message.HasField("sampling") else None,
        **_given(message, SEARCH),
    )


SEARCH = ("beam_size", "hypotheses", "length_penalty", "coverage_penalty", "shortest", "no_repeat_ngram")
"""Fields of the API's SearchOptions that are numbers, named as ours."""

SAMPLING = ("temperature", "top_k", "top_p", "seed")
"""Fields of the API's Sampling, named as ours."""


def _given(message: Message, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _prefix(text: str, longest: int, target: Tokenizer) -> tuple[int, ...]:
    if not text:
        return ()
    tokens = encode_text("prefix", text, target, longest)[:-1]
    for token in tokens:
        if token.id == UNKNOWN:
            raise InvalidRequestError("prefix", f"{text[token.start : token.end]!r} is not in the target vocabulary")
    return tuple(token.id for token in tokens)


def _token_id(field: str, token: str, target: Tokenizer) -> int:
    index = target.token_id(token)
    if index is None:
        raise InvalidRequestError(field, f"{token!r} is not in the target vocabulary")
    return index


def attention_wanted(message: pb.AttentionOptions, manifest: Manifest, *, apart: bool = False) -> AttentionWanted:
    """Which attention is asked for, checked against what the model has.

    Args:
        message: as asked.
        manifest: of the model.
        apart: as in `AttentionWanted`.

    Raises:
        InvalidRequestError: a family, layer, head, reduction or type that does not exist, or one asked for twice.
    """
    if not message.families and (message.layers or message.heads):
        raise InvalidRequestError("attention.families", "layers or heads are chosen, but no family of attention")
    families = []
    for number in message.families:
        if number not in FAMILIES:
            raise InvalidRequestError("attention.families", f"{number} is not a family; known: {_known()}")
        families.append(FAMILIES[number])
    _no_duplicates("attention.families", families)
    if message.reduction not in pb.Reduction.values():
        raise InvalidRequestError("attention.reduction", f"{message.reduction} is not a reduction; known: 0 to 3")
    if message.float_type not in pb.FloatType.values():
        raise InvalidRequestError("attention.float_type", f"{message.float_type} is not a float type; known: 0 to 2")
    shapes = {family: manifest.attention[family] for family in families if family in manifest.attention}
    missing = [family for family in families if family not in shapes]
    if missing:
        raise InvalidRequestError("attention.families", f"{manifest.name} has no {missing[0]} attention")
    return AttentionWanted(
        tuple(families),
        {family: _chosen("layers", message.layers, shape, family) for family, shape in shapes.items()},
        {family: _chosen("heads", message.heads, shape, family) for family, shape in shapes.items()},
        message.reduction or pb.REDUCTION_NONE,
        message.float_type == pb.FLOAT_TYPE_FLOAT16,
        apart,
    )


def _known() -> str:
    return ", ".join(f"{number} ({name})" for number, name in FAMILIES.items())


def _no_duplicates(field: str, values: Sequence[Any]) -> None:
    if len(set(values)) < len(values):
        raise InvalidRequestError(field, f"{list(values)} names one twice")


def _chosen(name: str, asked: Sequence[int], shape: FamilyShape, family: Family) -> tuple[int, ...]:
    count = getattr(shape, name)
    _no_duplicates(f"attention.{name}", asked)
    for number in asked:
        if not 0 <= number < count:
            raise InvalidRequestError(
                f"attention.{name}", f"{number} does not exist: {family} attention has {name} 0 to {count - 1}"
            )
    return tuple(asked) or tuple(range(count))


def attention_message(wanted: AttentionWanted, family: Family, weights: Any) -> pb.Attention:
    """One family on the wire, without its values if these are sent apart.

    Args:
        wanted: what was asked for.
        family: which family.
        weights: [layer, head, row, column], all of them.
    """
    layers, heads = wanted.layers[family], wanted.heads[family]
    kept_apart = (len(layers), len(heads)) if wanted.reduction == pb.REDUCTION_NONE else ()
    return pb.Attention(
        family=FAMILY_NUMBERS[family],
        layers=layers,
        heads=heads,
        reduction=wanted.reduction,
        shape=(*kept_apart, *weights.shape[2:]),
        float_type=pb.FLOAT_TYPE_FLOAT16 if wanted.half else pb.FLOAT_TYPE_FLOAT32,
        values=b"" if wanted.apart else attention_values(wanted, family, weights).tobytes(),
    )


def attention_values(wanted: AttentionWanted, family: Family, weights: Any) -> Any:
    """The chosen layers and heads of a family, reduced, as they are laid out on the wire.

    Args:
        wanted: what was asked for.
        family: which family.
        weights: [layer, head, row, column], all of them.
    """
    layers, heads = wanted.layers[family], wanted.heads[family]
    everything = (layers, heads) == (tuple(range(weights.shape[0])), tuple(range(weights.shape[1])))
    chosen = weights if everything else weights[np.ix_(layers, heads)]
    if wanted.reduction == pb.REDUCTION_MEAN:
        chosen = chosen.mean((0, 1))
    elif wanted.reduction == pb.REDUCTION_MAX:
        chosen = chosen.max((0, 1))
    return np.ascontiguousarray(chosen, "<f2" if wanted.half else "<f4")


def encoder_attention(wanted: AttentionWanted, weights: Any) -> list[pb.Attention]:
    """Encoder attention, if it was asked for."""
    return [attention_message(wanted, "encoder", weights)] if "encoder" in wanted.families else []


def target_attention(wanted: AttentionWanted, cross: Any, decoder: Any) -> list[pb.Attention]:
    """Cross- and decoder attention, in the order asked for."""
    weights = {"cross": cross, "decoder": decoder}
    return [attention_message(wanted, family, weights[family]) for family in wanted.families if family in weights]


def token_message(token: Token, log_probability: float | None = None) -> pb.Token:
    """A token on the wire."""
    return pb.Token(id=token.id, text=token.text, start=token.start, end=token.end, log_probability=log_probability)


def timings_message(ticket: Ticket) -> pb.Timings:
    """Where a job's time went."""
    timings = ticket.timings
    return pb.Timings(queue_seconds=timings.queue, decode_seconds=timings.decode)


def hypothesis_message(
    hypothesis: Hypothesis, tokenizer: Tokenizer, wanted: AttentionWanted | None, text: str | None = None
) -> pb.Hypothesis:
    """A hypothesis on the wire.

    Args:
        hypothesis: from the engine.
        tokenizer: of the target.
        wanted: which attention to send; None for none.
        text: the text it stands for, where it was given rather than generated.
    """
    if text is None:
        text, tokens = target_tokens(hypothesis.tokens, tokenizer)
    else:
        tokens = tokenizer.encode(text)
    return pb.Hypothesis(
        text=text,
        tokens=map(token_message, tokens, hypothesis.log_probabilities),
        score=hypothesis.score,
        log_probability=hypothesis.log_probability,
        finish_reason=pb.FINISH_REASON_STOP if hypothesis.finish_reason == "stop" else pb.FINISH_REASON_LENGTH,
        attention=(
            [] if wanted is None else target_attention(wanted, hypothesis.cross_attention, hypothesis.decoder_attention)
        ),
    )


def target_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[Token]]:
    """The text of generated ids, and each token with its span in it."""
    text, spans = tokenizer.spans(ids)
    return text, [Token(index, tokenizer.token_text(index), *span) for index, span in zip(ids, spans, strict=True)]


def check_size(attention: Iterable[pb.Attention]) -> None:
    """Refuse an answer that is too large for one message.

    Raises:
        InvalidRequestError: with the size, the limit and the way out.
    """
    refuse_large(sum(len(one.values) for one in attention))


def refuse_large(size: int) -> None:
    """Refuse so many bytes of attention.

    Raises:
        InvalidRequestError: with the size, the limit and the way out.
    """
    if size > LARGEST_ANSWER:
        raise InvalidRequestError(
            "attention",
            f"{size} bytes are over the limit of {LARGEST_ANSWER} for one message; choose fewer families, layers or "
            "heads, reduce them, ask for float16, or use GenerateChunked, which sends attention of any size",
        )
