"""`limelight`, whose models tell the runner of every step, and wait for it: a real `limelight serve` in all else."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.faults import device
from model.steps import Array, Kept, Memory, Question, Step, StepModel
from model.tokenizer import Tokenizer
from serve.bundle import ServedModel, load_model
from serve.cli import main


class Told:
    """A bundle's steps, one at a time.

    Args:
        steps: these.
        source: source tokenizer, to tell texts.
    """

    def __init__(self, steps: StepModel, source: Tokenizer) -> None:
        self._steps, self._source = steps, source
        self.memory: Sequence[Kept] = steps.memory
        self.state: Sequence[Kept] = steps.state
        self.dtype: np.dtype[Any] = steps.dtype
        self.vocabulary = steps.vocabulary

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:
        """See `StepModel.encode`."""
        sources = [ids[mask][:-1].tolist() for ids, mask in zip(source_ids, source_mask, strict=True)]  # no end token
        device.enter("encode", [self._source.decode(ids).replace(" ", "") for ids in sources], die=_end_thread)
        return self._steps.encode(source_ids, source_mask, attention)

    def step(self, question: Question) -> Step:
        """See `StepModel.step`."""
        device.enter("step", rows=len(question.target_ids), die=_end_thread)
        return self._steps.step(question)


def _end_thread() -> None:
    """What corresponds to a worker's death: the engine is a thread here."""
    sys.exit("told to die")


def load_told(*arguments: Any, **choices: Any) -> ServedModel:
    """`load_model`, whose model is told of."""
    device.enter("load")
    model = load_model(*arguments, **choices)
    return dataclasses.replace(model, steps=Told(model.steps, model.source))


if __name__ == "__main__":
    with patch("serve.commands.load_model", load_told):
        main()
