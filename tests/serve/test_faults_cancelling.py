"""Faults of callers who are gone or late: their rows leave at the next step, and nobody else notices."""

import asyncio
import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
import pytest

from export.manifest import FamilyShape
from model.options import SearchOptions
from model.steps import Array, Memory
from serve.bundle import ServedModel
from serve.errors import ExpiredError
from serve.jobs import Job, Ticket
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceStub
from serve.stream import TokenStream
from tests.serve.attention import CROSS, DECODER, ENCODER
from tests.serve.faults import assert_idle, ended, until
from tests.serve.running import PATIENCE, Running, generate, serving, stream
from tests.serve.steps import Echo, Gated

BEGIN: dict[str, Callable[..., Any]] = {"unary": generate, "stream": stream}


@pytest.mark.parametrize("kind", BEGIN)
def test_fault_26_a_cancelled_call_gives_its_row_back(gated: Running, gate: Gated, kind: str) -> None:
    call = BEGIN[kind](gated.stub)
    gate.wait()
    call.cancel()
    gated.until_idle()
    after = generate(gated.stub, "abcd")
    gate.open()
    assert after.result().hypotheses[0].text == "dcba"
    assert gate.rows == [1] * 6  # one step of the cancelled call, five of the next
    assert_idle(gated)


@pytest.mark.parametrize("kind", BEGIN)
def test_fault_26_a_deadline_gives_its_row_back(gated: Running, gate: Gated, kind: str) -> None:
    call = BEGIN[kind](gated.stub, timeout=0.5)
    gate.wait()
    with pytest.raises(grpc.RpcError):
        call.result() if kind == "unary" else next(call)
    assert (call.code(), call.details()) == (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    gated.until_idle()
    after = generate(gated.stub, "abcd")
    gate.open()
    assert after.result().hypotheses[0].text == "dcba"
    assert gate.rows == [1] * 6
    assert_idle(gated)


def test_what_comes_too_late_for_a_stream_is_nothing_to_complain_of(served: ServedModel) -> None:
    """The engine fails a job in the moment in which its stream is given up."""
    complaints: list[Any] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        asked: Any = None
        ticket = Ticket(Job(source=[4, 3], options=SearchOptions(longest=2)))
        events: Any = TokenStream(served, asked, pb.ModelVersion(), asked).events(ticket)
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        ticket.fail(ExpiredError("the deadline passed"))
        waiting.cancel()
        await asyncio.wait((waiting,))
        await events.aclose()
        await asyncio.sleep(0)

    asyncio.run(run())
    gc.collect()
    assert complaints == []


SOURCES = ["abcd", "efghabcd", "hg", "abcdefgh"]
"""Of calls that share a batch; the second is given up."""


class Slow(Gated):
    """Reads more than one source only when it is told to."""

    def __init__(self) -> None:
        super().__init__(Echo())
        self.reading, self.read = threading.Event(), threading.Event()

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:
        if len(source_ids) > 1:
            self.reading.set()
            assert self.read.wait(PATIENCE)
        return super().encode(source_ids, source_mask, attention)


class Phase(NamedTuple):
    """When a call is given up."""

    let: int
    """Steps that are taken before."""
    reading: bool = False
    """While its source, and those of others, are being read."""


PHASES = {
    "queued": Phase(0),
    "being read": Phase(1, reading=True),
    "at its first step": Phase(2),
    "in the middle": Phase(5),
    "at its last step": Phase(9),
}


def unary(stub: LimelightServiceStub, source: str, beam_size: int) -> Any:
    return stub.Generate.future(pb.GenerateRequest(source=source, **wanted(beam_size)), timeout=PATIENCE)


def streamed(stub: LimelightServiceStub, source: str, beam_size: int) -> Any:
    return stub.GenerateStream(pb.GenerateStreamRequest(source=source, **wanted(beam_size)), timeout=PATIENCE)


def wanted(beam_size: int) -> dict[str, Any]:
    return {
        "search": pb.SearchOptions(beam_size=beam_size, hypotheses=beam_size),
        "attention": pb.AttentionOptions(families=[ENCODER, DECODER, CROSS]),
    }


KINDS: dict[str, Callable[..., Any]] = {"unary": unary, "stream": streamed}


def answered(call: Any, kind: str) -> list[Any]:
    """All that a call gives, but for how long it took."""
    answers = [call.result(PATIENCE)] if kind == "unary" else list(call)
    (answers[-1] if kind == "unary" else answers[-1].end).ClearField("timings")
    return answers


@pytest.fixture
def slow() -> Iterator[Slow]:
    steps = Slow()
    yield steps
    steps.read.set()
    steps.open()


@pytest.fixture(scope="module")
def one_headed(served: ServedModel) -> ServedModel:
    """Says of its attention what is true of `Echo`."""
    shape = FamilyShape(layers=1, heads=1)
    manifest = served.manifest.model_copy(update={"attention": {"encoder": shape, "decoder": shape, "cross": shape}})
    return dataclasses.replace(served, manifest=manifest, steps=Echo())


@pytest.fixture(scope="module")
def quiet(one_headed: ServedModel) -> Iterator[Running]:
    """A server where nobody gives up."""
    with serving(one_headed) as running:
        yield running


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", PHASES)
def test_fault_27_of_a_batch_one_is_given_up_and_the_others_are_as_they_were(
    one_headed: ServedModel, quiet: Running, slow: Slow, phase: str, kind: str, beam_size: int
) -> None:
    expected = [answered(KINDS[kind](quiet.stub, source, beam_size), kind) for source in SOURCES]
    let, reading = PHASES[phase]
    with serving(dataclasses.replace(one_headed, steps=slow)) as running:
        first = KINDS[kind](running.stub, "a", 1)
        slow.wait()
        calls = [KINDS[kind](running.stub, source, beam_size) for source in SOURCES]
        until(lambda: running.engine.waiting == len(SOURCES))
        if not reading:
            slow.read.set()
        if let:
            slow.let(let)
        if reading:
            assert slow.reading.wait(PATIENCE)
        else:
            slow.wait(let)
        calls[1].cancel()
        until(lambda: ended(running, "CANCELLED", "CANCELLED") == 1)
        arrived = len(slow.rows)
        slow.read.set()
        slow.open()
        given_up = calls.pop(1)
        del expected[1]
        assert [answered(call, kind) for call in calls] == expected
        assert answered(first, kind)
        assert max([0, *slow.rows[arrived:]]) <= beam_size * (len(SOURCES) - 1) + 1
        assert given_up.code() == grpc.StatusCode.CANCELLED
        assert_idle(running)
