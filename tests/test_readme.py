"""The README's commands and its Python are run as they are written, in order, against the shipped model."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

QUICKER = {
    "train": "--set training.updates=20 --set training.warmup=5 --set training.validation_pairs=50",
    "evaluate": "--limit 50",
    "export": "--validation-pairs 50",
    "ask": "",
    "align": "",
}
"""What is added to a command so that its test is short; what it says stays as it is."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    return [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository to a command, and takes what the command writes."""
    path = tmp_path_factory.mktemp("readme")
    for name in ("checkpoints", "configs"):
        (path / name).symlink_to(REPOSITORY / name)
    (path / "build").mkdir()
    return path


def run(command: str, folder: Path, address: str = "") -> str:
    arguments = shlex.split(command)
    extra = shlex.split(QUICKER[arguments[1]])
    done = subprocess.run(
        [sys.executable, "-m", "serve", *arguments[1:], *extra],
        cwd=folder,
        env=os.environ | {"LIMELIGHT_ADDRESS": address, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    """Address of a server started by the README's own command, on a free port."""
    export, serve = (next(line for line in commands() if f"limelight {name}" in line) for name in ("export", "serve"))
    run(export, folder)
    arguments = shlex.split(serve.removesuffix("&"))[1:]
    server = subprocess.Popen(
        [sys.executable, "-m", "serve", *arguments, "--port", "0"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
        stderr=subprocess.PIPE,
        text=True,
    )
    with server:
        yield _address(server)
        server.terminate()
    assert server.returncode == 0


def _address(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    said = ""
    for line in server.stderr:
        said += line
        if ready := re.search(r"on (127\.0\.0\.1:\d+)", line):
            return ready[1]
    raise AssertionError(f"the server ended before it was ready:\n{said}")


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:\$ |`)make ([a-z-]+)", README))
    assert named
    assert named <= targets


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("limelight ask")])
def test_ask(command: str, folder: Path, served: str) -> None:
    assert "P AA D K AE S T" in run(command, folder, served)
    for name in re.findall(r"--plot (\S+)", command):
        assert (folder / name).stat().st_size > 10_000


@pytest.mark.parametrize("code", [code for code in blocks("python") if "Client" in code])
def test_python(code: str, served: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code.replace("127.0.0.1:50051", served), "README.md", "exec"), {})
    assert "P AA D K AE S T" in capsys.readouterr().out


def test_the_single_file(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    [export] = [line for line in commands() if line.endswith(" --generate")]
    [code] = [code for code in blocks("python") if "generate.onnx" in code]
    run(export, folder)
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("P AA D K AE S T (1, 2, 4, 8, 8)")


def test_every_example_is_run() -> None:
    assert [code for code in blocks("python") if ("Client" in code) == ("generate.onnx" in code)] == []


def test_train_and_evaluate(folder: Path) -> None:
    train, evaluate = (line for line in commands() if re.match(r"limelight (train|evaluate)", line))
    run(train, folder)
    assert re.search(r"WER [\d.]+  PER [\d.]+", run(evaluate, folder))


def test_align(folder: Path, served: str) -> None:  # noqa: ARG001  # which has written the bundle
    [command] = [line for line in commands() if line.startswith("limelight align")]
    (folder / "pairs.tsv").write_text("podcast\tP AA D K AE S T\n", encoding="utf-8")
    assert run(command.partition("#")[0], folder) in README


def test_every_command_is_run() -> None:
    known = (
        "make ",
        "limelight export",
        "limelight serve",
        "limelight ask",
        "limelight train",
        "limelight evaluate",
        "limelight align",
    )
    assert [line for line in commands() if not line.startswith(known)] == []


def test_named_files_exist() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r"`((?:configs|protos|model|tests|docs)/[\w./-]+)`", README
    )
    assert linked
    assert [name for name in linked if not (REPOSITORY / name).exists()] == []


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
