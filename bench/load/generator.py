"""The load generator: a process of its own that asks one server, and watches itself while it does.

    python -m bench.load.generator WIRE ADDRESS BEAM LONGEST < commands > results

One JSON object a line each way; the first line in is the list of sources, the first line out says that the server
answers. In an open loop each request has a time at which it is due, and its latency counts from there: if the server,
or this process, falls behind, the wait shows (no coordinated omission). How far this process itself falls behind is
measured too: a figure is the server's only where that is little.
"""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc

from bench.load.arrivals import poisson, shuffled
from bench.load.wires import Wire, load_wire

CHANNELS = 8
"""Connections, each used in turn: one alone would put every request behind the one before it."""

TICK = 0.005
"""Seconds between looks at the loop's own lateness."""

PATIENCE = 60.0
"""Seconds that a server has to give its first answer."""


@dataclass
class Load:
    """What came of one command.

    Attributes:
        seconds: for which requests were sent.
        latencies: seconds until each answer, counted from when its request was due.
        errors: requests that were not answered, by gRPC status.
        answers: text by source, of the sources that were to be kept.
        lateness: seconds by which requests were sent after they were due, and by which the loop's clock was late.
        busy: processor time of this process, as a share of one processor.
    """

    seconds: float
    latencies: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    lateness: list[float] = field(default_factory=list)
    busy: float = 0.0


class Generator:
    """Asks one server.

    Args:
        wire: how it is spoken to.
        address: where it listens.
        sources: what may be asked.
    """

    def __init__(self, wire: Wire, address: str, sources: Sequence[str]) -> None:
        self._wire, self._sources = wire, sources
        self._requests = {source: wire.encode(source) for source in sources}
        options = [("grpc.use_local_subchannel_pool", 1)]  # otherwise equal channels share one connection
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(CHANNELS)]
        # Without serialisers: bytes in, bytes out.
        calls: list[Any] = [channel.unary_unary(wire.method) for channel in self._channels]
        self._calls: Iterator[Any] = itertools.cycle(calls)
        self._kept: dict[str, bytes] = {}

    async def until_ready(self) -> None:
        """Until the server answers.

        Raises:
            TimeoutError: it did not.
        """
        begun = time.perf_counter()
        while True:
            try:
                await next(self._calls)(self._requests[self._sources[0]], timeout=PATIENCE, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if time.perf_counter() - begun > PATIENCE:
                    raise TimeoutError(f"no answer in {PATIENCE} seconds: {error.details()}") from None
                await asyncio.sleep(0.1)
            else:
                return

    async def open(self, rate: float, seconds: float, seed: int, deadline: float, keep: int) -> Load:
        """Send requests when they are due, whatever became of those before.

        Args:
            rate: requests a second.
            seconds: for how long; answers are waited for beyond.
            seed: of the arrivals.
            deadline: seconds after which a request is given up.
            keep: answers to so many of the first requests are kept.
        """
        load = Load(seconds)
        arrivals = poisson(rate, seconds, self._sources, seed)
        calls = []
        with _watched(load):
            begun = time.perf_counter() + TICK
            for index, (due, source) in enumerate(arrivals):
                wait = begun + due - time.perf_counter()
                await asyncio.sleep(max(wait, 0))
                ask = self._ask(source, begun + due, deadline, load, keep=index < keep)
                calls.append(asyncio.create_task(ask))
            await asyncio.gather(*calls)
        return self._finish(load)

    async def closed(self, callers: int, seconds: float, seed: int, deadline: float, keep: int) -> Load:
        """So many callers, each of whom asks again once answered; latency counts from the sending.

        Args:
            callers: how many at a time.
            seconds: for how long.
            seed: of the order of the sources.
            deadline: seconds after which a request is given up.
            keep: answers to so many of the first requests are kept.
        """
        load = Load(seconds)
        asked = enumerate(shuffled(self._sources, seed))

        async def caller(end: float) -> None:
            while time.perf_counter() < end:
                index, source = next(asked)
                await self._ask(source, None, deadline, load, keep=index < keep)

        with _watched(load):
            begun = time.perf_counter()
            await asyncio.gather(*(caller(begun + seconds) for _ in range(callers)))
        load.seconds = time.perf_counter() - begun  # the last answers come after the end
        return self._finish(load)

    async def close(self) -> None:
        """Hang up."""
        for channel in self._channels:
            await channel.close()

    async def _ask(self, source: str, due: float | None, deadline: float, load: Load, *, keep: bool) -> None:
        now = time.perf_counter()
        if due is None:
            due = now
        else:
            load.lateness.append(now - due)
        try:
            response: bytes = await next(self._calls)(self._requests[source], timeout=deadline)
        except grpc.aio.AioRpcError as error:
            kind = error.code().name
            load.errors[kind] = load.errors.get(kind, 0) + 1
            return
        load.latencies.append(time.perf_counter() - due)
        if keep:
            self._kept[source] = response

    def _finish(self, load: Load) -> Load:
        """Read the answers that were kept: after the measurement, so that it costs none of its time."""
        load.answers = {source: self._wire.decode(response) for source, response in self._kept.items()}
        self._kept = {}
        return load


@contextmanager
def _watched(load: Load) -> Iterator[None]:
    """Watch this process: how late its loop is, and how busy. It collects no garbage meanwhile."""
    gc.collect()
    gc.disable()
    begun, used = time.perf_counter(), time.process_time()
    ticking = asyncio.create_task(_tick(load))
    try:
        yield
    finally:
        ticking.cancel()
        gc.enable()
        load.busy = (time.process_time() - used) / (time.perf_counter() - begun)


async def _tick(load: Load) -> None:
    while True:
        begun = time.perf_counter()
        await asyncio.sleep(TICK)
        load.lateness.append(time.perf_counter() - begun - TICK)


async def main(wire: str, address: str, beam: str, longest: str) -> None:
    """Answer commands until there are none."""
    loop = asyncio.get_running_loop()
    sources: list[str] = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    protocol = load_wire("triton" if wire == "triton" else "limelight", int(beam), int(longest))
    generator = Generator(protocol, address, sources)
    await generator.until_ready()
    print(json.dumps({"ready": True}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command: dict[str, Any] = json.loads(line)
        load: Load = await getattr(generator, command.pop("mode"))(**command)
        print(json.dumps(asdict(load)), flush=True)
    await generator.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
