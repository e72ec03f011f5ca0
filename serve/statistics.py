"""Counts of the requests of the Open Inference Protocol, by version of a model. No gRPC."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from serve.jobs import Ticket
from serve.models import Serving
from serve.pb.inference import grpc_service_pb2 as pb


class Request:
    """Where the time of a request goes."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._read = self._decoded = self._begun
        self._tickets: Sequence[Ticket] = ()

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.monotonic() - self._begun

    def read(self) -> None:
        """Its tensors are understood."""
        self._read = time.monotonic()

    def decoded(self, tickets: Sequence[Ticket]) -> None:
        """The engine has answered all of its texts."""
        self._decoded, self._tickets = time.monotonic(), tickets

    def add_to(self, counted: pb.ModelStatistics) -> None:
        """It has succeeded: its slowest text says how long it waited and was decoded."""
        timings = [ticket.timings for ticket in self._tickets]
        stats = counted.inference_stats
        for duration, seconds in (
            (stats.success, self.seconds),
            (stats.queue, max((timing.queue for timing in timings), default=0.0)),
            (stats.compute_input, self._read - self._begun),
            (stats.compute_infer, max((timing.decode for timing in timings), default=0.0)),
            (stats.compute_output, time.monotonic() - self._decoded),
        ):
            _add(duration, seconds)
        counted.inference_count += len(timings)
        counted.execution_count += 1
        counted.last_inference = time.time_ns() // 1_000_000


class Statistics:
    """What every version has answered since it was loaded."""

    def __init__(self) -> None:
        self._counted: WeakKeyDictionary[Serving, pb.ModelStatistics] = WeakKeyDictionary()

    def of(self, serving: Serving) -> pb.ModelStatistics:
        """The counts of a version."""
        return self._counted.setdefault(serving, pb.ModelStatistics(name=serving.name, version=serving.version))

    @contextmanager
    def request(self, serving: Serving) -> Iterator[Request]:
        """A request of a version: counted when it ends, unless nobody waits for it any more."""
        request, counted = Request(), self.of(serving)
        try:
            yield request
        except Exception:
            _add(counted.inference_stats.fail, request.seconds)
            raise
        request.add_to(counted)


def _add(duration: pb.StatisticDuration, seconds: float) -> None:
    duration.count += 1
    duration.ns += round(1e9 * seconds)
