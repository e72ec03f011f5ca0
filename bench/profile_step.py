"""What one decoder step consists of: time and number of calls of each operator, before our rewrites and after.

    python -m bench.profile_step

"traced" is the decoder as PyTorch's exporter leaves it, but for its outputs; "fp32" and "int8" are a bundle's. Each
runs by itself under ONNX Runtime's profiler, on the same random tokens, keys and values. That makes every call a little
dearer, so the last row, measured without it and in turns, is what a step takes.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import typer
from rich.console import Console
from rich.table import Table

from bench.decode_models import SIZES, Prepared, prepare_random
from bench.machine import describe_machine
from export.graphs import ExampleSizes, decoder_graph
from export.manifest import GraphSpec, read_manifest
from export.onnx_writer import finish, save_graphs, trace
from export.runtime import RuntimeOptions
from model.checkpoint import load_checkpoint
from model.steps import Array

SOURCE, PAST = 20, 24
"""Tokens of a source, and those generated so far: the middle of a sentence."""

RUNS = 60
SHOWN = 14
"""Operators with rows of their own; the rest is summed."""


@dataclass(frozen=True)
class Profile:
    """Microseconds and calls of each operator in one step, and microseconds of a step that nobody watches."""

    microseconds: Mapping[str, float]
    calls: Mapping[str, float]
    step: float


def feeds(graph: GraphSpec, sentences: int, beams: int, vocabulary: int) -> dict[str, Array]:
    """Inputs of a step: `sentences` of `beams` rows each, none of which sees the others."""
    random = np.random.default_rng(0)
    sizes = {"batch": sentences, "query": beams, "source": SOURCE, "past": PAST * beams}

    def value(spec: Any) -> Array:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
        if spec.role == "top":
            return np.array([beams + 3])
        if spec.role == "wanted":
            return np.array(False)
        if spec.role == "new_visible":
            return np.broadcast_to(np.eye(beams, dtype=bool), shape).copy()
        if spec.dtype == "bool":
            return np.ones(shape, bool)
        if spec.dtype == "int64":
            return random.integers(4, PAST if spec.role == "positions" else vocabulary, shape)
        return random.normal(size=shape).astype(np.float32)

    return {spec.name: value(spec) for spec in graph.inputs}


def session(path: Path, threads: int, profile: str = "") -> ort.InferenceSession:
    """A graph ready to run, watched if `profile` names a file."""
    options = RuntimeOptions(threads=threads).session_options()
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def watch(
    path: Path, inputs: Mapping[str, Array], threads: int, folder: Path
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Microseconds and calls a step, by operator."""
    watched = session(path, threads, str(folder / path.parent.name))
    outputs = [one.name for one in watched.get_outputs() if not one.name.endswith("attention")]
    for _ in range(RUNS):
        watched.run(outputs, dict(inputs))
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, float] = defaultdict(float)
    for event in json.loads(Path(watched.end_profiling()).read_text(encoding="utf-8")):
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"] / RUNS
            calls[event["args"]["op_name"]] += 1 / RUNS
    return spent, calls


def profile_all(
    graphs: Mapping[str, Path], inputs: Mapping[str, Array], threads: int, folder: Path
) -> dict[str, Profile]:
    """Every graph watched, and then timed in turns."""
    seen = {name: watch(path, inputs, threads, folder) for name, path in graphs.items()}
    sessions = {name: session(path, threads) for name, path in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(RUNS):
        for name, one in sessions.items():
            outputs = [output.name for output in one.get_outputs() if not output.name.endswith("attention")]
            begun = time.perf_counter()
            one.run(outputs, dict(inputs))
            times[name].append(1e6 * (time.perf_counter() - begun))
    return {name: Profile(*seen[name], statistics.median(times[name])) for name in graphs}


def profile_table(title: str, profiles: Mapping[str, Profile]) -> Table:
    """Operators by time."""
    table = Table(title=title)
    table.add_column("operator")
    for name in profiles:
        table.add_column(f"{name}, µs", justify="right")
        table.add_column("calls", justify="right")
    total: dict[str, float] = defaultdict(float)
    for profile in profiles.values():
        for name, spent in profile.microseconds.items():
            total[name] += spent
    shown = sorted(total, key=lambda name: -total[name])[:SHOWN]

    def add(what: str, operators: list[str]) -> None:
        cells = []
        for profile in profiles.values():
            cells.append(f"{sum(profile.microseconds.get(one, 0.0) for one in operators):,.0f}")
            cells.append(f"{sum(profile.calls.get(one, 0) for one in operators):.0f}")
        table.add_row(what, *cells)

    for one in shown:
        add(one, [one])
    add("the rest", [one for one in total if one not in shown])
    add("all", list(total))
    steps = [cell for profile in profiles.values() for cell in (f"{profile.step:,.0f}", "")]
    table.add_row("a step, not watched", *steps)
    return table


def as_traced(prepared: Prepared, folder: Path) -> Path:
    """The decoder without `export.optimise.optimise`; its best tokens are found by blocks all the same."""
    checkpoint = load_checkpoint(prepared.folder / "checkpoint")
    exported = decoder_graph(checkpoint.model, len(checkpoint.target), ExampleSizes())
    model = trace(exported)
    finish(model, exported)
    save_graphs(folder / "traced", {"decoder.onnx": model})
    return folder / "traced" / "decoder.onnx"


def main(
    model: Annotated[str, typer.Option(help="d256 or d512, see bench.decode.")] = "d256",
    threads: Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime.")] = 1,
    as_json: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = Path("bench/results/profile.json"),
    build: Annotated[Path, typer.Option(help="Folder of the models.")] = Path("build/bench/decode"),
) -> None:
    """Profile one step of 1 and of 32 sentences, greedy and with a beam of 4; print tables, write JSON."""
    console = Console()
    machine = describe_machine()
    prepared = prepare_random(SIZES[model], build / model, console.print)
    manifest = read_manifest(prepared.bundle)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        graphs = {"traced": as_traced(prepared, Path(scratch))}
        graphs |= {name: prepared.bundle / spec.decoder.file for name, spec in manifest.graphs.items()}
        for sentences, beams in ((1, 1), (32, 1), (32, 4)):
            inputs = feeds(manifest.graphs["fp32"].decoder, sentences, beams, manifest.target_vocabulary)
            profiles = profile_all(graphs, inputs, threads, Path(scratch))
            title = f"{prepared.name}: {sentences} sentence(s), {beams} row(s) each, {threads} thread(s)"
            console.print(profile_table(title, profiles))
            cell = {"model": prepared.name, "sentences": sentences, "beam": beams, "threads": threads}
            rows += [cell | {"graph": name} | profile.__dict__ for name, profile in profiles.items()]
    as_json.parent.mkdir(parents=True, exist_ok=True)
    as_json.write_text(json.dumps(machine | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    console.print(f"{len(rows)} profiles in {as_json}")


if __name__ == "__main__":
    typer.run(main)
