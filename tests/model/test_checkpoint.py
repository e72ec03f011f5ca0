import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import (
    CONFIG,
    METRICS,
    SOURCE_TOKENIZER,
    TARGET_TOKENIZER,
    TRAINING,
    WEIGHTS,
    Checkpoint,
    atomic_folder,
    average_weights,
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from model.config import Config
from model.errors import CheckpointError
from tests.model.texts import trained
from tests.model.toy import small_config

SOURCE, TARGET = trained("characters", ["abcde"]), trained("symbols", ["A B C"])


def checkpoint(training: dict[str, Any] | None = None, **choices: object) -> Checkpoint:
    config = Config(name="toy", model=small_config(**choices))
    torch.manual_seed(3)
    return Checkpoint(
        config=config,
        model=build_model(config, SOURCE, TARGET),
        source=SOURCE,
        target=TARGET,
        metrics={"update": 7, "loss": 0.25},
        training=training,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("tied", ["none", "decoder"])
@pytest.mark.parametrize(("dtype", "stored"), [(None, torch.float32), (torch.float16, torch.float16)], ids=str)
def test_what_is_saved_is_loaded(tmp_path: Path, dtype: torch.dtype | None, stored: torch.dtype, tied: str) -> None:
    saved = checkpoint(tied_embeddings=tied)
    save_checkpoint(tmp_path / "best", saved, dtype)
    loaded = load_checkpoint(tmp_path / "best")
    assert loaded.config == saved.config
    assert dict(loaded.metrics) == dict(saved.metrics)
    assert [loaded.source.encode("badx"), loaded.target.encode("B X")] == [SOURCE.encode("badx"), TARGET.encode("B X")]
    assert {weight.dtype for weight in load_file(tmp_path / "best" / WEIGHTS).values()} == {stored}
    expected = dict(saved.model.named_parameters())
    assert dict(loaded.model.named_parameters()).keys() == expected.keys()
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(weight, expected[name].to(stored).float()), name
    assert not loaded.model.training
    assert (loaded.model.decoder.projection.weight is loaded.model.decoder.embedding.tokens.weight) == (tied != "none")


def test_a_folder_holds_what_is_documented(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "runs" / "best", checkpoint())
    files = {WEIGHTS, CONFIG, METRICS, SOURCE_TOKENIZER, TARGET_TOKENIZER}
    assert names(tmp_path / "runs" / "best") == files
    save_checkpoint(tmp_path / "runs" / "update", checkpoint({"update": 7}))
    assert names(tmp_path / "runs" / "update") == files | {TRAINING}
    assert names(tmp_path / "runs") == {"best", "update"}


def test_the_state_of_the_training_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    state = {"update": 7, "best": float("inf"), "optimiser": {"step": torch.tensor(7.0)}}
    save_checkpoint(tmp_path / "update", checkpoint(state))
    assert load_checkpoint(tmp_path / "update").training is None
    assert load_checkpoint(tmp_path / "update", training=True).training == state


def test_a_checkpoint_without_metrics_is_one_all_the_same(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best", checkpoint())
    (tmp_path / "best" / METRICS).unlink()
    assert load_checkpoint(tmp_path / "best").metrics == {}


@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "new"])
def test_a_save_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    if old:
        save_checkpoint(tmp_path / "best", checkpoint())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "best", checkpoint({"update": 8}, heads=2))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ({"best"} if old else set())


def test_a_save_replaces_what_was_there(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best", checkpoint({"update": 8}, heads=2))
    save_checkpoint(tmp_path / "best", checkpoint())
    assert load_checkpoint(tmp_path / "best").config.model.heads == 4
    assert TRAINING not in names(tmp_path / "best")
    assert names(tmp_path) == {"best"}


def test_what_a_killed_save_left_is_in_nobodys_way(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "best") as temporary:
        left = temporary
    left.mkdir()
    (left / "half").write_text("written")
    save_checkpoint(tmp_path / "best", checkpoint())
    assert "half" not in names(tmp_path / "best")
    assert names(tmp_path) == {"best"}


def test_nothing_is_there_before_all_is(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new") as temporary:
        (temporary / "file").write_text("whole")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "file").read_text() == "whole"


def refused(words: str) -> pytest.RaisesExc[CheckpointError]:
    return pytest.raises(CheckpointError, match=f"^{re.escape(words)}")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with refused(f"{tmp_path / 'best'}: no such checkpoint folder"):
        load_checkpoint(tmp_path / "best")


@pytest.mark.parametrize("missing", [(WEIGHTS,), (CONFIG,), (SOURCE_TOKENIZER, TARGET_TOKENIZER)], ids=" ".join)
def test_missing_files_are_named(tmp_path: Path, missing: tuple[str, ...]) -> None:
    save_checkpoint(tmp_path / "best", checkpoint())
    for name in missing:
        (tmp_path / "best" / name).unlink()
    with refused(f"{tmp_path / 'best'}: not a checkpoint, it has no {', '.join(missing)}"):
        load_checkpoint(tmp_path / "best")


def test_training_cannot_go_on_without_its_state(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best", checkpoint())
    with refused(f"{tmp_path / 'best'}: holds no training state, so training cannot go on from it"):
        load_checkpoint(tmp_path / "best", training=True)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def rubbish(content: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in content)


def nothing(_: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, rubbish, nothing])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, METRICS, SOURCE_TOKENIZER, TARGET_TOKENIZER, TRAINING])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    save_checkpoint(tmp_path / "best", checkpoint({"update": 7}))
    path = tmp_path / "best" / name
    path.write_bytes(damage(path.read_bytes()))
    with refused(f"{path}: "):
        load_checkpoint(tmp_path / "best", training=True)


def edit_config(folder: Path, key: str, value: object) -> None:
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    values["model"][key] = value
    (folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value", "file", "words"),
    [
        ("encoder_layers", 3, WEIGHTS, "does not fit its configuration: 12 weights differ, ['encoder.layers.2."),
        ("feed_forward", 20, WEIGHTS, "encoder.layers.0.feed_forward.inner.weight is (24, 16), expected (20, 16)"),
        ("heads", 3, CONFIG, "model: d_model=16 is not divisible by heads=3"),
        ("width", 3, CONFIG, "model.width: Extra inputs are not permitted (got 3)"),
    ],
)
def test_a_configuration_of_another_network_is_refused(
    tmp_path: Path, key: str, value: object, file: str, words: str
) -> None:
    save_checkpoint(tmp_path, checkpoint())
    edit_config(tmp_path, key, value)
    with refused(f"{tmp_path / file}: {words}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [SOURCE_TOKENIZER, TARGET_TOKENIZER])
def test_a_tokenizer_of_another_network_is_refused(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, checkpoint())
    trained("characters", ["abcdefgh"]).save(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: .*\.tokens\.weight is \(\d+, 16\), expected \(12, 16\)"):
        load_checkpoint(tmp_path)


def test_one_table_cannot_serve_two_vocabularies(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint())
    edit_config(tmp_path, "tied_embeddings", "all")
    values = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    values["tokenizer"]["shared"] = True
    (tmp_path / CONFIG).write_text(json.dumps(values), encoding="utf-8")
    with refused(
        f"{tmp_path}: the tokenizers do not fit the configuration: one table cannot hold vocabularies of 9 and 7"
    ):
        load_checkpoint(tmp_path)


def test_weights_are_averaged_over_checkpoints(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        save_file({"a": torch.tensor([1.0, 2.0]) * number, "b": torch.tensor([[0.5 + number]])}, folder / WEIGHTS)
    averaged = average_weights(folders)
    assert {name: weight.tolist() for name, weight in averaged.items()} == {"a": [1.0, 2.0], "b": [[1.5]]}
    assert {weight.dtype for weight in averaged.values()} == {torch.float32}
    assert torch.equal(average_weights(folders[1:2])["a"], torch.tensor([1.0, 2.0]))


def test_an_average_is_not_rounded_on_the_way(tmp_path: Path) -> None:
    values = [1.0, 2.0**-30, -1.0, 2.0**-30]
    folders = [tmp_path / str(number) for number in range(4)]
    for folder, value in zip(folders, values, strict=True):
        folder.mkdir()
        save_file({"a": torch.tensor([value])}, folder / WEIGHTS)
    assert average_weights(folders)["a"].item() == 2.0**-31


def test_a_damaged_file_is_not_averaged(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"rubbish")
    with refused(f"{tmp_path / WEIGHTS}: cannot be read: "):
        average_weights([tmp_path])
