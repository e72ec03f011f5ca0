"""Several greedy steps in one call are the decoder's own steps, taken one after the other."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto

from export.manifest import BundleError, Precision
from export.runtime import OnnxGreedyModel, OnnxStepModel, _check_signature
from model.search import SearchOptions, search
from model.steps import Array, Family, Question, pad
from model.vocabulary import BEGIN, END
from tests.export.case import SOURCES, blank
from tests.export.toy import Toy, network
from tests.model.steps import one_by_one
from tests.reversal import Reversal

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
STEPS, PAST = 7, 3
BOTH: frozenset[Family] = frozenset({"cross", "decoder"})

TOLERANCES = {"log_probabilities": 1e-5, "attention": 1e-6, "state": 1e-5}
"""Largest difference from single steps. Measured: 1.5e-6, 2.4e-7 and 1.5e-6."""


@pytest.fixture(params=PRECISIONS)
def model(exported: Toy | Reversal, request: pytest.FixtureRequest) -> OnnxGreedyModel:
    return OnnxGreedyModel(exported.bundle, exported.manifest, request.param)


def some_sources(model: OnnxStepModel, lengths: tuple[int, ...] = SOURCES) -> list[list[int]]:
    random = np.random.default_rng(4)
    return [[*random.integers(END + 1, model.source_vocabulary, length - 1).tolist(), END] for length in lengths]


def first(model: OnnxStepModel, attention: frozenset[Family] = BOTH) -> Question:
    """The first of several steps, after a past of which each sentence sees another part."""
    ids, mask = pad(some_sources(model))
    state = blank(model, len(ids), PAST, value=0.1)
    return Question(
        target_ids=np.full((len(ids), 1), BEGIN),
        positions=np.arange(len(ids))[:, None],
        new_visible=np.ones((len(ids), 1, 1), bool),
        past_visible=np.tri(len(ids), PAST, -1, dtype=bool)[:, None],
        next_ids=np.zeros((len(ids), 1), np.int64),
        top=1,
        memory=model.encode(ids, mask),
        state=state,
        attention=attention,
    )


def assert_close(what: str, actual: Array | None, expected: Array | None) -> None:
    assert actual is not None
    assert expected is not None
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCES[what], err_msg=what)


@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_several_steps_are_single_ones(model: OnnxGreedyModel, steps: int) -> None:
    question = first(model)
    found, expected = model.greedy(question, steps, -1), one_by_one(model, question, steps, -1)
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert found.ids.shape == (steps, len(SOURCES))
    assert_close("log_probabilities", found.log_probabilities, expected.log_probabilities)
    assert_close("attention", found.cross_attention, expected.cross_attention)
    assert_close("attention", found.decoder_attention, expected.decoder_attention)
    for mine, theirs in zip(found.state, expected.state, strict=True):
        assert_close("state", mine, theirs)


def test_attention_is_returned_where_it_is_asked_for(model: OnnxGreedyModel) -> None:
    without = model.greedy(first(model, frozenset()), STEPS, -1)
    assert without.cross_attention is None
    assert without.decoder_attention is None
    np.testing.assert_array_equal(without.ids, model.greedy(first(model), STEPS, -1).ids)


def test_the_steps_end_when_enough_sentences_have(reversal: Reversal) -> None:
    model = OnnxGreedyModel(reversal.bundle, reversal.manifest, "fp32")
    ids, mask = pad(some_sources(model, (5, 9, 7)))
    question = replace(
        first(model),
        positions=np.zeros((3, 1), np.int64),
        past_visible=np.zeros((3, 1, PAST), bool),
        memory=model.encode(ids, mask),
    )
    # Answers are as long as their sources.
    for fewest, steps in ((2, 5), (1, 7), (0, 9)):
        made = model.greedy(question, 20, fewest)
        assert len(made.ids) == steps
        assert (made.ids == END).any(0).sum() == 3 - fewest
    assert len(model.greedy(question, 2, 2).ids) == 2


@pytest.mark.parametrize("attention", [frozenset(), BOTH])
def test_a_search_answers_as_with_single_steps(model: OnnxGreedyModel, attention: frozenset[Family]) -> None:
    sources = some_sources(model, (7, 4, 1, 9, 12, 2, 7, 3, 11, 5))
    chosen = [SearchOptions(longest=12)] * len(sources)
    single = OnnxStepModel.step
    calls = []

    class Single:
        """The same graphs without the one for several steps."""

        memory, state, dtype, vocabulary = model.memory, model.state, model.dtype, model.vocabulary
        encode = staticmethod(model.encode)

        @staticmethod
        def step(question: Question) -> object:
            calls.append(1)
            return single(model, question)

    expected = search(Single(), sources, chosen, attention)  # type: ignore[arg-type]
    for [mine], [theirs] in zip(search(model, sources, chosen, attention), expected, strict=True):
        assert (mine.tokens, mine.finish_reason) == (theirs.tokens, theirs.finish_reason)
        assert_close("log_probabilities", np.array(mine.log_probabilities), np.array(theirs.log_probabilities))
        if attention:
            assert_close("attention", mine.cross_attention, theirs.cross_attention)
            assert_close("attention", mine.decoder_attention, theirs.decoder_attention)
        else:
            assert mine.cross_attention is None
            assert mine.decoder_attention is None
    assert calls


def test_what_is_no_number_comes_out_as_none(exported: Toy | Reversal) -> None:
    model = OnnxGreedyModel(exported.bundle, exported.manifest, "fp32")
    question = first(model)
    broken = [tensor.copy() for tensor in question.memory.tensors]
    broken[1][1] = np.nan
    made = model.greedy(replace(question, memory=replace(question.memory, tensors=tuple(broken))), STEPS, -1)
    assert np.isnan(made.log_probabilities).any(0).tolist() == [False, True, False]


def test_an_id_outside_the_vocabulary_is_refused(model: OnnxGreedyModel) -> None:
    question = first(model)
    for wrong in (-1, model.vocabulary):
        with pytest.raises(ValueError, match=f"target_ids: {wrong} is no id of a vocabulary"):
            model.greedy(replace(question, target_ids=np.full_like(question.target_ids, wrong)), STEPS, -1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_weights_are_the_decoders_own(exported: Toy | Reversal, precision: Precision) -> None:
    places = {}
    for name in ("decoder", "greedy"):
        graph = onnx.load(exported.bundle / precision / f"{name}.onnx", load_external_data=False).graph
        outside = [tensor for tensor in graph.initializer if tensor.external_data]
        places[name] = {tensor.external_data[1].value for tensor in outside}
    assert places["greedy"] <= places["decoder"]
    assert places["greedy"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_the_same_in_every_step_is_computed_once(exported: Toy | Reversal, precision: Precision) -> None:
    graph = onnx.load(exported.bundle / precision / "greedy.onnx", load_external_data=False).graph
    [loop] = [node for node in graph.node if node.op_type == "Loop"]
    body = next(one.g for one in loop.attribute if one.type == AttributeProto.GRAPH)
    assert not [node.op_type for node in body.node if "source_mask" in node.input]
    made = {name for node in body.node for name in node.output}
    carried = {value.name for value in body.input}
    for node in body.node:
        inside = set(node.input) & (made | carried)
        assert inside or not {name for name in node.input if name.startswith("memory.")}, node.name


def test_a_bundle_without_the_graph_is_refused(tied: Toy) -> None:
    graphs = {name: one.model_copy(update={"greedy": None}) for name, one in tied.manifest.graphs.items()}
    manifest = tied.manifest.model_copy(update={"graphs": graphs})
    with pytest.raises(BundleError, match="fp32 has no graph for several steps: export the model again"):
        OnnxGreedyModel(tied.bundle, manifest, "fp32")


def test_attention_in_another_order_is_refused(tied: Toy, tmp_path: Path) -> None:
    """As bundles had it before: sentences taken for steps would give wrong pictures without an error."""
    bundle = shutil.copytree(tied.bundle, tmp_path / "bundle")
    spec = tied.manifest.graphs["fp32"].greedy
    assert spec is not None
    model = onnx.load(bundle / spec.file, load_external_data=False)
    (value,) = (one for one in model.graph.output if one.name == "cross_attention")
    first, second = value.type.tensor_type.shape.dim[:2]
    first.dim_param, second.dim_param = "batch", "step"
    onnx.save(model, bundle / spec.file)
    outputs = [
        one.model_copy(update={"axes": ("batch", "step", *one.axes[2:])}) if one.role == "cross_attention" else one
        for one in spec.outputs
    ]
    greedy = spec.model_copy(update={"outputs": tuple(outputs)})
    graphs = {"fp32": tied.manifest.graphs["fp32"].model_copy(update={"greedy": greedy})}
    with pytest.raises(BundleError, match="its attention is laid out as no more: export the model again"):
        OnnxGreedyModel(bundle, tied.manifest.model_copy(update={"graphs": graphs}), "fp32")


def test_the_manifest_tells_what_it_takes_and_gives(exported: Toy | Reversal) -> None:
    model = OnnxGreedyModel(exported.bundle, exported.manifest, "fp32")
    spec = model.graphs.greedy
    assert spec is not None
    _check_signature(spec, model._greedy)
    layers, heads = network(exported).config.model.decoder_layers, network(exported).config.model.heads
    axes = {one.name: one.axes for one in (*spec.inputs, *spec.outputs)}
    assert axes["chosen_ids"] == axes["chosen_log_probabilities"] == ("step", "batch")
    assert axes["cross_attention"] == ("step", "batch", layers * heads, 1, "source")
    assert axes["decoder_attention"] == ("step", "batch", layers * heads, 1, "target")
    assert axes["next.0.key"][2] == "step"
    assert axes["target_ids"] == ("batch", 1)
