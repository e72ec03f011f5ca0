"""The image, run as it is to be run: read-only, as nobody in particular, with nothing it may do; `make image-check`.

LIMELIGHT_TEST_IMAGE names it, LIMELIGHT_TEST_CONTAINERS what runs it (docker, or podman with options), and
LIMELIGHT_TEST_BUNDLE a bundle of the shipped model.
"""

import json
import os
import re
import shlex
import subprocess
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from serve.settings import PREFIX
from tests.deploy.dockerfile import given, words
from tests.deploy.documentation import hardening

IMAGE = os.environ.get("LIMELIGHT_TEST_IMAGE", "")
BUNDLE = os.environ.get("LIMELIGHT_TEST_BUNDLE", "")
CONTAINERS = shlex.split(os.environ.get("LIMELIGHT_TEST_CONTAINERS", "docker"))

pytestmark = pytest.mark.skipif(not IMAGE, reason="no image is built: make image-check, with docker or podman")

ALONE = ("--network=none", "--memory=512m", "--cpus=1")
"""With a loopback of its own: nothing else on this machine can have its ports."""

IN_VAIN = "touch /written 2>/dev/null || touch /opt/limelight/written 2>/dev/null || echo refused"


def containers(*arguments: str, status: int | None = 0) -> "subprocess.CompletedProcess[str]":
    """Run the container engine; None where any exit status will do."""
    done = subprocess.run([*CONTAINERS, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert status in {None, done.returncode}, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def begun(name: str, *options: str) -> list[str]:
    """The command that runs the image as docs/deployment.md has it, its models mounted."""
    return ["run", "--name", name, *hardening(), *ALONE, "--volume", f"{BUNDLE}:/models:ro", *options, IMAGE]


@pytest.fixture
def name() -> Iterator[str]:
    """Of a container, which is gone afterwards."""
    chosen = f"limelight-test-{uuid.uuid4().hex[:8]}"
    yield chosen
    containers("rm", "--force", chosen, status=None)


@pytest.fixture
def serving(name: str) -> str:
    """A container that serves, with metrics."""
    containers(*begun(name, "--detach", f"--env={PREFIX}METRICS_PORT=9100"))
    with subprocess.Popen(
        [*CONTAINERS, "logs", "--follow", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as log:
        assert log.stdout is not None
        said = []
        for line in log.stdout:
            said.append(line)
            if "; ask it: " in line:
                break
        log.terminate()
    assert "; ask it: " in said[-1], "".join(said)
    return name


def inside(name: str, *command: str, status: int | None = 0) -> str:
    """What a command in the container prints."""
    return containers("exec", name, *command, status=status).stdout


def test_it_answers(serving: str) -> None:
    assert inside(serving, "limelight", "ask", "podcast", "--no-heat-map").startswith("P AA D K AE S T\n")
    metrics = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9100/metrics').read().decode())"
    assert 'limelight_requests_total{code="OK",method="Generate",reason="OK"} 1.0' in inside(
        serving, "python", "-c", metrics
    )


def test_it_is_healthy_by_its_own_probe(serving: str) -> None:
    configured: Any = json.loads(containers("image", "inspect", IMAGE).stdout)[0]
    probe = json.loads(given("HEALTHCHECK").partition(" CMD ")[2])
    health = configured["Config"].get("Healthcheck") or configured["Healthcheck"]  # docker, and podman
    assert health["Test"] == ["CMD", *probe]
    assert inside(serving, *probe) == "SERVING\n"
    containers("exec", serving, *probe, "127.0.0.1:1", status=1)


def test_it_may_do_nothing_and_writes_nothing(serving: str) -> None:
    assert inside(serving, "id", "-u").strip() == given("USER").partition(":")[0]
    assert inside(serving, "sh", "-c", IN_VAIN) == "refused\n"
    assert inside(serving, "find", "/tmp", "-mindepth", "1") == "", "what was there while the bundle was loaded is gone"
    assert re.search(r"^CapEff:\s+0+$", inside(serving, "cat", "/proc/1/status"), re.MULTILINE)


def test_it_has_neither_torch_nor_pip(serving: str) -> None:
    find = "import importlib.util as u; print(*(n for n in ('torch', 'onnx', 'pip', 'hatchling') if u.find_spec(n)))"
    assert inside(serving, "python", "-c", find) == "\n"


def test_it_takes_as_many_threads_as_it_has_processors(serving: str) -> None:
    done = containers("logs", serving)
    assert ", 1 threads)" in done.stdout + done.stderr


def test_it_is_the_first_process_and_stops_when_it_is_told(serving: str) -> None:
    command = inside(serving, "cat", "/proc/1/cmdline").split("\0")[:-1]
    assert [part.rpartition("/")[2] for part in command] == ["python", *words("ENTRYPOINT"), "serve", "models"]
    containers("stop", "-t", "40", serving)
    done = containers("logs", serving)
    assert (done.stdout + done.stderr).rstrip().endswith("stopping: signal SIGTERM")
    assert containers("inspect", "--format={{.State.ExitCode}}", serving).stdout == "0\n"


def test_what_kubernetes_tells_of_a_service_is_no_setting(name: str) -> None:
    done = containers(*begun(name, f"--env={PREFIX}PORT=tcp://10.0.0.1:50051"), status=1)
    assert "set enableServiceLinks to false" in done.stdout + done.stderr


@pytest.mark.parametrize("command", [["doctor", "/models"], ["--version"], ["token", "alice"]])
def test_other_commands_are_there(name: str, command: list[str]) -> None:
    assert containers(*begun(name), *command).stdout
