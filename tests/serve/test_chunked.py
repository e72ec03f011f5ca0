"""Attention of any size: the answer that Generate gives, bit for bit, in chunks that wait for their reader."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import serve.chunked
import serve.convert
from export.manifest import FamilyShape
from model.steps import Array, Memory, Question, Step
from serve.bundle import ServedModel
from serve.client import Client, ServerError
from serve.from_proto import read_chunked
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.wanted import Wanted
from tests.serve.answers import assert_same
from tests.serve.attention import CROSS, DECODER, ENCODER
from tests.serve.faults import assert_idle
from tests.serve.running import PATIENCE, Running, serving
from tests.serve.steps import Echo, Gated

SMALL = 100
"""Bytes of a chunk here, so that there are many."""

HEADS = np.random.default_rng(0).random((2, 3), np.float32)
"""[layer, head]: what tells them apart."""


class Headed(Echo):
    """With layers and heads that differ; otherwise the same in every batch."""

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:
        memory = super().encode(source_ids, source_mask, attention)
        if memory.encoder_attention is None:
            return memory
        return Memory(memory.tensors, memory.source_mask, headed(memory.encoder_attention))

    def step(self, question: Question) -> Step:
        step = super().step(question)
        cross, own = step.cross_attention, step.decoder_attention
        return dataclasses.replace(
            step,
            cross_attention=None if cross is None else headed(cross),
            decoder_attention=None if own is None else headed(own),
        )


def headed(weights: Array) -> Array:
    """[batch, 1, 1, row, column], for every layer and head."""
    every: Array = weights * HEADS[None, :, :, None, None]
    return every


@pytest.fixture(scope="module")
def model(served: ServedModel) -> ServedModel:
    shape = FamilyShape(layers=2, heads=3)
    manifest = served.manifest.model_copy(update={"attention": {"encoder": shape, "decoder": shape, "cross": shape}})
    return dataclasses.replace(served, manifest=manifest, steps=Headed())


@pytest.fixture(scope="module")
def running(model: ServedModel) -> Iterator[Running]:
    with serving(model) as server:
        yield server


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.address, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.chunked, "CHUNK", SMALL)


WANTED: dict[str, Wanted] = {
    "none": {},
    "all": {"families": ["encoder", "decoder", "cross"]},
    "another order": {"families": ["cross", "encoder"]},
    "half precision": {"families": ["cross", "decoder", "encoder"], "float_type": "float16"},
    "chosen": {"families": ["encoder", "cross"], "layers": [1], "heads": [2, 0]},
    "chosen, half precision": {"families": ["decoder"], "layers": [1, 0], "heads": [1], "float_type": "float16"},
    "mean": {"families": ["encoder", "decoder"], "reduction": "mean"},
    "maximum of some": {"families": ["cross"], "reduction": "max", "heads": [2, 1], "float_type": "float16"},
    "several hypotheses": {"families": ["encoder", "decoder", "cross"], "beam_size": 4, "hypotheses": 3},
    "the limit": {"families": ["cross", "decoder"], "longest": 3, "beam_size": 2, "hypotheses": 2},
}


@pytest.mark.parametrize("what", WANTED)
@pytest.mark.usefixtures("small")
def test_it_is_the_answer_of_generate_bit_for_bit(client: Client, what: str) -> None:
    wanted = WANTED[what]
    for source in ("a", "abcdefgh"):
        whole, chunked = client.generate(source, **wanted), client.generate_chunked(source, **wanted)
        assert_same(chunked, whole)
        for held in (chunked.attention, *(one.attention for one in chunked.hypotheses)):
            assert not any(array.weights.flags.writeable for array in held.values())


def chunked_request(source: str = "abcdefgh", **search: Any) -> pb.GenerateChunkedRequest:
    wanted = pb.AttentionOptions(families=[CROSS, ENCODER, DECODER])
    return pb.GenerateChunkedRequest(source=source, search=pb.SearchOptions(**search), attention=wanted)


@pytest.mark.usefixtures("small")
def test_values_come_in_order_and_without_a_gap(running: Running) -> None:
    answer, *chunks, end = running.stub.GenerateChunked(chunked_request(beam_size=2, hypotheses=2), timeout=PATIENCE)
    families: list[tuple[int | None, int]] = [(None, one.family) for one in answer.answer.attention]
    for index, hypothesis in enumerate(answer.answer.hypotheses):
        families += [(index, one.family) for one in hypothesis.attention]
        assert not any(one.values for one in hypothesis.attention)
    assert families == [(None, ENCODER), (0, CROSS), (0, DECODER), (1, CROSS), (1, DECODER)]
    sent: dict[tuple[int | None, int], int] = dict.fromkeys(families, 0)
    for one in (event.chunk for event in chunks):
        key = (one.hypothesis if one.HasField("hypothesis") else None, one.family)
        assert one.offset == sent[key]
        assert 0 < len(one.values) <= SMALL
        sent[key] += len(one.values)
    assert list(sent) == [key for key, size in sent.items() if size]
    assert sent[None, ENCODER] == 4 * HEADS.size * 9 * 9
    assert (end.end.chunks, end.end.size) == (len(chunks), sum(sent.values()))


def test_without_attention_there_is_nothing_between(running: Running) -> None:
    events = list(running.stub.GenerateChunked(pb.GenerateChunkedRequest(source="abcd"), timeout=PATIENCE))
    assert [event.WhichOneof("event") for event in events] == ["answer", "end"]
    assert events[0].answer.hypotheses[0].text == "abcd"
    assert events[1].end == pb.ChunkedEnd()


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> int:
    """So few bytes fit a message: encoder attention of four tokens, but not of five."""
    monkeypatch.setattr(serve.convert, "LARGEST_ANSWER", 4 * HEADS.size * 5 * 5 - 1)
    return serve.convert.LARGEST_ANSWER


def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call())
    error: Any = caught.value
    return error.code(), error.details()


@pytest.mark.parametrize("kind", ["Generate", "GenerateStream", "Score"])
def test_fault_17_attention_over_a_message_is_refused_before_anything_is_computed(
    model: ServedModel, little: int, kind: str
) -> None:
    steps = Gated(model.steps)
    steps.open()
    family = CROSS if kind == "Score" else ENCODER
    options = pb.AttentionOptions(families=[family])
    requests: dict[str, Any] = {
        "Generate": pb.GenerateRequest(source="abcd", attention=options),
        "GenerateStream": pb.GenerateStreamRequest(source="abcd", attention=options),
        "Score": pb.ScoreRequest(source="abcd", target="dcba", attention=options),
    }
    with serving(dataclasses.replace(model, steps=steps)) as running:
        code, text = refused(lambda: getattr(running.stub, kind)(requests[kind], timeout=PATIENCE))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert text == (
            f"attention: {little + 1} bytes are over the limit of {little} for one message; choose fewer families, "
            "layers or heads, reduce them, ask for float16, or use GenerateChunked, which sends attention of any size"
        )
        assert steps.passes == []
        with Client(running.address, timeout=PATIENCE) as client:
            weights = client.generate_chunked("abcd", families=["encoder"]).attention["encoder"].weights
        expected = headed(np.full((1, 1, 1, 5, 5), np.float32(1 / 5)))[0]
        np.testing.assert_array_equal(weights, expected)
        assert_idle(running)


def test_fault_17_an_answer_that_has_grown_over_a_message_is_told_the_way_out(
    client: Client, running: Running, little: int
) -> None:
    with pytest.raises(ServerError, match=rf"{3 * (little + 1)} bytes are .* use GenerateChunked, which") as caught:
        client.generate("abcd", families=["cross"], beam_size=3, hypotheses=3)
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "attention")
    answer = client.generate_chunked("abcd", families=["cross"], beam_size=3, hypotheses=3)
    assert sum(one.attention["cross"].weights.nbytes for one in answer.hypotheses) > little
    assert_idle(running)


def test_a_caller_who_goes_leaves_nothing_behind(running: Running, small: None) -> None:  # noqa: ARG001
    events = running.stub.GenerateChunked(chunked_request(), timeout=PATIENCE)
    assert next(events).WhichOneof("event") == "answer"
    events.cancel()
    assert_idle(running)


@pytest.mark.usefixtures("small")
def test_chunks_that_contradict_themselves_are_refused(running: Running) -> None:
    events = list(running.stub.GenerateChunked(chunked_request(), timeout=PATIENCE))
    encoder = events[1:4]
    other, short = pb.GenerateChunkedResponse(), pb.GenerateChunkedResponse()
    other.CopyFrom(encoder[0])
    other.chunk.hypothesis = 1
    short.CopyFrom(events[-1])
    short.end.size -= SMALL
    wrong = {
        "an answer in chunks without its end": events[:-1],
        "a chunk of attention that the answer does not name": encoder,
        "attention that the answer does not name": [events[0], other],
        "the event answer where it does not belong": [events[0], *events],
        "the event None": [pb.GenerateChunkedResponse()],
        "the event end after the end": [*events, events[-1]],
        "the event end where it does not belong": events[-1:],
        "a chunk at 100 where 0 bytes had come": [events[0], *events[2:]],
        "a chunk at 200 where 100 bytes had come": [*events[:2], *events[3:]],
        "and says that it sent": [*events[:-1], short],
        "attention of shape": [*events[:2], pb.GenerateChunkedResponse(end=pb.ChunkedEnd(size=SMALL))],
    }
    for message, said in wrong.items():
        with pytest.raises(ServerError, match=message):
            read_chunked(said)
    assert read_chunked(events).best.text == "abcdefgh"
