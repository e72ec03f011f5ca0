"""The rows as tables."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.load.cells import Row

HEADERS = (
    "server",
    "load",
    "goodput/s",
    "answers/s",
    "p50 ms",
    "p99 ms",
    "CPU ms",
    "MB (peak)",
    "errors",
    "agree",
    "late ms",
)
"""CPU is processor time of the server for a request; late is the generator."""


def loads_table(rows: Sequence[Row], title: str) -> Table:
    """Every server under every load."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for header in HEADERS:
        table.add_column(header, justify="left" if header in {"server", "errors"} else "right", no_wrap=True)
    before = ""
    for row in rows:
        if row["mode"] == "best":
            continue
        if before not in ("", row["server"]):
            table.add_section()
        before = row["server"]
        table.add_row(
            row["server"],
            f"{row['rate']:g}/s" if row["mode"] == "open" else f"{row['callers']} callers",
            f"{row['goodput']:,.0f}",
            f"{row['throughput']:,.0f}",
            _number(row["p50_ms"]),
            _number(row["p99_ms"]),
            _number(row["processor_ms"], 2),
            f"{row['memory_mb']:,.0f} ({row['peak_mb']:,.0f})",
            _errors(row),
            _percent(row["agree"]),
            _late(row),
        )
    return table


def summary_table(rows: Sequence[Row], title: str) -> Table:
    """Each server at its best, and with all callers at once, Limelight beside it."""
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("server")
    for header in ("load", "goodput/s", "p99 ms", "Limelight's goodput", "Limelight's p99"):
        table.add_column(header, justify="right")
    for mode in ("best", "closed"):
        for row in rows:
            if row["mode"] == mode:
                table.add_row(
                    row["server"],
                    f"{row['callers']} callers" if mode == "closed" else f"best, {row['rate']:g}/s",
                    f"{row['goodput']:,.0f}" + ("" if row["valid"] else " (invalid)"),
                    _number(row["p99_ms"]),
                    _times(row.get("goodput_ratio")),
                    _times(row.get("p99_ratio")),
                )
    return table


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} times"


def _errors(row: Row) -> str:
    kinds = [(key.removeprefix("errors_"), value) for key, value in row.items() if key.startswith("errors_")]
    return "\n".join(f"{value:,} {kind}" for kind, value in kinds)


def _late(row: Row) -> str:
    figure = _number(row["generator_late_ms"])
    return figure if row["valid"] else f"[bold red]invalid[/bold red] {figure}"
