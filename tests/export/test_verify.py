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

from export.graphs import ExampleSizes
from export.manifest import Precision
from export.verify import METRIC_LOSS, SHAPES, TOLERANCES, VerificationError, compare_values, verify
from model.checkpoint import Checkpoint
from model.errors import DataError
from model.options import LARGEST_BEAM
from model.steps import Array, Memory, Question, Step
from model.torch_steps import TorchStepModel
from tests.export.toy import network
from tests.reversal import Reversal, pairs, parts

FIELDS = {name: name for name in TOLERANCES["fp32"]} | {"log_probabilities": "top_log_probabilities"}
"""Where a step has each output."""
STRINGS = parts()["validation"][:40]


Found = TypeVar("Found", Memory, Step)


class Spoilt(TorchStepModel):
    """The network's own steps, with one output of every step changed."""

    def __init__(self, checkpoint: Checkpoint, output: str, change: Callable[[Any], Any]) -> None:
        super().__init__(checkpoint.model)
        self._output, self._change = output, change

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:
        return self._spoil(super().encode(source_ids, source_mask, attention))

    def step(self, question: Question) -> Step:
        return self._spoil(super().step(question))

    def _spoil(self, found: Found) -> Found:
        values = getattr(found, self._output, None)
        if values is None:
            return found
        changed: Any = tuple(map(self._change, values)) if isinstance(values, tuple) else self._change(values)
        return dataclasses.replace(found, **{self._output: changed})


class Careless(TorchStepModel):
    """The network's own steps, to a question of which one part is not heeded."""

    def __init__(self, checkpoint: Checkpoint, part: str, instead: Callable[[Any], Any]) -> None:
        super().__init__(checkpoint.model)
        self._part, self._instead = part, instead

    def step(self, question: Question) -> Step:
        changed: dict[str, Any] = {self._part: self._instead(getattr(question, self._part))}
        return super().step(dataclasses.replace(question, **changed))


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
    traced = ExampleSizes()
    assert {shape.query for shape in SHAPES} >= {1, 4}
    assert {shape.query for shape in SHAPES}.isdisjoint({traced.query})
    assert {max(shape.sources) for shape in SHAPES}.isdisjoint({traced.source})
    assert {shape.past for shape in SHAPES}.isdisjoint({traced.past})
    assert {len(shape.sources) for shape in SHAPES} >= {1, 3, 4}


def test_the_shapes_have_hypotheses_and_whole_targets_each_after_pasts_short_and_long(checkpoint: Checkpoint) -> None:
    asked: list[Question] = []

    class Listening(TorchStepModel):
        def step(self, question: Question) -> Step:
            asked.append(question)
            return super().step(question)

    model = Listening(checkpoint.model)
    compare_values(model, model, checkpoint)
    several = [one for one in asked if one.target_ids.shape[1] > 1]
    alone = [one for one in several if (one.new_visible == np.eye(one.target_ids.shape[1], dtype=bool)).all()]
    assert any(one.past_visible.shape[-1] > LARGEST_BEAM for one in alone)
    assert any((one.new_visible == np.tri(one.target_ids.shape[1], dtype=bool)).all() for one in several)
    assert all(one.past_visible.any() and not one.past_visible.all() for one in alone)
    assert max(one.positions.max() for one in asked) > max(one.target_ids.shape[1] for one in asked) / 2


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


def test_log_probabilities_of_given_tokens_are_compared_too(checkpoint: Checkpoint) -> None:
    spoilt = Spoilt(checkpoint, "next_log_probabilities", lambda values: values - 1)
    with pytest.raises(VerificationError, match=r"fp32 log_probabilities by 1\.00e\+00"):
        verify(checkpoint, {"fp32": spoilt}, pairs(STRINGS[:2]))


@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
def test_a_spoilt_state_is_noticed_whichever_of_its_tensors_it_is(checkpoint: Checkpoint, part: int) -> None:
    class Forgetful(TorchStepModel):
        def step(self, question: Question) -> Step:
            step = super().step(question)
            state = tuple(tensor[:, :, ::-1] if index == part else tensor for index, tensor in enumerate(step.state))
            return dataclasses.replace(step, state=state)

    found = compare_values(TorchStepModel(checkpoint.model), Forgetful(checkpoint.model), checkpoint)
    assert found.pop("state") > 100 * TOLERANCES["fp32"]["state"]
    assert set(found.values()) == {0.0}


UNHEEDED: dict[str, tuple[Callable[[Array], Array], str]] = {
    "past_visible": (np.ones_like, "decoder_attention"),
    "new_visible": (np.ones_like, "decoder_attention"),
    "positions": (np.zeros_like, "log_probabilities"),
    "next_ids": (np.zeros_like, "log_probabilities"),
    "target_ids": (np.zeros_like, "log_probabilities"),
}
"""Parts of a question, what is taken in their place, and where it shows."""


@pytest.mark.parametrize("part", UNHEEDED)
def test_a_part_of_the_question_that_is_not_heeded_is_noticed(checkpoint: Checkpoint, part: str) -> None:
    instead, output = UNHEEDED[part]
    model = Careless(checkpoint, part, instead)
    found = compare_values(TorchStepModel(checkpoint.model), model, checkpoint)
    assert found[output] > 100 * TOLERANCES["fp32"][output]


def test_padding_that_is_not_heeded_is_noticed(checkpoint: Checkpoint) -> None:
    model = Careless(
        checkpoint, "memory", lambda memory: dataclasses.replace(memory, source_mask=np.ones_like(memory.source_mask))
    )
    found = compare_values(TorchStepModel(checkpoint.model), model, checkpoint)
    assert found["cross_attention"] > 100 * TOLERANCES["fp32"]["cross_attention"]


@pytest.mark.parametrize("family", ["encoder", "decoder", "cross"])
def test_attention_that_was_asked_for_must_come(checkpoint: Checkpoint, family: str) -> None:
    silent = Spoilt(checkpoint, f"{family}_attention", lambda values: None)
    with pytest.raises(VerificationError, match=r"^the export differs from the checkpoint: attention is missing$"):
        verify(checkpoint, {"fp32": silent}, pairs(STRINGS[:2]))


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


@pytest.mark.parametrize("output", TOLERANCES["fp16"])
def test_float16_may_differ_so_much_and_no_more(checkpoint: Checkpoint, output: str) -> None:
    limit = TOLERANCES["fp16"][output]
    near = Spoilt(checkpoint, FIELDS[output], lambda values: values + np.float32(0.9 * limit))
    far = Spoilt(checkpoint, FIELDS[output], lambda values: values + np.float32(3 * limit))
    assert verify(checkpoint, {"fp16": near}, pairs(STRINGS[:2])).differences["fp16"][output] <= limit
    with pytest.raises(VerificationError, match=rf"fp16 {output} by \S+, the limit is {limit:.0e}"):
        verify(checkpoint, {"fp16": far}, pairs(STRINGS[:2]))


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
