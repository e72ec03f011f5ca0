"""Graphs that are not what the manifest says are refused before anything is run."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from export.manifest import BundleError, Manifest
from export.runtime import OnnxStepModel
from tests.export.toy import Toy


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
        OnnxStepModel(untied.bundle, changed_input(untied.manifest, change), "fp32")


def changed_input(manifest: Manifest, change: Mapping[str, object]) -> Manifest:
    """The manifest with its first encoder input described otherwise."""
    values = manifest.model_dump()
    inputs = values["graphs"]["fp32"]["encoder"]["inputs"]
    values["graphs"]["fp32"]["encoder"]["inputs"] = ({**inputs[0], **change}, *inputs[1:])
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
