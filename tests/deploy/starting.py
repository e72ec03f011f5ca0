"""What a container's command comes to: its flags, variables and file, read by the command itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import serve.commands
from serve.cli import app
from serve.settings import Settings


def settings_of(
    monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], variables: Mapping[str, str]
) -> tuple[str, Settings]:
    """The folder and the settings that a server would be started with; nothing is.

    Args:
        monkeypatch: puts back what is replaced here.
        arguments: of the `limelight` command.
        variables: beside those of this process.
    """
    started: list[tuple[str, Settings]] = []

    def run(root: Path, load: Any, settings: Settings) -> None:  # noqa: ARG001  # as serve.commands calls it
        started.append((str(root), settings))

    monkeypatch.setattr(serve.commands, "_run", run)
    result = CliRunner().invoke(app, list(arguments), env=dict(variables))
    assert result.exit_code == 0, result.output or result.exception
    (found,) = started
    return found
