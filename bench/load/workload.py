"""What is served and what is asked: a model's bundle, the peer's copy of it, and sources of mixed lengths."""

import random
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from bench.load.servers import ROOT, LoadError, ServerName, run_tool
from model.config import CmudictData
from model.pairs import read_pairs


class ModelName(StrEnum):
    """The models that can be served."""

    G2P_EN = "g2p-en"
    RANDOM = "random"


SOURCES = 2000
"""Distinct sources that are asked for."""

COMPARED = 100
"""Sources on which an export is compared with PyTorch."""


@dataclass(frozen=True)
class Workload:
    """A model and what it is asked.

    Attributes:
        name: of the model.
        folder: where all that was made for it lies.
        checkpoint: its weights.
        sources: what is asked, of lengths as they come.
        longest: most tokens to generate.
    """

    name: ModelName
    folder: Path
    checkpoint: Path
    sources: list[str]
    longest: int

    def model_of(self, server: ServerName, precision: str) -> Path:
        """The folder that a server takes."""
        return self.folder / f"ctranslate2-{precision}" if server is ServerName.CTRANSLATE2 else self.folder / "bundle"


def prepare(name: ModelName, folder: Path, *, reuse: bool) -> Workload:
    """Make a model's bundle, and the sources.

    Args:
        name: "g2p-en" is the shipped model, asked for words of the built-in dictionary's test part; "random" an
            untrained one.
        folder: where to, below it a folder of the model's name.
        reuse: take what the last run made.

    Raises:
        LoadError: the export failed.
    """
    folder = folder / name
    bundle = folder / "bundle"
    if name is ModelName.RANDOM:
        checkpoint, settings = folder / "checkpoint", []
        if not (reuse and checkpoint.is_dir()):
            run_tool(sys.executable, "bench.load.random_model", str(folder))
        sources, longest = (folder / "sources.txt").read_text(encoding="utf-8").splitlines(), 64
    else:
        checkpoint, settings = ROOT / "checkpoints" / name, ["--set", "data.kind=cmudict"]
        words = sorted({pair.source for pair in read_pairs(CmudictData(), "test").pairs})
        sources, longest = random.Random(0).sample(words, SOURCES), 64
    if not (reuse and (bundle / "bundle.json").is_file()):
        pairs = f"--validation-pairs={COMPARED if name is ModelName.G2P_EN else 4}"
        run_tool(sys.executable, "serve", "export", str(checkpoint), str(bundle), *settings, pairs)
    return Workload(name, folder, checkpoint, sources, longest)


def prepare_peer(workload: Workload, python: Path, precision: str, *, reuse: bool) -> None:
    """Convert the checkpoint for CTranslate2.

    Args:
        workload: whose checkpoint.
        python: interpreter of the environment that has ctranslate2.
        precision: of the weights.
        reuse: take what the last run made.

    Raises:
        LoadError: the conversion failed.
    """
    folder = workload.model_of(ServerName.CTRANSLATE2, precision)
    if not (reuse and folder.is_dir()):
        run_tool(python, "bench.load.convert", str(workload.checkpoint), str(folder), precision)


def require(python: Path, server: ServerName) -> Path:
    """The interpreter of a peer's environment.

    Raises:
        LoadError: it is not there.
    """
    if not python.is_file():
        raise LoadError(f"{python}: no such environment for {server}: `make bench-load` makes it")
    return python
