"""The tables of docs/performance.md, made from the JSON files that the benchmarks wrote.

    python -m bench.summary            writes them into the page, between its marks
    python -m bench.summary --check    says whether they are there already

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`; the rest of the page is left as it is.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console

from bench.grid import BenchError

Rows: TypeAlias = Sequence[Mapping[str, Any]]

MODELS = {"g2p-en": "g2p-en, d 192", "random-d256-3-3": "random, d 256", "random-d512-6-6": "random, d 512"}
SERVERS = {"limelight": "Limelight", "ctranslate2": "CTranslate2", "triton": "tritonserver"}
GRAPHS = {"traced": "traced, float32", "fp32": "exported, float32", "int8": "exported, int8"}
SIZES = (1, 8, 32)

RESULTS = Path("bench/results")
PAGE = Path("docs/performance.md")


class Decoding:
    """The rows of `bench.decode`, found by their cells."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        keys = ("model", "precision", "sentences", "beam", "attention", "threads")
        self._cells = {tuple(row[key] for key in keys): row for row in rows}

    def cell(
        self, model: str, precision: str, sentences: int, beam: int, attention: str = "none", threads: int = 1
    ) -> Mapping[str, Any] | None:
        """One row; None where that was not measured."""
        return self._cells.get((model, precision, sentences, beam, attention, threads))

    def prices(self, model: str, attention: str, threads: int) -> list[float]:
        """What that attention costs, as a share of the speed without it, in every cell that was measured."""
        wanted = (model, attention, threads)
        rows = [row for row in self.rows if (row["model"], row["attention"], row["threads"]) == wanted]
        return [row["price"] for row in rows if row["price"] is not None]

    def table(self) -> list[str]:
        """A line for each cell without attention on one thread, the others beside it."""
        lines = _head(
            "model | precision | sentences | beam",
            "ours, tokens/s | CTranslate2, tokens/s | ratio (quartiles) | ratio, cross | ratio, all",
            "ratio, 2 threads | of the limit, ours and theirs",
            left=2,
        )
        for row in self.rows:
            if (row["attention"], row["threads"]) != ("none", 1):
                continue
            place = (row["model"], row["precision"], row["sentences"], row["beam"])
            others = (self.cell(*place, *other) for other in (("cross", 1), ("all", 1), ("none", 2)))
            lines.append(
                _line(
                    MODELS.get(row["model"], row["model"]),
                    *place[1:],
                    f"{row['ours']:,.0f}",
                    f"{row['peer']:,.0f}",
                    f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})",
                    *map(_ratio, others),
                    f"{100 * row['limit_share']:.0f} %, {100 * row['peer_limit_share']:.0f} %",
                )
            )
        return lines

    def goals(self) -> list[str]:
        """What was aimed for, and what each model reached on one thread."""
        wanted: list[tuple[str, Callable[[str], str]]] = [
            ("2.0 times CTranslate2 at one sentence, float32", lambda model: self._at(model, "float32", 1)),
            ("1.3 times at 32 sentences, float32", lambda model: self._at(model, "float32", 32)),
            ("1.5 times at one sentence, int8", lambda model: self._at(model, "int8", 1)),
            ("1.3 times at 32 sentences, int8", lambda model: self._at(model, "int8", 32)),
            ("1.3 times under beam 4, float32", lambda model: self._beams(model, "float32")),
            ("1.3 times under beam 4, int8", lambda model: self._beams(model, "int8")),
            ("60 % of the limit at batch 32, float32", lambda model: self._limit(model, "float32")),
            ("60 % of the limit at batch 32, int8", lambda model: self._limit(model, "int8")),
            ("price of all cross-attention at most 3 %", lambda model: self._price(model, "cross")),
            ("price of all three families at most 15 %", lambda model: self._price(model, "all")),
        ]
        there = [model for model in MODELS if any(row["model"] == model for row in self.rows)]
        lines = _head("goal", " | ".join(MODELS[model] for model in there), left=1 + len(there))
        return lines + [_line(goal, *map(found, there)) for goal, found in wanted]

    def _at(self, model: str, precision: str, sentences: int) -> str:
        return _ratio(self.cell(model, precision, sentences, 1))

    def _beams(self, model: str, precision: str) -> str:
        cells = [self.cell(model, precision, sentences, 4) for sentences in SIZES]
        ratios = [cell["ratio"] for cell in cells if cell is not None]
        return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-"

    def _limit(self, model: str, precision: str) -> str:
        cell = self.cell(model, precision, 32, 1)
        if cell is None:
            return "-"
        return f"{100 * cell['limit_share']:.0f} % (CTranslate2 {100 * cell['peer_limit_share']:.0f} %)"

    def _price(self, model: str, attention: str) -> str:
        prices = self.prices(model, attention, 1)
        if not prices:
            return "-"
        return f"{100 * statistics.median(prices):.1f} ({100 * min(prices):.1f} to {100 * max(prices):.1f})"


def load_table(rows: Rows) -> list[str]:
    """Each server at its best rate, and with all callers at a time."""
    lines = _head("server | load", "goodput/s | p50 ms | p99 ms | CPU ms an answer | MB", left=2)
    for mode in ("best", "closed"):
        for server, name in SERVERS.items():
            for row in rows:
                if (row["server"], row["mode"]) != (server, mode):
                    continue
                load = f"best, {row['rate']:,.0f}/s" if mode == "best" else f"{row['callers']} callers"
                figures = (row[key] for key in ("goodput", "p50_ms", "p99_ms"))
                cells = [f"{figure:,.0f}" for figure in figures]
                lines.append(_line(name, load, *cells, f"{row['processor_ms']:.1f}", f"{row['memory_mb']:.0f}"))
    return lines


def profile_table(rows: Rows) -> list[str]:
    """Microseconds of a step, and operators in it, for each graph."""
    lines = _head("", " | ".join(GRAPHS.values()), left=1)
    steps = {(row["sentences"], row["beam"], row["graph"]): row for row in rows}
    for sentences, beam in dict.fromkeys((row["sentences"], row["beam"]) for row in rows):
        found = [steps.get((sentences, beam, graph)) for graph in GRAPHS]
        cells = ["-" if row is None else f"{row['step']:,.0f} µs, {sum(row['calls'].values()):.0f}" for row in found]
        many = "sentence" if sentences == 1 else "sentences"
        lines.append(_line(f"{sentences} {many}, {'greedy' if beam == 1 else f'beam {beam}'}", *cells))
    return lines


def fill(page: str, tables: Mapping[str, Sequence[str]]) -> str:
    """The page with its tables.

    Raises:
        BenchError: it has no place for one of them, or several.
    """
    for name, lines in tables.items():
        table = "\n".join(["", *lines, "", ""])
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        count = max(page.count(begin), page.count(end)) if begin in page and end in page.split(begin, 1)[1] else 0
        if count != 1:
            raise BenchError(f"the page has {count} places for the table {name!r}, between its two marks")
        before, rest = page.split(begin)
        page = before + begin + table + end + rest.split(end, 1)[1]
    return page


def _ratio(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None else f"{row['ratio']:.2f}"


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _head(*names: str, left: int) -> list[str]:
    """Names of columns and the line below; all but the first `left` hold figures."""
    line = _line(*names)
    count = line.count("|") - 1
    return [line, _line(*(["---"] * left + ["---:"] * (count - left)))]


def _rows(path: Path) -> Rows:
    rows: Rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def write(page: Path, results: Path, tables: Callable[[], Mapping[str, Sequence[str]]], *, check: bool) -> None:
    """Write tables into a page, or look whether they are there already; and say so.

    Args:
        page: with a place for each.
        results: what they are made of.
        tables: makes them.
        check: write nothing.

    Raises:
        typer.Exit: a table cannot be made or has no place, or is to be there and is not.
    """
    console = Console()
    try:
        before = page.read_text(encoding="utf-8")
        made = tables()
        after = fill(before, made)
    except (BenchError, FileNotFoundError) as error:
        console.print(f"[red]error:[/red] {page}: {error}")
        raise typer.Exit(1) from None
    if check and after != before:
        console.print(f"[red]error:[/red] {page} has other figures than {results}: run `make bench-summary`")
        raise typer.Exit(1)
    if not check:
        page.write_text(after, encoding="utf-8")
    console.print(f"{page}: {', '.join(made)} as in {results}")


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page is not up to date.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of the JSON files.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="What to write the tables into.")] = PAGE,
) -> None:
    """Write the tables of the benchmarks' results into the page about performance."""

    def tables() -> Mapping[str, Sequence[str]]:
        decoding = Decoding(_rows(results / "decode.json"))
        return {
            "decode": decoding.table(),
            "goals": decoding.goals(),
            "load": load_table(_rows(results / "load.json")),
            "profile": profile_table(_rows(results / "profile.json")),
        }

    write(page, results, tables, check=check)


if __name__ == "__main__":
    typer.run(main)
