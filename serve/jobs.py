"""What goes into the engine and what comes out, in tokens and arrays. It knows no gRPC."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from model.errors import InvalidRequestError
from model.hypotheses import Hypothesis, Node
from model.options import SearchOptions
from model.steps import NO_FAMILIES, Family
from serve.request import Request, current

PATIENCE = 30.0
"""Seconds within which a job without a deadline is due: it waits for more urgent ones, but not for ever."""

Settled = Callable[["Decoded", Sequence[Node]], None]


def deadline_in(seconds: float | None) -> float | None:
    """The deadline of a job whose caller waits for so many seconds from now; None where it waits for ever."""
    return None if seconds is None else time.monotonic() + seconds


class Caller(NamedTuple):
    """Who asks."""

    client: str
    """As in `Job`."""
    deadline: float | None
    """As in `Job`."""


@dataclass(frozen=True)
class Decoded:
    """What the engine gives back.

    Attributes:
        encoder_attention: [layer, head, source, source], padding cut off; None where it was not asked for.
        hypotheses: best first; empty while a stream is still under way.
    """

    encoder_attention: Float[np.ndarray, "layer head source source"] | None
    hypotheses: list[Hypothesis]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request, in tokens.

    Attributes:
        source: ids, the end token last.
        options: how to search.
        shortlist: search among the candidates that the source suggests.
        target: ids to score instead of searching, the end token last.
        attention: families to return.
        deadline: second of `time.monotonic` after which nobody wants the answer any more.
        client: whose it is; the queue is fair between clients.
        size: bytes that the request takes while it waits.
        on_settled: called from the engine's thread after each step with all tokens that are certain by then.
    """

    source: list[int]
    options: SearchOptions
    shortlist: bool = False
    target: list[int] | None = None
    attention: frozenset[Family] = NO_FAMILIES
    deadline: float | None = None
    client: str = ""
    size: int = 0
    on_settled: Settled | None = None

    @property
    def tokens(self) -> int:
        """Most tokens of source and target that its rows can come to keep."""
        return self.options.beam_size * (len(self.source) + self.options.longest)

    @property
    def side(self) -> int:
        """Tokens of the source or of a given target, whichever is more."""
        return max(len(self.source), len(self.target or ()))

    def attention_size(self, age: int = 0) -> int:
        """Most weights of one head, of any one family, kept for it by the time that so many tokens are generated.

        Encoder attention is the source squared; cross-attention, for each row, the answer times the source; decoder
        attention, for each row, half the answer squared. An answer counts as at least as long as its source.
        """
        return self.options.beam_size * max(self.side, age) ** 2 if self.attention else 0


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What the engine takes on at a time."""

    queue: int = 1024
    """Most requests waiting; one more is refused."""
    client_queue: int | None = None
    """Most requests waiting of one client; by default seven eighths of all, so that none can keep the others out."""
    queue_tokens: int = 4 * 1024 * 1024
    """Most tokens of source and target that all waiting requests can come to keep, counted as in `tokens`."""
    queue_bytes: int = 64 * 1024 * 1024
    """Most bytes of waiting requests. Of tokens or bytes, a single request may have more where no other waits."""
    rows: int = 64
    """Most rows (sentences times beams) decoded together."""
    encode_tokens: int = 2048
    """Most padded source tokens that are read between two decoder steps: what running rows wait for at most."""
    tokens: int = 128 * 1024
    """Most tokens of source and target, over all rows, that keys and values can come to be kept of: each row counts
    with its longest answer. A single request may have more."""
    attention: int = 8 * 1024 * 1024
    """Most weights of one attention head, of any one family, kept for answers under way, or computed at a time for
    targets that are scored: rows times the square of the longer side so far, for requests that asked for any. Answers
    that grow beyond it keep what they have, but no more are let in; a single request may have more."""
    call_seconds: float = 0.004
    """Several steps are taken in one call as long as it ends in this time; joining and leaving wait for it."""

    @property
    def waiting_of_a_client(self) -> int:
        """Most requests waiting of one client."""
        return math.ceil(7 / 8 * self.queue) if self.client_queue is None else self.client_queue

    def __post_init__(self) -> None:
        if math.isnan(self.call_seconds):
            raise InvalidRequestError("call_seconds", "is no number")


@dataclass(frozen=True)
class Timings:
    """Where the time of a job went, in seconds.

    Attributes:
        queue: until its turn came.
        decode: from there until its result was ready.
    """

    queue: float
    decode: float


@dataclass(eq=False)
class Ticket:
    """A job on its way.

    Attributes:
        future: its result, or what went wrong.
        request: the call that it is for; None where it is for none.
        expected: seconds that its answer was expected to take when it came, with others ahead; 0 where nothing was.
    """

    job: Job
    future: "Future[Decoded]" = field(default_factory=Future)
    request: Request | None = field(default_factory=current)
    expected: float = 0.0
    _arrived: float = field(default_factory=time.monotonic)
    _ending: threading.Lock = field(default_factory=threading.Lock)
    _begun: float | None = None
    _finished: float | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _tell: "Callable[[Ticket], object] | None" = None

    def cancel(self) -> None:
        """Give the job up: it leaves the queue, or its batch at the next step. Harmless when it is done."""
        self._cancelled.set()
        self.future.cancel()
        if (tell := self._tell) is not None:
            tell(self)

    def when_cancelled(self, tell: "Callable[[Ticket], object] | None") -> None:
        """Have something told as soon as it is given up, at once if it was; None to have nothing told any more."""
        self._tell = tell
        if tell is not None and self.cancelled:
            tell(self)

    @property
    def cancelled(self) -> bool:
        """Nobody waits for it any more."""
        return self._cancelled.is_set()

    @property
    def expired(self) -> bool:
        """Its deadline has passed."""
        return self.job.deadline is not None and time.monotonic() >= self.job.deadline

    @property
    def left(self) -> float | None:
        """Seconds until its deadline; None where it has none."""
        return None if self.job.deadline is None else self.job.deadline - time.monotonic()

    @property
    def due(self) -> float:
        """Second of `time.monotonic` by which it should have had its turn."""
        return self._arrived + PATIENCE if self.job.deadline is None else self.job.deadline

    @property
    def age(self) -> float:
        """Seconds since it arrived."""
        return time.monotonic() - self._arrived

    @property
    def timings(self) -> Timings:
        """Where its time went, or has gone so far."""
        finished = self._finished or time.monotonic()
        begun = self._begun or finished
        return Timings(begun - self._arrived, finished - begun)

    def begin(self) -> None:
        """Its turn has come."""
        self._begun = time.monotonic()

    def finish(self, result: Decoded) -> None:
        """Hand over the result, unless the job has failed or nobody waits for it."""
        self._finished = time.monotonic()
        with self._ending:
            if not self.future.done() and self.future.set_running_or_notify_cancel():
                self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Hand over an error, unless the job is done or nobody waits for it."""
        with self._ending:  # the engine's thread and whoever gives it up may come together
            if not self.future.done() and self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)
