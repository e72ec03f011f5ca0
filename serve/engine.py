"""The decode engine: a bounded queue, one worker, batches of whatever waits. It knows no gRPC.

    submit ──► queue ──► worker: take what fits one batch ──► Decoding.step, step, step ──► each result as it is ready
                 ▲                                              │
             bounded                                      settled tokens (streams), cancels between steps

A caller hands in a job and gets a ticket: a future, and a way to cancel. Batches are formed when the last one is done;
a batcher that lets rows join between steps needs nothing more of this interface.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from model.search import Decoding, Hypothesis, Node, SearchOptions, score
from model.steps import StepModel, pad
from serve.errors import EngineError, QueueFullError, ShuttingDownError

log = logging.getLogger(__name__)

Settled = Callable[["Decoded", Sequence[Node]], None]


@dataclass(frozen=True)
class Decoded:
    """What the engine gives back.

    Attributes:
        encoder_attention: [layer, head, source, source], padding cut off.
        hypotheses: best first; empty while a stream is still under way.
    """

    encoder_attention: Float[np.ndarray, "layer head source source"]
    hypotheses: list[Hypothesis]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request, in tokens.

    Attributes:
        source: ids, the end token last.
        options: how to search.
        target: ids to score instead of searching, the end token last.
        on_settled: called from the engine's thread after each step with all tokens that are certain by then.
    """

    source: list[int]
    options: SearchOptions
    target: list[int] | None = None
    on_settled: Settled | None = None


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What the engine takes on at a time."""

    queue: int = 1024
    """Most requests waiting; one more is refused."""
    rows: int = 64
    """Most rows (sentences times beams) in a batch."""
    batch_tokens: int = 16384
    """Most padded tokens of source or target, times beams, in a batch."""
    batch_attention: int = 8 * 1024 * 1024
    """Most weights of one attention head in a batch: rows times the square of the longest side."""


@dataclass(eq=False)
class Ticket:
    """A job on its way.

    Attributes:
        future: its result, or what went wrong.
    """

    job: Job
    future: "Future[Decoded]" = field(default_factory=Future)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Give the job up: it leaves the queue, or its batch at the next step. Harmless when it is done."""
        self._cancelled.set()
        self.future.cancel()

    @property
    def cancelled(self) -> bool:
        """Nobody waits for it any more."""
        return self._cancelled.is_set()

    def finish(self, result: Decoded) -> None:
        """Hand over the result, unless the job has failed or nobody waits for it."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Hand over an error, unless the job is done or nobody waits for it."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Engine:
    """Decodes jobs in batches on a thread of its own.

    Args:
        model: what computes the steps.
        limits: what to take on at a time.
    """

    def __init__(self, model: StepModel, limits: EngineLimits | None = None) -> None:
        self._model = model
        self._limits = limits or EngineLimits()
        self._queue: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._worker = threading.Thread(target=self._work, name="limelight-engine", daemon=True)
        self._worker.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """The worker is running."""
        return self._worker.is_alive()

    def submit(self, job: Job) -> Ticket:
        """Queue a job.

        Raises:
            QueueFullError: too many are waiting.
            ShuttingDownError: the engine takes no more.
        """
        ticket = Ticket(job)
        with self._changed:
            if self._stopping or not self.alive:
                raise ShuttingDownError("the server is shutting down and takes no new requests")
            if len(self._queue) >= self._limits.queue:
                self._drop_cancelled()
            if len(self._queue) >= self._limits.queue:
                raise QueueFullError(
                    f"{len(self._queue)} requests are waiting, the limit is {self._limits.queue}: retry later"
                )
            self._queue.append(ticket)
            self._changed.notify()
        return ticket

    def stop(self, timeout: float | None = None) -> bool:
        """Refuse new jobs, finish those at hand and waiting; returns whether that was done in time (seconds)."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._worker.join(timeout)
        return not self._worker.is_alive()

    def _work(self) -> None:
        while batch := self._take():
            try:
                self._run(batch)
            except Exception:
                log.exception("a batch of %d failed", len(batch))
                for ticket in batch:
                    ticket.fail(EngineError("the engine failed on this batch"))

    def _take(self) -> list[Ticket]:
        """The next batch, in order of arrival; empty when stopping and nothing is left."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._queue or self._stopping:
                    break
                self._changed.wait()
            batch: list[Ticket] = []
            while self._queue and self._fits(batch, self._queue[0]):
                batch.append(self._queue.popleft())
            return batch

    def _drop_cancelled(self) -> None:
        self._queue = deque(ticket for ticket in self._queue if not ticket.cancelled)

    def _fits(self, batch: list[Ticket], ticket: Ticket) -> bool:
        if not batch:
            return True
        beam = ticket.job.options.beam_size
        rows = (len(batch) + 1) * beam
        longest = max(max(len(other.job.source), len(other.job.target or ())) for other in (*batch, ticket))
        return (
            beam == batch[0].job.options.beam_size
            and (ticket.job.target is None) == (batch[0].job.target is None)
            and rows <= self._limits.rows
            and rows * longest <= self._limits.batch_tokens
            and rows * longest**2 <= self._limits.batch_attention
        )

    def _run(self, batch: list[Ticket]) -> None:
        if batch[0].job.target is not None:
            self._score(batch)
        else:
            self._search(batch)

    def _score(self, batch: list[Ticket]) -> None:
        sources = [ticket.job.source for ticket in batch]
        targets = [ticket.job.target or [] for ticket in batch]
        memory = self._model.encode(*pad(sources))
        penalties = [ticket.job.options.length_penalty for ticket in batch]
        hypotheses = score(self._model, sources, targets, penalties, memory)
        for index, ticket in enumerate(batch):
            attention = _cut(memory.encoder_attention[index], len(sources[index]))
            ticket.finish(Decoded(attention, [hypotheses[index]]))

    def _search(self, batch: list[Ticket]) -> None:
        decoding = Decoding(
            self._model, [ticket.job.source for ticket in batch], [ticket.job.options for ticket in batch]
        )
        begun = [
            Decoded(_cut(decoding.encoder_attention[index], len(ticket.job.source)), [])
            for index, ticket in enumerate(batch)
        ]
        while not decoding.done:
            for index in decoding.step():
                self._deliver(batch[index], decoding, index, begun[index])
            for index in decoding.active:
                if batch[index].cancelled:
                    decoding.cancel(index)

    def _deliver(self, ticket: Ticket, decoding: Decoding, index: int, begun: Decoded) -> None:
        # Each sentence is answered as soon as it is done, whatever its batch mates still have to do.
        search = decoding.searches[index]
        if ticket.job.on_settled is not None:
            try:
                ticket.job.on_settled(begun, search.settled())
            except Exception:  # one listener's fault must not reach its batch mates
                log.exception("a stream's listener failed")
                ticket.fail(EngineError("the stream could not be written"))
                ticket.cancel()
        if search.done:
            ticket.finish(Decoded(begun.encoder_attention, decoding.results(index)))


def _cut(attention: Any, length: int) -> Float[np.ndarray, "layer head source source"]:
    cut: np.ndarray[Any, Any] = attention[:, :, :length, :length]
    return cut
