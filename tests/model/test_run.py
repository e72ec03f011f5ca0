import re
from pathlib import Path

import pytest

from model.checkpoint import TRAINING
from model.errors import ConfigError
from model.run import RunFolder


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / TRAINING).write_text(name)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def updates(*numbers: int) -> list[str]:
    return [f"update-{number:08d}" for number in numbers]


def test_checkpoints_are_in_the_order_of_their_updates(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for update in (500, 20, 123_456_789, 1_000_000):
        run.checkpoint(update).mkdir()
    (tmp_path / "update-notes.txt").write_text("mine")
    assert [path.name for path in run.checkpoints()] == updates(20, 500, 1_000_000, 123_456_789)
    assert run.newest() == run.checkpoint(123_456_789)


def test_a_folder_that_is_not_there_is_an_empty_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert run.newest() is None
    assert [run.prepare(resume=resume, overwrite=False) for resume in (True, False)] == [None, None]
    assert not run.path.exists()


@pytest.mark.parametrize("there", ["update-00000004", "final"])
def test_a_run_that_is_there_is_refused(tmp_path: Path, there: str) -> None:
    make(tmp_path, there)
    message = f"{tmp_path} holds a training run already: --resume goes on with it, --overwrite removes it"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        RunFolder(tmp_path).prepare(resume=False, overwrite=False)
    assert left(tmp_path) == [there]


@pytest.mark.parametrize("overwrite", [True, False])
def test_resuming_goes_on_from_the_newest(tmp_path: Path, overwrite: bool) -> None:
    there = [*updates(4, 8), "best"]
    make(tmp_path, *there)
    run = RunFolder(tmp_path)
    assert run.prepare(resume=True, overwrite=overwrite) == run.checkpoint(8)
    assert left(tmp_path) == sorted(there)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, *updates(4, 8), "best", "final", "events", "notes")
    assert RunFolder(tmp_path).prepare(resume=False, overwrite=True) is None
    assert left(tmp_path) == ["notes"]


@pytest.mark.parametrize(
    ("there", "kept"),
    [
        ([".best.77.tmp"], []),
        (["best", ".best.77.tmp"], ["best"]),
        (["best", ".best.77.old"], ["best"]),
        ([".best.77.old", ".best.77.tmp"], ["best"]),
        ([".update-00000004.77.old", "update-00000008"], updates(4, 8)),
    ],
    ids=" ".join,
)
def test_what_a_kill_left_is_cleared_and_what_it_took_away_is_back(
    tmp_path: Path, there: list[str], kept: list[str]
) -> None:
    make(tmp_path, *there)
    RunFolder(tmp_path).prepare(resume=True, overwrite=False)
    assert left(tmp_path) == kept


@pytest.mark.parametrize(
    ("keep", "average", "found", "kept", "with_state"),
    [
        (2, 3, [4, 8, 12, 16], [8, 12, 16], [12, 16]),
        (3, 2, [4, 8, 12, 16], [8, 12, 16], [8, 12, 16]),
        (1, 1, [4, 8], [8], [8]),
        (5, 5, [4, 8], [4, 8], [4, 8]),
        (1, 4, [4, 8], [4, 8], [8]),
        (3, 3, [4, 6, 8, 10], [4, 8, 10], [4, 8, 10]),
        (3, 3, [4, 5, 6, 7], [4, 7], [4, 7]),
        (2, 2, [4, 8, 9], [8, 9], [8, 9]),
    ],
)
def test_checkpoints_that_nobody_needs_are_dropped(
    tmp_path: Path, keep: int, average: int, found: list[int], kept: list[int], with_state: list[int]
) -> None:
    make(tmp_path, *updates(*found), "best")
    RunFolder(tmp_path).thin(keep, average, every=4)
    assert left(tmp_path) == ["best", *updates(*kept)]
    assert sorted(path.parent.name for path in tmp_path.glob("update-*/*")) == updates(*with_state)
