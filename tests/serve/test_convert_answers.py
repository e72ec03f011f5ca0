"""What clients get is what they asked for: layers, heads and families in that order, tokens with their spans."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from model.config import TokenizerConfig
from model.errors import InvalidRequestError
from model.search import Hypothesis
from model.tokenizer import Tokenizer
from model.vocabulary import END
from serve.convert import (
    LARGEST_ANSWER,
    attention_message,
    attention_wanted,
    check_size,
    hypothesis_message,
    target_attention,
)
from serve.pb.limelight.v1 import limelight_pb2 as pb
from tests.serve.attention import CROSS, DECODER, ENCODER, MODEL
from tests.serve.running import array

WEIGHTS = np.random.default_rng(0).dirichlet(np.ones(6), (3, 4, 5)).astype(np.float32)
"""Attention of 3 layers and 4 heads, 5 rows and 6 columns."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TokenizerConfig(), ["abcdefgh é"])


def test_no_attention_by_default() -> None:
    wanted = attention_wanted(pb.AttentionOptions(), MODEL)
    assert wanted.families == ()
    assert target_attention(wanted, WEIGHTS, WEIGHTS) == []


def test_all_layers_and_heads_by_default() -> None:
    wanted = attention_wanted(pb.AttentionOptions(families=[CROSS, ENCODER]), MODEL)
    assert wanted.families == ("cross", "encoder")
    assert wanted.layers == {"cross": (0, 1, 2), "encoder": (0, 1)}
    assert wanted.heads == {"cross": (0, 1, 2, 3), "encoder": (0, 1, 2, 3)}
    assert (wanted.reduction, wanted.half) == (pb.REDUCTION_NONE, False)


STORED = {pb.FLOAT_TYPE_FLOAT32: ("<f4", 1e-6), pb.FLOAT_TYPE_FLOAT16: ("<f2", 1e-3)}
"""How each type is laid out, and its largest relative error: of a sum's order, and of rounding."""

CHOICES: list[tuple[Sequence[int], Sequence[int]]] = [
    ((), ()),
    ((2,), ()),
    ((), (1,)),
    ((0, 2), (3, 1)),
    ((2, 0, 1), (3, 2, 1, 0)),
    ((1, 0), (0, 1, 2, 3)),
]


@pytest.mark.parametrize(("layers", "heads"), CHOICES, ids=str)
@pytest.mark.parametrize("reduction", [pb.REDUCTION_NONE, pb.REDUCTION_MEAN, pb.REDUCTION_MAX])
@pytest.mark.parametrize("float_type", [pb.FLOAT_TYPE_FLOAT32, pb.FLOAT_TYPE_FLOAT16])
def test_attention_is_sent_as_asked_for(
    layers: Sequence[int],
    heads: Sequence[int],
    reduction: pb.Reduction.ValueType,
    float_type: pb.FloatType.ValueType,
) -> None:
    options = pb.AttentionOptions(
        families=[CROSS], layers=layers, heads=heads, reduction=reduction, float_type=float_type
    )
    sent = attention_message(attention_wanted(options, MODEL), "cross", WEIGHTS)
    rows, columns = list(layers or range(3)), list(heads or range(4))
    assert (sent.family, sent.reduction, sent.float_type) == (CROSS, reduction, float_type)
    assert (list(sent.layers), list(sent.heads)) == (rows, columns)
    chosen = WEIGHTS[rows][:, columns]
    if reduction == pb.REDUCTION_MEAN:
        chosen = chosen.mean((0, 1))
    elif reduction == pb.REDUCTION_MAX:
        chosen = chosen.max((0, 1))
    dtype, tolerance = STORED[float_type]
    assert array(sent).dtype == dtype
    np.testing.assert_allclose(array(sent), chosen, rtol=tolerance)


def test_families_are_sent_in_the_order_asked_for() -> None:
    wanted = attention_wanted(pb.AttentionOptions(families=[CROSS, ENCODER, DECODER]), MODEL)
    sent = target_attention(wanted, WEIGHTS, WEIGHTS[..., :5])
    assert [(one.family, list(one.shape)) for one in sent] == [(CROSS, [3, 4, 5, 6]), (DECODER, [3, 4, 5, 5])]


def hypothesis(tokens: list[int], reason: Any = "stop") -> Hypothesis:
    return Hypothesis(tokens, [-0.5] * len(tokens), -0.5, reason, WEIGHTS[:, :, :2], WEIGHTS[:, :, :2, :2])


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_hypothesis_is_sent_with_its_spans(tokenizer: Tokenizer, reason: str) -> None:
    ids = [token.id for token in tokenizer.encode("ba")]
    sent = hypothesis_message(hypothesis(ids, reason), tokenizer, None)
    assert (sent.text, sent.score, sent.log_probability) == ("ba", -0.5, -1.5)
    spans = [(token.id, token.text, token.start, token.end, token.log_probability) for token in sent.tokens]
    assert spans == [(ids[0], "b", 0, 1, -0.5), (ids[1], "a", 1, 2, -0.5), (END, "</s>", 2, 2, -0.5)]
    assert sent.finish_reason == pb.FinishReason.Value(f"FINISH_REASON_{reason.upper()}")
    assert not sent.attention


def test_a_given_text_keeps_its_own_spans(tokenizer: Tokenizer) -> None:
    text = "ae\u0301"  # an e and its accent: one token of two characters
    ids = [token.id for token in tokenizer.encode(text)]
    sent = hypothesis_message(hypothesis(ids), tokenizer, None, text)
    assert sent.text == text
    assert [(token.start, token.end) for token in sent.tokens] == [(0, 1), (1, 3), (3, 3)]


def test_an_answer_over_the_limit_is_refused() -> None:
    half = pb.Attention(values=bytes(LARGEST_ANSWER // 2))
    check_size([half, half])
    with pytest.raises(InvalidRequestError) as caught:
        check_size([half, half, pb.Attention(values=b"1")])
    assert str(caught.value) == (
        "attention: 67108865 bytes are over the limit of 67108864 for one message; choose fewer families, layers or "
        "heads, reduce them, ask for float16, or use GenerateChunked, which sends attention of any size"
    )
