"""Memory that is free and still the process's, given back to the system."""

import ctypes


def give_back() -> None:
    """Have the C library return free pages; it holds its locks meanwhile, so this is for seldom.

    What a model leaves behind lies scattered among what lives on, where the C library would keep it. Only glibc can do
    this (malloc_trim(3)); with another one nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
