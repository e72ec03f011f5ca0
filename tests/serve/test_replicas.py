"""Several servers behind one name: the client spreads its calls, and loses none when one of them stops."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from serve.bundle import ServedModel
from serve.client import Client, ServerError
from tests.serve.running import PATIENCE, Running, generate, serving
from tests.serve.steps import Gated

CALLS = 24


@pytest.fixture
def other(served: ServedModel) -> Iterator[Running]:
    with serving(served) as running:
        yield running


def name_of(*servers: Running) -> str:
    """An address that stands for several, as a name does that is resolved to several."""
    return "ipv4:" + ",".join(server.address for server in servers)


def read_by(server: Running) -> int:
    """What it has read so far, in tokens."""
    return server.server.models.counts().source_tokens


def ask(client: Client) -> set[str]:
    """What many calls at a time answer."""
    with ThreadPoolExecutor(4) as threads:
        return set(threads.map(lambda _: client.generate("abcdefgh").best.text, range(CALLS)))


def test_calls_are_spread(running: Running, other: Running) -> None:
    before = read_by(running)
    with Client(name_of(running, other), timeout=PATIENCE, replicas=True) as client:
        while not (read_by(other) and read_by(running) - before):  # which is connected to first, chance decides
            assert client.generate("abcd").best.text == "dcba"
        before = read_by(running) - read_by(other)
        assert ask(client) == {"hgfedcba"}
    assert read_by(running) - read_by(other) == before, "each had half of them"


def test_a_server_that_stops_costs_no_call(gated: Running, gate: Gated, running: Running) -> None:
    with Client(name_of(gated, running), timeout=PATIENCE, replicas=True) as client:
        assert client.describe().name == "reversal"
        held = generate(gated.stub)
        gate.wait()
        stopping = gated.stop()
        assert ask(client) == {"hgfedcba"}
        assert not stopping.done()
        gate.open()
        assert held.result(PATIENCE).hypotheses[0].text == "hgfedcba"
        assert stopping.result(PATIENCE) is True
        assert ask(client) == {"hgfedcba"}


def test_without_it_a_server_that_stops_refuses(gated: Running, gate: Gated, running: Running) -> None:
    """Or else the test above would see nothing."""
    with Client(name_of(gated, running), timeout=PATIENCE) as client:
        assert client.describe().name == "reversal"
        held = generate(gated.stub)
        gate.wait()
        stopping = gated.stop()
        with pytest.raises(ServerError) as refused:
            ask(client)
        assert refused.value.code is grpc.StatusCode.UNAVAILABLE
        gate.open()
        assert held.result(PATIENCE).hypotheses[0].text == "hgfedcba"
        assert stopping.result(PATIENCE) is True


def test_none_of_them_there_is_told() -> None:
    address = "ipv4:127.0.0.1:1,127.0.0.1:2"
    with Client(address, timeout=PATIENCE, replicas=True) as client, pytest.raises(ServerError) as refused:
        client.models()
    assert refused.value.code is grpc.StatusCode.UNAVAILABLE
    assert "no Limelight server answers there" in str(refused.value)
