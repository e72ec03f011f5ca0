"""A server and a client where importing torch raises: what a machine without it goes through."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reversal import Reversal, parts

REPOSITORY = Path(__file__).parent.parent.parent

REFUSED = ("torch", "safetensors", "onnx", "onnxscript", "tensorboard", "sacrebleu", "matplotlib", "opentelemetry")

REFUSE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {REFUSED}:
            raise ImportError(f"{{name}} must not be imported here")

sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a Python in which what a server must not need cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(REFUSE)
    return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}", "COLUMNS": "200"}


@pytest.fixture
def address(environment: dict[str, str], reversal: Reversal) -> Iterator[str]:
    command = [sys.executable, "-m", "serve", "serve", str(reversal.bundle), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = ""
        for line in server.stderr:
            said += line
            if ready := re.search(r"on (127\.0\.0\.1:\d+)", line):
                yield ready[1]
                break
        else:
            raise AssertionError(f"the server ended before it was ready:\n{said}")
        server.terminate()
    assert server.returncode == 0


@pytest.mark.parametrize("name", REFUSED)
def test_importing_raises_there(environment: dict[str, str], name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], env=environment, capture_output=True, check=False)
    assert done.returncode != 0
    assert b"must not be imported here" in done.stderr


def test_serves_and_answers(environment: dict[str, str], address: str) -> None:
    text = parts()["test"][0]
    command = [sys.executable, "-m", "serve", "ask", text, "--address", address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(text[::-1])
    assert "Cross-attention" in done.stdout


def test_what_needs_torch_says_so(environment: dict[str, str]) -> None:
    hidden = environment["PYTHONPATH"].split(os.pathsep)[0]
    Path(hidden, "sitecustomize.py").write_text(
        REFUSE.replace("raise ImportError(", "raise ModuleNotFoundError(name=name, *(").replace('here")', 'here",))')
    )
    command = [sys.executable, "-m", "serve", "train", str(REPOSITORY / "configs" / "g2p-quick.toml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: this command needs the package 'torch': pip install 'limelight[train]'\n"
