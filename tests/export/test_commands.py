"""`limelight export` and `limelight evaluate`: one set of figures for a model however it is run, and clear refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from export.commands import evaluate, export
from export.manifest import BundleError, read_manifest
from export.verify import VerificationError
from model.errors import CheckpointError, ConfigError, DataError, LimelightError
from tests.export.test_bundle import double_a_weight
from tests.export.toy import Toy, retrace
from tests.reversal import PARTS, Reversal, parts

app = typer.Typer()
app.command("export")(export)
app.command("evaluate")(evaluate)


def run(*arguments: str | Path) -> str:
    """Standard output of a command that succeeds."""
    result = CliRunner(env={"COLUMNS": "300"}).invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def figures(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("evaluate", *arguments, "--json"))
    return found


@pytest.fixture
def data(reversal: Reversal, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the model's data is named relative to, as the current one."""
    monkeypatch.chdir(reversal.folder)
    return reversal.folder


@pytest.fixture
def toy_data(tmp_path: Path) -> tuple[str, ...]:
    """Options that point a toy at some pairs."""
    (tmp_path / "pairs.tsv").write_text("abc\tcba\nxy\tyx\nonly one\teno\n", encoding="utf-8")
    values = ("data.kind=pairs", *(f"data.{part}.tsv={tmp_path / 'pairs.tsv'}" for part in ("train", "validation")))
    return tuple(word for value in values for word in ("--set", value))


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("options", [(), ("--part", "test"), ("--beam-size", "4", "--length-penalty", "0.5")], ids=str)
def test_a_checkpoint_and_its_bundle_have_the_same_figures(reversal: Reversal, options: tuple[str, ...]) -> None:
    of_checkpoint, of_bundle = figures(reversal.checkpoint, *options), figures(reversal.bundle, *options)
    assert of_checkpoint.pop("model") == str(reversal.checkpoint)
    assert of_bundle.pop("model") == str(reversal.bundle)
    assert of_checkpoint == of_bundle
    assert of_bundle["chrf"] > 95
    assert of_bundle["sources"] == PARTS["test" if "test" in options else "validation"]
    assert of_bundle["beam_size"] == (4 if "4" in options else 1)
    assert of_bundle["too_long"] == 0


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_manifest_has_the_same_figures(reversal: Reversal, precision: str) -> None:
    found = figures(reversal.bundle, "--precision", precision)
    assert {metric: found[metric] for metric in ("bleu", "chrf")} == reversal.manifest.provenance.answers[precision]


@pytest.mark.usefixtures("data")
def test_figures_for_people(reversal: Reversal) -> None:
    found = figures(reversal.bundle)
    line = f"BLEU {found['bleu']:.2f}  CHRF {found['chrf']:.2f}  (60 sources; beam 1)\n"
    assert run("evaluate", reversal.bundle) == line
    assert run("evaluate", reversal.bundle, "--limit", "7").endswith("(7 sources; beam 1)\n")


@pytest.mark.parametrize("model", ["checkpoint", "bundle"])
def test_the_data_can_be_elsewhere(reversal: Reversal, model: str) -> None:
    other = figures(getattr(reversal, model), "--set", f"data.validation.tsv={reversal.folder / 'test.tsv'}")
    assert other["sources"] == PARTS["test"]
    assert other["chrf"] > 95


def test_other_pairs_can_be_given(reversal: Reversal, tmp_path: Path) -> None:
    strings = parts()["test"][:5]
    (tmp_path / "pairs.tsv").write_text("".join(f"{s}\t{s[::-1]}\n\n" for s in strings), encoding="utf-8")
    (tmp_path / "source").write_text("".join(f"{s}\n" for s in strings), encoding="utf-8")
    (tmp_path / "target").write_text("".join(f"{s[::-1]}\n" for s in strings), encoding="utf-8")
    of_tsv = figures(reversal.bundle, "--tsv", tmp_path / "pairs.tsv")
    of_files = figures(reversal.bundle, "--source", tmp_path / "source", "--target", tmp_path / "target")
    assert of_tsv == of_files
    assert (of_tsv["sources"], of_tsv["chrf"]) == (5, 100)


def test_answers_are_written_with_their_references(reversal: Reversal, tmp_path: Path) -> None:
    string = parts()["test"][0]
    (tmp_path / "pairs.tsv").write_text(f"{string}\t{string[::-1]}\n{'a' * 30}\tb\n", encoding="utf-8")
    run("evaluate", reversal.bundle, "--tsv", tmp_path / "pairs.tsv", "--output", tmp_path / "answers.tsv")
    rows = (tmp_path / "answers.tsv").read_text(encoding="utf-8").splitlines()
    assert rows == [f"{string}\t{string[::-1]}\t{string[::-1]}", f"{'a' * 30}\t\tb"]


def test_sources_over_the_limit_are_counted(reversal: Reversal, tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text(f"abcd\tdcba\n{'a' * 24}\tb\n{'a' * 23}\tb\n", encoding="utf-8")
    told = run("evaluate", reversal.bundle, "--tsv", tmp_path / "pairs.tsv")
    assert told.endswith("(3 sources, 1 of them too long and answered with nothing; beam 1)\n")


def test_export_writes_a_bundle_and_says_what_it_found(
    untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_data: tuple[str, ...]
) -> None:
    retrace(untied, monkeypatch)
    options = ("--version", "7", "--validation-pairs", "2", *toy_data)
    told = run("export", untied.checkpoint, tmp_path / "bundle", *options)
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.version == "7"
    parity = manifest.provenance.parity
    assert {found["answers"] for found in parity.values()} == {2}
    assert f"{parity['fp32']['cross_attention']:.1e}" in told
    assert "2 of 2" in told
    fp32, int8 = (folder_size(tmp_path / "bundle" / precision) / 1e6 for precision in ("fp32", "int8"))
    assert told.endswith(f"bundle: untied 7, fp32 {fp32:.1f} MB, int8 {int8:.1f} MB; 2 sources decoded\n")


def test_export_adds_the_single_file_when_asked(
    untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_data: tuple[str, ...]
) -> None:
    retrace(untied, monkeypatch)
    run("export", untied.checkpoint, tmp_path / "bundle", "--generate", *toy_data)
    manifest = read_manifest(tmp_path / "bundle")
    assert {"fp32/generate.onnx", "int8/generate.onnx"} <= manifest.files.keys()
    assert manifest.graphs == untied.manifest.graphs


def test_float16_is_written_where_it_is_asked_for(
    untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_data: tuple[str, ...]
) -> None:
    retrace(untied, monkeypatch)
    told = run("export", untied.checkpoint, tmp_path / "bundle", "--fp16", "--validation-pairs", "2", *toy_data)
    assert list(read_manifest(tmp_path / "bundle").graphs) == ["fp32", "int8", "fp16"]
    assert re.search(r"fp16 \d\.\d MB; 2 sources decoded\n$", told)
    found = figures(tmp_path / "bundle", "--precision", "fp16", *toy_data)
    assert found["sources"] == 3


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_failed_export_says_why_and_writes_nothing(
    untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_data: tuple[str, ...]
) -> None:
    retrace(untied, monkeypatch, double_a_weight, only="DecoderGraph")
    with pytest.raises(VerificationError, match="fp32 log_probabilities by"):
        run("export", untied.checkpoint, tmp_path / "bundle", *toy_data)
    assert not (tmp_path / "bundle").exists()


REFUSED: dict[str, tuple[str, type[LimelightError], str]] = {
    "no model": ("evaluate nowhere", CheckpointError, "nowhere: no such checkpoint folder"),
    "no checkpoint to export": ("export nowhere out", CheckpointError, "nowhere: no such checkpoint folder"),
    "a folder of something else": (
        "evaluate .",
        CheckpointError,
        r"not a checkpoint, it has no model\.safetensors, config",
    ),
    "data that is not there": ("evaluate BUNDLE", DataError, r"validation\.tsv: no such file"),
    "data to export that is not there": ("export CHECKPOINT out", DataError, r"validation\.tsv: no such file"),
    "pairs that are not there": ("evaluate BUNDLE --tsv nothing.tsv", DataError, r"nothing\.tsv: no such file"),
    "half of the files": ("evaluate BUNDLE --source a", ConfigError, "give either --source and --target, or --tsv"),
    "both kinds of files": ("evaluate BUNDLE --source a --target b --tsv c", ConfigError, "give either --source and"),
    "another section": (
        "evaluate CHECKPOINT --set model.heads=2",
        ConfigError,
        r"--set model\.heads=2: only values of the data section can be replaced here, data\.KEY=VALUE",
    ),
    "an unknown key": (
        "evaluate BUNDLE --set data.folder=x",
        ConfigError,
        r"--set: data\.pairs\.folder: Extra inputs are not permitted \(got 'x'\)",
    ),
    "int8 of a checkpoint": (
        "evaluate CHECKPOINT --precision int8",
        ConfigError,
        "--precision int8: .*final is no bundle; a checkpoint is run by PyTorch in fp32",
    ),
    "nothing but empty pairs": (
        "evaluate BUNDLE --tsv empty.tsv",
        DataError,
        r"empty\.tsv: no pairs are left of the 2 read",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_said(
    reversal: Reversal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    command, kind, message = REFUSED[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.tsv").write_text("\n\t\n", encoding="utf-8")
    names = {"CHECKPOINT": str(reversal.checkpoint), "BUNDLE": str(reversal.bundle)}
    with pytest.raises(kind, match=message):
        run(*(names.get(word, word) for word in command.split()))
    assert not (tmp_path / "out").exists()


def test_a_damaged_bundle_is_not_evaluated(reversal: Reversal, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text(reversal.manifest.model_dump_json(), encoding="utf-8")
    with pytest.raises(BundleError, match=r"missing, though bundle\.json lists it: the bundle is incomplete"):
        run("evaluate", tmp_path)


@pytest.mark.parametrize("command", ["evaluate", "evaluate --precision int8"])
def test_a_bundle_of_format_1_is_refused_with_the_way_out(reversal: Reversal, tmp_path: Path, command: str) -> None:
    values = json.loads(reversal.manifest.model_dump_json()) | {"format": 1}
    (tmp_path / "bundle.json").write_text(json.dumps(values), encoding="utf-8")
    name, *options = command.split()
    with pytest.raises(BundleError, match=r"bundle\.json: format 1, this version reads 3: export the model again$"):
        run(name, tmp_path, *options)
