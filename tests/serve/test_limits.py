"""Every limit of the engine can be set on the command line."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

import serve.commands
from serve.cli import app
from serve.jobs import EngineLimits
from serve.settings import Settings

SET = {
    "queue": 3,
    "client_queue": 2,
    "queue_tokens": 17,
    "queue_bytes": 19,
    "rows": 5,
    "encode_tokens": 7,
    "tokens": 11,
    "attention": 13,
    "call_seconds": 0.5,
}


def limits(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> EngineLimits:
    """What a server would be started with."""
    found: list[Settings] = []
    monkeypatch.setattr(serve.commands, "_run", lambda root, load, settings: found.append(settings))
    result = CliRunner().invoke(app, ["serve", str(Path("bundle")), *arguments])
    assert result.exit_code == 0, result.output
    return found[0].options.limits


def test_none_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {field.name for field in dataclasses.fields(EngineLimits)} == set(SET)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SET.items()]
    assert dataclasses.asdict(limits(monkeypatch, *options)) == SET


def test_what_is_not_given_is_as_the_engine_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits(monkeypatch) == EngineLimits()


@pytest.mark.parametrize("name", SET)
def test_nothing_is_not_a_limit(name: str) -> None:
    result = CliRunner().invoke(app, ["serve", "bundle", f"--{name.replace('_', '-')}=-1"])
    assert result.exit_code == 2
    assert "Invalid value for" in result.output
