"""Decoding on a CPU and on a CUDA device, in every precision, with the state on the host and on the device.

    python -m bench.cuda               the model with d 256
    python -m bench.cuda --model d512  the larger one

All decode the same ids with random weights that end their sentences (`bench.decode_models`), without attention, and
take turns in every round, in an order that is reversed from round to round; figures are medians of the rounds with
their quartiles. One round before them warms up, and its answers are compared: `agree` is the share of sentences to
which they equal those of float32 on the CPU. Between random weights' candidates there is little to choose, so that
float16 answers some sentences otherwise is no fault of it.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import onnxruntime as ort
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from bench.decode_models import SIZES, Prepared, prepare_random
from bench.grid import BenchError, Row, commit
from bench.machine import describe_machine
from bench.ours import Ours
from export.cpu import available_cpus
from export.resident import Device, has_cuda
from model.errors import LimelightError
from model.search import LARGEST_BEAM

BATCHES = (1, 8, 32, 128)
BEAMS = (1, 4)

FEWEST_ROUNDS = 3
"""Rounds that are measured however long they take: a median needs them."""

LENGTH_PENALTY = 1.0
WIDTH = 120
"""Columns of the table where nobody says how wide the terminal is."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to decode."""

    device: Device
    precision: Literal["float32", "int8", "float16"]
    resident: bool = False
    """Memory and state stay on the device."""


SIDES = (
    Side(device="cpu", precision="float32"),
    Side(device="cpu", precision="int8"),
    Side(device="cuda", precision="float32"),
    Side(device="cuda", precision="float32", resident=True),
    Side(device="cuda", precision="float16"),
    Side(device="cuda", precision="float16", resident=True),
)
"""The first is what the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float
    """Of a batch size and beam, after which no further round begins."""
    threads: int
    """Of ONNX Runtime."""


Timed: TypeAlias = tuple[float, list[list[int]]]


def measure(
    prepared: Prepared,
    sides: Sequence[Side],
    batches: Sequence[int],
    beams: Sequence[int],
    effort: Effort,
    told: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Tokens/s of every side at every batch size and beam.

    Args:
        prepared: the model.
        sides: the first is what the others are compared with.
        batches: sentences decoded together.
        beams: beam sizes.
        effort: how long.
        told: told what is measured.
    """
    models = {
        side: Ours(prepared.bundle, side.precision, effort.threads, device=side.device, resident=side.resident)
        for side in sides
    }
    rows = []
    for beam, batch in product(beams, batches):
        told(f"{prepared.name}, {batch} together, beam {beam}")
        repeated = prepared.sources * -(-batch // len(prepared.sources))
        sources = repeated[:batch]
        first = {side: _decode(model, sources, prepared, beam)[1] for side, model in models.items()}
        speeds = _take_turns(models, sources, prepared, beam, effort)
        for side in sides:
            low, middle, high = statistics.quantiles(speeds[side], n=4, method="inclusive")
            same = zip(first[side], first[sides[0]], strict=True)
            rows.append(
                asdict(side)
                | {"model": prepared.name, "sentences": batch, "beam": beam, "rounds": len(speeds[side])}
                | {"tokens_per_second": middle, "low": low, "high": high}
                | {"agree": statistics.fmean(one == other for one, other in same)}
            )
    return rows


def _take_turns(
    models: dict[Side, Ours], sources: list[list[int]], prepared: Prepared, beam: int, effort: Effort
) -> dict[Side, list[float]]:
    speeds: dict[Side, list[float]] = {side: [] for side in models}
    end = time.monotonic() + effort.seconds
    for turn in range(effort.rounds):
        if turn >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        for side in list(models)[:: -1 if turn % 2 else 1]:
            seconds, answers = _decode(models[side], sources, prepared, beam)
            speeds[side].append(sum(map(len, answers)) / seconds)
    return speeds


def _decode(model: Ours, sources: list[list[int]], prepared: Prepared, beam: int) -> Timed:
    begun = time.perf_counter()
    found = model.decode(
        sources, beam_size=beam, longest=prepared.longest, length_penalty=LENGTH_PENALTY, attention="none"
    )
    return time.perf_counter() - begun, model.answers(found)


def result_table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    table = Table(title="Tokens/s (medians; quartiles in brackets), and the share of answers equal to the first side's")
    for name in ("beam", "together", "device", "precision", "state", "tokens/s", "agree %"):
        table.add_column(name, justify="left" if name in ("device", "precision", "state") else "right")
    for row in rows:
        table.add_row(
            str(row["beam"]),
            str(row["sentences"]),
            row["device"],
            row["precision"],
            "on the device" if row["resident"] else "on the host",
            f"{row['tokens_per_second']:,.0f} ({row['low']:,.0f}-{row['high']:,.0f})",
            f"{100 * row['agree']:.0f}",
        )
    return table


def require_cuda() -> None:
    """Refuse to measure where there is nothing to measure.

    Raises:
        BenchError: with what is missing.
    """
    if not has_cuda():
        offered = ", ".join(ort.get_available_providers())
        raise BenchError(
            f"no CUDA device that ONNX Runtime can use: it offers {offered}; on a machine with an NVIDIA GPU, install "
            "onnxruntime-gpu in place of onnxruntime (pip uninstall onnxruntime; pip install 'limelight[gpu]')"
        )


def describe_gpu() -> str:
    """Name and driver of the device."""
    command = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write machine and rows."""
    content = {"machine": describe_machine(), "gpu": describe_gpu(), "commit": commit(), "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(
    model: Annotated[Literal["d256", "d512"], typer.Option(help="Which random model.")] = "d256",
    sentences: Annotated[
        list[int] | None, typer.Option(min=1, help="Sentences decoded together; repeat for several.")
    ] = None,
    beam: Annotated[
        list[int] | None, typer.Option(min=1, max=LARGEST_BEAM, help="Beam sizes; 1 is greedy search.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; medians count.")] = 9,
    seconds: Annotated[float, typer.Option(min=0, help="Begin no further round of a cell after this.")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime; by default all.")] = None,
    as_json: Annotated[Path, typer.Option("--json", help="Where the rows go.")] = Path("bench/results/cuda.json"),
    build: Annotated[Path, typer.Option(help="Folder for the bundle.")] = Path("build/bench/cuda"),
) -> None:
    """Measure, print the table, write the JSON; needs a CUDA device."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        require_cuda()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            cells = list(product(beam or BEAMS, sentences or BATCHES))
            task = progress.add_task("", total=len(cells) + 1)
            prepared = prepare_random(
                SIZES[model],
                build / model,
                lambda what: progress.update(task, description=what),
                peers=False,
                fp16=True,
            )
            effort = Effort(rounds=rounds, seconds=seconds, threads=threads or available_cpus())
            rows = measure(
                prepared,
                SIDES,
                sentences or BATCHES,
                beam or BEAMS,
                effort,
                lambda what: progress.update(task, description=what, advance=1),
            )
    except LimelightError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    save(as_json, rows)
    console.print(result_table(rows), f"{len(rows)} rows in {as_json}")


if __name__ == "__main__":
    typer.run(main)
