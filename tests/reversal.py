"""The task with a known answer: reverse a string of letters, so that the cross-attention must be the anti-diagonal.

Small enough to be learnt in half a minute on one core; everything that needs a real model shares the one made here.
"""

import functools
import itertools
import random
from collections.abc import Iterable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export.bundle import export_bundle
from export.manifest import Manifest
from export.verify import Parity
from model.config import Config, parse_config
from model.pairs import Pair
from model.train import train

LETTERS = "abcdefgh"
SHORTEST, LONGEST = 4, 12
"""Letters of a string: with repeated ones among them, position alone says where to look."""

PARTS = {"train": 4000, "validation": 60, "test": 200}
"""Strings of each part, no string in two."""

CONFIG: dict[str, Any] = {
    "name": "reversal",
    "task": "text",
    "data": {"kind": "pairs"} | {part: {"tsv": f"{part}.tsv"} for part in PARTS},
    "model": {
        "d_model": 64,
        "heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "feed_forward": 128,
        "dropout": 0.0,
        "longest_source": 24,
        "longest_target": 20,
    },
    "training": {
        "updates": 900,
        "tokens_per_batch": 500,
        "learning_rate": 0.005,
        "warmup": 50,
        "schedule": "cosine",
        "label_smoothing": 0.0,
        "validate_every": 900,
        "validation_pairs": 20,
        "checkpoint_every": 900,
        "average": 1,
    },
}


@dataclass(frozen=True)
class Reversal:
    """A trained and exported model that reverses strings.

    Attributes:
        folder: where its data lies, under the relative names of its configuration.
        checkpoint: the trained model.
        bundle: the exported one.
        manifest: of the bundle.
        parity: what the verification found.
    """

    folder: Path
    checkpoint: Path
    bundle: Path
    manifest: Manifest
    parity: Parity


@functools.cache
def reversal_model(folder: Path) -> Reversal:
    """Train and export, once for each folder: every test folder's fixture asks for the same one."""
    folder.mkdir()
    for part, found in parts().items():
        (folder / f"{part}.tsv").write_text("".join(f"{text}\t{text[::-1]}\n" for text in found), encoding="utf-8")
    checkpoint, bundle = folder / "run" / "final", folder / "bundle"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that sums, and with them what is learnt, do not depend on how many cores there are
    with chdir(folder):  # the configuration's paths are relative, so that nothing of this machine goes into the bundle
        train(reversal_config(), folder / "run")
    torch.set_num_threads(threads)
    manifest, parity = export_bundle(checkpoint, bundle, pairs(parts()["validation"]), version="1", generate=True)
    return Reversal(folder, checkpoint, bundle, manifest, parity)


def reversal_config() -> Config:
    """What it is trained with."""
    return parse_config(CONFIG, "tests/reversal.py")


@functools.cache
def parts() -> dict[str, list[str]]:
    """Distinct random strings, dealt out to the parts."""
    generator, found = random.Random(0), dict[str, None]()
    while len(found) < sum(PARTS.values()):
        found["".join(generator.choices(LETTERS, k=generator.randint(SHORTEST, LONGEST)))] = None
    strings = iter(found)
    return {part: list(itertools.islice(strings, count)) for part, count in PARTS.items()}


def pairs(strings: Iterable[str]) -> list[Pair]:
    """Each string with its reverse."""
    return [Pair(string, string[::-1]) for string in strings]
