"""What a search keeps of one sentence: its finished hypotheses, and what its rows looked at. Torch-free."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from model.constraints import Constraints
from model.errors import InvalidRequestError
from model.hypotheses import Chain, Hypothesis, Node, bound
from model.options import SearchOptions
from model.steps import Family
from model.trail import Seen, Trail


class Sentence:
    """One sentence on its way through a `Decoding`.

    A hypothesis is finished when its end token is among the `beam_size` best candidates of a step, and the search ends
    when `beam_size` hypotheses are finished, when no live one can still come among the n best, or at the length limit.

    Attributes:
        options: how it is decoded.
        attention: families that its hypotheses carry.
        needed: families that the search itself or the answer needs.
        done: no more steps are wanted.
    """

    def __init__(
        self, options: SearchOptions, attention: frozenset[Family], source_length: int, vocabulary: int, seen: Seen
    ) -> None:
        self.options, self.attention, self.done = options, attention, False
        covered: frozenset[Family] = frozenset({"cross"} if options.coverage_penalty else ())
        self.needed = attention | covered
        self.place, self.age = 0, 0
        self.constraints = Constraints(options, vocabulary)
        self._trail = Trail(source_length)
        self._seen, self._caught_up = seen, seen.end
        self._finished: list[tuple[float, Chain]] = []
        self._settled: list[Node] = []
        self._answers: list[Hypothesis] = []
        self._error: InvalidRequestError | None = None

    @property
    def finished(self) -> int:
        """Hypotheses that have ended."""
        return len(self._finished)

    def catch_up(self) -> None:
        """See what its rows looked at in the source since the last time: before its place changes, or anybody asks."""
        if "cross" in self.needed:
            self._trail.add_cross(self._seen.since(self._caught_up), self.place)
            self._caught_up = self._seen.end

    def gather(self) -> None:
        """The same, and copy it, so that nothing of the batch is kept."""
        self.catch_up()
        self._trail.copy_cross()

    def look_at_target(
        self, looks: Float[np.ndarray, "layer head step_row seen"], steps: int, columns: Int[np.ndarray, " read"]
    ) -> None:
        """Keep what its rows looked at in the target, if that is needed: a copy, of nothing but what they had read.

        Args:
            looks: the rows of each step in turn.
            steps: how many of the steps are its own.
            columns: where `looks` has what its rows have read to the last step.
        """
        if "decoder" in self.needed:
            own = looks[:, :, : steps * self.options.beam_size].take(columns[: self.age + steps], -1)
            self._trail.add_decoder(own.reshape(*own.shape[:2], steps, -1, own.shape[-1]))

    def finish(self, chain: Chain) -> None:
        """Take in a hypothesis that has ended."""
        if self.options.coverage_penalty:
            self.catch_up()
        self._finished.append((chain.score(self.options, self._trail), chain))

    def fail(self) -> None:
        """Give up: the options rule out every token."""
        message = f"after {self.age - 1} tokens every other one is ruled out: suppress fewer, or allow repeats"
        self._error, self.done = InvalidRequestError("search", message), True

    def unbeatable(self, live: float) -> bool:
        """No live hypothesis, the best of which has this total, can come among the n best."""
        if len(self._finished) < self.options.hypotheses:
            return False
        return self._best()[-1][0] >= bound(live, self.options)

    def leave(self) -> None:
        """Take the answers along, and nothing else of what the rows looked at."""
        if self.done and self._error is None:
            self.catch_up()
            self._answers = [chain.hypothesis(score, self._trail, self.attention) for score, chain in self._best()]
        self.done, self._trail, self._seen = True, Trail(0), Seen()

    def results(self) -> list[Hypothesis]:
        """The n best hypotheses, best first; none before it has left, or where it left before it was done.

        Raises:
            InvalidRequestError: the options left no token to choose.
        """
        if self._error is not None:
            raise self._error
        return self._answers

    def settle(self, live: Sequence[Chain]) -> list[Node]:
        """Tokens that every hypothesis still in play shares, from the first: what a stream can already send."""
        if self.done:
            for best in self._answers[:1]:
                self._settled += [best.node(t) for t in range(len(self._settled), len(best.tokens))]
            return self._settled
        self.gather()
        first, *others = [*(chain for _, chain in self._finished), *live]
        while (t := len(self._settled)) < len(first.tokens):
            if any(len(chain.tokens) <= t or chain.tokens[t] != first.tokens[t] for chain in others):
                break
            self._settled.append(self._node(first, t))
        return self._settled

    def _node(self, chain: Chain, t: int) -> Node:
        cross, decoder = self._trail.step(chain.rows, t)
        return Node(
            int(chain.tokens[t]),
            float(chain.log_probabilities[t]),
            cross if "cross" in self.attention else None,
            decoder,
        )

    def _best(self) -> list[tuple[float, Chain]]:
        return sorted(self._finished, key=lambda pair: -pair[0])[: self.options.hypotheses]
