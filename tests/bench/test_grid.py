"""The grid, and a file of results that goes on growing."""

import json
from pathlib import Path

import pytest

from bench.grid import BenchError, Cell, Grid, Group, Results, commit

GRID = Grid(
    models=("a", "b"),
    precisions=("float32", "int8"),
    sentences=(1, 32),
    beams=(1,),
    attention=("none", "cross"),
    threads=(1,),
)
MACHINE = {"processor": "P", "cores": 2, "load_before": 0.5}
VERSIONS = {"onnxruntime": "1"}


def results(path: Path, *, fresh: bool = False, **machine: object) -> Results:
    return Results(path, MACHINE | machine, VERSIONS, ["bench"], fresh=fresh)


def cell(attention: str = "none", sentences: int = 1) -> Cell:
    return Cell(Group("a", "float32", sentences, 1, 1), attention)  # type: ignore[arg-type]


def test_groups_are_all_combinations_but_attention() -> None:
    groups = GRID.groups()
    assert len(groups) == len(set(groups)) == 8
    assert groups[0] == Group("a", "float32", 1, 1, 1)
    assert [each.attention for each in GRID.cells(groups[0])] == ["none", "cross"]


def test_rows_of_several_runs_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "new" / "decode.json"
    first = results(path)
    first.add([cell(sentences=32).columns() | {"ours": 1.0}, cell().columns() | {"ours": 2.0}])
    first.save()
    second = results(path, load_before=9.0)
    second.add([cell("cross").columns() | {"ours": 3.0}, cell().columns() | {"ours": 4.0}])
    second.save()
    content = json.loads(path.read_text())
    assert list(content) == ["machine", "versions", "command", "rows"]
    assert [(row["sentences"], row["attention"], row["ours"]) for row in content["rows"]] == [
        (1, "none", 4.0),
        (1, "cross", 3.0),
        (32, "none", 1.0),
    ]
    assert [path.name for path in path.parent.iterdir()] == ["decode.json"]


def test_what_was_measured_is_known(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    first = results(path)
    first.add([cell().columns()])
    first.save()
    assert results(path).has([cell()])
    assert not results(path).has([cell(), cell("cross")])
    assert not results(path, fresh=True).has([cell()])


def test_rows_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    results(path).save()
    with pytest.raises(BenchError, match=r"another machine.*\(cores differ\).*--fresh"):
        results(path, cores=4)
    with pytest.raises(BenchError, match=r"\(onnxruntime differ\)"):
        Results(path, MACHINE, {"onnxruntime": "2"}, ["bench"])


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    for content in ("{}", "[1]", "nothing"):
        path.write_text(content)
        with pytest.raises(BenchError, match="holds no results of this benchmark"):
            results(path)
        assert path.read_text() == content


def test_the_commit_is_named() -> None:
    assert commit()
