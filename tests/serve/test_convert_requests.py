"""What clients ask is checked, and refused in the names of the API."""

import math
from typing import Any

import pytest

from model.config import TokenizerConfig
from model.errors import InvalidRequestError
from model.search import Sampling, SearchOptions
from model.tokenizer import Token, Tokenizer
from model.vocabulary import END
from serve.convert import Asked, attention_wanted, encode_text, refuse_unknown_fields, search_options
from serve.pb.limelight.v1 import limelight_pb2 as pb
from tests.serve.attention import CROSS, DECODER, ENCODER, MODEL, SHAPES, model_with


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TokenizerConfig(), ["abcdefgh é"])


def test_a_search_is_greedy_by_default(tokenizer: Tokenizer) -> None:
    assert search_options(pb.SearchOptions(), 40, tokenizer) == SearchOptions(
        longest=40, beam_size=1, hypotheses=1, length_penalty=1.0
    )


def ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(token.id for token in tokenizer.encode(text)[:-1])


def test_a_search_is_what_was_asked_for(tokenizer: Tokenizer) -> None:
    asked = pb.SearchOptions(
        beam_size=5,
        hypotheses=3,
        length_penalty=0.0,
        longest=7,
        coverage_penalty=0.25,
        shortest=4,
        prefix="ab",
        no_repeat_ngram=2,
        suppressed=["c", "é"],
    )
    assert search_options(asked, 40, tokenizer) == SearchOptions(
        longest=7,
        beam_size=5,
        hypotheses=3,
        length_penalty=0.0,
        coverage_penalty=0.25,
        shortest=4,
        prefix=ids(tokenizer, "ab"),
        no_repeat_ngram=2,
        suppressed=frozenset(ids(tokenizer, "cé")),
    )


DRAWN = {
    "by default": (pb.Sampling(), Sampling()),
    "all given": (
        pb.Sampling(temperature=0.5, top_k=3, top_p=0.75, seed=9),
        Sampling(temperature=0.5, top_k=3, top_p=0.75, seed=9),
    ),
    "one given": (pb.Sampling(top_k=0, seed=2**62), Sampling(seed=2**62)),
}


@pytest.mark.parametrize("what", DRAWN)
def test_tokens_are_drawn_as_asked_for(tokenizer: Tokenizer, what: str) -> None:
    asked, expected = DRAWN[what]
    assert search_options(pb.SearchOptions(sampling=asked), 40, tokenizer).sampling == expected
    assert search_options(pb.SearchOptions(), 40, tokenizer).sampling is None


SEARCHES = {
    "beam_size: 0 is not from 1 to 16": pb.SearchOptions(beam_size=0),
    "beam_size: -3 is not from 1 to 16": pb.SearchOptions(beam_size=-3),
    "beam_size: 17 is not from 1 to 16": pb.SearchOptions(beam_size=17),
    "hypotheses: 0 is not from 1 to 4 (beam_size)": pb.SearchOptions(beam_size=4, hypotheses=0),
    "hypotheses: 2 is not from 1 to 1 (beam_size)": pb.SearchOptions(hypotheses=2),
    "length_penalty: -0.5 is not from 0.0 to 10.0": pb.SearchOptions(length_penalty=-0.5),
    "length_penalty: 11.0 is not from 0.0 to 10.0": pb.SearchOptions(length_penalty=11),
    "length_penalty: nan is not from 0.0 to 10.0": pb.SearchOptions(length_penalty=math.nan),
    "longest: 0 is not at least 1": pb.SearchOptions(longest=0),
    "longest: 41 is over the model's limit of 40 tokens": pb.SearchOptions(longest=41),
    "coverage_penalty: 10.5 is not from 0.0 to 10.0": pb.SearchOptions(coverage_penalty=10.5),
    "shortest: 0 is not from 1 to 40 (longest)": pb.SearchOptions(shortest=0),
    "shortest: 5 is not from 1 to 4 (longest)": pb.SearchOptions(shortest=5, longest=4),
    "no_repeat_ngram: -1 is not at least 0": pb.SearchOptions(no_repeat_ngram=-1),
    "prefix: is empty": pb.SearchOptions(prefix=" "),
    "prefix: 'ß' is not in the target vocabulary": pb.SearchOptions(prefix="aß"),
    "prefix: 2 is not from 0 to 1 tokens (below longest)": pb.SearchOptions(prefix="ab", longest=2),
    "suppressed: 'ß' is not in the target vocabulary": pb.SearchOptions(suppressed=["a", "ß"]),
    "suppressed: '' is not in the target vocabulary": pb.SearchOptions(suppressed=[""]),
    "suppressed: holds the end token: set shortest instead": pb.SearchOptions(suppressed=["</s>"]),
    "sampling.temperature: 0.0 is not from 0.01 to 100.0": pb.SearchOptions(sampling=pb.Sampling(temperature=0)),
    "sampling.top_k: -1 is not at least 0": pb.SearchOptions(sampling=pb.Sampling(top_k=-1)),
    "sampling.top_p: 1.5 is not from 1e-06 to 1.0": pb.SearchOptions(sampling=pb.Sampling(top_p=1.5)),
    "sampling.seed: -1 is not from 0 to 9223372036854775807": pb.SearchOptions(sampling=pb.Sampling(seed=-1)),
    "sampling: draws one answer, beam_size=2 searches: choose one": pb.SearchOptions(
        beam_size=2, sampling=pb.Sampling()
    ),
}


@pytest.mark.parametrize("message", SEARCHES)
def test_a_search_out_of_range_is_refused(tokenizer: Tokenizer, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        search_options(SEARCHES[message], 40, tokenizer)
    assert str(caught.value) == message
    assert caught.value.field == message.partition(":")[0]


def test_a_text_becomes_tokens(tokenizer: Tokenizer) -> None:
    tokens = encode_text("source", "abé", tokenizer, 4)
    assert [(token.text, token.start, token.end) for token in tokens] == [
        ("a", 0, 1),
        ("b", 1, 2),
        ("é", 2, 3),
        ("</s>", 3, 3),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "source: is empty"),
        (" \t\n", "source: is empty"),
        ("abcd", "source: 5 tokens, the end token among them, are over the limit of 4; split the text"),
        ("a" * 257, "source: 257 characters cannot be within the limit of 4 tokens; split the text"),
    ],
)
def test_a_text_that_the_model_cannot_take_is_refused(tokenizer: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        encode_text("source", text, tokenizer, 4)
    assert str(caught.value) == message


def test_a_text_without_tokens_is_refused() -> None:
    class Deaf(Tokenizer):
        def __init__(self) -> None:
            pass

        def encode(self, text: str) -> list[Token]:
            return [Token(END, "</s>", len(text), len(text))]

    with pytest.raises(InvalidRequestError, match=r"^target: holds no tokens$"):
        encode_text("target", "abc", Deaf(), 4)


WANTED: dict[str, dict[str, Any]] = {
    "attention.families: 0 is not a family; known: 1 (encoder), 2 (decoder), 3 (cross)": {"families": [0]},
    "attention.families: 9 is not a family; known: 1 (encoder), 2 (decoder), 3 (cross)": {"families": [CROSS, 9]},
    "attention.families: ['cross', 'cross'] names one twice": {"families": [CROSS, CROSS]},
    "attention.layers: 2 does not exist: encoder attention has layers 0 to 1": {
        "families": [CROSS, ENCODER],
        "layers": [0, 2],
    },
    "attention.layers: -1 does not exist: cross attention has layers 0 to 2": {"families": [CROSS], "layers": [-1]},
    "attention.layers: [1, 0, 1] names one twice": {"families": [CROSS], "layers": [1, 0, 1]},
    "attention.heads: 4 does not exist: decoder attention has heads 0 to 3": {"families": [DECODER], "heads": [4]},
    "attention.heads: [3, 3] names one twice": {"families": [DECODER], "heads": [3, 3]},
    "attention.reduction: 7 is not a reduction; known: 0 to 3": {"families": [CROSS], "reduction": 7},
    "attention.float_type: 5 is not a float type; known: 0 to 2": {"families": [CROSS], "float_type": 5},
}


@pytest.mark.parametrize("message", WANTED)
def test_attention_that_does_not_exist_is_refused(message: str) -> None:
    options = WANTED[message]
    with pytest.raises(InvalidRequestError) as caught:
        attention_wanted(pb.AttentionOptions(**options), MODEL)
    assert str(caught.value) == message


def test_a_family_that_the_model_has_not_is_refused() -> None:
    encoder_only = model_with({"encoder": SHAPES["encoder"]})
    with pytest.raises(InvalidRequestError, match=r"^attention\.families: toy has no cross attention$"):
        attention_wanted(pb.AttentionOptions(families=[CROSS]), encoder_only)


UNKNOWN = b"\xf8\x3f\x01"
"""Field 1023, of no message of ours, as a number."""


@pytest.mark.parametrize("path", ["request", "search", "attention"])
def test_a_field_that_is_not_known_is_refused(path: str) -> None:
    request = pb.GenerateRequest(source="abc", search=pb.SearchOptions(beam_size=2), attention=pb.AttentionOptions())
    refuse_unknown_fields(request)
    part = request if path == "request" else getattr(request, path)
    part.MergeFromString(UNKNOWN)
    with pytest.raises(InvalidRequestError, match=f"^{path}: field number 1023 is not known to this server$"):
        refuse_unknown_fields(pb.GenerateRequest.FromString(request.SerializeToString()))


@pytest.mark.parametrize(
    ("options", "longest"),
    [
        ({}, 1448),
        ({"float_type": pb.FLOAT_TYPE_FLOAT16}, 2048),
        ({"layers": [1], "heads": [0, 3]}, 2896),
        ({"reduction": pb.REDUCTION_MEAN}, 4096),
    ],
    ids=str,
)
def test_encoder_attention_over_the_limit_is_refused_beforehand(options: dict[str, Any], longest: int) -> None:
    wanted = attention_wanted(pb.AttentionOptions(families=[ENCODER], **options), MODEL)
    search, token = SearchOptions(longest=1), Token(4, "a", 0, 1)
    Asked([token] * longest, search, wanted).check_attention()
    with pytest.raises(InvalidRequestError, match=r"^attention: \d+ bytes are over the limit of 67108864"):
        Asked([token] * (longest + 1), search, wanted).check_attention()
