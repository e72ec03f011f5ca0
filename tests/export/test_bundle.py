"""A bundle appears whole and verified, or not at all; what it holds is enough, and tells nothing of the machine."""

import re
import shutil
import sys
import tempfile
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from export.bundle import VERSIONED, export_bundle
from export.manifest import BundleError, check_files, describe_file, read_manifest
from export.verify import METRIC_LOSS, TOLERANCES, VerificationError
from model.errors import CheckpointError
from model.tokenizer import Tokenizer
from tests.export.toy import PAIRS, Toy, network, retrace
from tests.reversal import PARTS, Reversal

FILES = {
    "bundle.json",
    "tokenizer.source.json",
    "tokenizer.target.json",
    *(
        f"{precision}/{file}"
        for precision in ("fp32", "int8")
        for file in ("encoder.onnx", "decoder.onnx", "greedy.onnx", "weights.bin")
    ),
}
SINGLE_FILES = {"fp32/generate.onnx", "int8/generate.onnx"}
"""What comes besides where it is asked for."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def double_a_weight(model: onnx.ModelProto) -> None:
    """Twice the largest float weight of a graph."""
    floats = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT]
    largest = max(floats, key=lambda one: len(one.raw_data))
    largest.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(largest), largest.name))


def test_a_bundle_holds_what_it_lists(exported: Toy | Reversal) -> None:
    manifest = read_manifest(exported.bundle)
    card = {"MODEL_CARD.md"} if (exported.checkpoint / "MODEL_CARD.md").is_file() else set[str]()
    assert contents(exported.bundle).keys() == FILES | SINGLE_FILES | card
    assert manifest.files.keys() == contents(exported.bundle).keys() - {"bundle.json"}
    check_files(exported.bundle, manifest)
    assert manifest == exported.manifest


def test_it_describes_the_model(reversal: Reversal) -> None:
    manifest, config = reversal.manifest, network(reversal).config
    assert (manifest.name, manifest.version, manifest.task) == ("reversal", "1", "text")
    assert (manifest.source_vocabulary, manifest.target_vocabulary) == (12, 12)
    assert manifest.limits.model_dump() == {"longest_source": 24, "longest_target": 20}
    assert {name: (shape.layers, shape.heads) for name, shape in manifest.attention.items()} == {
        "encoder": (2, 2),
        "decoder": (1, 2),
        "cross": (1, 2),
    }
    assert manifest.special_ids.model_dump() == {"pad": 0, "unknown": 1, "begin": 2, "end": 3}
    assert manifest.provenance.data == config.data.model_dump(mode="json")
    assert manifest.provenance.training["update"] == config.training.updates
    assert manifest.provenance.opset == 18
    assert manifest.provenance.versions.keys() == set(VERSIONED)


def test_it_carries_the_figures_of_its_verification(reversal: Reversal) -> None:
    manifest, parity = reversal.manifest, reversal.parity
    assert manifest.provenance.answers == parity.quality
    assert manifest.provenance.answers["fp32"] == manifest.provenance.answers["torch"]
    for precision in ("fp32", "int8"):
        found = manifest.provenance.parity[precision]
        assert found == {
            **parity.differences[precision],
            "answers": PARTS["validation"],
            "equal_answers": parity.equal[precision],
        }
    for output, limit in TOLERANCES["fp32"].items():
        assert parity.differences["fp32"][output] <= limit < parity.differences["int8"][output]


def test_int8_answers_as_well_as_it_must(exported: Toy | Reversal) -> None:
    answers = exported.manifest.provenance.answers
    assert answers["int8"].keys() == answers["torch"].keys() == {"bleu", "chrf"}
    for metric, expected in answers["torch"].items():
        assert answers["int8"][metric] >= expected - METRIC_LOSS[metric]


def test_its_version_is_by_default_that_of_its_weights(tied: Toy) -> None:
    digest = describe_file(tied.checkpoint / "model.safetensors").sha256
    assert tied.manifest.provenance.checkpoint_sha256 == digest
    assert tied.manifest.version == digest[:12]


@pytest.mark.parametrize("side", ["source", "target"])
def test_its_tokenizers_are_the_checkpoints(exported: Toy | Reversal, side: str) -> None:
    text = "hello, 2 abc"
    tokenizers = [
        Tokenizer.load(folder / f"tokenizer.{side}.json") for folder in (exported.bundle, exported.checkpoint)
    ]
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)
    assert len(tokenizers[0]) == len(tokenizers[1])


def test_no_file_holds_a_path_of_this_machine(exported: Toy | Reversal) -> None:
    here = {str(Path(__file__).parents[2]), str(Path.home()), tempfile.gettempdir(), sys.prefix, str(Path.cwd())}
    for name, content in contents(exported.bundle).items():
        found = [path for path in here if re.search(rb"(?<![\w/])" + re.escape(path.encode()) + rb"/\w", content)]
        assert not found, name


def test_the_model_card_travels_with_the_model(untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(untied.checkpoint, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "MODEL_CARD.md").write_text("# Card\n", encoding="utf-8")
    retrace(untied, monkeypatch)
    manifest, _ = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", PAIRS)
    assert (tmp_path / "bundle" / "MODEL_CARD.md").read_text(encoding="utf-8") == "# Card\n"
    assert manifest.files["MODEL_CARD.md"] == describe_file(tmp_path / "bundle" / "MODEL_CARD.md")


def test_one_trace_always_gives_the_same_bytes(untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retrace(untied, monkeypatch)
    export_bundle(untied.checkpoint, tmp_path / "bundle", PAIRS, generate=True)
    assert contents(tmp_path / "bundle") == contents(untied.bundle)


def test_the_single_file_is_left_out_unless_asked_for(
    untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else is another: the graphs beside it are the same to the byte."""
    retrace(untied, monkeypatch)
    manifest, _ = export_bundle(untied.checkpoint, tmp_path / "bundle", PAIRS)
    assert [manifest.graphs[precision].generate for precision in manifest.graphs] == [None, None]
    check_files(tmp_path / "bundle", manifest)
    found, expected = contents(tmp_path / "bundle"), contents(untied.bundle)
    assert found.keys() == FILES
    for name in FILES - {"bundle.json"}:
        assert found[name] == expected[name], name


def test_a_verified_bundle_takes_the_place_of_an_older_one(
    untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(untied.bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "fp16").mkdir()
    (tmp_path / "bundle" / "fp16" / "left.onnx").touch()
    retrace(untied, monkeypatch)
    export_bundle(untied.checkpoint, tmp_path / "bundle", PAIRS, version="2")
    assert contents(tmp_path / "bundle").keys() == FILES
    assert read_manifest(tmp_path / "bundle").version == "2"
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]


@pytest.mark.parametrize("there", ["a folder of something else", "a file"])
def test_what_is_no_bundle_is_not_replaced(untied: Toy, tmp_path: Path, there: str) -> None:
    path = tmp_path / "there" / "thesis.tex" if there.startswith("a folder") else tmp_path / "there"
    path.parent.mkdir(exist_ok=True)
    path.write_text("years of work", encoding="utf-8")
    with pytest.raises(BundleError, match=r"there: is there already and is no bundle: name a new folder, or remove it"):
        export_bundle(untied.checkpoint, tmp_path / "there", PAIRS)
    assert path.read_text(encoding="utf-8") == "years of work"


def test_an_empty_folder_may_be_filled(untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle").mkdir()
    retrace(untied, monkeypatch)
    monkeypatch.chdir(tmp_path)
    export_bundle(untied.checkpoint, Path("bundle"), PAIRS, generate=True)
    assert contents(tmp_path / "bundle") == contents(untied.bundle)


WRONG = {
    "EncoderGraph": r"fp32 log_probabilities by \S+, the limit is 1e-04; fp32 encoder_attention by",
    "DecoderGraph": r"fp32 log_probabilities by \S+, the limit is 1e-04; fp32 decoder_attention by",
}
"""The graph that is changed, and the beginning of what is said of it."""


@pytest.mark.parametrize("graph", WRONG)
def test_graphs_that_differ_from_the_network_are_not_written(
    untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    retrace(untied, monkeypatch, double_a_weight, only=graph)
    with pytest.raises(VerificationError, match=f"^the export differs from the checkpoint: {WRONG[graph]}"):
        export_bundle(untied.checkpoint, tmp_path / "new", PAIRS)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_an_older_bundle_as_it_was(
    untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(untied.bundle, tmp_path / "bundle")
    retrace(untied, monkeypatch, double_a_weight, only="DecoderGraph")
    with pytest.raises(VerificationError, match="differs"):
        export_bundle(untied.checkpoint, bundle, PAIRS)
    assert contents(bundle) == contents(untied.bundle)
    assert list(tmp_path.iterdir()) == [bundle]


def test_without_a_checkpoint_there_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such checkpoint folder$"):
        export_bundle(tmp_path / "nowhere", tmp_path / "bundle", PAIRS)
    assert list(tmp_path.iterdir()) == []
