"""One run: rounds of calls and connections side by side, and a rest after each, in which nothing may be left."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.fuzz.answers import told, wrong_answers
from bench.fuzz.asking import NEVER, Asking, Outcome
from bench.fuzz.calls import Call, Judges, Verdict
from bench.fuzz.findings import Case, Findings, Stretch
from bench.fuzz.judge import OK
from bench.fuzz.making import Maker
from bench.fuzz.sessions import Session, Sessions
from bench.fuzz.subject import Subject
from bench.fuzz.talking import talk
from bench.fuzz.target import Target
from bench.fuzz.watch import Bounds, Looks, Watch
from bench.load.servers import Running

CALLS, CONNECTIONS = 1500, 40
"""Of a round."""

CALLERS, TALKERS = 24, 6
"""Of them at a time."""

TELL = 0.5
"""Seconds between two times that somebody is told how far it is."""

LOST = ("Internal error from Core", "Locally cancelled by application!")
"""What gRPC's client says where it was writing to a stream that has ended: it does not know any more how."""


@dataclass
class Seen:
    """What was seen.

    Attributes:
        messages: of calls, by what they come from.
        calls: by service and status.
        rights: messages by whether they are right for certain, wrong for certain, or may be either.
        frames: by what they are made of.
        statuses: of calls in frames.
        slowest: seconds of a call that nothing delayed.
        looks: at the server.
        seconds: that it took.
        stopped: somebody ended it early.
    """

    messages: Counter[str] = field(default_factory=Counter)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    rights: Counter[str] = field(default_factory=Counter)
    frames: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    slowest: float = 0.0
    looks: Looks = field(default_factory=Looks)
    seconds: float = 0.0
    stopped: bool = False

    @property
    def total(self) -> int:
        """Messages of calls, and frames."""
        return self.messages.total() + self.frames.total()


class Fuzzing:
    """Fuzzes one server.

    Args:
        target: what runs.
        running: as it runs.
        subject: what it serves.
        findings: where what is wrong goes.
        bounds: what the server may take.
    """

    def __init__(
        self, target: Target, running: Running, subject: Subject, findings: Findings, bounds: Bounds | None = None
    ) -> None:
        self._ports, self._subject, self._findings = target.ports(running.port), subject, findings
        self._bounds, self._running = bounds or Bounds(), running
        self._secrets = (str(target.model), str(running.log.parent))
        self._judges = Judges(subject)
        self._watch = Watch(running, target.metrics_port, subject, self._bounds, self._found)
        self._stretch = Stretch(0, (0, 0), (0, 0))
        self._under_way: set[Case] = set()
        self.seen = Seen(looks=self._watch.looks)

    def stop(self) -> None:
        """Begin nothing new; what is under way comes to its end."""
        self.seen.stopped = True

    async def run(self, messages: int, seed: int, tell: Callable[[Seen], None]) -> Seen:
        """Fuzz until there were so many messages and frames, or the server has died.

        Args:
            messages: of calls, and frames.
            seed: of all that is random.
            tell: told now and then how far it is.
        """
        calls, connections = Maker(self._subject, seed), Sessions(self._subject, self._judges, seed)
        number, size = 0, min(1.0, messages / 5000)
        of_calls, of_connections = max(1, round(size * CALLS)), max(1, round(size * CONNECTIONS))
        begun = time.monotonic()
        async with self._watch.looking():
            await self._watch.rest()
            while self.seen.total < messages and not self.seen.stopped and self._watch.alive:
                stretch = Stretch(seed, _part(number, of_calls), _part(number, of_connections))
                made = map(calls.call, range(*stretch.calls)), map(connections.session, range(*stretch.sessions))
                round_ = asyncio.create_task(self._round(stretch, *made))
                while not round_.done():
                    await asyncio.wait((round_,), timeout=TELL)
                    self.seen.seconds = time.monotonic() - begun
                    tell(self.seen)
                await round_
                number += 1
        return self.seen

    async def again(self, cases: Sequence[Case], stretch: Stretch, times: int) -> Seen:
        """Make calls and connections again; where there are none, all of a stretch.

        Args:
            cases: to make again.
            stretch: that they are from.
            times: how often.
        """
        calls, connections = Maker(self._subject, stretch.seed), Sessions(self._subject, self._judges, stretch.seed)
        async with self._watch.looking():
            await self._watch.rest()
            for _ in range(times):
                made: tuple[Iterable[Call], Iterable[Session]] = (
                    (
                        [one for one in cases if isinstance(one, Call)],
                        [one for one in cases if isinstance(one, Session)],
                    )
                    if cases
                    else (map(calls.call, range(*stretch.calls)), map(connections.session, range(*stretch.sessions)))
                )
                await self._round(stretch, *made)
        return self.seen

    def _found(self, kind: str, what: str, *cases: Case) -> None:
        self._findings.add(kind, what, list(cases), self._stretch)

    async def _round(self, stretch: Stretch, calls: Iterable[Call], sessions: Iterable[Session]) -> None:
        self._stretch, before = stretch, self.seen.calls.total() + self.seen.connections
        lines = self.seen.looks.canary
        asking = Asking(self._ports["port"], self._ports["admin_port"], patience=self._bounds.patience)
        numbered, opened = enumerate(calls), iter(sessions)
        try:
            workers = [asyncio.create_task(self._call(asking, numbered)) for _ in range(CALLERS)]
            workers += [asyncio.create_task(self._talk(opened)) for _ in range(TALKERS)]
            await asyncio.gather(*workers)
        finally:
            await asking.close()
        if self._watch.alive:
            await self._watch.rest()
        calls_since = self.seen.calls.total() + self.seen.connections - before
        self._watch.read_log(calls_since + 2 * (self.seen.looks.canary - lines))
        if not self._watch.alive:
            status = self._running.process.poll()
            what = f"the server's process has ended with {status}; its log ends so: {self._running.tail()[-500:]}"
            self._found("died", what, *self._under_way)

    async def _call(self, asking: Asking, calls: Iterator[tuple[int, Call]]) -> None:
        for number, call in calls:
            if self.seen.stopped or not self._watch.alive:
                return
            self._under_way.add(call)
            verdict = self._judges.verdict(call)
            outcome = await asking.ask(call, number)
            self._count(call, verdict, outcome)
            for what in self._wrong(call, verdict, outcome):
                await self._watch.tell_if_alive("call", what, call)
            if self._watch.alive:
                self._under_way.discard(call)
            await asyncio.sleep(0)  # the canary's turn

    def _count(self, call: Call, verdict: Verdict, outcome: Outcome) -> None:
        self.seen.messages[call.origin] += len(call.messages)
        service = call.path.strip("/").partition("/")[0] if call.method else "elsewhere"
        self.seen.calls[service, outcome.code] += 1
        for codes in verdict.items or [verdict.codes] * len(call.messages):
            self.seen.rights["right" if codes == {OK} else "either" if OK in codes else "wrong"] += 1
        if call.timeout is None and call.cancel_after is None:
            self.seen.slowest = max(self.seen.slowest, outcome.seconds)

    def _wrong(self, call: Call, verdict: Verdict, outcome: Outcome) -> Iterator[str]:
        about = f"{call.path}: "
        if outcome.code == NEVER or outcome.seconds > self._bounds.patience:
            yield f"{about}never ended, within {self._bounds.patience:g} s"
            return
        if call.streams[0] and outcome.details in LOST:
            return
        if outcome.code not in verdict.codes:
            yield f"{about}{outcome.code} ({outcome.details[:200]}), not {' or '.join(sorted(verdict.codes))}"
        for what in told(outcome.details, self._secrets):
            yield f"{about}{outcome.code} {what}: {outcome.details[:200]}"
        if outcome.code == OK and OK in verdict.codes:
            for what in wrong_answers(call, outcome.answers, verdict, self._secrets):
                yield f"{about}{what}"

    async def _talk(self, sessions: Iterator[Session]) -> None:
        for session in sessions:
            if self.seen.stopped or not self._watch.alive:
                return
            self._under_way.add(session)
            received, wrong = await talk(session, self._ports)
            self.seen.frames[session.origin] += session.frames
            self.seen.connections += 1 + session.frames // 2  # each may be a call
            for status in received.statuses.values():
                self.seen.statuses[status.code] += 1
                wrong += told(status.text, self._secrets)
                wrong += [f"a call ends with 2: {status.text}"] if status.code == "2" else []
            for what in wrong:
                await self._watch.tell_if_alive("frames", f"{session.origin}: {what}", session)
            if self._watch.alive:
                self._under_way.discard(session)


def _part(number: int, size: int) -> tuple[int, int]:
    return number * size, (number + 1) * size


def by_service(calls: Counter[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Calls by status, for each service."""
    services = sorted({service for service, _ in calls})
    return {
        service: dict(sorted((code, count) for (one, code), count in calls.items() if one == service))
        for service in services
    }
