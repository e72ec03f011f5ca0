"""Attention that nobody asks for costs nothing: all that only it needs stands in one branch of an If."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from torch import nn

from export.graphs import Exported
from export.manifest import Precision, TensorSpec
from export.onnx_writer import finish
from export.runtime import RuntimeOptions
from model.steps import Family
from tests.export.case import SOURCES, Case, ask, blank, case_of
from tests.export.toy import Toy
from tests.reversal import Reversal

GRAPHS = {"encoder": ("encoder_attention",), "decoder": ("cross_attention", "decoder_attention")}
"""Outputs of each graph that can be switched."""
OFF_AND_ON = (False, True)


@pytest.fixture(params=["fp32", "int8"])
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


def read(exported: Toy | Reversal, precision: Precision, graph: str) -> onnx.GraphProto:
    return onnx.load(exported.bundle / precision / f"{graph}.onnx", load_external_data=False).graph


def switches(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Every If of a graph, by the output that it makes."""
    return {node.output[0]: node for node in graph.node if node.op_type == "If"}


def branch(switch: onnx.NodeProto, name: str) -> onnx.GraphProto:
    found: onnx.GraphProto = next(one.g for one in switch.attribute if one.name == name)
    return found


def needed(nodes: Any, results: set[str]) -> set[str]:
    """What has to be computed for some results, themselves among it."""
    wanted = set(results)
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= {name for name in node.input if name}
            for inner in (one.g for one in node.attribute if one.type == onnx.AttributeProto.GRAPH):
                wanted |= needed(inner.node, {value.name for value in inner.output})
    return wanted


def computed(nodes: Any) -> list[str]:
    """Everything that some nodes make, their branches aside."""
    return [name for node in nodes for name in node.output]


@pytest.mark.parametrize("name", GRAPHS)
def test_each_family_of_attention_has_a_switch_of_its_own(
    exported: Toy | Reversal, precision: Precision, name: str
) -> None:
    graph, spec = read(exported, precision, name), getattr(exported.manifest.graphs[precision], name)
    found = switches(graph)
    assert tuple(sorted(found)) == GRAPHS[name]
    assert {output: list(node.input) for output, node in found.items()} == {
        output: [f"want_{output}"] for output in GRAPHS[name]
    }
    assert {one.feeds: one.name for one in spec.inputs if one.role == "wanted"} == {
        output: f"want_{output}" for output in GRAPHS[name]
    }


@pytest.mark.parametrize("name", GRAPHS)
def test_what_only_attention_needs_stands_inside_its_switch_and_nowhere_else(
    exported: Toy | Reversal, precision: Precision, name: str
) -> None:
    graph = read(exported, precision, name)
    always = {value.name for value in graph.output} - set(GRAPHS[name])
    outside = [node for node in graph.node if node.op_type != "If"]
    for node in outside:
        assert set(node.output) & needed(outside, always), f"{node.name or node.op_type} runs for attention alone"
    made = computed(outside)
    for output, switch in switches(graph).items():
        inside = branch(switch, "then_branch")
        assert [value.name for value in inside.output] == [output]
        assert set(computed(inside.node)) <= needed(inside.node, {output})
        made += computed(inside.node)
    assert len(made) == len(set(made)), "something is computed twice"


@pytest.mark.parametrize("name", GRAPHS)
def test_the_switches_hold_what_the_trace_computes_for_attention_alone(tied: Toy, untied: Toy, name: str) -> None:
    for toy in (tied, untied):
        traced = onnx.ModelProto.FromString(toy.traced[f"{name.title()}Graph"]).graph
        results = {value.name for value in traced.output}
        found = switches(read(toy, "fp32", name))
        for output in GRAPHS[name]:
            rest = needed(traced.node, results - {output})
            alone = [one for one in computed(traced.node) if one not in rest]
            assert computed(branch(found[output], "then_branch").node) == alone
            assert alone[-1] == output


@pytest.mark.parametrize("name", GRAPHS)
def test_a_switch_that_is_off_makes_nothing_of_nothing(
    exported: Toy | Reversal, precision: Precision, name: str
) -> None:
    for switch in switches(read(exported, precision, name)).values():
        (node,) = branch(switch, "else_branch").node
        assert (node.op_type, list(node.input)) == ("Constant", [])
        assert set(node.attribute[0].t.dims) == {0}


def feeds_of(case: Case, name: str) -> dict[str, Any]:
    """What both graphs take but for the switches."""
    memory = case.memory
    if name == "encoder":
        return {"source_ids": case.source_ids, "source_mask": case.source_mask}
    ids = case.target_ids[:, :3]
    spec = case.onnx.graphs.decoder
    return {
        "target_ids": ids,
        "positions": np.full_like(ids, 4),
        "new_visible": np.eye(3, dtype=bool)[None].repeat(len(SOURCES), 0),
        "past_visible": np.random.default_rng(9).random((*ids.shape, 5)) < 0.5,
        "next_ids": ids,
        "source_mask": case.source_mask,
        "top": np.array([4]),
        **dict(zip((one.name for one in spec.inputs if one.role == "memory"), memory.tensors, strict=True)),
        **dict(
            zip(
                (one.name for one in spec.inputs if one.role == "state"),
                blank(case.onnx, len(SOURCES), 5, 0.5),
                strict=True,
            )
        ),
    }


@pytest.mark.parametrize("name", GRAPHS)
def test_off_leaves_one_output_empty_and_the_others_as_they_were_to_the_bit(
    exported: Toy | Reversal, precision: Precision, name: str
) -> None:
    options = RuntimeOptions().session_options()
    session = ort.InferenceSession(exported.bundle / precision / f"{name}.onnx", options, ["CPUExecutionProvider"])
    outputs, case = [one.name for one in session.get_outputs()], case_of(exported, precision)
    feeds, found = feeds_of(case, name), dict[tuple[bool, ...], Mapping[str, Any]]()
    for chosen in itertools.product(OFF_AND_ON, repeat=len(GRAPHS[name])):
        wanted = {f"want_{output}": np.array(on) for output, on in zip(GRAPHS[name], chosen, strict=True)}
        found[chosen] = dict(zip(outputs, session.run(outputs, feeds | wanted), strict=True))
    everything = found[(True,) * len(GRAPHS[name])]
    for chosen, values in found.items():
        off = {output for output, on in zip(GRAPHS[name], chosen, strict=True) if not on}
        for output in outputs:
            if output in off:
                assert values[output].shape == (0,) * everything[output].ndim
                assert everything[output].size > 0
            else:
                np.testing.assert_array_equal(values[output], everything[output], err_msg=output)


CHOICES: tuple[frozenset[Family], ...] = (
    frozenset(),
    frozenset({"cross"}),
    frozenset({"decoder"}),
    frozenset({"cross", "decoder"}),
)


@pytest.mark.parametrize("chosen", CHOICES, ids=lambda chosen: "+".join(sorted(chosen)) or "none")
def test_a_step_returns_the_families_that_are_wanted(
    exported: Toy | Reversal, precision: Precision, chosen: frozenset[Family]
) -> None:
    case = case_of(exported, precision)
    ids, positions = case.target_ids, np.arange(6)[None].repeat(len(SOURCES), 0)
    everything, some = (
        ask(case.onnx, case.memory, ids, positions, attention=families) for families in (CHOICES[-1], chosen)
    )
    for family in ("cross", "decoder"):
        found, expected = (getattr(step, f"{family}_attention") for step in (some, everything))
        if family in chosen:
            np.testing.assert_array_equal(found, expected)
        else:
            assert found is None
    for name in ("top_ids", "top_log_probabilities", "next_log_probabilities"):
        np.testing.assert_array_equal(getattr(some, name), getattr(everything, name))
    for left, right in zip(some.state, everything.state, strict=True):
        np.testing.assert_array_equal(left, right)


def test_an_encoder_that_is_not_asked_for_attention_reads_the_same(
    exported: Toy | Reversal, precision: Precision
) -> None:
    case = case_of(exported, precision)
    without = case.onnx.encode(case.source_ids, case.source_mask, attention=False)
    assert without.encoder_attention is None
    assert case.memory.encoder_attention is not None
    for left, right in zip(without.tensors, case.memory.tensors, strict=True):
        np.testing.assert_array_equal(left, right)


def spec(name: Any) -> TensorSpec:
    return TensorSpec(name=name, role=name, dtype="float32", axes=("batch",))


def small(nodes: list[onnx.NodeProto], *outputs: str) -> tuple[onnx.ModelProto, Exported]:
    """A graph of one input and some outputs, with its contract."""
    inputs = (TensorSpec(name="x", role="positions", dtype="float32", axes=("batch",)),)
    contract = Exported(nn.Identity(), (), inputs, tuple(map(spec, outputs)))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"]) for name in ("x", *outputs)]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), contract


def test_what_two_families_share_is_left_for_both() -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["shared"]),
        helper.make_node("Neg", ["shared"], ["cross_attention"]),
        helper.make_node("Sqrt", ["shared"], ["decoder_attention"]),
        helper.make_node("Abs", ["x"], ["next_log_probabilities"]),
    ]
    model, contract = small(nodes, "next_log_probabilities", *GRAPHS["decoder"])
    finish(model, contract)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.array([1, 4], np.float32)
    for cross, decoder in itertools.product(OFF_AND_ON, repeat=2):
        wanted = {"want_cross_attention": np.array(cross), "want_decoder_attention": np.array(decoder)}
        _, first, second = session.run(None, {"x": x, **wanted})
        np.testing.assert_allclose(first, -np.exp(x) if cross else [], rtol=1e-6)
        np.testing.assert_allclose(second, np.exp(x / 2) if decoder else [], rtol=1e-6)


def test_attention_that_something_else_is_made_of_is_refused() -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["cross_attention"]),
        helper.make_node("Neg", ["cross_attention"], ["next_log_probabilities"]),
    ]
    with pytest.raises(RuntimeError, match=r"^cross_attention cannot be switched: it is computed for something else"):
        finish(*small(nodes, "next_log_probabilities", "cross_attention"))
