"""Newcomers: clients that come all the time, each with a connection of its own for one question."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub

BETWEEN = 0.1
"""Seconds between two newcomers."""

PATIENCE = 30.0
"""Seconds that an answer may take."""


@dataclass
class Newcomers:
    """Clients that come all the time, each for one answer.

    Attributes:
        latencies: seconds from the connecting to the answer.
        errors: of those that got none, by status.
    """

    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def coming(self, port: int, source: str) -> Iterator[None]:
        """They come meanwhile."""
        over = threading.Event()

        def come() -> None:
            while not over.wait(BETWEEN):
                self._one(port, source)

        thread = threading.Thread(target=come, name="newcomers")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _one(self, port: int, source: str) -> None:
        begun = time.perf_counter()
        with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                LimelightServiceStub(channel).Generate(pb.GenerateRequest(source=source), timeout=PATIENCE)
            except grpc.RpcError as error:
                self.errors[error.code().name] += 1
            else:
                self.latencies.append(time.perf_counter() - begun)
