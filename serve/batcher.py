"""The continuous batcher: what is decoded together, from step to step. It knows no queue.

tickets ──► admit: encoder passes ──► lanes of like searches ──► step, step, step ──► each result as it is ready
▲                        │
sentences join between steps    finished, cancelled, expired ones leave
"""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from model.errors import InvalidRequestError
from model.forced import score
from model.reading import read
from model.search import STEPS_AHEAD, Decoding, Hypothesis, Sentence
from model.steps import Family, Memory, StepModel
from serve.errors import EngineError, ExpiredError, OutOfMemoryError, ServeError
from serve.jobs import Decoded, EngineLimits, Ticket
from serve.logs import about

log = logging.getLogger(__name__)

SHORTEST = 1e-9
"""Seconds that a call takes at least, as far as its pace is concerned."""


class Kind(NamedTuple):
    """What searches that share a lane have in common."""

    beam_size: int
    shortlist: bool
    alone: int = 0
    """Another number for each that has a lane to itself."""


@dataclasses.dataclass
class Counts:
    """What was done since the beginning."""

    source_tokens: int = 0
    padded_source_tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    retries: int = 0


class Batcher:
    """The jobs under way.

    Args:
        model: what computes the steps.
        limits: what to take on at a time.
        shortlist: computes the steps of searches among candidates; without it there is to be none.

    Attributes:
        counts: what was done.
    """

    def __init__(self, model: StepModel, limits: EngineLimits, shortlist: StepModel | None = None) -> None:
        self._models, self._limits = {False: model, True: shortlist or model}, limits
        self._lanes: dict[Kind, Lane] = {}
        self._paces: dict[tuple[int, bool], Pace] = {}
        self._counted: tuple[int, int, int] | None = None
        self._again: deque[Ticket] = deque()
        self.counts = Counts()

    @property
    def busy(self) -> bool:
        """Something is being decoded, or is to be tried again."""
        return bool(self._lanes or self._again)

    @property
    def tickets(self) -> list[Ticket]:
        """Of all that is under way or is to be tried again; from any thread, as it was a moment ago."""
        return [*(ticket for lane in list(self._lanes.values()) for ticket in lane.tickets), *self._again]

    @property
    def rows(self) -> int:
        """Rows that the next round of steps computes."""
        return sum(lane.decoding.rows for lane in self._lanes.values())

    def fits(self, chosen: Sequence[Ticket], ticket: Ticket) -> bool:
        """Whether a ticket can be admitted now, with others that were chosen before it."""
        if self._again:  # what failed together is tried alone, and those who come wait for that
            return False
        limits = self._limits
        jobs = [*(other.job for other in chosen), ticket.job]
        padded = len(jobs) * max(job.side for job in jobs)
        if ticket.job.target is not None:  # a pass of its own, not a part of the running batch
            size = padded * max(job.side for job in jobs) if any(job.attention for job in jobs) else 0
            return not chosen or (
                padded <= limits.encode_tokens and len(jobs) <= limits.rows and size <= limits.attention
            )
        if not chosen and not self.busy:
            return True
        rows, tokens, attention = self._load()
        return (
            padded <= limits.encode_tokens
            and rows + sum(job.options.beam_size for job in jobs) <= limits.rows
            and tokens + sum(job.tokens for job in jobs) <= limits.tokens
            and attention + sum(job.attention_size() for job in jobs) <= limits.attention
        )

    def _load(self) -> tuple[int, int, int]:
        """Rows, tokens and attention under way: the same for all that are looked at between two steps."""
        if self._counted is None:
            lanes = self._lanes.values()
            self._counted = self.rows, sum(lane.tokens for lane in lanes), sum(lane.attention for lane in lanes)
        return self._counted

    def admit(self, tickets: Sequence[Ticket]) -> None:
        """Read the sources of some jobs, and let them join; or score them, if that is what they want.

        Those with a shortlist and those without are read apart: what a step remembers of them is not alike.
        """
        self._counted = None
        for shortlist, model in self._models.items():
            if together := [ticket for ticket in tickets if ticket.job.shortlist == shortlist]:
                self._admit(model, together, shortlist)

    def _admit(self, model: StepModel, tickets: Sequence[Ticket], shortlist: bool, alone: int = 0) -> None:
        sources = [ticket.job.source for ticket in tickets]
        lengths = [len(source) for source in sources]
        self.counts.source_tokens += sum(lengths)
        self.counts.padded_source_tokens += len(lengths) * max(lengths)
        wanted = any("encoder" in ticket.job.attention for ticket in tickets)
        try:
            memory = read(model, sources, attention=wanted)
            begun = [_begun(ticket, memory.encoder_attention, index) for index, ticket in enumerate(tickets)]
            if tickets[0].job.target is not None:
                families = frozenset().union(*(ticket.job.attention for ticket in tickets))
                targets = [ticket.job.target or [] for ticket in tickets]
                penalties = [ticket.job.options.length_penalty for ticket in tickets]
                scored = score(model, sources, targets, penalties, memory, families)
                for ticket, before, hypothesis in zip(tickets, begun, scored, strict=True):
                    ticket.finish(Decoded(before.encoder_attention, [_only(ticket.job.attention, hypothesis)]))
                return
            for width in dict.fromkeys(ticket.job.options.beam_size for ticket in tickets):
                indices = [index for index, ticket in enumerate(tickets) if ticket.job.options.beam_size == width]
                chosen = [tickets[index] for index in indices]
                kind = Kind(width, shortlist, alone)
                self._join(kind, memory, indices, chosen, [begun[index] for index in indices])
        except Exception as error:
            log.exception("a batch of %d could not be read", len(tickets), extra=_about(tickets))
            self._failed(tickets, error)

    def _join(
        self,
        kind: Kind,
        memory: Memory,
        indices: Sequence[int],
        tickets: Sequence[Ticket],
        begun: Sequence[Decoded],
    ) -> None:
        pace = self._paces.setdefault((kind.beam_size, kind.shortlist), Pace(self._limits.call_seconds))
        lane = self._lanes.setdefault(kind, Lane(self._models[kind.shortlist], kind.beam_size, pace))
        try:
            lane.join(memory, indices, tickets, begun)
        except Exception as error:
            log.exception(
                "%d sentences could not join %d others", len(tickets), len(lane.tickets), extra=_about(tickets)
            )
            self._failed(list(dict.fromkeys([*tickets, *lane.tickets])), error)
            del self._lanes[kind]  # half joined, it is of no use to anybody

    def step(self) -> None:
        """One decoder step, or a few, for everything that is under way."""
        self._counted = None
        for kind, lane in list(self._lanes.items()):
            try:
                lane.drop_unwanted()
                if not lane.empty:
                    rows = lane.decoding.rows
                    taken = lane.step()
                    self.counts.steps += taken
                    self.counts.row_steps += taken * rows
            except Exception as error:
                log.exception("a step of %d rows failed", lane.decoding.rows, extra=_about(lane.tickets))
                self._failed(lane.tickets, error)
                del self._lanes[kind]
            else:
                if lane.empty:
                    del self._lanes[kind]
        self._retry()

    def _failed(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """Whoever failed among others is tried once more, by itself; what fails by itself has failed."""
        if len(tickets) > 1:
            self._again.extend(tickets)
            return
        for ticket in tickets:
            ticket.fail(_failure(error))

    def _retry(self) -> None:
        """Let one of those that failed among others begin anew, once nothing else runs."""
        while self._again and not self._lanes:
            ticket = self._again[0]  # until it is admitted: whoever gives all up must find it
            if not _given_up(ticket) and not ticket.future.done():
                self.counts.retries += 1
                shortlist = ticket.job.shortlist
                self._counted = None
                self._admit(self._models[shortlist], [ticket], shortlist, self.counts.retries)
            self._again.popleft()


class Pace:
    """How many steps go into one short call, by what the last one took.

    Args:
        seconds: see `EngineLimits.call_seconds`.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._rate, self._rows = seconds, 0.0, 1

    def steps(self, rows: int) -> int:
        """Most steps of so many rows: one of more rows may be dearer in proportion, one of fewer counts as dear."""
        if not self._rate:  # nothing is known yet
            return 1
        return int(max(1, min(STEPS_AHEAD, self._seconds * self._rate / max(1.0, rows / self._rows))))

    def took(self, rows: int, steps: int, seconds: float) -> None:
        """Learn from a call."""
        self._rate, self._rows = steps / max(seconds, SHORTEST), rows


class Lane:
    """The running batch of one kind.

    Args:
        model: what computes the steps.
        width: the beam size.
        pace: of calls of this kind; it outlasts this batch.
    """

    def __init__(self, model: StepModel, width: int, pace: Pace) -> None:
        self.decoding = Decoding(model, width)
        self._pace = pace
        self._under_way: dict[Sentence, tuple[Ticket, Decoded]] = {}

    @property
    def empty(self) -> bool:
        """Nothing is under way."""
        return not self._under_way

    @property
    def tickets(self) -> list[Ticket]:
        """Of the jobs under way."""
        return [ticket for ticket, _ in list(self._under_way.values())]

    @property
    def tokens(self) -> int:
        """Most tokens that its rows can come to keep."""
        return sum(ticket.job.tokens for ticket in self.tickets)

    @property
    def attention(self) -> int:
        """Attention that its rows keep, in weights of one head."""
        return sum(ticket.job.attention_size(sentence.age) for sentence, (ticket, _) in self._under_way.items())

    def join(self, memory: Any, indices: Sequence[int], tickets: Sequence[Ticket], begun: Sequence[Decoded]) -> None:
        """Let sentences of an encoded batch in."""
        sentences = self.decoding.join(
            memory, indices, [ticket.job.options for ticket in tickets], [ticket.job.attention for ticket in tickets]
        )
        self._under_way |= {
            sentence: (ticket, before) for sentence, ticket, before in zip(sentences, tickets, begun, strict=True)
        }

    def drop_unwanted(self) -> None:
        """Take out what nobody waits for any more, before it costs another step."""
        unwanted = []
        for sentence, (ticket, _) in self._under_way.items():
            if _given_up(ticket):
                unwanted.append(sentence)
        self.decoding.leave(unwanted)
        for sentence in unwanted:
            del self._under_way[sentence]

    def step(self) -> int:
        """One step, or as many as fit into one short call; what is ready is handed over. Returns how many."""
        started, clock, rows = time.perf_counter(), self.decoding.clock, self.decoding.rows
        stepped = self.decoding.step(self._pace.steps(rows))
        taken = self.decoding.clock - clock
        self._pace.took(rows, taken, time.perf_counter() - started)
        for sentence in stepped:
            ticket, begun = self._under_way[sentence]
            if ticket.job.on_settled is not None:
                self._tell(ticket, begun, sentence)
            if sentence.done:
                del self._under_way[sentence]
                _deliver(ticket, begun, sentence.results)
        return taken

    def _tell(self, ticket: Ticket, begun: Decoded, sentence: Sentence) -> None:
        try:
            if ticket.job.on_settled is not None:
                ticket.job.on_settled(begun, self.decoding.settled(sentence))
        except Exception:  # one listener's fault must not reach its batch mates
            log.exception("a stream's listener failed", extra=_about([ticket]))
            ticket.fail(EngineError("the stream could not be written"))
            ticket.cancel()


def _deliver(ticket: Ticket, begun: Decoded, results: Callable[[], list[Any]]) -> None:
    try:
        ticket.finish(Decoded(begun.encoder_attention, results()))
    except InvalidRequestError as error:
        ticket.fail(error)
    except Exception as error:  # it has left its lane, where nobody else would answer for it
        log.exception("the results of a search could not be put together", extra=_about([ticket]))
        ticket.fail(_failure(error))


def _begun(ticket: Ticket, attention: Any, index: int) -> Decoded:
    if attention is None or "encoder" not in ticket.job.attention:
        return Decoded(None, [])
    length = len(ticket.job.source)
    # A copy: a view would keep the whole batch's attention for as long as one answer lives.
    cut: Float[np.ndarray, "layer head source source"] = attention[index, :, :, :length, :length].copy()
    return Decoded(cut, [])


def _only(families: frozenset[Family], hypothesis: Hypothesis) -> Hypothesis:
    """What was asked for, where a batch mate asked for more."""
    return dataclasses.replace(
        hypothesis,
        cross_attention=hypothesis.cross_attention if "cross" in families else None,
        decoder_attention=hypothesis.decoder_attention if "decoder" in families else None,
    )


def _about(tickets: Sequence[Ticket]) -> dict[str, Any]:
    return about(ticket.request for ticket in tickets)


def _given_up(ticket: Ticket) -> bool:
    """Whether nobody waits for a ticket any more; one whose deadline has passed fails."""
    expired = ticket.expired
    if expired:
        ticket.fail(ExpiredError("the deadline passed before the answer was ready"))
    return expired or ticket.cancelled


def _failure(error: Exception) -> ServeError:
    """What somebody is told who failed alone."""
    # ONNX Runtime has no class of its own for it; its allocator's words are these.
    if isinstance(error, MemoryError) or "Failed to allocate memory" in str(error):
        return OutOfMemoryError("there is not enough memory for this request: ask for less, or later")
    return EngineError("the engine failed on this request")
