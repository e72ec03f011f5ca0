"""The toys exported once more, with a search among candidates."""

import functools
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

import export.bundle
from export.bundle import Shortlisting, export_bundle
from export.graphs import Exported
from export.lexicon import Lexicon, learn_lexicon
from export.manifest import Precision
from export.onnx_writer import trace
from export.runtime import OnnxGreedyModel, OnnxStepModel
from model.pairs import Pair
from tests.export.toy import ALPHABET, PAIRS, Toy, network, toy_model

SIZE = 20
"""Candidates of each sentence."""


@dataclass(frozen=True)
class Shortlisted:
    """A toy with a shortlist.

    Attributes:
        toy: the bundle, and its traces.
        lexicon: what the candidates are chosen by.
    """

    toy: Toy
    lexicon: Lexicon

    def exact(self, precision: Precision = "fp32") -> OnnxGreedyModel:
        return OnnxGreedyModel(self.toy.bundle, self.toy.manifest, precision)

    def short(self, precision: Precision = "fp32") -> OnnxGreedyModel:
        exact = self.exact(precision)
        return OnnxGreedyModel(self.toy.bundle, self.toy.manifest, precision, shortlist_of=exact)

    def stepwise(self, precision: Precision = "fp32") -> OnnxStepModel:
        """Without the graph that takes several steps."""
        exact = OnnxStepModel(self.toy.bundle, self.toy.manifest, precision)
        return OnnxStepModel(self.toy.bundle, self.toy.manifest, precision, shortlist_of=exact)


@functools.cache
def training_pairs() -> tuple[Pair, ...]:
    """Random letters beside each other, some of them more often than others."""
    draw = random.Random(0)
    letters = ALPHABET.replace(" ", "")
    return tuple(
        Pair("".join(draw.choices(letters, k=6)), "".join(draw.choices(letters, range(len(letters)), k=5)))
        for _ in range(300)
    )


@functools.cache
def shortlisted_toy(name: str, folder: Path) -> Shortlisted:
    """One of the toys, once for each folder; untied in float16 too."""
    return shortlisted_model(toy_model(name, folder / name), folder / f"{name}-shortlist", fp16=name == "untied")


def shortlisted_model(toy: Toy, folder: Path, size: int = SIZE, *, fp16: bool = False) -> Shortlisted:
    """Export it; what was traced for the toy is not traced again."""
    shutil.copytree(toy.checkpoint, folder / "checkpoint")
    traced = dict(toy.traced)

    def take(exported: Exported) -> onnx.ModelProto:
        name = type(exported.module).__name__
        if name not in traced:
            traced[name] = trace(exported).SerializeToString()
        return onnx.ModelProto.FromString(traced[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.bundle, "trace", take)
        manifest, parity = export_bundle(
            folder / "checkpoint",
            folder / "bundle",
            PAIRS,
            fp16=fp16,
            shortlist=Shortlisting(size, training_pairs()),
        )
    checkpoint = network(toy)
    lexicon = learn_lexicon(training_pairs(), checkpoint.source, checkpoint.target)
    return Shortlisted(Toy(folder, traced, manifest, parity), lexicon)
