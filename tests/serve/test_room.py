"""Room for newcomers: who has very many connections loses those without a call; and a process that is out of files."""

import dataclasses
import logging
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

import serve.room
from bench.load import frames
from model.errors import ConfigError
from serve.bundle import ServedModel
from serve.connections import FILES, ConnectionLimits
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from serve.room import Connection, Peer, longest_silent, open_files, peer_named
from tests.reversal import Reversal
from tests.serve.command import ask, begun, port
from tests.serve.faults import until
from tests.serve.running import PATIENCE, generate, serving
from tests.serve.scraping import scrape, value
from tests.serve.steps import Gated

pytestmark = pytest.mark.skipif(not serve.room.AVAILABLE, reason="this system does not tell what is open")

LIMITS = ConnectionLimits(connections=40)
"""Of which ten are kept free, and half are freed when there are fewer."""

MANY, FEW = "127.0.0.2", "127.0.0.3"
"""Addresses of this machine that connections come from."""


@contextmanager
def crowd(port: int, count: int, source: str = MANY, *, silent: bool = False) -> Iterator[list[socket.socket]]:
    """Connections without a call; silent ones do not even say what is to be spoken."""
    with ExitStack() as stack:
        opened = [stack.enter_context(frames.connection(port, source)) for _ in range(count)]
        if not silent:
            for one in opened:
                frames.begin(one)
        for one in opened:
            one.setblocking(False)
        yield opened


def is_closed(opened: socket.socket) -> bool:
    """Whether the server has hung up."""
    with suppress(BlockingIOError):
        while opened.recv(65536):
            pass
        return True
    return False


def newcomer(address: str) -> str:
    """An answer over a connection of its own."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer: Any = generate(LimelightServiceStub(channel)).result(PATIENCE)
    text: str = answer.hypotheses[0].text
    return text


@pytest.mark.parametrize("silent", [False, True], ids=["idle", "slow preface"])
def test_fault_30_a_crowd_leaves_room_for_newcomers(served: ServedModel, silent: bool) -> None:
    with serving(served, connection_limits=LIMITS, metrics_port=0) as running:
        with (
            crowd(running.server.port, 3, FEW, silent=silent) as few,
            crowd(running.server.port, 32, silent=silent) as many,
        ):
            until(lambda: sum(map(is_closed, many)) == 15)
            assert not any(map(is_closed, few))
            for _ in range(20):
                assert newcomer(running.address) == "hgfedcba"
            assert not any(map(is_closed, few))
        assert value(scrape(running), "connections_closed_total") >= 15
    assert running.server._calls.peers == {}


def test_fault_30_who_waits_for_an_answer_is_not_hung_up_on(served: ServedModel, gate: Gated) -> None:
    """Though it has been silent for longer than anybody else, and its address has most."""
    with serving(dataclasses.replace(served, steps=gate), connection_limits=LIMITS) as running:
        calls = [generate(running.stub)]
        gate.wait()
        with crowd(running.server.port, 35, "127.0.0.1") as many:
            until(lambda: sum(map(is_closed, many)) == 16)
            gate.open()
            assert [call.result(PATIENCE).hypotheses[0].text for call in calls] == ["hgfedcba"]


def test_fault_30_a_crowd_is_told_of_once(
    served: ServedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.room, "QUIET", 0.5)
    with caplog.at_level(logging.INFO, "serve.room"), serving(served, connection_limits=LIMITS) as running:
        with crowd(running.server.port, 35) as first:
            until(lambda: sum(map(is_closed, first)) == 15)
            with crowd(running.server.port, 15) as second:
                until(lambda: sum(map(is_closed, [*first, *second])) == 30)
        until(lambda: len(caplog.records) == 2)
    told, over = [record.message for record in caplog.records]
    assert told.startswith("35 of 40 connections are taken, most of them by 127.0.0.2: ")
    assert over == "there is room again: 30 connections were closed"


def connection(host: str, number: int, silence: int) -> Connection:
    return Connection(number, Peer(host, number), silence)


def test_of_whoever_has_most_the_longest_silent_are_closed_first() -> None:
    there = [connection("a", number, silence) for number, silence in enumerate((5, 900, 70, 800))]
    there += [connection("b", 10 + number, silence) for number, silence in enumerate((6000, 3000))]
    there += [connection("c", 20, 9000)]

    def chosen(count: int, *busy: Connection) -> list[int]:
        return [one.descriptor for one in longest_silent(there, {one.peer for one in busy}, count)]

    assert chosen(0) == chosen(-3) == []
    assert chosen(2) == [1, 3]
    assert chosen(3) == [1, 3, 10], "a and b have alike, and b has been silent for longer"
    assert chosen(2, there[1]) == [3, 2], "what has a call counts, and stays"
    assert len(chosen(99, there[1], there[-1])) == 5


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("ipv4:127.0.0.1:1024", Peer("127.0.0.1", 1024)),
        ("ipv6:%5B::1%5D:1024", Peer("::1", 1024)),
        ("ipv6:[fe80::1%25eth0]:1024", Peer("fe80::1", 1024)),
        ("ipv6:[::ffff:10.0.0.7]:1024", Peer("10.0.0.7", 1024)),
        ("unix:/run/socket", Peer("", 0)),
    ],
)
def test_peers_by_grpcs_names(name: str, peer: Peer) -> None:
    assert peer_named(name) == peer


def test_a_connection_that_has_spoken_since_is_not_closed() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
        listening.accept()[0] as server,
    ):
        until(lambda: next(serve.room.connections(listening.getsockname()[1])).silence >= 20)
        (seen,) = serve.room.connections(listening.getsockname()[1])
        assert (seen.descriptor, seen.peer) == (server.fileno(), Peer(*client.getsockname()))
        client.sendall(b"spoken")
        assert server.recv(6) == b"spoken"
        assert serve.room.close(seen) is False
        assert serve.room.close(seen._replace(silence=0)) is True
        assert client.recv(1) == b""


def test_open_files_are_counted() -> None:
    before = open_files()
    assert before is not None
    with socket.create_server(("127.0.0.1", 0)):
        assert open_files() == before + 1


def told(log: Path, what: str) -> int:
    return log.read_text(encoding="utf-8").count(what)


def test_fault_30_a_process_that_can_open_no_more_files_recovers(reversal: Reversal, tmp_path: Path) -> None:
    """Its limit is lowered while it runs: at the start it sees to it that there are enough."""
    log = tmp_path / "log"
    with (
        log.open("wb") as written,
        begun(reversal.bundle, tmp_path, "--metrics-port=0", "--poll=0.1", log=written) as process,
    ):
        address = f"127.0.0.1:{port(tmp_path, process)}"
        files = Path(f"/proc/{process.pid}/fd")
        with grpc.insecure_channel(address) as channel:
            assert generate(LimelightServiceStub(channel)).result(PATIENCE).hypotheses
            before = len(list(files.iterdir()))
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (before + 20, 4096))
            with crowd(int(address.rpartition(":")[2]), 60):
                until(lambda: told(log, "and has: whoever connects has to wait") == 1)
                for _ in range(20):
                    assert generate(LimelightServiceStub(channel)).result(PATIENCE).hypotheses
        until(lambda: told(log, "files can be opened again") == 1)
        assert ask(tmp_path, process).hypotheses
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert f"this process may open {before + 20} files, and has" in log.read_text(encoding="utf-8")
    assert told(log, "Traceback") == 0


def test_the_process_sees_to_it_that_it_may_open_enough_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, given = [300, 5000], []
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: given.append(wanted))
    ConnectionLimits(connections=900).provide_files()
    assert given == [(1024, 5000)]
    ConnectionLimits(connections=100).provide_files()
    assert len(given) == 1, "what is enough stays"
    too_many = (
        rf"^connections: 4877 need 5001 open files, and this process may have 5000: .*at most {5000 - FILES} conn"
    )
    with pytest.raises(ConfigError, match=too_many):
        ConnectionLimits(connections=4877).provide_files()
    limits[1] = resource.RLIM_INFINITY
    ConnectionLimits(connections=4877).provide_files()
    assert given[1:] == [(5001, resource.RLIM_INFINITY)]
