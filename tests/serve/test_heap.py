"""One heap for all threads, and free memory that goes back to the system."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bench.load.accounts import memory
from serve.heap import give_back

BLOCKS, SIZE = 40_000, 2_000
"""More than Python's own allocator takes, and less than what the C library maps by itself."""


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap has parts")

THREADS = """
import ctypes, sys, threading
from serve.heap import keep_together

keep_together()
library, together = ctypes.CDLL(None), threading.Barrier(8)
library.fopen.restype = ctypes.c_void_p


def allocate():
    together.wait()
    library.malloc(1000)
    together.wait()


threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = ctypes.c_void_p(library.fopen(sys.argv[1].encode(), b"w"))
library.malloc_info(0, file)
library.fclose(file)
"""
"""Threads that allocate at the same time, and what the C library then tells of its heap."""


@glibc
@pytest.mark.parametrize(("variable", "parts"), [({}, 1), ({"MALLOC_ARENA_MAX": "4"}, 4)])
def test_threads_share_the_heap(variable: dict[str, str], parts: int, tmp_path: Path) -> None:
    info = tmp_path / "heap.xml"
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | variable
    subprocess.run([sys.executable, "-c", THREADS, str(info)], env=environment, check=True, timeout=60)
    assert info.read_text(encoding="utf-8").count("<heap nr=") == parts


@glibc
def test_what_lies_free_below_what_lives_on_goes_back() -> None:
    blocks = [bytes(SIZE) for _ in range(BLOCKS)]
    last = blocks[-1]  # at the end of the heap, which can therefore not shrink
    blocks.clear()
    before = memory(os.getpid()).resident

    give_back()

    assert before - memory(os.getpid()).resident > 0.5 * BLOCKS * SIZE / 2**20
    assert last == bytes(SIZE)
