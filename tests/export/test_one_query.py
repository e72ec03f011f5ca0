"""A decoder made simpler for one new position of each sentence gives what it gave."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, parser

from export.one_query import Grown, attend_once, drop_transposes, for_one_query
from export.runtime import RuntimeOptions
from model.steps import Array

BATCH, HEADS, PAST, WIDTH = 3, 2, 5, 4
STATES = {
    "state.key": Grown("next.key", "whole.key", 2, 4),
    "state.value": Grown("next.value", "whole.value", 2, 4),
}

ATTENTION = """
<ir_version: 10, opset_import: ["" : 18]>
decoder (
  float[batch, query, 24] x, float[batch, 2, past, 4] "state.key", float[batch, 2, past, 4] "state.value"
) => (float[batch, query, 8] y, float[batch, 2, query, 4] "next.key", float[batch, 2, query, 4] "next.value")
<int64[1] zero = {0}, int64[1] end = {9223372036854775807}, int64[1] last = {3}, int64[1] one = {1}, int64[1] two = {2},
 int64[2] heads_width = {6, 4}, int64[2] rows = {-1, 8}, int64[1] eight = {8}>
{
  batch_query = Shape <start: int = 0, end: int = 2> (x)
  shape = Concat <axis: int = 0> (batch_query, heads_width)
  heads = Reshape <allowzero: int = 1> (x, shape)
  turned = Transpose <perm: ints = [0, 2, 1, 3]> (heads)
  q, "next.key", "next.value" = Split <axis: int = 1, num_outputs: int = 3> (turned)
  new_turned = Transpose <perm: ints = [0, 1, 3, 2]> ("next.key")
  past_turned = Transpose <perm: ints = [0, 1, 3, 2]> ("state.key")
  past_scores = MatMul (q, past_turned)
  new_scores = MatMul (q, new_turned)
  scores = Concat <axis: int = -1> (past_scores, new_scores)
  weights = Softmax <axis: int = -1> (scores)
  count = Shape <start: int = 2, end: int = 3> ("state.value")
  past_weights = Slice (weights, zero, count, last, one)
  new_weights = Slice (weights, count, end, last, one)
  past_mix = MatMul (past_weights, "state.value")
  new_mix = MatMul (new_weights, "next.value")
  mix = Add (past_mix, new_mix)
  back = Transpose <perm: ints = [0, 2, 1, 3]> (mix)
  y_rows = Reshape (back, rows)
  y_shape = Concat <axis: int = 0> (batch_query, eight)
  y = Reshape <allowzero: int = 1> (y_rows, y_shape)
}
"""


def decoder(text: str = ATTENTION) -> ModelProto:
    """Attention of new positions to a past and to each other."""
    return parser.parse_model(text)


def feeds(past: int = PAST) -> dict[str, Array]:
    random = np.random.default_rng(past)
    shapes = {"x": (BATCH, 1, 24)} | dict.fromkeys(STATES, (BATCH, HEADS, past, WIDTH))
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def run(model: ModelProto, given: dict[str, Array]) -> list[Array]:
    onnx.checker.check_model(model, full_check=True)
    options = RuntimeOptions().session_options()
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    found: list[Array] = session.run(["y", "next.key", "next.value"], given)
    return found


def operators(model: ModelProto) -> list[str]:
    return sorted(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("past", [0, 1, PAST])
def test_what_comes_out_is_what_came_out(past: int) -> None:
    before, after = decoder(), decoder()
    for_one_query(after, STATES)
    for name, grown in STATES.items():
        after.graph.output.append(helper.make_tensor_value_info(grown.whole, TensorProto.FLOAT, [None] * 4))
        assert name in {one for node in after.graph.node for one in node.input}
    for found, expected in zip(run(after, feeds(past)), run(before, feeds(past)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_two_products_and_no_transpose_of_heads_are_left() -> None:
    model = decoder()
    before = operators(model)
    for_one_query(model, STATES)
    after = operators(model)
    assert (before.count("MatMul"), after.count("MatMul")) == (4, 2)
    assert (before.count("Transpose"), after.count("Transpose")) == (4, 1)
    assert (before.count("Slice"), after.count("Slice")) == (2, 0)
    assert len(model.graph.output) == 3


SCORES = "scores = Concat <axis: int = -1> (past_scores, new_scores)"
PAST_CUT = "Slice (weights, zero, count, last, one)"
NEW_CUT = "Slice (weights, count, end, last, one)"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("MatMul (q, new_turned)", "MatMul (turned, new_turned)"),
        (SCORES, SCORES.replace("-1", "2")),
        (SCORES, SCORES.replace("past_scores, new_scores", "new_scores, past_scores")),
        (PAST_CUT, PAST_CUT.replace("zero", "one")),
        (PAST_CUT, PAST_CUT.replace("one)", "two)")),
        (NEW_CUT, NEW_CUT.replace("count", "zero")),
        (NEW_CUT, NEW_CUT.replace("end", "two")),
        (NEW_CUT, NEW_CUT.replace("weights", "scores")),
        ('(new_weights, "next.value")', '(new_weights, "next.key")'),
    ],
)
def test_what_is_something_else_stays(before: str, after: str) -> None:
    """One of the two places is not what it was: it stays, and the other one becomes one product."""
    assert ATTENTION.count(before) == 1
    model = decoder(ATTENTION.replace(before, after))
    for name, grown in STATES.items():
        model.graph.node.append(helper.make_node("Concat", [name, grown.new], [grown.whole], axis=grown.axis))
    attend_once(model.graph, STATES)
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    assert sorted((made["scores"], made["mix"])) in (["Concat", "MatMul"], ["Add", "MatMul"])


@pytest.mark.parametrize(("axis", "step"), [("two", "one"), ("last", "two")])
def test_parts_along_another_axis_or_with_gaps_stay(axis: str, step: str) -> None:
    text = ATTENTION.replace(", last, one)", f", {axis}, {step})")
    assert text != ATTENTION
    model = decoder(text)
    attend_once(model.graph, STATES)
    assert "Add" in operators(model)


def test_a_transpose_that_moves_something_stays() -> None:
    """With two positions, heads and positions change places in memory."""
    model = decoder()
    before = operators(model).count("Transpose")
    sizes = {"heads": [0, 2, 6, 4], "mix": [0, 2, 2, 4], "next.key": [0, 2, 2, 4], "state.key": [0, 2, 0, 4]}
    drop_transposes(model.graph, sizes)
    assert operators(model).count("Transpose") == before
    drop_transposes(model.graph, {})
    assert operators(model).count("Transpose") == before
