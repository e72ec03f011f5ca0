import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.config import TokenizersConfig
from model.errors import CheckpointError, DataError
from model.tokenizer import Tokenizer, train_tokenizers
from model.vocabulary import BEGIN, END, PAD, SPECIAL_TOKENS, UNKNOWN
from tests.model.texts import EDGES, KINDS, TEXTS, trained


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_the_first_ids(kind: str) -> None:
    tokenizer = trained(kind)
    assert tuple(map(tokenizer.token_text, range(4))) == SPECIAL_TOKENS
    assert (SPECIAL_TOKENS[PAD], SPECIAL_TOKENS[UNKNOWN]) == ("<pad>", "<unk>")
    assert (SPECIAL_TOKENS[BEGIN], SPECIAL_TOKENS[END]) == ("<s>", "</s>")


@pytest.mark.parametrize(
    ("kind", "text", "tokens"),
    [
        ("characters", "a cat", ["a", " ", "c", "a", "t"]),
        ("symbols", "the  cat\tsat", ["the", "cat", "sat"]),
        ("bpe", "the cat", ["▁the", "▁cat"]),
    ],
)
def test_a_text_becomes_tokens_and_an_end(kind: str, text: str, tokens: list[str]) -> None:
    tokenizer = trained(kind)
    encoded = tokenizer.encode(text)
    assert [token.text for token in encoded] == [*tokens, "</s>"]
    assert [tokenizer.token_text(token.id) for token in encoded] == [*tokens, "</s>"]
    assert (encoded[-1].id, encoded[-1].start, encoded[-1].end) == (END, len(text), len(text))


@pytest.mark.parametrize("kind", KINDS)
def test_many_texts_at_once_are_encoded_as_one_by_one(kind: str) -> None:
    tokenizer = trained(kind)
    expected = [[token.id for token in tokenizer.encode(text)] for text in EDGES]
    assert tokenizer.encode_ids(EDGES) == expected
    assert {ids[-1] for ids in expected} == {END}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("typed", SPECIAL_TOKENS)
def test_special_tokens_in_a_text_are_read_as_unknown(kind: str, typed: str) -> None:
    tokenizer = trained(kind, [*TEXTS, *SPECIAL_TOKENS * 9, "<s> </s>" * 9])
    for text in (typed, f"the {typed} cat", f"the{typed}cat", typed * 3):
        tokens = tokenizer.encode(text)
        assert not {PAD, BEGIN, END} & {token.id for token in tokens[:-1]}, tokens
        assert [token.id for token in tokens] == tokenizer.encode_ids([text])[0]
        assert all(token.text == tokenizer.token_text(token.id) for token in tokens)
        assert text[tokens[-2].end - 1] == text[-1]


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_a_special_token_of_known_characters_is_those_characters(kind: str) -> None:
    tokenizer = trained(kind, ["a b d k n p s u < > /"])
    for text in (*SPECIAL_TOKENS, "a</s>b", "a </s> b"):
        ids = tokenizer.encode_ids([text])[0]
        assert UNKNOWN not in ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("characters", "the ⚡ cat", "the <unk> cat"),
        ("symbols", "the zebra cat", "the <unk> cat"),
        ("symbols", "the </s> cat", "the <unk> cat"),
        ("bpe", "the ⚡ cat", "the <unk> cat"),
        ("unigram", "the ⚡ cat", "the <unk> cat"),
    ],
)
def test_what_is_unknown_is_decoded_as_such(kind: str, text: str, expected: str) -> None:
    tokenizer = trained(kind)
    assert tokenizer.decode(tokenizer.encode_ids([text])[0]) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_gives_the_text_back(kind: str) -> None:
    tokenizer = trained(kind)
    for text in TEXTS:
        ids = tokenizer.encode_ids([text])[0]
        assert UNKNOWN not in ids
        assert tokenizer.decode([BEGIN, *ids, PAD, PAD]) == text


@pytest.mark.parametrize(
    ("choices", "text", "expected"),
    [
        ({"lowercase": True}, "The Café", "the café"),
        ({"normalization": "nfc"}, "cafe\u0301", "café"),
        ({"normalization": "nfd"}, "café", "cafe\u0301"),
        ({"normalization": "nfkc"}, "ﬁ ²", "fi 2"),
        ({"normalization": "none"}, "cafe\u0301", "cafe\u0301"),
    ],
)
def test_a_text_is_normalised_before_it_is_encoded(choices: dict[str, Any], text: str, expected: str) -> None:
    tokenizer = trained("characters", [text], **choices)
    assert tokenizer.decode(tokenizer.encode_ids([text])[0]) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind, lowercase=True)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert len(loaded) == len(tokenizer) > len(SPECIAL_TOKENS)
    assert [loaded.encode(text) for text in EDGES] == [tokenizer.encode(text) for text in EDGES]
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def train_all() -> dict[str, list[str]]:
    """The vocabulary of every kind. A unigram's ids follow the library's hash order, so its pieces are sorted."""
    texts = [f"{first}{second} {second}{first}{third}" for first in "lime" for second in "light" for third in "on"]
    vocabularies = {}
    for kind in KINDS:
        tokenizer = trained(kind, texts, vocabulary_size=30)
        tokens = [tokenizer.token_text(index) for index in range(len(tokenizer))]
        vocabularies[kind] = sorted(tokens) if kind == "unigram" else tokens
    return vocabularies


def test_training_gives_the_same_tokenizer_in_every_process() -> None:
    script = "import json, tests.model.test_tokenizer as test; print(json.dumps(test.train_all()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    here = train_all()
    assert json.loads(done.stdout) == here
    assert min(map(len, here.values())) > 10


def test_frequent_words_come_first_and_equals_in_order() -> None:
    tokenizer = trained("symbols", ["b a c", "c d", "e"])
    assert [tokenizer.token_text(index) for index in range(4, len(tokenizer))] == ["c", "a", "b", "d", "e"]


@pytest.mark.parametrize("kind", ["characters", "symbols"])
def test_what_is_rare_is_left_out(kind: str) -> None:
    tokenizer = trained(kind, ["a b", "a b", "a c"], minimum_frequency=2)
    vocabulary = {tokenizer.token_text(index) for index in range(4, len(tokenizer))}
    assert vocabulary - {" "} == {"a", "b"}
    assert tokenizer.encode_ids(["c"]) == [[UNKNOWN, END]]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_subwords_keep_within_their_vocabulary(kind: str) -> None:
    texts = [f"{first}{second} {second}{first}{first}" for first in "lime" for second in "light"]
    sizes = [len(trained(kind, texts, vocabulary_size=size)) for size in (16, 20, 30)]
    assert all(12 < found <= most for found, most in zip(sizes, (16, 20, 30), strict=True)), sizes


@pytest.mark.parametrize("shared", [True, False])
def test_two_sides_have_one_tokenizer_where_they_share_it(shared: bool) -> None:
    source, target = train_tokenizers(TokenizersConfig(shared=shared), ["ab"], ["cd"])
    assert (source is target) == shared
    assert source.decode(source.encode_ids(["abcd"])[0]) == ("abcd" if shared else "ab<unk><unk>")
    assert target.decode(target.encode_ids(["abcd"])[0]) == ("abcd" if shared else "<unk><unk>cd")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [[], [""], ["", ""]], ids=["none", "one empty", "empty"])
def test_texts_without_a_token_are_refused(kind: str, texts: list[str]) -> None:
    words = f"a {kind} tokenizer found no tokens: the texts are empty"
    with pytest.raises(DataError, match=f"^{words}$"):
        trained(kind, texts)


@pytest.mark.parametrize(("kind", "size"), [("bpe", 20), ("unigram", 10), ("unigram", 20)])
def test_a_vocabulary_too_small_for_the_characters_is_refused(kind: str, size: int) -> None:
    with pytest.raises(DataError, match=f"^vocabulary_size={size}.*; raise it$"):
        trained(kind, ["abcdefghijklmnopqrstuvwxyz"], vocabulary_size=size)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such tokenizer file"),
        (b"", "not a tokenizer file: "),
        (b"{", "not a tokenizer file: "),
        (b"\xff\xfe", "not a tokenizer file: "),
        (b'{"version": "1.0"}', "not a tokenizer file: "),
    ],
    ids=["missing", "empty", "cut", "binary", "incomplete"],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {words}")):
        Tokenizer.load(path)


def test_a_tokenizer_with_other_special_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained("symbols").save(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    vocabulary["<s>"], vocabulary["</s>"] = vocabulary["</s>"], vocabulary["<s>"]
    path.write_text(json.dumps(values), encoding="utf-8")
    found = "('<pad>', '<unk>', '</s>', '<s>')"
    words = f"{path}: ids 0 to 3 are {found}, expected {SPECIAL_TOKENS}"
    with pytest.raises(CheckpointError, match=re.escape(words)):
        Tokenizer.load(path)
