"""Real servers for the tests: all on one event loop in a thread of its own, each on a port that the system chooses."""

import asyncio
import functools
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import numpy as np

from serve.bundle import ServedModel
from serve.engine import Engine
from serve.jobs import EngineLimits
from serve.models import Models
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from serve.server import Server, ServerOptions, create_server

Result = TypeVar("Result")

PATIENCE = 60.0
"""Seconds after which a test that waits for an event gives up: only a fault takes so long."""


@dataclass(frozen=True)
class Running:
    """A server, and a channel to it.

    Attributes:
        server: the running server.
        channel: to it.
        stub: its service, on the channel.
    """

    server: Server
    channel: grpc.Channel
    stub: LimelightServiceStub

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def engine(self) -> Engine:
        """Of the only model."""
        return self.server.models.find("").engine

    def stop(self, grace: float = PATIENCE) -> "Future[bool]":
        """Begin to stop; the result is whether all calls finished."""
        return begin(self.server.stop(grace))

    def until_idle(self) -> None:
        """Until the server has noticed that every caller is answered or gone."""
        assert begin(self.server._calls.wait_until_idle(PATIENCE)).result(PATIENCE)


def models_of(model: ServedModel, limits: EngineLimits | None = None) -> Models:
    """One model, with its engine."""
    models = Models(limits or EngineLimits())
    models.add(model)
    return models


@contextmanager
def serving(model: ServedModel, limits: EngineLimits | None = None, **options: Any) -> Iterator[Running]:
    """A server on a free port, stopped at the end whatever is left of it."""
    chosen = ServerOptions(port=0, limits=limits or EngineLimits(), **options)
    server = begin(create_server(models_of(model, limits), chosen)).result(PATIENCE)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Running(server, channel, LimelightServiceStub(channel))
    finally:
        begin(server.stop(0)).result(PATIENCE)


def generate(stub: LimelightServiceStub, source: str = "abcdefgh", timeout: float | None = PATIENCE) -> Any:
    """A call that is under way."""
    return stub.Generate.future(pb.GenerateRequest(source=source), timeout=timeout)


def stream(stub: LimelightServiceStub, source: str = "abcdefgh", timeout: float | None = PATIENCE) -> Any:
    """A stream that is under way."""
    return stub.GenerateStream(pb.GenerateStreamRequest(source=source), timeout=timeout)


def score(stub: LimelightServiceStub, source: str = "abcdefgh", timeout: float | None = PATIENCE) -> Any:
    """A text is being scored against its reverse."""
    return stub.Score.future(pb.ScoreRequest(source=source, target=source[::-1]), timeout=timeout)


def begin(coroutine: Coroutine[Any, Any, Result]) -> "Future[Result]":
    """Run a coroutine on the loop: one for the whole process, as grpc wants it."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop())


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="servers-of-the-tests", daemon=True).start()
    return loop


def array(attention: pb.Attention) -> np.ndarray[Any, Any]:
    """The values of a family, as the message says they are laid out."""
    dtype = "<f2" if attention.float_type == pb.FLOAT_TYPE_FLOAT16 else "<f4"
    return np.frombuffer(attention.values, dtype).reshape(attention.shape)
