"""What every fault must leave behind: nothing."""

import re
import time
from collections.abc import Callable
from typing import Any

import grpc

from serve.client import _particulars
from tests.serve.running import PATIENCE, Running

OURS = re.compile(r"Traceback|site-packages|\.py\b|onnx|(^|\s)/\w", re.IGNORECASE)
"""Of a file, a traceback or the runtime: not for clients."""


def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread brings about."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not come about"


def assert_idle(running: Running) -> None:
    """No call, no row and no place in the queue is taken; and the engine is alive."""
    running.until_idle()
    engine, calls = running.engine, running.server._calls
    until(lambda: not engine._batcher.busy and engine.silent == 0.0)
    assert (calls.in_flight, engine.waiting, engine.waiting_tokens, engine.waiting_bytes, engine.rows) == (0,) * 5
    assert engine.alive


def ended(running: Running, code: str, reason: str) -> float:
    """Calls that have ended so, as the metrics count them."""
    samples = (sample for family in running.server._parts.metrics.registry.collect() for sample in family.samples)
    wanted = {"code": code, "reason": reason}
    return sum(
        sample.value
        for sample in samples
        if sample.name == "limelight_requests_total" and wanted.items() <= sample.labels.items()
    )


def status(error: Any) -> tuple[grpc.StatusCode, str]:
    """Code and reason of a call that failed, of which nothing of ours is told."""
    assert not OURS.search(error.details()), error.details()
    return error.code(), _particulars(error).get("reason", "")
