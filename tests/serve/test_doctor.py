"""`limelight doctor` finds what is wrong, says the way out, and fails if there is anything."""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import trustme
from typer.testing import CliRunner

import serve.doctor
from bench.load.authority import pair, replace
from serve.access import Entry, hash_token
from serve.bundle import ServedModel
from serve.cli import app
from serve.security import Security
from tests.reversal import Reversal
from tests.serve.running import Running, serving
from tests.serve.steps import Echo, Gated

TOKEN = "my-token"


def examined(*what: str) -> tuple[int, list[str]]:
    """The exit status, and what was said, a line each."""
    result = CliRunner().invoke(app, ["doctor", *what], env={"COLUMNS": "300"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, [line.strip() for line in result.output.splitlines()]


def test_this_machine_is_well() -> None:
    status, lines = examined()
    assert (status, lines[0]) == (0, "this machine")
    assert any("CPUExecutionProvider" in line for line in lines)
    assert all(line.startswith(("ok", "warning")) for line in lines[1:])


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    status, lines = examined()
    assert status == 1
    assert any(line.startswith("error") and "set TMPDIR to a folder that can" in line for line in lines)


def test_too_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.doctor, "_available_memory", lambda: 1 << 20)
    status, lines = examined()
    assert status == 0
    assert any(line.startswith("warning") and "0.0 GiB of memory are available" in line for line in lines)


def test_a_good_bundle_answers_in_every_precision(reversal: Reversal) -> None:
    status, lines = examined(str(reversal.bundle))
    assert status == 0
    told = lines[lines.index(f"bundle {reversal.bundle}") :]
    assert "checksums right" in told[1]
    for precision in reversal.manifest.graphs:
        assert any(line.startswith("ok") and f"{precision}: loaded and answering" in line for line in told)


def test_what_is_wrong_with_a_bundle_is_told(reversal: Reversal, tmp_path: Path) -> None:
    bundle = shutil.copytree(reversal.bundle, tmp_path / "bundle")
    os.truncate(bundle / "fp32" / "decoder.onnx", 100)
    status, lines = examined(str(bundle), str(tmp_path))
    assert status == 1
    wrong = [line for line in lines if line.startswith("error")]
    assert len(wrong) == 2
    assert "decoder.onnx: does not match its checksum" in wrong[0]
    assert "not a bundle, it has no bundle.json" in wrong[1]


def test_a_server_that_answers_is_well(running: Running) -> None:
    status, lines = examined(running.address)
    assert status == 0
    assert any("health: SERVING" in line for line in lines)
    assert any(line.startswith("ok") and "reversal 1 (fp32, cpu): " in line for line in lines)


def test_a_protected_server_is_asked_with_what_it_wants(served: ServedModel, tmp_path: Path) -> None:
    own = pair(tmp_path, trustme.CA())
    tokens = replace(tmp_path / "tokens", f"{Entry('me', 'user', hash_token(TOKEN))}\n".encode())
    files = Security(tls_certificate=own.certificate, tls_key=own.key, tls_client_ca=own.ca, token_file=tokens)
    with serving(served, security=files) as running:
        certificates = ("--ca", str(own.ca), "--certificate", str(own.certificate), "--key", str(own.key))
        status, lines = examined(running.address, *certificates, "--token", TOKEN)
        assert (status, any("(fp32, cpu): " in line for line in lines)) == (0, True)
        status, lines = examined(running.address, *certificates)
        assert status == 1
        assert "the models cannot be listed: " in lines[-1]
        assert "token" in lines[-1]


def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.doctor, "SECONDS", 0.2)
    status, lines = examined("127.0.0.1:1")
    assert status == 1
    assert "is it running, on this port, and without TLS (else give --ca)?" in lines[-1]


def test_a_server_that_does_not_answer_is_told(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.doctor, "SECONDS", 0.5)
    steps = Gated(Echo())
    with serving(dataclasses.replace(served, steps=steps)) as hanging:
        status, lines = examined(hanging.address)
        steps.open()
    assert status == 1
    assert lines[-1].startswith("error")
