"""What is found: counted, told apart, and written down with what is needed to play it again."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.fuzz.calls import Call
from bench.fuzz.sessions import Session

Case = Call | Session

WRITTEN = 3
"""Files of findings that are alike: more tell nothing new."""


@dataclass(frozen=True)
class Stretch:
    """Calls and connections that were made together, by their numbers.

    Attributes:
        seed: that they are made from.
        calls: first, and one past the last.
        sessions: the same.
    """

    seed: int
    calls: tuple[int, int]
    sessions: tuple[int, int]

    def written(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"seed": self.seed, "calls": list(self.calls), "sessions": list(self.sessions)}


@dataclass
class Findings:
    """All of them.

    Attributes:
        folder: where files go.
        counts: how often each was found, by kind and text; numbers and what was quoted are not told apart.
    """

    folder: Path
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, kind: str, what: str, cases: list[Case], stretch: Stretch) -> None:
        """Count a finding, and write it down unless there are enough like it.

        Args:
            kind: of oracle that found it.
            what: is wrong.
            cases: that it was found with; none where it cannot be said which.
            stretch: that was under way.
        """
        key = kind, _alike(what)
        self.counts[key] += 1
        if self.counts[key] > WRITTEN:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in self.folder.glob("*.json"))
        found = {
            "kind": kind,
            "what": what,
            "stretch": stretch.written(),
            "cases": [{type(case).__name__.lower(): case.written()} for case in cases],
        }
        path = self.folder / f"{number:04}-{kind.replace(' ', '-')}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    @property
    def told(self) -> list[str]:
        """One line for each."""
        return [f"{kind}: {what} ({count} times)" for (kind, what), count in self.counts.most_common()]


def _alike(what: str) -> str:
    """A text without what differs between findings of one cause."""
    return re.sub(r"'[^']*'|\d+", "#", what)[:300]


def read_finding(path: Path) -> tuple[list[Case], Stretch]:
    """What a finding was found with."""
    found = json.loads(path.read_text(encoding="utf-8"))
    cases = [Call.read(one["call"]) if "call" in one else Session.read(one["session"]) for one in found["cases"]]
    stretch = found["stretch"]
    return cases, Stretch(stretch["seed"], tuple(stretch["calls"]), tuple(stretch["sessions"]))
