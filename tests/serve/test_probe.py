"""`python -m serve.probe`: exits with 0 while a server serves, and only then; and is light."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from typer.testing import CliRunner

from bench.load.authority import Pair, pair
from serve.bundle import ServedModel
from serve.cli import app
from serve.inference import INFERENCE
from serve.probe import PORT, PORT_VARIABLE
from serve.security import Security
from serve.server import SERVICE
from serve.settings import PREFIX, Settings
from tests.serve.running import PATIENCE, Running, generate, serving
from tests.serve.steps import Gated

REPOSITORY = Path(__file__).parents[2]

HEAVY = ("numpy", "onnxruntime", "tokenizers")
"""What a server needs, and the probe does not."""


class Said(NamedTuple):
    """How the command ended."""

    status: int
    out: str
    err: str


def probed(*arguments: str, **variables: str) -> Said:
    result = CliRunner().invoke(app, ["probe", *arguments], env=variables)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Said(result.exit_code, result.stdout, result.stderr)


SERVES = Said(0, "SERVING\n", "")


@pytest.mark.parametrize("service", ["", SERVICE, INFERENCE])
def test_a_server_serves(running: Running, service: str) -> None:
    assert probed(running.address, "--service", service) == SERVES


def test_the_port_is_the_servers_own(running: Running) -> None:
    assert probed(**{PORT_VARIABLE: str(running.server.port)}) == SERVES
    assert (f"{PREFIX}PORT", str(Settings().port)) == (PORT_VARIABLE, PORT)


def test_a_server_that_stops_does_not_serve(gated: Running, gate: Gated) -> None:
    call = generate(gated.stub)
    gate.wait()
    stopping = gated.stop()
    assert probed(gated.address) == Said(1, "", f"{gated.address}: NOT_SERVING\n")
    gate.open()
    assert call.result(PATIENCE).hypotheses[0].text == "hgfedcba"
    assert stopping.result(PATIENCE) is True


def test_a_service_that_it_does_not_have_does_not_serve(running: Running) -> None:
    assert probed(running.address, "--service", "some") == Said(1, "", f"{running.address}: has no service 'some'\n")


def test_nobody_there_is_told() -> None:
    status, out, err = probed("127.0.0.1:1")
    assert (status, out) == (1, "")
    assert err.startswith("127.0.0.1:1: no Limelight server answers there")


@pytest.fixture
def server(tmp_path: Path) -> Pair:
    """A certificate for 127.0.0.1."""
    return pair(tmp_path / "server", trustme.CA())


@pytest.fixture
def secured(served: ServedModel, server: Pair) -> Iterator[Running]:
    """A server that wants certificates of its clients."""
    files = Security(tls_certificate=server.certificate, tls_key=server.key, tls_client_ca=server.ca)
    with serving(served, security=files) as running:
        yield running


def test_over_mutual_tls(secured: Running, server: Pair) -> None:
    own = ("--ca", str(server.ca), "--certificate", str(server.certificate), "--key", str(server.key))
    assert probed(secured.address, *own) == SERVES
    elsewhere = f"localhost:{secured.server.port}"
    assert "the server's certificate is for another name" in probed(elsewhere, *own).err
    assert probed(elsewhere, *own, "--name", "127.0.0.1") == SERVES
    assert probed(secured.address, *own[:2]).status == 1


def test_what_tls_needs_is_told(secured: Running, server: Pair) -> None:
    assert "if it speaks TLS, give ca" in probed(secured.address).err
    certificate = ("--certificate", str(server.certificate))
    assert probed(secured.address, *certificate).err.startswith("certificate and key: are of no use without ca")


def test_it_is_light() -> None:
    """Where it finds nobody, too: it is run beside a server that is still loading."""
    script = f"import sys, runpy, atexit; atexit.register(lambda: print(*sorted({set(HEAVY)!r} & set(sys.modules))))"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; runpy.run_module('serve.probe', run_name='__main__')", "127.0.0.1:1"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "\n")
