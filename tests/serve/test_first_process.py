"""As the first process of a container, whom the kernel shields from signals, the command stops even while it loads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

FIRST = ["unshare", "--fork", "--pid", "--kill-child"]
"""Runs a command as process 1."""


def ended(script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*FIRST, sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(autouse=True)
def _needs_namespaces() -> None:
    if shutil.which("unshare") is None or subprocess.run([*FIRST, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process namespaces can be made here: it takes unshare, and root")


TERMINATE = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('alive')"


def test_fault_37_the_first_process_of_a_container_can_be_stopped() -> None:
    done = ended(f"import serve.cli; {TERMINATE}")
    assert (done.returncode, done.stdout) == (143, ""), done.stderr


def test_the_first_process_is_shielded_from_what_it_does_not_handle() -> None:
    """Or else the test above would see nothing."""
    done = ended(TERMINATE)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
