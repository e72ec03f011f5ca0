"""The grid of `bench.decode` and its results: one flat row a cell, in a JSON file that an interrupt cannot empty."""

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

from model.errors import LimelightError

Precision: TypeAlias = Literal["float32", "int8"]
Attention: TypeAlias = Literal["none", "cross", "all"]
Row: TypeAlias = dict[str, Any]

SAME_MACHINE = ("processor", "cores")
"""What of a machine's description must be equal for two figures to stand in one file."""


class BenchError(LimelightError):
    """A measurement that would mean nothing."""


@dataclass(frozen=True, order=True)
class Group:
    """Cells that differ in attention alone: they are measured interleaved, so that its price can be told."""

    model: str
    precision: Precision
    sentences: int
    """How many are decoded together."""
    beam: int
    threads: int


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    group: Group
    attention: Attention

    def columns(self) -> Row:
        """The part of a row that names the cell."""
        return asdict(self.group) | {"attention": self.attention}


@dataclass(frozen=True)
class Grid:
    """Values along every axis, in the order in which they are measured and printed."""

    models: Sequence[str]
    precisions: Sequence[Precision]
    sentences: Sequence[int]
    beams: Sequence[int]
    attention: Sequence[Attention]
    threads: Sequence[int]

    def groups(self) -> list[Group]:
        """All combinations without attention."""
        axes = product(self.models, self.precisions, self.sentences, self.beams, self.threads)
        return [Group(*values) for values in axes]

    def cells(self, group: Group) -> list[Cell]:
        """The cells of a group."""
        return [Cell(group, attention) for attention in self.attention]


class Results:
    """The rows that were measured on one machine with the same versions.

    Args:
        path: the JSON file; rows that it holds are kept, and replaced where they are measured again.
        machine: description of this machine.
        versions: of what takes part.
        command: what is being run.
        fresh: forget what the file holds.

    Raises:
        BenchError: the file holds something else, or rows of another machine or of other versions.
    """

    def __init__(
        self,
        path: Path,
        machine: Mapping[str, Any],
        versions: Mapping[str, str],
        command: Sequence[str],
        *,
        fresh: bool = False,
    ) -> None:
        self._path = path
        self._head: Row = {"machine": dict(machine), "versions": dict(versions), "command": list(command)}
        self._rows: dict[tuple[Any, ...], Row] = {}
        if path.is_file() and not fresh:
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            before, now = _origin(content), _origin(self._head)
            rows = content["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(
                f"{self._path}: holds no results of this benchmark ({error!r}): name another file"
            ) from error
        if before != now:
            different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            raise BenchError(
                f"{self._path}: holds rows of another machine or of other versions ({', '.join(different)} differ): "
                "write to another file with --json, or forget them with --fresh"
            )
        self.add(rows)

    @property
    def rows(self) -> list[Row]:
        """All rows, ordered by model, precision, sentences, beam, threads and attention."""
        return [self._rows[key] for key in sorted(self._rows)]

    def has(self, cells: Iterable[Cell]) -> bool:
        """Whether all of these cells were measured."""
        return all(_key(cell.columns()) in self._rows for cell in cells)

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, in place of older ones of the same cells."""
        self._rows |= {_key(row): row for row in rows}

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        content = self._head | {"rows": self.rows}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._path)


def commit(*paths: str) -> str:
    """What was measured: the commit, with "-dirty" where the code differs from it; "unknown" outside a repository.

    Args:
        paths: where the code is; by default that of decoding.
    """
    root = Path(__file__).parent.parent
    head = subprocess.run(
        ("git", "rev-parse", "--short=12", "HEAD"), cwd=root, capture_output=True, text=True, check=False
    )
    if head.returncode:
        return "unknown"
    changed = subprocess.run(
        ("git", "diff", "--quiet", "HEAD", "--", *(paths or ("model", "export", "bench/*.py"))), cwd=root, check=False
    )
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")


def _origin(content: Row) -> Row:
    return {name: content["machine"].get(name) for name in SAME_MACHINE} | dict(content["versions"])


def _key(row: Row) -> tuple[Any, ...]:
    group = Group(**{name: row[name] for name in Group.__dataclass_fields__})
    return *astuple(group), ("none", "cross", "all").index(row["attention"])
