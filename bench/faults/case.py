"""One fault, put to one server: what was done, what was looked at, and the verdict that follows by rule.

`expect` notes something that is expected, `never` something that must not happen. Nothing else decides: a fault ends
"as expected" where all that was looked at is as it should be, "otherwise" where something expected is not, and
"must not" where something came about that must not, whatever else there was.
"""

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from bench.faults import device
from bench.faults.asking import Asker, Call, Ended
from bench.faults.passes import PATIENCE
from bench.faults.running import Running
from bench.faults.wanted import Wanted

GOOD = "abcdef"
"""A text that every model takes."""

MEMORY = 64.0
"""Megabytes by which a server may be larger afterwards than before."""

SETTLED = 10.0
"""Seconds that it has to give memory back."""

SOON = 0.5
"""Seconds for a server to notice what its client has done: no server tells of it."""

INSIDES = re.compile(
    rf"Traceback|site-packages|\.py\b|\bpybind11::|{device.SECRET}|(^|[\s'\"(])/(\w+/)+\w", re.IGNORECASE
)
"""Of a file, a traceback or a model's own error: not for clients."""

EXCERPT = 90
"""Characters of a message that are kept."""


class Verdict(StrEnum):
    """What becomes of a fault."""

    EXPECTED = "as expected"
    OTHERWISE = "otherwise"
    NEVER = "must not"
    INAPPLICABLE = "not applicable"
    FAILED = "not put"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: that is expected, or must not happen.
        must_not: it is the latter.
        passed: it is as it should be.
        seen: what there was instead, in few words.
    """

    what: str
    must_not: bool
    passed: bool
    seen: str


@dataclass(kw_only=True)
class Finding:
    """What came of a fault.

    Attributes:
        fault: its number.
        server: name of the kind of server.
        verdict: that follows from the checks.
        reason: why it was not put to this server.
        statuses: how calls ended, counted.
        message: the most telling of what was said, shortened.
        seconds: median of how long the calls took.
        alive: whether the server had not ended afterwards.
        megabytes: by which it was larger afterwards.
        checks: what was looked at.
    """

    fault: int
    server: str
    verdict: str
    reason: str = ""
    statuses: dict[str, int] = field(default_factory=dict)
    message: str = ""
    seconds: float | None = None
    alive: bool = True
    megabytes: float = 0.0
    checks: list[dict[str, Any]] = field(default_factory=list)


class Case:
    """A fault that is being put to a server.

    Args:
        running: the server.
        asker: a client of it.
    """

    def __init__(self, running: Running, asker: Asker) -> None:
        self.running, self.asker, self.passes = running, asker, running.passes
        self.checks: list[Check] = []
        self.ended: list[Ended] = []
        self.ends = False  # the fault ends the server, or may
        self.good = asker.begin(asker.request(GOOD)).end().texts
        self.alone = self.rows_since(0)
        self.before = running.megabytes

    def expect(self, what: str, passed: bool, seen: object = "") -> None:
        """Note whether something is as expected."""
        self.checks.append(Check(what, False, passed, "" if passed else str(seen)))

    def never(self, what: str, happened: bool, seen: object = "") -> None:
        """Note whether something happened that must not."""
        self.checks.append(Check(what, True, not happened, (str(seen) or what) if happened else ""))

    def told(self, *ended: Ended, sent: str = "") -> None:
        """Calls of the fault that have ended; `sent` is what of their messages came from the client itself."""
        self.ended += [replace(one, said=one.said.replace(sent, "...")) if sent else one for one in ended]

    def finish(self, calls: Iterable[Call], patience: float = PATIENCE) -> list[Ended]:
        """Wait for calls of the fault, for so many seconds in all."""
        end = time.monotonic() + patience
        found = [call.end(max(0.0, end - time.monotonic())) for call in calls]
        self.told(*found)
        return found

    def expect_codes(self, what: str, ended: Sequence[Ended], allowed: Iterable[str]) -> None:
        """Note whether all calls ended in one of these ways."""
        codes = list(allowed)
        wrong = Counter(one.code for one in ended if one.code not in codes)
        self.expect(f"{what}: {' or '.join(codes)}", not wrong, f"{what}: {counted(wrong)}")

    def expect_each(self, ended: Mapping[str, Ended], allowed: Iterable[str]) -> None:
        """Note whether each of several calls ended in one of these ways; each is known by a name."""
        codes = list(allowed)
        wrong: dict[str, list[str]] = {}
        for what, one in ended.items():
            if one.code not in codes:
                wrong.setdefault(one.code, []).append(what)
        seen = "; ".join(f"{code} for {', '.join(names)}" for code, names in wrong.items())
        self.expect(" or ".join(codes), not wrong, seen)

    def right(self, ended: Ended) -> bool:
        """Whether a call has the good text's answer."""
        return ended.code == "OK" and ended.texts == self.good

    def answers(self, patience: float | None = None) -> bool:
        """Whether the server answers a good request, over a new connection."""
        patience = PATIENCE if patience is None else patience
        end = time.monotonic() + patience
        while self.running.alive and time.monotonic() < end:
            with self.running.asker() as asker:
                if self.right(asker.begin(asker.request(GOOD), timeout=patience).end()):
                    return True
        return False

    def seen_by_model(self, texts: Iterable[str]) -> int:
        """In how many steps the model has seen one of these."""
        wanted = set(texts)
        return sum(not wanted.isdisjoint(one.texts) for one in self.passes.seen)

    def rows_since(self, count: int) -> int:
        """Rows that the model has decoded, over all its steps but the first so many."""
        return sum(one.rows for one in self.passes.seen[count:] if one.what == "step")

    def wasted(self, what: str) -> None:
        """Let the held step through: the model is to do nothing more for who is gone, and to answer the next."""
        time.sleep(SOON)
        before = len(self.passes.seen)
        self.passes.open()
        self.never(f"{what}: others are not answered", not self.right(self.asker.begin(self.asker.request(GOOD)).end()))
        rows = self.rows_since(before) - self.alone
        self.expect(f"{what}: nothing more is done for it", rows == 0, f"{what}: {rows} more steps for nobody")

    def settle(self) -> float:
        """Megabytes by which the server is larger than before, once it has given back what it will."""
        end = time.monotonic() + SETTLED
        while (grown := self.running.megabytes.resident - self.before.resident) > MEMORY:
            if time.monotonic() > end:
                break
            time.sleep(SOON)
        return grown

    def close(self) -> None:
        """Look at what every fault must leave behind: nothing."""
        leaks = [one.said for one in self.ended if INSIDES.search(one.said)]
        self.never("a message tells of the server's insides", bool(leaks), f"messages with insides: {len(leaks)}")
        unended = sum(one.code == "NONE" for one in self.ended)
        self.never("a call has no final status", unended > 0, f"calls without a status: {unended}")
        if self.ends:
            return
        self.never("the process ended", not self.running.alive, "the process ended")
        if self.running.alive:
            self.never("a good request is not answered afterwards", not self.answers(), "does not answer afterwards")
            grown = self.settle()
            self.never(f"{MEMORY:.0f} MB are not given back", grown > MEMORY, f"{grown:.0f} MB are kept")

    def finding(self, fault: int) -> Finding:
        """All of it, with the verdict."""
        grown = self.running.megabytes.resident - self.before.resident if self.running.alive else 0.0
        seconds = [one.seconds for one in self.ended if one.code != "NONE"]
        return Finding(
            fault=fault,
            server=self.running.kind.name,
            verdict=verdict(self.checks),
            statuses=dict(Counter(one.code for one in self.ended)),
            message=excerpt(self.ended),
            seconds=statistics.median(seconds) if seconds else None,
            alive=self.running.alive,
            megabytes=round(grown, 1),
            checks=[asdict(one) for one in self.checks],
        )


Put = Callable[[Case], None]
"""Puts a fault to a server."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault that can be put to any of the servers.

    Attributes:
        number: among the forty-two.
        name: of it.
        expected: what is to become of it, in few words.
        put: how.
        wanted: settings of the server.
        lacking: why not, by the name of a server.
    """

    number: int
    name: str
    expected: str
    put: Put
    wanted: Wanted = field(default_factory=Wanted)
    lacking: dict[str, str] = field(default_factory=dict)


def verdict(checks: Sequence[Check]) -> Verdict:
    """What follows from what was looked at.

    Raises:
        ValueError: nothing was.
    """
    if not checks:
        raise ValueError("nothing was looked at: that is no verdict")
    failed = [check for check in checks if not check.passed]
    if any(check.must_not for check in failed):
        return Verdict.NEVER
    return Verdict.OTHERWISE if failed else Verdict.EXPECTED


def excerpt(ended: Sequence[Ended]) -> str:
    """Of what was said, the first that has something of the insides, or that is not OK; one line, shortened."""
    said = sorted((one.said for one in ended if one.said), key=lambda text: not INSIDES.search(text))
    text = " ".join(said[0].split()) if said else ""
    return text if len(text) <= EXCERPT else f"{text[: EXCERPT - 1]}…"


def counted(codes: Mapping[str, int]) -> str:
    """Statuses, each with how many there were."""
    return ", ".join(code if count == 1 else f"{count} {code}" for code, count in codes.items())
