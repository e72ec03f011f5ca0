"""Those who wait for the engine: a bounded queue, the most urgent first, fair between clients.

Who is next: of the clients that wait, the one that has had least so far, in tokens, counted from when it came back
(start-time fair queueing, Goyal et al. 1996); of those that had alike, and within one client, the earliest deadline.
So one client alone, or many that ask for as much, are served by deadline; one that asks for more waits for the others.

Under overload every call looks at the queue, and most are turned away: to keep it up to date costs by the clients that
wait, and by what leaves, not by all that waits.
"""

import heapq
import itertools
import math
import time
from collections import deque
from dataclasses import dataclass, field

from serve.errors import ExpiredError, QueueFullError, ServeError
from serve.jobs import EngineLimits, Ticket

FORGETTING = 0.2
"""Weight of the newest observation in what is known of the pace."""

LEAST_WAIT, MOST_WAIT = 0.05, 30.0
"""Seconds that a caller is advised to wait at least and at most."""

UNKNOWN_WAIT = 1.0
"""Seconds, where the pace is not known yet."""

REMEMBERED = 4096
"""Clients that nothing waits of, of which is known that they had more than others."""

ORDER = 64
"""Turns that may be out of date, besides as many as there are clients, until they are thrown away."""

HOPELESS = 0.5
"""Who has less time left than this share of what answers take lately, is not begun while others wait."""

CAREFUL, MOST_CAUTION, CAREFREE = 1.1, 3.0, 10.0
"""What an answer that took longer than was expected multiplies the caution by; how far that goes; and the seconds in
which what is over 1 falls to a third. By the caution, expectations are longer than what was seen: whoever is let in and
comes too late has cost what another could have had. Deadlines have no part in it: who sets impossible ones teaches
nothing."""

SHORTER, LONGER = 0.91, 1.01
"""What an answer that took less, or more, multiplies the time of a short one by: one in ten takes less."""

DROPPED = "the deadline passed before the request's turn came"
"""What is said of those that expired in the queue."""

TOO_LATE = "the deadline would pass before the answer is ready"
"""What is said of those that would expire while they are decoded."""


class Outflow:
    """How fast a queue empties, and how long answers take then: what to expect, and advice to who finds it full."""

    def __init__(self) -> None:
        self._pace, self._recent, self._since = 0.0, 0.0, time.monotonic()
        self._decoding, self._short = 0.0, 0.0
        self._caution, self._learned = 1.0, self._since

    def began(self) -> None:
        """The queue is no longer empty: how fast it emptied some time ago says little of now."""
        self._recent, self._since = 0.0, time.monotonic()

    def took(self, count: int) -> None:
        """So many have left the queue since it began or the last time that any did."""
        if not count:
            return
        now = time.monotonic()
        pace = (now - self._since) / count
        weight = 1 - (1 - FORGETTING) ** count
        self._pace += (pace - self._pace) * (weight if self._pace else 1.0)
        self._recent += (pace - self._recent) * (weight if self._recent else 1.0)
        self._since = now

    @property
    def caution(self) -> float:
        """What expectations are multiplied by."""
        return 1.0 + (self._caution - 1.0) * math.exp((self._learned - time.monotonic()) / CAREFREE)

    def came(self, ticket: Ticket) -> None:
        """One has been answered or given up, which says something of what was expected of it if that has passed."""
        caution = self.caution
        if ticket.expected and ticket.age > caution * ticket.expected:
            self._caution, self._learned = min(MOST_CAUTION, caution * CAREFUL), time.monotonic()

    def answered(self, ticket: Ticket) -> None:
        """One that had left the queue has been decoded."""
        if ticket.job.target is not None:
            return
        seconds = ticket.timings.decode
        pace = seconds / len(ticket.job.source)
        self._decoding += (pace - self._decoding) * (FORGETTING if self._decoding else 1.0)
        self._short = self._short * (SHORTER if seconds < self._short else LONGER) if self._short else seconds

    def expected(self, count: float, ticket: Ticket | None = None) -> float:
        """Seconds until so many more have left and the answer is ready, by what was seen since it began.

        Args:
            count: how many are ahead.
            ticket: whose answer; None for a short one.

        Returns:
            0 where nobody is ahead, or nothing was seen yet.
        """
        wait = count * self._recent
        return wait and wait + (self._short if ticket is None else self.decoding(ticket))

    def decoding(self, ticket: Ticket) -> float:
        """Seconds that an answer takes, by those of late and the length of the source; 0 where none was."""
        return self._decoding * len(ticket.job.source) if ticket.job.target is None else 0.0

    def advice(self, count: float) -> float:
        """The same for who is to try again, by all that was seen: never 0, and never very long."""
        return min(MOST_WAIT, max(LEAST_WAIT, count * self._pace)) if self._pace else UNKNOWN_WAIT


@dataclass(eq=False)
class _Client:
    """What waits of one client, the most urgent first."""

    start: float = 0.0
    """Tokens that it has had, on the scale of all: whoever has least is next."""
    heap: list[tuple[float, int, Ticket]] = field(default_factory=list)
    """When each is due, a number to tell them apart, the ticket. The first one waits; of the others, those that were
    cancelled have left the queue all the same."""
    left: int = 0
    """How many these are."""

    def __len__(self) -> int:
        return len(self.heap) - self.left


class Waiting:
    """The queue. It is no thread's own: whoever uses it holds a lock.

    Args:
        limits: what may wait.

    Attributes:
        tokens: that all which wait can come to keep.
        bytes: that their requests take.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._clients: dict[str, _Client] = {}  # of whom something waits
        self._had: dict[str, float] = {}  # what others had by the time that nothing of theirs was left
        self._order: list[tuple[float, float, int, str]] = []  # a heap of whose turn it is; what is out of date is left
        self._numbers = itertools.count()
        self._outflow = Outflow()
        self._now = 0.0
        self._waiting = set[Ticket]()
        self._cancelled = deque[Ticket]()  # of these, or of what waited once: told from any thread
        self.tokens, self.bytes = 0, 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, ticket: Ticket) -> None:
        """Let one in.

        Raises:
            QueueFullError: too much waits, or too much of this client.
            ExpiredError: its deadline has passed, or would before its answer was ready.
        """
        self.drop_unwanted()
        if (refusal := self._over(ticket)) is not None:
            raise self._full(refusal)
        self._check_deadline(ticket)
        if not self._waiting:
            self._outflow.began()
        name = ticket.job.client
        if name not in self._clients:
            self._clients[name] = _Client(self._start(name))
            self._had.pop(name, None)
        client = self._clients[name]
        heapq.heappush(client.heap, (ticket.due, next(self._numbers), ticket))
        if client.heap[0][-1] is ticket:
            self._line_up(name)
        self._enter(ticket)

    def refusal(self, name: str, deadline: float | None) -> ServeError | None:
        """Why one of which only this is known would not be let in, as far as that can be told; None where it may be.

        Args:
            name: of its client.
            deadline: see `Job`.
        """
        self.drop_unwanted()
        client = self._clients.get(name)
        if len(self) >= self._limits.queue:
            return self._full(f"{len(self)} requests are waiting, the limit is {self._limits.queue}")
        if client is None:  # it may be its turn
            return None
        if len(client) >= self._limits.waiting_of_a_client:
            return self._full(self._too_many(client))
        if deadline is None:
            return None
        before = len(self._before(client, deadline))
        # As many of each that has had no more: where all ask for as much, that is what being fair comes to.
        ahead = sum(min(before, len(one)) for one in self._clients.values() if one.start <= client.start)
        wait, left = self._outflow.caution * self._outflow.expected(ahead), deadline - time.monotonic()
        return ExpiredError(_too_late(wait, left)) if wait and wait >= left else None

    def first(self) -> Ticket | None:
        """Whose turn it is; None where nobody waits."""
        while self._order:
            start, due, number, name = self._order[0]
            client = self._clients.get(name)
            if client is not None and (client.start, *client.heap[0][:2]) == (start, due, number):
                return client.heap[0][-1]
            heapq.heappop(self._order)
        return None

    def take(self) -> Ticket:
        """Let the first one out."""
        if self.first() is None:
            raise IndexError("nobody waits")
        *_, name = heapq.heappop(self._order)
        client = self._clients[name]
        _, _, ticket = client.heap[0]
        self._now = client.start
        client.start += ticket.job.tokens
        self._leave(ticket)
        return ticket

    def took(self, count: int) -> None:
        """So many were taken together."""
        self._outflow.took(count)

    def answered(self, ticket: Ticket) -> None:
        """One that was taken has been answered, has failed or was given up."""
        self._outflow.came(ticket)
        if not ticket.future.cancelled() and ticket.future.exception() is None:
            self._outflow.answered(ticket)

    def drop_unwanted(self) -> None:
        """Take out what nobody waits for any more; those whose deadline has passed, or is sure to, are told.

        Of each client the most urgent are looked at. One of the others may be sure to be late too, if its source is
        longer than theirs; or late, behind one without a deadline that waits for long. It is found when they have gone.
        """
        while self._cancelled:
            if (ticket := self._cancelled.popleft()) in self._waiting:
                self._outflow.came(ticket)
                self._leave(ticket)
        for client in list(self._clients.values()):
            while client.heap and self._dropped(client.heap[0][-1]):
                pass

    def clear(self) -> list[Ticket]:
        """Take all out."""
        left = list(self._waiting)
        for ticket in left:
            ticket.when_cancelled(None)
        self._clients.clear()
        self._order.clear()
        self._waiting.clear()
        self.tokens = self.bytes = 0
        return left

    def _dropped(self, ticket: Ticket) -> bool:
        expired = ticket.expired
        if not (expired or self._hopeless(ticket)):
            return False
        self._outflow.came(ticket)
        self._leave(ticket)
        ticket.fail(ExpiredError(DROPPED if expired else TOO_LATE))
        return True

    def _hopeless(self, ticket: Ticket) -> bool:
        """Others wait, who can have an answer in the time that would be lost with it."""
        left = ticket.left
        return left is not None and len(self) > 1 and left < HOPELESS * self._outflow.decoding(ticket)

    def _start(self, name: str) -> float:
        """Where a client begins of whom nothing waits: no credit for having been away, but what it had is known."""
        return max(self._had.get(name, 0.0), self._now)

    def _line_up(self, name: str) -> None:
        """Say anew whose turn is when, after a change to what waits of a client."""
        client = self._clients[name]
        if client.heap:
            if len(self._order) > 2 * len(self._clients) + ORDER:  # most are out of date
                self._order = [
                    (one.start, *one.heap[0][:2], each) for each, one in self._clients.items() if each != name
                ]
                heapq.heapify(self._order)
            heapq.heappush(self._order, (client.start, *client.heap[0][:2], name))
            return
        del self._clients[name]
        if client.start > self._now:
            self._had[name] = client.start
        if len(self._had) > REMEMBERED:
            self._had = {name: had for name, had in self._had.items() if had > self._now}
            while len(self._had) > REMEMBERED:
                del self._had[next(iter(self._had))]

    def _enter(self, ticket: Ticket) -> None:
        self._waiting.add(ticket)
        self.tokens += ticket.job.tokens
        self.bytes += ticket.job.size
        ticket.when_cancelled(self._cancelled.append)

    def _leave(self, ticket: Ticket) -> None:
        self._waiting.remove(ticket)
        ticket.when_cancelled(None)
        self.tokens -= ticket.job.tokens
        self.bytes -= ticket.job.size
        name = ticket.job.client
        client = self._clients[name]
        client.left += 1
        first = client.heap[0][-1] is ticket
        while client.heap and client.heap[0][-1] not in self._waiting:
            heapq.heappop(client.heap)
            client.left -= 1
        if 2 * client.left > len(client.heap):  # what has left is to cost nothing for long
            client.heap, client.left = [entry for entry in client.heap if entry[-1] in self._waiting], 0
            heapq.heapify(client.heap)
        if first:
            self._line_up(name)

    def _over(self, ticket: Ticket) -> str | None:
        """Which limit it would go beyond, in words. What is over one by itself can wait where nobody else does."""
        limits, job = self._limits, ticket.job
        if not self._waiting:
            return None
        if len(self) >= limits.queue:
            return f"{len(self)} requests are waiting, the limit is {limits.queue}"
        client = self._clients.get(job.client)
        if client is not None and len(client) >= limits.waiting_of_a_client:
            return self._too_many(client)
        if self.tokens + job.tokens > limits.queue_tokens:
            return f"requests of {self.tokens} tokens are waiting, the limit is {limits.queue_tokens}"
        if self.bytes + job.size > limits.queue_bytes:
            return f"requests of {self.bytes} bytes are waiting, the limit is {limits.queue_bytes}"
        return None

    def _too_many(self, client: _Client) -> str:
        limit = self._limits.waiting_of_a_client
        return f"{len(client)} requests of this client are waiting, the limit is {limit}"

    def _full(self, refusal: str) -> QueueFullError:
        return QueueFullError(f"{refusal}: retry later", self._outflow.advice(len(self) / 2))

    def _check_deadline(self, ticket: Ticket) -> None:
        if ticket.expired:
            raise ExpiredError(DROPPED)
        if (left := ticket.left) is None:
            return
        caution, expected = self._outflow.caution, self._outflow.expected(len(self), ticket)
        if caution * expected >= left:
            expected = self._outflow.expected(self._ahead(ticket), ticket)
            if expected and caution * expected >= left:  # whose turn it is, may try
                raise ExpiredError(_too_late(caution * expected, left))
        ticket.expected = expected if self._outflow.decoding(ticket) else 0.0

    def _ahead(self, ticket: Ticket) -> int:
        """How many would go first, if nobody else came."""
        name = ticket.job.client
        own = self._clients.get(name)
        before = self._before(own, ticket.due) if own is not None else []
        ahead = len(before)
        if len(self._clients) == (own is not None):
            return ahead
        turn = (self._start(name) if own is None else own.start) + sum(waiting.job.tokens for waiting in before)
        for client in self._clients.values():
            start = client.start
            for due, _, waiting in sorted(client.heap) if client is not own else ():
                if (start, due) > (turn, ticket.due):
                    break
                if waiting in self._waiting:
                    ahead += 1
                    start += waiting.job.tokens
        return ahead

    def _before(self, client: _Client, due: float) -> list[Ticket]:
        """What waits of a client and is as urgent."""
        return [entry[-1] for entry in client.heap if entry[0] <= due and entry[-1] in self._waiting]


def _too_late(wait: float, left: float) -> str:
    return f"{TOO_LATE}: that takes about {wait:.3g} s, and {left:.3g} s are left"
