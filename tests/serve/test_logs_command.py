"""The log of `limelight serve`, a process of its own, on a standard error that works, is full, or is stuck."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from tests.reversal import Reversal
from tests.serve.running import PATIENCE, generate

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""Of the commands: their standard error has a buffer and a lock, as it has for most people."""

LOOK = 0.05
"""Seconds between two looks at whether a command is ready."""


Command = Callable[..., contextlib.AbstractContextManager["subprocess.Popen[bytes]"]]


@pytest.fixture
def command(reversal: Reversal, tmp_path: Path) -> Command:
    """`limelight serve` with its log somewhere; ready when it has written its port."""

    @contextlib.contextmanager
    def start(log: Any, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
        arguments = ["serve", str(reversal.bundle), "--port=0", f"--port-file={tmp_path / 'port'}", "--threads=1"]
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", *arguments, *options],
            stderr=log,
            cwd=REPOSITORY,
            env=ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)},
        )
        with process:
            yield process
            process.kill()

    return start


def port(folder: Path, process: "subprocess.Popen[bytes]") -> str:
    path = folder / "port"
    while not path.exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"it ended with {process.wait(LOOK)} before it was ready")
    return path.read_text().strip()


def ask(folder: Path, process: "subprocess.Popen[bytes]") -> Any:
    with grpc.insecure_channel(f"127.0.0.1:{port(folder, process)}") as channel:
        return generate(LimelightServiceStub(channel)).result(PATIENCE)


def test_the_commands_whole_log_is_json(command: Command, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, command(log, "--log-format=json") as process:
        assert ask(tmp_path, process).hypotheses
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    found = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["logger"] for line in found] == ["serve.commands", "serve.access", "serve.server"]
    assert found[0]["message"].startswith("reversal 1 (fp32, ")
    assert found[1]["code"] == "OK"
    assert found[2]["message"] == "stopping: signal SIGTERM"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_fault_42_the_command_serves_and_stops_with_no_room_for_its_log(command: Command, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as log, command(log) as process:
        assert ask(tmp_path, process).hypotheses
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_fault_42_the_command_stops_while_nobody_reads_its_log(command: Command, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"full" * 1024)
        os.set_blocking(writing, True)
        with command(writing) as process:
            assert ask(tmp_path, process).hypotheses
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
    finally:
        os.close(reading)
        os.close(writing)
