"""Where scrapes and administrative calls are answered: over TLS, on other addresses, whoever else connects there."""

import errno
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.error import URLError

import grpc
import pytest
import trustme
from prometheus_client import CollectorRegistry, Gauge

import serve.scrapes
from bench.load.authority import Pair, pair, replace
from model.errors import ConfigError
from serve.access import hash_token
from serve.bundle import ServedModel
from serve.folder import ModelFolder
from serve.pb.limelight.v1 import admin_pb2 as pb
from serve.pb.limelight.v1.admin_pb2_grpc import AdminServiceStub
from serve.scrapes import MOST, Scraped
from serve.security import Security
from serve.server import ServerOptions, create_server
from tests.reversal import Reversal
from tests.serve.running import PATIENCE, begin, models_of, serving

TOKEN = "a token"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server(tmp_path: Path, authority: trustme.CA) -> Pair:
    return pair(tmp_path / "server", authority)


def security(server: Pair, **more: Any) -> Security:
    return Security(tls_certificate=server.certificate, tls_key=server.key, **more)


def scraped(port: int | None, ca: Path, mine: Pair | None = None) -> str:
    """What a scrape over TLS is answered with."""
    context = ssl.create_default_context(cafile=str(ca))
    if mine is not None:
        context.load_cert_chain(mine.certificate, mine.key)
    with urllib.request.urlopen(f"https://127.0.0.1:{port}/metrics", timeout=PATIENCE, context=context) as answer:
        text: str = answer.read().decode()
    return text


def test_scrapes_over_tls(served: ServedModel, server: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with serving(served, security=security(server, metrics_tls=True), metrics_port=0) as running:
        port = running.server.metrics_port
        assert "limelight_certificate_seconds_left" in scraped(port, server.ca)
        assert f"metrics on https://127.0.0.1:{port}/metrics" in caplog.text
        with pytest.raises((URLError, ConnectionError)):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE)
        other = replace(server.ca.with_name("other.pem"), trustme.CA().cert_pem.bytes())
        with pytest.raises(URLError, match="CERTIFICATE_VERIFY_FAILED"):
            scraped(port, other)


def test_calls_over_tls_leave_scrapes_as_they_are(served: ServedModel, server: Pair) -> None:
    with serving(served, security=security(server), metrics_port=0) as running:
        address = f"http://127.0.0.1:{running.server.metrics_port}/metrics"
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            assert b"limelight_rows" in answer.read()


def test_scrapers_have_certificates_where_clients_have(
    served: ServedModel, server: Pair, tmp_path: Path, authority: trustme.CA
) -> None:
    mine = pair(tmp_path / "prometheus", authority)
    with serving(
        served, security=security(server, tls_client_ca=server.ca, metrics_tls=True), metrics_port=0
    ) as running:
        assert "limelight_rows" in scraped(running.server.metrics_port, server.ca, mine)
        with pytest.raises((ssl.SSLError, URLError, ConnectionError)):
            scraped(running.server.metrics_port, server.ca)


def test_fault_41_a_rotated_certificate_answers_scrapes(
    served: ServedModel, server: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(served, security=security(server, metrics_tls=True), metrics_port=0) as running:
        port = running.server.metrics_port
        assert scraped(port, server.ca)
        new = trustme.CA()
        issued = new.issue_cert("127.0.0.1")
        replace(server.certificate, issued.cert_chain_pems[0].bytes())
        assert scraped(port, server.ca), "of a pair the one file may change before the other"
        assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
        replace(server.key, issued.private_key_pem.bytes())
        assert scraped(port, replace(server.ca, new.cert_pem.bytes()))


@pytest.fixture
def answering(server: Pair) -> Iterator[Scraped]:
    """What answers scrapes, without anything to tell but one figure."""
    registry = CollectorRegistry()
    Gauge("told", "Something.", registry=registry)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    answering = Scraped(registry, "127.0.0.1", 0, lambda: context)
    yield answering
    answering.stop()


def test_who_says_nothing_holds_up_no_scrape(answering: Scraped, server: Pair) -> None:
    with ExitStack() as stack:
        for _ in range(MOST - 1):
            stack.enter_context(socket.create_connection(("127.0.0.1", answering.port), PATIENCE))
        for _ in range(3):
            assert "told 0.0" in scraped(answering.port, server.ca)
        silent = stack.enter_context(socket.create_connection(("127.0.0.1", answering.port), PATIENCE))
        more = stack.enter_context(socket.create_connection(("127.0.0.1", answering.port), PATIENCE))
        assert more.recv(1) == b"", "there is no more room"
        silent.close()


def test_who_says_nothing_is_hung_up_on(answering: Scraped, server: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.scrapes, "TIMEOUT", 0.1)
    with socket.create_connection(("127.0.0.1", answering.port), PATIENCE) as silent:
        assert silent.recv(1) == b""
    assert "told 0.0" in scraped(answering.port, server.ca)


def test_fault_30_without_files_it_is_not_tried_all_the_time(
    answering: Scraped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be taken stays where it is, and the system tells of it again at once."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def accept(_: socket.socket) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(answering._server.socket.__class__, "accept", accept)
    with pytest.raises(OSError, match="Too many open files"):
        answering._server.get_request()
    assert pauses == [serve.scrapes.BREATH]


def test_scrapes_have_an_address_of_their_own(served: ServedModel) -> None:
    with serving(served, metrics_port=0, metrics_host="127.0.0.2") as running:
        address = f"127.0.0.2:{running.server.metrics_port}"
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE) as answer:
            assert b"limelight_rows" in answer.read()
        with pytest.raises(URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{running.server.metrics_port}/metrics", timeout=PATIENCE)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return replace(tmp_path / "tokens", f"deploy admin sha256:{hash_token(TOKEN)}\n".encode())


def failed(call: Any) -> Any:
    return call.exception(PATIENCE).code()


def test_administrative_calls_over_tls(served: ServedModel, reversal: Reversal, server: Pair, tokens: Path) -> None:
    models = models_of(served)
    folder = ModelFolder(reversal.bundle, lambda _: served, models)
    chosen = security(server, admin_tls=True, token_file=tokens)
    options = ServerOptions(port=0, admin_port=0, admin_host="0.0.0.0", security=chosen)
    running = begin(create_server(models, options, folder)).result(PATIENCE)
    try:
        credentials = grpc.ssl_channel_credentials(server.ca.read_bytes())
        address, request = f"127.0.0.1:{running.admin_port}", pb.ListEntriesRequest()
        with grpc.secure_channel(address, credentials) as channel:
            stub, token = AdminServiceStub(channel), (("authorization", f"Bearer {TOKEN}"),)
            assert stub.ListEntries(request, metadata=token, timeout=PATIENCE) == pb.ListEntriesResponse()
            assert failed(stub.ListEntries.future(request, timeout=PATIENCE)) is grpc.StatusCode.UNAUTHENTICATED
        with grpc.insecure_channel(address) as channel:
            call = AdminServiceStub(channel).ListEntries.future(request, timeout=PATIENCE)
            assert failed(call) is grpc.StatusCode.UNAVAILABLE
    finally:
        begin(running.stop(0)).result(PATIENCE)


A_FILE = Path("some.pem")
BOTH: dict[str, Any] = {"tls_certificate": A_FILE, "tls_key": A_FILE}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scrapes without a certificate": ({"metrics_tls": True}, "^metrics_tls: is of no use without tls_certificate and"),
    "calls without one": ({"admin_tls": True}, "^admin_tls: is of no use without tls_certificate and tls_key: set all"),
    "no tokens": (
        {**BOTH, "admin_tls": True},
        "^admin_host: 10.0.0.7 is not of this machine alone, .*: set token_file",
    ),
    "tokens in plain text": ({**BOTH, "token_file": A_FILE}, "^admin_host: tokens would be sent to 10.0.0.7 in plain"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_protects_less_than_it_seems_is_refused(what: str) -> None:
    settings, message = REFUSED[what]
    with pytest.raises(ConfigError, match=message):
        Security(**settings).check("127.0.0.1", "10.0.0.7")


@pytest.mark.parametrize("more", [{"admin_tls": True}, {"plaintext_tokens": True}], ids=["TLS", "TLS ends before"])
def test_administrative_calls_from_elsewhere_need_tokens_and_tls(more: dict[str, Any]) -> None:
    Security(**BOTH, token_file=A_FILE, **more).check("127.0.0.1", "10.0.0.7")
