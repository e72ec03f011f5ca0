"""Envoy's configuration fits the server; that Envoy does what it says is for tests/peers/test_envoy.py."""

import re
from typing import Any

import pytest
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

import serve.server
from bench.load.envoy import FILE, Configuration
from bench.load.fleet import CLIENT_HEADER
from serve.connections import PING_INTERVAL, ConnectionLimits
from serve.inference import INFERENCE
from serve.server import SERVICE, ServerOptions
from serve.settings import Settings

SERVER = ServerOptions()
LIMITS = ConnectionLimits()
ARGUMENTS = dict(LIMITS.arguments())

PREFIX = 5
"""Bytes before a message of gRPC's."""


@pytest.fixture(scope="module")
def configuration() -> Configuration:
    return Configuration()


def seconds(duration: str) -> float:
    assert duration.endswith("s")
    return float(duration[:-1])


def http2(part: dict[str, Any]) -> Any:
    (options,) = part["typed_extension_protocol_options"].values()
    return options["explicit_http_config"]["http2_protocol_options"]


def test_it_listens_on_this_machine_alone(configuration: Configuration) -> None:
    addresses = [configuration.whole["admin"]["address"]["socket_address"]]
    addresses += [configuration.listener["address"]["socket_address"], *configuration.replicas]
    assert {address["address"] for address in addresses} == {SERVER.host}
    ports = [address["port_value"] for address in addresses]
    assert len(set(ports)) == len(ports) == 4
    assert ports[1] == SERVER.port  # clients ask where they would without it


def test_what_it_says_to_start_is_what_it_looks_for(configuration: Configuration) -> None:
    told = re.findall(
        r"^#   limelight serve BUNDLE --port (\d+) --client-header (\S+)$", FILE.read_text(), re.MULTILINE
    )
    assert told == [(str(replica["port_value"]), CLIENT_HEADER) for replica in configuration.replicas]


def test_all_that_clients_may_call_has_a_way_and_nothing_else(configuration: Configuration) -> None:
    matches = [route["match"] for route in configuration.host["routes"]]
    services = (SERVICE, INFERENCE, reflection.SERVICE_NAME)
    assert [match.get("prefix") for match in matches] == [*(f"/{service}/" for service in services), None]
    assert matches[-1]["path"] == f"/{health.SERVICE_NAME}/Check"
    assert all(match["grpc"] == {} for match in matches)
    assert {route["route"]["cluster"] for route in configuration.host["routes"]} == {configuration.cluster["name"]}


def test_health_is_asked_of_a_service_that_is_known_when_models_are_loaded(configuration: Configuration) -> None:
    (check,) = configuration.cluster["health_checks"]
    assert check["grpc_health_check"] == {"service_name": SERVICE}


def test_a_server_that_stops_waits_until_it_is_noticed(configuration: Configuration) -> None:
    (check,) = configuration.cluster["health_checks"]
    assert check["interval"] == check["no_traffic_interval"]
    assert seconds(check["interval"]) < serve.server.QUIET < serve.server.LINGER


def test_clients_are_told_apart_by_what_they_cannot_write(configuration: Configuration) -> None:
    (added,) = configuration.host["request_headers_to_add"]
    assert added["header"]["key"] == CLIENT_HEADER
    assert added["append_action"] == "OVERWRITE_IF_EXISTS_OR_ADD"
    assert Settings(client_header=CLIENT_HEADER).options.client_header == CLIENT_HEADER
    assert configuration.connections["use_remote_address"] is True


def test_every_request_that_a_server_takes_can_be_sent_again(configuration: Configuration) -> None:
    assert configuration.host["request_body_buffer_limit"] == ARGUMENTS["grpc.max_receive_message_length"] + PREFIX


def test_only_what_is_safe_and_of_use_is_tried_again(configuration: Configuration) -> None:
    policy = configuration.host["retry_policy"]
    assert set(policy["retry_on"].split(",")) == {
        "connect-failure",
        "reset-before-request",
        "refused-stream",
        "reset",
        "unavailable",
        "cancelled",
    }
    assert not {"per_try_timeout", "per_try_idle_timeout"} & policy.keys()
    assert "hedge_policy" not in configuration.host
    for route in configuration.host["routes"]:
        assert not {"retry_policy", "hedge_policy"} & route["route"].keys()


def test_deadlines_are_the_clients(configuration: Configuration) -> None:
    for route in configuration.host["routes"]:
        assert route["route"]["timeout"] == "0s"
        assert route["route"]["max_stream_duration"] == {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"}


def test_as_many_calls_as_servers_take_and_one_can_lose(configuration: Configuration) -> None:
    (threshold,) = configuration.cluster["circuit_breakers"]["thresholds"]
    taken = len(configuration.replicas) * SERVER.most_calls
    assert min(threshold["max_requests"], threshold["max_pending_requests"]) >= taken
    assert threshold["retry_budget"]["min_retry_concurrency"] >= SERVER.most_calls


def test_servers_hang_up_neither_on_its_pings_nor_before_it_does(configuration: Configuration) -> None:
    (options,) = configuration.cluster["typed_extension_protocol_options"].values()
    assert seconds(options["common_http_protocol_options"]["idle_timeout"]) < LIMITS.connection_idle
    assert seconds(http2(configuration.cluster)["connection_keepalive"]["interval"]) > PING_INTERVAL
    assert "grpc.max_connection_age_ms" not in ARGUMENTS


def test_clients_have_the_limits_that_a_server_alone_would_set(configuration: Configuration) -> None:
    connections = configuration.connections
    (monitor,) = configuration.whole["overload_manager"]["resource_monitors"]
    assert monitor["typed_config"]["max_active_downstream_connections"] == LIMITS.connections
    keepalive = connections["http2_protocol_options"]["connection_keepalive"]
    assert (seconds(keepalive["interval"]), seconds(keepalive["timeout"])) == (
        LIMITS.keepalive,
        LIMITS.keepalive_timeout,
    )
    assert seconds(connections["common_http_protocol_options"]["idle_timeout"]) == LIMITS.connection_idle
    assert seconds(connections["stream_flush_timeout"]) == SERVER.write_timeout
    assert seconds(connections["request_headers_timeout"]) == LIMITS.handshake


def test_those_who_read_nothing_leave_room_for_others(configuration: Configuration) -> None:
    windows = http2(configuration.cluster)
    assert windows["initial_connection_window_size"] >= 1000 * windows["initial_stream_window_size"]
