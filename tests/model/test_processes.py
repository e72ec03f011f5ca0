"""Two processes under `torchrun` learn what one learns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model.report
from model.batches import bucket
from model.config import Config
from model.processes import Processes, join_processes
from model.run import RunFolder
from model.train import prepare, train
from tests.model.training import ROOT, bare, command, scalars, tiny_config, weights, write_pairs

LOSS, WEIGHTS = 1e-5, 1e-5
"""Largest differences between one process and two, which sum in another order: losses near 2, weights near 1."""

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    data = write_pairs(tmp_path_factory.mktemp("data"))
    # A key's bias changes no attention, so its gradient is rounding alone; Adam would make it as large as any other.
    training = {"tokens_per_batch": 30, "accumulate": 2, "clip_norm": 0.5, "epsilon": 1e-3}
    return tiny_config(data, training, dropout=0.0, attention_dropout=0.0)


@pytest.fixture(scope="module")
def one(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        bare(patch)
        patch.setattr(model.report, "SCALARS_EVERY", 1)
        train(config, folder)
    return folder


@pytest.fixture(scope="module")
def two(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [*launch, *command(config, folder, "--shared", str(folder.parent))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


def test_some_batch_has_no_share_for_the_second_process(config: Config) -> None:
    batches = bucket(prepare(config, ALONE).train.examples, 30, config.training.seed, epoch=0)
    assert min(map(len, batches)) == 1 < max(map(len, batches))


@pytest.mark.parametrize("name", ["train/loss", "train/learning_rate", "validation/loss", "validation/chrf"])
def test_the_curves_are_the_same(one: Path, two: Path, name: str) -> None:
    expected, found = scalars(one, name), scalars(two, name)
    assert len(expected) == (10 if name.startswith("train") else 4)
    assert found == pytest.approx(expected, abs=LOSS)


def test_the_weights_are_the_same(one: Path, two: Path) -> None:
    for name in ("best", "final"):
        expected = weights(one / name)
        for key, weight in weights(two / name).items():
            torch.testing.assert_close(weight, expected[key], atol=WEIGHTS, rtol=0)


def test_the_first_process_alone_writes(one: Path, two: Path) -> None:
    assert [path.name for path in RunFolder(two).checkpoints()] == [path.name for path in RunFolder(one).checkpoints()]
    assert len(list((two / "events").iterdir())) == 1
    assert not list(two.glob(".*"))


def test_what_the_first_process_makes_is_everyones(two: Path) -> None:
    made = [(two.parent / f"shared-{rank}").read_text() for rank in (0, 1)]
    assert made[0] == made[1]
    assert int(made[0]) != os.getpid()


def test_one_process_needs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_processes() as processes:
        assert (processes.rank, processes.world, processes.first) == (0, 1, True)
        assert (processes.total(2.5), processes.agree(3.5), processes.share(lambda: "made")) == (2.5, 3.5, "made")
    assert not torch.distributed.is_initialized()
