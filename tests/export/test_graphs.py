"""The ONNX files keep the contract: names, axes, standard operators, and weights that are stored once."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, NodeProto, TensorProto

from export.manifest import Precision
from model.config import ModelConfig
from tests.export.toy import Toy, network
from tests.reversal import Reversal

Axes: TypeAlias = list[str | int]
Signature: TypeAlias = dict[str, tuple[str, Axes]]

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")

BYTES = {TensorProto.INT8, TensorProto.UINT8}


def read(exported: Toy | Reversal, precision: str, graph: str, *, weights: bool = False) -> onnx.ModelProto:
    return onnx.load(exported.bundle / precision / f"{graph}.onnx", load_external_data=weights)


def nodes(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """Every node of a graph, those in the branches of an If among them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from nodes(attribute.g)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and every branch in it."""
    yield graph
    for node in nodes(graph):
        yield from (attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH)


def keys_and_values(prefix: str, count: int, axes: Axes) -> Signature:
    return {f"{prefix}.{layer}.{part}": ("float32", axes) for layer in range(count) for part in ("key", "value")}


def expected_inputs(graph: str, config: ModelConfig) -> Signature:
    source: Signature = {"source_mask": ("bool", ["batch", "source"])}
    if graph == "encoder":
        return {"source_ids": ("int64", ["batch", "source"]), **source, "want_encoder_attention": ("bool", [])}
    heads, width = config.heads, config.head_width
    return {
        "target_ids": ("int64", ["batch", "query"]),
        "positions": ("int64", ["batch", "query"]),
        "new_visible": ("bool", ["batch", "query", "query"]),
        "past_visible": ("bool", ["batch", "query", "past"]),
        "next_ids": ("int64", ["batch", "query"]),
        **source,
        **keys_and_values("memory", config.decoder_layers, ["batch", heads, "source", width]),
        **keys_and_values("state", config.decoder_layers, ["batch", heads, "past", width]),
        "top": ("int64", [1]),
        "want_cross_attention": ("bool", []),
        "want_decoder_attention": ("bool", []),
    }


def expected_outputs(graph: str, config: ModelConfig) -> Signature:
    heads, width = config.heads, config.head_width
    if graph == "encoder":
        return {
            **keys_and_values("memory", config.decoder_layers, ["batch", heads, "source", width]),
            "encoder_attention": ("float32", ["batch", config.encoder_layers, heads, "source", "source"]),
        }
    attention: Axes = ["batch", config.decoder_layers, heads, "query"]
    return {
        "top_log_probabilities": ("float32", ["batch", "query", "top"]),
        "top_ids": ("int64", ["batch", "query", "top"]),
        "next_log_probabilities": ("float32", ["batch", "query"]),
        "cross_attention": ("float32", [*attention, "source"]),
        "decoder_attention": ("float32", [*attention, "target"]),
        **keys_and_values("next", config.decoder_layers, ["batch", heads, "query", width]),
    }


def found(values: Any) -> list[tuple[str, tuple[str, Axes]]]:
    """Name, type and axes, in the order of the graph."""
    return [
        (
            value.name,
            (
                np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)).name,
                [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
            ),
        )
        for value in values
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_inputs_and_outputs_are_named_and_so_are_their_axes(
    exported: Toy | Reversal, graph: str, precision: Precision
) -> None:
    config, read_back = network(exported).config.model, read(exported, precision, graph).graph
    assert found(read_back.input) == list(expected_inputs(graph, config).items())
    assert found(read_back.output) == list(expected_outputs(graph, config).items())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_vocabularies_do_not_leave_the_decoder(exported: Toy | Reversal, precision: Precision) -> None:
    vocabulary = len(network(exported).target)
    outputs = found(read(exported, precision, "decoder").graph.output)
    assert [name for name, (_, axes) in outputs if vocabulary in axes] == []


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_the_manifest_says_what_the_graphs_are(exported: Toy | Reversal, graph: str, precision: Precision) -> None:
    spec = getattr(exported.manifest.graphs[precision], graph)
    read_back = read(exported, precision, graph).graph
    for specs, values in ((spec.inputs, read_back.input), (spec.outputs, read_back.output)):
        assert [(one.name, (one.dtype, list(one.axes))) for one in specs] == found(values)
    assert spec.file == f"{precision}/{graph}.onnx"


def test_each_state_output_feeds_the_input_of_its_layer(exported: Toy | Reversal) -> None:
    decoder = exported.manifest.graphs["fp32"].decoder
    feeds = {spec.name: spec.feeds for spec in decoder.outputs if spec.role == "state"}
    layers = network(exported).config.model.decoder_layers
    assert feeds == {
        f"next.{layer}.{part}": f"state.{layer}.{part}" for layer in range(layers) for part in ("key", "value")
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_only_standard_operators_of_opset_18_are_used(
    exported: Toy | Reversal, graph: str, precision: Precision
) -> None:
    model = read(exported, precision, graph)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert {node.domain for node in nodes(model.graph)} == {""}
    assert not model.functions
    operators = {node.op_type for node in nodes(model.graph)}
    assert {"MatMul", "Softmax", "Where"} <= operators  # attention stays explicit, and in float


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_nothing_of_the_tracing_machine_is_left(exported: Toy | Reversal, graph: str, precision: Precision) -> None:
    model = read(exported, precision, graph)
    assert [node.name for node in nodes(model.graph) if node.doc_string or node.metadata_props] == []
    assert not any(graph.metadata_props or graph.doc_string for graph in graphs(model.graph))
    assert {entry.key for entry in model.metadata_props} <= {"onnx.infer"}  # the quantiser's signature


def places(model: onnx.ModelProto) -> dict[tuple[int, int], TensorProto]:
    """The weights kept outside a graph, by offset and length."""
    outside = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "weights.bin"
            outside[int(entries["offset"]), int(entries["length"])] = tensor
    return outside


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_lie_aligned_in_one_file_without_gaps(exported: Toy | Reversal, precision: Precision) -> None:
    stored = {**places(read(exported, precision, "encoder")), **places(read(exported, precision, "decoder"))}
    end = 0
    for offset, length in sorted(stored):
        assert offset == end + -end % 64
        end = offset + length
    assert end == (exported.bundle / precision / "weights.bin").stat().st_size
    assert end > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_table_that_all_share_is_stored_once(tied: Toy, precision: Precision) -> None:
    shared = places(read(tied, precision, "encoder")).keys() & places(read(tied, precision, "decoder")).keys()
    table = network(tied).model.decoder.embedding.tokens.weight
    size = table.numel() * (4 if precision == "fp32" else 1)
    assert [length for _, length in shared] == [size]


def test_tables_of_their_own_are_not_shared(untied: Toy) -> None:
    encoder, decoder = (places(read(untied, "fp32", graph)) for graph in ("encoder", "decoder"))
    assert encoder
    assert not encoder.keys() & decoder.keys()


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_int8_weights_take_a_quarter(reversal: Reversal, graph: str) -> None:
    full, small = (places(read(reversal, precision, graph)) for precision in PRECISIONS)
    sizes = [sum(length for _, length in stored) for stored in (full, small)]
    assert sizes[1] <= 0.27 * sizes[0], sizes
    assert {tensor.data_type for tensor in small.values()} <= BYTES


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_int8_keeps_no_matrix_in_float(exported: Toy | Reversal, graph: str) -> None:
    full, small = (read(exported, precision, graph, weights=True).graph for precision in PRECISIONS)
    assert matrices(full)
    assert matrices(small) == []
    products = [node for node in nodes(small) if node.op_type in {"MatMul", "Gemm"}]
    floats = {one.name for one in small.initializer if one.data_type == TensorProto.FLOAT}
    assert [node.name for node in products if floats & set(node.input)] == []
    assert sum(one.data_type in BYTES and len(one.dims) == 2 for one in small.initializer) >= len(matrices(full))


def matrices(graph: onnx.GraphProto) -> list[str]:
    """Float constants that are more than a vector."""
    constants = [one for inner in graphs(graph) for one in inner.initializer]
    constants += [attribute.t for node in nodes(graph) for attribute in node.attribute if attribute.HasField("t")]
    return [
        one.name for one in constants if one.data_type == TensorProto.FLOAT and sum(size > 1 for size in one.dims) > 1
    ]
