"""The wall clock jumps by hours, as a wrong one does when it is set: no deadline, no order, no figure goes by it."""

import ast
import json
import os
import re
import signal
import time
import urllib.request
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.errors import ExpiredError
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from tests.reversal import Reversal
from tests.serve.command import GATED, REPOSITORY, begun, port
from tests.serve.faults import until
from tests.serve.jobs import LONG, MIDDLE, SHORT, MakeEngine, job, occupied, tokens
from tests.serve.running import PATIENCE, generate, stream
from tests.serve.steps import Gated

HOURS = 5.0

FAKETIME = next(
    (
        file
        for folder in (os.environ.get("FAKETIME_FOLDER"), "/usr/lib", "/usr/local/lib")
        for file in (sorted(Path(folder).glob("**/faketime/libfaketimeMT.so.1")) if folder else ())
    ),
    None,
)
"""Of Debian's package `libfaketime`, which tells a process another time of day."""

BY_THE_WALL = {
    "logs.py": "lines bear the time of day",
    "statistics.py": "the protocol asks for the time of the last request",
    "tls.py": "certificates are valid from one date to another",
    "tracing.py": "spans bear the time of day",
}
"""Modules that look at the wall clock, and why."""

WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.fromtimestamp", "date.today"}


def named(file: Path) -> set[str]:
    """What it names of other modules, as module.name: `dt.datetime.now` is `datetime.now`."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {".".join(ast.unparse(node).split(".")[-2:]) for node in nodes if isinstance(node, ast.Attribute)}


def test_fault_42_only_what_tells_the_time_of_day_looks_at_the_wall_clock() -> None:
    """What measures how long something takes, or when it is to end, looks at a clock that never jumps."""
    looking = {file.name for file in (REPOSITORY / "serve").glob("*.py") if named(file) & WALL}
    assert looking == BY_THE_WALL.keys()


@pytest.mark.parametrize("hours", [HOURS, -HOURS], ids=["forward", "back"])
def test_fault_42_a_jump_changes_no_deadline_and_no_order(
    make_engine: MakeEngine, steps: Gated, monkeypatch: pytest.MonkeyPatch, hours: float
) -> None:
    engine = make_engine(rows=1)
    first = occupied(engine, steps)
    late, soon = (
        engine.submit(job(source, deadline=time.monotonic() + 2 * PATIENCE + more))
        for source, more in ((LONG, 1), (MIDDLE, 0))
    )
    never, now, now_ns = engine.submit(job(SHORT)), time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + round(3600e9 * hours))
    with pytest.raises(ExpiredError):
        engine.submit(job(SHORT, deadline=time.monotonic()))
    assert 0 <= engine.silent < PATIENCE
    steps.open()
    assert [tokens(ticket) for ticket in (first, never, soon, late)] == [SHORT, SHORT, MIDDLE, LONG]
    begun = {name: ticket.timings.queue for name, ticket in (("never", never), ("soon", soon), ("late", late))}
    assert sorted(begun, key=lambda name: begun[name]) == ["never", "soon", "late"]
    for ticket in (first, never, soon, late):
        assert 0 <= ticket.timings.queue < PATIENCE
        assert 0 <= ticket.timings.decode < PATIENCE


class Jumping:
    """A server whose wall clock is where the test wants it, by a file that it looks at whenever it asks for the time.

    Args:
        folder: of its files.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._log = folder / "clock", folder / "log"
        self.set(0.0)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, hours: float) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(f"{hours:+g}h\n", encoding="ascii")
        new.replace(self._file)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Of its log."""
        return [json.loads(line) for line in self._log.read_text(encoding="utf-8").splitlines()]

    def seen(self) -> float:
        """Hours by which its clock was ahead of ours when it wrote the last line."""
        ahead = datetime.fromisoformat(self.lines[-1]["time"]) - datetime.now().astimezone()
        return ahead / timedelta(hours=1)


def figures(lines: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """What the server's metrics say, by name and bound of a bucket, over all methods."""
    (address,) = (where[0] for line in lines if (where := re.findall(r"http://\S+/metrics", line["message"])))
    with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = {}
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        key = sample.name, sample.labels.get("le", "")
        found[key] = found.get(key, 0.0) + sample.value
    return found


def jump(clock: Jumping, stub: LimelightServiceStub, hours: float) -> None:
    """Until the server tells the new time, and has looked after its engine since."""

    def looks() -> float:
        return figures(clock.lines)["limelight_loop_lag_seconds_count", ""]

    clock.set(hours)
    before = looks()
    assert generate(stub, "").exception(PATIENCE).code() is grpc.StatusCode.INVALID_ARGUMENT
    until(lambda: abs(clock.seen() - hours) < 0.1)
    until(lambda: looks() > before + 4)  # of the loop's lag, twice as often as of the engine


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed (Debian: apt-get install libfaketime)")
def test_fault_42_a_jump_of_a_running_servers_clock(reversal: Reversal, tmp_path: Path) -> None:
    """While a call is in the midst of its answer, and another waits for its turn."""
    clock = Jumping(tmp_path)
    options = ("--metrics-port=0", "--log-format=json", "--watchdog=30", "--rows=1")
    with (
        (tmp_path / "log").open("wb") as log,
        begun(reversal.bundle, tmp_path, *options, log=log, environment=clock.environment, script=GATED) as process,
        grpc.insecure_channel(f"127.0.0.1:{port(tmp_path, process)}") as channel,
    ):
        stub = LimelightServiceStub(channel)
        under_way = generate(stub)
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"step\n"
        waiting = stream(stub, "abcd")
        for hours in (HOURS, -HOURS):
            jump(clock, stub, hours)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert under_way.result(PATIENCE).hypotheses[0].text == "hgfedcba"
        assert list(waiting)[-1].end.hypotheses[0].text == "dcba"
        until(lambda: figures(clock.lines)["limelight_calls_in_flight", ""] == 0)
        found = figures(clock.lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    histograms = {name.removesuffix("_bucket") for name, _ in found if name.endswith("_seconds_bucket")}
    assert len(histograms) == 6
    for name in histograms:
        assert 0 <= found[f"{name}_sum", ""] <= 3 * PATIENCE, name
    assert found["limelight_loop_lag_seconds_bucket", "30.0"] == found["limelight_loop_lag_seconds_count", ""]
    assert (found["limelight_rows", ""], found["limelight_queue_length", ""]) == (0, 0)
    assert {line["level"] for line in clock.lines} == {"INFO"}
