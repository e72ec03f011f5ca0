"""The log of `limelight serve`, a process of its own, on a standard error that works, is full, or is stuck."""

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reversal import Reversal
from tests.serve.command import Process, ask, begun
from tests.serve.running import PATIENCE

Command = Callable[..., contextlib.AbstractContextManager[Process]]


@pytest.fixture
def command(reversal: Reversal, tmp_path: Path) -> Command:
    """`limelight serve` with its log somewhere; ready when it has written its port."""
    return lambda log, *options: begun(reversal.bundle, tmp_path, *options, log=log)


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
