"""Fuzz a server: a grammar over both APIs, frames and bytes, and see that nothing comes of it; `make fuzz`.

    python -m bench.fuzz                                a million messages
    python -m bench.fuzz --messages 20000 --seed 7
    python -m bench.fuzz --fault forgets --fault tells  the negative control: faults that must be found
    python -m bench.fuzz --replay build/fuzz/findings/0000-call.json

A server of a tiny model is sent requests that are right, nearly right, or nothing of the sort, over both APIs and the
administrative port; and frames and bytes over connections of their own. Whatever a request has become, what the API
promises says how it may end. Judged besides: that the process lives; that health says so, and soon; that somebody else
who asks all the while is answered as before; that the gauges go back to 0 after every round; that memory stays; that
the log has nothing but the server's own lines. What is wrong is written to files, to be played again.
"""

import asyncio
import json
import shutil
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from bench import machine
from bench.fuzz.findings import Findings, read_finding
from bench.fuzz.fuzzing import Fuzzing, Seen, by_service
from bench.fuzz.subject import Subject, prepare
from bench.fuzz.target import FAULTS, Target
from bench.fuzz.watch import Bounds
from bench.load.options import ServingOptions
from bench.load.servers import ROOT, ServerName, share_processors, started
from bench.soak import free_port, growth

FOLDER = ROOT / "build" / "fuzz"

QUEUE = 8192
"""Requests that may wait: no right one may be refused for want of room."""

TIMES = 3
"""That a finding is played again."""


def fuzz(
    subject: Subject,
    findings: Findings,
    messages: int,
    seed: int = 0,
    *,
    bounds: Bounds | None = None,
    faults: tuple[str, ...] = (),
    replay: Path | None = None,
    tell: Any = lambda seen: None,
) -> Seen:
    """Start a server, fuzz it, stop it.

    Args:
        subject: what it serves.
        findings: where what is wrong goes.
        messages: of calls, and frames.
        seed: of all that is random.
        bounds: what the server may take.
        faults: that the server has.
        replay: a finding that is played again instead.
        tell: told now and then how far it is.

    Raises:
        LoadError: the server did not start.
    """
    with TemporaryDirectory() as temporary, TemporaryDirectory() as models:
        shelf = Path(models) / "models"
        subject.shelve(shelf)
        target = Target(
            name=ServerName.LIMELIGHT,
            python=Path(sys.executable),
            model=shelf,
            options=ServingOptions(queue=QUEUE),
            metrics_port=free_port(),
            admin_port=free_port(),
            faults=faults,
        )
        with started(target, Path(temporary), share_processors(0)) as running:

            async def run() -> Seen:
                fuzzing = Fuzzing(target, running, subject, findings, bounds)
                asyncio.get_running_loop().add_signal_handler(signal.SIGINT, fuzzing.stop)
                if replay is not None:
                    return await fuzzing.again(*read_finding(replay), TIMES)
                return await fuzzing.run(messages, seed, tell)

            return asyncio.run(run())


def report(seen: Seen, findings: Findings, seed: int) -> dict[str, Any]:
    """All of it, for JSON."""
    looks = seen.looks
    return {
        "machine": machine.describe_machine(),
        "command": ["bench.fuzz", *sys.argv[1:]],
        "seed": seed,
        "seconds": seen.seconds,
        "stopped early": seen.stopped,
        "total": seen.total,
        "messages": {"total": seen.messages.total(), **dict(seen.messages), "by verdict": dict(seen.rights)},
        "calls": {"total": seen.calls.total(), **by_service(seen.calls)},
        "frames": {"total": seen.frames.total(), **dict(seen.frames.most_common())},
        "statuses in frames": dict(seen.statuses.most_common()),
        "slowest call": seen.slowest,
        "health": {"looks": looks.health, "slowest": looks.slowest_health},
        "canary": {"answers": looks.canary, "slowest": looks.slowest_canary},
        "lines of the log": looks.lines,
        "megabytes": [round(one, 1) for one in looks.memory[:: max(1, len(looks.memory) // 100)]],
        "peak": looks.peak,
        "growth": growth(looks.memory),
        "findings": findings.told,
    }


def main(
    messages: Annotated[int, typer.Option(min=100, help="Of calls, and frames, together.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    replay: Annotated[Path | None, typer.Option(exists=True, help="A finding to play again instead.")] = None,
    fault: Annotated[list[str] | None, typer.Option(help=f"That the server has: {', '.join(FAULTS)}.")] = None,
    as_json: Annotated[Path, typer.Option("--json", help="Where to.")] = Path("bench/results/fuzz.json"),
) -> None:
    """Fuzz a server, and judge it."""
    findings = Findings(FOLDER / ("replayed" if replay else "findings"))
    shutil.rmtree(findings.folder, ignore_errors=True)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("making the model", total=messages)
        subject = prepare(FOLDER / "tiny")

        def tell(seen: Seen) -> None:
            about = (
                f"{seen.messages.total():,} messages, {seen.frames.total():,} frames, {len(findings.counts)} findings"
            )
            progress.update(task, completed=seen.total, description=about)

        seen = fuzz(subject, findings, messages, seed, faults=tuple(fault or ()), replay=replay, tell=tell)
    if replay is None:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps(report(seen, findings, seed), indent=1) + "\n", encoding="utf-8")
        rate = seen.total / max(seen.seconds, 1e-9)
        early = ", stopped early" if seen.stopped else ""
        typer.echo(f"{seen.total:,} messages and frames in {seen.seconds:.0f} s, {rate:.0f} a second{early}; {as_json}")
    for line in findings.told:
        typer.echo(line, err=True)
    if findings.counts:
        typer.echo(f"failed: {len(findings.counts)} findings, in {findings.folder}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
