"""Rewritten graphs: cheaper, and the same."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import export.optimise
from export.bundle import export_bundle
from export.optimise import SMALLEST_VOCABULARY, best_tokens, optimise
from export.quantise import quantise
from export.runtime import RuntimeOptions
from model.steps import Array
from tests.export.toy import PAIRS, Toy, retrace

LIKE = {"EncoderGraph": "source_ids", "DecoderGraph": "target_ids", "SearchStep": "carried.totals"}
TOLERANCE = 5e-5
"""Sums of a product and its bias, and of scaled weights, round otherwise."""


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    session = ort.InferenceSession(
        model.SerializeToString(), RuntimeOptions().session_options(), ["CPUExecutionProvider"]
    )
    return dict(zip((one.name for one in session.get_outputs()), session.run(None, feeds), strict=True))


def random_feeds(model: onnx.ModelProto, seed: int) -> dict[str, Array]:
    """Inputs of a traced graph; every axis of a name has one size."""
    random = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    feeds: dict[str, Array] = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [
            axis.dim_value
            if axis.HasField("dim_value")
            else sizes.setdefault(axis.dim_param, int(random.integers(1, 6)))
            for axis in tensor.shape.dim
        ]
        if tensor.elem_type == TensorProto.INT64:
            feeds[value.name] = np.asarray(random.integers(1, 8, shape))
        elif tensor.elem_type == TensorProto.BOOL:
            feeds[value.name] = np.ones(shape, bool)
        else:
            kind = np.float32 if tensor.elem_type == TensorProto.FLOAT else np.float64
            feeds[value.name] = np.asarray(random.normal(size=shape), kind)
    return feeds


def rewritten(traced: bytes, graph: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    before, after = onnx.ModelProto.FromString(traced), onnx.ModelProto.FromString(traced)
    optimise(after, LIKE[graph])
    onnx.checker.check_model(after, full_check=True)
    return before, after


def weights(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Matrices of weights, and those turned round."""
    found = {one.name: tuple(one.dims) for one in model.graph.initializer if len(one.dims) == 2}
    turned = [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in found]
    return found | {node.output[0]: found[node.input[0]][::-1] for node in turned}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("graph", LIKE)
def test_a_rewritten_graph_gives_the_same(tied: Toy, untied: Toy, graph: str, seed: int) -> None:
    for toy in (tied, untied):
        before, after = rewritten(toy.traced[graph], graph)
        feeds = random_feeds(before, seed)
        expected, found = run(before, feeds), run(after, feeds)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].shape == value.shape
            np.testing.assert_allclose(found[name], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("graph", LIKE)
def test_every_product_with_weights_is_one_of_rows_with_its_bias(tied: Toy, untied: Toy, graph: str) -> None:
    for toy in (tied, untied):
        before, after = rewritten(toy.traced[graph], graph)
        matrices, known = weights(after), onnx.shape_inference.infer_shapes(after, data_prop=True)
        axes = {one.name: len(one.type.tensor_type.shape.dim) for one in known.graph.value_info}
        products = [node for node in after.graph.node if len(node.input) > 1 and node.input[1] in matrices]
        products = [node for node in products if node.op_type in ("MatMul", "Gemm")]
        assert len(products) == sum(
            node.op_type == "MatMul" and node.input[1] in weights(before) for node in before.graph.node
        )
        assert {axes[node.input[0]] for node in products} == {2}
        biases = {tuple(one.dims) for one in after.graph.initializer if len(one.dims) == 1}
        for node in after.graph.node:
            if node.op_type == "Add":  # what is left are residuals, positions and masks
                made = {product.output[0] for product in products if product.op_type == "MatMul"}
                assert not made & set(node.input), f"{node.name} adds a bias of {biases}"


@pytest.mark.parametrize("graph", LIKE)
def test_queries_are_made_scaled(tied: Toy, graph: str) -> None:
    before, after = rewritten(tied.traced[graph], graph)

    def factors(model: onnx.ModelProto) -> int:
        constants = {one.name for one in model.graph.initializer if not one.dims}
        chosen = [node for node in model.graph.node if node.op_type == "Mul" and node.input[1] in constants]
        makers = {name: node.op_type for node in model.graph.node for name in node.output}
        return sum(makers.get(node.input[0]) in ("Transpose", "Split") for node in chosen)

    assert factors(before) > 0
    assert factors(after) == 0


def best(values: Array, top: int, vocabulary: int) -> tuple[Array, Array]:
    nodes = best_tokens("values", "top", ("best_values", "best_ids"), vocabulary)
    graph = helper.make_graph(
        nodes,
        "best",
        [
            helper.make_tensor_value_info("values", TensorProto.FLOAT, ["row", vocabulary]),
            helper.make_tensor_value_info("top", TensorProto.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("best_values", TensorProto.FLOAT, ["row", "top"]),
            helper.make_tensor_value_info("best_ids", TensorProto.INT64, ["row", "top"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    found: dict[str, Any] = run(model, {"values": values, "top": np.array([top])})
    return found["best_values"], found["best_ids"]


@settings(max_examples=40, deadline=None)
@given(
    vocabulary=st.integers(SMALLEST_VOCABULARY - 2, 3 * SMALLEST_VOCABULARY),
    rows=st.integers(1, 5),
    share=st.sampled_from([0.0, 0.001, 0.01, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@example(vocabulary=2053, rows=2, share=1.0, seed=0)  # a prime: no block divides it
@example(vocabulary=2500, rows=3, share=0.004, seed=1)
def test_the_best_by_blocks_are_the_best(vocabulary: int, rows: int, share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.permuted(np.tile(np.linspace(-9, 0, vocabulary, dtype=np.float32), (rows, 1)), axis=1)
    values[random.random(values.shape) < 0.01] = np.finfo(np.float32).min
    top = max(1, round(share * vocabulary))
    found, ids = best(values, top, vocabulary)
    np.testing.assert_array_equal(found, -np.sort(-values, 1)[:, :top])
    np.testing.assert_array_equal(np.take_along_axis(values, ids, 1), found)
    assert all(len(set(row)) == top for row in ids.tolist())


@pytest.mark.parametrize("blocks", [range(71, 72), range(4, 9)], ids=["divided", "filled up"])
def test_a_bundle_may_find_its_best_tokens_by_blocks(
    untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: range
) -> None:
    monkeypatch.setattr(export.optimise, "SMALLEST_VOCABULARY", 2)
    monkeypatch.setattr(export.optimise, "BLOCKS", blocks)
    retrace(untied, monkeypatch)
    manifest, parity = export_bundle(untied.checkpoint, tmp_path / "bundle", PAIRS, fp16=True)
    graph = onnx.load(tmp_path / "bundle" / manifest.graphs["fp32"].decoder.file, load_external_data=False).graph
    found = [node.op_type for node in graph.node]
    assert found.count("TopK") == 2
    assert ("Pad" in found) == all(manifest.target_vocabulary % size for size in blocks)
    assert parity.equal["fp32"] == parity.answers == len(PAIRS)


def test_a_bias_far_larger_than_its_weights_is_kept() -> None:
    """A column of weights that are nearly zero: its bias, counted in their scale, must not overflow."""
    weight = np.full((4, 2), 1e-12, np.float32)
    weight[:, 1] = 0.5
    bias = np.array([3.0, -2.0], np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "weight", "bias"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["row", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["row", 2])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    found = run(quantise(model, {"x": (-1.0, 1.0)}), {"x": x})["y"]
    np.testing.assert_allclose(found, x @ weight + bias, atol=0.02)
