"""An hour of everything at once, and whether anything is left of it: fault 42, as `make soak`.

    python -m bench.soak --minutes 60
    python -m bench.soak --minutes 3 --leak 4096      the negative control: a server that leaks, which must be found

A server is asked for texts of random lengths with random options, alone, as streams and many at a time; some callers
give up midway, some send what must be refused; and now and then its model is swapped. Its metrics are looked at all the
time. From time to time nobody asks, until nothing is under way, and the model is swapped once more: what memory the
server has then is what it keeps, whatever answers it had in hand before, and however much its graphs took for them.
Judged are: that every call ends in a way that it may; that the memory at rest grows by less than 2 % in the second
half; that no row, request or call is left whenever nobody asks; that the last model is what is served; that it stops
when told to.
"""

import asyncio
import json
import shutil
import socket
import string
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from urllib.request import urlopen

import grpc
import numpy as np
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress

from bench import machine
from bench.load.accounts import memory
from bench.load.options import ServingOptions
from bench.load.servers import ROOT, LoadError, Running, Server, ServerName, share_processors, started
from bench.load.workload import ModelName, prepare
from bench.soak_calls import ENDS, Callers, Texts
from export.manifest import MANIFEST
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub

MOST_GROWTH = 0.02
"""Of the memory, from the beginning of the second half to the end."""

GAUGES = ("limelight_rows", "limelight_queue_length", "limelight_calls_in_flight")
"""What must be 0 when nobody asks."""

MANY = 12
"""Callers at a time."""

PATIENCE = 60.0
"""Seconds in which nothing may be left of what was asked, when nobody asks any more, and the new model is served."""

SETTLE = 5
"""Looks at the memory at rest, of which the least counts: a model that was swapped out still has to go."""

WORDS = Texts(string.ascii_lowercase + "'", 40, "K AE1 T")
"""As they are asked of the shipped model."""

LEAKING = """
import sys
from serve import service
from serve.cli import main

kept, answer = [], service.LimelightService._result

async def leak(*arguments):
    kept.append(b"x" * {size})
    return await answer(*arguments)

service.LimelightService._result = leak
main()
"""
"""`limelight`, with a server that keeps some bytes of every call."""


@dataclass(frozen=True, kw_only=True)
class Soaked(Server):
    """The server that is asked.

    Attributes:
        metrics_port: where it is scraped.
        texts: that it is asked for.
        swap_every: seconds, after which the model is swapped.
        rest_every: seconds, after which nobody asks for a moment.
        look_every: seconds, after which the server is looked at, and looks at its models.
        leak: bytes of every call that it keeps.
    """

    metrics_port: int
    swap_every: float = 60.0
    rest_every: float = 15.0
    look_every: float = 1.0
    texts: Texts = WORDS
    leak: int = 0

    def command(self, folder: Path) -> list[str]:
        """See `Server`."""
        python, *module = super().command(folder)[:3]
        program = ["-c", LEAKING.format(size=self.leak)] if self.leak else module
        return [
            python,
            *program,
            *super().command(folder)[3:],
            f"--metrics-port={self.metrics_port}",
            f"--poll={self.look_every}",
        ]

    def swapped(self, number: int) -> None:
        """Give the model another version, whole or not at all: the server will find it."""
        manifest = json.loads((self.model / MANIFEST).read_text(encoding="utf-8"))
        new = self.model / f".{MANIFEST}.new"
        new.write_text(json.dumps(manifest | {"version": str(number)}), encoding="utf-8")
        new.replace(self.model / MANIFEST)


@dataclass
class Seen:
    """What was seen of a server.

    Attributes:
        ends: how calls of each kind ended, counted.
        memory: megabytes, whenever nobody asked.
        busy: megabytes, at every look.
        metrics: of the last look, by name.
        left: gauges that were not 0 although nobody asked any more.
        swaps: how often the model was swapped.
        versions: that are served at the end.
    """

    ends: dict[str, Counter[str]]
    memory: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    swaps: int = 0
    versions: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """All that ended."""
        return sum(counts.total() for counts in self.ends.values())


def growth(megabytes: Sequence[float]) -> float:
    """By which share memory grew in the second half: the median slope (Theil-Sen), so that no single peak counts."""
    half = np.array(megabytes[len(megabytes) // 2 :])
    if len(half) < 2:
        return 0.0
    first, second = np.triu_indices(len(half), 1)
    slope = np.median((half[second] - half[first]) / (second - first))
    return float(slope * (len(half) - 1) / np.median(half))


def judged(seen: Seen) -> list[str]:
    """What is wrong with it."""
    failures = []
    for kind, counts in seen.ends.items():
        if unlike := sorted(set(counts) - ENDS[kind]):
            failures.append(f"{kind} calls ended with {', '.join(f'{code} ({counts[code]})' for code in unlike)}")
        if not counts:
            failures.append(f"there were no {kind} calls")
    grown = growth(seen.memory)
    if grown >= MOST_GROWTH:
        failures.append(f"memory grew by {100 * grown:.1f} % in the second half, {100 * MOST_GROWTH:.0f} are allowed")
    if seen.versions != [str(seen.swaps)]:
        failures.append(f"the versions {seen.versions} are served after {seen.swaps} swaps")
    failures += [f"{name} is not 0 although nobody asks" for name in sorted(seen.left)]
    return failures


class Soaking:
    """Callers of one server.

    Args:
        server: what is asked, and for what.
        running: the same, as it runs.
        seed: of all that is random.
    """

    def __init__(self, server: Soaked, running: Running, seed: int) -> None:
        self._server, self._running = server, running
        self._callers = Callers(server.texts, seed)
        self.seen = Seen(ends=self._callers.ends)

    async def run(self, seconds: float, tell: Callable[[Seen], None]) -> Seen:
        """Ask for so long."""
        begun = time.monotonic()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._running.port}") as channel:
            stub = LimelightServiceStub(channel)
            callers = [asyncio.create_task(self._callers.until(stub, begun + seconds)) for _ in range(MANY)]
            swap, rest = begun + self._server.swap_every, begun + self._server.rest_every
            self._callers.going.set()
            while (now := time.monotonic()) < begun + seconds:
                await asyncio.sleep(self._server.look_every)
                await self._look()
                if now >= swap:
                    await self._swap()
                    swap += self._server.swap_every
                if now >= rest:
                    await self._rest()
                    rest += self._server.rest_every
                tell(self.seen)
            self._callers.going.set()
            await asyncio.gather(*callers)
        await self._rest()
        return self.seen

    async def _swap(self) -> None:
        self.seen.swaps += 1
        await asyncio.to_thread(self._server.swapped, self.seen.swaps)

    async def _rest(self) -> None:
        """Let nobody ask until nothing is left, swap the model, and look at what memory the server keeps."""
        self._callers.going.clear()
        await self._until(lambda: not (self._callers.under_way or self._left))
        self.seen.left |= self._left
        await self._swap()
        await self._until(lambda: self.seen.versions == [str(self.seen.swaps)])
        for _ in range(SETTLE):
            await asyncio.sleep(self._server.look_every / SETTLE)
            await self._look()
        self.seen.memory.append(min(self.seen.busy[-SETTLE:]))
        self._callers.going.set()

    async def _until(self, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        await self._look()
        while not is_so() and time.monotonic() < end:
            await asyncio.sleep(self._server.look_every / SETTLE)
            await self._look()

    @property
    def _left(self) -> set[str]:
        return {name for name in GAUGES if self.seen.metrics.get(name) != 0.0}

    async def _look(self) -> None:
        self.seen.busy.append(memory(self._running.process.pid).resident)
        address = f"http://127.0.0.1:{self._server.metrics_port}/metrics"
        text = await asyncio.to_thread(lambda: urlopen(address, timeout=30).read().decode())
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        self.seen.metrics = {one.name: one.value for one in samples if not one.labels}
        self.seen.versions = [one.labels["version"] for one in samples if one.name == "limelight_model_info"]


def soak(server: Soaked, seconds: float, seed: int, tell: Callable[[Seen], None]) -> tuple[Seen, list[str]]:
    """Start a server, ask it for so long, stop it; what was seen, and what is wrong with it.

    Raises:
        LoadError: it did not start, or has ended.
    """
    with TemporaryDirectory() as temporary, TemporaryDirectory() as models:
        own = replace(server, model=Path(shutil.copytree(server.model, Path(models) / "model")))
        own.swapped(0)
        with started(own, Path(temporary), share_processors(0)) as running:
            return _soak(own, running, seconds, seed, tell)


def _soak(
    server: Soaked, running: Running, seconds: float, seed: int, tell: Callable[[Seen], None]
) -> tuple[Seen, list[str]]:
    seen = asyncio.run(Soaking(server, running, seed).run(seconds, tell))
    if running.process.poll() is not None:
        raise LoadError(f"the server has ended; its log ends so:\n{running.tail()}")
    running.process.terminate()
    status = running.process.wait(60)
    return seen, [*judged(seen), *([f"it ended with status {status}"] if status else [])]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 60.0,
    leak: Annotated[int, typer.Option(min=0, help="Bytes of every call that the server keeps: this must fail.")] = 0,
    swap_every: Annotated[float, typer.Option(min=1, help="Seconds after which the model is swapped.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    as_json: Annotated[Path, typer.Option("--json", help="Where to.")] = Path("bench/results/soak.json"),
) -> None:
    """Soak a server of the shipped model, and judge it."""
    workload = prepare(ModelName.G2P_EN, ROOT / "build" / "load", reuse=True)
    server = Soaked(
        name=ServerName.LIMELIGHT,
        python=Path(sys.executable),
        model=workload.model_of(ServerName.LIMELIGHT, "fp32"),
        options=ServingOptions(longest=workload.longest),
        metrics_port=free_port(),
        swap_every=swap_every,
        leak=leak,
    )
    seconds, begun = 60 * minutes, time.monotonic()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("soaking", total=seconds)

        def tell(seen: Seen) -> None:
            about = f"{seen.calls:,} calls, {seen.busy[-1]:.0f} MB"
            progress.update(task, completed=time.monotonic() - begun, description=about)

        seen, failures = soak(server, seconds, seed, tell)
    grown = growth(seen.memory)
    report = {
        "machine": machine.describe_machine(),
        "command": ["bench.soak", *sys.argv[1:]],
        "seconds": seconds,
        "calls": seen.calls,
        "swaps": seen.swaps,
        "ends": {kind: dict(counts) for kind, counts in seen.ends.items()},
        "megabytes_at_rest": [round(one, 2) for one in seen.memory],
        "most_megabytes": max(seen.busy),
        "growth": grown,
        "failures": failures,
    }
    as_json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"{seen.calls:,} calls, memory grew by {100 * grown:.2f} % in the second half; {as_json}")
    if failures:
        typer.echo(f"failed: {'; '.join(failures)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
