"""Faults of what carries the calls: bytes that are no message, clients that vanish, readers that do not read."""

import dataclasses
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthListRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

import serve.chunked
from export.manifest import FamilyShape
from serve.bundle import ServedModel
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from tests.serve.attention import ENCODER
from tests.serve.faults import assert_idle, ended, status, until
from tests.serve.running import PATIENCE, Running, generate, serving, stream
from tests.serve.shelf import Shelf
from tests.serve.steps import Echo, Gated

REPOSITORY = Path(__file__).parents[2]
SERVICE = "/limelight.v1.LimelightService"
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def failed(call: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def send(running: Running, method: str, message: bytes, **options: Any) -> Any:
    """Bytes, as they are, in a call that answers none or many."""
    path = f"{SERVICE}/{method}"
    if method in ("Generate", "Score", "GetModel", "ListModels"):
        call: Any = running.channel.unary_unary(path)
        return call(message, timeout=PATIENCE, **options)
    if method == "GenerateMany":
        many: Any = running.channel.stream_stream(path)
        return list(many(iter([message]), timeout=PATIENCE, **options))
    events: Any = running.channel.unary_stream(path)
    return list(events(message, timeout=PATIENCE, **options))


METHODS = ["Generate", "GenerateStream", "GenerateChunked", "GenerateMany", "Score", "GetModel", "ListModels"]

NO_MESSAGES = {
    "invalid UTF-8": b"\x12\x02\xff\xfe",
    "a lone surrogate": b"\x12\x03\xed\xa0\x80",
    "cut off": b"\x12\x7fab",
    "garbage": bytes(range(255, 0, -1)),
}
"""Of these only the first two are well formed, and 2 is the source or, elsewhere, unknown or no text."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", NO_MESSAGES)
def test_fault_04_and_19_bytes_that_are_no_message(running: Running, method: str, what: str) -> None:
    assert status(failed(lambda: send(running, method, NO_MESSAGES[what]))) == INVALID
    assert_idle(running)
    assert generate(running.stub).result(PATIENCE).hypotheses[0].text == "hgfedcba"


@pytest.mark.parametrize("path", [f"{SERVICE}/Explain", "/limelight.v2.LimelightService/Generate", "/", "/../etc"])
def test_fault_19_there_are_no_other_calls(running: Running, path: str) -> None:
    call: Any = running.channel.unary_unary(path)
    error = failed(lambda: call(b"", timeout=PATIENCE))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    assert_idle(running)


def literal(name: str, value: str) -> bytes:
    """A header as HPACK writes it without tables and without compression (RFC 7541, 6.2.2)."""
    return b"\0" + b"".join(bytes([len(text)]) + text.encode("latin-1") for text in (name, value))


def frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    """RFC 9113, 4.1."""
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, number) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
"""How a connection begins, and its settings."""

HEADERS, END_OF_HEADERS, END_OF_STREAM = 1, 4, 1


def asked_as(content_type: str, path: str = f"{SERVICE}/GetModel") -> bytes:
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": content_type,
    }
    block = b"".join(literal(name, value) for name, value in headers.items())
    message = frame(0, END_OF_STREAM, 1, b"\0" + bytes(4))
    return PREFACE + frame(HEADERS, END_OF_HEADERS, 1, block) + message


NOT_GRPC = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),
    "zeros": bytes(4096),
    "a preface and then zeros": PREFACE + bytes(4096),
    "a frame of 16 MB that never comes": PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "a call of JSON": asked_as("application/json"),
    "a call of nothing": asked_as(""),
}


@pytest.mark.parametrize("what", NOT_GRPC)
def test_fault_19_what_is_no_grpc_harms_nobody(running: Running, what: str) -> None:
    with socket.create_connection(("127.0.0.1", running.server.port), timeout=PATIENCE) as connection:
        connection.sendall(NOT_GRPC[what])
        assert connection.recv(1) or what == "zeros"  # the server has read it, and answers or hangs up
        assert generate(running.stub).result(PATIENCE).hypotheses[0].text == "hgfedcba"
    assert_idle(running)


@pytest.mark.parametrize("path", [f"{SERVICE}/GetModel\xff", "/\xed\xa0\x80", "\x80"])
@pytest.mark.parametrize("admin", [False, True])
def test_fault_19_a_call_whose_name_is_no_text_ends_nothing_else(shelf: Shelf, path: str, admin: bool) -> None:
    """gRPC's own server would be gone: it reads the name as UTF-8 where it takes all calls."""
    server, address = shelf.running.server, "127.0.0.1"
    with socket.create_connection((address, server.admin_port if admin else server.port), PATIENCE) as connection:
        connection.sendall(asked_as("application/grpc", path))
        seen = b""
        while b"Method not found!" not in seen and (part := connection.recv(65536)):
            seen += part
        assert b"Method not found!" in seen
    assert shelf.ask("abc").hypotheses[0].text == "cba"
    assert shelf.reload()["first"].version == "1"
    assert_idle(shelf.running)


ONE = {
    "Generate": "unary",
    "GenerateStream": "stream",
    "Score": "unary",
    "/inference.GRPCInferenceService/ModelInfer": "unary",
    "/inference.GRPCInferenceService/ServerLive": "unary",
    "/grpc.health.v1.Health/Check": "unary",
    "/grpc.health.v1.Health/Watch": "stream",
}
"""Calls that take one message, and what they answer with."""


@pytest.mark.parametrize("method", ONE)
def test_fault_19_a_call_without_its_message_is_ended(running: Running, method: str) -> None:
    path = method if method.startswith("/") else f"{SERVICE}/{method}"
    call: Any = running.channel.stream_stream(path) if ONE[method] == "stream" else running.channel.stream_unary(path)
    error = failed(lambda: [*call(iter(()), timeout=PATIENCE)])
    assert status(error)[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "request: the call has ended without a message"
    assert_idle(running)


REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@pytest.mark.parametrize("path", [path for path in (*ONE, REFLECT) if path.startswith("/")])
def test_fault_19_garbage_for_what_is_not_ours(running: Running, caplog: pytest.LogCaptureFixture, path: str) -> None:
    call: Any = running.channel.stream_stream(path)
    error = failed(lambda: list(call(iter([b"\0"]), timeout=PATIENCE)))
    assert status(error) == INVALID
    assert "are no message of this call" in error.details()
    assert caplog.records == []


def test_fault_19_what_health_leaves_out_is_unimplemented(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    error = failed(lambda: HealthStub(running.channel).List(HealthListRequest(), timeout=PATIENCE))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    assert error.details() == "health is told of one service at a time: use Check or Watch"
    assert caplog.records == []


LARGEST = 4 * 1024 * 1024
"""Bytes of a request that gRPC takes."""


@pytest.mark.parametrize("method", METHODS[:5])
def test_fault_18_a_request_over_the_limit_is_refused_by_grpc(running: Running, method: str) -> None:
    error = failed(lambda: send(running, method, bytes(LARGEST + 1)))
    assert status(error) == (EXHAUSTED, "")
    assert "larger than max" in error.details()
    assert_idle(running)


@pytest.mark.parametrize("method", METHODS[:5])
@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_fault_20_a_bomb_is_refused(running: Running, method: str, compression: grpc.Compression) -> None:
    bomb = pb.GenerateRequest(source="a" * (64 * 1024 * 1024)).SerializeToString()
    error = failed(lambda: send(running, method, bomb, compression=compression))
    assert status(error) == (EXHAUSTED, "")
    assert_idle(running)


CLIENT = """
import sys
import grpc
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub

stub = LimelightServiceStub(grpc.insecure_channel(sys.argv[1]))
for event in stub.GenerateStream(pb.GenerateStreamRequest(source="abcdefgh")):
    print(event.WhichOneof("event"), flush=True)
"""
"""A process that reads a stream, and tells of each event."""


def test_fault_28_a_client_that_is_killed_gives_its_row_back(gated: Running, gate: Gated) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, gated.address],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    ) as process:
        gate.let()
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["start\n", "token\n"]
        gate.wait(2)
        mate = generate(gated.stub, "abcd")
        until(lambda: gated.server._calls.in_flight == 2)
        process.send_signal(signal.SIGKILL)
    until(lambda: gated.server._calls.in_flight == 1)
    gate.open()
    assert mate.result(PATIENCE).hypotheses[0].text == "dcba"
    assert gate.rows[2:] == [1] * 5  # the killed one's row was gone by then
    assert_idle(gated)


@contextmanager
def through_a_proxy(port: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """An address that leads to the port, and how to reset (RST, not FIN) every connection there."""
    pairs: list[tuple[socket.socket, socket.socket]] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            return  # it was reset

    def accept() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return  # nobody listens any more
            server = socket.create_connection(("127.0.0.1", port))
            pairs.append((client, server))
            for ends in ((client, server), (server, client)):
                threads.append(threading.Thread(target=pump, args=ends, daemon=True))
                threads[-1].start()

    def reset() -> None:
        for _, server in pairs:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for pair in pairs:
            for end in pair:
                end.shutdown(socket.SHUT_RD)  # whoever reads there stops, so that closing it is the end of it
        for thread in threads[1:]:
            thread.join(PATIENCE)
        for pair in pairs:
            for end in pair:
                end.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threads = [threading.Thread(target=accept, daemon=True)]
        threads[0].start()
        yield f"127.0.0.1:{listening.getsockname()[1]}", reset
        listening.shutdown(socket.SHUT_RDWR)
        threads[0].join(PATIENCE)


def test_fault_28_a_connection_that_is_reset_gives_all_its_rows_back(gated: Running, gate: Gated) -> None:
    with through_a_proxy(gated.server.port) as (address, reset), grpc.insecure_channel(address) as channel:
        stub = LimelightServiceStub(channel)
        calls = [generate(stub), stream(stub)]
        gate.wait()
        until(lambda: gated.server._calls.in_flight == 2)
        mate = generate(gated.stub, "abcd")
        until(lambda: gated.server._calls.in_flight == 3)
        reset()
        until(lambda: gated.server._calls.in_flight == 1)
        gate.open()
        assert mate.result(PATIENCE).hypotheses[0].text == "dcba"
        assert_idle(gated)
        for call in calls:
            assert call.exception(PATIENCE).code() == grpc.StatusCode.UNAVAILABLE


LENGTH = 1500
"""Tokens of a source whose encoder attention, 9 MB, is more than HTTP/2 has under way for one who does not read."""


@pytest.fixture
def long(served: ServedModel) -> ServedModel:
    """Answers with all of that."""
    limits = served.manifest.limits.model_copy(update={"longest_source": LENGTH})
    attention = {"encoder": FamilyShape(layers=1, heads=1)}
    manifest = served.manifest.model_copy(update={"limits": limits, "attention": attention})
    return dataclasses.replace(served, manifest=manifest, steps=Gated(Echo()))


LARGE: dict[str, Any] = {
    "source": "a" * (LENGTH - 1),
    "search": pb.SearchOptions(longest=2),
    "attention": pb.AttentionOptions(families=[ENCODER]),
}

UNREAD: dict[str, Callable[[LimelightServiceStub], Any]] = {
    "GenerateStream": lambda stub: stub.GenerateStream(pb.GenerateStreamRequest(**LARGE)),
    "GenerateChunked": lambda stub: stub.GenerateChunked(pb.GenerateChunkedRequest(**LARGE)),
    "GenerateMany": lambda stub: stub.GenerateMany(
        iter([pb.GenerateManyRequest(id=str(number), request=pb.GenerateRequest(**LARGE)) for number in range(3)])
    ),
}
"""Streams that are begun, but not read."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Chunks, as they are made."""
    chunks: list[Any] = []
    make = pb.AttentionChunk

    def telling(**fields: Any) -> Any:
        chunks.append(make(**fields))
        return chunks[-1]

    monkeypatch.setattr(serve.chunked, "pb", _With(AttentionChunk=telling))
    return chunks


class _With:
    """The messages of the API, but for some."""

    def __init__(self, **others: Any) -> None:
        self.__dict__ |= others

    def __getattr__(self, name: str) -> Any:
        return getattr(pb, name)


def opened(model: ServedModel) -> Gated:
    assert isinstance(model.steps, Gated)
    return model.steps


def test_fault_29_a_stream_waits_for_its_reader_and_nobody_else_does(long: ServedModel, made: list[Any]) -> None:
    with serving(long) as running, grpc.insecure_channel(running.address) as channel:
        unread = UNREAD["GenerateChunked"](LimelightServiceStub(channel))
        opened(long).open()
        until(lambda: len(made) > 0)
        for _ in range(20):
            assert generate(running.stub, "abcd").result(PATIENCE).hypotheses[0].text == "abcd"
        until(lambda: running.server._calls.in_flight == 1)
        assert running.engine.rows == 0
        chunks = 4 * LENGTH**2 / serve.chunked.CHUNK
        assert len(made) < chunks / 2
        answer, *sent, end = unread
        assert [event.chunk for event in sent] == made
        assert len(made) == end.end.chunks > chunks / 2
        assert answer.answer.hypotheses[0].text == "aa"
        assert_idle(running)


@pytest.mark.parametrize("call", UNREAD)
def test_fault_29_who_does_not_read_is_given_up(long: ServedModel, call: str) -> None:
    options = [("grpc.max_receive_message_length", -1)]
    with (
        serving(long, write_timeout=0.2) as running,
        grpc.insecure_channel(running.address, options=options) as channel,
    ):
        unread = UNREAD[call](LimelightServiceStub(channel))
        opened(long).wait()
        mate = generate(running.stub, "abcd")
        opened(long).open()
        assert mate.result(PATIENCE).hypotheses[0].text == "abcd"
        assert_idle(running)
        assert ended(running, "RESOURCE_EXHAUSTED", "SLOW_READER") == 1
        error = failed(lambda: list(unread))
        assert status(error) == (EXHAUSTED, "SLOW_READER")
        assert error.details() == "nothing of this stream was read for 0.2 s: read faster, or ask for less"
