"""Stopping: not serving, nothing new, everything begun is finished, and the process ends with 0."""

import dataclasses
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.load import frames
from bench.load.frames import Frame
from export.manifest import FamilyShape
from serve.bundle import ServedModel
from serve.client import Client, ServerError
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from tests.reversal import Reversal
from tests.serve.attention import ENCODER
from tests.serve.command import GATED
from tests.serve.faults import until
from tests.serve.running import PATIENCE, Running, array, generate, serving, stream
from tests.serve.steps import Echo, Gated

REPOSITORY = Path(__file__).parents[2]

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
REFUSED = (grpc.StatusCode.UNAVAILABLE, "the server is shutting down and takes no new requests")


def status(call: Any) -> tuple[grpc.StatusCode, str]:
    """Code and text of a call, or of a stream, that fails."""
    error = call.exception(timeout=PATIENCE)
    assert error is call
    return call.code(), call.details()


@pytest.mark.parametrize("begin", [generate, stream])
def test_fault_36_what_is_begun_is_finished_and_what_comes_is_refused(
    gated: Running, gate: Gated, begin: Callable[[LimelightServiceStub], Any]
) -> None:
    health = health_pb2_grpc.HealthStub(gated.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    assert next(watch).status == SERVING
    call = begin(gated.stub)
    gate.wait()
    stopping = gated.stop()
    assert next(watch).status == NOT_SERVING
    assert status(generate(gated.stub)) == REFUSED
    assert status(stream(gated.stub)) == REFUSED
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status == NOT_SERVING
    assert not stopping.done()
    watch.cancel()
    gate.open()
    answer = call.result() if begin is generate else list(call)[-1].end
    assert answer.hypotheses[0].text == "hgfedcba"
    assert stopping.result(PATIENCE) is True


def test_fault_36_who_watches_health_and_does_not_read_holds_nothing_up(served: ServedModel) -> None:
    """The package of the health service would wait for him before it said to anybody that the server stops."""
    with serving(served) as server, frames.connection(server.server.port) as silent:
        no_window = Frame(frames.SETTINGS, 0, struct.pack(">HI", frames.INITIAL_WINDOW_SIZE, 0))
        found = frames.begin(silent, no_window)
        frames.call(silent, "/grpc.health.v1.Health/Watch", b"")
        assert next(frame for frame in found if frame.kind == frames.HEADERS)  # it watches; its message has no room
        health = health_pb2_grpc.HealthStub(server.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        assert next(watch).status == SERVING
        stopping = server.stop(0.0)
        assert next(watch).status == NOT_SERVING
        assert stopping.result(PATIENCE / 6) is True


def test_fault_36_when_its_grace_is_over_it_stops_whatever_is_left(gated: Running, gate: Gated) -> None:
    call = generate(gated.stub)
    gate.wait()
    stopping = gated.stop(0.0)
    code, _ = status(call)
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    gated.until_idle()
    gate.open()
    assert stopping.result(PATIENCE) is False
    assert gate.rows == [1]


def test_fault_36_who_keeps_asking_is_refused_in_words(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is with a balancer: calls come until it notices that they are refused."""
    monkeypatch.setattr("serve.server.QUIET", 2.0)  # longer than a thread of this test is kept waiting
    callers = 8

    def ask(address: str) -> str:
        with Client(address) as client:
            for _ in range(10):  # by then all callers are under way
                client.generate("abc")
            asking.wait(PATIENCE)
            while True:
                try:
                    client.generate("abc")
                except ServerError as error:
                    return f"{error.code.name} {error.reason}"

    asking = threading.Barrier(callers + 1)
    with serving(served) as server, ThreadPoolExecutor(callers) as threads:
        asked = [threads.submit(ask, server.address) for _ in range(callers)]
        asking.wait(PATIENCE)
        assert server.stop().result(PATIENCE) is True
        assert [one.result(PATIENCE) for one in asked] == ["UNAVAILABLE SHUTTING_DOWN"] * callers


def test_fault_36_who_never_stops_asking_is_not_waited_for(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.server.QUIET", 10 * PATIENCE)
    monkeypatch.setattr("serve.server.LINGER", 0.1)
    with serving(served) as server:
        generate(server.stub).result()
        assert server.stop().result(PATIENCE) is True


def test_fault_36_stopping_when_nothing_is_left_needs_no_grace(served: ServedModel) -> None:
    with serving(served) as server:
        assert generate(server.stub).result().hypotheses[0].text == "hgfedcba"
        assert server.stop(0.0).result(PATIENCE) is True
        assert server.stop(0.0).result(PATIENCE) is True
        code, _ = status(generate(server.stub))
        assert code == grpc.StatusCode.UNAVAILABLE


def test_fault_36_a_large_answer_has_left_before_the_server_is_gone(served: ServedModel) -> None:
    length = 2500
    manifest = served.manifest.model_copy(
        update={
            "limits": served.manifest.limits.model_copy(update={"longest_source": length}),
            "attention": {"encoder": FamilyShape(layers=1, heads=1)},
        }
    )
    gate = Gated(Echo())
    asked = pb.GenerateRequest(
        source="a" * (length - 1),
        search=pb.SearchOptions(longest=1),
        attention=pb.AttentionOptions(families=[ENCODER]),
    )
    with serving(dataclasses.replace(served, manifest=manifest, steps=gate)) as server:
        options = [("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(server.address, options=options) as channel:
            call = LimelightServiceStub(channel).Generate.future(asked, timeout=PATIENCE)
            gate.wait()
            stopping = server.stop()
            gate.open()
            weights = array(call.result(PATIENCE).attention[0])
            assert stopping.result(PATIENCE) is True
    np.testing.assert_array_equal(weights, np.full((1, 1, length, length), np.float32(1 / length)))


class Process(NamedTuple):
    """The command, while it runs."""

    process: "subprocess.Popen[str]"
    port_file: Path

    def ready(self) -> str:
        """The address, once it serves."""
        assert self.process.stderr is not None
        ready = self.process.stderr.readline()
        assert "reversal 1 (fp32, cpu, 1 threads)" in ready
        address = ready.split(" on ")[-1].split(";")[0]
        until(self.port_file.exists)
        assert self.port_file.read_text(encoding="ascii") == f"{address.rpartition(':')[2]}\n"
        return address

    def heard(self) -> str:
        """The next line on its standard output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def release(self) -> None:
        """Let what waits for a line on standard input go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def said(self) -> str:
        """The rest of its log, once it has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read()


Command = Callable[..., Process]


@pytest.fixture
def command(reversal: Reversal, tmp_path: Path) -> Iterator[Command]:
    """Begins it."""
    with ExitStack() as stack:

        def begin(script: str = GATED, port: int = 0) -> Process:
            port_file = tmp_path / "port"
            options = ("--port", str(port), "--port-file", str(port_file), "--threads", "1", "--provider", "cpu")
            process = subprocess.Popen(
                [sys.executable, "-c", script, "serve", str(reversal.bundle), *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return Process(process, port_file)

        yield begin


BEGUN: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "unary": (generate, lambda call: call.result(PATIENCE)),
    "stream": (stream, lambda call: list(call)[-1].end),
}
"""How a call is begun, and what it answers."""


class Asked(NamedTuple):
    """The command, a channel to it, and a call that is under way."""

    command: Process
    channel: grpc.Channel
    call: Any
    end: Callable[[Any], Any]
    """Of the call: what it answers."""


@pytest.fixture(params=BEGUN)
def asked(command: Command, request: pytest.FixtureRequest) -> Iterator[Asked]:
    begun = command()
    with grpc.insecure_channel(begun.ready()) as channel:
        begin, end = BEGUN[request.param]
        call = begin(LimelightServiceStub(channel))
        assert begun.heard() == "step"
        yield Asked(begun, channel, call, end)


def serving_watch(channel: grpc.Channel) -> Any:
    """Health, as it changes; it is SERVING."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    assert next(watch).status == SERVING
    return watch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_fault_36_a_signal_finishes_what_is_begun_and_ends_with_0(asked: Asked, number: signal.Signals) -> None:
    watch = serving_watch(asked.channel)
    asked.command.process.send_signal(number)
    assert next(watch).status == NOT_SERVING
    assert status(generate(LimelightServiceStub(asked.channel))) == REFUSED
    watch.cancel()
    asked.command.release()
    assert asked.end(asked.call).hypotheses[0].text == "hgfedcba"
    assert asked.command.process.wait(PATIENCE) == 0
    assert f"stopping: signal {number.name}" in asked.command.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_fault_36_idle_it_ends_with_0(command: Command, number: signal.Signals) -> None:
    begun = command()
    with grpc.insecure_channel(begun.ready()) as channel:
        watch = serving_watch(channel)
        begun.process.send_signal(number)
        assert next(watch).status == NOT_SERVING
        assert begun.process.wait(PATIENCE) == 0
    assert f"stopping: signal {number.name}" in begun.said()


def test_fault_37_a_second_signal_stops_at_once(asked: Asked) -> None:
    watch = serving_watch(asked.channel)
    asked.command.process.send_signal(signal.SIGTERM)
    assert next(watch).status == NOT_SERVING
    asked.command.process.send_signal(signal.SIGTERM)
    assert asked.command.process.wait(PATIENCE) == 1
    code, _ = status(asked.call)
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


LOADING = """
import sys
import serve.commands
from serve.cli import main

def load(*arguments, **choices):
    print("loading", flush=True)
    sys.stdin.readline()
    return serve_load(*arguments, **choices)

serve_load, serve.commands.load_model = serve.commands.load_model, load
main()
"""
"""`limelight serve` that loads its bundle when there is a line on standard input."""


def test_fault_37_a_signal_while_loading_ends_it(command: Command) -> None:
    begun = command(LOADING)
    assert begun.heard() == "loading"
    begun.process.send_signal(signal.SIGTERM)
    assert begun.process.stderr is not None
    assert "stopped before anything was served" in begun.process.stderr.readline()
    begun.release()
    assert begun.process.wait(PATIENCE) == 0
    assert "Traceback" not in begun.said()
    assert not begun.port_file.exists()


def test_fault_37_killed_it_can_be_started_on_the_same_port(command: Command) -> None:
    first = command()
    address = first.ready()
    with grpc.insecure_channel(address) as channel:
        call = generate(LimelightServiceStub(channel))
        assert first.heard() == "step"
        first.process.kill()
        assert first.process.wait(PATIENCE) == -signal.SIGKILL
        assert status(call)[0] == grpc.StatusCode.UNAVAILABLE
    second = command(port=int(address.rpartition(":")[2]))
    assert second.ready() == address
    with grpc.insecure_channel(address) as channel:
        call = generate(LimelightServiceStub(channel))
        assert second.heard() == "step"
        second.release()
        assert call.result(PATIENCE).hypotheses[0].text == "hgfedcba"
