"""Who is turned away before anything of a call is read: what is told, counted and logged, and who is let in."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import serve.observer
from bench.load import frames
from serve.access import Entry, hash_token
from serve.bundle import ServedModel
from serve.gate import GUARDED
from serve.jobs import EngineLimits
from serve.pb.inference import grpc_service_pb2 as inference_pb2
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.request import ID_KEY
from serve.security import Security
from serve.server import SERVICE
from tests.serve.faults import until
from tests.serve.running import PATIENCE, Running, generate, score, serving, stream
from tests.serve.steps import Gated

GENERATE = f"/{SERVICE}/Generate"


@contextmanager
def filled(running: Running, gate: Gated, **metadata: str) -> Iterator[None]:
    """One is under way and two wait, which is all that may; they are answered at the end."""
    sent = tuple(metadata.items())

    def ask() -> Any:
        return running.stub.Generate.future(pb.GenerateRequest(source="abc"), timeout=PATIENCE, metadata=sent)

    calls = [ask()]
    gate.wait()
    calls += [ask(), ask()]
    until(lambda: running.engine.waiting == 2)
    yield
    gate.open()
    assert [call.result(PATIENCE).hypotheses[0].text for call in calls] == ["cba"] * 3


def ended(running: Running, method: str) -> bytes:
    """A call that says nothing but its headers; returns how it ends."""
    with frames.connection(running.server.port) as opened, closing(frames.begin(opened)) as found:
        frames.send(opened, frames.headers(method, 1))
        last = next(frame for frame in found if frame.stream == 1 and frame.flags & frames.END_STREAM)
        assert last.kind == frames.HEADERS
        return last.payload


def test_the_guarded_calls_are_there() -> None:
    own = pb.DESCRIPTOR.services_by_name["LimelightService"]
    open_protocol = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    known = {f"/{service.full_name}/{method.name}" for service in (own, open_protocol) for method in service.methods}
    assert known >= GUARDED


@pytest.mark.parametrize("method", sorted(GUARDED))
def test_fault_22_a_full_queue_is_told_before_the_message_has_come(gated: Running, gate: Gated, method: str) -> None:
    with filled(gated, gate):
        assert b"grpc-retry-pushback-ms" in ended(gated, method)


def test_who_is_turned_away_is_told_all_that_others_are(gated: Running, gate: Gated) -> None:
    with filled(gated, gate):
        for ask in (generate, score, stream):
            call = ask(gated.stub)
            assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert call.details() == "2 requests are waiting, the limit is 2: retry later"
            trailing = dict(call.trailing_metadata())
            assert int(trailing["grpc-retry-pushback-ms"]) > 0
            assert b"QUEUE_FULL" in trailing["grpc-status-details-bin"]
            assert len(trailing[ID_KEY]) == 12


def test_the_client_s_own_id_is_told_back(gated: Running, gate: Gated) -> None:
    with filled(gated, gate):
        call = gated.stub.Generate.future(pb.GenerateRequest(source="abc"), metadata=((ID_KEY, "mine"),))
        assert dict(call.trailing_metadata())[ID_KEY] == "mine"


def test_it_is_counted_and_logged_but_not_each_of_very_many(
    gated: Running, gate: Gated, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.observer, "LINES", 3)
    metrics = gated.server._parts.metrics.registry
    labels = {"method": "Generate", "code": "RESOURCE_EXHAUSTED", "reason": "QUEUE_FULL"}
    with caplog.at_level(logging.INFO, "serve.access"), filled(gated, gate):
        for _ in range(8):
            assert generate(gated.stub).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        until(lambda: metrics.get_sample_value("limelight_requests_total", labels) == 8)
        gated.server._parts.observer._tell_of_others()
        assert generate(gated.stub).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    lines = [record.message for record in caplog.records if "RESOURCE_EXHAUSTED" in record.message]
    assert len(lines) == 4
    assert all(line.startswith("Generate RESOURCE_EXHAUSTED QUEUE_FULL 0.0000 s ipv4:127.0.0.1") for line in lines)
    assert "5 more calls were turned away in this second" in caplog.messages


def test_who_may_not_call_is_told_that_and_not_how_busy_it_is(served: ServedModel, gate: Gated, tmp_path: Path) -> None:
    token = "a" * 32
    file = tmp_path / "tokens"
    file.write_text(f"{Entry('someone', 'user', hash_token(token))}\n")
    file.chmod(0o600)
    model, limits = dataclasses.replace(served, steps=gate), EngineLimits(queue=2, rows=4)
    with (
        serving(model, limits, security=Security(token_file=file)) as running,
        filled(running, gate, authorization=f"Bearer {token}"),
    ):
        known = (("authorization", f"Bearer {token}"),)
        refused = [
            running.stub.Generate.future(pb.GenerateRequest(source="abc"), metadata=sent).code()
            for sent in ((), (("authorization", "Bearer guessed"),), known)
        ]
    assert [code.name for code in refused] == ["UNAUTHENTICATED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED"]


def test_a_server_that_stops_says_so_and_not_that_it_is_full(gated: Running, gate: Gated) -> None:
    with filled(gated, gate):
        gated.server._calls.drain()
        assert generate(gated.stub).code() is grpc.StatusCode.UNAVAILABLE


def test_one_model_with_room_lets_all_in(served: ServedModel, gated: Running, gate: Gated) -> None:
    """Which model a call is for is in its message."""
    other = served.manifest.model_copy(update={"name": "other"})
    gated.server.models.add(dataclasses.replace(served, manifest=other))
    name = served.manifest.name
    gate_closed = gated.server.models.find(name).engine
    first = gated.stub.Generate.future(pb.GenerateRequest(source="abc", model=name))
    gate.wait()
    more = [gated.stub.Generate.future(pb.GenerateRequest(source="abc", model=name)) for _ in range(2)]
    until(lambda: gate_closed.waiting == 2)
    refused = gated.stub.Generate.future(pb.GenerateRequest(source="abc", model=name))
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    answered = gated.stub.Generate(pb.GenerateRequest(source="abc", model="other"), timeout=PATIENCE)
    gate.open()
    assert [call.result(PATIENCE).hypotheses[0].text for call in (first, *more)] == ["cba"] * 3
    assert answered.hypotheses[0].text == "cba"
