"""What stands around the service: health, reflection, addresses, and calls whose callers are gone."""

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from serve.bundle import ServedModel
from serve.errors import AddressError
from serve.inference import INFERENCE
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.server import SERVICE, ServerOptions, create_server
from tests.serve.running import PATIENCE, Running, begin, generate, models_of, stream
from tests.serve.steps import Gated

SERVING = health_pb2.HealthCheckResponse.SERVING


def health(running: Running) -> health_pb2_grpc.HealthStub:
    return health_pb2_grpc.HealthStub(running.channel)


def status(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_is_serving(running: Running, service: str) -> None:
    assert SERVICE == "limelight.v1.LimelightService"
    asked = health_pb2.HealthCheckRequest(service=service)
    assert health(running).Check(asked, timeout=PATIENCE).status == SERVING
    watch = health(running).Watch(asked, timeout=PATIENCE)
    assert next(watch).status == SERVING
    watch.cancel()


def test_health_of_what_is_not_served(running: Running) -> None:
    asked = health_pb2.HealthCheckRequest(service="limelight.v1.Other")
    assert status(lambda: health(running).Check(asked, timeout=PATIENCE)) == (grpc.StatusCode.NOT_FOUND, "")
    watch = health(running).Watch(asked, timeout=PATIENCE)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_reflection_tells_services_and_their_messages(running: Running) -> None:
    database = ProtoReflectionDescriptorDatabase(running.channel)
    assert set(database.get_services()) == {
        SERVICE,
        INFERENCE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    found = database.FindFileContainingSymbol(SERVICE)
    assert found.package == "limelight.v1"
    assert [method.name for method in found.service[0].method] == [
        "Generate",
        "GenerateStream",
        "GenerateChunked",
        "GenerateMany",
        "Score",
        "GetModel",
        "ListModels",
    ]


def test_the_system_chooses_a_port(running: Running, gated: Running) -> None:
    assert 0 < running.server.port < 65536
    assert running.server.port != gated.server.port


def test_a_port_in_use_is_told(running: Running, served: ServedModel) -> None:
    port = running.server.port
    with pytest.raises(
        AddressError,
        match=rf"^cannot listen on 127\.0\.0\.1:{port}: is another server there\? Port 0 takes a free one$",
    ):
        begin(create_server(models_of(served), ServerOptions(port=port))).result(PATIENCE)
    assert running.stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE).model.name == "reversal"


def test_an_address_that_is_not_ours_is_told(served: ServedModel) -> None:
    with pytest.raises(AddressError, match=r"^cannot listen on 192\.0\.2\.1:0: "):
        begin(create_server(models_of(served), ServerOptions(host="192.0.2.1", port=0))).result(PATIENCE)


def test_a_stream_is_sent_as_it_is_decoded(gated: Running, gate: Gated) -> None:
    events = stream(gated.stub)
    gate.let()
    assert next(events).WhichOneof("event") == "start"
    assert next(events).token.text == "h"
    for letter in "gf":
        gate.let()
        assert next(events).token.text == letter
    assert len(gate.rows) <= 4
    gate.open()
    assert "".join(event.token.text for event in events) == "edcba"


def test_fault_21_a_full_queue_is_told(gated: Running, gate: Gated) -> None:
    first = generate(gated.stub)
    gate.wait()
    done: SimpleQueue[Any] = SimpleQueue()
    calls = [generate(gated.stub, "abcd") for _ in range(3)]
    for call in calls:
        call.add_done_callback(done.put)
    refused = done.get(timeout=PATIENCE)
    expected = (grpc.StatusCode.RESOURCE_EXHAUSTED, "2 requests are waiting, the limit is 2: retry later")
    assert (refused.code(), refused.details()) == expected
    gate.open()
    assert first.result().hypotheses[0].text == "hgfedcba"
    assert [call.result().hypotheses[0].text for call in calls if call is not refused] == ["dcba", "dcba"]
