"""Callers who ask all the time with our own client, and know what is right."""

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from serve.answers import End, ServerError
from serve.client import Client

BEAM = 4
"""Of the texts that are asked for alone, so that their calls last and some are always under way; streams are greedy."""

TIMEOUT = 60.0
"""Seconds for a call: only what is lost takes so long."""

OK, WRONG = "OK", "WRONG"
"""Ends of a call that was answered: as it should be, or otherwise. Of all others it is the code."""

MIDWAY = " midway"
"""Behind the code of a stream of which something had come."""


class Kind(StrEnum):
    """How a text is asked for."""

    UNARY = "unary"
    STREAM = "stream"


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Attributes:
        sources: the texts.
        answers: what is right, of each kind and for each text.
    """

    sources: Sequence[str]
    answers: dict[Kind, dict[str, str]]


def answered(address: str, sources: Sequence[str]) -> Asked:
    """Let a server say what is right, asked one by one."""
    with Client(address, timeout=TIMEOUT) as client:
        return Asked(
            sources,
            {
                kind: {source: client.generate(source, beam_size=beam).best.text for source in sources}
                for kind, beam in ((Kind.UNARY, BEAM), (Kind.STREAM, 1))
            },
        )


@dataclass
class Ends:
    """What became of calls.

    Attributes:
        counts: ends of the calls of each kind.
        said: what the client was told last with each end that is an error.
        latencies: seconds of every unary call.
    """

    counts: dict[Kind, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in Kind})
    said: dict[str, str] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)


class Callers:
    """Callers, each on a thread of its own, who ask again as soon as they are answered.

    Args:
        address: of what is asked.
        asked: what.
        many: how many of each kind.

    Attributes:
        ends: where ends are counted; may be replaced at any time.
    """

    def __init__(self, address: str, asked: Asked, many: dict[Kind, int]) -> None:
        self._address, self._asked = address, asked
        self._leaving, self._counting = threading.Event(), threading.Lock()
        self._failed: list[Exception] = []
        self.ends = Ends()
        self._threads = [
            threading.Thread(target=self._call, args=(kind, number), name=f"{kind} caller {number}")
            for kind, count in many.items()
            for number in range(count)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join()

    def wait(self, seconds: float) -> None:
        """Let them ask for so long; raises what has ended one of them."""
        self._leaving.wait(seconds)
        if self._failed:
            raise self._failed[0]

    def _call(self, kind: Kind, number: int) -> None:
        draw = random.Random(f"{kind} {number}")
        try:
            with Client(self._address, timeout=TIMEOUT) as client:
                while not self._leaving.is_set():
                    source = draw.choice(self._asked.sources)
                    begun = time.monotonic()
                    self._count(kind, self._end(client, kind, source), time.monotonic() - begun)
        except Exception as error:  # raised where the callers are waited for
            self._failed.append(error)
            self._leaving.set()

    def _end(self, client: Client, kind: Kind, source: str) -> str:
        text, events = None, 0
        try:
            if kind is Kind.UNARY:
                text = client.generate(source, beam_size=BEAM).best.text
            else:
                for event in client.stream(source):
                    events += 1
                    text = event.answer.best.text if isinstance(event, End) else None
        except ServerError as error:
            end = error.code.name + (MIDWAY if events else "")
            self.ends.said[end] = str(error)
            return end
        return OK if text == self._asked.answers[kind][source] else WRONG

    def _count(self, kind: Kind, end: str, seconds: float) -> None:
        with self._counting:
            self.ends.counts[kind][end] += 1
            if kind is Kind.UNARY:
                self.ends.latencies.append(seconds)
