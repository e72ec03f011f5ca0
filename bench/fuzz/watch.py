"""Looks at the server all the while: its health, an untouched caller's answers, its log, its gauges, its memory."""

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from bench.fuzz.answers import OWN
from bench.fuzz.asking import OPTIONS
from bench.fuzz.subject import INFERENCE, OURS, VERSIONS, Subject
from bench.load.accounts import memory
from bench.load.servers import Running
from serve.pb.inference import grpc_service_pb2 as open_pb
from serve.pb.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from serve.tensors import pack_bytes

GAUGES = ("rows", "queue_length", "queue_tokens", "queue_bytes", "calls_in_flight", "engine_silent_seconds")
"""What must be 0 when nobody asks."""

EVERY = 0.1
"""Seconds between two looks at health, and between two calls of the untouched caller."""

DYING = 0.3
"""Seconds that a process has to end after its last word."""

TOLERANCE = 1e-4
"""Of what batch mates may change in an answer's numbers."""

Found = Callable[..., None]
"""Told of what is wrong: kind, text, and the cases that it was found with."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a server may take."""

    seconds: float = 30.0
    """For a look at its health, or an answer to the untouched caller: it may run at low priority on a busy machine."""
    megabytes: float = 400.0
    """Of memory, more than at the beginning."""
    lines: float = 2.0
    """Of the log, for each call and connection."""
    rest: float = 20.0
    """Seconds until nothing is left, when nobody asks."""
    patience: float = 60.0
    """Seconds for any call."""


@dataclass
class Looks:
    """What was seen.

    Attributes:
        health: looks at it.
        slowest_health: seconds.
        canary: answers to the untouched caller.
        slowest_canary: seconds.
        lines: of the log.
        memory: megabytes, whenever nobody asked.
        peak: the most megabytes there were.
    """

    health: int = 0
    slowest_health: float = 0.0
    canary: int = 0
    slowest_canary: float = 0.0
    lines: int = 0
    memory: list[float] = field(default_factory=list)
    peak: float = 0.0


class Watch:
    """Looks at one server.

    Args:
        running: it.
        metrics_port: where it is scraped.
        subject: what it serves.
        bounds: what it may take.
        found: told of what is wrong.
    """

    def __init__(self, running: Running, metrics_port: int, subject: Subject, bounds: Bounds, found: Found) -> None:
        self._running, self._metrics_port, self._bounds, self._found = running, metrics_port, bounds, found
        self._asking = asyncio.Lock()
        self._log, self._left = running.log.open("rb"), b""
        text = subject.letters[:6]
        self._ours = pb.GenerateRequest(
            model=subject.name,
            version=VERSIONS[0],
            source=text,
            search=pb.SearchOptions(beam_size=3, hypotheses=2),
            attention=pb.AttentionOptions(families=[1, 2, 3]),  # type: ignore[list-item]
        )
        self._open = open_pb.ModelInferRequest(
            model_name=subject.name,
            model_version=VERSIONS[0],
            inputs=[open_pb.ModelInferRequest.InferInputTensor(name="SOURCE", datatype="BYTES", shape=[1])],
            raw_input_contents=[pack_bytes([text.encode()])],
        )
        self.looks = Looks()

    @property
    def alive(self) -> bool:
        """The server's process is there."""
        return self._running.process.poll() is None

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Look all the while."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._running.port}", options=OPTIONS) as channel:
            self._stub, self._open_stub = LimelightServiceStub(channel), GRPCInferenceServiceStub(channel)
            self._health = health_pb2_grpc.HealthStub(channel)
            self._answers = [one async for one in self._ask()]
            tasks = [asyncio.create_task(self._again(one)) for one in (self._look_at_health, self._look_at_canary)]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._log.close()

    async def _again(self, look: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await look()
            except grpc.aio.AioRpcError as error:
                await self.tell_if_alive(look.__name__.rpartition("_")[2], f"{error.code().name}: {error.details()}")
            await asyncio.sleep(EVERY)

    async def tell_if_alive(self, kind: str, what: str, *cases: Any) -> None:
        """Tell of something, unless it is only that the server's process has ended."""
        with suppress(subprocess.TimeoutExpired):  # what it ends with comes a moment after its last word
            await asyncio.to_thread(self._running.process.wait, DYING)
        if self.alive:
            self._found(kind, what, *cases)

    async def _look_at_health(self) -> None:
        begun = time.monotonic()
        for service in ("", OURS, INFERENCE):
            request = health_pb2.HealthCheckRequest(service=service)
            found = await self._health.Check(request, timeout=4 * self._bounds.seconds)
            if found.status != health_pb2.HealthCheckResponse.SERVING:
                self._found("health", f"{service or 'the server'} has the status {found.status}")
        seconds = time.monotonic() - begun
        self.looks.health += 1
        self.looks.slowest_health = max(self.looks.slowest_health, seconds)
        if seconds > self._bounds.seconds:
            self._found("health", f"took {seconds:.1f} s to tell")

    async def _look_at_canary(self) -> None:
        async with self._asking:
            begun = time.monotonic()
            answers = [one async for one in self._ask()]
        seconds = time.monotonic() - begun
        self.looks.canary += 1
        self.looks.slowest_canary = max(self.looks.slowest_canary, seconds)
        if seconds > self._bounds.seconds:
            self._found("canary", f"was answered after {seconds:.1f} s")
        for before, now in zip(self._answers, answers, strict=True):
            if not _same(before, now):
                self._found("canary", f"is answered otherwise than before: {str(now)[:200]}")

    async def _ask(self) -> AsyncIterator[Any]:
        patience = 4 * self._bounds.seconds
        yield await self._stub.Generate(self._ours, timeout=patience)
        yield await self._open_stub.ModelInfer(self._open, timeout=patience)

    async def rest(self) -> None:
        """Let the untouched caller wait, too, until nothing is left; then look at the memory."""
        async with self._asking:
            end = time.monotonic() + self._bounds.rest
            while left := await self._gauges():
                if time.monotonic() > end:
                    await self.tell_if_alive("gauges", f"{', '.join(left)} not 0 although nobody asks")
                    break
                await asyncio.sleep(EVERY)
        found = memory(self._running.process.pid)
        self.looks.memory.append(found.resident)
        self.looks.peak = max(self.looks.peak, found.peak)
        if self.looks.memory[-1] > self.looks.memory[0] + self._bounds.megabytes:
            self._found("memory", f"{found.resident:.0f} MB, {self.looks.memory[0]:.0f} at the beginning")

    async def _gauges(self) -> list[str]:
        """Names of those that are not 0."""
        address = f"http://127.0.0.1:{self._metrics_port}/metrics"
        try:
            text = await asyncio.to_thread(lambda: urlopen(address, timeout=self._bounds.rest).read().decode())
        except OSError as error:
            return [f"metrics that cannot be read ({type(error).__name__}) are"]
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        values = {one.name.removeprefix("limelight_"): one.value for one in samples if not one.labels}
        return [name for name in GAUGES if values.get(name) != 0.0]

    def read_log(self, calls: int) -> None:
        """Judge what the log has got since the last time.

        Args:
            calls: and connections, that there were meanwhile.
        """
        *lines, self._left = (self._left + self._log.read()).split(b"\n")
        self.looks.lines += len(lines)
        if len(lines) > self._bounds.lines * calls + 100:
            self._found("log", f"{len(lines)} lines for {calls} calls and connections")
        for line in lines:
            try:
                read = json.loads(line)
            except ValueError:
                self._found("log", f"a line that is not the server's: {line[:200].decode('utf-8', 'replace')}")
                continue
            if "exception" in read or OWN.search(read["message"]):
                self._found("log", f"{read['level']} {read['message'][:200]} {read.get('exception', '')[-200:]}")


def _same(before: Any, now: Any) -> bool:
    """Two answers say the same, as far as answers can."""
    if isinstance(before, open_pb.ModelInferResponse):
        texts = [one.raw_output_contents[0] for one in (before, now)]
        scores = [np.frombuffer(one.raw_output_contents[1], "<f4") for one in (before, now)]
        return texts[0] == texts[1] and _close(*scores)
    pairs = list(zip(before.hypotheses, now.hypotheses, strict=False))
    return len(before.hypotheses) == len(now.hypotheses) and all(
        [token.text for token in one.tokens] == [token.text for token in other.tokens]
        and _close(one.score, other.score)
        and all(map(_same_attention, one.attention, other.attention))
        for one, other in pairs
    )


def _same_attention(one: pb.Attention, other: pb.Attention) -> bool:
    return list(one.shape) == list(other.shape) and _close(*(np.frombuffer(it.values, "<f4") for it in (one, other)))


def _close(one: Any, other: Any) -> bool:
    return bool(np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=0.0, atol=TOLERANCE))
