"""The command line as a whole: mistakes are answered in one line, and help never needs what is not installed."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reversal import Reversal

REPOSITORY = Path(__file__).parents[2]
COMMANDS = ("train", "export", "evaluate", "serve", "ask", "token")


def limelight(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_version() -> None:
    assert limelight("--version").stdout == f"limelight {importlib.metadata.version('limelight')}\n"


def test_help_lists_every_command() -> None:
    done = limelight("--help")
    assert done.returncode == 0
    assert [name for name in COMMANDS if f" {name} " not in done.stdout] == []


def test_without_arguments_it_shows_help() -> None:
    assert "Usage" in limelight().stdout + limelight().stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "missing.toml"), "error: missing.toml: no such configuration; the shipped ones are in configs/\n"),
        (
            ("serve", "missing"),
            "error: missing: no bundle, and no folder of bundles; make one with: limelight export CHECKPOINT missing\n",
        ),
        (("evaluate", "missing"), "error: missing: no such checkpoint folder\n"),
        (("ask", "x", "--temperature", "0"), "error: sampling.temperature: 0.0 is not from 0.01 to 100.0\n"),
        (("export", "missing", "bundle"), "error: missing: no such checkpoint folder\n"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    done = limelight(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_refused() -> None:
    done = limelight("serve", "bundle", "--prot", "1")
    assert done.returncode == 2
    assert "--prot" in done.stderr


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def without(package: str, folder: Path) -> dict[str, str]:
    """The environment of a Python that has no such package."""
    (folder / "sitecustomize.py").write_text(WITHOUT.format(package=package), encoding="utf-8")
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("grpc", "serve bundle --port 0", "serve"),
        ("google", "ask text --beam-size 4", "serve"),
        ("torch", "evaluate CHECKPOINT", "train"),
        ("onnx", "export CHECKPOINT bundle", "export"),
    ],
)
def test_a_command_says_which_package_it_misses(
    reversal: Reversal, tmp_path: Path, package: str, command: str, extra: str
) -> None:
    words = [str(reversal.checkpoint) if word == "CHECKPOINT" else word for word in command.split()]
    done = limelight(*words, cwd=reversal.folder, env=without(package, tmp_path))
    message = f"error: this command needs the package '{package}': pip install 'limelight[{extra}]'\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_help_lists_every_command_whatever_is_missing(tmp_path: Path) -> None:
    helped = limelight("--help", env=without("grpc", tmp_path))
    assert [name for name in COMMANDS if f" {name} " not in helped.stdout] == []
