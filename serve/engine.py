"""The decode engine: a bounded queue in front of a continuous batcher, on a thread of its own. It knows no gRPC.

    submit ──► Waiting ──► admitted between steps, the next one first ──► Batcher ──► tickets

A caller hands in a job and gets a ticket: a future, and a way to cancel.
"""

import logging
import threading
import time

from model.errors import InvalidRequestError
from model.steps import StepModel
from serve.batcher import Batcher, Counts
from serve.errors import FAILED, STOPPING, EngineFailedError, ServeError, ShuttingDownError
from serve.jobs import EngineLimits, Job, Ticket
from serve.waiting import Waiting

log = logging.getLogger(__name__)


class Engine:
    """Decodes jobs on a thread of its own.

    Args:
        model: what computes the steps.
        limits: what to take on at a time.
        shortlist: computes the steps of searches among candidates, where the model has them.
    """

    def __init__(
        self, model: StepModel, limits: EngineLimits | None = None, shortlist: StepModel | None = None
    ) -> None:
        chosen = limits or EngineLimits()
        self._vocabulary = model.vocabulary
        self._has_shortlist = shortlist is not None
        self._batcher = Batcher(model, chosen, shortlist)
        self._queue = Waiting(chosen)
        self._entered: float | None = None
        self._given_up = False
        self._joining: list[Ticket] = []
        self._begun: list[Ticket] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._worker = threading.Thread(target=self._work, name="limelight-engine", daemon=True)
        self._worker.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of source and target that they can come to keep."""
        return self._queue.tokens

    @property
    def waiting_bytes(self) -> int:
        """Bytes of them."""
        return self._queue.bytes

    @property
    def rows(self) -> int:
        """Rows under way, as it was a moment ago."""
        return sum(ticket.job.options.beam_size for ticket in self._batcher.tickets)

    @property
    def counts(self) -> Counts:
        """What was done since the beginning."""
        return self._batcher.counts

    @property
    def alive(self) -> bool:
        """The worker is running, and nobody has given it up."""
        return self._worker.is_alive() and not self._given_up

    @property
    def stopping(self) -> bool:
        """It finishes what it has, and takes no more."""
        return self._stopping

    @property
    def failed(self) -> bool:
        """It has died, or somebody has given it up."""
        return self._given_up

    @property
    def silent(self) -> float:
        """Seconds since it last came back from what it computes; 0 while it waits for work."""
        entered = self._entered
        return 0.0 if entered is None else time.monotonic() - entered

    def give_up(self) -> None:
        """Take nothing more, and fail all that waits or is under way: for one that is dead or does not come back."""
        self._given_up = True
        with self._changed:
            left = [*self._queue.clear(), *self._joining, *self._batcher.tickets]
        for ticket in left:
            ticket.fail(EngineFailedError(FAILED))

    def submit(self, job: Job) -> Ticket:
        """Queue a job.

        Raises:
            InvalidRequestError: its options name an id that the vocabulary does not have; or it asks for a shortlist
                where there is none, or one that does not go with the rest.
            QueueFullError: too much waits.
            ExpiredError: its deadline has passed, or would before its answer was ready.
            ShuttingDownError: the engine takes no more.
            EngineFailedError: the engine has died or was given up.
        """
        job.options.check_vocabulary(self._vocabulary)  # here, where it is no fault of a batch
        self._check_shortlist(job)
        ticket = Ticket(job)
        with self._changed:
            if self._stopping:
                raise ShuttingDownError(STOPPING)
            if not self.alive:
                raise EngineFailedError(FAILED)
            self._queue.add(ticket)
            self._changed.notify()
        return ticket

    def refusal(self, client: str, deadline: float | None) -> ServeError | None:
        """Why a job of which only this is known would not be queued, as far as that can be told; None if it may be.

        Args:
            client: see `Job`.
            deadline: see `Job`.
        """
        with self._changed:
            return self._queue.refusal(client, deadline)

    def _check_shortlist(self, job: Job) -> None:
        if not job.shortlist:
            return
        if not self._has_shortlist:
            raise InvalidRequestError("shortlist", "this model has none; export it with --shortlist")
        if job.options.prefix or job.target is not None:
            given = "prefix" if job.target is None else "target"
            raise InvalidRequestError("shortlist", f"may lack tokens of the {given}: leave one of them out")

    def stop(self, timeout: float | None = None) -> bool:
        """Refuse new jobs, finish those at hand and waiting; returns whether that was done in time (seconds)."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._worker.join(timeout)
        return not self._worker.is_alive()

    def _work(self) -> None:
        try:
            self._run()
        except BaseException:
            log.critical("the engine's thread has died", exc_info=True)
            self.give_up()

    def _run(self) -> None:
        while True:
            self._entered = None
            joining = self._take()
            self._entered = time.monotonic()
            if joining:
                self._batcher.admit(joining)
            elif not self._batcher.busy:
                self._entered = None
                return
            self._batcher.step()

    def _take(self) -> list[Ticket]:
        """What can join now, in turn: nothing while others run and none fits, or when all is done."""
        with self._changed:
            self._learn()
            self._queue.drop_unwanted()
            while not (self._queue or self._batcher.busy or self._stopping):
                self._changed.wait()
                self._queue.drop_unwanted()
            chosen = self._joining = list[Ticket]()
            while (ticket := self._queue.first()) is not None and self._goes_with(chosen, ticket):
                chosen.append(self._queue.take())
                ticket.begin()
            self._queue.took(len(chosen))
            self._begun += chosen
            return chosen

    def _learn(self) -> None:
        """Tell the queue of those that have been answered or given up since the last time."""
        begun, self._begun = self._begun, []
        for ticket in begun:
            if ticket.future.done():
                self._queue.answered(ticket)
            else:
                self._begun.append(ticket)

    def _goes_with(self, chosen: list[Ticket], ticket: Ticket) -> bool:
        # Whose turn it is, goes first, even where a smaller one behind would fit: nobody waits for ever.
        alike = not chosen or (chosen[0].job.target is None) == (ticket.job.target is None)
        return alike and self._batcher.fits(chosen, ticket)
