from typing import Any

import pytest

from model.tokenizer import SpanStream, Tokenizer
from model.vocabulary import BEGIN
from tests.model.texts import EDGES, KINDS, TEXTS, trained


def covered(tokenizer: Tokenizer, text: str) -> list[str]:
    """What of the text each token stands for, the end token left out."""
    return [text[token.start : token.end] for token in tokenizer.encode(text)[:-1]]


@pytest.mark.parametrize("normalization", ["none", "nfc", "nfd", "nfkc", "nfkd"])
@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_spans_are_in_order_and_leave_out_white_space_alone(kind: str, lowercase: bool, normalization: str) -> None:
    tokenizer = trained(kind, lowercase=lowercase, normalization=normalization)
    for text in EDGES:
        spans = [(token.start, token.end) for token in tokenizer.encode(text)]
        starts = [start for start, _ in spans]
        missed = set(range(len(text))) - {place for span in spans for place in range(*span)}
        assert (starts, [end for _, end in spans]) == (sorted(starts), sorted(end for _, end in spans)), text
        assert all(text[place].isspace() for place in missed), (text, spans)


@pytest.mark.parametrize(
    ("kind", "choices", "text", "expected"),
    [
        ("characters", {}, "ab", ["a", "b"]),
        ("characters", {}, "👩\u200d💻", ["👩", "\u200d", "💻"]),
        ("characters", {}, "שלום", list("שלום")),
        ("characters", {}, "e\u0301o", ["e\u0301", "o"]),
        ("characters", {}, "oe\u0301", ["o", "e\u0301"]),
        ("characters", {"normalization": "none"}, "e\u0301o", ["e", "\u0301", "o"]),
        ("characters", {"normalization": "nfd"}, "éo", ["é", "é", "o"]),
        ("characters", {}, "\u1112\u1161\u11ab국", ["\u1112\u1161\u11ab", "국"]),
        ("characters", {"normalization": "nfkc"}, "ﬁx²", ["ﬁ", "ﬁ", "x", "²"]),
        ("characters", {"lowercase": True}, "İa", ["İ", "İ", "a"]),
        ("symbols", {}, " K  AE1\tT ", ["K", "AE1", "T"]),
        ("symbols", {}, "cafe\u0301 on", ["cafe\u0301", "on"]),
        ("symbols", {}, "👩\u200d💻 שלום", ["👩\u200d💻", "שלום"]),
        ("bpe", {}, "the cat", ["the", "cat"]),
        ("bpe", {}, "  cat", [" ", "cat"]),
        ("bpe", {"lowercase": True}, "THE CAT", ["THE", "CAT"]),
        ("bpe", {}, "cafe\u0301 the", ["cafe\u0301", "the"]),
    ],
)
def test_spans_point_into_the_text_as_given(kind: str, choices: dict[str, Any], text: str, expected: list[str]) -> None:
    texts = [text, *TEXTS * 3, "café", "the cat"]
    assert covered(trained(kind, texts, **choices), text) == expected


def test_the_mark_before_the_first_word_stands_for_no_character() -> None:
    tokenizer = trained("unigram", ["ab a b"] * 3, vocabulary_size=8)
    first, second, *_ = tokenizer.encode("ba")
    assert [(first.text, first.start, first.end), (second.text, second.start, second.end)] == [
        ("▁", 0, 0),
        ("b", 0, 1),
    ]
    assert covered(tokenizer, " b")[0] == " "
    assert covered(tokenizer, "▁b")[0] == "▁"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_tokens_spells_the_whole(kind: str) -> None:
    tokenizer = trained(kind)
    for text in EDGES:
        ids = tokenizer.encode_ids([text])[0]
        stream = SpanStream(tokenizer)
        seen = []
        for count, index in enumerate([BEGIN, *ids]):
            seen.append(stream.add(index))
            assert stream.text == tokenizer.decode(ids[:count])
            assert 0 <= seen[-1][0] <= seen[-1][1] == len(stream.text)
        assert tokenizer.spans([BEGIN, *ids]) == (stream.text, seen)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("characters", "a cat", ["a", " ", "c", "a", "t", ""]),
        ("characters", "x\ufffd", ["x", "\ufffd", ""]),
        ("symbols", "the  cat", ["the", "cat", ""]),
        ("symbols", "the zebra cat", ["the", "<unk>", "cat", ""]),
        ("bpe", "the cat", ["the", "cat", ""]),
        ("bpe", "the  cat", ["the", " ", "cat", ""]),
    ],
)
def test_each_generated_token_has_its_part_of_the_output(kind: str, text: str, expected: list[str]) -> None:
    tokenizer = trained(kind)
    written, spans = tokenizer.spans(tokenizer.encode_ids([text])[0])
    assert [written[start:end] for start, end in spans] == expected
