"""What connections may do: how many, how much, how silent, how noisy; and that only this machine is listened to."""

import dataclasses
import socket
import threading
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.load import frames
from bench.load.frames import Frame
from serve.bundle import ServedModel
from serve.connections import ConnectionLimits
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.server import SERVICE, ServerOptions
from tests.serve.running import PATIENCE, Running, begin, generate, serving
from tests.serve.steps import Gated


def arguments(**limits: Any) -> dict[str, int]:
    return dict(ConnectionLimits(**limits).arguments())


def answers(running: Running) -> bool:
    found = running.stub.Generate(pb.GenerateRequest(source="abc"), timeout=PATIENCE, wait_for_ready=True)
    return found.hypotheses[0].text == "cba"


def test_by_default_only_this_machine_is_listened_to(served: ServedModel) -> None:
    assert ServerOptions().host == "127.0.0.1"
    with serving(served) as running:
        with socket.create_connection(("127.0.0.1", running.server.port), PATIENCE):
            pass
        with pytest.raises(ConnectionRefusedError):  # which is what every other address of this machine gives
            socket.create_connection(("127.0.0.2", running.server.port), PATIENCE)


def test_what_grpc_is_told() -> None:
    found = arguments(keepalive=30.0, connection_idle=2.5)
    assert found["grpc.keepalive_time_ms"] == 30_000
    assert found["grpc.max_connection_idle_ms"] == 2_500
    assert found["grpc.max_concurrent_streams"] == 1000
    assert arguments(connection_calls=7)["grpc.max_concurrent_streams"] == 7
    assert "grpc.max_connection_age_ms" not in found
    assert arguments(connection_age=60.0)["grpc.max_connection_age_ms"] == 60_000


def test_fault_31_clients_may_ping_every_ten_seconds() -> None:
    found = arguments()
    assert found["grpc.keepalive_permit_without_calls"] == 1
    assert found["grpc.http2.min_ping_interval_without_data_ms"] <= 9_000, "clocks differ, and pings arrive late"


def test_fault_31_a_flood_of_pings_is_cut_off(served: ServedModel) -> None:
    with serving(served) as running, frames.connection(running.server.port) as flooding:
        found = frames.begin(flooding)
        frames.send(flooding, *[Frame(frames.PING, payload=bytes(8))] * 10)
        (last,) = [frame for frame in found if frame.kind == frames.GOAWAY]
        assert (last.error, last.payload[8:]) == (frames.ENHANCE_YOUR_CALM, b"too_many_pings")
        assert answers(running)


def test_fault_30_a_connection_is_told_how_many_calls_it_may_make(served: ServedModel) -> None:
    limits = ConnectionLimits(connection_calls=5)
    with serving(served, connection_limits=limits) as running, frames.connection(running.server.port) as opened:
        first = next(frames.begin(opened))
        assert first.kind == frames.SETTINGS
        assert first.settings[frames.MAX_CONCURRENT_STREAMS] == 5


def test_fault_30_very_many_calls_of_one_client_do_not_end_those_of_others(served: ServedModel) -> None:
    """By default gRPC would cancel them: of each method, so many calls that nobody has looked at yet are too many."""
    asked = threading.Event()

    async def looks_at_none() -> None:
        assert asked.wait(PATIENCE)

    limits = ConnectionLimits(connection_calls=5000)
    with (
        serving(served, connection_limits=limits) as running,
        frames.connection(running.server.port, "127.0.0.2") as opened,
    ):
        assert answers(running)
        busy = begin(looks_at_none())
        found = frames.begin(opened)
        path = f"/{SERVICE}/Generate"
        frames.send(
            opened, *(frames.headers(path, stream) for stream in range(1, 7000, 2)), Frame(frames.PING, 0, bytes(8))
        )
        assert next(frame for frame in found if frame.kind == frames.PING and frame.flags == frames.ACKNOWLEDGED)
        other = generate(running.stub, "abc")
        with pytest.raises(grpc.FutureTimeoutError):
            other.result(0.5)  # gRPC has it, and has not cancelled it
        asked.set()
        busy.result(PATIENCE)
        assert other.result(PATIENCE).hypotheses[0].text == "cba"


def test_fault_30_one_connection_too_many_is_hung_up_on(served: ServedModel) -> None:
    with serving(served, connection_limits=ConnectionLimits(connections=2)) as running:
        with frames.connection(running.server.port) as one, frames.connection(running.server.port) as two:
            assert [next(frames.begin(opened)).kind for opened in (one, two)] == [frames.SETTINGS] * 2
            for _ in range(20):
                with frames.connection(running.server.port) as more:
                    assert list(frames.received(more)) == []
            assert running.engine.alive
        assert answers(running), "there is room again"


def test_fault_30_who_says_nothing_is_hung_up_on(served: ServedModel) -> None:
    limits = ConnectionLimits(handshake=0.2)
    with serving(served, connection_limits=limits) as running, frames.connection(running.server.port) as silent:
        *_, last = frames.received(silent)
        assert b"before handshake timeout" in last.payload
        assert answers(running)


def test_an_idle_connection_is_closed_and_clients_open_another(served: ServedModel) -> None:
    limits = ConnectionLimits(connection_idle=0.2)
    with serving(served, connection_limits=limits) as running, frames.connection(running.server.port) as idle:
        *_, last = frames.begin(idle)
        assert last.payload[8:] == b"connection idle"
        assert answers(running)


def test_an_old_connection_is_closed_after_its_calls(served: ServedModel, gate: Gated) -> None:
    limits = ConnectionLimits(connection_age=0.2)
    with serving(dataclasses.replace(served, steps=gate), connection_limits=limits) as running:
        call = generate(running.stub)
        gate.wait()
        with frames.connection(running.server.port) as younger:
            told = next(frame for frame in frames.begin(younger) if frame.kind == frames.GOAWAY)
            assert told.payload[8:] == b"max_age"
        gate.open()
        assert call.result(PATIENCE).hypotheses[0].text == "hgfedcba"
        assert answers(running)


def test_fault_28_who_has_gone_without_a_word_gives_its_row_back(served: ServedModel, gate: Gated) -> None:
    limits = ConnectionLimits(keepalive=0.2, keepalive_timeout=0.2)
    with serving(dataclasses.replace(served, steps=gate), connection_limits=limits) as running:
        with frames.connection(running.server.port) as half_open:
            found = frames.begin(half_open)
            request = pb.GenerateRequest(source="abcdefgh")
            frames.call(half_open, f"/{SERVICE}/Generate", request.SerializeToString())
            gate.wait()
            assert running.server._calls.in_flight == 1
            seen = list(found)  # and no ping among them is answered
            assert frames.PING in {frame.kind for frame in seen}
            assert b"ping_timeout" in [frame.payload[8:] for frame in seen if frame.kind == frames.GOAWAY]
            running.until_idle()
        gate.open()
        assert answers(running)


def test_fault_31_a_long_silent_call_is_not_cut_off(served: ServedModel) -> None:
    """The server's own pings are answered by every client of gRPC's."""
    limits = ConnectionLimits(keepalive=0.1, keepalive_timeout=5.0, connection_idle=0.2)
    with serving(served, connection_limits=limits) as running:
        stub = health_pb2_grpc.HealthStub(running.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=1.0)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError):
            next(watch)
        assert watch.code() is grpc.StatusCode.DEADLINE_EXCEEDED
