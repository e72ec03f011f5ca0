"""No client keeps others out or takes all memory: by calls that say nothing, or answers that it never reads."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.load import frames
from bench.load.frames import Frame
from serve.bundle import ServedModel
from serve.jobs import EngineLimits
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.server import SERVICE
from tests.serve.running import PATIENCE, Running, generate, serving
from tests.serve.shelf import failed

ELSEWHERE = "127.0.0.2"
"""Another client's address; the tests' channel comes from 127.0.0.1."""

SMALL = EngineLimits(queue=8, rows=4)
MOST, SHARE = 16, 14
"""Calls that may have begun with these limits: in all, and of one client."""


@contextmanager
def silent_calls(running: Running, method: str, count: int, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    """So many calls have begun, and nothing more is said of them."""
    with frames.connection(running.server.port, source) as opened, closing(frames.begin(opened)) as found:
        begun = [frames.headers(f"/{SERVICE}/{method}", 1 + 2 * number) for number in range(count)]
        frames.send(opened, *begun, Frame(frames.PING, 0, bytes(8)))
        next(frame for frame in found if frame.kind == frames.PING and frame.flags == frames.ACKNOWLEDGED)
        yield opened


def refused(running: Running) -> str:
    """A call of 127.0.0.1 is refused, once what came before has been seen; returns why."""
    for _ in range(1000):
        try:
            answered(running)
        except grpc.RpcError as error:
            return str(error)
    return "it is not"


def answered(running: Running) -> bool:
    return bool(generate(running.stub, "abc").result(PATIENCE).hypotheses[0].text == "cba")


@pytest.mark.parametrize("method", ["GenerateMany", "Generate"])
def test_fault_30_calls_that_say_nothing_leave_others_their_share(served: ServedModel, method: str) -> None:
    with serving(served, SMALL) as running:
        with silent_calls(running, method, 2 * MOST, ELSEWHERE):
            assert answered(running)
        with silent_calls(running, method, 2 * MOST):
            assert f"{SHARE} calls of one client have begun and not ended, which is the limit" in refused(running)
        assert until_answered(running)


def until_answered(running: Running) -> bool:
    """Once gRPC has noticed that a connection is closed."""
    for _ in range(1000):
        with suppress(grpc.RpcError):
            return answered(running)
    return False


def test_fault_30_a_message_that_does_not_come_is_not_waited_for(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.wire.MESSAGE", 0.2)
    with (
        serving(served, SMALL) as running,
        frames.connection(running.server.port) as opened,
        closing(frames.begin(opened)) as found,
    ):
        frames.send(opened, frames.headers(f"/{SERVICE}/Generate", 1))
        ended = next(frame for frame in found if frame.stream == 1 and frame.flags & frames.END_STREAM)
        assert ended.kind == frames.HEADERS
        assert answered(running)


def test_fault_29_answers_that_nobody_reads_are_not_piled_up(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.calls.UNREAD", 2000)
    request = pb.GenerateRequest(source="abcdefgh").SerializeToString()
    nothing = Frame(frames.SETTINGS, 0, frames.INITIAL_WINDOW_SIZE.to_bytes(2) + (0).to_bytes(4))
    with serving(served) as running:
        with (
            frames.connection(running.server.port) as opened,
            closing(frames.begin(opened, nothing)) as found,
        ):
            for stream in range(1, 81, 2):
                frames.call(opened, f"/{SERVICE}/Generate", request, stream)
            # Of refusals there is nothing to read but how they end.
            next(frame for frame in found if frame.stream and frame.flags & frames.END_STREAM)
            assert "answers of 0 MiB have not been read by their clients: read them first" in refused(running)
            with (
                frames.connection(running.server.port, ELSEWHERE) as other,
                closing(frames.begin(other)) as got,
            ):
                frames.call(other, f"/{SERVICE}/Generate", pb.GenerateRequest(source="a").SerializeToString())
                assert next(frame for frame in got if frame.stream == 1 and frame.kind == frames.DATA).payload
        assert until_answered(running)


def test_health_is_told_whatever_else_is_under_way(served: ServedModel) -> None:
    with serving(served, SMALL) as running, silent_calls(running, "GenerateMany", 2 * MOST):
        stub = health_pb2_grpc.HealthStub(running.channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status == 1
        watching = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE) for _ in range(SHARE)]
        assert [next(one).status for one in watching] == [1] * SHARE
        code, _ = failed(lambda: next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
