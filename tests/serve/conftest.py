"""What the tests of the server share: the model, one server of it for those that only ask, and engines without one."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.bundle import ServedModel, load_model
from serve.engine import Engine
from serve.jobs import EngineLimits
from tests.reversal import Reversal, reversal_model
from tests.serve.jobs import MakeEngine
from tests.serve.running import PATIENCE, Running, serving
from tests.serve.shelf import Shelf, shelf_of
from tests.serve.steps import Echo, Gated


@pytest.fixture(scope="session")
def reversal(tmp_path_factory: pytest.TempPathFactory) -> Reversal:
    return reversal_model(tmp_path_factory.getbasetemp() / "reversal")


@pytest.fixture(scope="session")
def served(reversal: Reversal) -> ServedModel:
    return load_model(reversal.bundle, provider="cpu", threads=1)


@pytest.fixture(scope="session")
def running(served: ServedModel) -> Iterator[Running]:
    with serving(served) as server:
        yield server


@pytest.fixture
def gate(served: ServedModel) -> Iterator[Gated]:
    """The model's steps, which wait for the test."""
    gated = Gated(served.steps)
    yield gated
    gated.open()


@pytest.fixture
def gated(served: ServedModel, gate: Gated) -> Iterator[Running]:
    """A server of such steps, with room for two requests in its queue."""
    with serving(dataclasses.replace(served, steps=gate), EngineLimits(queue=2, rows=4)) as server:
        yield server
        gate.open()


@pytest.fixture
def steps() -> Iterator[Gated]:
    gated = Gated(Echo())
    yield gated
    gated.open()


@pytest.fixture
def make_engine(steps: Gated) -> Iterator[MakeEngine]:
    """Engines on the gated steps, stopped at the end."""
    engines: list[Engine] = []

    def make(**limits: int) -> Engine:
        engines.append(Engine(steps, EngineLimits(**limits)))
        return engines[-1]

    yield make
    steps.open()
    for engine in engines:
        assert engine.stop(PATIENCE)


@pytest.fixture
def shelf(reversal: Reversal, tmp_path: Path) -> Iterator[Shelf]:
    root = tmp_path / "models"
    shutil.copytree(reversal.bundle, root / "first")
    with shelf_of(root) as shelf:
        yield shelf
