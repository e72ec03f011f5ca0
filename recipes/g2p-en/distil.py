"""Pairs to distil from: pseudo-words, with the pronunciation that a joint n-gram model and a Transformer like best.

    python distil.py lexicon FOLDER                what the aligner and the n-gram estimator read
    python distil.py words SAMPLES WORDS           of sampled letter strings, those that can be words and are not known
    python distil.py score CANDIDATES OUT CHECKPOINT
    python distil.py mix SCORED OUT                each pseudo-word with its best candidate, and the dictionary's lines

`run.sh` says in which order, and what comes between. Only the training part is learnt from; words of the validation and
test parts are left out of the pseudo-words. CANDIDATES are lines of word, pronunciation and ln p of both by the joint
model, the lines of a word one after the other, best first; SCORED are those of them that are likely enough, with
ln p(pronunciation | word) by the Transformer.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

from model.checkpoint import load_checkpoint
from model.config import Cmudict07bData
from model.forced import score as forced
from model.pairs import SCORED, Part, read_pairs
from model.steps import NO_FAMILIES
from model.torch_steps import TorchStepModel

SHORTEST, LONGEST = 3, 16
"""Letters of a pseudo-word."""

VOWELS = re.compile("[aeiouy]")
TOGETHER = 512
"""Candidates scored in one pass."""

NEAR = 5.0
"""How far below the joint model's best, in ln p, a candidate is still scored."""

WEIGHT = 1.0
"""Of the Transformer's ln p beside the joint model's; validation is flat from 0.7 to 2."""

Data = Annotated[Path, typer.Option(help="Folder of the published split.")]
SPLIT = Path("../shared/data/cmudict-0.7b")

app = typer.Typer(no_args_is_help=True, add_completion=False)


def pairs(data: Path, part: Part) -> list[tuple[str, str]]:
    """Words and pronunciations of a part, as training reads it: lines of words that are scored are left out."""
    return [
        (pair.source, pair.target) for pair in read_pairs(Cmudict07bData(kind="cmudict-0.7b", folder=data), part).pairs
    ]


def known_words(data: Path) -> set[str]:
    """Words of all parts: of the parts that are scored nothing but the words is looked at, to leave them out."""
    parts: tuple[Part, ...] = ("train", *SCORED)
    return {word for part in parts for word, _ in pairs(data, part)}


@app.command()
def lexicon(folder: Path, data: Data = SPLIT) -> None:
    """Write FOLDER/train.lex, a word and its pronunciation a line, and FOLDER/letters.txt, a word's letters a line."""
    training = pairs(data, "train")
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train.lex", (f"{word}\t{spoken}" for word, spoken in training))
    write_lines(folder / "letters.txt", (" ".join(word) for word in sorted({word for word, _ in training})))


@app.command()
def words(samples: Path, out: Path, data: Data = SPLIT) -> None:
    """Keep the samples that can be words, once each, without those of the dictionary."""
    known = known_words(data)
    made = dict.fromkeys(samples.read_text(encoding="ascii").split())
    kept = [
        word
        for word in made
        if word not in known and SHORTEST <= len(word) <= LONGEST and VOWELS.search(word) is not None
    ]
    write_lines(out, kept)
    typer.echo(f"{len(made):,} different samples, {len(kept):,} kept")


@app.command()
def score(candidates: Path, out: Path, checkpoint: Path) -> None:
    """Add the Transformer's ln p to each candidate."""
    torch.set_grad_enabled(False)
    loaded = load_checkpoint(checkpoint)
    model, rows = TorchStepModel(loaded.model.eval()), list(near_best(read_rows(candidates)))
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index][0]), len(rows[index][1])))
    found = [0.0] * len(rows)
    for begin in track(range(0, len(order), TOGETHER), "scoring"):
        chosen = order[begin : begin + TOGETHER]
        sources = loaded.source.encode_ids([rows[index][0] for index in chosen])
        targets = loaded.target.encode_ids([rows[index][1] for index in chosen])
        scored = forced(model, sources, targets, attention=NO_FAMILIES)
        for index, hypothesis in zip(chosen, scored, strict=True):
            found[index] = hypothesis.log_probability
    write_lines(out, ("\t".join([*row, f"{value:.4f}"]) for row, value in zip(rows, found, strict=True)))


@app.command()
def mix(scored: Path, out: Path, data: Data = SPLIT) -> None:
    """Write each pseudo-word with the candidate that both models together like best, and the training part's pairs.

    These are learnt from anyway; twice as often they are a quarter, not a seventh, of all that is learnt from.
    """
    lines = pairs(data, "train")
    known = known_words(data)
    for word, group in groupby(read_rows(scored), key=lambda row: row[0]):
        if word in known:
            raise typer.BadParameter(f"{scored}: {word!r} is a word of the dictionary")
        best = max(group, key=lambda row: float(row[2]) + WEIGHT * float(row[3]))
        lines.append((word, best[1]))
    write_lines(out, (f"{word}\t{spoken}" for word, spoken in lines))


def near_best(rows: Iterable[list[str]]) -> Iterator[list[str]]:
    """Candidates that the joint model finds not much less likely than the word's best."""
    for _, group in groupby(rows, key=lambda row: row[0]):
        best, *others = group
        yield best
        yield from (row for row in others if float(row[2]) > float(best[2]) - NEAR)


def read_rows(path: Path) -> Iterator[list[str]]:
    """Columns of each line."""
    with path.open(encoding="ascii") as file:
        for line in file:
            yield line.rstrip("\n").split("\t")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file, a line each."""
    with path.open("w", encoding="ascii") as file:
        file.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    app()
