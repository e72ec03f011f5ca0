"""Arrivals are drawn once, from a seed."""

import itertools
import statistics

import pytest

from bench.load.arrivals import poisson, shuffled

SOURCES = ["a", "b", "c"]


def test_the_same_seed_gives_the_same_arrivals() -> None:
    assert poisson(50, 2, SOURCES, seed=3) == poisson(50, 2, SOURCES, seed=3)


def test_another_seed_or_rate_gives_others() -> None:
    dues = [[arrival.due for arrival in poisson(rate, 2, SOURCES, seed)] for rate, seed in ((50, 1), (50, 2), (51, 1))]
    assert dues[0] != dues[1]
    assert dues[0][0] != dues[2][0]


def test_arrivals_are_in_order_and_within_the_time() -> None:
    dues = [arrival.due for arrival in poisson(200, 3, SOURCES, seed=0)]
    assert dues == sorted(dues)
    assert dues[0] > 0
    assert dues[-1] < 3


def test_gaps_are_exponential() -> None:
    dues = [arrival.due for arrival in poisson(100, 100, SOURCES, seed=0)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(dues)]
    assert statistics.fmean(gaps) == pytest.approx(0.01, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.01, rel=0.05)  # as their mean, which a steady clock's is not


def test_every_source_is_asked_before_one_is_asked_again() -> None:
    asked = list(itertools.islice(shuffled(SOURCES, seed=1), 6))
    assert sorted(asked[:3]) == SOURCES
    assert asked[3:] == asked[:3]


def test_nothing_arrives_where_there_is_no_time() -> None:
    assert poisson(10, 0, SOURCES, seed=0) == []
