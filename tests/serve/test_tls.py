"""TLS and mutual TLS: who gets in, what a start refuses, and certificates that change while serving."""

import dataclasses
import logging
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from bench.load.authority import TOMORROW, YESTERDAY, Pair, pair, replace
from model.errors import ConfigError
from serve.answers import End
from serve.bundle import ServedModel
from serve.client import Client, ServerError
from serve.security import Security
from serve.tls import Tls
from tests.reversal import Reversal
from tests.serve import asking
from tests.serve.running import PATIENCE, Running, serving
from tests.serve.steps import Gated

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server(tmp_path: Path, authority: trustme.CA) -> Pair:
    """The server's certificate and key."""
    return pair(tmp_path / "server", authority)


def security(server: Pair, client_ca: Path | None = None) -> Security:
    return Security(tls_certificate=server.certificate, tls_key=server.key, tls_client_ca=client_ca)


def ask(running: Running, **credentials: Any) -> str:
    with Client(running.address, timeout=PATIENCE, **credentials) as client:
        return client.generate("abcdefgh").best.text


def refused(running: Running, **credentials: Any) -> str:
    with pytest.raises(ServerError) as caught:
        ask(running, **credentials)
    assert caught.value.code is UNAVAILABLE
    return str(caught.value)


def shown(running: Running) -> str:
    """The certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", running.server.port), PATIENCE) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        certificate = wrapped.getpeercert(binary_form=True)
    assert certificate is not None
    return ssl.DER_cert_to_PEM_cert(certificate)


def test_answers_over_tls(served: ServedModel, server: Pair) -> None:
    with serving(served, security=security(server)) as running:
        assert ask(running, ca=server.ca) == "hgfedcba"


def test_answers_whom_the_authority_of_clients_signed(
    served: ServedModel, server: Pair, tmp_path: Path, authority: trustme.CA
) -> None:
    mine = pair(tmp_path / "client", authority)
    with serving(served, security=security(server, server.ca)) as running:
        assert ask(running, ca=server.ca, certificate=mine.certificate, key=mine.key) == "hgfedcba"


def test_fault_41_plain_text_is_not_answered(served: ServedModel, server: Pair) -> None:
    with serving(served, security=security(server)) as running:
        assert "the server hung up: if it speaks TLS, give ca" in refused(running)
        assert ask(running, ca=server.ca) == "hgfedcba"


def test_fault_41_a_client_knows_a_false_server(served: ServedModel, server: Pair, tmp_path: Path) -> None:
    other = replace(tmp_path / "other.pem", trustme.CA().cert_pem.bytes())
    with serving(served, security=security(server)) as running:
        assert "the server's certificate is signed by no authority in ca" in refused(running, ca=other)
        assert ask(running, ca=server.ca) == "hgfedcba"


Wrong = Callable[[Path, trustme.CA], Pair | None]

WRONG_CLIENTS: dict[str, Wrong] = {
    "none": lambda folder, authority: None,
    "of another authority": lambda folder, authority: pair(folder, trustme.CA()),
    "expired": lambda folder, authority: pair(folder, authority, not_after=YESTERDAY),
    "not valid yet": lambda folder, authority: pair(folder, authority, not_before=TOMORROW),
}


@pytest.mark.parametrize("what", WRONG_CLIENTS)
def test_fault_41_clients_without_a_good_certificate(
    served: ServedModel, server: Pair, tmp_path: Path, authority: trustme.CA, what: str
) -> None:
    good, wrong = pair(tmp_path / "good", authority), WRONG_CLIENTS[what](tmp_path / "wrong", authority)
    with serving(served, security=security(server, server.ca)) as running:
        own = {} if wrong is None else {"certificate": wrong.certificate, "key": wrong.key}
        refused(running, ca=server.ca, **own)
        assert ask(running, ca=server.ca, certificate=good.certificate, key=good.key) == "hgfedcba"
        running.until_idle()


def test_fault_41_a_rotated_certificate_serves_new_connections(
    served: ServedModel, gate: Gated, server: Pair, tmp_path: Path
) -> None:
    with serving(dataclasses.replace(served, steps=gate), security=security(server)) as running:
        with Client(running.address, timeout=PATIENCE, ca=server.ca) as client:
            events = client.stream("abcdefgh")
            gate.let()
            next(events)
            old_ca = replace(tmp_path / "old-ca.pem", server.ca.read_bytes())
            new = pair(server.key.parent, trustme.CA())
            assert shown(running) == new.pem.decode()
            gate.open()
            end = list(events)[-1]
            assert isinstance(end, End)
            assert end.answer.best.text == "hgfedcba"
            assert client.generate("abcd").best.text == "dcba", "the connection lives on"
        assert ask(running, ca=new.ca) == "hgfedcba"
        assert "is signed by no authority in ca" in refused(running, ca=old_ca)


def test_fault_41_of_a_pair_the_one_file_may_change_before_the_other(
    served: ServedModel, server: Pair, tmp_path: Path, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    new = pair(tmp_path / "new", authority)
    with serving(served, security=security(server)) as running:
        replace(server.certificate, new.pem)
        assert [shown(running) for _ in range(5)] == [server.pem.decode()] * 5
        (told,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert f"{server.key}: is not the key of the first certificate in {server.certificate}" in told.message
        assert "what was read before stays in use" in told.message
        replace(server.key, new.key.read_bytes())
        assert shown(running) == new.pem.decode()
        assert ask(running, ca=server.ca) == "hgfedcba"


Damage = Callable[[Pair], object]

DAMAGES: dict[str, Damage] = {
    "is not there": lambda server: server.certificate.unlink(),
    "is no certificate": lambda server: replace(server.certificate, b"-----BEGIN CERTIFICATE-----"),
    "has expired": lambda server: pair(server.key.parent, trustme.CA(), not_after=YESTERDAY),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_fault_41_a_damaged_new_version_is_told_once(
    served: ServedModel, server: Pair, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    ca = server.ca.read_bytes()
    with serving(served, security=security(server)) as running:
        DAMAGES[what](server)
        assert [shown(running) for _ in range(5)] == [server.pem.decode()] * 5
        assert ask(running, ca=replace(server.ca, ca)) == "hgfedcba"
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_fault_41_other_clients_are_let_in_when_their_authority_changes(
    served: ServedModel, server: Pair, tmp_path: Path, authority: trustme.CA
) -> None:
    old, new = pair(tmp_path / "old", authority), pair(tmp_path / "new", trustme.CA())
    clients = replace(tmp_path / "clients.pem", old.ca.read_bytes())
    with serving(served, security=security(server, clients)) as running:
        assert ask(running, ca=server.ca, certificate=old.certificate, key=old.key) == "hgfedcba"
        replace(clients, new.ca.read_bytes())
        assert ask(running, ca=server.ca, certificate=new.certificate, key=new.key) == "hgfedcba"
        refused(running, ca=server.ca, certificate=old.certificate, key=old.key)


def test_fault_41_who_fails_to_connect_does_not_fill_the_log(reversal: Reversal, server: Pair, tmp_path: Path) -> None:
    """Of a process of its own: what gRPC's core says goes past Python."""
    port_file, log = tmp_path / "port", tmp_path / "log"
    arguments = ["serve", str(reversal.bundle), "--port=0", f"--port-file={port_file}", "--threads=1"]
    secured = [f"--tls-certificate={server.certificate}", f"--tls-key={server.key}", f"--tls-client-ca={server.ca}"]
    with log.open("wb") as written:
        process = subprocess.Popen([sys.executable, "-m", "serve", *arguments, *secured], stderr=written)
    try:
        while "on 127.0.0.1:" not in (before := log.read_text(encoding="utf-8")) or not port_file.exists():
            assert process.poll() is None, before
        port = int(port_file.read_text(encoding="ascii"))
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as plain, suppress(ConnectionResetError):
                plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
                while plain.recv(4096):
                    pass
        with Client(f"127.0.0.1:{port}", ca=server.ca, certificate=server.certificate, key=server.key) as client:
            assert client.generate("abcd").best.text == "dcba"
    finally:
        process.terminate()
        status = process.wait(PATIENCE)
    after = log.read_text(encoding="utf-8").removeprefix(before).splitlines()
    assert [" Generate OK OK " in line or line.endswith(" stopping: signal SIGTERM") for line in after] == [True, True]
    assert status == 0


def test_how_long_a_certificate_is_valid(server: Pair, authority: trustme.CA) -> None:
    tls = Tls(server.certificate, server.key)
    assert tls.seconds_left > 24 * 3600
    pair(server.key.parent, authority, not_after=TOMORROW)
    assert 0 < tls.seconds_left < 24 * 3600


def ed25519_key() -> bytes:
    private = ed25519.Ed25519PrivateKey.generate()
    coding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return private.private_bytes(*coding)


def encrypted(pem: bytes) -> bytes:
    key: Any = serialization.load_pem_private_key(pem, None)
    encryption = serialization.BestAvailableEncryption(b"a word")
    found: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return found


WRONG_FILES: dict[str, tuple[Damage, str]] = {
    "no certificate file": (
        lambda server: server.certificate.unlink(),
        r"^tls_certificate: .*certificate\.pem: cannot be read: No such file or directory$",
    ),
    "no key file": (lambda server: server.key.unlink(), r"^tls_key: .*key\.pem: cannot be read: No such file"),
    "no certificate": (
        lambda server: replace(server.certificate, b"certificate"),
        r"^tls_certificate: .*: holds no certificate in PEM, or a damaged one$",
    ),
    "no key": (lambda server: replace(server.key, b"key"), r"^tls_key: .*: holds no private key in PEM, or a damaged"),
    "an encrypted key": (
        lambda server: replace(server.key, encrypted(server.key.read_bytes())),
        r"^tls_key: .*: is encrypted: store it without a password",
    ),
    "a key that gRPC does not take": (
        lambda server: replace(server.key, ed25519_key()),
        r"^tls_key: .*: is neither an RSA nor an EC key",
    ),
    "another key": (
        lambda server: replace(server.key, trustme.CA().private_key_pem.bytes()),
        r"^tls_key: .*key\.pem: is not the key of the first certificate in .*certificate\.pem$",
    ),
    "expired": (
        lambda server: pair(server.key.parent, trustme.CA(), not_after=YESTERDAY),
        rf"^tls_certificate: .*: has expired at {YESTERDAY:%Y-%m-%d} ",
    ),
    "not valid yet": (
        lambda server: pair(server.key.parent, trustme.CA(), not_before=TOMORROW),
        rf"^tls_certificate: .*: is not valid before {TOMORROW:%Y-%m-%d} ",
    ),
    "no authority": (
        lambda server: replace(server.ca, b""),
        r"^tls_client_ca: .*: holds no certificate in PEM, or a damaged one$",
    ),
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_fault_41_a_start_with_wrong_files_is_refused(served: ServedModel, server: Pair, what: str) -> None:
    damage, message = WRONG_FILES[what]
    damage(server)
    with pytest.raises(ConfigError, match=message), serving(served, security=security(server, server.ca)):
        pass


A_FILE = Path("some.pem")

INCOMPLETE: dict[str, tuple[dict[str, Path], str]] = {
    "no key": ({"tls_certificate": A_FILE}, "^tls_certificate: is of no use without tls_key: set both$"),
    "no certificate": ({"tls_key": A_FILE}, "^tls_key: is of no use without tls_certificate: set both$"),
    "neither": (
        {"tls_client_ca": A_FILE},
        "^tls_client_ca: is of no use without tls_certificate and tls_key: set all three$",
    ),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_fault_41_a_start_with_half_of_the_settings_is_refused(served: ServedModel, what: str) -> None:
    settings, message = INCOMPLETE[what]
    given: Any = settings
    with pytest.raises(ConfigError, match=message), serving(served, security=Security(**given)):
        pass


def test_a_key_that_everybody_can_read_is_warned_of(server: Pair, caplog: pytest.LogCaptureFixture) -> None:
    server.key.chmod(0o644)
    Tls(server.certificate, server.key)
    assert f"tls_key: {server.key}: is open to everybody" in caplog.text


WRONG_CREDENTIALS: dict[str, tuple[Callable[[Pair], dict[str, Path]], str]] = {
    "no authority": (lambda own: {"ca": own.key}, "^ca: .*key.pem: holds no certificate in PEM, or a damaged one$"),
    "a missing file": (lambda own: {"ca": A_FILE}, "^ca: some.pem: cannot be read: No such file or directory$"),
    "a pair without an authority": (
        lambda own: {"certificate": own.certificate, "key": own.key},
        "^certificate and key: are of no use without ca, the CA of the server$",
    ),
    "half a pair": (lambda own: {"ca": own.ca, "key": own.key}, "^certificate and key: one is of no use without the"),
    "what does not match": (
        lambda own: {"ca": own.ca, "certificate": own.ca, "key": own.key},
        "^certificate and key: .*ca.pem and .*key.pem are no certificate in PEM and its unencrypted key$",
    ),
}


@pytest.mark.parametrize("what", WRONG_CREDENTIALS)
def test_the_client_refuses_files_that_it_cannot_use(server: Pair, what: str) -> None:
    credentials, message = WRONG_CREDENTIALS[what]
    given: Any = credentials(server)
    with pytest.raises(ConfigError, match=message):
        Client("127.0.0.1:1", **given)


def test_the_client_says_that_the_server_does_not_speak_tls(running: Running, server: Pair) -> None:
    assert "the server does not speak TLS: leave ca out" in refused(running, ca=server.ca)


def test_the_client_says_that_a_certificate_is_for_another_name(served: ServedModel, server: Pair) -> None:
    with serving(served, security=security(server)) as running:
        address = f"localhost:{running.server.port}"
        with Client(address, ca=server.ca) as client, pytest.raises(ServerError, match="is for another name"):
            client.describe()


def test_ask_over_tls(served: ServedModel, server: Pair, tmp_path: Path, authority: trustme.CA) -> None:
    mine = pair(tmp_path / "client", authority)
    own = ("--ca", str(server.ca), "--certificate", str(mine.certificate), "--key", str(mine.key))
    with serving(served, security=security(server, server.ca)) as running:
        assert asking.run("abc", "--address", running.address, *own).stdout.startswith("cba\n")
