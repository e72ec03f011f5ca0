"""When requests arrive, and which: drawn beforehand from a fixed seed, the same for every server."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Arrival(NamedTuple):
    """One request to come."""

    due: float
    """Seconds from the start."""
    source: str
    """What is asked."""


def poisson(rate: float, seconds: float, sources: Sequence[str], seed: int) -> list[Arrival]:
    """Arrivals that know nothing of each other, and nothing of the answers: an open loop.

    Args:
        rate: how many a second, in the mean.
        seconds: how long.
        sources: what is asked, in an order drawn from the seed, over and over.
        seed: the same seed gives the same arrivals.
    """
    generator = random.Random(f"{seed} {rate}")
    asked = shuffled(sources, seed)
    found: list[Arrival] = []
    due = generator.expovariate(rate)
    while due < seconds:
        found.append(Arrival(due, next(asked)))
        due += generator.expovariate(rate)
    return found


def shuffled(items: Sequence[Item], seed: int) -> Iterator[Item]:
    """The items over and over, in one order drawn from the seed."""
    return itertools.cycle(random.Random(seed).sample(items, len(items)))
