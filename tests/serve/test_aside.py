"""What is done on the event loop's own thread, and what is not."""

import asyncio
import threading
from contextvars import ContextVar

import numpy as np
import pytest

from model.hypotheses import Hypothesis
from serve.aside import SMALL, Aside, size_of
from serve.jobs import Decoded

_said = ContextVar("said", default="")


@pytest.mark.parametrize(("size", "name"), [(0, "MainThread"), (SMALL, "MainThread"), (SMALL + 1, "elsewhere_0")])
def test_what_is_long_is_done_elsewhere_in_the_same_context(size: int, name: str) -> None:
    async def run() -> tuple[str, str]:
        _said.set("this")
        return await Aside("elsewhere").run(lambda: (threading.current_thread().name, _said.get()), size)

    assert asyncio.run(run()) == (name, "this")


@pytest.mark.parametrize("size", [0, SMALL + 1])
def test_what_is_raised_is_raised(size: int) -> None:
    def fail() -> None:
        raise ValueError("this")

    with pytest.raises(ValueError, match="this"):
        asyncio.run(Aside("elsewhere").run(fail, size))


def test_tokens_and_attention_of_every_hypothesis_count() -> None:
    def hypothesis(*tokens: int, side: int = 0) -> Hypothesis:
        weights = np.zeros((1, 1, side, side), np.float32) if side else None
        return Hypothesis([*tokens], [0.0] * len(tokens), 0.0, "stop", weights, weights)

    assert size_of(Decoded(None, [])) == 0
    assert size_of(Decoded(None, [hypothesis(1, 2, 3), hypothesis(1)])) == 16
    assert size_of(Decoded(np.zeros((2, 4, 8, 8), np.float32), [hypothesis(1, side=8)])) == 4 + 8 + 2
