"""Greedy and beam search over any step model: one implementation for PyTorch and ONNX Runtime. Torch-free.

    sources ──► StepModel.encode ──► Memory
                                        │
    BeamSearch (one a sentence) ──► ids, parents ──► StepModel.step ──► top candidates, attention rows ──┐
         ▲                                                                                              │
         └──────────────────────────────────────────────────────────────────────────────────────────────┘

A `BeamSearch` owns the hypotheses of one sentence and no model; a `Decoding` runs many of them in one batch. Every
hypothesis is a chain of nodes, and each node keeps the attention rows of the pass that chose its token, so attention
follows the hypothesis through every reordering without being copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from model.errors import InvalidRequestError
from model.steps import Memory, Scores, StepModel, pad
from model.tokenizer import BEGIN, END, PAD

LARGEST_BEAM = 16
"""Most hypotheses kept at a time: beyond it, beam search costs more and finds worse answers."""

UNWRITABLE = frozenset({PAD, BEGIN})
"""Tokens that stand for no text: a hypothesis with one would look the same as one without."""

LARGEST_LENGTH_PENALTY = 10.0
"""Beyond it, length alone decides between hypotheses."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How one sentence is decoded.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    longest: int
    """Most tokens to generate, the end token among them."""
    beam_size: int = 1
    """Hypotheses kept at a time; 1 is greedy search."""
    hypotheses: int = 1
    """How many of them to return, best first (n-best)."""
    length_penalty: float = 1.0
    """Hypotheses are compared by log-probability / length ** length_penalty; 0 compares plain log-probabilities, 1
    compares the mean for each token. Lengths count the end token."""

    def __post_init__(self) -> None:
        _check("beam_size", self.beam_size, 1, LARGEST_BEAM)
        _check("hypotheses", self.hypotheses, 1, self.beam_size, " (beam_size)")
        _check("length_penalty", self.length_penalty, 0.0, LARGEST_LENGTH_PENALTY)
        _check("longest", self.longest, 1, None)


def _check(name: str, value: float, low: float, high: float | None, why: str = "") -> None:
    if not (low <= value and (high is None or value <= high)):  # so written that NaN fails
        raise InvalidRequestError(
            name, f"{value} is not {f'at least {low}' if high is None else f'from {low} to {high}{why}'}"
        )


@dataclass(slots=True)
class Node:
    """One generated token at the end of a chain."""

    parent: "Node | None"
    token: int
    log_probability: float
    total: float
    length: int
    cross_attention: Float[np.ndarray, "layer head source"]
    decoder_attention: Float[np.ndarray, "layer head target"]


@dataclass(frozen=True)
class Hypothesis:
    """One answer, with the attention that produced it.

    Row t of the attention belongs to the step that chose token t, whose input was token t - 1 (the begin token for t =
    0). So the columns of `decoder_attention` are the begin token and all tokens but the last.
    """

    tokens: list[int]
    """Generated ids; the end token is last unless the length limit came first."""
    log_probabilities: list[float]
    """Natural logarithm of each token's probability, given those before it."""
    score: float
    """Total log-probability / length ** length_penalty: what hypotheses are compared by."""
    finish_reason: Literal["stop", "length"]
    """Whether the model ended the sentence, or the limit did."""
    cross_attention: Float[np.ndarray, "layer head target source"] = field(repr=False)
    """Padding of the batch cut off."""
    decoder_attention: Float[np.ndarray, "layer head target target"] = field(repr=False)

    @property
    def log_probability(self) -> float:
        """Log-probability of the whole hypothesis."""
        return sum(self.log_probabilities)


class BeamSearch:
    """The hypotheses of one sentence, from the begin token to the n best.

    A hypothesis is finished when its end token is among the `beam_size` best candidates of a step, and the search ends
    when `beam_size` hypotheses are finished, when no live one can still come among the n best, or at the length limit.

    Attributes:
        done: no more steps are wanted.
        tokens: what each row reads next.
        parents: for each row, the row of the last step that it goes on from.
    """

    def __init__(self, options: SearchOptions) -> None:
        self.options = options
        self.done = False
        self.tokens = [BEGIN]
        self.parents = [0]
        self._live: list[Node | None] = [None]
        self._finished: list[Node] = []
        self._settled: list[Node] = []

    @property
    def top(self) -> int:
        """Candidates wanted of each row: enough for a full beam even if the end token and both unwritable ones lead."""
        return self.options.beam_size + (self.options.beam_size > 1) + len(UNWRITABLE)

    def advance(
        self,
        log_probabilities: Float[np.ndarray, "row top"],
        ids: Int[np.ndarray, "row top"],
        cross_attention: Float[np.ndarray, "row layer head source"],
        decoder_attention: Float[np.ndarray, "row layer head target"],
    ) -> None:
        """Take one step's candidates for every row of this sentence."""
        length = 1 + (self._live[0].length if self._live[0] else 0)
        live: list[Node] = []
        self.parents = []
        for rank, (total, row, token, log_probability) in enumerate(self._candidates(log_probabilities, ids)):
            if len(live) == self.options.beam_size or (token == END and rank >= self.options.beam_size):
                continue
            node = Node(
                self._live[row], token, log_probability, total, length, cross_attention[row], decoder_attention[row]
            )
            if token == END:
                self._finished.append(node)
            else:
                live.append(node)
                self.parents.append(row)
        self._live = list(live)
        self.tokens = [node.token for node in live]
        self._end_if_settled(live, length)

    def _candidates(
        self, log_probabilities: Float[np.ndarray, "row top"], ids: Int[np.ndarray, "row top"]
    ) -> list[tuple[float, int, int, float]]:
        found = [
            ((node.total if node else 0.0) + log_probability, row, token, log_probability)
            for row, node in enumerate(self._live)
            for log_probability, token in zip(log_probabilities[row].tolist(), ids[row].tolist(), strict=True)
            if token not in UNWRITABLE
        ]
        # A stable sort by total alone: ties go to the better row, and within a row to the model's own order.
        return sorted(found, key=lambda candidate: -candidate[0])[: 2 * self.options.beam_size]

    def _end_if_settled(self, live: list[Node], length: int) -> None:
        if length == self.options.longest:
            self._finished.extend(live)
            live = []
        self.done = not live or len(self._finished) >= self.options.beam_size or self._unbeatable(live)

    def _unbeatable(self, live: list[Node]) -> bool:
        # Totals only fall, and the penalty is most lenient at the longest length: that bounds every live hypothesis.
        if len(self._finished) < self.options.hypotheses:
            return False
        bound: float = max(node.total for node in live) / self.options.longest**self.options.length_penalty
        return self._best()[-1][0] >= bound

    def _best(self) -> list[tuple[float, Node]]:
        scored = [(node.total / node.length**self.options.length_penalty, node) for node in self._finished]
        return sorted(scored, key=lambda pair: -pair[0])[: self.options.hypotheses]

    def settled(self) -> list[Node]:
        """Tokens that every hypothesis still in play shares, from the first: what a stream can already send."""
        in_play = [node for _, node in self._best()] if self.done else [*self._finished, *self._live]
        chains = [_chain(node) for node in in_play]
        count = len(self._settled)
        for nodes in zip(*(chain[count:] for chain in chains[: 1 if self.done else None]), strict=False):
            if any(node is not nodes[0] for node in nodes):
                break
            self._settled.append(nodes[0])
        return self._settled

    def results(self, source_length: int) -> list[Hypothesis]:
        """The n best hypotheses, best first.

        Args:
            source_length: real source tokens; padding beyond them is cut off the attention.
        """
        return [_hypothesis(node, score, source_length) for score, node in self._best()]


def _chain(node: Node | None) -> list[Node]:
    nodes = []
    while node is not None:
        nodes.append(node)
        node = node.parent
    return nodes[::-1]


def _hypothesis(last: Node, score: float, source_length: int) -> Hypothesis:
    nodes = _chain(last)
    decoder_attention = np.zeros((*nodes[0].decoder_attention.shape[:2], len(nodes), len(nodes)), np.float32)
    for index, node in enumerate(nodes):
        decoder_attention[:, :, index, : index + 1] = node.decoder_attention[:, :, -(index + 1) :]
    return Hypothesis(
        tokens=[node.token for node in nodes],
        log_probabilities=[node.log_probability for node in nodes],
        score=score,
        finish_reason="stop" if last.token == END else "length",
        cross_attention=np.stack([node.cross_attention[:, :, :source_length] for node in nodes], 2),
        decoder_attention=decoder_attention,
    )


class Decoding:
    """Many searches of one beam size in one batch; finished sentences leave it at once.

    Args:
        model: what computes the steps.
        sources: token ids of each sentence, the end token last.
        options: how to decode each; of one beam size.
    """

    def __init__(self, model: StepModel, sources: Sequence[Sequence[int]], options: Sequence[SearchOptions]) -> None:
        if len({option.beam_size for option in options}) > 1:
            raise ValueError("sentences of different beam sizes cannot share a batch")
        self.searches = [BeamSearch(option) for option in options]
        self.source_lengths = [len(source) for source in sources]
        self._model = model
        self._memory = model.encode(*pad(sources))
        self.encoder_attention = self._memory.encoder_attention
        self._active = list(range(len(sources)))
        self._offsets = list(range(len(sources)))
        self._state: Any = None
        self._length = 0

    @property
    def done(self) -> bool:
        """Every sentence is finished."""
        return not self._active

    @property
    def active(self) -> list[int]:
        """Indices of the sentences that are still being decoded."""
        return list(self._active)

    def step(self) -> list[int]:
        """One decoder step for every active sentence; returns their indices, in order."""
        advanced = self._active
        searches = [self.searches[index] for index in advanced]
        width = max(len(search.tokens) for search in searches)
        tokens, parents = self._layout(searches, width)
        positions = np.full_like(tokens, self._length)
        step = self._model.step(tokens, positions, self._memory, self._state, parents, searches[0].top)
        self._state = step.state
        for place, search in enumerate(searches):
            rows = slice(place * width, place * width + len(search.tokens))
            search.advance(
                step.top_log_probabilities[rows, -1],
                step.top_ids[rows, -1],
                step.cross_attention[rows, :, :, -1],
                step.decoder_attention[rows, :, :, -1],
            )
        self._length += 1
        self._offsets = [place * width for place in range(len(searches))]
        self._drop([place for place, search in enumerate(searches) if not search.done])
        return advanced

    def cancel(self, index: int) -> None:
        """Take a sentence out of the batch before it is finished."""
        self.searches[index].done = True
        if index in self._active:
            self._drop([place for place, active in enumerate(self._active) if active != index])

    def results(self, index: int) -> list[Hypothesis]:
        """The n best hypotheses of a finished sentence."""
        return self.searches[index].results(self.source_lengths[index])

    def _layout(
        self, searches: list[BeamSearch], width: int
    ) -> tuple[Int[np.ndarray, "row 1"], Int[np.ndarray, " row"]]:
        # A sentence with fewer live rows than the widest repeats its first: every sentence fills the same grid.
        tokens = np.empty((len(searches), width), np.int64)
        parents = np.empty((len(searches), width), np.int64)
        for place, search in enumerate(searches):
            count = len(search.tokens)
            tokens[place, :count], tokens[place, count:] = search.tokens, search.tokens[0]
            parents[place, :count], parents[place, count:] = search.parents, search.parents[0]
            parents[place] += self._offsets[place]
        return tokens.reshape(-1, 1), parents.reshape(-1)

    def _drop(self, places: list[int]) -> None:
        if len(places) == len(self._active):
            return
        self._active = [self._active[place] for place in places]
        self._offsets = [self._offsets[place] for place in places]
        if self._active:
            self._memory = self._model.select(self._memory, np.array(places))


def search(
    model: StepModel, sources: Sequence[Sequence[int]], options: Sequence[SearchOptions]
) -> list[list[Hypothesis]]:
    """Decode a batch to the end.

    Args:
        model: what computes the steps.
        sources: token ids of each sentence, the end token last.
        options: how to decode each; of one beam size.

    Returns:
        For each sentence its n best hypotheses, best first.
    """
    decoding = Decoding(model, sources, options)
    while not decoding.done:
        decoding.step()
    return [decoding.results(index) for index in range(len(sources))]


def score(
    model: StepModel,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    length_penalties: Sequence[float] | None = None,
    memory: Memory | None = None,
) -> list[Hypothesis]:
    """Forced decoding: how likely given targets are, and the attention on the way to each of their tokens.

    Args:
        model: what computes the pass.
        sources: token ids of each sentence, the end token last.
        targets: token ids of each target, the end token last.
        length_penalties: for the score of each, as in a search; by default 1.
        memory: of the sources, where they were read already.
    """
    next_ids, _ = pad(targets)
    target_ids, _ = pad([[BEGIN, *target[:-1]] for target in targets])
    scores = model.score(target_ids, next_ids, memory or model.encode(*pad(sources)))
    penalties = length_penalties or [1.0] * len(targets)
    return [_forced(scores, row, list(target), len(sources[row]), penalties[row]) for row, target in enumerate(targets)]


def _forced(scores: Scores, row: int, target: list[int], source_length: int, length_penalty: float) -> Hypothesis:
    length = len(target)
    log_probabilities: list[float] = scores.log_probabilities[row, :length].tolist()
    return Hypothesis(
        tokens=target,
        log_probabilities=log_probabilities,
        score=sum(log_probabilities) / length**length_penalty,
        finish_reason="stop" if target[-1] == END else "length",
        cross_attention=scores.cross_attention[row, :, :, :length, :source_length],
        decoder_attention=scores.decoder_attention[row, :, :, :length, :length],
    )
