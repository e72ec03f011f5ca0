"""The id of a call that failed: the client knows it, the command says it, and the server's log has it too."""

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from serve.client import Client, ServerError
from serve.logs import CALL
from tests.serve.command import REPOSITORY
from tests.serve.running import PATIENCE, Running

CALLS: dict[str, Callable[[Client], Any]] = {
    "Generate": lambda client: client.generate(""),
    "GenerateStream": lambda client: list(client.stream("")),
    "GenerateChunked": lambda client: client.generate_chunked(""),
    "Score": lambda client: client.score("", "a"),
    "GetModel": lambda client: client.describe("no-such-model"),
}


@pytest.mark.parametrize("method", CALLS)
def test_an_error_has_the_id_that_the_servers_log_has(
    running: Running, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    caplog.set_level(logging.INFO, "serve.access")
    with Client(running.address, timeout=PATIENCE) as client, pytest.raises(ServerError) as caught:
        CALLS[method](client)
    running.until_idle()
    (line,) = (record for record in caplog.records if record.message.startswith(f"{method} "))
    assert caught.value.request_id == line.__dict__[CALL].id
    assert re.fullmatch("[0-9a-f]{12}", caught.value.request_id)
    assert str(caught.value) == f"{caught.value.message} (request {caught.value.request_id})"
    assert caught.value.request_id not in caught.value.message


def test_what_no_server_has_told_has_no_id() -> None:
    error = ServerError(grpc.StatusCode.UNAVAILABLE, "nobody is there")
    assert (error.request_id, str(error)) == ("", "nobody is there")


def test_an_id_is_not_said_twice() -> None:
    said = "internal error (request 0123456789ab in the server's log)"
    assert str(ServerError(grpc.StatusCode.INTERNAL, said, request_id="0123456789ab")) == said


def test_the_command_says_it(running: Running) -> None:
    command = [sys.executable, "-m", "serve", "ask", "", "--address", running.address]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 1
    assert re.fullmatch(r"error: source: .* \(request [0-9a-f]{12}\)\n", ended.stderr)
