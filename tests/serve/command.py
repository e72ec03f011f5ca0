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

Process = subprocess.Popen[bytes]


@contextmanager
def begun(
    bundle: Path, folder: Path, *options: str, log: Any, environment: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """The command, killed at the end if it has not ended; it writes its port into `folder`/port once it answers."""
    arguments = ["serve", str(bundle), "--port=0", f"--port-file={folder / 'port'}", "--threads=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", *arguments, *options],
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
