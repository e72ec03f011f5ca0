"""What very many connections and floods of resets do to good clients: fault 30, as `make crowd`.

    python -m bench.crowd --connections 10000 --seconds 20

Good clients ask a server at a steady rate; beside them newcomers come all the time, each with a connection of its own
for one question. They are looked at while nobody else is there, while a crowd is (see `bench.load.crowds`), and
afterwards. Judged are: that every good client and nearly every newcomer is answered; that once the crowd has gone, the
processor is idle, open files and gauges are back, and so is most of the memory, of a second crowd too; that the server
stops when told to. How much slower answers come is told, not judged: that says as much of the machine.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.request import urlopen

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.load.accounts import memory, processor_seconds
from bench.load.cells import percentile
from bench.load.crowds import Kind
from bench.load.newcomers import Newcomers
from bench.load.options import ServingOptions
from bench.load.servers import ROOT, Client, LoadError, Running, Server, ServerName, share_processors, started
from bench.load.workload import ModelName, prepare
from bench.soak import GAUGES, free_port

NEWCOMERS = 0.95
"""Share of them that is to be answered at the first try."""

IDLE = 0.05
"""Most of one processor that a server may take which nobody asks."""

LEFT = 128.0
"""Megabytes more than before that may be left of two crowds: pages that are free, and not given back."""

FILES = 4
"""Open files that may be left: a connection of a good client more, a scrape."""

PATIENCE = 30.0
"""Seconds in which a server is to be as before."""

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Crowded(Server):
    """The server that is asked.

    Attributes:
        metrics_port: where it is scraped.
        more: options of its command.
    """

    metrics_port: int
    more: tuple[str, ...] = ()

    def command(self, folder: Path) -> list[str]:
        """See `Server`."""
        return [*super().command(folder), f"--metrics-port={self.metrics_port}", "--log-level=warning", *self.more]


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """A crowd that a server is to survive.

    Attributes:
        title: in the table.
        kind: of crowd.
        count: its connections.
        options: of the server's command, other than its defaults.
    """

    title: str
    kind: Kind
    count: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """What a server holds.

    Attributes:
        files: that it has open.
        megabytes: resident.
        gauges: of what must be 0 when nobody asks.
    """

    files: int
    megabytes: float
    gauges: dict[str, float]


def state(server: Crowded, running: Running) -> State:
    """Look at it."""
    with urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    samples = {one.name: one.value for family in text_string_to_metric_families(text) for one in family.samples}
    files = len(list(Path(f"/proc/{running.process.pid}/fd").iterdir()))
    return State(files, memory(running.process.pid).resident, {name: samples[name] for name in GAUGES})


def settled(server: Crowded, running: Running, before: State) -> State:
    """Its state once it is as before, or has not been for too long."""
    end = time.monotonic() + PATIENCE
    while True:
        found = state(server, running)
        if time.monotonic() > end or (found.files <= before.files + FILES and not any(found.gauges.values())):
            return found
        time.sleep(0.5)


def idle_share(running: Running, seconds: float) -> float:
    """Of one processor, that it takes now."""
    before = processor_seconds(running.process.pid)
    time.sleep(seconds)
    return (processor_seconds(running.process.pid) - before) / seconds


@contextmanager
def gathered(crowd: Crowd, port: int, processors: frozenset[int]) -> Iterator[Figures]:
    """The crowd, as long as this lasts; afterwards what it did.

    Args:
        crowd: which.
        port: of the server.
        processors: where the crowd runs.

    Raises:
        LoadError: it did not come.
    """
    command = [sys.executable, "-m", "bench.load.crowds", crowd.kind, str(port), str(crowd.count)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(process.pid, processors)
    did: Figures = {}
    with process:
        if process.stdin is None or process.stdout is None or process.stdout.readline() != "ready\n":
            raise LoadError("the crowd did not come: its error is above")
        begun = time.monotonic()
        yield did
        process.stdin.close()
        line = process.stdout.readline()
        if not line:
            raise LoadError("the crowd has ended: its error is above")
        did |= json.loads(line) | {"seconds": time.monotonic() - begun}


class Measuring:
    """Good clients and newcomers of one server.

    Args:
        server: that is asked.
        running: the same, as it runs.
        client: the load generator.
        sources: what is asked.
        rate: questions a second.
        processors: where the crowd runs.
    """

    def __init__(
        self,
        server: Crowded,
        running: Running,
        client: Client,
        sources: Sequence[str],
        rate: float,
        processors: frozenset[int],
    ) -> None:
        self._server, self._running, self._client, self._sources, self._rate = server, running, client, sources, rate
        self._processors = processors

    def good(self, seconds: float) -> Figures:
        """What they get."""
        newcomers, spent = Newcomers(), processor_seconds(self._running.process.pid)
        with newcomers.coming(self._running.port, self._sources[0]):
            found = self._client.run("open", rate=self._rate, seconds=seconds, seed=1, deadline=PATIENCE, keep=0)
        spent = processor_seconds(self._running.process.pid) - spent
        come = len(newcomers.latencies) + newcomers.errors.total()
        return {
            "answered": len(found["latencies"]),
            "errors": found["errors"],
            **_times("", found["latencies"]),
            "newcomers": come,
            "newcomers_answered": len(newcomers.latencies) / come if come else 0.0,
            "newcomers_errors": dict(newcomers.errors),
            **_times("newcomers_", newcomers.latencies),
            "processor": spent / found["seconds"],
        }

    def run(self, crowd: Crowd, seconds: float) -> Figures:
        """Before, meanwhile, afterwards; and once more."""
        before = self.good(seconds)
        calm = state(self._server, self._running)
        with gathered(crowd, self._running.port, self._processors) as did:
            there = state(self._server, self._running)
            during = self.good(seconds)
        after = settled(self._server, self._running, calm)
        with gathered(crowd, self._running.port, self._processors):
            again = self.good(seconds / 4)
        twice = settled(self._server, self._running, calm)
        return {
            "title": crowd.title,
            "crowd": {"kind": crowd.kind, "count": crowd.count, **did},
            "options": list(crowd.options),
            "rate": self._rate,
            "before": before,
            "during": during,
            "again": again,
            "after": self.good(seconds),
            "states": {"before": asdict(calm), "during": asdict(there), "after": asdict(after), "again": asdict(twice)},
            "idle": idle_share(self._running, min(seconds, 3.0)),
        }


def _times(of: str, latencies: Sequence[float]) -> Figures:
    return {f"{of}p50": percentile(latencies, 0.5), f"{of}p99": percentile(latencies, 0.99)}


def judged(found: Figures, status: int) -> list[str]:
    """What is wrong with it.

    Args:
        found: of `Measuring.run`.
        status: that the server ended with.
    """
    failures = []
    for when in ("before", "during", "again", "after"):
        if errors := found[when]["errors"]:
            failures.append(f"{when}: good clients got {', '.join(f'{code} ({n})' for code, n in errors.items())}")
        # The second crowd comes all at once and stays for a moment only, in which there is no room yet.
        if when != "again" and (share := found[when]["newcomers_answered"]) < NEWCOMERS:
            failures.append(f"{when}: {100 * share:.0f} % of the newcomers were answered")
    states = found["states"]
    for when in ("after", "again"):
        if states[when]["files"] > states["before"]["files"] + FILES:
            failures.append(f"{when}: {states[when]['files']} open files, before {states['before']['files']}")
        failures += [f"{when}: {name} is {value}" for name, value in states[when]["gauges"].items() if value]
    left = states["again"]["megabytes"] - states["before"]["megabytes"]
    if left > LEFT:
        failures.append(f"{left:.0f} MB of memory are left of two crowds, {LEFT:.0f} are allowed")
    if found["idle"] > IDLE:
        failures.append(f"it takes {100 * found['idle']:.0f} % of a processor while nobody asks")
    return failures + ([f"it ended with status {status}"] if status else [])


def crowded(server: Crowded, sources: Sequence[str], crowd: Crowd, *, rate: float, seconds: float) -> Figures:
    """Start a server, and see what a crowd does to it.

    Args:
        server: that is asked.
        sources: what good clients ask.
        crowd: that comes.
        rate: questions a second of good clients.
        seconds: that each part lasts.

    Raises:
        LoadError: a process did not do its part.
    """
    processors = share_processors(1)
    with TemporaryDirectory() as temporary, started(server, Path(temporary), processors) as running:
        client = Client(server, running.port, sources, processors)
        try:
            found = Measuring(server, running, client, sources, rate, processors.generator).run(crowd, seconds)
        finally:
            client.close()
        if running.process.poll() is not None:
            raise LoadError(f"the server has ended; its log ends so:\n{running.tail()}")
        running.process.terminate()
        return found | {"failures": judged(found, running.process.wait(PATIENCE))}


def table(rows: Sequence[Figures]) -> Table:
    """For people; times in milliseconds."""
    made = Table("crowd", "", "good clients", "p50", "p99", "newcomers", "p50", "p99", "processor", "files", "MB")
    for column in made.columns[2:]:
        column.justify = "right"
    for row in rows:
        for when in ("before", "during", "after"):
            part, held = row[when], row["states"][when]
            made.add_row(
                row["title"] if when == "before" else "",
                when,
                str(part["answered"]),
                *(f"{1000 * part[name]:.0f}" for name in ("p50", "p99")),
                f"{100 * part['newcomers_answered']:.0f} %",
                *(f"{1000 * part[f'newcomers_{name}']:.0f}" for name in ("p50", "p99")),
                f"{100 * part['processor']:.0f} %",
                str(held["files"]),
                f"{held['megabytes']:.0f}",
            )
    return made


def main(
    connections: Annotated[int, typer.Option(min=1, help="Idle ones of a crowd.")] = 10_000,
    floods: Annotated[
        int, typer.Option(min=1, help="Connections that reset calls; then ten times as many, of 100 calls each.")
    ] = 4,
    rate: Annotated[float, typer.Option(min=1, help="Questions a second of good clients.")] = 50.0,
    seconds: Annotated[float, typer.Option(min=1, help="That each part lasts.")] = 20.0,
    as_json: Annotated[Path, typer.Option("--json", help="Where to.")] = Path("bench/results/crowd.json"),
) -> None:
    """Let crowds come to a server of the shipped model, one after the other, and judge what becomes of the rest."""
    workload = prepare(ModelName.G2P_EN, ROOT / "build" / "load", reuse=True)
    crowds = [
        Crowd(title="idle, by default", kind=Kind.IDLE, count=connections),
        Crowd(
            title="idle, all let in",
            kind=Kind.IDLE,
            count=connections,
            options=(f"--connections={connections * 7 // 5}",),
        ),
        Crowd(title="slow prefaces", kind=Kind.SILENT, count=connections // 2),
        Crowd(title=f"resets, {floods}", kind=Kind.RESETS, count=floods),
        Crowd(
            title=f"resets, {10 * floods}, few calls on each",
            kind=Kind.RESETS,
            count=10 * floods,
            options=("--connection-calls=100",),
        ),
    ]
    rows = []
    with Console(stderr=True).status("") as status:
        for crowd in crowds:
            status.update(f"{crowd.title}: {crowd.count:,} connections")
            server = Crowded(
                name=ServerName.LIMELIGHT,
                python=Path(sys.executable),
                model=workload.model_of(ServerName.LIMELIGHT, "fp32"),
                options=ServingOptions(longest=workload.longest),
                metrics_port=free_port(),
                more=crowd.options,
            )
            rows.append(crowded(server, workload.sources, crowd, rate=rate, seconds=seconds))
    Console(width=120).print(table(rows))
    report = {"machine": machine.describe_machine(), "seconds": seconds, "crowds": rows}
    as_json.parent.mkdir(parents=True, exist_ok=True)
    as_json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if failures := [f"{row['title']}: {failure}" for row in rows for failure in row["failures"]]:
        typer.echo(f"failed: {'; '.join(failures)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
