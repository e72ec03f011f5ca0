"""Limelight's server under load, beside CTranslate2 behind grpc.aio and tritonserver: same weights, same arrivals.

    python -m bench.serve_load --json FILE

Requests arrive in an open loop (Poisson, the same arrivals for every server), at rates that rise until goodput falls,
and once in a closed loop. A latency counts from when its request was due. Each server is started alone, in a process
of its own, in turn, for several rounds; medians count. Where the load generator was the bottleneck, the figure is
marked invalid. This process only starts others and reads /proc: it imports neither grpc nor onnxruntime.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bench import machine
from bench.load.cells import Cell, Row, summarise
from bench.load.options import Precision, ServingOptions
from bench.load.report import loads_table, summary_table
from bench.load.servers import ROOT, LoadError, Processors, Server, ServerName, run_tool, share_processors
from bench.load.sweep import LoadOptions, visit
from bench.load.workload import ModelName, Workload, prepare, prepare_peer, require

BUILD = ROOT / "build" / "load"
"""Where the peers' environments and the models are."""


PACKAGES = (*machine.PACKAGES, "protobuf", "ctranslate2", "nvidia-pytriton", "tritonclient")
"""Whose versions matter, in any of the environments."""

OBJECTIVE_MS = {ModelName.G2P_EN: 100.0, ModelName.RANDOM: 1000.0}
"""Latency objectives: what 64 callers at a time leave within reach of the better servers, and not of all."""

PATIENCE = 10.0
"""After so many times the objective a request is given up."""

WIDTH = 140
"""Columns of the tables in a file."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        servers: which, in the order of the first round.
        rounds: how often each is started.
        processors: who runs where.
        load: how the load is made, for each model.
        reuse: take the models that the last run made.
    """

    servers: Sequence[ServerName]
    rounds: int
    processors: Processors
    load: Mapping[ModelName, LoadOptions]
    reuse: bool


def measure(plan: Plan, workload: Workload, serving: ServingOptions, console: Console) -> list[Row]:
    """All rows of one model in one precision."""
    name = workload.name
    with console.status(f"preparing {name} in {serving.precision}"):
        servers = [_server(server, workload, serving, reuse=plan.reuse) for server in plan.servers]
    cells: list[Cell] = []
    load = plan.load[name]
    with console.status("starting") as status:
        for turn in range(plan.rounds):
            # Another one first in every round: what the time of day does to one, it does to the others.
            for server in servers[turn % len(servers) :] + servers[: turn % len(servers)]:
                status.update(f"{name} {serving.precision}, round {turn + 1} of {plan.rounds}: {server.name}")
                cells += visit(server, workload, load, plan.processors, turn, lambda cell: _tell(console, cell))
    about = {"model": name, "precision": serving.precision, "threads": serving.threads, "beam": serving.beam}
    return summarise(cells, about | {"seconds": load.seconds})


def _server(name: ServerName, workload: Workload, serving: ServingOptions, *, reuse: bool) -> Server:
    python = _python(name)
    if name is ServerName.CTRANSLATE2:
        prepare_peer(workload, python, serving.precision, reuse=reuse)
    return Server(name=name, python=python, model=workload.model_of(name, serving.precision), options=serving)


def _python(name: ServerName) -> Path:
    if name is ServerName.LIMELIGHT:
        return Path(sys.executable)
    return require(BUILD / f"{name}-environment" / "bin" / "python", name)


def _tell(console: Console, cell: Cell) -> None:
    load = f"{cell.load:g}/s" if cell.mode == "open" else f"{cell.load:g} callers"
    mark = "" if cell.valid else "  (generator too late or too busy)"
    console.print(f"{cell.server:12} {load:>12}: {cell.goodput:7.1f} good answers a second{mark}", style="dim")


def _versions(servers: Sequence[ServerName]) -> dict[str, dict[str, str]]:
    """What is installed in each server's environment, where its client runs too."""
    found = {}
    for name in servers:
        listed = json.loads(run_tool(_python(name), "pip", "list", "--format=json", "--disable-pip-version-check"))
        every = {package["name"]: package["version"] for package in listed}
        found[str(name)] = {package: every[package] for package in PACKAGES if package in every}
    return found


def _write(
    path: Path, where: dict[str, object], plan: Plan, versions: dict[str, dict[str, str]], rows: list[Row]
) -> None:
    """Write the JSON."""
    who = {"server": sorted(plan.processors.server), "generator": sorted(plan.processors.generator)}
    about = {key: value for key, value in where.items() if key not in ("versions", "command")}
    content = {
        "machine": about | {"processors": who},
        "versions": versions,
        "command": where["command"],
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def run(plan: Plan, models: Sequence[ModelName], servings: Sequence[ServingOptions], as_json: Path | None) -> None:
    """Measure, print the tables, write the JSON.

    Raises:
        LoadError: a process did not do its part.
    """
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    where = machine.describe_machine()
    versions = _versions(plan.servers)
    rows: list[Row] = []
    for model in models:
        with console.status(f"exporting {model}"):
            workload = prepare(model, BUILD, reuse=plan.reuse)
        for serving in servings:
            found = measure(plan, workload, serving, console)
            title = f"{model}, {serving.precision}, {serving.threads} thread(s), {where['processor']}"
            console.print(loads_table(found, title), summary_table(found, title))
            rows += found
            if as_json is not None:  # what was measured so far, should the rest be interrupted
                _write(as_json, where, plan, versions, rows)


def main(
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    models: Annotated[list[ModelName] | None, typer.Option("--model", help="By default g2p-en.")] = None,
    precisions: Annotated[list[Precision] | None, typer.Option("--precision", help="By default fp32.")] = None,
    servers: Annotated[list[ServerName] | None, typer.Option("--server", help="By default all three.")] = None,
    objective: Annotated[
        float | None, typer.Option(min=1, help="Milliseconds within which an answer is good; by default as the model.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of each load.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often each server is started; medians count.")] = 3,
    callers: Annotated[int, typer.Option(min=1, help="Concurrent callers of the closed loop.")] = 64,
    first_rate: Annotated[
        float | None, typer.Option(min=0.1, help="Requests a second at first; by default as the closed loop tells.")
    ] = None,
    factor: Annotated[float, typer.Option(min=1.01, help="From one rate to the next.")] = 1.25,
    most_rates: Annotated[int, typer.Option(min=1, help="Rates tried at most.")] = 20,
    beam: Annotated[int, typer.Option(min=1, max=16, help="Hypotheses kept at a time.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads that compute, in every server.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Most rows decoded together, in every server.")] = 64,
    aside: Annotated[int, typer.Option(min=0, help="Processors set aside for the load generator; 0 for none.")] = 1,
    reuse: Annotated[bool, typer.Option("--reuse", help="Take the models that the last run made.")] = False,
) -> None:
    """Measure servers under load."""
    load = {
        model: LoadOptions(
            objective=(objective or usual) / 1000,
            deadline=PATIENCE * (objective or usual) / 1000,
            seconds=seconds,
            callers=callers,
            first_rate=first_rate,
            factor=factor,
            most_rates=most_rates,
        )
        for model, usual in OBJECTIVE_MS.items()
    }
    names = servers or list(ServerName)
    plan = Plan(servers=names, rounds=rounds, processors=share_processors(aside), load=load, reuse=reuse)
    servings = [
        ServingOptions(precision=precision, threads=threads, beam=beam, rows=rows)
        for precision in precisions or [Precision.FP32]
    ]
    try:
        run(plan, models or [ModelName.G2P_EN], servings, as_json)
    except LoadError as error:
        Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
