"""Tokenizers trained in a moment, shared by the tests of tokens and of spans."""

from model.config import TokenizerConfig
from model.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat", "a lime light shines", "naïve café", "hello world", "👩\u200d💻 שלום", "x\ufffd"]
KINDS = ("characters", "symbols", "bpe", "unigram")
EDGES = [
    *TEXTS,
    "the  cat ",
    " hello",
    "cafe\u0301",
    "cafe\u0301s on",
    "the\tcat\nsat",
    "zebra ⚡",
    "ﬁne",
    "İ",
    "",
]


def trained(kind: str, texts: list[str] | None = None, **choices: object) -> Tokenizer:
    config = TokenizerConfig.model_validate({"kind": kind, "vocabulary_size": 120, **choices})
    return Tokenizer.train(config, TEXTS if texts is None else texts)
