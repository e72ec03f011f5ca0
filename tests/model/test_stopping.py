import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import WEIGHTS, average_weights, load_checkpoint
from model.run import RunFolder
from model.train import train
from model.transformer import Transformer
from model.validation import Validation
from tests.model.training import assert_same, at_update, bare, tiny_config, write_pairs

pytestmark = pytest.mark.usefixtures("no_shape_checks", "bare_trainings")

AVERAGE, BEST = "average of 2 checkpoints", "best checkpoint by "


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture
def bare_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    bare(monkeypatch)


def measure(patch: pytest.MonkeyPatch, name: str, *values: float) -> None:
    """Let validations find these values, one after the other."""
    left = iter(values)
    patch.setattr(Validation, "measure", lambda *_: {"loss": 1.0, "bleu": 0.0, name: next(left)})


def updates(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("update-")) for path in RunFolder(folder).checkpoints()]


@pytest.mark.parametrize(
    ("metric", "values", "stopped", "best"),
    [
        ("loss", [5.0, 4.0, 4.5, 4.0], 8, 4),
        ("loss", [5.0, 4.0, 4.5, 3.0, 2.0], 10, 10),
        ("bleu", [1.0, 2.0, 2.0, 1.5], 8, 4),
        ("bleu", [3.0, 2.0, 1.0], 6, 2),
    ],
)
def test_training_stops_when_nothing_gets_better(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metric: str,
    values: list[float],
    stopped: int,
    best: int,
) -> None:
    measure(monkeypatch, metric, *values, 9.0, 9.0)
    config = tiny_config(data, {"metric": metric, "validate_every": 2, "patience": 2, "updates": 10})
    assert train(config, tmp_path / "run")["update"] == stopped
    assert updates(tmp_path / "run")[-1] == stopped
    assert load_checkpoint(tmp_path / "run" / "best").metrics["update"] == best


def test_a_resumed_training_stops_where_it_would_have(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, {"validate_every": 2, "patience": 2})
    measure(monkeypatch, "loss", 5.0, 6.0)
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    measure(monkeypatch, "loss", 5.5, 1.0, 1.0)
    assert train(config, tmp_path / "run", resume=True)["update"] == 6


def test_without_patience_training_never_stops_early(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, "loss", *range(10))
    assert train(tiny_config(data, {"validate_every": 2}), tmp_path / "run")["update"] == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("metric", "average", "best", "chosen"),
    [
        ("loss", 1.0, 2.0, AVERAGE),
        ("loss", 2.0, 1.0, BEST),
        ("loss", 1.0, 1.0, AVERAGE),
        ("bleu", 2.0, 1.0, AVERAGE),
        ("bleu", 1.0, 2.0, BEST),
    ],
)
def test_the_final_model_is_the_better_of_average_and_best(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metric: str,
    average: float,
    best: float,
    chosen: str,
    dtype: torch.dtype,
) -> None:
    measure(monkeypatch, metric, 0.5, average, best)
    name = str(dtype).removeprefix("torch.")
    config = tiny_config(data, {"metric": metric, "validate_every": 10, "final_dtype": name})
    reached = train(config, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert reached["chosen"] == (chosen if chosen == AVERAGE else chosen + metric)
    assert reached[metric] == (average if chosen == AVERAGE else best)
    expected = average_weights(run.checkpoints()[-2:] if chosen == AVERAGE else [run.best])
    assert updates(run.path) == [8, 10]
    assert_same(load_file(run.final / WEIGHTS), {key: weight.to(dtype) for key, weight in expected.items()})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_reported_was_measured_on_what_is_stored(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    used: list[Validation] = []
    measured = Validation.measure

    def measuring(self: Validation, model: Transformer) -> dict[str, float]:
        used.append(self)
        return measured(self, model)

    monkeypatch.setattr(Validation, "measure", measuring)
    reached = train(tiny_config(data, {"final_dtype": dtype}), tmp_path / "run")
    again = measured(used[-1], load_checkpoint(tmp_path / "run" / "final").model)
    assert again == {name: reached[name] for name in again}


@pytest.mark.parametrize(("keep", "average", "kept", "with_state"), [(2, 3, 3, 2), (3, 1, 3, 3), (1, 1, 1, 1)])
def test_checkpoints_are_kept_for_resuming_and_averaging(
    data: Path, tmp_path: Path, keep: int, average: int, kept: int, with_state: int
) -> None:
    train(tiny_config(data, {"checkpoint_every": 2, "keep": keep, "average": average}), tmp_path / "run")
    assert updates(tmp_path / "run") == [4, 6, 8, 10][-kept:]
    found = [path.parent.name for path in sorted((tmp_path / "run").glob("update-*/training.pt"))]
    assert found == [f"update-{update:08d}" for update in [4, 6, 8, 10][-with_state:]]
