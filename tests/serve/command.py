"""`limelight serve` as a process of its own, for what a server inside the tests' process cannot show."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from tests.serve.running import PATIENCE, generate

REPOSITORY = Path(__file__).parents[2]

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""Of the commands: their standard error has a buffer and a lock, as it has for most people."""

LOOK = 0.05
"""Seconds between two looks at whether a command is ready."""

GATED = """
import dataclasses, sys, threading
import serve.commands
from serve.cli import main
from tests.serve.steps import Gated

class Telling(Gated):
    def _enter(self, rows):
        print("step", flush=True)
        super()._enter(rows)

def load(*arguments, **choices):
    model = serve_load(*arguments, **choices)
    gated = Telling(model.steps)
    threading.Thread(target=lambda: (sys.stdin.readline(), gated.open()), daemon=True).start()
    return dataclasses.replace(model, steps=gated)

serve_load, serve.commands.load_model = serve.commands.load_model, load
main()
"""
"""`limelight serve` whose steps wait for a line on standard input, and are told of on standard output."""

Process = subprocess.Popen[bytes]


@contextmanager
def begun(
    bundle: Path,
    folder: Path,
    *options: str,
    log: Any,
    environment: Mapping[str, str] | None = None,
    script: str | None = None,
) -> Iterator[Process]:
    """The command, killed at the end if it has not ended; it writes its port into `folder`/port once it answers.

    Args:
        bundle: that it serves.
        folder: where it may write.
        options: of the command.
        log: its standard error.
        environment: variables besides our own.
        script: a program in place of the command, with standard input and output to speak to, as `GATED`.
    """
    arguments = ["serve", str(bundle), "--port=0", f"--port-file={folder / 'port'}", "--threads=1"]
    pipe = None if script is None else subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, *(("-m", "serve") if script is None else ("-c", script)), *arguments, *options],
        stdin=pipe,
        stdout=pipe,
        stderr=log,
        cwd=REPOSITORY,
        env=ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)} | dict(environment or {}),
    )
    with process:
        yield process
        process.kill()


def port(folder: Path, process: Process) -> int:
    """The port, once it answers."""
    path = folder / "port"
    while not path.exists():
        with suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"it ended with {process.wait(LOOK)} before it was ready")
    return int(path.read_text(encoding="ascii"))


def ask(folder: Path, process: Process) -> Any:
    """An answer of its, over a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{port(folder, process)}", options) as channel:
        return generate(LimelightServiceStub(channel)).result(PATIENCE)
