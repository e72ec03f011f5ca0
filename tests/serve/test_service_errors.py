"""Every mistake has its status code and a text that names it; what is no client's fault keeps its details to itself."""

import dataclasses
import logging
import re
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from model.steps import Array, Memory
from serve.bundle import ServedModel
from serve.pb.limelight.v1 import limelight_pb2 as pb
from tests.serve.attention import CROSS
from tests.serve.running import PATIENCE, Running, serving
from tests.serve.steps import Echo

CALLS: dict[str, Callable[..., Any]] = {
    "Generate": pb.GenerateRequest,
    "GenerateStream": pb.GenerateStreamRequest,
    "GenerateChunked": pb.GenerateChunkedRequest,
    "Score": pb.ScoreRequest,
}
"""The calls that take a text, and their requests."""

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND

OF_ALL: dict[str, tuple[dict[str, Any], grpc.StatusCode, str]] = {
    "another model": ({"model": "g2p"}, NOT_FOUND, "model 'g2p' is not served here; 'reversal' is"),
    "no such family": (
        {"attention": pb.AttentionOptions(families=[4])},  # type: ignore[list-item]
        INVALID,
        "attention.families: 4 is not a family; known: 1 (encoder), 2 (decoder), 3 (cross)",
    ),
    "no such layer": (
        {"attention": pb.AttentionOptions(families=[CROSS], layers=[1])},
        INVALID,
        "attention.layers: 1 does not exist: cross attention has layers 0 to 0",
    ),
    "no such head": (
        {"attention": pb.AttentionOptions(families=[CROSS], heads=[0, 2])},
        INVALID,
        "attention.heads: 2 does not exist: cross attention has heads 0 to 1",
    ),
    "a family twice": (
        {"attention": pb.AttentionOptions(families=[CROSS, CROSS])},
        INVALID,
        "attention.families: ['cross', 'cross'] names one twice",
    ),
}
"""Mistakes that every call refuses: what is asked, the code, and the text."""

OF_ONE: dict[str, tuple[str, Any, grpc.StatusCode, str]] = {
    "hypotheses": (
        "GenerateStream",
        pb.GenerateStreamRequest(source="ab", search=pb.SearchOptions(beam_size=2, hypotheses=3)),
        INVALID,
        "hypotheses: 3 is not from 1 to 2 (beam_size)",
    ),
    "no target": ("Score", pb.ScoreRequest(source="ab"), INVALID, "target: is empty"),
    "penalty": (
        "Score",
        pb.ScoreRequest(source="ab", target="ba", length_penalty=-1),
        INVALID,
        "length_penalty: -1.0 is not from 0.0 to 10.0",
    ),
    "prefix": (
        "Generate",
        pb.GenerateRequest(source="ab", search=pb.SearchOptions(prefix="xa")),
        INVALID,
        "prefix: 'x' is not in the target vocabulary",
    ),
    "suppressed": (
        "GenerateStream",
        pb.GenerateStreamRequest(source="ab", search=pb.SearchOptions(suppressed=["x"])),
        INVALID,
        "suppressed: 'x' is not in the target vocabulary",
    ),
    "sampling with a beam": (
        "Generate",
        pb.GenerateRequest(source="ab", search=pb.SearchOptions(beam_size=2, sampling=pb.Sampling())),
        INVALID,
        "sampling: draws one answer, beam_size=2 searches: choose one",
    ),
    "nothing left to say": (
        "Generate",
        pb.GenerateRequest(source="ab", search=pb.SearchOptions(no_repeat_ngram=1, shortest=20)),
        INVALID,
        "search: after 9 tokens every other one is ruled out: suppress fewer, or allow repeats",
    ),
    "nothing left to say in a stream": (
        "GenerateStream",
        pb.GenerateStreamRequest(source="ab", search=pb.SearchOptions(no_repeat_ngram=1, shortest=20)),
        INVALID,
        "search: after 9 tokens every other one is ruled out: suppress fewer, or allow repeats",
    ),
    "another model": (
        "GetModel",
        pb.GetModelRequest(model="x"),
        NOT_FOUND,
        "model 'x' is not served here; 'reversal' is",
    ),
}


def answered(running: Running, call: str, request: Any) -> list[Any]:
    answer = getattr(running.stub, call)(request, timeout=PATIENCE)
    return list(answer) if call in ("GenerateStream", "GenerateChunked") else [answer]


def refused(running: Running, call: str, request: Any) -> tuple[grpc.StatusCode, str]:
    """Code and text of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        answered(running, call, request)
    error: Any = caught.value
    return error.code(), error.details()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mistake", OF_ALL)
def test_every_call_refuses(running: Running, call: str, mistake: str) -> None:
    asked, code, text = OF_ALL[mistake]
    target = {"target": "ba"} if call == "Score" else {}
    assert refused(running, call, CALLS[call](**{"source": "ab"} | target | asked)) == (code, text)


@pytest.mark.parametrize("mistake", OF_ONE)
def test_a_call_refuses(running: Running, mistake: str) -> None:
    call, request, code, text = OF_ONE[mistake]
    assert refused(running, call, request) == (code, text)


UNKNOWN = b"\xf8\x3f\x01"
"""Field 1023, of no message of ours, as a number."""


@pytest.mark.parametrize("call", [*CALLS, "GetModel"])
def test_a_field_that_the_server_does_not_know_is_refused(running: Running, call: str) -> None:
    request = CALLS[call](source="ab") if call in CALLS else pb.GetModelRequest()
    request.MergeFromString(UNKNOWN)
    assert refused(running, call, request) == (INVALID, "request: field number 1023 is not known to this server")


@pytest.mark.parametrize("call", CALLS)
def test_so_is_one_inside_an_option(running: Running, call: str) -> None:
    attention = pb.AttentionOptions(families=[CROSS])
    attention.MergeFromString(UNKNOWN)
    found = refused(running, call, CALLS[call](source="ab", attention=attention))
    assert found == (INVALID, "attention: field number 1023 is not known to this server")


def test_a_mistake_leaves_the_next_call_alone(running: Running) -> None:
    refused(running, "Generate", pb.GenerateRequest())
    assert running.stub.Generate(pb.GenerateRequest(source="abcd")).hypotheses[0].text == "dcba"


class Broken(Echo):
    """Fails in a way that no client may read of."""

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:  # noqa: ARG002
        raise RuntimeError(f"a secret of the server: {source_ids[source_mask]}")


@pytest.mark.parametrize("call", CALLS)
def test_a_fault_of_the_server_keeps_its_details(
    served: ServedModel, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    target = {"target": "ba"} if call == "Score" else {}
    with serving(dataclasses.replace(served, steps=Broken())) as broken:
        code, text = refused(broken, call, CALLS[call](source="ab", **target))
        assert code == grpc.StatusCode.INTERNAL
        found = re.fullmatch(r"internal error \(request ([0-9a-f]{12}) in the server's log\)", text)
        assert found, text
        logged = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert [record.name for record in logged] == ["serve.batcher", "serve.status"]
        assert f"request {found[1]} failed" in caplog.text
        assert "a secret of the server" in caplog.text
        assert broken.stub.GetModel(pb.GetModelRequest()).model.name == "reversal"
