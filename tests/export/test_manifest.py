"""bundle.json is read strictly, and the files that it lists must be the ones that were exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from export.manifest import BundleError, check_files, read_manifest
from tests.export.toy import Toy

Values = dict[str, Any]


@pytest.fixture
def bundle(untied: Toy, tmp_path: Path) -> Path:
    """A copy of a bundle, to be damaged."""
    return Path(shutil.copytree(untied.bundle, tmp_path / "bundle"))


def rewrite(bundle: Path, change: Callable[[Values], object]) -> None:
    path = bundle / "bundle.json"
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def moved(values: Values, path: str) -> None:
    """The encoder lies, with its checksum, elsewhere."""
    values["graphs"]["fp32"]["encoder"]["file"] = path
    values["files"][path] = values["files"]["fp32/encoder.onnx"]


def in_rows(values: Values) -> None:
    """The decoder's inputs are described as in format 1."""
    decoder = values["graphs"]["fp32"]["decoder"]
    decoder["inputs"] = [
        {"name": "target_ids", "role": "target_ids", "dtype": "int64", "axes": ["row", "new"], "feeds": None},
        {"name": "positions", "role": "positions", "dtype": "int64", "axes": ["row", "new"], "feeds": None},
        {"name": "state_rows", "role": "state_rows", "dtype": "int64", "axes": ["row"], "feeds": None},
    ]


def format_1(values: Values) -> None:
    in_rows(values)
    values["format"] = 1


WRONG: dict[str, tuple[Callable[[Values], object], str]] = {
    "unknown key": (lambda v: v.update(colour="red"), r"colour: Extra inputs are not permitted \(got 'red'\)"),
    "unknown key inside": (
        lambda v: v["limits"].update(longest=3),
        r"limits\.longest: Extra inputs are not permitted \(got 3\)",
    ),
    "missing key": (lambda v: v.pop("limits"), "limits: Field required"),
    "unknown role": (
        lambda v: v["graphs"]["fp32"]["encoder"]["inputs"][0].update(role="magic"),
        r"graphs\.fp32\.encoder\.inputs\.0\.role: Input should be 'source_ids', .* \(got 'magic'\)",
    ),
    "unknown precision": (
        lambda v: v["graphs"].update(fp8=v["graphs"]["fp32"]),
        r"graphs\.fp8\.\[key\]: Input should be",
    ),
    "unknown family": (lambda v: v["attention"].update(sideways={"layers": 1, "heads": 1}), r"attention\.sideways"),
    "older format": (lambda v: v.update(format=0), "format 0, this version reads 3: export the model again"),
    "newer format": (lambda v: v.update(format=4, new={}), "format 4, this version reads 3: export the model again"),
    "no format": (lambda v: v.pop("format"), "format None, this version reads 3: export the model again"),
    "format 1": (format_1, "format 1, this version reads 3: export the model again"),
    "roles of format 1": (
        in_rows,
        r"graphs\.fp32\.decoder\.inputs\.2\.role: Input should be 'source_ids', .* \(got 'state_rows'\)",
    ),
    "path up": (lambda v: moved(v, "../x"), r"'\.\./x' points out of the bundle"),
    "path up inside": (lambda v: moved(v, "fp32/../../x"), r"'fp32/\.\./\.\./x' points out of the bundle"),
    "absolute path": (lambda v: moved(v, "/etc/passwd"), "'/etc/passwd' points out of the bundle"),
    "tokenizer elsewhere": (lambda v: v.update(source_tokenizer="../t"), r"'\.\./t' points out of the bundle"),
    "file elsewhere": (
        lambda v: v["files"].update({"../y": v["files"]["fp32/encoder.onnx"]}),
        r"'\.\./y' points out of the bundle",
    ),
    "no checksum": (lambda v: v["files"].pop("int8/decoder.onnx"), "no checksum for int8/decoder.onnx"),
    "checksum of another kind": (
        lambda v: v["files"]["fp32/encoder.onnx"].update(sha256="d41d8cd98f00b204e9800998ecf8427e"),
        r"files\.fp32/encoder\.onnx\.sha256: String should match pattern .* \(got 'd41d8",
    ),
    "negative size": (
        lambda v: v["files"]["fp32/encoder.onnx"].update(bytes=-1),
        r"files\.fp32/encoder\.onnx\.bytes: .*greater than or equal to 0 \(got -1\)",
    ),
    "alignment of nothing": (lambda v: v.update(alignment={"rows": [1]}), r"alignment\.rows"),
}
"""What is wrong, how it comes to be, and what is said of it."""


def test_a_manifest_comes_back_as_it_was_written(untied: Toy) -> None:
    assert read_manifest(untied.bundle) == untied.manifest


@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_that_breaks_the_schema_is_refused(bundle: Path, what: str) -> None:
    change, message = WRONG[what]
    rewrite(bundle, change)
    with pytest.raises(BundleError, match=rf"bundle/bundle\.json: .*{message}"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 3, "name": "x', "not JSON: Unterminated string"),
        ("", "not JSON: Expecting value"),
        (b'{"name": "\xff"}', "not JSON: 'utf-8' codec can't decode byte 0xff"),
        ("[1]", "config: Input should be a valid dictionary"),
    ],
    ids=["truncated", "empty", "not UTF-8", "a list"],
)
def test_what_is_no_manifest_is_refused(bundle: Path, text: str | bytes, message: str) -> None:
    (bundle / "bundle.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BundleError, match=rf"bundle/bundle\.json: {message}"):
        read_manifest(bundle)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        read_manifest(tmp_path)
    expected = f"{tmp_path}: not a bundle, it has no bundle.json; make one with: limelight export CHECKPOINT {tmp_path}"
    assert str(caught.value) == expected


def test_a_manifest_cannot_be_changed(untied: Toy) -> None:
    with pytest.raises(ValidationError, match="Instance is frozen"):
        untied.manifest.name = "other"  # type: ignore[misc]


def tamper(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def link_out(path: Path) -> None:
    outside = path.parents[2] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "missing, though bundle.json lists it: the bundle is incomplete"),
    "tampered": (
        tamper,
        r"does not match its checksum in bundle\.json \(\d+ bytes, sha256 [0-9a-f]{12}…; expected \d+",
    ),
    "longer": (append, r"does not match its checksum in bundle\.json .*: copy or export the bundle again"),
    "empty": (
        lambda path: path.write_bytes(b""),
        r"does not match its checksum in bundle\.json \(0 bytes, sha256 e3b0c",
    ),
    "a link out": (link_out, "a link that leads out of the bundle"),
    "a folder": (turn_into_folder, "missing, though bundle.json lists it"),
}


@pytest.mark.parametrize("file", ["fp32/encoder.onnx", "int8/weights.bin"])
@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files_are_refused(bundle: Path, what: str, file: str) -> None:
    damage, message = DAMAGE[what]
    damage(bundle / file)
    with pytest.raises(BundleError, match=rf"^{bundle}/{file}: {message}"):
        check_files(bundle, read_manifest(bundle))


def test_a_folder_that_leads_out_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "int8").rename(tmp_path / "int8")
    (bundle / "int8").symlink_to(tmp_path / "int8")
    with pytest.raises(BundleError, match=r"bundle/int8/decoder\.onnx: a link that leads out of the bundle$"):
        check_files(bundle, read_manifest(bundle))


def test_a_link_inside_the_bundle_is_no_harm(bundle: Path) -> None:
    weights = bundle / "fp32" / "weights.bin"
    weights.rename(bundle / "moved.bin")
    weights.symlink_to(bundle / "moved.bin")
    check_files(bundle, read_manifest(bundle))
    tamper(bundle / "moved.bin")
    with pytest.raises(BundleError, match="does not match its checksum"):
        check_files(bundle, read_manifest(bundle))
