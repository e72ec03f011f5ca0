"""Figures for Prometheus: what is asked, how long it takes, and how full the engine is."""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from serve.jobs import Decoded, Ticket
from serve.logs import DROPPED
from serve.models import Models

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Bounds of the histograms: a token takes a millisecond, a long answer under a full queue many seconds."""

LOOP_LAG = 0.25
"""Seconds between two looks at how late the event loop is."""


class Metrics:
    """The figures of one server.

    Args:
        models: what is served, read whenever it is asked for.
    """

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "limelight_requests", "Calls that have ended.", ["method", "code", "reason"], registry=self.registry
        )
        self._items = Counter(
            "limelight_items",
            "Texts of GenerateMany and requests of ModelStreamInfer that have ended.",
            ["code", "reason"],
            registry=self.registry,
        )
        self._latency = self._histogram("request", "From the arrival of a call to its end.", ["method"])
        self._queue = self._histogram("queue", "In the queue of the engine.")
        self._decode = self._histogram("decode", "From there until the result was ready.")
        self._first = self._histogram("first_token", "From the arrival of a stream's call to its first token.")
        self._between = self._histogram("between_tokens", "From one token of a stream to the next.")
        self._tokens = Counter(
            "limelight_generated_tokens", "Tokens of the best hypotheses of searches.", registry=self.registry
        )
        self._closed = Counter(
            "limelight_connections_closed",
            "Connections without a call that were closed to make room for others.",
            registry=self.registry,
        )
        self._out_of_files = Counter(
            "limelight_out_of_files", "Times that the process could open no more files.", registry=self.registry
        )
        self.registry.register(_Served(models))
        self._lag = self._histogram("loop_lag", "How late the event loop was, looked at four times a second.")
        self.registry.register(DROPPED)
        ProcessCollector(registry=self.registry)

    def _histogram(self, name: str, what: str, labels: list[str] | None = None) -> Histogram:
        return Histogram(f"limelight_{name}_seconds", what, labels or (), registry=self.registry, buckets=SECONDS)

    def gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A figure that is read whenever it is asked for."""
        Gauge(f"limelight_{name}", what, registry=self.registry).set_function(read)

    def ended(self, method: str, code: str, reason: str, seconds: float) -> None:
        """A call has ended."""
        self._requests.labels(method, code, reason).inc()
        self._latency.labels(method).observe(seconds)

    def item_ended(self, code: str, reason: str) -> None:
        """One of many texts has ended."""
        self._items.labels(code, reason).inc()

    def connections_closed(self, count: int) -> None:
        """Connections were closed to make room for others."""
        self._closed.inc(count)

    def out_of_files(self) -> None:
        """From now on, this process can open no more files."""
        self._out_of_files.inc()

    def answered(self, ticket: Ticket, decoded: Decoded) -> None:
        """The engine has answered."""
        self._queue.observe(ticket.timings.queue)
        self._decode.observe(ticket.timings.decode)
        if ticket.job.target is None:
            self._tokens.inc(len(decoded.hypotheses[0].tokens))

    def token(self, before: float, *, first: bool) -> float:
        """A stream's token is on its way; returns the time.

        Args:
            before: time of the token before it, or of the call's arrival for the first.
            first: there was none before.
        """
        now = time.monotonic()
        (self._first if first else self._between).observe(now - before)
        return now

    async def watch_loop(self) -> None:
        """Look again and again at how late the event loop is, until cancelled."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(LOOP_LAG)
            self._lag.observe(max(0.0, time.monotonic() - before - LOOP_LAG))


class _Served(Collector):
    """The models that are served, and what their engines' threads keep as plain numbers."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        info = GaugeMetricFamily(
            "limelight_model_info",
            "A model that is served; always 1.",
            labels=["name", "version", "precision", "provider"],
        )
        for serving in list(self._models):
            info.add_metric([serving.name, serving.version, serving.model.precision, serving.model.provider], 1)
        yield info
        counts = self._models.counts()
        for name, what, value in (
            ("source_tokens", "Source tokens that were encoded.", counts.source_tokens),
            ("padded_source_tokens", "The same with their padding.", counts.padded_source_tokens),
            ("steps", "Decoder steps.", counts.steps),
            ("row_steps", "Rows of all decoder steps; divided by the steps, how full they were.", counts.row_steps),
            ("retries", "Requests tried again by themselves after their batch had failed.", counts.retries),
        ):
            yield CounterMetricFamily(f"limelight_{name}", what, value=value)
