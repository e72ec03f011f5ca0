"""The benchmark itself, on a model so small that it says nothing of speed."""

import os
import statistics
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed: pip install 'limelight[bench]'")

from bench.decode import FULL, QUICK, Effort, choose_grid, main, measure_group, result_table, round_batches
from bench.decode_models import (
    LONGEST,
    SENTENCES,
    Prepared,
    RandomSize,
    check_lengths,
    prepare_random,
    random_checkpoint,
    random_sources,
)
from bench.grid import BenchError, Cell, Group
from bench.worker import Worker
from model.vocabulary import BEGIN, END, PAD

SIZE = RandomSize(d_model=64, layers=1, vocabulary=300)
DEMANDED = {"model", "precision", "sentences", "beam", "attention", "threads", "ours", "peer", "ratio", "limit_share"}
DEMANDED |= {"agree", "ours_memory", "peer_memory", "ratio_low", "ratio_high"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare_random(SIZE, tmp_path_factory.mktemp("bench"), lambda what: None)


def test_a_group_is_measured(prepared: Prepared) -> None:
    group = Group(prepared.name, "float32", 8, 1, 1)
    cells = [Cell(group, "none"), Cell(group, "cross")]
    ticks: list[None] = []
    rows = measure_group(
        group, cells, prepared, Effort(rounds=4, seconds=0, spinning=False), lambda: ticks.append(None)
    )
    assert [row["attention"] for row in rows] == ["none", "cross"]
    assert all(row.keys() >= DEMANDED for row in rows)
    assert [row["agree"] for row in rows] == [1.0, 1.0]
    assert [row["price"] is None for row in rows] == [True, False]
    assert all(row["rounds"] == 3 for row in rows)  # no time was given, so only the fewest
    assert len(ticks) == 3
    for row in rows:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert 0 < row["limit_share"] < 1
        assert row["ours_memory"] > 2e7
        assert row["peer_memory"] > 2e7
    console = Console(width=200, file=sys.stdout)
    with console.capture() as capture:
        console.print(result_table(rows))
    assert prepared.name in capture.get()


@pytest.mark.parametrize("beam", [1, 4])
def test_int8_runs_too(prepared: Prepared, beam: int) -> None:
    group = Group(prepared.name, "int8", 32, beam, 1)
    (row,) = measure_group(group, [Cell(group, "all")], prepared, Effort(rounds=2, seconds=0, spinning=True))
    assert row["price"] is None  # nothing to compare with was measured beside it
    assert row["ours"] > 0
    assert row["peer"] > 0


def test_what_is_prepared_is_not_made_again(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    assert prepare_random(SIZE, prepared.folder, told.append) == prepared
    assert told == []
    summary = prepared.folder / "prepared.json"
    made = summary.stat().st_mtime
    os.utime(summary, (0, 0))  # as if the code had changed since
    monkeypatch.setattr("bench.decode_models.random_checkpoint", _stop)
    with pytest.raises(InterruptedError):
        prepare_random(SIZE, prepared.folder, told.append)
    os.utime(summary, (made, made))


def _stop(_: RandomSize) -> None:
    raise InterruptedError


def test_random_networks_end_by_themselves() -> None:
    checkpoint = random_checkpoint(SIZE)
    assert not checkpoint.model.decoder.projection.weight[[PAD, BEGIN]].any()
    check_lengths(SIZE.name, checkpoint.model, random_sources(SIZE.vocabulary)[:16])
    checkpoint.model.decoder.projection.weight.data[END] = 0
    with pytest.raises(BenchError, match=rf"random-d64-1-1: .* unrealistic lengths, .*{LONGEST}"):
        check_lengths(SIZE.name, checkpoint.model, random_sources(SIZE.vocabulary)[:4])


def test_random_sources_are_of_drawn_lengths() -> None:
    lengths = [len(source) for source in random_sources(10_000)]
    assert len(lengths) == SENTENCES
    assert 15 < statistics.median(lengths) < 25
    assert statistics.pstdev(lengths) > 5
    assert all(source[-1] == END and min(source[:-1]) > END for source in random_sources(10_000))


@pytest.mark.parametrize(("sentences", "batches"), [(1, 12), (8, 4), (32, 2), (64, 1), (5, 4)])
def test_a_round_decodes_full_batches(sentences: int, batches: int) -> None:
    found = round_batches([[index] for index in range(SENTENCES)], sentences)
    assert [len(batch) for batch in found] == [sentences] * batches


def test_axes_are_replaced_and_checked() -> None:
    grid = choose_grid(QUICK, models=["d512"], precisions=None, sentences=[3], threads=[])
    assert (grid.models, grid.sentences, grid.threads) == (("d512",), (3,), QUICK.threads)
    with pytest.raises(BenchError, match="precisions: fp32 is not one of float32, int8"):
        choose_grid(QUICK, precisions=["fp32"])
    with pytest.raises(BenchError, match="sentences: 65 is not from 1 to 64"):
        choose_grid(QUICK, sentences=[65])
    assert len(FULL.groups()) * len(FULL.attention) == 216


def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["--beam", "17", "--json", str(tmp_path / "decode.json")])
    assert done.exit_code == 1
    assert done.output == "error: beams: 17 is not from 1 to 16\n"


def test_a_worker_that_dies_is_named() -> None:
    with Worker(1) as worker, pytest.raises(RuntimeError, match="measurement of the machine: its process ended"):
        worker.ask({"rates": {}})
