"""The load generator against a server that does what the test says."""

from __future__ import annotations  # grpc's classes are generic to mypy alone

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from bench.load.arrivals import poisson
from bench.load.generator import Generator, Load
from bench.load.wires import Wire
from tests.serve.running import PATIENCE, begin

WIRE = Wire("/test.Echo/Ask", str.encode, bytes.decode)
SOURCES = ["a", "b", "c"]


class Echo:
    """Answers with the request, once so many requests are there; refuses "c" if asked to."""

    def __init__(self, together: int = 1, *, refuses: bool = False) -> None:
        self._together, self._refuses = together, refuses
        self.asked: list[bytes] = []
        self._there = asyncio.Event()

    async def ask(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self.asked.append(request)
        if len(self.asked) >= self._together:
            self._there.set()
        await self._there.wait()
        if self._refuses and request == b"c":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no")
        return request


@contextmanager
def asking(echo: Echo) -> Iterator[Generator]:
    server, generator = begin(_start(echo)).result(PATIENCE)
    try:
        yield generator
    finally:
        begin(generator.close()).result(PATIENCE)
        begin(server.stop(0)).result(PATIENCE)


async def _start(echo: Echo) -> tuple[grpc.aio.Server, Generator]:
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Ask": grpc.unary_unary_rpc_method_handler(echo.ask)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, Generator(WIRE, f"127.0.0.1:{port}", SOURCES)


def run_open(generator: Generator, keep: int = 0) -> Load:
    return begin(generator.open(rate=100, seconds=0.2, seed=1, deadline=PATIENCE, keep=keep)).result(PATIENCE)


def test_latency_counts_from_when_a_request_was_due() -> None:
    arrivals = poisson(100, 0.2, SOURCES, seed=1)
    with asking(Echo(together=len(arrivals))) as generator:  # nobody is answered before the last has come
        load = run_open(generator)
    assert len(load.latencies) == len(arrivals)
    assert max(load.latencies) >= arrivals[-1].due - arrivals[0].due
    assert load.seconds == 0.2


def test_what_was_drawn_is_asked() -> None:
    echo = Echo()
    with asking(echo) as generator:
        run_open(generator)
    assert sorted(echo.asked) == sorted(arrival.source.encode() for arrival in poisson(100, 0.2, SOURCES, seed=1))


def test_refusals_are_counted_by_their_status() -> None:
    echo = Echo(refuses=True)
    with asking(echo) as generator:
        load = run_open(generator, keep=50)
    assert load.errors == {"RESOURCE_EXHAUSTED": echo.asked.count(b"c")}
    assert load.answers == {"a": "a", "b": "b"}


def test_the_generator_watches_itself() -> None:
    with asking(Echo()) as generator:
        load = run_open(generator)
    assert load.busy > 0
    assert len(load.lateness) > len(load.latencies)  # the loop's own clock besides


def test_callers_of_a_closed_loop_wait_for_each_other() -> None:
    echo = Echo(together=3)
    with asking(echo) as generator:
        load = begin(generator.closed(callers=3, seconds=0.1, seed=0, deadline=PATIENCE, keep=3)).result(PATIENCE)
    assert len(load.latencies) == len(echo.asked) >= 3
    assert load.answers == {"a": "a", "b": "b", "c": "c"}
    assert load.seconds >= 0.1


def test_a_server_is_waited_for() -> None:
    with asking(Echo()) as generator:
        begin(generator.until_ready()).result(PATIENCE)


def test_a_request_is_given_up_after_its_deadline() -> None:
    with asking(Echo(together=1000)) as generator:
        load = begin(generator.open(rate=100, seconds=0.1, seed=1, deadline=0.05, keep=0)).result(PATIENCE)
    assert not load.latencies
    assert sum(load.errors.values()) == len(poisson(100, 0.1, SOURCES, seed=1))
