"""What the verifier lets through, and what it says of what it does not."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from export.manifest import Precision
from export.verify import METRIC_LOSS, SHAPES, TOLERANCES, VerificationError, compare_values, verify
from model.checkpoint import Checkpoint
from model.errors import DataError
from model.steps import Memory, Scores, Step
from model.torch_steps import TorchStepModel
from tests.export.toy import network
from tests.reversal import Reversal, pairs, parts

FIELDS = {name: name for name in TOLERANCES["fp32"]} | {"log_probabilities": "top_log_probabilities"}
"""Where a step has each output."""
STRINGS = parts()["validation"][:40]


Found = TypeVar("Found", Memory, Step, Scores)


class Spoilt(TorchStepModel):
    """The network's own steps, with one output of every step changed."""

    def __init__(self, checkpoint: Checkpoint, output: str, change: Callable[[Any], Any]) -> None:
        super().__init__(checkpoint.model)
        self._output, self._change = output, change

    def encode(self, *arguments: Any) -> Memory:
        return self._spoil(super().encode(*arguments))

    def step(self, *arguments: Any) -> Step:
        return self._spoil(super().step(*arguments))

    def score(self, *arguments: Any) -> Scores:
        return self._spoil(super().score(*arguments))

    def _spoil(self, found: Found) -> Found:
        if not hasattr(found, self._output):
            return found
        return dataclasses.replace(found, **{self._output: self._change(getattr(found, self._output))})


@pytest.fixture
def checkpoint(reversal: Reversal) -> Checkpoint:
    return network(reversal)


def pruned(checkpoint: Checkpoint, share: float) -> TorchStepModel:
    """The network without some of the weights that its decoder reads tokens with."""
    model = TorchStepModel(checkpoint.model)
    generator = torch.Generator().manual_seed(0)
    layer = checkpoint.model.decoder.get_submodule("layers.0.cross_attention.query")
    assert isinstance(layer, nn.Linear)
    layer.weight.data *= torch.rand(layer.weight.shape, generator=generator) >= share
    return model


def test_the_shapes_leave_no_axis_as_it_was_traced() -> None:
    assert {shape.beam for shape in SHAPES} >= {1, 2, 4}
    assert {max(shape.sources) for shape in SHAPES}.isdisjoint({5})
    assert {len(shape.sources) for shape in SHAPES} >= {1, 3, 4}
    assert any(sum(shape.news) > max(shape.news) > 1 for shape in SHAPES)


def test_a_network_equals_itself(checkpoint: Checkpoint) -> None:
    model = TorchStepModel(checkpoint.model)
    assert compare_values(model, model, checkpoint) == dict.fromkeys(TOLERANCES["fp32"], 0.0)


@pytest.mark.parametrize("output", TOLERANCES["fp32"])
def test_a_difference_over_the_tolerance_is_named_with_its_limit(checkpoint: Checkpoint, output: str) -> None:
    limit = TOLERANCES["fp32"][output]
    spoilt = Spoilt(checkpoint, FIELDS[output], lambda values: values + np.float32(3 * limit))
    with pytest.raises(VerificationError) as caught:
        verify(checkpoint, {"fp32": spoilt}, pairs(STRINGS[:2]))
    message = rf"the export differs from the checkpoint: fp32 {output} by (\S+), the limit is {limit:.0e}"
    found = re.fullmatch(message, str(caught.value))
    assert found, caught.value
    assert float(found[1]) == pytest.approx(3 * limit, rel=0.1)


@pytest.mark.parametrize("output", TOLERANCES["fp32"])
def test_a_difference_within_the_tolerance_is_reported(checkpoint: Checkpoint, output: str) -> None:
    limit = TOLERANCES["fp32"][output]
    spoilt = Spoilt(checkpoint, FIELDS[output], lambda values: values + np.float32(0.5 * limit))
    parity = verify(checkpoint, {"fp32": spoilt}, pairs(STRINGS[:2]))
    assert parity.differences["fp32"][output] == pytest.approx(0.5 * limit, rel=0.1)
    assert parity.equal == {"fp32": 2}


def test_scores_are_compared_too(checkpoint: Checkpoint) -> None:
    spoilt = Spoilt(checkpoint, "log_probabilities", lambda values: values - 1)
    with pytest.raises(VerificationError, match=r"fp32 log_probabilities by 1\.00e\+00"):
        verify(checkpoint, {"fp32": spoilt}, pairs(STRINGS[:2]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_no_small_difference(checkpoint: Checkpoint, value: float) -> None:
    spoilt = Spoilt(checkpoint, "encoder_attention", lambda values: values + value)
    with pytest.raises(VerificationError, match="fp32 encoder_attention by inf"):
        verify(checkpoint, {"fp32": spoilt}, pairs(STRINGS[:2]))


def test_another_shape_is_named(checkpoint: Checkpoint) -> None:
    spoilt = Spoilt(checkpoint, "cross_attention", lambda values: values[:, :, :1])
    with pytest.raises(VerificationError, match=r"a shape of \(1, 1, 1, 1, 1\), expected \(1, 1, 2, 1, 1\)"):
        verify(checkpoint, {"fp32": spoilt}, pairs(STRINGS[:2]))


def test_float32_must_give_every_answer_that_pytorch_gives(checkpoint: Checkpoint) -> None:
    swapped = Spoilt(checkpoint, "top_ids", lambda ids: np.where(ids == 4, 5, ids))
    affected = sum(checkpoint.target.token_text(4) in string for string in STRINGS)
    assert 0 < affected < len(STRINGS)
    with pytest.raises(VerificationError, match=f"fp32 decodes {affected} sources differently, such as '") as caught:
        verify(checkpoint, {"fp32": swapped}, pairs(STRINGS))
    found = re.search(r"such as '(\w+)': (\[.*?\]), exported (\[.*?\])", str(caught.value))
    assert found, caught.value
    assert json.loads(found[2]) == [token.id for token in checkpoint.target.encode(found[1][::-1])]
    assert json.loads(found[3]) != json.loads(found[2])


@pytest.mark.parametrize(("task", "metrics"), [("text", ("chrf",)), ("g2p", ("wer", "per"))])
def test_int8_may_lose_so_much_and_no_more(checkpoint: Checkpoint, task: str, metrics: tuple[str, ...]) -> None:
    config = checkpoint.config.model_copy(update={"task": task})
    of_task = dataclasses.replace(checkpoint, config=config)
    kept = verify(of_task, {"int8": pruned(checkpoint, 0.0)}, pairs(STRINGS))
    assert kept.equal == {"int8": len(STRINGS)}
    reference = dataclasses.replace(of_task, model=network_again(checkpoint))
    with pytest.raises(VerificationError) as caught:
        verify(reference, {"int8": pruned(checkpoint, 0.6)}, pairs(STRINGS))
    for metric in metrics:
        assert f"more than {METRIC_LOSS[metric]} points worse" in str(caught.value)
        assert f"int8 {metric} " in str(caught.value)


def network_again(checkpoint: Checkpoint) -> Any:
    """A copy of the network that stays as it is."""
    copy = type(checkpoint.model)(checkpoint.config.model, len(checkpoint.source), len(checkpoint.target)).eval()
    copy.load_state_dict(checkpoint.model.state_dict())
    return copy


def test_a_better_int8_is_welcome(checkpoint: Checkpoint) -> None:
    better = pruned(checkpoint, 0.0)
    worse = dataclasses.replace(checkpoint, model=network_again(checkpoint))
    pruned(worse, 0.6)
    parity = verify(worse, {"int8": better}, pairs(STRINGS))
    assert parity.quality["int8"]["chrf"] > parity.quality["torch"]["chrf"]


def test_progress_counts_every_source_of_every_side(checkpoint: Checkpoint) -> None:
    told: Counter[str] = Counter()
    models: dict[Precision, TorchStepModel] = dict.fromkeys(("fp32", "int8"), TorchStepModel(checkpoint.model))
    parity = verify(checkpoint, models, pairs(STRINGS), lambda what, count: told.update({what: count}))
    assert told == dict.fromkeys(("PyTorch", "fp32", "int8"), len(STRINGS))
    assert parity.answers == len(STRINGS)


def test_without_pairs_nothing_is_verified(checkpoint: Checkpoint) -> None:
    with pytest.raises(DataError, match="nothing to evaluate: no pairs"):
        verify(checkpoint, {"fp32": TorchStepModel(checkpoint.model)}, [])
