"""Stopping: not serving, nothing new, everything begun is finished, and the process ends with 0."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from export.manifest import FamilyShape
from serve.bundle import ServedModel
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from tests.reversal import Reversal
from tests.serve.attention import ENCODER
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
def test_what_is_begun_is_finished_and_what_comes_is_refused(
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


def test_when_its_grace_is_over_it_stops_whatever_is_left(gated: Running, gate: Gated) -> None:
    call = generate(gated.stub)
    gate.wait()
    stopping = gated.stop(0.0)
    code, _ = status(call)
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    gated.until_idle()
    gate.open()
    assert stopping.result(PATIENCE) is False
    assert gate.rows == [1]


def test_stopping_when_nothing_is_left_needs_no_grace(served: ServedModel) -> None:
    with serving(served) as server:
        assert generate(server.stub).result().hypotheses[0].text == "hgfedcba"
        assert server.stop(0.0).result(PATIENCE) is True
        assert server.stop(0.0).result(PATIENCE) is True
        code, _ = status(generate(server.stub))
        assert code == grpc.StatusCode.UNAVAILABLE


def test_a_large_answer_has_left_before_the_server_is_gone(served: ServedModel) -> None:
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


COMMAND = """
import dataclasses, sys, threading
import serve.commands
from serve.cli import main
from tests.serve.steps import Gated

class Telling(Gated):
    def _enter(self, rows):
        print("step", flush=True)
        super()._enter(rows)

def load(*arguments, **choices):
    model = serve_load(*arguments, **choices)
    gated = Telling(model.steps)
    threading.Thread(target=lambda: (sys.stdin.readline(), gated.open()), daemon=True).start()
    return dataclasses.replace(model, steps=gated)

serve_load, serve.commands.load_model = serve.commands.load_model, load
main()
"""
"""`limelight serve` whose steps wait for a line on standard input, and are told of on standard output."""


class Process(NamedTuple):
    """The command, and a call of it that is under way."""

    process: "subprocess.Popen[str]"
    channel: grpc.Channel
    call: Any

    def said(self) -> str:
        """The rest of its log, once it has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read()


@pytest.fixture
def command(reversal: Reversal, tmp_path: Path) -> Iterator[Process]:
    port_file = tmp_path / "port"
    options = ("--port", "0", "--port-file", str(port_file), "--threads", "1", "--provider", "cpu")
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", str(reversal.bundle), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
    )
    with process:
        assert process.stderr is not None
        assert process.stdout is not None
        ready = process.stderr.readline()
        address = ready.split(" on ")[-1].split(";")[0]
        assert "reversal 1 (fp32, cpu, 1 threads)" in ready
        with grpc.insecure_channel(address) as channel:
            call = generate(LimelightServiceStub(channel))
            assert process.stdout.readline() == "step\n"
            yield Process(process, channel, call)
        process.kill()
        assert port_file.read_text(encoding="ascii") == f"{address.rpartition(':')[2]}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_finishes_what_is_begun_and_ends_with_0(command: Process, number: signal.Signals) -> None:
    watch = health_pb2_grpc.HealthStub(command.channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    assert next(watch).status == SERVING
    command.process.send_signal(number)
    assert next(watch).status == NOT_SERVING
    assert status(generate(LimelightServiceStub(command.channel))) == REFUSED
    watch.cancel()
    assert command.process.stdin is not None
    command.process.stdin.write("\n")
    command.process.stdin.flush()
    assert command.call.result(PATIENCE).hypotheses[0].text == "hgfedcba"
    assert command.process.wait(PATIENCE) == 0
    assert f"stopping: signal {number.name}" in command.said()


def test_a_second_signal_stops_at_once(command: Process) -> None:
    watch = health_pb2_grpc.HealthStub(command.channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    assert next(watch).status == SERVING
    command.process.send_signal(signal.SIGTERM)
    assert next(watch).status == NOT_SERVING
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(PATIENCE) == 1
    code, _ = status(command.call)
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
