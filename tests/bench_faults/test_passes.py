"""Steps of a model under test are told of, held, let through, and answered."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.faults import device
from bench.faults.passes import PATIENCE, Pass, Passes


@pytest.fixture
def passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
    made = Passes(tmp_path / "passes")
    monkeypatch.setenv(device.PLACE, str(made.place))
    yield made
    made.close()


class Model:
    """Takes steps in a thread of its own."""

    def __init__(self, *whats: str) -> None:
        self.done: list[str] = []
        self._whats = whats
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for what in self._whats:
            device.enter(what, [f"text of {what}"])
            self.done.append(what)

    def join(self) -> list[str]:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.done


def test_steps_go_on_and_are_told_of(passes: Passes) -> None:
    assert Model("load", "encode", "step").join() == ["load", "encode", "step"]
    assert [(one.what, one.rows, one.texts) for one in passes.seen] == [
        (what, 1, (f"text of {what}",)) for what in ("load", "encode", "step")
    ]
    assert passes.held == 0


def test_steps_are_held_until_they_are_let(passes: Passes) -> None:
    passes.hold()
    model = Model("load", "encode", "step", "step")
    assert passes.wait_held().what == "encode"
    assert model.done == ["load"]
    passes.let()
    assert passes.wait_held().what == "step"
    assert model.done == ["load", "encode"]
    passes.open()
    assert len(model.join()) == 4


def test_those_before_the_one_that_is_waited_for_are_let_through(passes: Passes) -> None:
    passes.hold(frozenset({"load", "encode", "step"}))
    model = Model("load", "encode", "step")
    assert passes.wait_held(lambda one: one.what == "step").texts == ("text of step",)
    assert model.done == ["load", "encode"]
    passes.open()
    model.join()


def test_a_model_fails_or_dies_as_it_is_told(passes: Passes) -> None:
    died: list[str] = []
    passes.open(lambda one: "fail" if "poison" in one.texts else "die")
    with pytest.raises(RuntimeError, match=device.SECRET):
        device.enter("encode", ["good", "poison"])
    device.enter("encode", ["good"], die=lambda: died.append("here"))
    assert died == ["here"]
    passes.open()
    device.enter("encode", ["poison"])


def test_rows_may_be_told_without_their_texts(passes: Passes) -> None:
    device.enter("step", rows=7)
    assert [(one.rows, one.texts) for one in passes.seen] == [(7, ())]
    assert isinstance(passes.seen[0], Pass)


def test_without_a_runner_steps_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(device.PLACE, raising=False)
    device.enter("step")
    monkeypatch.setenv(device.PLACE, str(tmp_path / "nobody"))
    device.enter("step")
