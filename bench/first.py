"""The first table: export parity, tokens/s at batch 1 and 32, and what returning attention costs.

    python -m bench.first BUNDLE --json FILE

The decoder is timed with real lengths: the words of the built-in dictionary's test part, drawn with a fixed seed. Every
configuration runs interleaved with the others, and the median of several rounds counts.
"""

import json
import random
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.machine import describe_machine
from export.commands import parity_table
from export.manifest import Manifest, read_manifest
from export.runtime import OnnxGreedyModel, RuntimeOptions
from model.config import CmudictData
from model.pairs import read_pairs
from model.search import SearchOptions, search
from model.steps import NO_FAMILIES, Family
from model.tokenizer import Tokenizer

BATCHES = (1, 32)
SENTENCES = 96
ATTENTION: Mapping[str, frozenset[Family]] = {"with": frozenset({"cross", "decoder"}), "without": NO_FAMILIES}


def decode_all(
    model: OnnxGreedyModel, sources: list[list[int]], batch: int, longest: int, families: frozenset[Family]
) -> tuple[float, int]:
    """Seconds and generated tokens for all sources, greedily, in batches."""
    tokens, begun = 0, time.perf_counter()
    for start in range(0, len(sources), batch):
        part = sources[start : start + batch]
        found = search(model, part, [SearchOptions(longest=longest)] * len(part), families)
        tokens += sum(len(hypotheses[0].tokens) for hypotheses in found)
    return time.perf_counter() - begun, tokens


def draw_sources(bundle: Path, manifest: Manifest) -> list[list[int]]:
    """Token ids of words drawn from the built-in dictionary's test part."""
    words = sorted({pair.source for pair in read_pairs(CmudictData(), "test").pairs})
    tokenizer = Tokenizer.load(bundle / manifest.source_tokenizer)
    return tokenizer.encode_ids(random.Random(0).sample(words, SENTENCES))


def measure(bundle: Path, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Tokens/s of every precision and batch size, with attention and without, interleaved."""
    manifest = read_manifest(bundle)
    options = RuntimeOptions(threads=threads)
    sources = draw_sources(bundle, manifest)
    longest = manifest.limits.longest_target
    models = {precision: OnnxGreedyModel(bundle, manifest, precision, options) for precision in manifest.graphs}
    cases = [(precision, attention) for precision in models for attention in ATTENTION]
    speeds: dict[tuple[str, str, int], list[float]] = {}
    for turn in track(range(rounds + 1), "measuring", transient=True):
        for batch in BATCHES:
            # Alternating order: what one side does to caches and clocks, it does to the other as often.
            for precision, attention in cases[:: -1 if turn % 2 else 1]:
                seconds, tokens = decode_all(models[precision], sources, batch, longest, ATTENTION[attention])
                if turn:  # the first round warms up
                    speeds.setdefault((precision, attention, batch), []).append(tokens / seconds)
    return [_row(precision, batch, speeds) for precision in manifest.graphs for batch in BATCHES]


def _row(precision: str, batch: int, speeds: dict[tuple[str, str, int], list[float]]) -> dict[str, Any]:
    seen, unseen = speeds[precision, "with", batch], speeds[precision, "without", batch]
    ratios = [1 - one / other for one, other in zip(seen, unseen, strict=True)]
    return {
        "precision": precision,
        "batch": batch,
        "tokens_per_second": statistics.median(seen),
        "tokens_per_second_without_attention": statistics.median(unseen),
        "price_of_attention": statistics.median(ratios),
        "price_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def _price(row: dict[str, Any]) -> str:
    low, high = (100 * quartile for quartile in row["price_quartiles"])
    return f"{100 * row['price_of_attention']:.1f} % ({low:.1f} to {high:.1f})"


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle to measure.")],
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds after the warm-up; medians count.")] = 25,
    threads: Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime.")] = 1,
) -> None:
    """Measure a bundle, print the tables, write the JSON."""
    machine = describe_machine()
    rows = measure(bundle, rounds, threads)
    manifest = read_manifest(bundle)
    table = Table(title=f"Greedy decoding, {SENTENCES} words, {threads} thread(s), {machine['processor']}")
    for column in ("precision", "batch", "tokens/s", "without attention", "price of attention (quartiles)"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["precision"],
            str(row["batch"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second_without_attention']:,.0f}",
            _price(row),
        )
    console = Console()
    console.print(parity_table(manifest), table)
    if as_json is not None:
        provenance = manifest.provenance.model_dump(mode="json")
        content = {"machine": machine, "model": manifest.name, "provenance": provenance, "decoding": rows}
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
