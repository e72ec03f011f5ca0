"""A call that is reset without a status, as Envoy resets one whose replica has gone midway: it can be asked again."""

import socket
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest

from bench.load.frames import HEADERS, INTERNAL_ERROR, PREFACE, RST_STREAM, SETTINGS, Frame, received, send
from serve.client import Client, ServerError
from tests.serve.running import PATIENCE


@pytest.fixture
def address() -> Iterator[str]:
    """Of a server that resets the first call that comes."""

    def serve() -> None:
        opened, _ = listening.accept()
        with opened:
            opened.settimeout(PATIENCE)
            assert opened.recv(len(PREFACE), socket.MSG_WAITALL) == PREFACE
            send(opened, Frame(SETTINGS))
            frames = received(opened)
            call = next(frame for frame in frames if frame.kind == HEADERS)
            send(opened, Frame(RST_STREAM, 0, INTERNAL_ERROR.to_bytes(4), call.stream))
            for _ in frames:  # until the client hangs up
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(PATIENCE)
        serving = threading.Thread(target=serve)
        serving.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        serving.join(PATIENCE)
        assert not serving.is_alive()


ASKED: dict[str, Callable[[Client], object]] = {
    "unary": lambda client: client.generate("phone"),
    "stream": lambda client: list(client.stream("phone")),
    "many": lambda client: list(client.generate_many(["phone"])),
}


@pytest.mark.parametrize("kind", ASKED)
def test_a_call_that_was_cut_off_is_unavailable(address: str, kind: str) -> None:
    with Client(address) as client, pytest.raises(ServerError, match="cut off before its end: ask again") as caught:
        ASKED[kind](client)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert str(caught.value).startswith(f"{address}: the call was cut off")
