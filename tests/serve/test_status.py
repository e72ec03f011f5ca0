"""What programs are told of an error: reasons, the field at fault, and when to try again."""

import dataclasses
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status

from export.manifest import BundleError
from model.errors import InvalidRequestError
from serve.bundle import ServedModel
from serve.client import Client, ServerError
from serve.errors import (
    OUTCOMES,
    EngineError,
    EngineFailedError,
    ExpiredError,
    ModelExistsError,
    ModelNotFoundError,
    NotAllowedError,
    NotOfferedError,
    OutOfMemoryError,
    PermissionDeniedError,
    QueueFullError,
    ShuttingDownError,
    SlowReaderError,
    UnauthenticatedError,
)
from serve.jobs import EngineLimits
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.status import DETAILS_KEY, LONGEST_MESSAGE, PUSHBACK_KEY, refusal
from serve.waiting import LEAST_WAIT, MOST_WAIT, UNKNOWN_WAIT, Outflow
from tests.serve.jobs import SHORT, job, tokens
from tests.serve.running import PATIENCE, Running, generate, serving
from tests.serve.steps import Echo, Gated

ERRORS: list[tuple[Exception, grpc.StatusCode, str]] = [
    (InvalidRequestError("source", "is empty"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    (ModelNotFoundError("no such model"), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    (QueueFullError("full", 0.25), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (ExpiredError("late"), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED"),
    (EngineFailedError("dead"), grpc.StatusCode.UNAVAILABLE, "ENGINE_FAILED"),
    (ShuttingDownError("stopping"), grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    (OutOfMemoryError("too little"), grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    (ModelExistsError("there is one"), grpc.StatusCode.FAILED_PRECONDITION, "MODEL_EXISTS"),
    (UnauthenticatedError("who?"), grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    (PermissionDeniedError("not you"), grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    (SlowReaderError("nothing was read"), grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER"),
    (NotAllowedError("not here"), grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED_HERE"),
    (NotOfferedError("never"), grpc.StatusCode.UNIMPLEMENTED, "NOT_OFFERED"),
    (BundleError("damaged"), grpc.StatusCode.FAILED_PRECONDITION, "BAD_BUNDLE"),
    (EngineError("a secret"), grpc.StatusCode.INTERNAL, "INTERNAL"),
    (ZeroDivisionError("a secret"), grpc.StatusCode.INTERNAL, "INTERNAL"),
]


def details(error: Any) -> dict[str, Any]:
    """The details of a failed call, by their kind."""
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.message == error.details()
    kinds = {kind.DESCRIPTOR.full_name: kind for kind in (BadRequest, ErrorInfo, RetryInfo)}
    found = [(kinds[detail.TypeName()], detail.value) for detail in status.details]
    return {kind.DESCRIPTOR.name: kind.FromString(value) for kind, value in found}


def failed(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call.result(PATIENCE)
    return caught.value


@pytest.mark.parametrize(("error", "code", "reason"), ERRORS, ids=lambda value: getattr(value, "name", None))
def test_every_error_has_a_code_a_reason_and_the_requests_id(
    error: Exception, code: grpc.StatusCode, reason: str
) -> None:
    found = refusal(error, None, "0a1b")
    assert found.code is code
    assert found.unexpected == (reason == "INTERNAL")
    assert ("secret" in found.message, "0a1b" in found.message) == (False, found.unexpected)
    metadata = dict(found.metadata)
    status = rpc_status.status_pb2.Status.FromString(metadata[DETAILS_KEY])  # type: ignore[attr-defined,unused-ignore]
    assert (status.code, status.message) == (code.value[0], found.message)
    info = ErrorInfo.FromString(status.details[-1].value)
    assert (info.reason, info.domain, info.metadata["request_id"]) == (reason, "limelight", "0a1b")
    assert metadata.get(PUSHBACK_KEY) == ("250" if reason == "QUEUE_FULL" else None)


def test_every_outcome_is_listed_above() -> None:
    assert {type(error) for error, _, reason in ERRORS if reason != "INTERNAL"} == OUTCOMES.keys()


@pytest.mark.parametrize(
    ("request_message", "field"),
    [
        (pb.GenerateRequest(), "source"),
        (pb.GenerateRequest(source="ab", search=pb.SearchOptions(beam_size=99)), "search.beam_size"),
        (
            pb.GenerateRequest(source="ab", search=pb.SearchOptions(sampling=pb.Sampling(top_p=2))),
            "search.sampling.top_p",
        ),
        (pb.GenerateRequest(source="ab", attention=pb.AttentionOptions(layers=[0])), "attention.families"),
    ],
)
def test_a_mistake_is_told_with_its_field(running: Running, request_message: pb.GenerateRequest, field: str) -> None:
    error = failed(running.stub.Generate.future(request_message, timeout=PATIENCE))
    found = details(error)
    assert set(found) == {"BadRequest", "ErrorInfo"}
    (violation,) = found["BadRequest"].field_violations
    assert (violation.field, violation.description) == (field, error.details())
    assert found["ErrorInfo"].metadata["field"] == field


def test_a_field_of_the_request_itself_is_not_looked_for_deeper(running: Running) -> None:
    error = failed(running.stub.Score.future(pb.ScoreRequest(source="ab", target="b", length_penalty=-1)))
    assert details(error)["ErrorInfo"].metadata["field"] == "length_penalty"


def test_fault_21_who_finds_the_queue_full_is_told_when_to_come_back(served: ServedModel) -> None:
    steps = Gated(Echo())
    with serving(dataclasses.replace(served, steps=steps), EngineLimits(queue=1)) as running:
        first = generate(running.stub)
        steps.wait()
        waiting = running.engine.submit(job(SHORT))
        error = failed(generate(running.stub))
        with pytest.raises(ServerError) as caught, Client(running.address) as client:
            client.generate("ab")
        steps.open()
        assert first.result(PATIENCE).hypotheses
        assert tokens(waiting) == SHORT
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["RetryInfo"].retry_delay.ToMilliseconds() == 1000 * LEAST_WAIT
    assert dict(error.trailing_metadata())[PUSHBACK_KEY] == str(round(1000 * LEAST_WAIT))
    assert (caught.value.reason, caught.value.retry_after) == ("QUEUE_FULL", LEAST_WAIT)


def test_the_client_tells_the_field(running: Running) -> None:
    with Client(running.address) as client, pytest.raises(ServerError) as caught:
        client.generate("ab", beam_size=99)
    assert (caught.value.reason, caught.value.field, caught.value.retry_after) == (
        "INVALID_FIELD",
        "search.beam_size",
        None,
    )


def test_advice_follows_the_pace_at_which_the_queue_empties(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serve.waiting.time.monotonic", lambda: now)
    outflow = Outflow()
    assert (outflow.advice(10), outflow.expected(10)) == (UNKNOWN_WAIT, 0.0)
    now += 1000.0
    outflow.began()
    now += 1.0
    outflow.took(10)
    assert outflow.advice(10) == pytest.approx(1.0)
    for _ in range(50):
        now += 1.0
        outflow.took(0)
        now += 1.0
        outflow.took(4)
    assert outflow.advice(10) == pytest.approx(5.0, rel=1e-3)
    assert (outflow.advice(0.01), outflow.advice(1e6)) == (LEAST_WAIT, MOST_WAIT)
    assert outflow.expected(1e6) == pytest.approx(5e5, rel=1e-3)


def test_a_long_message_is_cut_before_metadata_overflow(running: Running) -> None:
    request = pb.GenerateRequest(source="ab", model="m" * 9000)
    error = failed(running.stub.Generate.future(request, timeout=PATIENCE))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert error.details().startswith("model 'mmm")
    assert error.details().endswith("m…")
    assert len(error.details()) == LONGEST_MESSAGE + 1


@pytest.mark.parametrize("letter", ["é", "漢", "😀", "\0", "%"])
def test_a_long_message_in_any_script_is_within_what_clients_take(running: Running, letter: str) -> None:
    """Of 8 KiB of metadata: with more of them, they would tell of that, and nothing of what was wrong."""
    request = pb.GenerateRequest(source="ab", model=letter * 9000)
    error = failed(running.stub.Generate.future(request, timeout=PATIENCE))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert error.details().endswith("…")
    assert LONGEST_MESSAGE - 4 < len(error.details().encode()) - len("…".encode()) <= LONGEST_MESSAGE
    assert details(error)["ErrorInfo"].reason == "MODEL_NOT_FOUND"
