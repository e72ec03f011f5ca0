"""Tokens/s of Limelight and CTranslate2 on the same weights, side by side, and how far both are from the limit.

    python -m bench.decode             the quick part of the grid
    python -m bench.decode --full      all of it; --resume goes on after an interrupt

Both decode the same ids with the same beam, length penalty and length limit, in the same batches, each in a process of
its own on the same processors. The two take turns in every round, in an order that is reversed from round to round;
the cells of a group (everything equal but attention) take turns in every batch. `ours` and `peer` are medians of the
rounds, `ratio` the median of the rounds' ratios. One round before them warms up, and its answers are compared: `agree`
is the share of sentences to which both sides give equal ids.

Attention "none", "cross" and "all" are the families that ours returns. CTranslate2 returns nothing for "none", and for
the others the one averaged matrix that it has. `price` is what ours pays: 1 - its tokens/s over those of "none" for the
same batch in the same round, the median of all of these: a disturbance of some milliseconds spoils but one of them.
`limit_share` is the limit of `bench.limit` over the time taken. Memory is the largest of the whole process up to the
end of that attention's first round, Python and libraries included.
"""

import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.decode_models import SENTENCES, SIZES, Prepared, prepare_random, prepare_trained
from bench.grid import Attention, BenchError, Cell, Grid, Group, Precision, Results, Row, commit
from bench.limit import WEIGHT_BYTES, Batch, Rates, limit_seconds
from bench.machine import describe_machine
from bench.worker import Job, Worker
from export.cpu import available_cpus
from model.errors import LimelightError
from model.search import LARGEST_BEAM

Model: TypeAlias = Literal["trained", "d256", "d512"]
Side: TypeAlias = Literal["ours", "peer"]

CHOICES: dict[str, range | tuple[str, ...]] = {
    "models": get_args(Model),
    "precisions": get_args(Precision),
    "sentences": range(1, SENTENCES + 1),
    "beams": range(1, LARGEST_BEAM + 1),
    "attention": get_args(Attention),
    "threads": range(1, available_cpus() + 1),
}
"""What can be measured here, along every axis."""

SIDES: tuple[Side, Side] = ("ours", "peer")
LENGTH_PENALTY = 1.0
FEWEST_ROUNDS = 3
"""Rounds that are measured however long they take: a median needs them."""

WIDTH = 170
"""Columns of the table where nobody says how wide the terminal is."""

PAUSE = 0.02
"""Seconds for the threads of whoever ran last to stop spinning, where there are several."""

QUICK = Grid(
    models=("trained", "d256"),
    precisions=("float32", "int8"),
    sentences=(1, 32),
    beams=(1,),
    attention=("none", "cross"),
    threads=(1,),
)
FULL = Grid(
    models=get_args(Model),
    precisions=("float32", "int8"),
    sentences=(1, 8, 32),
    beams=(1, 4),
    attention=("none", "cross", "all"),
    threads=(1, 2),
)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float
    """Of a group, after which no further round begins."""
    spinning: bool
    """Let ONNX Runtime's threads spin."""


def round_batches(sources: Sequence[list[int]], sentences: int) -> list[list[list[int]]]:
    """What one round decodes: full batches, more of the short ones, so that lengths vary in every cell."""
    count = min(12 if sentences == 1 else 4, len(sources) // sentences)
    return [list(sources[index * sentences : (index + 1) * sentences]) for index in range(count)]


def measure_group(
    group: Group, cells: Sequence[Cell], prepared: Prepared, effort: Effort, tick: Callable[[], None] = lambda: None
) -> list[Row]:
    """Measure cells that differ in attention alone.

    Args:
        group: what they share.
        cells: which of them.
        prepared: the model.
        effort: how long.
        tick: told after each round.
    """
    batches = round_batches(prepared.sources, group.sentences)
    load, rates = os.getloadavg()[0], machine_rates(group, prepared)
    attentions = [cell.attention for cell in cells]
    answers: dict[tuple[Side, Attention], list[list[int]]] = {}
    memory: dict[tuple[Side, Attention], int] = {}
    with ExitStack() as stack:
        workers: dict[Side, Worker] = {
            side: stack.enter_context(Worker(group.threads, _job(side, group, prepared, batches, effort)))
            for side in SIDES
        }
        for side, worker in workers.items():
            for attention in sorted(attentions, key=FULL.attention.index):  # each needs more than the one before
                ((_, answers[side, attention]),) = worker.ask({"do": "decode", "attention": [attention]})
                memory[side, attention] = worker.ask({"do": "memory"})
        timed = _take_turns(group, workers, attentions, effort, tick)
    about = {
        "rounds": len(next(iter(timed.values()))),
        "source_tokens": statistics.fmean(len(source) for batch in batches for source in batch),
        "bandwidth": rates.bandwidth,
        "matrix_rate": rates.matrix,
        "load_before": load,
        "spinning": effort.spinning,
        "commit": commit(),
    }
    rows = []
    for cell in cells:
        row = cell.columns() | {"model": prepared.name} | _speed_columns(cell.attention, timed)
        for side in SIDES:
            limit = _limit(prepared, batches, answers[side, cell.attention], group, rates)
            row[f"{'' if side == 'ours' else 'peer_'}limit_share"] = row[side] / limit
            row[f"{side}_memory"] = memory[side, cell.attention]
            row[f"{side}_tokens"] = statistics.fmean(map(len, answers[side, cell.attention]))
        pairs = zip(answers["ours", cell.attention], answers["peer", cell.attention], strict=True)
        rows.append(row | {"agree": statistics.fmean(one == other for one, other in pairs)} | about)
    return rows


def _job(side: Side, group: Group, prepared: Prepared, batches: list[list[list[int]]], effort: Effort) -> Job:
    return Job(
        side=side,
        folder=str(prepared.bundle if side == "ours" else prepared.peer(group.precision)),
        precision=group.precision,
        threads=group.threads,
        spinning=effort.spinning,
        batches=batches,
        beam=group.beam,
        longest=prepared.longest,
        length_penalty=LENGTH_PENALTY,
    )


Timed: TypeAlias = dict[tuple[Side, Attention], list[tuple[list[float], int]]]
"""Of every round, each batch's seconds, and the tokens of all of them."""


def _take_turns(
    group: Group,
    workers: dict[Side, Worker],
    attentions: Sequence[Attention],
    effort: Effort,
    tick: Callable[[], None],
) -> Timed:
    timed: Timed = {(side, attention): [] for side in workers for attention in attentions}
    end = time.monotonic() + effort.seconds
    for turn in range(effort.rounds):
        if turn >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        # What one side does to caches and clocks, it does to the other as often.
        for side, worker in list(workers.items())[:: -1 if turn % 2 else 1]:
            found = worker.ask({"do": "decode", "attention": attentions, "turn": turn})
            for attention, (seconds, answers) in zip(attentions, found, strict=True):
                timed[side, attention].append((seconds, sum(map(len, answers))))
            if group.threads > 1:
                time.sleep(PAUSE)
        tick()
    return timed


def _speed_columns(attention: Attention, timed: Timed) -> Row:
    ours, peer = ([tokens / sum(seconds) for seconds, tokens in timed[side, attention]] for side in SIDES)
    free = timed.get(("ours", "none"))
    row = {"ours": statistics.median(ours), "peer": statistics.median(peer)}
    row |= _quartiles("ratio", [one / other for one, other in zip(ours, peer, strict=True)])
    if attention == "none" or free is None:
        return row | dict.fromkeys(("price", "price_low", "price_high"))
    prices = [
        1 - without / with_it
        for (before, _), (after, _) in zip(free, timed["ours", attention], strict=True)
        for without, with_it in zip(before, after, strict=True)
    ]
    return row | _quartiles("price", prices)


def _quartiles(name: str, values: list[float]) -> Row:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def machine_rates(group: Group, prepared: Prepared) -> Rates:
    """What the machine can do with the group's threads, on weights of the model's size, just before it is measured."""
    size = prepared.network.decoder_weights * WEIGHT_BYTES[group.precision]
    request = {"precision": group.precision, "weight_bytes": size, "threads": group.threads, "seconds": 0.3}
    with Worker(group.threads) as worker:
        return Rates(**worker.ask({"rates": request}))


def _limit(
    prepared: Prepared, batches: list[list[list[int]]], answers: list[list[int]], group: Group, rates: Rates
) -> float:
    """Tokens/s at the physical limit."""
    seconds, lengths = 0.0, iter(map(len, answers))
    for batch in batches:
        shape = Batch([len(source) for source in batch], [next(lengths) for _ in batch])
        seconds += limit_seconds(prepared.network, shape, group.beam, group.precision, rates)
    return sum(map(len, answers)) / seconds


def result_table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    table = Table(title="Tokens/s of Limelight and CTranslate2, the same weights (medians; quartiles in brackets)")
    names = ("model", "precision", "sentences", "beam", "threads", "attention", "ours", "peer")
    for name in (*names, "ratio", "price %", "ours MB", "peer MB", "limit %", "peer's %", "agree %"):
        table.add_column(name, justify="left" if name in ("model", "precision", "attention") else "right")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in names[:6]),
            f"{row['ours']:,.0f}",
            f"{row['peer']:,.0f}",
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})",
            "" if row["price"] is None else f"{100 * row['price']:.1f}",
            f"{row['ours_memory'] / 1e6:.0f}",
            f"{row['peer_memory'] / 1e6:.0f}",
            f"{100 * row['limit_share']:.0f}",
            f"{100 * row['peer_limit_share']:.0f}",
            f"{100 * row['agree']:.0f}",
        )
    return table


def choose_grid(base: Grid, **axes: Sequence[str] | Sequence[int] | None) -> Grid:
    """The base grid, with those axes replaced that are given.

    Raises:
        BenchError: a value that cannot be measured here.
    """
    chosen: dict[str, Any] = {name: tuple(values) for name, values in axes.items() if values}
    for name, values in chosen.items():
        wrong = [value for value in values if value not in CHOICES[name]]
        if wrong:
            known = CHOICES[name]
            allowed = f"from 1 to {known[-1]}" if isinstance(known, range) else f"one of {', '.join(known)}"
            raise BenchError(f"{name}: {wrong[0]} is not {allowed}")
    return replace(base, **chosen)


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="trained, d256 or d512; repeat for several, as all of these.")
    ] = None,
    precision: Annotated[list[str] | None, typer.Option(help="float32 or int8.")] = None,
    sentences: Annotated[list[int] | None, typer.Option(help="Sentences decoded together.")] = None,
    beam: Annotated[list[int] | None, typer.Option(help="Beam sizes; 1 is greedy search.")] = None,
    attention: Annotated[list[str] | None, typer.Option(help="none, cross or all.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Threads of each side.")] = None,
    checkpoint: Annotated[Path, typer.Option(help="The trained model.")] = Path("checkpoints/g2p-en"),
    full: Annotated[bool, typer.Option("--full", help="The whole grid.")] = False,
    rounds: Annotated[int | None, typer.Option(min=2, help="Rounds; by default 7, in the whole grid 15.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Begin no further round of a group after this.")] = 60,
    spinning: Annotated[bool, typer.Option(help="Let ONNX Runtime's threads spin.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what the JSON file holds.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the JSON file holds.")] = False,
    as_json: Annotated[Path, typer.Option("--json", help="Where the rows go, after each group.")] = Path(
        "bench/results/decode.json"
    ),
    build: Annotated[Path, typer.Option(help="Folder for bundles and CTranslate2 models.")] = Path(
        "build/bench/decode"
    ),
) -> None:
    """Measure a part of the grid, print the table, add the rows to the JSON file."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        grid = choose_grid(
            FULL if full else QUICK,
            models=model,
            precisions=precision,
            sentences=sentences,
            beams=beam,
            attention=attention,
            threads=threads,
        )
        machine = describe_machine()
        versions = cast("dict[str, str]", machine.pop("versions"))
        versions["ctranslate2"] = importlib.metadata.version("ctranslate2")
        command = cast("list[str]", machine.pop("command"))
        results = Results(as_json, machine, versions, command, fresh=fresh)
        effort = Effort(rounds=rounds or (15 if full else 7), seconds=seconds, spinning=spinning)
        _measure(grid, results, effort, checkpoint, build, resume=resume, console=console)
    except LimelightError as error:
        console.print(f"[red]error:[/red] {error}")
        raise typer.Exit(1) from None
    console.print(result_table(results.rows), f"{len(results.rows)} rows in {as_json}")


def _measure(
    grid: Grid, results: Results, effort: Effort, checkpoint: Path, build: Path, *, resume: bool, console: Console
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(grid.groups()) * effort.rounds)

        def tell(what: str) -> None:
            progress.update(task, description=what)

        prepared = {name: _prepare(name, checkpoint, build, tell) for name in grid.models}
        for done, asked in enumerate(grid.groups()):
            found = prepared[asked.model]
            group = Group(**(asked.__dict__ | {"model": found.name}))
            cells = grid.cells(group)
            if not (resume and results.has(cells)):
                tell(
                    f"{group.model}, {group.precision}, {group.sentences} together, beam {group.beam}, "
                    f"{group.threads} thread(s)"
                )
                results.add(measure_group(group, cells, found, effort, lambda: progress.advance(task)))
                results.save()
            progress.update(task, completed=(done + 1) * effort.rounds)


def _prepare(name: str, checkpoint: Path, build: Path, told: Callable[[str], None]) -> Prepared:
    if name == "trained":
        return prepare_trained(checkpoint, build / f"trained-{checkpoint.resolve().name}", told)
    return prepare_random(SIZES[name], build / name, told)


if __name__ == "__main__":
    typer.run(main)
