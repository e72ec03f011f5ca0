"""Faults of requests: what can never be answered is refused before anything is computed, and leaves nothing behind."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from model.steps import Array, Question
from model.vocabulary import END
from serve.bundle import ServedModel
from serve.pb.limelight.v1 import limelight_pb2 as pb
from tests.serve.faults import OURS, assert_idle, status
from tests.serve.running import PATIENCE, Running, serving
from tests.serve.steps import Echo, Gated

OK, INVALID = (grpc.StatusCode.OK, ""), (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")

REQUESTS: dict[str, Any] = {
    "Generate": pb.GenerateRequest,
    "GenerateStream": pb.GenerateStreamRequest,
    "GenerateChunked": pb.GenerateChunkedRequest,
    "GenerateMany": pb.GenerateRequest,
    "Score": pb.ScoreRequest,
}
"""The calls that take a text, and their requests (of `GenerateMany`, of one item)."""

SEARCHES = [call for call in REQUESTS if call != "Score"]


def ask(running: Running, call: str, **asked: Any) -> list[Any]:
    """All that a call gives."""
    if call == "Score":
        asked = {"target": "ba"} | asked
    request = REQUESTS[call](**{"source": "ab"} | asked)
    if call == "GenerateMany":
        return list(running.stub.GenerateMany(iter([pb.GenerateManyRequest(request=request)]), timeout=PATIENCE))
    answer: Any = getattr(running.stub, call)(request, timeout=PATIENCE)
    return [answer] if call in ("Generate", "Score") else list(answer)


def ended(running: Running, call: str, **asked: Any) -> tuple[tuple[grpc.StatusCode, str], str]:
    """Status and text of a call, or of the only one of many."""
    try:
        answers = ask(running, call, **asked)
    except grpc.RpcError as error:
        failed: Any = error
        return status(failed), failed.details()
    if call == "GenerateMany" and answers[0].HasField("error"):
        item = answers[0].error
        assert not OURS.search(item.message)
        return (next(code for code in grpc.StatusCode if code.value[0] == item.code), item.reason), item.message
    return OK, ""


@pytest.fixture
def untouched(gated: Running, gate: Gated) -> Iterator[Running]:
    """A server that computes nothing, and must be none the worse for it."""
    yield gated
    assert gate.passes == []
    assert_idle(gated)
    gate.open()
    assert ask(gated, "Generate", source="abcd")[0].hypotheses[0].text == "dcba"


@pytest.mark.parametrize("call", REQUESTS)
@pytest.mark.parametrize("source", ["", " ", "\n\t \u3000"])
def test_fault_01_an_empty_text(untouched: Running, call: str, source: str) -> None:
    assert ended(untouched, call, source=source) == (INVALID, "source: is empty")


@pytest.mark.parametrize("call", REQUESTS)
def test_fault_02_a_text_of_too_many_tokens(untouched: Running, call: str) -> None:
    text = "source: 25 tokens, the end token among them, are over the limit of 24; split the text"
    assert ended(untouched, call, source="a" * 24) == (INVALID, text)


def test_fault_02_a_target_of_too_many_tokens(untouched: Running) -> None:
    text = "target: 21 tokens, the end token among them, are over the limit of 20; split the text"
    assert ended(untouched, "Score", target="a" * 20) == (INVALID, text)


class Counting:
    """A tokenizer that tells how many characters it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.characters = tokenizer, 0

    def encode(self, text: str) -> Any:
        self.characters += len(text)
        return self._tokenizer.encode(text)


@pytest.mark.parametrize("call", REQUESTS)
def test_fault_03_megabytes_of_text_are_not_tokenised(served: ServedModel, call: str) -> None:
    tokenizer: Any = Counting(served.source)
    length = 4_000_000  # a little under what gRPC takes
    with serving(dataclasses.replace(served, source=tokenizer)) as running:
        text = f"source: {length} characters cannot be within the limit of 24 tokens; split the text"
        assert ended(running, call, source="a" * length) == (INVALID, text)
        assert tokenizer.characters == 0
        assert_idle(running)


STRANGE = {
    "NUL": "ab\0cd",
    "nothing but NUL": "\0\0",
    "control characters": "".join(map(chr, range(1, 24))),
    "a family of emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "right to left": "\u202eabc \u05d0\u05d1\u05d2\u200f",
    "combining marks": "a" + "\u0301" * 1000,
    "very many combining marks": "a" + "\u0301" * 100_000,
    "nothing but marks": "\u0301\u0302\u0303",
    "nothing known": "\u6f22\u5b57\u304b\u306a",
    "byte order mark": "\ufeff\ufffe",
    "beyond all planes in use": "\U0010ffff" * 8,
    "one letter, as large as it comes": "\ufdfa",
}


@pytest.mark.parametrize("call", REQUESTS)
@pytest.mark.parametrize("what", STRANGE)
def test_fault_05_strange_text_is_answered_or_ended(running: Running, call: str, what: str) -> None:
    found, _ = ended(running, call, source=STRANGE[what])
    assert found in (OK, INVALID)
    assert_idle(running)


@pytest.mark.parametrize("call", SEARCHES)
@pytest.mark.parametrize("longest", [0, -1, 21, 2**31 - 1, -(2**31)])
def test_fault_06_a_longest_answer_out_of_range(untouched: Running, call: str, longest: int) -> None:
    found, text = ended(untouched, call, search=pb.SearchOptions(longest=longest))
    assert found == INVALID
    over = f"longest: {longest} is over the model's limit of 20 tokens"
    assert text == (f"longest: {longest} is not at least 1" if longest < 1 else over)


def test_fault_06_a_longest_answer_that_no_field_holds(untouched: Running) -> None:
    search = pb.SearchOptions()
    search.MergeFromString(b"\x20\x80\x80\x80\x80\x08")  # longest = 2^31, which 32 bits take for the least there is
    found, text = ended(untouched, "Generate", search=search)
    assert (found, text) == (INVALID, f"longest: {-(2**31)} is not at least 1")


OPTIONS: dict[str, tuple[pb.SearchOptions, str]] = {
    "no beam": (pb.SearchOptions(beam_size=0), "beam_size: 0 is not from 1 to 16"),
    "a million beams": (pb.SearchOptions(beam_size=1_000_000), "beam_size: 1000000 is not from 1 to 16"),
    "a million hypotheses": (
        pb.SearchOptions(hypotheses=1_000_000),
        "hypotheses: 1000000 is not from 1 to 1 (beam_size)",
    ),
    "temperature NaN": (
        pb.SearchOptions(sampling=pb.Sampling(temperature=math.nan)),
        "sampling.temperature: nan is not from 0.01 to 100.0",
    ),
    "temperature below 0": (
        pb.SearchOptions(sampling=pb.Sampling(temperature=-1)),
        "sampling.temperature: -1.0 is not from 0.01 to 100.0",
    ),
    "temperature infinite": (
        pb.SearchOptions(sampling=pb.Sampling(temperature=math.inf)),
        "sampling.temperature: inf is not from 0.01 to 100.0",
    ),
    "top_p NaN": (
        pb.SearchOptions(sampling=pb.Sampling(top_p=math.nan)),
        "sampling.top_p: nan is not from 1e-06 to 1.0",
    ),
    "penalty infinite": (
        pb.SearchOptions(length_penalty=math.inf),
        "length_penalty: inf is not from 0.0 to 10.0",
    ),
    "coverage NaN": (
        pb.SearchOptions(coverage_penalty=math.nan),
        "coverage_penalty: nan is not from 0.0 to 10.0",
    ),
}
"""What is asked, and what is said of it."""


@pytest.mark.parametrize("call", SEARCHES)
@pytest.mark.parametrize("what", OPTIONS)
def test_fault_07_options_out_of_range(untouched: Running, call: str, what: str) -> None:
    search, text = OPTIONS[what]
    assert ended(untouched, call, search=search) == (INVALID, text)


@pytest.mark.parametrize("penalty", [math.nan, -1.0])
def test_fault_07_a_penalty_out_of_range(untouched: Running, penalty: float) -> None:
    text = f"length_penalty: {penalty} is not from 0.0 to 10.0"
    assert ended(untouched, "Score", length_penalty=penalty) == (INVALID, text)


class Endless(Echo):
    """Never says the end token, nor another special one."""

    def _read(self, question: Question) -> tuple[Array, Array, Array]:
        log_probabilities, cross, own = super()._read(question)
        log_probabilities[..., : END + 1] = -1e4
        return log_probabilities, cross, own


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("longest", [1, 7, None])
def test_fault_08_a_model_that_never_ends_is_ended(served: ServedModel, beam_size: int, longest: int | None) -> None:
    search = pb.SearchOptions(beam_size=beam_size, longest=longest)
    with serving(dataclasses.replace(served, steps=Endless())) as running:
        answers = [ask(running, call, search=search) for call in SEARCHES]
        assert_idle(running)
    generated, streamed, chunked, many = answers
    ends = [generated[0], streamed[-1].end, chunked[0].answer, many[0].answer]
    for best in (end.hypotheses[0] for end in ends):
        assert best.finish_reason == pb.FINISH_REASON_LENGTH
        assert len(best.tokens) == (longest or 20)
