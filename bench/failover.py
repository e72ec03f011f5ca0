"""Two replicas behind Envoy, one killed under load, one told to stop: what is lost, as `make failover`.

    python -m bench.failover --rounds 3
    python -m bench.failover --rounds 1 --without-retries      the negative control, which must fail

Callers ask without a pause through Envoy, as `deploy/envoy/envoy.yaml` configures it, for texts alone and for streams
of tokens. In every round one replica is killed while it has calls in its hands, and started again at the same address;
then the other is told to stop, as in a rolling restart, and started again. Every text alone must be answered, and as it
is when nothing befalls anybody; a stream may end with UNAVAILABLE where it had begun at the replica that was killed;
stopping may cost nothing at all.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.grid import commit
from bench.load.callers import MIDWAY, OK, TIMEOUT, Callers, Ends, Kind, answered
from bench.load.cells import percentile
from bench.load.envoy import Configuration, Envoy, proxied
from bench.load.fleet import Fleet, Replica
from bench.load.options import ServingOptions
from bench.load.servers import ROOT, ServerName
from bench.load.triton_server import free_port
from bench.load.workload import ModelName, prepare

HELD = 2
"""Calls that a replica must have in its hands before anything befalls it."""

RETRIES = "cluster.limelight.upstream_rq_retry"
"""Envoy's counter of tries beyond the first."""

SOURCES = 100
"""Texts that are asked for."""


class Event(StrEnum):
    """What befalls a replica."""

    NONE = "steady"
    KILLED = "killed"
    STOPPED = "stopped"


CUT_OFF = f"UNAVAILABLE{MIDWAY}"
"""End of a stream that had begun at a replica that is gone: nobody else can go on with it."""

ALLOWED = {(kind, event): {OK} for kind in Kind for event in Event} | {(Kind.STREAM, Event.KILLED): {OK, CUT_OFF}}
"""How calls may end."""


@dataclass
class Phase:
    """A stretch of time in which one thing befell one replica, from then until it answered again.

    Attributes:
        event: that befell it.
        ends: of the calls that ended meanwhile.
        retried: tries of a call beyond its first, as Envoy counts them.
        noticed: seconds until Envoy sent it nothing any more; None where nothing befell any.
        back: seconds from its new start until it had answered again; None likewise.
        status: with which it ended; None likewise.
    """

    event: Event
    ends: Ends = field(default_factory=Ends)
    retried: int = 0
    noticed: float | None = None
    back: float | None = None
    status: int | None = None


class Failover:
    """What befalls replicas under load.

    Args:
        fleet: the replicas.
        envoy: in front of them.
        callers: who ask it.
        steady: seconds between two events.
    """

    def __init__(self, fleet: Fleet, envoy: Envoy, callers: Callers, steady: float) -> None:
        self._fleet, self._envoy, self._callers, self._steady = fleet, envoy, callers, steady
        self.phases: list[Phase] = []

    def run(self, rounds: int, tell: Callable[[Event], None]) -> list[Phase]:
        """So many rounds; returns what was seen in every phase, each of which is told of when it begins."""
        for event in [*(Event.NONE, Event.KILLED, Event.NONE, Event.STOPPED) * rounds, Event.NONE]:
            tell(event)
            with self._phase(event) as phase:
                if event is Event.NONE:
                    self._callers.wait(self._steady)
                else:
                    self._befall(0 if event is Event.KILLED else 1, phase)
        return self.phases

    @contextmanager
    def _phase(self, event: Event) -> Iterator[Phase]:
        phase, before = Phase(event), self._envoy.counter(RETRIES)
        self._callers.ends = phase.ends
        self.phases.append(phase)
        yield phase
        phase.retried = self._envoy.counter(RETRIES) - before

    def _befall(self, index: int, phase: Phase) -> None:
        envoy, process, port = self._envoy, self._fleet.running[index].process, self._fleet.replicas[index].port
        envoy.until(f"{HELD} calls in the hands of {port}", lambda: envoy.host(port).active >= HELD)
        if phase.event is Event.KILLED:
            process.kill()
        else:
            process.terminate()
        phase.noticed = envoy.until(f"no calls for {port}", lambda: not envoy.host(port).healthy)
        phase.status = process.wait(TIMEOUT)
        before, begun = envoy.host(port).answered, time.monotonic()
        self._fleet.restart(index)
        envoy.until(f"an answer from {port} again", lambda: envoy.host(port).answered > before)
        phase.back = time.monotonic() - begun
        self._callers.wait(0)


def judged(phases: Sequence[Phase], streams: int) -> list[str]:
    """What is wrong with it.

    Args:
        phases: what was seen.
        streams: callers of streams: so many can at most be in the hands of a replica.
    """
    failures = []
    for phase in phases:
        for kind, counts in phase.ends.counts.items():
            for end in sorted(set(counts) - ALLOWED[kind, phase.event]):
                said = phase.ends.said.get(end, "")
                failures.append(f"{phase.event}: {counts[end]} {kind} calls ended with {end} ({said})")
            if not counts[OK]:
                failures.append(f"{phase.event}: no {kind} call was answered")
        if phase.ends.counts[Kind.STREAM][CUT_OFF] > streams:
            failures.append(f"{phase.event}: more streams were cut off than were in the replica's hands")
        if phase.event is Event.STOPPED and phase.status != 0:
            failures.append(f"{phase.event}: the replica ended with status {phase.status}")
    if not any(phase.retried for phase in phases if phase.event is Event.KILLED):
        failures.append("no call was tried again: nothing was in the hands of a killed replica")
    return failures


def failover(
    bundle: Path,
    sources: Sequence[str],
    *,
    rounds: int,
    steady: float,
    callers: dict[Kind, int],
    retries: bool = True,
    tell: Callable[[Event], None] = lambda event: None,
) -> list[Phase]:
    """Start two replicas and Envoy, and see what becomes of calls while replicas go and come.

    Args:
        bundle: that they serve.
        sources: what is asked.
        rounds: of one replica killed and one stopped.
        steady: seconds between these.
        callers: at a time, of each kind.
        retries: Envoy may try again, as it is configured to.
        tell: told of every phase that begins.

    Raises:
        LoadError: a process did not do its part.
    """
    about: dict[str, Any] = {"python": Path(sys.executable), "model": bundle, "options": ServingOptions()}
    replicas = [Replica(name=ServerName.LIMELIGHT, port=free_port(), **about) for _ in range(2)]
    configuration = Configuration()
    configuration.between([replica.port for replica in replicas])
    if not retries:
        configuration.without_retries()
    with TemporaryDirectory() as temporary, TemporaryDirectory() as own, Fleet(replicas, Path(own)).started() as fleet:
        asked = answered(f"127.0.0.1:{replicas[0].port}", sources)
        with (
            proxied(configuration, Path(temporary)) as envoy,
            Callers(f"127.0.0.1:{envoy.port}", asked, callers) as asking,
        ):
            return Failover(fleet, envoy, asking, steady).run(rounds, tell)


def summary(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """All phases of each event together, as the JSON has them."""
    rows = []
    for event in Event:
        those = [phase for phase in phases if phase.event is event]
        latencies = [latency for phase in those for latency in phase.ends.latencies]
        rows.append(
            {
                "event": event,
                "times": len(those),
                "ends": {kind: dict(sum((phase.ends.counts[kind] for phase in those), Counter())) for kind in Kind},
                "retried": sum(phase.retried for phase in those),
                "noticed": [phase.noticed for phase in those if phase.noticed is not None],
                "back": [phase.back for phase in those if phase.back is not None],
                "status": [phase.status for phase in those if phase.status is not None],
                "unary_p50": percentile(latencies, 0.5),
                "unary_longest": percentile(latencies, 1.0),
            }
        )
    return rows


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Of one replica killed and one stopped.")] = 3,
    steady: Annotated[float, typer.Option(min=0.1, help="Seconds between these.")] = 3.0,
    unary: Annotated[int, typer.Option(min=1, help="Callers for texts alone.")] = 8,
    streams: Annotated[int, typer.Option(min=1, help="Callers for streams.")] = 4,
    without_retries: Annotated[bool, typer.Option(help="Envoy tries every call once: this must fail.")] = False,
    as_json: Annotated[Path, typer.Option("--json", help="Where to.")] = Path("bench/results/failover.json"),
) -> None:
    """Kill and stop replicas of the shipped model under load, and judge what becomes of the calls."""
    console = Console(stderr=True)
    workload = prepare(ModelName.G2P_EN, ROOT / "build" / "load", reuse=True)
    with console.status("starting") as status:
        phases = failover(
            workload.model_of(ServerName.LIMELIGHT, "fp32"),
            workload.sources[:SOURCES],
            rounds=rounds,
            steady=steady,
            callers={Kind.UNARY: unary, Kind.STREAM: streams},
            retries=not without_retries,
            tell=status.update,
        )
    rows, failures = summary(phases), judged(phases, streams)
    Console().print(table(rows))
    report = {
        "machine": machine.describe_machine(),
        "commit": commit(),
        "command": ["bench.failover", *sys.argv[1:]],
        "callers": {"unary": unary, "stream": streams},
        "phases": rows,
        "failures": failures,
    }
    as_json.parent.mkdir(parents=True, exist_ok=True)
    as_json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if failures:
        console.print(f"[bold red]failed:[/bold red] {'; '.join(failures)}")
        raise typer.Exit(1)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For people."""
    made = Table(title="Two replicas behind Envoy", box=SIMPLE_HEAD)
    left = {"replica", "calls", "otherwise"}
    for header in ("replica", "calls", "OK", "otherwise", "retried", "back", "longest"):
        made.add_column(header, justify="left" if header in left else "right", no_wrap=header != "otherwise")
    for row in rows:
        about = [row["event"] if row["event"] is Event.NONE else f"{row['event']} x {row['times']}"]
        figures = [f"{row['retried']:,}", f"{max(row['back']):.1f} s" if row["back"] else ""]
        figures.append(f"{1000 * row['unary_longest']:,.0f} ms")
        for kind, ends in row["ends"].items():
            others = [f"{count:,} {end}" for end, count in ends.items() if end != OK]
            made.add_row(*about, kind, f"{ends.get(OK, 0):,}", "\n".join(others), *figures)
            about, figures = [""], []
    return made


if __name__ == "__main__":
    typer.run(main)
