"""Files that change while serving: what is used of them, and when they are read again."""

import logging
from pathlib import Path

import pytest

from model.errors import ConfigError
from serve import watched
from serve.watched import Watched, is_open_to_all, read_file


def read(file: Path) -> bytes:
    if is_open_to_all(file):
        raise ConfigError(f"{file}: is open to everybody")
    return read_file("file", file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    return path


def test_what_its_rights_forbade_is_used_once_they_are_mended(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "AGAIN", 1e9)
    value = Watched([file], lambda: read(file))
    new = file.with_name("new")
    new.write_bytes(b"new")
    new.chmod(0o644)
    new.replace(file)
    assert value.current() == b"old"
    file.chmod(0o640)
    assert value.current() == b"new"


def test_what_could_not_be_used_is_tried_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Though the file has not changed: a certificate may begin to be valid. It is told once."""
    monkeypatch.setattr(watched, "AGAIN", 0.0)
    caplog.set_level(logging.INFO)
    early = False

    def read_when_valid() -> bytes:
        if early:
            raise ConfigError("not valid yet")
        return read_file("file", file)

    value = Watched([file], read_when_valid)
    early = True
    file.write_bytes(b"newer")
    assert [value.current() for _ in range(3)] == [b"old"] * 3
    early = False
    assert value.current() == b"newer"
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert caplog.messages[0] == "not valid yet; what was read before stays in use"


def test_what_has_not_changed_is_not_read_again(file: Path) -> None:
    reads = 0

    def count() -> int:
        nonlocal reads
        reads += 1
        return reads

    value = Watched([file], count)
    assert [value.current() for _ in range(3)] == [1, 1, 1]
