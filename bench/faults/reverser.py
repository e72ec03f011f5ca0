"""What the peers' models do, in the runtimes that each of them documents: turn texts round, in eight steps.

As a model's author is expected to, they refuse a text that is empty, too long, or not UTF-8. Standard library alone.
"""

from collections.abc import Callable, Sequence

from bench.faults import device

STEPS = 8
"""Of every batch."""

LONGEST = 64
"""Characters of a text: tokens of the shipped model, which ours has."""


def understood(element: bytes) -> str:
    """A text.

    Raises:
        ValueError: it is none that this model takes, and why.
    """
    try:
        text = element.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"SOURCE: is not UTF-8: {error.reason}") from None
    if not text:
        raise ValueError("SOURCE: is empty")
    if len(text) > LONGEST:
        raise ValueError(f"SOURCE: {len(text)} characters are over the limit of {LONGEST}")
    return text


def decode(texts: Callable[[], Sequence[str]]) -> None:
    """Work on a batch, as long as anything of it is wanted.

    Args:
        texts: those that are still wanted, looked at before each step.
    """
    for _ in range(STEPS):
        wanted = texts()
        if not wanted:
            return
        device.enter("step", wanted)
