"""Those who wait for the engine: a bounded queue, the most urgent first, fair between clients.

Who is next: of the clients that wait, the one that has had least so far, in tokens, counted from when it came back
(start-time fair queueing, Goyal et al. 1996); of those that had alike, and within one client, the earliest deadline.
So one client alone, or many that ask for as much, are served by deadline; one that asks for more waits for the others.
"""

import heapq
import itertools
import time
from dataclasses import dataclass, field

from serve.errors import ExpiredError, QueueFullError
from serve.jobs import EngineLimits, Ticket

FORGETTING = 0.2
"""Weight of the newest observation in what is known of the pace."""

LEAST_WAIT, MOST_WAIT = 0.05, 30.0
"""Seconds that a caller is advised to wait at least and at most."""

UNKNOWN_WAIT = 1.0
"""Seconds, where the pace is not known yet."""

REMEMBERED = 4096
"""Clients that nothing waits of, of which is known that they had more than others."""

HOPELESS = 0.5
"""Who has less time left than this share of what answers take lately, is not begun while others wait."""

DROPPED = "the deadline passed before the request's turn came"
"""What is said of those that expired in the queue."""

TOO_LATE = "the deadline would pass before the answer is ready"
"""What is said of those that would expire while they are decoded."""


class Outflow:
    """How fast a queue empties, and how long answers take then: what to expect, and advice to who finds it full."""

    def __init__(self) -> None:
        self._pace, self._recent, self._since = 0.0, 0.0, time.monotonic()
        self._decoding = 0.0

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

    def answered(self, ticket: Ticket) -> None:
        """One that had left the queue has been decoded."""
        if ticket.job.target is None:
            pace = ticket.timings.decode / len(ticket.job.source)
            self._decoding += (pace - self._decoding) * (FORGETTING if self._decoding else 1.0)

    def expected(self, count: float) -> float:
        """Seconds until so many more have left, by what was seen since it began; 0 where nothing was."""
        return count * self._recent

    def decoding(self, ticket: Ticket) -> float:
        """Seconds that the answer takes after that, by those of late and the length of the source; 0 where none was."""
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
    """When each is due, a number to tell them apart, the ticket."""


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
        self._count = 0
        self.tokens, self.bytes = 0, 0

    def __len__(self) -> int:
        return self._count

    def add(self, ticket: Ticket) -> None:
        """Let one in.

        Raises:
            QueueFullError: too much waits, or too much of this client.
            ExpiredError: its deadline has passed, or would before its answer was ready.
        """
        if self._over(ticket) is not None:
            self.drop_unwanted()
        if (refusal := self._over(ticket)) is not None:
            raise QueueFullError(f"{refusal}: retry later", self._outflow.advice(self._count / 2))
        self._check_deadline(ticket)
        if not self._count:
            self._outflow.began()
        name = ticket.job.client
        if name not in self._clients:
            self._clients[name] = _Client(self._start(name))
            self._had.pop(name, None)
        client = self._clients[name]
        heapq.heappush(client.heap, (ticket.due, next(self._numbers), ticket))
        if client.heap[0][-1] is ticket:
            self._line_up(name)
        self._counted(ticket, 1)

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
        _, _, ticket = heapq.heappop(client.heap)
        self._now = client.start
        client.start += ticket.job.tokens
        self._line_up(name)
        self._counted(ticket, -1)
        return ticket

    def took(self, count: int) -> None:
        """So many were taken together."""
        self._outflow.took(count)

    def answered(self, ticket: Ticket) -> None:
        """One that was taken has its answer."""
        self._outflow.answered(ticket)

    def drop_unwanted(self) -> None:
        """Take out what nobody waits for any more; those whose deadline has passed, or is sure to, are told."""
        for name, client in list(self._clients.items()):
            kept = [entry for entry in client.heap if not self._dropped(entry[-1])]
            if len(kept) < len(client.heap):
                heapq.heapify(kept)
                client.heap = kept
                self._line_up(name)

    def clear(self) -> list[Ticket]:
        """Take all out."""
        left = [ticket for client in self._clients.values() for _, _, ticket in client.heap]
        self._clients.clear()
        self._order.clear()
        self._count = self.tokens = self.bytes = 0
        return left

    def _dropped(self, ticket: Ticket) -> bool:
        expired = ticket.expired
        if not (ticket.cancelled or expired or self._hopeless(ticket)):
            return False
        self._counted(ticket, -1)
        if not ticket.cancelled:
            ticket.fail(ExpiredError(DROPPED if expired else TOO_LATE))
        return True

    def _hopeless(self, ticket: Ticket) -> bool:
        """Others wait, who can have an answer in the time that would be lost with it."""
        left = ticket.left
        return left is not None and self._count > 1 and left < HOPELESS * self._outflow.decoding(ticket)

    def _start(self, name: str) -> float:
        """Where a client begins of whom nothing waits: no credit for having been away, but what it had is known."""
        return max(self._had.get(name, 0.0), self._now)

    def _line_up(self, name: str) -> None:
        """Say anew whose turn is when, after a change to what waits of a client."""
        client = self._clients[name]
        if client.heap:
            heapq.heappush(self._order, (client.start, *client.heap[0][:2], name))
            return
        del self._clients[name]
        if client.start > self._now:
            self._had[name] = client.start
        if len(self._had) > REMEMBERED:
            self._had = {name: had for name, had in self._had.items() if had > self._now}
            while len(self._had) > REMEMBERED:
                del self._had[next(iter(self._had))]

    def _counted(self, ticket: Ticket, sign: int) -> None:
        self._count += sign
        self.tokens += sign * ticket.job.tokens
        self.bytes += sign * ticket.job.size

    def _over(self, ticket: Ticket) -> str | None:
        """Which limit it would go beyond, in words. What is over one by itself can wait where nobody else does."""
        limits, job = self._limits, ticket.job
        if not self._count:
            return None
        if self._count >= limits.queue:
            return f"{self._count} requests are waiting, the limit is {limits.queue}"
        client = self._clients.get(job.client)
        if client is not None and len(client.heap) >= limits.waiting_of_a_client:
            return f"{len(client.heap)} requests of this client are waiting, the limit is {limits.waiting_of_a_client}"
        if self.tokens + job.tokens > limits.queue_tokens:
            return f"requests of {self.tokens} tokens are waiting, the limit is {limits.queue_tokens}"
        if self.bytes + job.size > limits.queue_bytes:
            return f"requests of {self.bytes} bytes are waiting, the limit is {limits.queue_bytes}"
        return None

    def _check_deadline(self, ticket: Ticket) -> None:
        if ticket.expired:
            raise ExpiredError(DROPPED)
        left, decoding = ticket.left, self._outflow.decoding(ticket)
        if left is None or self._outflow.expected(self._count) + decoding < left:
            return
        self.drop_unwanted()  # for these nobody waits
        wait = self._outflow.expected(self._ahead(ticket))
        if wait and wait + decoding >= left:  # whose turn it is, may try
            raise ExpiredError(f"{TOO_LATE}: that takes about {wait + decoding:.3g} s, and {left:.3g} s are left")

    def _ahead(self, ticket: Ticket) -> int:
        """How many would go first, if nobody else came."""
        name = ticket.job.client
        own = self._clients.get(name)
        before = [waiting for due, _, waiting in own.heap if due <= ticket.due] if own else []
        turn = (own.start if own else self._start(name)) + sum(waiting.job.tokens for waiting in before)
        ahead = len(before)
        for client in self._clients.values():
            start = client.start
            for due, _, waiting in sorted(client.heap) if client is not own else ():
                if (start, due) > (turn, ticket.due):
                    break
                ahead += 1
                start += waiting.job.tokens
        return ahead
