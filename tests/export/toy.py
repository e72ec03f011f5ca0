"""Two untrained checkpoints that between them take every other turn of the configuration, exported once a session."""

import functools
import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import export.bundle
from export.bundle import export_bundle
from export.graphs import Exported
from export.manifest import Manifest
from export.onnx_writer import trace
from export.verify import Parity
from model.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from model.config import parse_config
from model.pairs import Pair
from model.tokenizer import train_tokenizers
from tests.reversal import Reversal

CHOICES: dict[str, dict[str, Any]] = {
    "tied": {
        "tied_embeddings": "all",
        "norm": "post",
        "final_norm": False,
        "positions": "interleaved",
        "activation": "gelu",
        "encoder_layers": 1,
        "decoder_layers": 2,
    },
    "untied": {
        "tied_embeddings": "none",
        "norm": "pre",
        "positions": "half",
        "activation": "swish",
        "embedding_scale": False,
        "encoder_layers": 1,
        "decoder_layers": 1,
    },
}
"""What sets each apart; tests/reversal.py has decoder embeddings tied, relu, and more encoder than decoder layers."""

SIZES = {"d_model": 16, "heads": 4, "feed_forward": 24, "dropout": 0.0, "longest_source": 32, "longest_target": 12}
ALPHABET = string.ascii_letters + string.digits + " .,!?"
"""Enough of it that even an int8 table is kept outside the graph."""

PAIRS = [Pair("hello", "world"), Pair("a", "b"), Pair("quick brown fox", "lazy dog")]


@dataclass(frozen=True)
class Toy:
    """A checkpoint and the bundle made from it.

    Attributes:
        folder: where both lie.
        traced: the graphs as they came from the trace, serialised, by the name of the traced module.
        manifest: of the bundle.
        parity: what the verification found.
    """

    folder: Path
    traced: dict[str, bytes]
    manifest: Manifest
    parity: Parity

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"


@functools.cache
def toy_model(name: str, folder: Path) -> Toy:
    """Make and export one of CHOICES, once for each folder."""
    save_checkpoint(folder / "checkpoint", untrained(name))
    traced: dict[str, bytes] = {}

    def remember(exported: Exported) -> onnx.ModelProto:
        model = trace(exported)
        traced[type(exported.module).__name__] = model.SerializeToString()
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.bundle, "trace", remember)
        manifest, parity = export_bundle(folder / "checkpoint", folder / "bundle", PAIRS, generate=True)
    return Toy(folder, traced, manifest, parity)


@functools.cache
def halved_model(name: str, folder: Path) -> Toy:
    """The same traces exported once more, in float16 too, once for each folder."""
    toy, folder = toy_model(name, folder / name), folder / f"{name}-halved"
    shutil.copytree(toy.checkpoint, folder / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        retrace(toy, patch)
        manifest, parity = export_bundle(folder / "checkpoint", folder / "bundle", PAIRS, generate=True, fp16=True)
    return Toy(folder, toy.traced, manifest, parity)


def untrained(name: str) -> Checkpoint:
    """Every parameter is random: zero biases and unit norms would hide one that is left out."""
    config = parse_config(
        {"name": name, "tokenizer": {"shared": name == "tied"}, "model": SIZES | CHOICES[name]}, "tests/export/toy.py"
    )
    source, target = train_tokenizers(config.tokenizer, [ALPHABET], [ALPHABET])
    torch.manual_seed(5)
    model = build_model(config, source, target).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Checkpoint(config=config, model=model, source=source, target=target, metrics={"update": 0})


def leave(model: onnx.ModelProto) -> None:
    """Change nothing."""


def retrace(
    toy: Toy,
    patch: pytest.MonkeyPatch,
    spoil: Callable[[onnx.ModelProto], None] = leave,
    *,
    only: str = "",
) -> None:
    """Let the next exports of a toy take the graphs that were traced once, changed by `spoil`.

    Args:
        toy: which.
        patch: for as long as the test runs.
        spoil: changes a traced model in place.
        only: the module whose graph is changed; by default all.
    """

    def take(exported: Exported) -> onnx.ModelProto:
        name = type(exported.module).__name__
        model = onnx.ModelProto.FromString(toy.traced[name])
        if only in ("", name):
            spoil(model)
        return model

    patch.setattr(export.bundle, "trace", take)


def network(exported: Toy | Reversal) -> Checkpoint:
    """The checkpoint that a bundle was made from."""
    return load_checkpoint(exported.checkpoint)
