"""One server, started afresh and taken through all loads: a check, callers in a closed loop, then rising rates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.load import accounts
from bench.load.cells import Cell, Mode
from bench.load.servers import Client, LoadError, Processors, Running, Server, started
from bench.load.workload import Workload

WARM_UP = 1.0
"""Seconds of load that do not count."""

FALLEN = 0.9
"""Share of the best goodput so far below which a server is past its best, and no higher rates are tried."""

FIRST = 0.25
"""Share of the closed loop's throughput at which the rates begin, so that those of unlike servers overlap."""

Told = Callable[[Cell], None]


def past_best(cells: Sequence[Cell]) -> bool:
    """Whether goodput has fallen: once where the generator kept up, twice where the fall may have been its own."""
    best = max(cell.goodput for cell in cells)
    fallen = [cell.goodput <= FALLEN * best for cell in cells[-2:]]
    return fallen[-1] and (cells[-1].valid or (len(fallen) == 2 and fallen[0]))


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How the load is made."""

    objective: float
    """Seconds within which an answer is good."""
    deadline: float
    """Seconds after which a request is given up."""
    seconds: float = 5.0
    """Of each load."""
    callers: int = 64
    """In the closed loop."""
    first_rate: float | None = None
    """Requests a second to begin with; by default a share of what the closed loop reached."""
    factor: float = 1.25
    """From one rate to the next."""
    most_rates: int = 20
    """Rates tried at most."""
    sample: int = 50
    """Answers that are compared, of each load."""

    def first(self, throughput: float) -> int:
        """Which rate to begin with, where the closed loop reached so many answers a second."""
        begin = self.first_rate or max(FIRST * throughput, 1.0)
        return math.floor(math.log(begin, self.factor) + 1e-9)

    def rate(self, index: int) -> float:
        """Requests a second: powers of the factor, so that every server and round gets the same."""
        return float(f"{self.factor**index:.3g}")


class Meter:
    """Measures one running server.

    Args:
        server: which kind.
        running: the server.
        client: asks it.
        options: how.
        seed: of the arrivals.
        tell: told each cell.
    """

    def __init__(
        self, server: Server, running: Running, client: Client, options: LoadOptions, seed: int, tell: Told
    ) -> None:
        self._server, self._running, self._client = server, running, client
        self._options, self._seed, self._tell = options, seed, tell

    def closed(self) -> Cell:
        """Callers who wait for their answers."""
        return self._measure("closed", self._options.callers, callers=self._options.callers)

    def sweep(self, first: int) -> list[Cell]:
        """Rising rates, until goodput falls."""
        cells: list[Cell] = []
        for index in range(first, first + self._options.most_rates):
            rate = self._options.rate(index)
            cells.append(self._measure("open", rate, rate=rate))
            if past_best(cells):
                break
        return cells

    def _measure(self, mode: Mode, load: float, **arguments: float) -> Cell:
        options = self._options
        process = self._running.process
        before = accounts.processor_seconds(process.pid)
        found: dict[str, Any] = self._client.run(
            mode,
            seconds=options.seconds,
            seed=self._seed,
            deadline=options.deadline,
            keep=options.sample,
            **arguments,
        )
        if process.poll() is not None:
            raise LoadError(f"{self._server.name} has ended with status {process.returncode}")
        cell = Cell(
            server=self._server.name,
            mode=mode,
            load=load,
            objective=options.objective,
            processor_seconds=accounts.processor_seconds(process.pid) - before,
            memory=accounts.memory(process.pid),
            **found,
        )
        self._tell(cell)
        return cell


def visit(
    server: Server, workload: Workload, options: LoadOptions, processors: Processors, seed: int, tell: Told
) -> list[Cell]:
    """Start a server, measure it under every load, stop it.

    Args:
        server: which.
        workload: what it is asked.
        options: how.
        processors: who runs where.
        seed: of the arrivals; the same for every server of a round.
        tell: told each cell.

    Raises:
        LoadError: the server did not start or did not answer.
    """
    with TemporaryDirectory() as temporary, started(server, Path(temporary), processors) as running:
        try:
            return _measure_all(server, running, workload, options, processors, seed, tell)
        except LoadError as error:
            raise LoadError(f"{error}; the log of {server.name} ends so:\n{running.tail()}") from None


def _measure_all(
    server: Server,
    running: Running,
    workload: Workload,
    options: LoadOptions,
    processors: Processors,
    seed: int,
    tell: Told,
) -> list[Cell]:
    client = Client(server, running.port, workload.sources, processors)
    try:
        client.run("closed", callers=options.callers, seconds=WARM_UP, seed=seed, deadline=options.deadline, keep=0)
        meter = Meter(server, running, client, options, seed, tell)
        closed = meter.closed()
        return [closed, *meter.sweep(options.first(closed.throughput))]
    finally:
        client.close()
