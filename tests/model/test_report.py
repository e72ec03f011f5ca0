import re
from pathlib import Path

import numpy as np
import pytest
from tensorboard.summary.writer import event_file_writer

import model.report
from model.config import Cmudict07bData
from model.pairs import CMUDICT_07B_FILES
from model.picture import AttentionPicture
from model.report import Report
from model.train import train
from tests.model.training import bare, events, scalars, tiny_config, write_pairs

pytestmark = pytest.mark.usefixtures("no_shape_checks", "plain_output")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ESCAPE = "\x1b["


@pytest.fixture
def plain_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wish of this machine's as to how output should look."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def terminal(plain_output: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")


def report(folder: Path, done: int = 0, *, enabled: bool = True) -> Report:
    return Report(tiny_config(folder), folder / "events", done, enabled=enabled)


def picture() -> AttentionPicture:
    weights = np.random.default_rng(0).dirichlet(np.ones(3), (1, 2, 2))
    return AttentionPicture(
        family="cross", layers=(0,), heads=(0, 1), rows=("a", "</s>"), columns=("a", "b", "</s>"), weights=weights
    )


def test_a_training_tells_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(write_pairs(tmp_path, "\t\nabc\t\n\tabc\nabcdeabc\ta\na\tabcdeabc\n")), tmp_path / "run")
    output, lines = capsys.readouterr()
    assert output == ""
    assert ESCAPE not in lines
    first, second, *validations, last = lines.splitlines()
    assert first == ("70 training and 20 validation pairs; left out: 3 empty, 2 over 8 source or 8 target tokens")
    assert re.fullmatch(r"5,\d{3} parameters; vocabularies of 9 and 9 tokens", second)
    assert [line.split(":")[0] for line in validations] == ["update 3", "update 6", "update 9", "update 10"]
    measured = r"loss \d\.\d{3}  bleu \d+\.\d{3}  chrf \d+\.\d{3}"
    assert all(re.fullmatch(rf"update \d+: validation {measured}", line) for line in validations)
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/run/final: update 10  chosen \w.*  {measured}", last)


def test_a_training_tells_of_words_that_it_must_not_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = {"train": "READ  R EH D\nOR  AO R\n", "validation": "READ  R IY D\n"}
    for part, text in lines.items():
        (tmp_path / CMUDICT_07B_FILES[part]).write_text(text)  # type: ignore[index]
    data = Cmudict07bData(kind="cmudict-0.7b", folder=tmp_path)
    config = tiny_config(tmp_path, {"updates": 1, "warmup": 1}).model_copy(update={"data": data})
    train(config, tmp_path / "run")
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("1 training and 1 validation pairs; ")
    assert first.endswith(", 1 of sources that are scored")


def test_a_resumed_training_tells_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare(monkeypatch)
    write_pairs(tmp_path)
    train(tiny_config(tmp_path, {"updates": 5}), tmp_path / "run")
    assert "resumed after" not in capsys.readouterr().err
    train(tiny_config(tmp_path), tmp_path / "run", resume=True)
    assert "resumed after update 5" in capsys.readouterr().err.splitlines()


@pytest.mark.usefixtures("terminal")
def test_a_terminal_has_a_bar_and_the_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report(tmp_path, done=4) as shown:
        for update in range(5, 11):
            shown.update(update, 1.5, 0.01, 100)
        shown.validation(10, {"loss": 0.25, "chrf": 12.3456}, None)
        shown.final(tmp_path / "final", {"update": 10, "chosen": "best", "loss": 0.25})
    output, text = capsys.readouterr()
    visible = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert output == ""
    assert ESCAPE in text
    assert re.search(r"tiny .*━.* +10/10 loss - +- tokens/s", visible)
    assert "update 10: validation loss 0.250  chrf 12.346" in visible
    assert f"{tmp_path}/final: update 10  chosen best  loss 0.250" in visible


@pytest.mark.usefixtures("terminal")
def test_the_bar_shows_loss_and_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model.report, "SCALARS_EVERY", 2)
    with report(tmp_path) as shown:
        shown.update(1, 1.0, 0.01, 100)
        shown.update(2, 4.0, 0.01, 200)
    visible = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert re.search(r"2/10 loss 3\.000 +[\d,]+ tokens/s", visible)


@pytest.mark.usefixtures("terminal")
def test_other_processes_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report(tmp_path, enabled=False) as shown:
        shown.update(50, 1.5, 0.01, 100)
        shown.validation(50, {"loss": 0.25}, picture())
        shown.final(tmp_path, {"loss": 0.25})
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "events").exists()


def test_tensorboard_shows_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.report, "SCALARS_EVERY", 2)
    with report(tmp_path) as shown:
        for update, loss, tokens in [(1, 1.0, 100), (2, 4.0, 200), (3, 2.0, 50), (4, 3.0, 50), (5, 9.0, 10)]:
            shown.update(update, loss, update / 8, tokens)
        shown.validation(5, {"loss": 0.5, "wer": 25.0}, picture())
    assert scalars(tmp_path, "train/loss") == {2: 3.0, 4: 2.5}
    assert scalars(tmp_path, "train/learning_rate") == {2: 0.25, 4: 0.5}
    assert scalars(tmp_path, "train/tokens_per_second").keys() == {2, 4}
    assert min(scalars(tmp_path, "train/tokens_per_second").values()) > 0
    assert scalars(tmp_path, "validation/loss") == {5: 0.5}
    assert scalars(tmp_path, "validation/wer") == {5: 25.0}
    [image] = events(tmp_path).Images("validation/cross_attention")
    assert image.step == 5
    assert image.encoded_image_string.startswith(PNG_SIGNATURE)
    assert min(image.width, image.height) > 100


def test_tensorboard_shows_a_resumed_training_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.report, "SCALARS_EVERY", 1)
    # Files of one second are told apart by a number that the whole process counts, and read in the order of names: 9
    # after 10. Two runs of a person never begin in the same second.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for done, loss in ((0, 8.0), (2, 4.0)):
        with report(tmp_path, done) as shown:
            for update in range(done + 1, 5):
                shown.update(update, loss, 0.01, 100)
    assert scalars(tmp_path, "train/loss") == {1: 8.0, 2: 8.0, 3: 4.0, 4: 4.0}


def test_a_run_leaves_its_curves_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.report, "SCALARS_EVERY", 5)
    train(tiny_config(write_pairs(tmp_path), {"validate_every": 5}), tmp_path / "run")
    shown = events(tmp_path / "run").Tags()
    training = {"train/loss", "train/learning_rate", "train/tokens_per_second"}
    assert set(shown["scalars"]) == training | {"validation/loss", "validation/bleu", "validation/chrf"}
    assert shown["images"] == ["validation/cross_attention"]
    for name in shown["scalars"]:
        assert scalars(tmp_path / "run", name).keys() == {5, 10}
    assert [image.step for image in events(tmp_path / "run").Images("validation/cross_attention")] == [5, 10]
