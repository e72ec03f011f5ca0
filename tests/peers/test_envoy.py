"""A real Envoy, configured as we ship it: what replicas are told, what is tried again, what is lost when they go."""

import dataclasses
import queue
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.failover import RETRIES, failover, judged
from bench.load import frames
from bench.load.callers import Kind
from bench.load.envoy import BINARY, FILE, MISSING, Configuration, Envoy, proxied
from bench.load.fleet import CLIENT_HEADER
from serve.bundle import ServedModel
from serve.client import Client
from serve.jobs import EngineLimits
from serve.observer import Observer
from serve.pb.limelight.v1 import admin_pb2, admin_pb2_grpc
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from serve.request import ID_KEY
from serve.status import PUSHBACK_KEY
from tests.reversal import Reversal, parts
from tests.serve.running import PATIENCE, Running, generate, serving
from tests.serve.steps import Gated

pytestmark = pytest.mark.skipif(not BINARY.exists(), reason=MISSING)

LARGE = "a" * (4 * 1024 * 1024 - 100)
"""A text that just fits into a request, and is far longer than the model takes."""

CALLERS = {Kind.UNARY: 6, Kind.STREAM: 3}

LOST_PATIENCE = "http.limelight.downstream_rq_max_duration_reached"
"""Envoy's counter of calls that it ended because their deadline had passed."""


@contextmanager
def behind_envoy(folder: Path, *ports: int, look: str | None = None) -> Iterator[tuple[Envoy, grpc.Channel]]:
    """Envoy in front of what listens there, and a channel to it; health is looked at so often, if not as we ship it."""
    configuration = Configuration()
    configuration.between(ports)
    if look is not None:
        (check,) = configuration.cluster["health_checks"]
        check["interval"] = check["no_traffic_interval"] = look
    with proxied(configuration, folder) as envoy, grpc.insecure_channel(f"127.0.0.1:{envoy.port}") as channel:
        yield envoy, channel


def ports_of(replicas: Sequence[Running]) -> list[int]:
    return [replica.server.port for replica in replicas]


@pytest.fixture
def replicas(served: ServedModel) -> Iterator[list[Running]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving(served, client_header=CLIENT_HEADER)) for _ in range(2)]


@pytest.fixture
def gates(served: ServedModel) -> Iterator[list[Gated]]:
    """Steps of the model that wait for the test: for each replica its own."""
    gates = [Gated(served.steps) for _ in range(2)]
    yield gates
    for gate in gates:
        gate.open()


@pytest.fixture
def gated(served: ServedModel, gates: list[Gated]) -> Iterator[list[Running]]:
    """Replicas of such steps, with room for one request in the queue and one under way."""
    limits = EngineLimits(queue=1, client_queue=1, rows=1)
    with ExitStack() as stack:
        models = [dataclasses.replace(served, steps=gate) for gate in gates]
        yield [stack.enter_context(serving(model, limits)) for model in models]
        for gate in gates:
            gate.open()


def test_the_file_is_valid() -> None:
    command = [str(BINARY), "--mode", "validate", "--config-path", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "[warning]" not in done.stderr


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Metadata of every call that replicas get."""
    calls: list[dict[str, str]] = []
    begun = Observer.begun

    def telling(self: Observer, method: str, context: Any) -> Any:
        calls.append(dict(context.invocation_metadata()))
        return begun(self, method, context)

    monkeypatch.setattr(Observer, "begun", telling)
    return calls


def test_replicas_are_told_whose_call_it_is(
    replicas: list[Running], told: list[dict[str, str]], tmp_path: Path
) -> None:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "vendor=value"}
    steering = {"x-envoy-retry-on": "5xx", "x-envoy-max-retries": "9", "x-envoy-upstream-rq-timeout-ms": "1"}
    lies = {CLIENT_HEADER: "somebody-else"}
    with behind_envoy(tmp_path, *ports_of(replicas)) as (_, channel):
        stub, request = LimelightServiceStub(channel), pb.GenerateRequest(source="abc")
        metadata = tuple((trace | steering | lies | {ID_KEY: "my-own.id"}).items())
        own = stub.Generate.with_call(request, timeout=PATIENCE, metadata=metadata)[1]
        other = stub.Generate.with_call(request, timeout=PATIENCE)[1]
    first, second = told
    assert trace.items() <= first.items()
    assert not steering.keys() & first.keys()
    assert first[CLIENT_HEADER] == second[CLIENT_HEADER] == "127.0.0.1"
    assert first[ID_KEY] == dict(own.trailing_metadata())[ID_KEY] == "my-own.id"
    assert second[ID_KEY] == dict(other.trailing_metadata())[ID_KEY]
    assert len(second[ID_KEY]) == 36  # Envoy's, which is then in its log and in the replica's


def test_health_is_of_the_whole_and_nobody_administers(replicas: list[Running], tmp_path: Path) -> None:
    with behind_envoy(tmp_path, *ports_of(replicas)) as (_, channel):
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status == 1
        for call in (
            lambda: next(health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)),
            lambda: admin_pb2_grpc.AdminServiceStub(channel).Reload(admin_pb2.ReloadRequest(), timeout=PATIENCE),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_full_queue_is_told_to_the_client_and_not_tried_elsewhere(
    gated: list[Running], gates: list[Gated], tmp_path: Path
) -> None:
    room, more = 2 * 2, 6
    ended: queue.Queue[Any] = queue.Queue()
    with behind_envoy(tmp_path, *ports_of(gated)) as (envoy, channel):
        calls = [generate(LimelightServiceStub(channel)) for _ in range(room + more)]
        for call in calls:
            call.add_done_callback(ended.put)
        refused = [ended.get(timeout=PATIENCE) for _ in range(more)]
        for gate in gates:
            gate.open()
        refused += [call for call in calls if call.exception(PATIENCE) and call not in refused]
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert all(int(dict(call.trailing_metadata())[PUSHBACK_KEY]) > 0 for call in refused)
        assert len(refused) < len(calls)
        assert envoy.counter(RETRIES) == 0


def test_a_deadline_is_kept_where_a_replica_says_nothing(tmp_path: Path) -> None:
    """Nor does it look healthy: where no replica does, all are tried."""
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as stack:
        port = silent.getsockname()[1]
        envoy, _ = stack.enter_context(behind_envoy(tmp_path, port, port))
        opened = stack.enter_context(frames.connection(envoy.port))
        answers = frames.begin(opened)
        message = pb.GenerateRequest(source="abc").SerializeToString()
        frames.call(opened, "/limelight.v1.LimelightService/Generate", message, metadata={"grpc-timeout": "100m"})
        answer = next(frame for frame in answers if frame.kind == frames.HEADERS)
        assert answer.flags & frames.END_STREAM
        assert envoy.counter(LOST_PATIENCE) == 1
        assert envoy.counter(RETRIES) == 0


def test_the_largest_request_can_be_sent_again(replicas: list[Running], tmp_path: Path) -> None:
    gone, there = replicas
    with behind_envoy(tmp_path, *ports_of(replicas), look="600s") as (envoy, channel):
        stub = LimelightServiceStub(channel)
        gone.stop(0).result(PATIENCE)
        while not envoy.counter(RETRIES):  # until one was sent to where nobody is
            call = stub.Generate.future(pb.GenerateRequest(source=LARGE), timeout=PATIENCE)
            assert isinstance(call.exception(), grpc.RpcError)
            assert call.code() is grpc.StatusCode.INVALID_ARGUMENT, call.details()
        assert envoy.counter("cluster.limelight.upstream_rq_retry_success") == envoy.counter(RETRIES)
    there.until_idle()


def test_a_stream_that_was_answered_ends_well_for_envoy_too(replicas: list[Running], tmp_path: Path) -> None:
    with (
        behind_envoy(tmp_path, *ports_of(replicas)) as (envoy, _),
        Client(f"127.0.0.1:{envoy.port}", timeout=PATIENCE) as client,
    ):
        for _ in range(20):
            assert list(client.stream("abcd"))
            assert client.generate_chunked("abcd", families=["cross"]).best.text == "dcba"
        reset = envoy.counter("http.limelight.downstream_rq_rx_reset")
    assert reset == 0
    ends = [line.split()[3:5] for line in envoy.calls]  # whole, now that it has ended
    assert ends == [["OK", "-"]] * 40


def run(reversal: Reversal, *, retries: bool) -> list[str]:
    """What is wrong with a short run."""
    sources = parts()["test"][:30]
    phases = failover(reversal.bundle, sources, rounds=1, steady=1.0, callers=CALLERS, retries=retries)
    return judged(phases, CALLERS[Kind.STREAM])


def test_a_killed_replica_costs_streams_at_most_and_a_stopped_one_nothing(reversal: Reversal) -> None:
    assert run(reversal, retries=True) == []


def test_without_retries_calls_are_lost(reversal: Reversal) -> None:
    """The negative control."""
    assert [failure for failure in run(reversal, retries=False) if "unary calls ended with UNAVAILABLE" in failure]
