"""What came of the faults as tables: for the terminal, and for docs/reliability.md.

python -m bench.faults.table            writes the table into the page, between its marks
python -m bench.faults.table --check    says whether it is there already
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from bench.faults.case import Fault, Verdict, counted
from bench.faults.catalogue import ELSEWHERE, FAULTS
from bench.grid import BenchError
from bench.summary import write

RESULTS = Path("bench/results/faults.json")
PAGE = Path("docs/reliability.md")
MARK = "faults"

TITLES = {"limelight": "Limelight", "triton": "tritonserver 2.51", "mlserver": "MLServer 1.7.1"}
"""Columns."""

STYLES = {Verdict.EXPECTED: "green", Verdict.OTHERWISE: "yellow", Verdict.NEVER: "red", Verdict.FAILED: "magenta"}

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of a page: a row for each fault, and below it how often each verdict was.

    Raises:
        BenchError: a server has no finding for a fault, or one that could not be put.
    """
    found = {(row["fault"], row["server"]): row for row in rows}
    lines = [_line("fault", "expected", *TITLES.values()), _line(*["---"] * (2 + len(TITLES)))]
    for fault in FAULTS:
        cells = [cell(_of(found, fault, server)) for server in TITLES]
        lines.append(_line(f"{fault.number}. {fault.name}", fault.expected, *cells))
    return [*lines, "", *_sums(rows)]


def cell(row: Row) -> str:
    """A finding in few words: what must not happen is bold, what is otherwise than expected is plain."""
    if row["verdict"] == Verdict.INAPPLICABLE:
        return f"- ({row['reason']})"
    calls = f" ({counted(row['statuses'])})" if row["statuses"] else ""
    if row["verdict"] == Verdict.EXPECTED:
        return f"as expected{calls}"
    failed = sorted((check for check in row["checks"] if not check["passed"]), key=lambda check: not check["must_not"])
    seen: dict[str, bool] = {}
    for check in failed:  # the grave ones come first, and stay grave
        seen.setdefault(check["seen"], check["must_not"])
    return "; ".join(f"**{what}**" if grave else what for what, grave in seen.items()) + calls


def _of(found: Mapping[tuple[int, str], Row], fault: Fault, server: str) -> Row:
    row = found.get((fault.number, server))
    if row is None or row["verdict"] == Verdict.FAILED:
        raise BenchError(f"fault {fault.number} was not put to {server}: run `make faults`")
    return row


def _sums(rows: Sequence[Row]) -> list[str]:
    lines = [_line("", *TITLES.values()), _line("---", *["---:"] * len(TITLES))]
    for verdict, name in (
        (Verdict.EXPECTED, "as expected"),
        (Verdict.OTHERWISE, "otherwise"),
        (Verdict.NEVER, "**what must not happen**"),
    ):
        counts = [sum(row["server"] == server and row["verdict"] == verdict for row in rows) for server in TITLES]
        lines.append(_line(name, *counts))
    return lines


def _line(*cells: object) -> str:
    return f"| {' | '.join(str(one).replace('|', chr(92) + '|') for one in cells)} |"


def about(content: Mapping[str, Any]) -> str:
    """Where and of what the findings are."""
    machine, versions = content["machine"], content["versions"]
    packages = (("limelight", "grpcio"), ("triton", "nvidia-pytriton"), ("mlserver", "mlserver"))
    named = ", ".join(f"{name} {versions[server][name]}" for server, name in packages)
    return f"Run at commit {content['commit']} on {machine['cores']} cores of an {machine['processor']}, with {named}."


def elsewhere() -> str:
    """What was not put to others, and why."""
    reasons = (f"{', '.join(map(str, numbers))} ({reason})" for reason, numbers in ELSEWHERE.items())
    return f"Not put to others: {'; '.join(reasons)}."


def terminal(rows: Sequence[Row]) -> Table:
    """For people: a line for each fault and server."""
    made = Table("fault", "server", "verdict", "what", title="The same faults, put to each server")
    for row in rows:
        name = next(fault.name for fault in FAULTS if fault.number == row["fault"])
        verdict = row["verdict"]
        what = row["reason"] or cell(row).replace("**", "")
        style = STYLES.get(verdict, "dim")
        made.add_row(f"{row['fault']}. {name}", row["server"], f"[{style}]{verdict}[/]", escape(what))
    return made


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page is not up to date.")] = False,
    results: Annotated[Path, typer.Option(help="JSON of `make faults`.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="What to write the table into.")] = PAGE,
) -> None:
    """Write the table of what came of the faults into the page about reliability."""

    def tables() -> Mapping[str, Sequence[str]]:
        content = json.loads(results.read_text(encoding="utf-8"))
        return {MARK: [*table(content["rows"]), "", elsewhere(), about(content)]}

    write(page, results, tables, check=check)


if __name__ == "__main__":
    typer.run(main)
