"""Free memory that goes back to the system."""

import os
import platform

import pytest

from bench.load.accounts import memory
from serve.heap import give_back

BLOCKS, SIZE = 40_000, 2_000
"""More than Python's own allocator takes, and less than what the C library maps by itself."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can give pages back")
def test_what_lies_free_below_what_lives_on_goes_back() -> None:
    blocks = [bytes(SIZE) for _ in range(BLOCKS)]
    last = blocks[-1]  # at the end of the heap, which can therefore not shrink
    blocks.clear()
    before = memory(os.getpid()).resident

    give_back()

    assert before - memory(os.getpid()).resident > 0.5 * BLOCKS * SIZE / 2**20
    assert last == bytes(SIZE)
