"""The manifest says what the graphs are; where it does not, they are refused before anything is run."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from export.manifest import BundleError, Manifest, Precision, TensorSpec
from export.runtime import OnnxStepModel, _dtype
from tests.export.toy import Toy, network
from tests.reversal import Reversal

TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)"}
ROLES = {
    **{name: name for name in ("source_ids", "source_mask", "target_ids", "positions", "new_visible", "past_visible")},
    **{name: name for name in ("next_ids", "top", "top_log_probabilities", "top_ids", "next_log_probabilities")},
    **{f"{family}_attention": f"{family}_attention" for family in ("encoder", "decoder", "cross")},
    **{f"want_{family}_attention": "wanted" for family in ("encoder", "decoder", "cross")},
    "memory": "memory",
    "state": "state",
    "next": "state",
}
"""Role of each tensor, by its name up to the first dot."""


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_the_manifest_says_what_the_session_takes_and_gives(
    exported: Toy | Reversal, graph: str, precision: Precision
) -> None:
    spec = getattr(exported.manifest.graphs[precision], graph)
    session = ort.InferenceSession(exported.bundle / spec.file, providers=["CPUExecutionProvider"])
    for specs, values in ((spec.inputs, session.get_inputs()), (spec.outputs, session.get_outputs())):
        assert [signature(one) for one in specs] == [(one.name, one.type, list(one.shape)) for one in values]
        assert {one.name: one.role for one in specs} == {one.name: ROLES[one.name.split(".")[0]] for one in values}
        assert len({one.name for one in specs}) == len(specs)


def signature(spec: TensorSpec) -> tuple[str, str, list[Any]]:
    return spec.name, TYPES[spec.dtype], list(spec.axes)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_feeds_what_is_there_and_of_the_same_kind(exported: Toy | Reversal, precision: Precision) -> None:
    encoder, decoder = exported.manifest.graphs[precision].encoder, exported.manifest.graphs[precision].decoder
    inputs = {spec.name: spec for spec in decoder.inputs}
    layers = network(exported).config.model.decoder_layers
    for spec in (one for one in decoder.outputs if one.role == "state"):
        fed = inputs[str(spec.feeds)]
        assert (fed.role, fed.dtype) == ("state", spec.dtype)
        assert fed.axes == tuple("past" if axis == "query" else axis for axis in spec.axes)
    fed_names = [one.feeds for one in decoder.outputs if one.role == "state"]
    assert fed_names == decoder.names("state")
    assert len(fed_names) == 2 * layers
    for graph in (encoder, decoder):
        outputs = {spec.name: spec for spec in graph.outputs}
        for spec in (one for one in graph.inputs if one.role == "wanted"):
            assert outputs[str(spec.feeds)].role.endswith("_attention")
            assert (spec.dtype, spec.axes) == ("bool", ())
        rest = [one for one in graph.inputs if one.role != "wanted"]
        rest += [one for one in graph.outputs if one.role != "state"]
        assert [one.name for one in rest if one.feeds is not None] == []


def test_the_decoder_takes_the_memory_that_the_encoder_gives(exported: Toy | Reversal) -> None:
    for graphs in exported.manifest.graphs.values():
        given = [signature(one) for one in graphs.encoder.outputs if one.role == "memory"]
        assert given == [signature(one) for one in graphs.decoder.inputs if one.role == "memory"]
        assert len(given) == 2 * network(exported).config.model.decoder_layers


def test_a_state_of_two_types_is_refused(untied: Toy) -> None:
    decoder = untied.manifest.graphs["fp32"].decoder
    state = [spec for spec in decoder.inputs if spec.role == "state"]
    state[0] = state[0].model_copy(update={"dtype": "float16"})
    with pytest.raises(BundleError, match=r"decoder\.onnx: its state is of the types float16, float32: export it"):
        _dtype(decoder, state)
    assert _dtype(decoder, state[:1]) == np.float16
    assert _dtype(decoder, ()) == np.float32


def test_a_precision_that_is_not_there_is_refused(untied: Toy) -> None:
    with pytest.raises(BundleError, match=r"has no precision 'fp16', only fp32, int8$"):
        OnnxStepModel(untied.bundle, untied.manifest, "fp16")


CHANGES: dict[str, tuple[dict[str, object], str]] = {
    "an axis": ({"axes": ("batch", 2)}, r"source_ids is .*\['batch', 'source'\].*, the manifest says .*\['batch', 2\]"),
    "a type": ({"dtype": "float32"}, r"source_ids is .*tensor\(int64\).*, the manifest says .*tensor\(float\)"),
    "a name": ({"name": "ids"}, r"ids is missing, the manifest says .* \(2 differ\)"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_graphs_that_are_not_what_the_manifest_says_are_refused(untied: Toy, what: str) -> None:
    change, message = CHANGES[what]
    with pytest.raises(BundleError, match=rf"^fp32/encoder.onnx: {message}"):
        OnnxStepModel(untied.bundle, changed(untied.manifest, "encoder", "inputs", 0, change), "fp32")


@pytest.mark.parametrize(
    ("side", "index", "change", "message"),
    [
        ("inputs", -1, {"axes": (1,)}, r"want_decoder_attention is .*\[\].*, the manifest says .*\[1\]"),
        ("inputs", 2, {"dtype": "int64"}, r"new_visible is .*tensor\(bool\).*, the manifest says .*tensor\(int64\)"),
        ("outputs", -1, {"axes": ("row", 4, "past", 4)}, r"next\.0\.value is .*'query'.*, the manifest says .*'past'"),
        ("outputs", 1, {"name": "best"}, r"best is missing, the manifest says .* \(2 differ\)"),
    ],
)
def test_a_decoder_that_is_not_what_the_manifest_says_is_refused(
    untied: Toy, side: str, index: int, change: Mapping[str, object], message: str
) -> None:
    with pytest.raises(BundleError, match=rf"^fp32/decoder.onnx: {message}"):
        OnnxStepModel(untied.bundle, changed(untied.manifest, "decoder", side, index, change), "fp32")


def test_a_graph_that_has_more_than_the_manifest_says_is_refused(untied: Toy) -> None:
    values = untied.manifest.model_dump()
    encoder = values["graphs"]["fp32"]["encoder"]
    encoder["inputs"] = encoder["inputs"][:-1]
    with pytest.raises(BundleError, match=r"want_encoder_attention is \(.*\), the manifest says nothing \(1 differ\)"):
        OnnxStepModel(untied.bundle, Manifest.model_validate(values), "fp32")


def changed(manifest: Manifest, graph: str, side: str, index: int, change: Mapping[str, object]) -> Manifest:
    """The manifest with one input or output described otherwise."""
    values = manifest.model_dump()
    specs = list(values["graphs"]["fp32"][graph][side])
    specs[index] = {**specs[index], **change}
    values["graphs"]["fp32"][graph][side] = specs
    return Manifest.model_validate(values)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("decoder.onnx", b"no graph", r"decoder\.onnx: ONNX Runtime cannot load it: .*INVALID_PROTOBUF"),
        ("weights.bin", b"too short", r"encoder\.onnx: ONNX Runtime cannot load it: .*out of bounds"),
    ],
)
def test_damaged_graphs_are_refused(untied: Toy, tmp_path: Path, file: str, content: bytes, message: str) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(untied.bundle, bundle)
    (bundle / "fp32" / file).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        OnnxStepModel(bundle, untied.manifest, "fp32")
