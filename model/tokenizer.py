"""Text to tokens and back, with each token's characters kept: a thin wrapper around Hugging Face `tokenizers`.

Torch-free. The whole tokenizer is one `tokenizers` JSON file, so any of its language bindings reads it too.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from model.config import TokenizerConfig, TokenizersConfig
from model.errors import CheckpointError, DataError
from model.vocabulary import BEGIN, END, PAD, SPECIAL_TOKENS, UNKNOWN

SPACE = "▁"
"""How subword vocabularies write a space (U+2581)."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token and the characters it stands for.

    Attributes:
        id: index in the vocabulary.
        text: the token as the vocabulary writes it.
        start: first character of its span in the text, counted in Unicode code points.
        end: one past its last character; equal to `start` for begin and end tokens.
    """

    id: int
    text: str
    start: int
    end: int


class Tokenizer:
    """Turns one side's text into tokens and back."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @classmethod
    def train(cls, config: TokenizerConfig, texts: Iterable[str]) -> Self:
        """Build the vocabulary from texts.

        Raises:
            DataError: the texts hold no token at all, or more distinct characters than the vocabulary has room for.
        """
        backend = _untrained(config)
        if config.kind in ("characters", "symbols"):
            backend.model = models.WordLevel(_count_words(config, backend, texts), unk_token=SPECIAL_TOKENS[UNKNOWN])
        else:
            _learn_subwords(config, backend, texts)
        if backend.get_vocab_size() <= len(SPECIAL_TOKENS):
            raise DataError(f"a {config.kind} tokenizer found no tokens: the texts are empty")
        return cls(_without_added_tokens(backend))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a tokenizer file.

        Raises:
            CheckpointError: missing, unreadable, or without the special tokens where they belong.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: no such tokenizer file")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer file: {error}") from error
        found = tuple(backend.id_to_token(index) for index in range(len(SPECIAL_TOKENS)))
        if found != SPECIAL_TOKENS:
            raise CheckpointError(f"{path}: ids 0 to 3 are {found}, expected {SPECIAL_TOKENS}")
        return cls(backend)

    def save(self, path: Path) -> None:
        """Write the tokenizer file."""
        path.write_text(self._backend.to_str(pretty=True) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size())

    def encode(self, text: str) -> list[Token]:
        """The tokens of a text, an end token last.

        Special tokens that someone spells out in the text are read as unknown: text cannot end a sentence early.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        limits = [*(start for start, _ in encoding.offsets), len(text)][1:]
        spans = [
            _span(text, token, start, _end(text, end, limit))
            for token, (start, end), limit in zip(encoding.tokens, encoding.offsets, limits, strict=True)
        ]
        ids = [UNKNOWN if index in (PAD, BEGIN, END) else index for index in encoding.ids]
        tokens = [Token(index, self.token_text(index), *span) for index, span in zip(ids, spans, strict=True)]
        return [*tokens, Token(END, SPECIAL_TOKENS[END], len(text), len(text))]

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts at once, an end token last in each."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[UNKNOWN if i in (PAD, BEGIN, END) else i for i in encoding.ids] + [END] for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; padding, begin and end are left out, unknown is written as <unk>."""
        return str(self._backend.decode([i for i in ids if i not in (PAD, BEGIN, END)], skip_special_tokens=False))

    def token_text(self, index: int) -> str:
        """How the vocabulary writes one id."""
        return str(self._backend.id_to_token(index))

    def token_id(self, text: str) -> int | None:
        """The id of a token as the vocabulary writes it; None where there is none."""
        index: int | None = self._backend.token_to_id(text)
        return index

    def spans(self, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """The decoded text of generated ids, and each token's span of characters in it."""
        stream = SpanStream(self)
        spans = [stream.add(index) for index in ids]
        return stream.text, spans


class SpanStream:
    """Decodes token by token, as a stream does, keeping each token's span of characters in the text so far.

    Attributes:
        text: everything decoded up to now.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._last: list[int] = []
        self.text = ""

    def add(self, index: int) -> tuple[int, int]:
        """Add a token; returns its span, without the white space that only separates it from the one before."""
        start = len(self.text)
        if index in (PAD, BEGIN, END):
            return start, start
        # Whether a space comes before a token depends on the token before it, and on no other.
        before = self._tokenizer.decode(self._last)
        piece = self._tokenizer.decode([*self._last, index])[len(before) :]
        self._last = [index]
        self.text += piece
        separator = len(piece) - len(piece.lstrip(" "))
        return (start if separator == len(piece) else start + separator), len(self.text)


def train_tokenizers(
    config: TokenizersConfig, sources: Sequence[str], targets: Sequence[str]
) -> tuple[Tokenizer, Tokenizer]:
    """Tokenizers of source and target; one and the same where they are shared."""
    if config.shared:
        shared = Tokenizer.train(config.source, (text for texts in (sources, targets) for text in texts))
        return shared, shared
    return Tokenizer.train(config.source, sources), Tokenizer.train(config.target, targets)


def _end(text: str, end: int, limit: int) -> int:
    # The library gives a composed letter the span of its first character; its accents belong to it too.
    while end < limit and not text[end].isspace():
        end += 1
    return end


def _span(text: str, token: str, start: int, end: int) -> tuple[int, int]:
    covered = text[start:end]
    if token == SPACE and covered[:1] not in (" ", SPACE):  # put before the first word; no character of the text
        return start, start
    # A subword's space belongs to no word: its span begins at the word, unless the token is nothing but space.
    spaces = len(covered) - len(covered.lstrip(" "))
    return start if spaces == len(covered) else start + spaces, end


def _untrained(config: TokenizerConfig) -> Backend:
    unknown = SPECIAL_TOKENS[UNKNOWN]
    match config.kind:
        case "characters":
            backend = Backend(models.WordLevel({}, unk_token=unknown))
            backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            backend.decoder = decoders.Fuse()
        case "symbols":  # without a decoder, tokens are joined by spaces
            backend = Backend(models.WordLevel({}, unk_token=unknown))
            backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        case "bpe":
            backend = Backend(models.BPE(unk_token=unknown))
            backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        case "unigram":
            backend = Backend(models.Unigram())
            backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    steps = _normalizers(config)
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    return backend


def _normalizers(config: TokenizerConfig) -> list[normalizers.Normalizer]:
    forms = {"nfc": normalizers.NFC, "nfd": normalizers.NFD, "nfkc": normalizers.NFKC, "nfkd": normalizers.NFKD}
    steps = [forms[config.normalization]()] if config.normalization in forms else []
    return [*steps, normalizers.Lowercase()] if config.lowercase else steps


def _count_words(config: TokenizerConfig, backend: Backend, texts: Iterable[str]) -> dict[str, int]:
    # Not the library's trainer: its order of equally frequent words differs from run to run, and a word spelt like a
    # special token would get a second id.
    counts: Counter[str] = Counter()
    for text in texts:
        normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
        counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    frequent = (word for word, count in counts.items() if count >= config.minimum_frequency)
    words = sorted((word for word in frequent if word not in SPECIAL_TOKENS), key=lambda word: (-counts[word], word))
    return {word: index for index, word in enumerate((*SPECIAL_TOKENS, *words))}


def _learn_subwords(config: TokenizerConfig, backend: Backend, texts: Iterable[str]) -> None:
    try:
        backend.train_from_iterator(texts, _trainer(config))
        size = backend.get_vocab_size()
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"vocabulary_size={config.vocabulary_size}: {error}; raise it") from error
    if size > config.vocabulary_size:
        raise DataError(
            f"vocabulary_size={config.vocabulary_size} is too small: special tokens and the distinct characters of the "
            f"texts alone are {size}; raise it"
        )


def _trainer(config: TokenizerConfig) -> trainers.Trainer:
    size, special = config.vocabulary_size, list(SPECIAL_TOKENS)
    if config.kind == "bpe":
        return trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, show_progress=False, min_frequency=config.minimum_frequency
        )
    return trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, show_progress=False, unk_token=SPECIAL_TOKENS[UNKNOWN]
    )


def _without_added_tokens(backend: Backend) -> Backend:
    # Special tokens that a trainer registers are matched inside any text ("</s>" typed by someone); as plain entries
    # of the vocabulary they are not.
    values = json.loads(backend.to_str())
    return Backend.from_str(json.dumps(values | {"added_tokens": []}))
