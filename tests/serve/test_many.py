"""Many texts over one stream: each has its own answer or error, and nothing of one reaches another."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from serve.bundle import ServedModel
from serve.client import Answer, Client, ServerError
from serve.errors import EngineError
from serve.many import LONGEST_ID, TOGETHER, answer_many
from serve.pb.limelight.v1 import limelight_pb2 as pb
from tests.serve.attention import CROSS
from tests.serve.running import PATIENCE, Running, serving
from tests.serve.steps import Echo, Gated

WORDS = ["abcd", "", "hgfe", "a" * 24, "bdac", "efgabc"]


def item(number: int, source: str, **options: Any) -> pb.GenerateManyRequest:
    return pb.GenerateManyRequest(id=str(number), request=pb.GenerateRequest(source=source, **options))


def many(running: Running, items: Iterator[pb.GenerateManyRequest]) -> dict[str, pb.GenerateManyResponse]:
    """Answers by their ids."""
    answers = list(running.stub.GenerateMany(items, timeout=PATIENCE))
    found = {answer.id: answer for answer in answers}
    assert len(found) == len(answers)
    return found


def test_each_has_the_answer_that_it_has_alone(running: Running) -> None:
    attention = pb.AttentionOptions(families=[CROSS])
    sources = [word for word in WORDS if 0 < len(word) < 20] * 60  # more than are answered together
    found = many(running, (item(number, source, attention=attention) for number, source in enumerate(sources)))
    assert set(found) == {str(number) for number in range(len(sources))}
    for source in dict.fromkeys(sources):
        request = pb.GenerateRequest(source=source, attention=attention)
        alone = running.stub.Generate(request, timeout=PATIENCE).hypotheses[0]
        for number, other in enumerate(sources):
            if other == source:
                (hypothesis,) = found[str(number)].answer.hypotheses
                assert hypothesis.text == alone.text == source[::-1]
                assert hypothesis.log_probability == pytest.approx(alone.log_probability, abs=1e-4)
                assert hypothesis.attention[0].shape == alone.attention[0].shape


def test_one_that_is_refused_does_not_end_the_stream(running: Running) -> None:
    wanted = [item(number, source) for number, source in enumerate(WORDS)]
    wanted += [item(6, "ab", search=pb.SearchOptions(beam_size=99)), item(7, "ab", model="another")]
    found = many(running, iter(wanted))
    failed = {id: answer.error for id, answer in found.items() if answer.WhichOneof("result") == "error"}  # noqa: A001
    invalid, missing = grpc.StatusCode.INVALID_ARGUMENT.value[0], grpc.StatusCode.NOT_FOUND.value[0]
    assert {id: (error.code, error.reason, error.field) for id, error in failed.items()} == {  # noqa: A001
        "1": (invalid, "INVALID_FIELD", "source"),
        "3": (invalid, "INVALID_FIELD", "source"),
        "6": (invalid, "INVALID_FIELD", "search.beam_size"),
        "7": (missing, "MODEL_NOT_FOUND", ""),
    }
    assert failed["1"].message == "source: is empty"
    assert [found[id].answer.hypotheses[0].text for id in ("0", "2", "4", "5")] == ["dcba", "efgh", "cadb", "cbagfe"]  # noqa: A001


def test_an_id_that_is_too_long_is_refused_by_itself(running: Running) -> None:
    long = pb.GenerateManyRequest(id="x" * (LONGEST_ID + 1), request=pb.GenerateRequest(source="ab"))
    found = many(running, iter([long, item(1, "ab")]))
    assert found["x" * LONGEST_ID].error.field == "id"
    assert found["1"].answer.hypotheses[0].text == "ba"


def test_nobody_asks(running: Running) -> None:
    assert many(running, iter(())) == {}


def test_answers_come_while_more_is_asked(running: Running) -> None:
    """The second is asked only when the first is answered."""
    answered = threading.Event()

    def ask() -> Iterator[pb.GenerateManyRequest]:
        yield item(0, "ab")
        assert answered.wait(PATIENCE)
        yield item(1, "cd")

    answers = running.stub.GenerateMany(ask(), timeout=PATIENCE)
    assert next(answers).answer.hypotheses[0].text == "ba"
    answered.set()
    assert [answer.id for answer in answers] == ["1"]


def test_a_caller_who_goes_leaves_nothing_behind(served: ServedModel) -> None:
    steps = Gated(Echo())
    with serving(dataclasses.replace(served, steps=steps)) as running:
        answers = running.stub.GenerateMany(iter([item(number, "abcd") for number in range(9)]), timeout=PATIENCE)
        steps.wait()
        answers.cancel()
        steps.open()
        running.until_idle()
        assert running.stub.Generate(pb.GenerateRequest(source="ab"), timeout=PATIENCE).hypotheses
        assert running.engine.waiting == 0


def test_what_was_asked_before_the_server_stops_is_answered_and_the_rest_refused(served: ServedModel) -> None:
    steps, stopping = Gated(Echo()), threading.Event()

    def ask() -> Iterator[pb.GenerateManyRequest]:
        yield item(0, "abcd")
        assert stopping.wait(PATIENCE)
        yield item(1, "ab")

    with serving(dataclasses.replace(served, steps=steps)) as running:
        answers = running.stub.GenerateMany(ask(), timeout=PATIENCE)
        steps.wait()
        stopped = running.stop()
        while not running.server._calls.draining:
            pass
        stopping.set()
        refused = next(answers)
        steps.open()
        answered = next(answers)
        assert list(answers) == []
        assert stopped.result(PATIENCE)
    assert (refused.id, refused.error.code, refused.error.reason) == ("1", 14, "SHUTTING_DOWN")
    assert (answered.id, answered.WhichOneof("result")) == ("0", "answer")


async def asked(count: int, read: list[int]) -> AsyncIterator[pb.GenerateManyRequest]:
    for number in range(count):
        read.append(number)
        yield item(number, "ab")


def test_no_more_is_read_than_is_answered_and_taken() -> None:
    """The answers of a reader who does not read are bounded, and so are the requests behind them."""
    read: list[int] = []

    async def answer(request: pb.GenerateRequest) -> pb.GenerateResponse:  # noqa: ARG001
        return pb.GenerateResponse()

    async def run() -> None:
        answers = answer_many(asked(10 * TOGETHER, read), answer, asyncio.Event())
        await anext(answers)
        for _ in range(50 * TOGETHER):
            await asyncio.sleep(0)
        assert len(read) <= TOGETHER + 2
        assert len([one async for one in answers]) == 10 * TOGETHER - 1

    asyncio.run(run())


def test_a_fault_of_the_server_is_one_items(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(request: pb.GenerateRequest) -> pb.GenerateResponse:  # noqa: ARG001
        raise EngineError("a secret of the server")

    async def run() -> list[pb.GenerateManyResponse]:
        return [one async for one in answer_many(asked(2, []), answer, asyncio.Event())]

    for found in asyncio.run(run()):
        assert (found.error.code, found.error.reason) == (grpc.StatusCode.INTERNAL.value[0], "INTERNAL")
        assert "secret" not in found.error.message
    assert "a secret of the server" in caplog.text


def test_what_fails_while_reading_ends_the_stream() -> None:
    async def broken() -> AsyncIterator[pb.GenerateManyRequest]:
        yield item(0, "ab")
        raise ConnectionError("gone")

    async def answer(request: pb.GenerateRequest) -> pb.GenerateResponse:  # noqa: ARG001
        await asyncio.sleep(PATIENCE)
        return pb.GenerateResponse()

    async def run() -> None:
        with pytest.raises(ConnectionError, match="gone"):
            async for _ in answer_many(broken(), answer, asyncio.Event()):
                pass
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_what_fails_while_reading_is_told_though_an_answer_is_just_being_sent() -> None:
    failing, failed = asyncio.Event(), asyncio.Event()

    async def broken() -> AsyncIterator[pb.GenerateManyRequest]:
        yield item(0, "ab")
        await failing.wait()
        failed.set()
        raise ConnectionError("gone")

    async def answer(request: pb.GenerateRequest) -> pb.GenerateResponse:  # noqa: ARG001
        return pb.GenerateResponse()

    async def run() -> None:
        answers = answer_many(broken(), answer, asyncio.Event())
        assert (await anext(answers)).id == "0"  # which is with whoever sends it; nobody waits for the reader
        failing.set()
        await failed.wait()
        await asyncio.sleep(0)  # the reader's turn to end
        with pytest.raises(ConnectionError, match="gone"):
            await anext(answers)

    asyncio.run(run())


def test_the_client_gives_numbers_answers_and_errors(running: Running) -> None:
    with Client(running.address) as client:
        found = dict(client.generate_many(WORDS, beam_size=2, families=["cross"]))
    assert sorted(found) == list(range(len(WORDS)))
    errors = {number: error for number, error in found.items() if isinstance(error, ServerError)}
    assert {number: (error.code, error.field) for number, error in errors.items()} == dict.fromkeys(
        (1, 3), (grpc.StatusCode.INVALID_ARGUMENT, "source")
    )
    answer = found[0]
    assert isinstance(answer, Answer)
    assert answer.best.text == "dcba"
    assert answer.best.attention["cross"].weights.shape[2:] == (5, 5)


def test_the_clients_own_mistake_is_raised_as_such(running: Running) -> None:
    def sources() -> Iterator[str]:
        yield "ab"
        raise KeyError("where the sources come from")

    with Client(running.address) as client, pytest.raises(KeyError, match="where the sources come from"):
        list(client.generate_many(sources()))


def test_timings_say_where_the_time_went(served: ServedModel) -> None:
    steps = Gated(Echo())
    with serving(dataclasses.replace(served, steps=steps)) as running, Client(running.address) as client:
        pending = running.stub.Generate.future(pb.GenerateRequest(source="ab"), timeout=PATIENCE)
        steps.wait()
        late = running.stub.Generate.future(pb.GenerateRequest(source="ab"), timeout=PATIENCE)
        while not running.engine.waiting:
            pass
        steps.open()
        first, second = (call.result(PATIENCE).timings for call in (pending, late))
        events = list(running.stub.GenerateStream(pb.GenerateStreamRequest(source="ab"), timeout=PATIENCE))
        scored = client.score("ab", "ba").timings
    assert second.queue_seconds > 0.0
    assert min(first.decode_seconds, second.decode_seconds, scored.decode) > 0.0
    assert first.decode_seconds >= second.queue_seconds
    assert events[-1].end.timings.decode_seconds > 0.0


def test_models_are_listed(running: Running, served: ServedModel) -> None:
    with Client(running.address) as client:
        (found,) = client.models()
    assert (found.name, found.version, found.task) == ("reversal", served.manifest.version, "text")
    assert (found.precision, found.provider) == (served.precision, served.provider)


def test_a_stream_with_nothing_under_way_does_not_hold_up_a_stop(served: ServedModel) -> None:
    ended = threading.Event()

    def ask() -> Iterator[pb.GenerateManyRequest]:
        yield item(0, "ab")
        ended.wait(PATIENCE)

    with serving(served) as running:
        answers = running.stub.GenerateMany(ask(), timeout=PATIENCE)
        assert next(answers).id == "0"
        assert running.stop().result(PATIENCE) is True
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        ended.set()
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert error.details() == "the server is shutting down and takes no new requests"


def test_a_field_of_an_item_that_the_server_does_not_know_is_refused(running: Running) -> None:
    unknown = item(0, "ab")
    unknown.MergeFromString(b"\xf8\x3f\x01")
    assert many(running, iter([unknown]))["0"].error.message == "request: field number 1023 is not known to this server"
