"""Which rates are tried."""

import pytest

from bench.load.cells import Cell
from bench.load.sweep import LoadOptions, past_best
from tests.bench_load.test_cells import cell

OPTIONS = LoadOptions(objective=0.1, deadline=1.0, factor=1.25)


def reached(*goodputs: int, busy: float = 0.0) -> list[Cell]:
    return [cell(latencies=[0.01] * goodput, busy=busy) for goodput in goodputs]


def test_rates_rise_until_goodput_falls() -> None:
    assert not past_best(reached(100, 200, 195))
    assert past_best(reached(100, 200, 170))
    assert past_best(reached(0))


def test_a_fall_that_may_be_the_generators_ends_nothing_the_first_time() -> None:
    assert not past_best(reached(100, 50, busy=1.0))
    assert past_best(reached(100, 50, 50, busy=1.0))


def test_servers_and_rounds_share_their_rates() -> None:
    fast, slow = OPTIONS.first(2000), OPTIONS.first(700)
    assert OPTIONS.rate(fast) in {OPTIONS.rate(slow + step) for step in range(10)}
    assert OPTIONS.rate(fast) == pytest.approx(500, rel=0.25)
    assert OPTIONS.rate(fast) <= 500


def test_the_first_rate_can_be_chosen() -> None:
    options = LoadOptions(objective=0.1, deadline=1.0, factor=2, first_rate=64)
    assert options.rate(options.first(5000)) == 64
