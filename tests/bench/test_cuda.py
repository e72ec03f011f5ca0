"""The benchmark of CUDA, as far as a CPU takes it: every way to decode, the table and the file."""

import json
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from bench import cuda
from bench.cuda import SIDES, Effort, Side, main, measure, result_table, save
from bench.decode_models import Prepared, RandomSize, prepare_random
from export.resident import has_cuda

ON_THE_CPU = (
    Side(device="cpu", precision="float32"),
    Side(device="cpu", precision="float32", resident=True),
    Side(device="cpu", precision="float16", resident=True),
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    size = RandomSize(d_model=64, layers=1, vocabulary=300)
    return prepare_random(size, tmp_path_factory.mktemp("cuda"), lambda what: None, peers=False, fp16=True)


def test_every_side_is_measured(prepared: Prepared, tmp_path: Path) -> None:
    told: list[str] = []
    effort = Effort(rounds=4, seconds=0, threads=1)
    rows = measure(prepared, ON_THE_CPU, (1, 65), (1, 2), effort, told.append)
    assert told == [f"{prepared.name}, {batch} together, beam {beam}" for beam in (1, 2) for batch in (1, 65)]
    assert len(rows) == 4 * len(ON_THE_CPU)
    for row in rows:
        assert 0 < row["low"] <= row["tokens_per_second"] <= row["high"]
        assert row["rounds"] == 3  # no time was given, so only the fewest
        assert row["agree"] == 1.0 or row["precision"] == "float16"
    console = Console(width=200, file=sys.stdout)
    with console.capture() as capture:
        console.print(result_table(rows))
    assert "on the device" in capture.get()
    save(tmp_path / "results" / "cuda.json", rows)
    content = json.loads((tmp_path / "results" / "cuda.json").read_text(encoding="utf-8"))
    assert content["rows"] == rows
    assert content["machine"]["versions"]["onnxruntime"]


def test_both_precisions_of_a_gpu_are_measured_with_the_state_on_either_side() -> None:
    assert {(side.precision, side.resident) for side in SIDES if side.device == "cuda"} == {
        (precision, resident) for precision in ("float32", "float16") for resident in (False, True)
    }
    assert [side.precision for side in SIDES if side.device == "cpu"] == ["float32", "int8"]


@pytest.mark.skipif(has_cuda(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "prepare_random", None)
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["--json", str(tmp_path / "cuda.json")])
    assert done.exit_code == 1
    assert done.output.startswith("error: no CUDA device that ONNX Runtime can use: it offers ")
    assert done.output.endswith(
        "install onnxruntime-gpu in place of onnxruntime (pip uninstall onnxruntime; pip install 'limelight[gpu]')\n"
    )
    assert not (tmp_path / "cuda.json").exists()
