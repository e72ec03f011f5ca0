"""One measurement of one server, and what several of them amount to: the rows of the result."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.load.accounts import Memory

Mode = Literal["open", "closed"]
Row = dict[str, Any]

LATE = 0.1
"""Share of the latency objective by which the generator may be late at the 99th percentile."""

BUSY = 0.9
"""Share of one processor that the generator may use."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a server under one load.

    Attributes:
        server: its name.
        mode: "open", at a rate, or "closed", with a number of callers.
        load: the rate, or the number of callers.
        objective: seconds within which an answer is good.
        seconds: for which requests were sent.
        latencies: seconds, of the answered requests.
        errors: unanswered requests by gRPC status.
        answers: text by source, of some.
        lateness: seconds that the generator was late, whenever it looked.
        busy: processors that the generator used.
        processor_seconds: that the server used.
        memory: of the server afterwards.
    """

    server: str
    mode: Mode
    load: float
    objective: float
    seconds: float
    latencies: Sequence[float]
    errors: Mapping[str, int]
    answers: Mapping[str, str]
    lateness: Sequence[float]
    busy: float
    processor_seconds: float
    memory: Memory

    @property
    def goodput(self) -> float:
        """Answers a second within the objective."""
        return sum(latency <= self.objective for latency in self.latencies) / self.seconds

    @property
    def throughput(self) -> float:
        """Answers a second, however late."""
        return len(self.latencies) / self.seconds

    @property
    def unanswered(self) -> int:
        """Requests that failed or were given up."""
        return sum(self.errors.values())

    def latency(self, share: float) -> float:
        """The time within which this share of all requests was answered; infinite where fewer were answered."""
        return percentile([*self.latencies, *[math.inf] * self.unanswered], share)

    @property
    def late(self) -> float:
        """How late the generator was, at the 99th percentile."""
        return percentile(self.lateness, 0.99)

    @property
    def valid(self) -> bool:
        """The generator kept up, so that the figures are the server's."""
        return self.late <= LATE * self.objective and self.busy <= BUSY


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of them does not exceed; infinite where there are none."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)] if values else math.inf


def summarise(cells: Sequence[Cell], about: Row) -> list[Row]:
    """A row for each server and load: medians over the rounds in which the generator kept up, if there are any.

    Args:
        cells: of all rounds of one model, in the order in which they were measured.
        about: what they have in common; stands in every row.
    """
    expected = _expected(cells)
    groups: dict[tuple[str, Mode, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.server, cell.mode, cell.load), []).append(cell)
    rows = [about | _row(group, expected) for _, group in sorted(groups.items())]
    return _compared([*rows, *_best(rows)])


def _expected(cells: Sequence[Cell]) -> dict[str, str]:
    """The first answer to each source by the server that was measured first, which is Limelight where it takes part."""
    first = min((cell.server for cell in cells), key=lambda name: name != "limelight", default="")
    expected: dict[str, str] = {}
    for cell in cells:
        if cell.server == first:
            expected = {**cell.answers, **expected}
    return expected


def _row(group: Sequence[Cell], expected: Mapping[str, str]) -> Row:
    used = [cell for cell in group if cell.valid] or list(group)
    one = used[0]
    errors: Counter[str] = Counter()
    for cell in group:
        errors.update(cell.errors)
    pairs = [(text, expected[key]) for cell in group for key, text in cell.answers.items() if key in expected]
    goodputs = [cell.goodput for cell in used]
    return {
        "server": one.server,
        "mode": one.mode,
        "rate": one.load if one.mode == "open" else None,
        "callers": int(one.load) if one.mode == "closed" else None,
        "objective_ms": 1000 * one.objective,
        "rounds": len(used),
        "invalid_rounds": sum(not cell.valid for cell in group),
        "valid": one.valid,
        "goodput": statistics.median(goodputs),
        "goodput_lowest": min(goodputs),
        "goodput_highest": max(goodputs),
        "throughput": statistics.median(cell.throughput for cell in used),
        "p50_ms": _milliseconds([cell.latency(0.5) for cell in used]),
        "p99_ms": _milliseconds([cell.latency(0.99) for cell in used]),
        "processor_ms": _milliseconds(
            [cell.processor_seconds / len(cell.latencies) if cell.latencies else math.inf for cell in used]
        ),
        "memory_mb": statistics.median(cell.memory.proportional for cell in used),
        "peak_mb": max(cell.memory.peak for cell in used),
        "requests": sum(len(cell.latencies) + cell.unanswered for cell in group),
        "errors": sum(errors.values()),
        **{f"errors_{kind.lower()}": count for kind, count in sorted(errors.items())},
        "compared": len(pairs),
        "agree": sum(text == right for text, right in pairs) / len(pairs) if pairs else None,
        "generator_late_ms": _milliseconds([cell.late for cell in used]),
        "generator_busy": max(cell.busy for cell in used),
    }


def _milliseconds(values: Sequence[float]) -> float | None:
    """The median in milliseconds; nothing where it is infinite, which JSON cannot say."""
    median = statistics.median(values)
    return 1000 * median if math.isfinite(median) else None


def _best(rows: Sequence[Row]) -> list[Row]:
    """For each server the rate with the most goodput, as a row of its own."""
    most = max((row["rounds"] for row in rows), default=0)
    best = []
    for server in dict.fromkeys(row["server"] for row in rows):
        tried = [row for row in rows if row["server"] == server and row["mode"] == "open"]
        # A rate that only a few rounds reached says more about those rounds than about the server.
        counted = [row for row in tried if row["valid"] and 2 * row["rounds"] >= most]
        if tried:
            best.append(max(counted or tried, key=lambda row: float(row["goodput"])) | {"mode": "best"})
    return best


def _compared(rows: Sequence[Row]) -> list[Row]:
    """Add how Limelight stands to each server, in the rows where both are measured alike."""
    ours = {row["mode"]: row for row in rows if row["server"] == "limelight" and row["mode"] != "open"}
    found = []
    for row in rows:
        mine = ours.get(row["mode"])
        if mine is None or row["server"] == "limelight":
            found.append(row)
            continue
        comparable = mine["valid"] and row["valid"]
        found.append(
            row
            | {
                "goodput_ratio": _ratio(mine["goodput"], row["goodput"]) if comparable else None,
                "p99_ratio": _ratio(mine["p99_ms"], row["p99_ms"]) if comparable else None,
            }
        )
    return found


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None
