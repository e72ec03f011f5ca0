"""float16 graphs: half the bytes, what is masked exactly zero, and values within what is stated."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.halve import halve, halve_specs
from export.manifest import BundleError, TensorSpec, check_files, read_manifest
from export.verify import METRIC_LOSS, TOLERANCES
from export.verify_generate import generate, open_generate
from model.forced import score
from model.grid import Grid
from model.search import SearchOptions, search
from model.steps import Array
from tests.export.case import LENGTH, SOURCES, ask, case_of
from tests.export.test_generate import some_sources
from tests.export.toy import Toy

POSITIONS = np.arange(LENGTH)[None].repeat(len(SOURCES), 0)


def load(toy: Toy, graph: str, precision: str = "fp16") -> onnx.ModelProto:
    return onnx.load(toy.bundle / precision / f"{graph}.onnx")


def test_only_who_asks_for_it_gets_it(halved: Toy, untied: Toy) -> None:
    assert set(untied.manifest.graphs) == {"fp32", "int8"}
    manifest = read_manifest(halved.bundle)
    assert set(manifest.graphs) == {"fp32", "int8", "fp16"}
    check_files(halved.bundle, manifest)


def test_the_weights_are_half_as_large(halved: Toy) -> None:
    fp32, fp16 = ((halved.bundle / precision / "weights.bin").stat().st_size for precision in ("fp32", "fp16"))
    assert fp16 < 0.6 * fp32
    for graph in ("encoder", "decoder", "generate"):
        for tensor in load(halved, graph).graph.initializer:
            assert tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2, tensor.name


def test_what_is_remembered_is_float16_and_all_else_float32(halved: Toy) -> None:
    graphs = halved.manifest.graphs["fp16"]
    for spec in (*graphs.encoder.inputs, *graphs.encoder.outputs, *graphs.decoder.inputs, *graphs.decoder.outputs):
        assert (spec.dtype == "float16") == (spec.role in ("memory", "state")), spec.name
        assert spec.dtype in ("float16", "float32", "int64", "bool")
    model = case_of(halved, "fp16").onnx
    assert model.dtype == np.float16
    assert case_of(halved).onnx.dtype == np.float32


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_softmax_angles_and_masks_are_computed_in_float32(halved: Toy, name: str) -> None:
    model = onnx.shape_inference.infer_shapes(load(halved, name), strict_mode=True)
    types = {one.name: one.type.tensor_type.elem_type for one in model.graph.value_info}
    types |= {one.name: one.type.tensor_type.elem_type for one in (*model.graph.input, *model.graph.output)}
    types |= {one.name: one.data_type for one in model.graph.initializer}
    found = {
        kind: {types[node.input[0]] for node in model.graph.node if node.op_type == kind}
        for kind in ("Softmax", "LogSoftmax", "Sin", "Cos", "MatMul", "LayerNormalization")
    }
    full, half = {TensorProto.FLOAT}, {TensorProto.FLOAT16}
    assert found["Softmax"] == found["Sin"] == found["Cos"] == full
    assert found["LogSoftmax"] == (full if name == "decoder" else set())
    assert found["MatMul"] == found["LayerNormalization"] == half
    stash = {
        attribute.i
        for node in model.graph.node
        if node.op_type == "LayerNormalization"
        for attribute in node.attribute
        if attribute.name == "stash_type"
    }
    assert stash <= {1}
    lowest = [numpy_helper.to_array(one) for one in model.graph.initializer if not one.dims and one.data_type == 1]
    assert np.finfo(np.float32).min in lowest


def test_rows_of_attention_sum_to_one_and_padding_is_exactly_zero(halved: Toy) -> None:
    case = case_of(halved, "fp16")
    step, encoder = ask(case.onnx, case.memory, case.target_ids, POSITIONS), case.memory.encoder_attention
    assert step.cross_attention is not None
    assert step.decoder_attention is not None
    assert encoder is not None
    assert encoder.dtype == step.cross_attention.dtype == step.decoder_attention.dtype == np.float32
    real = case.source_mask[:, None, None, :, None] & case.source_mask[:, None, None, None, :]
    assert np.count_nonzero(np.where(real, 0, encoder)) == 0
    np.testing.assert_allclose(encoder.sum(-1), np.broadcast_to(real.any(-1), encoder.shape[:-1]), atol=1e-5)
    assert np.count_nonzero(np.where(case.source_mask[:, None, None, None], 0, step.cross_attention)) == 0
    np.testing.assert_allclose(step.cross_attention.sum(-1), 1, atol=1e-5)
    assert np.count_nonzero(np.triu(step.decoder_attention[..., 1:], 1)) == 0
    np.testing.assert_allclose(step.decoder_attention.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(np.exp(step.top_log_probabilities).sum(-1), 1, atol=1e-5)


def test_the_manifest_says_how_far_it_is_from_pytorch(halved: Toy) -> None:
    parity, answers = halved.manifest.provenance.parity["fp16"], halved.manifest.provenance.answers
    for output, limit in TOLERANCES["fp16"].items():
        assert TOLERANCES["fp32"][output] < parity[output] <= limit
    for metric, expected in answers["torch"].items():
        assert answers["fp16"][metric] >= expected - METRIC_LOSS[metric]


def test_a_grid_keeps_a_state_of_the_models_type(halved: Toy) -> None:
    model = case_of(halved, "fp16").onnx
    grid = Grid(model, 1)
    grid.join(case_of(halved, "fp16").memory, range(len(SOURCES)))
    column = np.full((len(SOURCES), 1), 2)
    for _ in range(20):
        step = grid.step(column, np.zeros_like(column), column, 1)
        assert {tensor.dtype for tensor in step.state} == {np.dtype(np.float16)}


def test_a_given_target_is_scored_as_pytorch_does(halved: Toy) -> None:
    case = case_of(halved, "fp16")
    targets = [row.tolist() for row in case.target_ids]
    sources = [row[:length].tolist() for row, length in zip(case.source_ids, SOURCES, strict=True)]
    for found, expected in zip(*(score(one, sources, targets) for one in (case.onnx, case.torch)), strict=True):
        np.testing.assert_allclose(
            found.log_probabilities, expected.log_probabilities, rtol=0, atol=TOLERANCES["fp16"]["log_probabilities"]
        )


def test_the_whole_search_in_one_file_answers_as_the_engine(halved: Toy) -> None:
    model, sources = case_of(halved, "fp16").onnx, some_sources(halved, 16, seed=3)
    options = SearchOptions(longest=12, beam_size=4)
    found = generate(open_generate(halved.bundle / "fp16" / "generate.onnx"), sources, options)
    assert found["cross_attention"].dtype == found["log_probabilities"].dtype == np.float32
    expected = search(model, sources, [options] * len(sources))
    equal = [
        found["target_ids"][index][: len(best.tokens)].tolist() == best.tokens for index, [best] in enumerate(expected)
    ]
    assert sum(equal) >= 14


def small(nodes: list[onnx.NodeProto], outputs: list[str], **weights: Array) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", *outputs)]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


MASKED = [
    helper.make_node("MatMul", ["x", "weight"], ["scores"]),
    helper.make_node("Add", ["scores", "mask"], ["hidden"]),
    helper.make_node("Softmax", ["hidden"], ["weights"]),
]
WEIGHT = np.eye(2, dtype=np.float32)
MASK = np.array([[0, np.finfo(np.float32).min]], np.float32)


def test_what_is_as_low_as_only_float32_goes_hides() -> None:
    model = halve(small(MASKED, ["weights"], weight=WEIGHT, mask=MASK), {"x"})
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.array([[-3e4, 3e4]], np.float16)})
    np.testing.assert_array_equal(found, np.array([[1, 0]], np.float32))


def test_a_result_that_two_types_read_is_cast_once() -> None:
    nodes = [*MASKED, helper.make_node("MatMul", ["weights", "weight"], ["y"])]
    nodes += [helper.make_node("MatMul", ["weights", "weight"], ["z"])]
    model = halve(small(nodes, ["weights", "y", "z"], weight=WEIGHT, mask=MASK), {"x", "y", "z"})
    assert [node.op_type for node in model.graph.node].count("Cast") == 2
    assert [one.name for one in model.graph.initializer] == ["mask", "weight_half"]


def test_a_weight_that_is_too_large_is_refused() -> None:
    model = small(MASKED, ["weights"], weight=1e5 * WEIGHT, mask=MASK)
    with pytest.raises(
        BundleError, match=r"^a weight is 100000 \(weight\), the most that float16 takes is 65504: export without"
    ):
        halve(model, {"x"})


@pytest.mark.parametrize(
    ("half", "said"), [({"x", "weights"}, "weights is not computed in float16"), ({"x"}, "y is computed in float16")]
)
def test_an_output_of_another_type_than_it_is_to_have_is_refused(half: set[str], said: str) -> None:
    nodes = [*MASKED, helper.make_node("MatMul", ["weights", "weight"], ["y"])]
    with pytest.raises(RuntimeError, match=f"^{said}$"):
        halve(small(nodes, ["weights", "y"], weight=WEIGHT, mask=MASK), half)


def test_only_what_the_network_remembers_is_halved() -> None:
    specs = [
        TensorSpec(name="memory.0", role="memory", dtype="float32", axes=("batch", 2, "source")),
        TensorSpec(name="carried.0", role="state", dtype="float32", axes=("batch", "past", 4)),
        TensorSpec(name="carried.values", role="state", dtype="float32", axes=("batch", "beam", "age")),
        TensorSpec(name="carried.rows", role="state", dtype="int64", axes=("batch", 4)),
        TensorSpec(name="score", role="score", dtype="float32", axes=("batch", 2)),
    ]
    found = {spec.name for spec in halve_specs(specs) if spec.dtype == "float16"}
    assert found == {"memory.0", "carried.0"}
