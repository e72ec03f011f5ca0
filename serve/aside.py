"""Work that would hold up the event loop, done on other threads; what is soon done is done at once."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from serve.jobs import Decoded

Result = TypeVar("Result")

SMALL = 512
"""Work of which size is done at once: half a millisecond at most. The way to another thread and back costs a fifth of
one, more than most requests have to be read and answered."""

THREADS = 2


class Aside:
    """Reads requests and puts answers together, which takes time in proportion to them.

    Args:
        name: of the threads.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(THREADS, name)

    async def run(self, work: Callable[[], Result], size: int) -> Result:
        """What some work returns or raises.

        Args:
            work: what to do.
            size: of it, in bytes of a request, or as `size_of` has it.
        """
        if size <= SMALL:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, copy_context().run, work)


def size_of(decoded: Decoded) -> int:
    """Of the work to put an answer together: four for each token, one for each 256 bytes of its attention."""
    arrays = [decoded.encoder_attention]
    for one in decoded.hypotheses:
        arrays += [one.cross_attention, one.decoder_attention]
    attention = sum(array.nbytes for array in arrays if array is not None)
    return 4 * sum(len(one.tokens) for one in decoded.hypotheses) + attention // 256
