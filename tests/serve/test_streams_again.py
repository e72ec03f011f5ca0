"""A stream whose batch failed goes on where it was: no token twice, one start, and nothing else than was told."""

import dataclasses
import logging

import grpc
import numpy as np
import pytest

from model.steps import Question, Step
from serve.bundle import ServedModel
from serve.pb.limelight.v1 import limelight_pb2 as pb
from tests.serve.running import PATIENCE, generate, serving, stream
from tests.serve.steps import Echo, Gated
from tests.serve.test_failures import FailingDecoder


class Fickle(FailingDecoder):
    """Answers otherwise when it is asked again, alone."""

    def __init__(self) -> None:
        super().__init__(after=2)
        self.failed = False

    def step(self, question: Question) -> Step:
        try:
            step = super().step(question)
        except RuntimeError:
            self.failed = True
            raise
        if self.failed:
            return dataclasses.replace(step, top_ids=np.where(step.top_ids == 4, 5, step.top_ids))
        return step


@pytest.mark.parametrize("model", [FailingDecoder(after=2), Fickle()], ids=["same", "fickle"])
def test_fault_32_a_stream_is_told_each_token_once(
    served: ServedModel, caplog: pytest.LogCaptureFixture, model: Echo
) -> None:
    letters = sorted("abcdefgh", key=lambda letter: served.source.encode(letter)[0].id)
    source = "".join(letters[:-1])  # the last is the token that cannot be decoded from
    steps = Gated(model)
    with caplog.at_level(logging.CRITICAL), serving(dataclasses.replace(served, steps=steps)) as running:
        before = generate(running.stub, letters[0])
        steps.wait()
        told, poison = stream(running.stub, source), generate(running.stub, letters[-1] + source)
        while running.engine.waiting < 2:
            pass
        steps.open()
        assert before.result(PATIENCE)
        with pytest.raises(grpc.RpcError):
            poison.result(PATIENCE)
        if isinstance(model, Fickle):
            with pytest.raises(grpc.RpcError) as caught:
                list(told)
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            return
        events: list[pb.GenerateStreamResponse] = list(told)
    assert [event.WhichOneof("event") for event in events] == ["start", *["token"] * 8, "end"]
    assert [event.token.token.id for event in events[1:-1]] == [4, 5, 6, 7, 8, 9, 10, 3]
    assert len(events[-1].end.hypotheses[0].tokens) == 8
