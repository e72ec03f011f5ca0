"""What the shipped model learnt from beside the dictionary: pairs of a teacher's making."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from model.checkpoint import load_checkpoint
from model.pairs import CMUDICT_07B_FILES, Part
from model.vocabulary import BEGIN

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints/g2p-en"
PARTS: dict[Part, str] = {"train": "CAT  K AE T\n", "validation": "DOG  D AO G\n", "test": "COW  K AW\n"}


@pytest.fixture(scope="module")
def distil() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distil", ROOT / "recipes/g2p-en/distil.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def split(tmp_path: Path) -> Path:
    for part, text in PARTS.items():
        (tmp_path / CMUDICT_07B_FILES[part]).write_text(text)
    return tmp_path


def run(distil: ModuleType, *arguments: object) -> str:
    grad = torch.is_grad_enabled()
    try:
        found = CliRunner().invoke(distil.app, [str(argument) for argument in arguments])
    finally:
        torch.set_grad_enabled(grad)
    assert found.exit_code == 0, found.output
    return found.output


def test_only_the_training_part_is_handed_to_the_aligner(distil: ModuleType, split: Path) -> None:
    run(distil, "lexicon", split / "made", "--data", split)
    assert (split / "made/train.lex").read_text() == "cat\tK AE T\n"
    assert (split / "made/letters.txt").read_text() == "c a t\n"


def test_pseudo_words_can_be_words_and_are_none_of_the_dictionary(distil: ModuleType, split: Path) -> None:
    (split / "samples").write_text("cat\nlat\ndog\nlat\nbcd\nit\ncow\nrow\n" + "a" * 17 + "\n")
    assert "8 different samples, 2 kept" in run(distil, "words", split / "samples", split / "out", "--data", split)
    assert (split / "out").read_text() == "lat\nrow\n"


def test_candidates_far_below_the_best_are_not_scored(distil: ModuleType, split: Path) -> None:
    candidates = [("lat", "L AE T", -2.0), ("lat", "L AA T", -6.9), ("lat", "L T", -7.1), ("row", "R OW", -9.0)]
    (split / "in").write_text("".join(f"{word}\t{spoken}\t{log_p:.4f}\n" for word, spoken, log_p in candidates))
    run(distil, "score", split / "in", split / "out", CHECKPOINT)
    rows = [line.split("\t") for line in (split / "out").read_text().splitlines()]
    assert [row[:3] for row in rows] == [
        [word, spoken, f"{log_p:.4f}"] for word, spoken, log_p in candidates if log_p != -7.1
    ]
    loaded = load_checkpoint(CHECKPOINT)
    with torch.no_grad():
        source, target = loaded.source.encode_ids(["row"]), loaded.target.encode_ids(["R OW"])
        mask = torch.ones(1, len(source[0]), dtype=torch.bool)
        read = torch.tensor([[BEGIN, *target[0][:-1]]])
        logits = loaded.model.eval()(torch.tensor(source), mask, read).logits[0]
    expected = logits.log_softmax(-1)[torch.arange(len(target[0])), torch.tensor(target[0])].sum()
    assert float(rows[-1][3]) == pytest.approx(float(expected), abs=1e-3)


def test_a_pseudo_word_is_learnt_as_both_models_together_like_it_best(distil: ModuleType, split: Path) -> None:
    rows = [("lat", "L AE T", -2.0, -5.0), ("lat", "L AA T", -4.0, -1.0), ("row", "R OW", -3.0, -9.0)]
    (split / "scored").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    run(distil, "mix", split / "scored", split / "out", "--data", split)
    assert (split / "out").read_text() == "cat\tK AE T\nlat\tL AA T\nrow\tR OW\n"
    (split / "scored").write_text("dog\tD AO G\t-1\t-1\n")
    failed = CliRunner().invoke(distil.app, ["mix", str(split / "scored"), str(split / "out"), "--data", str(split)])
    assert failed.exit_code == 2
    assert "is a word of the dictionary" in failed.output
