"""What a run is made of: calls and connections that can be made again, verdicts, and what is read from answers."""

import json
import random
from collections import Counter
from typing import Any

import pytest

from bench.fuzz import http2
from bench.fuzz.answers import told, wrong_answers
from bench.fuzz.calls import Call, Judges, Verdict
from bench.fuzz.grammar import fill
from bench.fuzz.http2 import Received, Status
from bench.fuzz.making import ORIGINS, Maker
from bench.fuzz.octets import varint
from bench.fuzz.sessions import SHARES, Session, Sessions
from bench.fuzz.subject import METHODS, OURS, Subject
from serve.pb.inference import grpc_service_pb2 as open_pb
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.tensors import pack_bytes

OK, INVALID, NOT_FOUND = "OK", "INVALID_ARGUMENT", "NOT_FOUND"
SEARCH = pb.SearchOptions

ASKED: list[tuple[Any, set[str]]] = [
    (pb.GenerateRequest(source="abc"), {OK}),
    (pb.GenerateRequest(source="abc", model="reversal", version="2"), {OK}),
    (pb.GenerateRequest(source="abc", version="3"), {OK, NOT_FOUND}),  # which comes and goes
    (pb.GenerateRequest(source="abc", version="7"), {NOT_FOUND}),
    (pb.GenerateRequest(source="", version="7"), {INVALID, NOT_FOUND}),
    (pb.GenerateRequest(source="a" * 23), {OK}),
    (pb.GenerateRequest(source="a" * 24), {INVALID}),
    (pb.GenerateRequest(source="a", search=SEARCH(beam_size=16, hypotheses=16)), {OK}),
    (pb.GenerateRequest(source="a", search=SEARCH(hypotheses=2)), {INVALID}),
    (pb.GenerateRequest(source="a", search=SEARCH(prefix="x")), {INVALID}),
    (pb.GenerateRequest(source="a", search=SEARCH(suppressed=["</s>"])), {INVALID}),
    (pb.GenerateRequest(source="a", search=SEARCH(no_repeat_ngram=1)), {OK, INVALID}),  # nothing may be left
    (pb.GenerateRequest(source="a", search=SEARCH(shortlist=True)), {INVALID}),  # the model has none
    (pb.GenerateRequest(source="a", search=SEARCH(length_penalty=float("nan"))), {INVALID}),
    (pb.GenerateRequest(source="a", attention=pb.AttentionOptions(layers=[0])), {INVALID}),
    (pb.ScoreRequest(source="a", target=""), {INVALID}),
    (open_pb.ModelReadyRequest(name="x"), {OK}),
    (open_pb.ModelMetadataRequest(name="x"), {NOT_FOUND}),
    (open_pb.ModelStatisticsRequest(name="x"), {INVALID}),
    (open_pb.RepositoryModelLoadRequest(model_name="x"), {"PERMISSION_DENIED"}),
    (open_pb.TraceSettingRequest(), {"UNIMPLEMENTED"}),
]
"""Requests, and how each may end."""


def call_of(request: Any) -> Call:
    method = next(one for one in METHODS if isinstance(request, one.request) and not one.admin)
    return Call(path=method.path, messages=(request.SerializeToString(),), origin="sound", streams=(False, False))


@pytest.mark.parametrize(("request_", "codes"), ASKED)
def test_what_the_api_promises(subject: Subject, request_: Any, codes: set[str]) -> None:
    assert Judges(subject).verdict(call_of(request_)).codes == codes


def test_a_batch_is_judged_by_its_tensors(subject: Subject) -> None:
    judges = Judges(subject)

    def codes(**changes: Any) -> set[str]:
        tensor: dict[str, Any] = {"name": "SOURCE", "datatype": "BYTES", "shape": [1]} | changes
        asked = open_pb.ModelInferRequest(
            model_name="reversal",
            inputs=[open_pb.ModelInferRequest.InferInputTensor(**tensor)],
            raw_input_contents=[pack_bytes([b"ab"])],
        )
        return set(judges.verdict(call_of(asked)).codes)

    assert codes() == {OK}
    for changes in ({"name": "x"}, {"datatype": "FP32"}, {"shape": [2]}, {"shape": [-1]}, {"shape": [2**62, 4]}):
        assert codes(**changes) == {INVALID}


def test_deadlines_and_cancels_are_ends_too(subject: Subject) -> None:
    judges, messages = Judges(subject), (pb.GenerateRequest(source="a").SerializeToString(),)
    path = f"/{OURS}/Generate"
    late = Call(path=path, messages=messages, origin="sound", timeout=0.1)
    assert judges.verdict(late).codes == {OK, "DEADLINE_EXCEEDED"}
    given_up = Call(path=path, messages=messages, origin="sound", cancel_after=0.1)
    assert judges.verdict(given_up).codes == {OK, "CANCELLED"}
    assert judges.verdict(Call(path=path, messages=(), origin="sound")).codes == {INVALID}
    assert judges.verdict(Call(path=path, messages=(b"\0",), origin="noise")).codes == {INVALID}
    assert judges.verdict(Call(path=path, messages=(bytes(2**22 + 1),), origin="noise")).codes == {"RESOURCE_EXHAUSTED"}
    assert judges.verdict(Call(path="/x", messages=(b"",), origin="elsewhere")).codes == {"UNIMPLEMENTED"}


def test_calls_can_be_made_again_and_written_down(subject: Subject) -> None:
    made = [Maker(subject, 3).call(number) for number in range(400)]
    assert made == [Maker(subject, 3).call(number) for number in range(400)]
    assert made != [Maker(subject, 4).call(number) for number in range(400)]
    assert [Call.read(json.loads(json.dumps(one.written()))) for one in made] == made
    assert set(Counter(one.origin for one in made)) == set(ORIGINS)


def test_most_right_ones_are_right(subject: Subject) -> None:
    judges = Judges(subject)
    sound = [one for one in map(Maker(subject, 0).call, range(600)) if one.origin == "sound"]
    promised = [judges.verdict(one).codes for one in sound if OURS in one.path and one.messages]
    assert sum(OK in codes for codes in promised) > 0.95 * len(promised)


def test_nothing_unloads_what_every_other_call_needs(subject: Subject) -> None:
    for one in map(Maker(subject, 0).call, range(3000)):
        if "Unload" in one.path:
            assert not any(name in message for message in one.messages for name in (b"entry-1", b"entry-2"))


def test_every_field_of_every_request_is_tried(subject: Subject) -> None:
    draw = random.Random(0)
    for method in METHODS:
        message, tried = method.request(), set[str]()
        for _ in range(60):
            message = method.request()
            fill(draw, message, subject.words)
            tried |= {field.name for field, _ in message.ListFields()}
        assert tried == {field.name for field in message.DESCRIPTOR.fields}, method.path


def test_connections_can_be_made_again_and_written_down(subject: Subject) -> None:
    def made() -> list[Session]:
        return [Sessions(subject, Judges(subject), 3).session(number) for number in range(120)]

    assert made() == made()
    assert [Session.read(json.loads(json.dumps(one.written()))) for one in made()] == made()
    assert {one.origin.partition(" ")[0] for one in made()} == set(SHARES)
    assert all(one.answered for one in made() if one.origin == "right")


def test_what_a_server_sends_is_read() -> None:
    headers = http2.block([(b":status", b"200"), (b"grpc-status", b"3"), (b"grpc-message", b"a%20b")])
    received = Received()
    sent = http2.settings([(1, 2)]) + http2.frame(http2.HEADERS, http2.END_STREAM, 1, headers[:9])
    sent += http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1, headers[9:])
    sent += http2.frame(http2.RST_STREAM, 0, 3, bytes(4)) + http2.frame(http2.GOAWAY, 0, 0, bytes(7) + b"\x0b")
    for octet in sent:
        received.feed(bytes((octet,)))
    assert (received.frames, received.goaway, received.damage) == (5, 11, "")
    assert received.statuses == {1: Status("3", "a b")}
    assert received.ended == {1, 3}


@pytest.mark.parametrize(
    ("value", "prefix", "octets"), [(10, 5, b"\x0a"), (1337, 5, b"\x1f\x9a\x0a"), (42, 8, b"\x2a")]
)
def test_numbers_are_as_in_rfc_7541(value: int, prefix: int, octets: bytes) -> None:
    assert http2.integer(value, prefix) == octets


def test_numbers_are_as_protobuf_has_them() -> None:
    assert [varint(one) for one in (1, 300, -1)] == [b"\x01", b"\xac\x02", b"\xff" * 9 + b"\x01"]


def test_what_is_not_to_be_told_is_found() -> None:
    assert told("source: is empty") == told("model '/etc/passwd' is not served here") == []
    assert told('in "/a/b.py", line 3')
    assert told("cannot read /srv/models/x", ["/srv/models"]) == ["tells '/srv/models'"]


def test_wrong_answers_are_found() -> None:
    call = call_of(pb.GenerateRequest(source="ab"))

    def wrong(**fields: Any) -> list[str]:
        hypothesis: dict[str, Any] = {"text": "ba", "log_probability": -1.0} | fields
        answer = pb.GenerateResponse(hypotheses=[pb.Hypothesis(**hypothesis)])
        return wrong_answers(call, [answer.SerializeToString()], Verdict(frozenset({OK})))

    assert wrong() == []
    assert wrong(score=float("nan")) == ["a score of nan, a log-probability of -1.0"]
    half = pb.Attention(shape=[1, 2], values=b"\0\0\x80?\0\0\x80?", float_type=pb.FLOAT_TYPE_FLOAT32)
    assert wrong(attention=[half]) == ["a row of attention sums to 2.0"]
    assert wrong_answers(call, [b"\0"], Verdict(frozenset({OK}))) == ["an answer is no message"]
    assert wrong_answers(call, [], Verdict(frozenset({OK}))) == ["0 answers to one request"]
