"""A run that was interrupted and resumed repeats an uninterrupted one, bit for bit on a CPU."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model.config import Config
from model.run import RunFolder
from model.train import train
from tests.model.training import (
    assert_same_run,
    at_save,
    at_update,
    bare,
    held,
    tiny_config,
    weights,
    write_pairs,
)

pytestmark = pytest.mark.usefixtures("no_shape_checks")

KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "accumulated": {"accumulate": 2, "schedule": "cosine"},
}
ONE_KIND = pytest.mark.parametrize("config", ["plain"], indirect=True)


class CrashError(Exception):
    """Ends a training as a fault would."""


def crash() -> None:
    raise CrashError


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module", autouse=True)
def _bare_trainings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        bare(patch)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=KINDS)
def config(request: pytest.FixtureRequest, data: Path) -> Config:
    return tiny_config(data, KINDS[request.param])


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(config, folder)
    return folder


def checkpoints(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("update-")) for path in RunFolder(folder).checkpoints()]


@pytest.mark.parametrize("updates", [(1,), (4,), (7,), (10,), (2, 3, 9)], ids=str)
def test_after_an_interrupt(config: Config, whole: Path, tmp_path: Path, updates: tuple[int, ...]) -> None:
    folder = tmp_path / "run"
    for update in updates:
        with pytest.MonkeyPatch.context() as patch:
            at_update(patch, update, interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(config, folder, resume=True)
        assert checkpoints(folder)[-1] == update
        assert not RunFolder(folder).final.exists()
    train(config, folder, resume=True)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("place", [at_update, at_save])
@pytest.mark.parametrize(("update", "saved"), [(4, []), (8, [4])])
def test_after_a_crash(
    config: Config,
    whole: Path,
    tmp_path: Path,
    place: Callable[[pytest.MonkeyPatch, int, Callable[[], None]], None],
    update: int,
    saved: list[int],
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        place(patch, update, crash)
        with pytest.raises(CrashError):
            train(config, folder)
    assert checkpoints(folder) == saved
    train(config, folder, resume=True)
    assert_same_run(folder, whole)


@ONE_KIND
def test_an_interrupt_from_outside_saves(config: Config, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(config, folder, "update:5") as process:
        process.send_signal(signal.SIGINT)
        process.communicate("go on\n", timeout=60)
    assert process.returncode == -signal.SIGINT
    assert checkpoints(folder) == [4, 5]
    train(config, folder, resume=True)
    assert_same_run(folder, whole)


@ONE_KIND
def test_a_kill_in_the_middle_of_a_save_leaves_what_was_there(config: Config, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(config, folder, "save:8") as process:
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert checkpoints(folder) == [4]
    assert list(folder.glob(".*.tmp"))
    train(config, folder, resume=True)
    assert_same_run(folder, whole)
    assert not list(folder.glob(".*"))


def test_a_finished_run_goes_on_when_its_updates_are_raised(data: Path, tmp_path: Path) -> None:
    short, long = tiny_config(data, {"updates": 5}), tiny_config(data, {"updates": 9})
    train(short, tmp_path / "run")
    train(long, tmp_path / "run", resume=True)
    train(long, tmp_path / "whole")
    assert checkpoints(tmp_path / "run") == [8, 9]
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@ONE_KIND
def test_resuming_a_finished_run_changes_nothing(config: Config, whole: Path) -> None:
    before = weights(RunFolder(whole).final)
    times = {path: path.stat().st_mtime_ns for path in whole.glob("update-*/*")}
    train(config, whole, resume=True)
    assert times == {path: path.stat().st_mtime_ns for path in whole.glob("update-*/*")}
    after = weights(RunFolder(whole).final)
    assert all(weight.equal(before[name]) for name, weight in after.items())
    assert after.keys() == before.keys()
