"""An engine that has died or hangs: health says so, nobody waits for it, and the process ends."""

import asyncio
import dataclasses
import logging
import threading
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from model.steps import Array, Memory
from serve.bundle import ServedModel
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from serve.server import Server, ServerOptions, serve_until_signal
from tests.serve.running import PATIENCE, Running, begin, generate, models_of, serving, stream
from tests.serve.steps import Echo, Gated

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
FAILED = (grpc.StatusCode.UNAVAILABLE, "the server's engine has failed")
SOON = 0.3
"""Seconds of the watchdog in these tests."""


class Dying(Echo):
    """Ends the thread that it is called on."""

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:  # noqa: ARG002
        raise SystemExit("secret of the runtime")


class Late(Dying):
    """Waits before it does so."""

    arrived, release = threading.Semaphore(0), threading.Event()

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:
        self.arrived.release()
        assert self.release.wait(PATIENCE)
        return super().encode(source_ids, source_mask, attention)


def outcome(call: Any) -> tuple[grpc.StatusCode, str]:
    error = call.exception(timeout=PATIENCE)
    assert error is not None
    return call.code(), call.details()


def until_not_serving(running: Running) -> None:
    watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    states = [next(watch).status]
    while states[-1] == SERVING:
        states.append(next(watch).status)
    assert states[-1] == NOT_SERVING
    watch.cancel()


def test_fault_34_a_run_that_hangs_is_given_up(served: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    steps = Gated(Echo())
    with serving(dataclasses.replace(served, steps=steps), watchdog=SOON) as running:
        hanging, streamed = generate(running.stub), stream(running.stub)
        steps.wait()
        waiting = generate(running.stub)
        with caplog.at_level(logging.CRITICAL):
            until_not_serving(running)
            assert [outcome(call) for call in (hanging, streamed, waiting)] == [FAILED] * 3
        assert outcome(generate(running.stub)) == FAILED
        assert running.server.failed.is_set()
        assert "an engine hangs: it is given up" in caplog.text
        running.until_idle()
        steps.open()  # it comes back after all, to nobody


def test_fault_34_long_work_of_short_steps_does_not_hang(served: ServedModel) -> None:
    steps = Gated(Echo())
    with serving(dataclasses.replace(served, steps=steps), watchdog=SOON) as running:
        call = generate(running.stub)
        paused = threading.Event()
        for _ in range(9):
            paused.wait(SOON / 3)
            steps.let()
        assert call.result(PATIENCE).hypotheses
        assert not running.server.failed.is_set()


def test_fault_34_the_process_ends_and_says_so(served: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    steps = Gated(Echo())
    model = dataclasses.replace(served, steps=steps)
    found: list[tuple[grpc.StatusCode, str]] = []
    asking: list[threading.Thread] = []

    def ask(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            found.append(outcome(LimelightServiceStub(channel).Generate.future(pb.GenerateRequest(source="ab"))))

    def ready(server: Server) -> None:
        asking.append(threading.Thread(target=ask, args=(server.port,)))
        asking[0].start()

    options = ServerOptions(port=0, watchdog=SOON)
    with caplog.at_level(logging.CRITICAL):
        assert asyncio.run(serve_until_signal(models_of(model), options, ready)) is False
    asking[0].join(PATIENCE)
    assert found == [FAILED]
    steps.open()


def test_fault_35_a_dead_engine_is_not_healthy(served: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL), serving(dataclasses.replace(served, steps=Dying())) as running:
        calls = [generate(running.stub) for _ in range(5)]
        assert [outcome(call) for call in calls] == [FAILED] * 5
        until_not_serving(running)
        assert outcome(generate(running.stub)) == FAILED
        assert running.server.failed.is_set()
        assert "the engine's thread has died" in caplog.text
        running.until_idle()


def test_fault_35_an_engine_that_dies_while_the_server_stops_is_no_success(
    served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL), serving(dataclasses.replace(served, steps=Late())) as running:
        call = generate(running.stub)
        assert Late.arrived.acquire(timeout=PATIENCE)
        stopping = running.stop()
        while not running.server._calls.draining:
            pass
        Late.release.set()
        assert outcome(call) == FAILED
        assert stopping.result(PATIENCE) is False


def test_fault_35_a_server_of_grpc_that_ends_by_itself_is_told(
    served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the engine's fault: nobody can connect any more, so the process has to end."""
    with caplog.at_level(logging.ERROR), serving(served) as running:
        begin(running.server._server.stop(0)).result(PATIENCE)
        begin(asyncio.wait_for(running.server.failed.wait(), PATIENCE)).result(PATIENCE)
    assert "gRPC's server has ended by itself" in caplog.text
