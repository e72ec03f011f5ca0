"""What the client hands back, as plain frozen Python; and its attention as a picture, with the right labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import grpc
import numpy as np
from jaxtyping import Float

from model.errors import InvalidRequestError, LimelightError
from model.picture import AttentionPicture
from model.vocabulary import BEGIN, SPECIAL_TOKENS

FamilyName = Literal["encoder", "decoder", "cross"]
"""A family of attention."""
ReductionName = Literal["none", "mean", "max"]
"""What becomes of the chosen layers and heads: kept apart, or merged into one matrix."""
FloatName = Literal["float32", "float16"]
"""Type of the attention values."""
FinishReason = Literal["stop", "length"]
"""Why a hypothesis ended: its end token, or the longest length."""


class ServerError(LimelightError):
    """The server refused, failed or could not be reached.

    Attributes:
        code: the gRPC status.
        message: what went wrong, in the server's words where it had any.
        reason: the same for programs, such as QUEUE_FULL; empty where the server gave none.
        field: of the request, that is at fault; None where none is.
        retry_after: seconds after which the server advises to try again; None where it does not.
        request_id: what the server's log calls the call; empty where no server has told.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        field: str | None = None,
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason, self.field, self.retry_after, self.request_id = reason, field, retry_after, request_id

    def __str__(self) -> str:
        """The message, with what to look for in the server's log."""
        told = not self.request_id or self.request_id in self.message
        return self.message if told else f"{self.message} (request {self.request_id})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a text.

    Attributes:
        id: its id in the vocabulary.
        text: how the vocabulary writes it.
        start: first character of its span in the text, in Unicode code points.
        end: one past its last character; equal to `start` for begin and end tokens.
        log_probability: of a target token, its natural logarithm given everything before it; None for source tokens.
    """

    id: int
    text: str
    start: int
    end: int
    log_probability: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionArray:
    """One family of attention.

    Attributes:
        family: which.
        layers: layer numbers, from 0, that it holds or was merged from.
        heads: head numbers, from 0, that it holds or was merged from.
        reduction: how layers and heads were merged.
        weights: float32 or float16, read-only, [layer, head, row, column], or [row, column] if merged. Each row sums
            to 1 unless it is a maximum.
    """

    family: FamilyName
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    reduction: ReductionName
    weights: Float[np.ndarray, "*layer_head row column"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Hypothesis:
    """One answer.

    Attributes:
        text: the text.
        tokens: its tokens; the end token is last unless the longest length came first.
        score: total log-probability / length ^ length penalty, and the coverage term where one was asked for: what
            hypotheses are compared by.
        log_probability: total, natural logarithm.
        finish_reason: why it ended.
        attention: "decoder" and "cross", as asked for.
    """

    text: str
    tokens: tuple[Token, ...]
    score: float
    log_probability: float
    finish_reason: FinishReason
    attention: Mapping[FamilyName, AttentionArray]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of a request went in the server's engine, in seconds.

    Attributes:
        queue: until its turn came.
        decode: from there to the last token.
    """

    queue: float
    decode: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """The answers to one text.

    Attributes:
        model: name of the model that answered.
        version: its version.
        source_tokens: the source's tokens, an end token last.
        hypotheses: best first; for a scored pair, the target as if it had been generated.
        attention: "encoder", if asked for.
        timings: where the time went.
    """

    model: str
    version: str
    source_tokens: tuple[Token, ...]
    hypotheses: tuple[Hypothesis, ...]
    attention: Mapping[FamilyName, AttentionArray]
    timings: Timings

    @property
    def best(self) -> Hypothesis:
        """The first hypothesis."""
        return self.hypotheses[0]

    def picture(self, family: FamilyName = "cross", hypothesis: int = 0) -> AttentionPicture:
        """One family of attention with the tokens of its rows and columns, to be drawn.

        Args:
            family: which; it must have been asked for.
            hypothesis: whose, 0 for the best; without effect for the encoder's.

        Raises:
            InvalidRequestError: the answer does not hold this family.
        """
        chosen = self.hypotheses[hypothesis]
        held = {**self.attention, **chosen.attention}
        if family not in held:
            holds = f"holds {', '.join(held)}" if held else "holds none"
            raise InvalidRequestError(
                "attention.families", f"{family} is not in this answer, which {holds}: ask for it"
            )
        source, output = (tuple(token.text for token in side) for side in (self.source_tokens, chosen.tokens))
        read = (SPECIAL_TOKENS[BEGIN], *output[:-1])
        labels = {"encoder": (source, source), "decoder": (output, read), "cross": (output, source)}
        return _picture(held[family], *labels[family])


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """First event of a stream: what is known before the first token. Attributes as in `Answer`."""

    model: str
    version: str
    source_tokens: tuple[Token, ...]
    attention: Mapping[FamilyName, AttentionArray]


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """One token of the best hypothesis.

    Attributes:
        token: the token, with its span in the text so far.
        text: what it adds to the text.
        attention: its row of "decoder" and "cross", as asked for: [layer, head, 1, column] or [1, column].
    """

    token: Token
    text: str
    attention: Mapping[FamilyName, AttentionArray]


@dataclass(frozen=True, kw_only=True, eq=False)
class End:
    """Last event of a stream.

    Attributes:
        answer: the whole answer, as `generate` gives it: the rows of the best hypothesis's attention put together.
    """

    answer: Answer


@dataclass(frozen=True, kw_only=True)
class FamilyShape:
    """How many layers have a family of attention, and how many heads each."""

    layers: int
    heads: int


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Layers and heads, from 0, of the cross-attention that align best."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """A served model, in a list of them.

    Attributes:
        name: its name.
        version: its version.
        task: what its outputs are, "g2p" or "text".
        precision: of its weights, "fp32", "int8" or "fp16".
        provider: what runs it, "cpu" or "cuda".
    """

    name: str
    version: str
    task: str
    precision: str
    provider: str


@dataclass(frozen=True, kw_only=True)
class ModelInfo(ModelSummary):
    """What a served model is, and takes.

    Attributes:
        architecture: for people.
        longest_source: most source tokens, the end token among them.
        longest_target: most target tokens, the end token among them.
        attention: the families that it returns.
        alignment: which cross-attention aligns best; None where that was not measured.
        quality: of its checkpoint on its own validation data, by metric; all but the loss in percent.
        shortlist: candidates of each sentence in a search with a shortlist; None where it has none.
    """

    architecture: str
    longest_source: int
    longest_target: int
    attention: Mapping[FamilyName, FamilyShape]
    alignment: Alignment | None
    quality: Mapping[str, float]
    shortlist: int | None


def _picture(array: AttentionArray, rows: tuple[str, ...], columns: tuple[str, ...]) -> AttentionPicture:
    if array.reduction == "none":
        layers, heads, weights = array.layers, array.heads, array.weights
    else:
        # What was merged from a single layer or head still has its number.
        layers, heads = (side if len(side) == 1 else () for side in (array.layers, array.heads))
        weights = array.weights[None, None]
    return AttentionPicture(
        family=array.family, layers=layers, heads=heads, rows=rows, columns=columns, weights=weights
    )
