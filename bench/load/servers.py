"""The servers, and the load generator, as processes: how each is started, spoken to and stopped."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from bench.load.options import ServingOptions

ROOT = Path(__file__).parents[2]
"""Where every process runs: the packages are imported from here, whatever environment runs them."""

PATIENCE = 90.0
"""Seconds that a server has to name its port."""

GRACE = 20.0
"""Seconds that a process has to end when told to."""


class ServerName(StrEnum):
    """The kinds of servers."""

    LIMELIGHT = "limelight"
    CTRANSLATE2 = "ctranslate2"
    TRITON = "triton"


class LoadError(Exception):
    """A process of the benchmark did not do its part."""


@dataclass(frozen=True)
class Processors:
    """Which processors servers and generator run on: apart, so that one does not slow the other down."""

    server: frozenset[int]
    generator: frozenset[int]


def share_processors(for_generator: int) -> Processors:
    """Set some processors aside for the generator; with 0, or where there are too few, all are for both."""
    there = sorted(os.sched_getaffinity(0))
    if not 0 < for_generator < len(there):
        return Processors(frozenset(there), frozenset(there))
    return Processors(frozenset(there[:-for_generator]), frozenset(there[-for_generator:]))


@dataclass(frozen=True, kw_only=True)
class Server:
    """One kind of server, ready to be started.

    Attributes:
        name: of the kind.
        python: interpreter of the environment that has what server and client need.
        model: folder that it serves.
        options: how it serves.
    """

    name: ServerName
    python: Path
    model: Path
    options: ServingOptions

    @property
    def wire(self) -> str:
        """How it is spoken to."""
        return "triton" if self.name is ServerName.TRITON else "limelight"

    def command(self, folder: Path) -> list[str]:
        """Its command line; it writes its port into `folder`/port."""
        if self.name is not ServerName.LIMELIGHT:
            module = f"bench.load.{self.name}_server"
            return [str(self.python), "-m", module, str(self.model), str(folder), *self.options.arguments()]
        own = {name: getattr(self.options, name) for name in ("precision", "threads", "rows", "queue")}
        # `python -m serve` is the `limelight` command, from this checkout.
        return [
            *(str(self.python), "-m", "serve", "serve", str(self.model), "--provider=cpu"),
            *("--port=0", f"--port-file={folder / 'port'}"),
            *(f"--{name}={value}" for name, value in own.items()),
        ]


@dataclass(frozen=True)
class Running:
    """A server that runs.

    Attributes:
        process: its first process.
        port: that it listens on.
        log: what it prints.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def tail(self) -> str:
        """The end of what it printed."""
        return _tail(self.log)


@contextmanager
def started(server: Server, folder: Path, processors: Processors) -> Iterator[Running]:
    """Start a server, and stop it at the end.

    Args:
        server: which.
        folder: an empty one, for what it writes.
        processors: where it runs.

    Raises:
        LoadError: it ended, or named no port in time.
    """
    log = folder / "log"
    with log.open("wb") as output:
        process = _spawn(server.command(folder), processors.server, stdout=output, stderr=output)
    try:
        yield Running(process, _wait_for_port(process, folder / "port", log), log)
    finally:
        end(process)


class Client:
    """The load generator's process.

    Args:
        server: kind that it asks.
        port: where the server listens.
        sources: what it may ask.
        processors: where it runs.

    Raises:
        LoadError: the server did not answer.
    """

    def __init__(self, server: Server, port: int, sources: Sequence[str], processors: Processors) -> None:
        options = server.options
        arguments = [server.wire, f"127.0.0.1:{port}", str(options.beam), str(options.longest)]
        command = [str(server.python), "-m", "bench.load.generator", *arguments]
        if server.wire == "limelight":
            command[0] = sys.executable
        self._process = _spawn(
            command, processors.generator, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        try:
            self._ask(list(sources))  # its answer says that the server has answered
        except LoadError:
            self.close()
            raise

    def run(self, mode: str, **arguments: Any) -> dict[str, Any]:
        """Run one of the generator's modes; returns the fields of its `Load`."""
        return self._ask({"mode": mode, **arguments})

    def close(self) -> None:
        """End it."""
        end(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, command: Any) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise LoadError("the load generator has no pipes")
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise LoadError("the load generator has ended: its error is above") from None
        line = self._process.stdout.readline()
        if not line:
            raise LoadError("the load generator has ended: its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_tool(python: Path | str, module: str, *arguments: str) -> str:
    """Run a module to its end; returns what it printed.

    Raises:
        LoadError: it failed.
    """
    command = [str(python), "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoadError(f"{module} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _environment() -> Mapping[str, str]:
    # Tokenizers that encode a batch would otherwise spread it over threads of their own.
    return {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


def _spawn(command: Sequence[str], processors: frozenset[int], **options: Any) -> subprocess.Popen[Any]:
    """Start a process where it belongs: a child takes over the affinity that its parent has at the time."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        return subprocess.Popen(command, cwd=ROOT, env=_environment(), **options)
    finally:
        os.sched_setaffinity(0, mine)


def _wait_for_port(process: subprocess.Popen[bytes], port_file: Path, log: Path) -> int:
    begun = time.monotonic()
    while not port_file.is_file():
        if process.poll() is not None or time.monotonic() - begun > PATIENCE:
            raise LoadError(f"the server named no port (exit status {process.poll()}); its log ends so:\n{_tail(log)}")
        time.sleep(0.05)
    return int(port_file.read_text(encoding="ascii"))


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]


def end(process: subprocess.Popen[Any]) -> None:
    """End a process, kindly for so long as it may take."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
