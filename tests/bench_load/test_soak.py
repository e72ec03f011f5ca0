"""What a soak finds: leaks, rows that are left, calls that end as they may not."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.load.options import ServingOptions
from bench.load.servers import ServerName
from bench.soak import GAUGES, Seen, Soaked, free_port, growth, judged, soak
from bench.soak_calls import Texts
from tests.reversal import Reversal


def seen(memory: Sequence[float] = (50.0,), left: Iterable[str] = ()) -> Seen:
    ends = {"good": Counter(OK=90), "given up": Counter(CANCELLED=3, OK=2), "bad": Counter(INVALID_ARGUMENT=1)}
    return Seen(ends=ends, memory=list(memory), left=set(left), swaps=7, versions=["7"])


def test_growth_is_of_the_second_half() -> None:
    assert growth([10.0] * 50 + [100.0] * 50) == pytest.approx(0.0)
    assert growth([100.0] * 100 + [100.0 + 0.1 * step for step in range(100)]) == pytest.approx(0.0943, abs=0.001)
    assert growth([*[100.0] * 99, 900.0]) == pytest.approx(0.0)  # one peak is no growth
    assert growth([1.0]) == 0.0


def test_growth_is_found_under_noise_that_is_larger_than_it() -> None:
    noise = np.random.default_rng(0).uniform(-10.0, 10.0, 240)
    assert growth(list(150.0 + noise)) == pytest.approx(0.0, abs=0.01)
    assert growth(list(150.0 + noise + np.linspace(0.0, 15.0, 240))) == pytest.approx(0.048, abs=0.01)


def test_what_is_well_is_well() -> None:
    assert judged(seen([40.0] * 10 + [50.0] * 90)) == []


def test_what_is_wrong_is_said() -> None:
    leaking = seen([50.0 + step for step in range(100)])
    assert judged(leaking) == ["memory grew by 39.4 % in the second half, 2 are allowed"]
    (name, *_) = GAUGES
    assert judged(seen(left=[name])) == [f"{name} is not 0 although nobody asks"]
    stale = seen()
    stale.versions = ["6", "7"]
    assert judged(stale) == ["the versions ['6', '7'] are served after 7 swaps"]
    odd = seen()
    odd.ends["good"]["INTERNAL"] += 2
    odd.ends["bad"].clear()
    assert judged(odd) == ["good calls ended with INTERNAL (2)", "there were no bad calls"]


def server(reversal: Reversal, **changes: Any) -> Soaked:
    return Soaked(
        name=ServerName.LIMELIGHT,
        python=Path(sys.executable),
        model=reversal.bundle,
        options=ServingOptions(),
        metrics_port=free_port(),
        texts=Texts("abcdefgh", 8, "abc"),
        rest_every=1.0,
        look_every=0.1,
        **changes,
    )


def test_fault_42_a_short_soak(reversal: Reversal) -> None:
    """Everything but the growth of the memory, which a few seconds say nothing of."""
    looks: list[int] = []
    found, failures = soak(server(reversal, swap_every=2.0), 6.0, 0, lambda one: looks.append(one.calls))
    assert [failure for failure in failures if not failure.startswith("memory grew")] == []
    assert found.calls >= looks[-1] > 100
    assert len(found.busy) >= len(looks) > 3
    assert len(found.memory) > 3
    assert found.swaps >= 2


def test_fault_42_a_leak_is_found(reversal: Reversal) -> None:
    """The negative control: half a megabyte of every call is kept."""
    _, failures = soak(server(reversal, leak=512 * 1024), 8.0, 0, lambda _: None)
    assert [failure for failure in failures if failure.startswith("memory grew")]
