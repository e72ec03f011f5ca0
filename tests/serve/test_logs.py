"""What the log says of calls, and that nobody waits for it."""

import dataclasses
import errno
import json
import logging
import os
import re
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from bench.load import frames
from model.steps import Array, Memory
from serve.bundle import ServedModel
from serve.logs import CALL, DROPPED, FIELDS, STDERR, JsonFormatter, Lines, about, written
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.request import ID_KEY, Request, request_id
from tests.serve.running import PATIENCE, Running, generate, serving, stream
from tests.serve.scraping import scrape, value
from tests.serve.steps import Echo, Gated
from tests.serve.test_status import details, failed

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""Of the commands: their standard error has a buffer and a lock, as it has for most people."""

LOOK = 0.05
"""Seconds between two looks at whether a command is ready."""

NEW_ID = re.compile(r"[0-9a-f]{12}")


class Failing(Echo):
    """Cannot read any source."""

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:  # noqa: ARG002
        raise RuntimeError("no such luck")


class Log:
    """What was written, line by line."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def write(self, line: bytes) -> None:
        self.lines.append(line)

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    @property
    def access(self) -> list[dict[str, Any]]:
        return [line for line in self.objects if line["logger"] == "serve.access"]


def dropped() -> float:
    (sample,) = (sample for family in DROPPED.collect() for sample in family.samples if sample.name.endswith("_total"))
    return sample.value


def told_id(call: Any) -> str:
    """The id that a call's client was told."""
    (found,) = (value for key, value in call.trailing_metadata() if key == ID_KEY)
    return str(found)


def with_id(running: Running, source: str, given: str) -> Any:
    request = pb.GenerateRequest(source=source)
    return running.stub.Generate.future(request, timeout=PATIENCE, metadata=((ID_KEY, given),))


def test_every_call_has_one_line_with_how_it_ended(served: ServedModel) -> None:
    log = Log()
    with written("json", "info", log.write), serving(served) as running:
        good, bad = generate(running.stub, "ab"), generate(running.stub, "")
        assert good.result(PATIENCE).hypotheses
        assert failed(bad)
        streamed = stream(running.stub, "abc")
        assert list(streamed)
        HealthStub(running.channel).Check(HealthCheckRequest(), timeout=PATIENCE)  # is none of them
        running.until_idle()
    found = {line["request_id"]: (line["method"], line["code"], line["reason"]) for line in log.access}
    assert found == {
        told_id(good): ("Generate", "OK", "OK"),
        told_id(bad): ("Generate", "INVALID_ARGUMENT", "INVALID_FIELD"),
        told_id(streamed): ("GenerateStream", "OK", "OK"),
    }
    assert all(NEW_ID.fullmatch(identity) for identity in found)
    assert all(0 < line["seconds"] < PATIENCE and line["client"] == "ipv4:127.0.0.1" for line in log.access)
    assert all(line["level"] == "INFO" and "trace_id" not in line for line in log.access)
    assert len(log.access) == 3


def test_a_cancelled_call_has_its_line(gated: Running, gate: Gated) -> None:
    log = Log()
    with written("json", "info", log.write):
        call = stream(gated.stub)
        gate.wait()
        call.cancel()
        gated.until_idle()
    (line,) = log.access
    assert (line["code"], line["reason"]) == ("CANCELLED", "CANCELLED")
    assert NEW_ID.fullmatch(line["request_id"])


def test_metadata_that_are_no_text_are_no_news(running: Running) -> None:
    """gRPC would write a trace for each of them, at the level of errors, whoever sends them."""
    log = Log()
    with written("json", "info", log.write), frames.connection(running.server.port) as opened:
        found = frames.begin(opened)
        frames.call(
            opened, "/limelight.v1.LimelightService/ListModels", b"", 1, {"x-request-id": "\xff\xfe", "other": "\x80"}
        )
        assert next(frame for frame in found if frame.kind == frames.DATA)
        running.until_idle()
    assert [line["logger"] for line in log.objects] == ["serve.access"]
    assert NEW_ID.fullmatch(log.access[0]["request_id"])


def test_other_lines_of_grpc_are_written() -> None:
    log = Log()
    with written("json", "info", log.write):
        logging.getLogger("grpc._cython.cygrpc").error("Unexpected [%s]", "KeyError")
        logging.getLogger("grpc._cython.cygrpc").exception("ExecuteBatchError raised in core by servicer method [/a/b]")
    assert [line["message"] for line in log.objects] == ["Unexpected [KeyError]"]


@pytest.mark.parametrize("given", ["a", "Trace-7.b_9", "x" * 64])
def test_the_clients_own_id_is_used(running: Running, given: str) -> None:
    log = Log()
    with written("json", "info", log.write):
        good, bad = with_id(running, "ab", given), with_id(running, "", given)
        assert good.result(PATIENCE).hypotheses
        error = failed(bad)
        running.until_idle()
    assert details(error)["ErrorInfo"].metadata["request_id"] == given
    assert [told_id(good), told_id(bad)] == [given] * 2
    assert [line["request_id"] for line in log.access] == [given] * 2


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", 'a"b', "a/b", "a;b"])
def test_what_is_no_id_is_not_used(running: Running, given: str) -> None:
    call = with_id(running, "ab", given)
    assert call.result(PATIENCE).hypotheses
    assert NEW_ID.fullmatch(told_id(call))


def test_ids_are_text() -> None:
    assert NEW_ID.fullmatch(request_id({ID_KEY: b"bytes"}))
    assert NEW_ID.fullmatch(request_id({ID_KEY: "a\n"}))
    assert len({request_id({}) for _ in range(100)}) == 100


def test_an_internal_error_is_found_in_the_log_by_its_id(served: ServedModel) -> None:
    log = Log()
    with written("json", "info", log.write), serving(dataclasses.replace(served, steps=Failing())) as running:
        error = failed(with_id(running, "ab", "mine"))
        running.until_idle()
    assert error.details() == "internal error (request mine in the server's log)"
    assert {line["request_id"] for line in log.objects} == {"mine"}
    (engine,) = (line for line in log.objects if line["logger"] == "serve.batcher")
    assert engine["message"] == "a batch of 1 could not be read"
    assert engine["exception"].endswith("RuntimeError: no such luck")
    (told,) = (line for line in log.objects if line["logger"] == "serve.status")
    assert told["level"] == "ERROR"
    assert "EngineError" in told["exception"]


def test_calls_at_the_same_time_keep_their_ids(gated: Running, gate: Gated) -> None:
    log = Log()
    with written("json", "info", log.write):
        calls = [with_id(gated, source, source) for source in ("ab", "abc")]
        gate.wait()
        gate.open()
        assert all(call.result(PATIENCE).hypotheses for call in calls)
        gated.until_idle()
    assert {line["request_id"] for line in log.access} == {"ab", "abc"}
    assert [told_id(call) for call in calls] == ["ab", "abc"]


def test_what_is_done_off_the_loop_is_done_for_the_call(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.aside.SMALL", -1)

    def check(message: Any) -> None:  # noqa: ARG001
        logging.getLogger("elsewhere").warning("on %s", threading.current_thread().name)

    monkeypatch.setattr("serve.messages.refuse_unknown_fields", check)
    log = Log()
    with written("json", "warning", log.write):
        call = generate(running.stub, "ab")
        assert call.result(PATIENCE).hypotheses
    (line,) = log.objects
    assert line["message"].startswith("on limelight-convert")
    assert line["request_id"] == told_id(call)


def test_what_is_less_important_is_left_out(running: Running) -> None:
    log = Log()
    with written("json", "warning", log.write):
        assert generate(running.stub, "ab").result(PATIENCE).hypotheses
        running.until_idle()
        logging.getLogger("elsewhere").warning("beware")
    assert [(line["logger"], line["message"]) for line in log.objects] == [("elsewhere", "beware")]


def test_json_is_one_object_a_line_whatever_is_said() -> None:
    log, before = Log(), datetime.now(UTC)
    with written("json", "debug", log.write):
        logging.getLogger("elsewhere").debug("two\nlines, %s", "a \ud800 surrogate")
        try:
            raise ValueError("wrong\nagain")
        except ValueError:
            logging.getLogger("elsewhere").exception("caught")
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in log.lines)
    first, second = log.objects
    assert set(first) == {"time", "level", "logger", "message"}
    assert (first["level"], first["message"]) == ("DEBUG", "two\nlines, a \ud800 surrogate")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert abs((datetime.fromisoformat(first["time"]) - before).total_seconds()) < PATIENCE
    assert second["exception"].startswith("Traceback")
    assert second["exception"].endswith("ValueError: wrong\nagain")


def test_a_trace_is_named() -> None:
    record = logging.LogRecord("elsewhere", logging.INFO, "", 0, "hello", None, None)
    record.__dict__[CALL] = Request("mine", trace_id="0af7651916cd43dd8448eb211c80319c")
    line = json.loads(JsonFormatter().format(record))
    assert (line["request_id"], line["trace_id"]) == ("mine", "0af7651916cd43dd8448eb211c80319c")


def test_a_line_about_several_calls_names_them() -> None:
    assert about([Request("one")]) == {CALL: Request("one")}
    assert about([Request("one"), None, Request("two")]) == {FIELDS: {"request_ids": ["one", "two"]}}
    assert about([None]) == {}


def test_text_names_the_call_too(running: Running) -> None:
    log = Log()
    with written("text", "info", log.write):
        assert failed(with_id(running, "", "mine"))
        running.until_idle()
        logging.getLogger("elsewhere").info("without a call")
    access, other = (line.decode() for line in log.lines)
    assert re.fullmatch(
        r"[-\d]+ [:,\d]+ INFO \[mine\] Generate INVALID_ARGUMENT INVALID_FIELD \d\.\d{4} s ipv4:127\.0\.0\.1\n", access
    )
    assert re.fullmatch(r"[-\d]+ [:,\d]+ INFO without a call\n", other)


def test_afterwards_logging_is_as_it_was() -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    with written("text", "debug", Log().write):
        assert root.level == logging.DEBUG
        assert any(isinstance(handler, Lines) for handler in root.handlers)
    assert (root.level, root.handlers) == before


class Stuck:
    """A disk that does not come back until it is released.

    Attributes:
        entered: somebody waits for it.
        released: nobody has to any more.
    """

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        self.lines: list[bytes] = []

    def write(self, line: bytes) -> None:
        self.entered.set()
        assert self.released.wait(PATIENCE)
        self.lines.append(line)


def test_fault_42_a_log_that_blocks_holds_nobody_up(served: ServedModel) -> None:
    disk, calls, room = Stuck(), 12, 3
    with serving(served, metrics_port=0) as running:
        with written("text", "info", disk.write, most=room):
            assert generate(running.stub, "ab").result(PATIENCE).hypotheses
            assert disk.entered.wait(PATIENCE)
            before = scrape(running)
            for _ in range(calls):
                assert generate(running.stub, "ab").result(PATIENCE).hypotheses
            assert list(stream(running.stub, "abc"))
            running.until_idle()
            lost = calls + 1 - room
            name = "log_lines_dropped_total"
            assert value(scrape(running), name) - value(before, name) == lost
            disk.released.set()
        assert len(disk.lines) == 1 + room


class Full:
    """A disk without room, until there is some."""

    def __init__(self) -> None:
        self.failed = threading.Semaphore(0)
        self.full = True
        self.lines: list[bytes] = []

    def write(self, line: bytes) -> None:
        if self.full:
            self.failed.release()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.lines.append(line)


def test_fault_42_a_full_disk_costs_lines_and_nothing_else(served: ServedModel) -> None:
    disk, calls, before = Full(), 5, dropped()
    with serving(served) as running, written("json", "info", disk.write):
        for _ in range(calls):
            assert generate(running.stub, "ab").result(PATIENCE).hypotheses
        running.until_idle()
        assert all(disk.failed.acquire(timeout=PATIENCE) for _ in range(calls))
        disk.full = False
        call = generate(running.stub, "ab")
        assert call.result(PATIENCE).hypotheses
        running.until_idle()
    assert dropped() - before == calls
    (line,) = disk.lines
    assert json.loads(line)["request_id"] == told_id(call)


def test_fault_42_who_ends_does_not_wait_for_a_stuck_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.logs.FLUSH", 0.01)
    disk = Stuck()
    with written("text", "info", disk.write):
        logging.getLogger("elsewhere").info("hello")
        assert disk.entered.wait(PATIENCE)
    assert disk.lines == []
    disk.released.set()


def test_standard_error_is_written_whole(capfd: pytest.CaptureFixture[str]) -> None:
    with written("text", "info"):
        logging.getLogger("elsewhere").info("x" * 100_000)
    assert capfd.readouterr().err.endswith(f"{'x' * 100_000}\n")
    assert os.fstat(STDERR)
