"""Processor time and memory of a process tree, on processes that tell when they are ready."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from bench.load import accounts

CHILD = "import sys; x = bytearray(30 << 20); print('ready', flush=True); sys.stdin.read()"
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdin=sys.stdin, stdout=subprocess.PIPE)
child.stdout.readline()
while time.process_time() < 0.2: pass
print("ready", flush=True)
child.wait()
"""


@pytest.fixture
def tree() -> Iterator[int]:
    """A process that has used its share of time, with a child that has used memory."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


def test_the_tree_holds_the_child(tree: int) -> None:
    found = accounts.process_tree(tree)
    assert found[0] == tree
    assert len(found) == 2


def test_processor_time_is_that_of_the_tree(tree: int) -> None:
    assert accounts.processor_seconds(tree) >= 0.19  # the kernel counts in ticks of 10 ms


def test_memory_is_that_of_the_tree(tree: int) -> None:
    found = accounts.memory(tree)
    assert 30 < found.proportional <= found.resident <= found.peak


def test_a_process_that_has_ended_costs_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    assert accounts.processor_seconds(process.pid) == 0
    assert accounts.memory(process.pid) == accounts.Memory(0, 0, 0)
