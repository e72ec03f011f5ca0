import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from model.batches import Example, bucket
from model.checkpoint import build_model, load_checkpoint
from model.errors import CheckpointError, ConfigError, DataError
from model.processes import Processes
from model.train import prepare, train
from tests.model.training import (
    assert_same_run,
    at_update,
    bare,
    tiny_config,
    weights,
    write_pairs,
)

pytestmark = pytest.mark.usefixtures("no_shape_checks", "bare_trainings")

WITHOUT_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture
def bare_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    bare(monkeypatch)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in its folder; not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        bare(patch)
        train(tiny_config(data), folder)
    return folder


def prepared(data: Path) -> list[Example]:
    return prepare(tiny_config(data), Processes(0, 1, torch.device("cpu"))).train.examples


def test_a_run_learns_and_says_what_it_reached(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, {"updates": 60, "validate_every": 20, "checkpoint_every": 20, "schedule": "cosine"})
    reached = train(config, tmp_path / "run")
    assert reached.keys() == {"update", "chosen", "loss", "bleu", "chrf"}
    assert reached["update"] == 60
    assert reached["loss"] < 0.8 * math.log(9), "hardly better than nine tokens equally likely"
    assert reached["loss"] <= load_checkpoint(tmp_path / "run" / "best").metrics["loss"]
    assert dict(load_checkpoint(tmp_path / "run" / "final").metrics) == reached


def test_a_run_repeats_itself_and_another_seed_does_not(data: Path, whole: Path, tmp_path: Path) -> None:
    train(tiny_config(data), tmp_path / "again")
    assert_same_run(tmp_path / "again", whole)
    train(tiny_config(data, {"seed": 2**63 - 1}), tmp_path / "other")
    assert any(
        not torch.equal(weight, weights(whole / "best")[name])
        for name, weight in weights(tmp_path / "other" / "best").items()
    )


def test_bfloat16_learns_nearly_the_same(data: Path, tmp_path: Path) -> None:
    losses = [
        train(tiny_config(data, {"bf16": bf16}, **WITHOUT_DROPOUT), tmp_path / str(bf16))["loss"]
        for bf16 in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


def test_no_two_updates_drop_alike(data: Path, tmp_path: Path) -> None:
    seeds: list[int] = []
    for seed in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            for update in range(1, 6):
                at_update(patch, update, lambda: seeds.append(torch.initial_seed()))
            train(tiny_config(data, {"seed": seed, "updates": 5}), tmp_path / str(seed))
    assert len(set(seeds)) == len(seeds) == 10


def test_a_run_that_is_there_is_not_touched(data: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    message = f"{whole} holds a training run already: --resume goes on with it, --overwrite removes it"
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(tiny_config(data), whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_run_that_is_there_can_be_overwritten(data: Path, whole: Path, tmp_path: Path) -> None:
    train(tiny_config(data, {"updates": 5}, d_model=8), tmp_path / "run")
    train(tiny_config(data), tmp_path / "run", overwrite=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("training", "network", "section"),
    [
        ({"seed": 2}, {}, "training"),
        ({"learning_rate": 0.02}, {}, "training"),
        ({}, {"dropout": 0.3}, "model"),
        ({"keep": 4}, {"heads": 2}, "model, training"),
    ],
)
def test_a_run_is_not_resumed_with_another_configuration(
    data: Path, whole: Path, training: Mapping[str, object], network: dict[str, Any], section: str
) -> None:
    message = f"{whole / 'update-00000010'} was trained with another configuration ({section} differ): resume with"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        train(tiny_config(data, training, **network), whole, resume=True)


def test_a_damaged_checkpoint_is_not_resumed_from(data: Path, tmp_path: Path) -> None:
    train(tiny_config(data, {"updates": 5}), tmp_path / "run")
    path = tmp_path / "run" / "update-00000005" / "training.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: cannot be read: ")):
        train(tiny_config(data, {"updates": 9}), tmp_path / "run", resume=True)


def test_data_that_cannot_be_used_leaves_no_run(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("a\n")
    (tmp_path / "validation.tsv").write_text("a\ta\n")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'train.tsv'}, line 1: 1 columns")):
        train(tiny_config(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


AVERAGE, BEST = "average of 2 checkpoints", "best checkpoint by "


def fresh_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run began with."""
    checkpoint = load_checkpoint(folder)
    torch.manual_seed(checkpoint.config.training.seed)
    network = build_model(checkpoint.config, checkpoint.source, checkpoint.target)
    return {name: weight.data for name, weight in network.named_parameters()}


def test_only_matrices_decay(data: Path, tmp_path: Path) -> None:
    """With an epsilon that leaves nothing of the gradient, a matrix shrinks by rate * decay."""
    training = {"updates": 1, "warmup": 1, "weight_decay": 0.5, "epsilon": 1e9, "learning_rate": 0.1}
    train(tiny_config(data, training), tmp_path / "run")
    learnt, fresh = weights(tmp_path / "run" / "update-00000001"), fresh_weights(tmp_path / "run" / "final")
    for name, weight in fresh.items():
        expected = weight * 0.95 if weight.dim() > 1 else weight
        assert torch.allclose(learnt[name], expected), name


def test_accumulated_batches_are_one_large_batch(data: Path, tmp_path: Path) -> None:
    single = {"updates": 1, "warmup": 1, "clip_norm": 0.0, "epsilon": 1.0, "tokens_per_batch": 10_000}
    count = len(bucket(prepared(data), 70, seed=1, epoch=0))
    train(tiny_config(data, single, **WITHOUT_DROPOUT), tmp_path / "one")
    several = {**single, "tokens_per_batch": 70, "accumulate": count}
    train(tiny_config(data, several, **WITHOUT_DROPOUT), tmp_path / "several")
    one, other = weights(tmp_path / "one" / "update-00000001"), weights(tmp_path / "several" / "update-00000001")
    changed = 0.0
    for name, before in fresh_weights(tmp_path / "one" / "final").items():
        changed = max(changed, (one[name] - before).abs().max().item())
        torch.testing.assert_close(other[name], one[name], atol=1e-6, rtol=0)
    assert count > 3
    assert changed > 1e-4


def begins_with(data: Path, checkpoint: Path, **training: Any) -> Any:
    return tiny_config(data, {"initial": str(checkpoint), **training})


def test_a_run_may_begin_with_the_weights_and_tokenizers_of_another(data: Path, whole: Path, tmp_path: Path) -> None:
    # At so small a rate nothing moves, so what the run ends with is what it began with.
    train(begins_with(data, whole / "best", learning_rate=1e-12, average=1), tmp_path / "run")
    began, ended = load_checkpoint(whole / "best"), load_checkpoint(tmp_path / "run" / "final")
    for name, weight in weights(tmp_path / "run" / "final").items():
        torch.testing.assert_close(weight, weights(whole / "best")[name], rtol=0, atol=1e-6, msg=name)
    assert ended.config.training.initial == whole / "best"
    assert [ended.source.token_text(index) for index in range(len(ended.source))] == [
        began.source.token_text(index) for index in range(len(began.source))
    ]


def test_it_may_begin_with_weights_that_had_other_dropout(data: Path, whole: Path, tmp_path: Path) -> None:
    config = begins_with(data, whole / "best", updates=4)
    train(config.model_copy(update={"model": config.model.model_copy(update=WITHOUT_DROPOUT)}), tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "final").config.model.dropout == 0.0


def test_a_run_that_began_with_weights_is_resumed_from_its_own(data: Path, whole: Path, tmp_path: Path) -> None:
    train(begins_with(data, whole / "best", updates=6), tmp_path / "run")
    reached = train(begins_with(data, whole / "best", updates=8), tmp_path / "run", resume=True)
    assert reached["update"] in {6, 8}
    assert (tmp_path / "run" / "update-00000008").is_dir()


def test_it_does_not_begin_with_another_network(data: Path, whole: Path, tmp_path: Path) -> None:
    config = begins_with(data, whole / "best")
    wider = config.model_copy(update={"model": config.model.model_copy(update={"feed_forward": 40})})
    with pytest.raises(CheckpointError, match=r"initial=.*best: another network, feed_forward=\d+, expected 40"):
        train(wider, tmp_path / "run")
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        train(begins_with(data, tmp_path / "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
