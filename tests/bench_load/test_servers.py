"""Every server, in a process of its own, answers alike: the whole way of the benchmark, on the reversal model."""

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from bench.load.cells import Cell
from bench.load.options import ServingOptions
from bench.load.servers import Client, LoadError, Running, Server, ServerName, run_tool, share_processors
from bench.load.sweep import LoadOptions, Meter, visit
from bench.load.workload import ModelName, Workload
from bench.serve_load import BUILD
from tests.reversal import Reversal, parts

LOAD = LoadOptions(objective=1.0, deadline=30.0, seconds=0.2, callers=4, first_rate=16, factor=4, most_rates=2)


class FakeClient:
    """A generator that finds nothing."""

    def run(self, mode: str, **arguments: Any) -> dict[str, Any]:  # noqa: ARG002
        return {}


def interpreter(name: ServerName) -> Path:
    if name is ServerName.LIMELIGHT:
        return Path(sys.executable)
    python = BUILD / f"{name}-environment" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"{python} is not there: `make bench-load` makes it")
    return python


def measured(name: ServerName, reversal: Reversal, folder: Path, beam: int) -> list[Cell]:
    python, model = interpreter(name), reversal.bundle
    if name is ServerName.CTRANSLATE2:
        model = folder / "ctranslate2"
        run_tool(python, "bench.load.convert", str(reversal.checkpoint), str(model), "fp32")
    server = Server(name=name, python=python, model=model, options=ServingOptions(beam=beam, longest=20))
    workload = Workload(ModelName.RANDOM, folder, reversal.checkpoint, parts()["test"][:20], 20)
    return visit(server, workload, LOAD, share_processors(0), 0, lambda _: None)


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("name", list(ServerName))
def test_a_server_is_measured_and_right(name: ServerName, beam: int, reversal: Reversal, tmp_path: Path) -> None:
    cells = measured(name, reversal, tmp_path, beam)
    assert [(cell.mode, cell.load) for cell in cells] == [("closed", 4), ("open", 16), ("open", 64)]
    for cell in cells:
        assert not cell.errors
        assert cell.processor_seconds >= 0
        assert 0 < cell.memory.proportional < cell.memory.peak
    answers = {source: text for cell in cells for source, text in cell.answers.items()}
    right = sum(text == source[::-1] for source, text in answers.items())
    assert right >= 0.9 * len(answers) > 0


def test_a_server_that_ends_is_told_of(tmp_path: Path) -> None:
    server = Server(name=ServerName.LIMELIGHT, python=Path(sys.executable), model=tmp_path, options=ServingOptions())
    log = tmp_path / "log"
    log.touch()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    ended = Running(process, 0, log)
    client = cast("Client", FakeClient())
    meter = Meter(server, ended, client, LOAD, 0, lambda _: None)
    with pytest.raises(LoadError, match="limelight has ended with status 0"):
        meter.closed()


def test_a_server_that_cannot_start_is_told_of(tmp_path: Path) -> None:
    server = Server(
        name=ServerName.LIMELIGHT, python=Path(sys.executable), model=tmp_path / "nothing", options=ServingOptions()
    )
    workload = Workload(ModelName.RANDOM, tmp_path, tmp_path, ["a"], 20)
    with pytest.raises(LoadError, match="named no port"):
        visit(server, workload, LOAD, share_processors(0), 0, lambda _: None)
