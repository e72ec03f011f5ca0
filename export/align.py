"""`limelight align`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from export import options
from export.commands import given_pairs, load_decoder
from export.manifest import MANIFEST, read_manifest
from model.align import Gold, Heads, Unit, choose, error_rate, pharaoh, read_gold, read_off, word_attention
from model.config import override_data
from model.errors import ConfigError, DataError
from model.pairs import Pairs, read_pairs, sample_pairs

Units = Annotated[
    Unit | None,
    typer.Option(help="What is aligned.", show_default="tokens with g2p (letters with phonemes), else words"),
]
Layers = Annotated[
    list[int] | None,
    typer.Option("--layer", "-l", metavar="N", show_default="what aligns best, or all", help="From 0; repeatable."),
]
HeadNumbers = Annotated[
    list[int] | None,
    typer.Option("--head", metavar="N", show_default="what aligns best, or all", help="From 0; repeatable."),
]


def align(
    model: options.Model,
    source: options.Source = None,
    target: options.Target = None,
    tsv: options.Tsv = None,
    part: options.Part = "validation",
    settings: options.Settings = None,
    limit: options.Limit = None,
    units: Units = None,
    layers: Layers = None,
    heads: HeadNumbers = None,
    shift: Annotated[
        bool, typer.Option("--shift", help="Read a word off the steps that read it, not those that predict it.")
    ] = False,
    gold: Annotated[
        Path | None, typer.Option(help="File of right links, i-j sure and ipj possible: tell the alignment error rate.")
    ] = None,
    first: Annotated[int, typer.Option(min=0, max=1, help="Number of the first word in it.")] = 0,
    gold_reversed: Annotated[bool, typer.Option("--gold-reversed", help="It has the target's words first.")] = False,
    choosing: Annotated[
        bool, typer.Option("--choose", help="Take the layer and heads with the lowest error rate, and tell them.")
    ] = False,
    precision: options.Precision = "fp32",
    threads: options.Threads = None,
    output: Annotated[Path | None, typer.Option(help="Write the links here.", show_default="standard output")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Tell the figures as JSON.")] = False,
) -> None:
    """Align given pairs, word by word: a line of links i-j for each (Pharaoh format, from 0, source first).

    Each pair goes through the model once, its target given, and each target word is linked to the source word that its
    cross-attention looks at most. Figures are told on standard error.
    """
    given = bool(tsv or source or target)
    _refuse_what_makes_no_sense(given and limit is None, gold, choosing, layers or heads)
    decoder, task, data = load_decoder(model, precision, threads, shortlist=False)
    read = given_pairs(source, target, tsv) if given else read_pairs(override_data(data, settings or ()), part)
    pairs = sample_pairs(read.pairs, limit)
    right = None if gold is None else _right(gold, read, first, reverse=gold_reversed)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task_id = progress.add_task("aligning", total=len(pairs))
        attention = word_attention(
            decoder,
            pairs,
            units=units or ("tokens" if task == "g2p" else "words"),
            shift=shift,
            progress=lambda count: progress.advance(task_id, count),
        )
    if right is not None:
        _refuse_words_that_are_not_there(right, attention, gold)
    if choosing and right is not None:
        chosen = choose(attention, right)
    else:
        chosen = _chosen(model, attention[0].shape, layers or (), heads or ())
    found = [read_off(one, chosen) for one in attention]
    _write("".join(f"{pharaoh(links)}\n" for links in found), output)
    if right is not None or as_json:
        _tell(chosen, len(pairs), shift, None if right is None else error_rate(found, right), as_json=as_json)


def _refuse_what_makes_no_sense(whole: bool, gold: Path | None, choosing: bool, chosen: Sequence[int] | None) -> None:
    if choosing and gold is None:
        raise ConfigError("--choose: needs --gold, by which it chooses")
    if choosing and chosen:
        raise ConfigError("--choose: chooses layer and heads itself; leave out --layer and --head")
    if gold is not None and not whole:
        raise ConfigError("--gold: belongs to given pairs, all of them: name them with --source and --target, or --tsv")


def _write(lines: str, output: Path | None) -> None:
    if output is None:
        typer.echo(lines, nl=False)
    else:
        output.write_text(lines, encoding="utf-8")


def _right(gold: Path, read: Pairs, first: int, *, reverse: bool) -> list[Gold]:
    if read.empty:
        raise DataError(f"{read.empty} pairs are empty on one side: the lines of {gold} cannot be told apart")
    right = read_gold(gold, first=first, reverse=reverse)
    if len(right) != len(read.pairs):
        raise DataError(f"{gold}: has {len(right)} lines for {len(read.pairs)} pairs")
    return right


def _refuse_words_that_are_not_there(right: Sequence[Gold], attention: Sequence[np.ndarray], gold: Path | None) -> None:
    for number, (links, weights) in enumerate(zip(right, attention, strict=True), 1):
        targets, sources = weights.shape[2:]
        for link in sorted(links.possible):
            if link.source >= sources or link.target >= targets:
                raise DataError(
                    f"{gold}, line {number}: links word {link.source} with {link.target} (from 0), and there are "
                    f"{sources} and {targets}; is --first 1 or --gold-reversed missing, or is the text another?"
                )


def _chosen(model: Path, shape: Sequence[int], layers: Sequence[int], heads: Sequence[int]) -> Heads:
    best = read_manifest(model).alignment if (model / MANIFEST).is_file() else None
    if not (layers or heads) and best is not None:
        return Heads(tuple(best["layers"]), tuple(best["heads"]))
    for name, numbers, there in (("layer", layers, shape[0]), ("head", heads, shape[1])):
        if wrong := [number for number in numbers if not 0 <= number < there]:
            raise ConfigError(f"--{name} {wrong[0]}: does not exist, there are 0 to {there - 1}")
    return Heads(tuple(layers) or tuple(range(shape[0])), tuple(heads) or tuple(range(shape[1])))


def _tell(chosen: Heads, pairs: int, shift: bool, rate: float | None, *, as_json: bool) -> None:
    figures: dict[str, Any] = {"layers": chosen.layers, "heads": chosen.heads, "shift": shift, "pairs": pairs}
    if as_json:
        typer.echo(json.dumps(figures | ({} if rate is None else {"aer": rate})), err=True)
        return
    heads = " ".join([*(f"--layer {layer}" for layer in chosen.layers), *(f"--head {head}" for head in chosen.heads)])
    typer.echo(f"AER {rate:.2f}  ({pairs:,} pairs; {heads}{' --shift' if shift else ''})", err=True)
