"""The C library's memory: kept together, and given back to the system where it is free."""

import ctypes
import os

ARENAS = 1
"""Parts of the heap that threads are dealt out to; glibc makes up to eight for each processor. What an answer leaves
free in one is no use to the next in another, and pages between what is in use stay the process's."""

_M_ARENA_MAX = -8
"""Of glibc's `mallopt`."""


def keep_together() -> None:
    """Have all threads that come share the heap, unless the variable MALLOC_ARENA_MAX says how many parts it has.

    Only glibc has such parts; with another C library nothing happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and "MALLOC_ARENA_MAX" not in os.environ:
        set_option(_M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Have the C library return free pages; it holds its locks meanwhile, so this is for seldom.

    What a model leaves behind lies scattered among what lives on, where the C library would keep it. Only glibc can do
    this (malloc_trim(3)); with another one nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
