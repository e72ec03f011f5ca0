"""What a server is started with: the same for all of them, so that none has more room than another."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Precision(StrEnum):
    """Precisions that every server has."""

    FP32 = "fp32"
    INT8 = "int8"


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """Limits and search, as `limelight serve` has them by default."""

    precision: Precision = Precision.FP32
    """Of the weights."""
    threads: int = 1
    """Threads that compute."""
    rows: int = 64
    """Most rows (sentences times beams) decoded together."""
    tokens: int = 16384
    """Most padded source tokens, times beams, in a batch of a peer; our server bounds what it keeps instead."""
    queue: int = 1024
    """Most requests waiting; one more is refused."""
    beam: int = 1
    """Hypotheses kept at a time; 1 is greedy search."""
    longest: int = 64
    """Most tokens to generate, the end token among them."""

    def fits(self, sentences: int, longest: int) -> bool:
        """Whether so many sources, the longest of so many tokens, may share a batch."""
        rows = sentences * self.beam
        return rows <= self.rows and rows * longest <= self.tokens

    def arguments(self) -> list[str]:
        """As a command line has them."""
        return [f"--{name}={value}" for name, value in asdict(self).items()]


@dataclass(frozen=True)
class Peer:
    """The command line of a peer's server.

    Attributes:
        model: folder that it serves.
        folder: where it may write.
        options: how it serves.
    """

    model: Path
    folder: Path
    options: ServingOptions

    @property
    def port_file(self) -> Path:
        """Where it writes its port."""
        return self.folder / "port"


def read_peer(arguments: Sequence[str] | None = None) -> Peer:
    """Read the command line of a peer's server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    for name, default in asdict(ServingOptions()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    values: dict[str, Any] = vars(parser.parse_args(arguments))
    return Peer(values.pop("model"), values.pop("folder"), ServingOptions(**values))


def write_port(path: Path, port: int) -> None:
    """Tell the port, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(f"{port}\n", encoding="ascii")
    temporary.replace(path)
