"""Greedy and beam search and sampling over any step model: one implementation for PyTorch and ONNX Runtime. Torch-free.

    sources ──► StepModel.encode ──► Memory ──► join
                                                 │
    Decoding: totals, histories ──► tokens, parents ──► Grid.step ──► candidates, attention ──┐
         ▲                                                                                    │
         └────────────────────────── constraints, choice ◄────────────────────────────────────┘

A `Decoding` runs sentences of one beam size, which join and leave between steps. What is chosen, is chosen for all of
them at once, in arrays; a sentence with options of its own is taken aside for them alone.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from model.constraints import rule_out_unwritable
from model.errors import NotANumberError
from model.grid import Grid
from model.hypotheses import Chain, Hypothesis, Node
from model.options import LARGEST_BEAM, Sampling, SearchOptions
from model.reading import read
from model.sentence import Sentence
from model.steps import (
    ALL_FAMILIES,
    NO_FAMILIES,
    Array,
    Family,
    Memory,
    Step,
    StepModel,
    StepsAhead,
)
from model.store import larger
from model.trail import SEEN, Seen
from model.vocabulary import BEGIN, END

__all__ = ["LARGEST_BEAM", "Decoding", "Hypothesis", "Node", "Sampling", "SearchOptions", "Sentence", "search"]

SHORTEST_HISTORY = 32
"""Tokens that histories have room for to begin with."""

LEAVE_TOGETHER = 3
"""Of so many sentences that take several steps in one call, one may have to wait for the others' last ones."""

STEPS_AHEAD = 16
"""Most steps that `search` takes in one call."""


class Decoding:
    """Many searches of one beam size in one running batch.

    Args:
        model: what computes the steps.
        beam_size: hypotheses that every sentence keeps at a time.

    Attributes:
        sentences: those under way.
    """

    def __init__(self, model: StepModel, beam_size: int) -> None:
        self.sentences: list[Sentence] = []
        self._model, self._width = model, beam_size
        self._grid, self._seen = Grid(model, beam_size), Seen()
        self._ahead = model if beam_size == 1 and isinstance(model, StepsAhead) else None
        self._tokens = np.zeros((0, beam_size), np.int64)
        self._parents = np.zeros((0, beam_size), np.int64)
        self._totals = np.zeros((0, beam_size))
        self._read = np.zeros((0, beam_size, SHORTEST_HISTORY), np.int64)
        self._values = np.zeros((0, beam_size, SHORTEST_HISTORY))
        self._rows = np.zeros((0, beam_size, SHORTEST_HISTORY), np.int64)

    @property
    def rows(self) -> int:
        """Rows that the next step computes."""
        return len(self.sentences) * self._width

    @property
    def clock(self) -> int:
        """Steps taken since it was last empty."""
        return self._grid.clock

    def join(
        self,
        memory: Memory,
        indices: Sequence[int],
        options: Sequence[SearchOptions],
        attention: Sequence[frozenset[Family]] | None = None,
    ) -> list[Sentence]:
        """Let sentences of an encoded batch in.

        Args:
            memory: of the batch; it belongs to this decoding from now on.
            indices: which of its sentences.
            options: how to decode each; of this beam size.
            attention: families that each one's hypotheses are to carry; none by default.

        Returns:
            The sentences, in the order given.

        Raises:
            InvalidRequestError: an option names an id that the vocabulary does not have; nothing has joined.
        """
        if not indices:
            return []
        if any(option.beam_size != self._width for option in options):
            raise ValueError(f"sentences of other beam sizes than {self._width} cannot share this batch")
        for option in options:
            option.check_vocabulary(self._model.vocabulary)
        self._grid.join(memory, indices)
        wanted = attention or [NO_FAMILIES] * len(indices)
        joined = [
            Sentence(
                option,
                families - {"encoder"},
                int(memory.source_mask[index].sum()),
                self._model.vocabulary,
                self._seen,
            )
            for index, option, families in zip(indices, options, wanted, strict=True)
        ]
        for sentence in joined:
            sentence.place = len(self.sentences)
            self.sentences.append(sentence)
        self._make_room(len(joined))
        return joined

    def step(self, most: int = 1) -> list[Sentence]:
        """One decoder step for every sentence; those that are done leave. Returns all that took part.

        Args:
            most: take up to so many steps, if the model can take them by itself and nothing is to be decided between
                them. They end early when a third of the sentences, rounded down but at least one, have ended.

        Raises:
            NotANumberError: the model gave NaN for what can still become an answer. This decoding is of no use then.
        """
        advanced = list(self.sentences)
        special = [sentence for sentence in advanced if not sentence.constraints.idle]
        needed = NO_FAMILIES.union(*(sentence.needed for sentence in advanced))
        most = min([most, *(sentence.options.longest - sentence.age for sentence in advanced)])
        if most > 1 and self._ahead is not None and not special:
            self._step_ahead(self._ahead, most, needed)
        else:
            self._step_once(special, needed)
        self.leave([sentence for sentence in advanced if sentence.done])
        return advanced

    def leave(self, sentences: Sequence[Sentence]) -> None:
        """Take sentences out, finished or not."""
        if not sentences:
            return
        for sentence in sentences:
            sentence.leave()
        order = self._grid.leave([sentence.place for sentence in sentences])
        self.sentences = [self.sentences[before] for before in order]
        for place, sentence in enumerate(self.sentences):
            if sentence.place != place:
                sentence.catch_up()
                sentence.place = place
        if not self.sentences:
            self._seen.clear()
        self._keep(np.array(order, np.int64))

    def settled(self, sentence: Sentence) -> list[Node]:
        """Tokens of a sentence that are certain by now, from the first."""
        return sentence.settle([] if sentence.done else self._live(sentence))

    def _step_once(self, special: Sequence[Sentence], needed: frozenset[Family]) -> None:
        """One step, of which sentences with options of their own are taken aside."""
        next_ids = np.zeros_like(self._tokens)
        for sentence in special:
            next_ids[sentence.place, 0] = sentence.constraints.forced(sentence.age) or 0
        top = max(sentence.constraints.candidates(sentence.age) for sentence in special or self.sentences[:1])
        step = self._grid.step(self._tokens, self._parents, next_ids, top, needed)
        if needed:
            self._look(step)
        values, ids = step.top_log_probabilities.astype(np.float64), step.top_ids
        # One NaN among the scores makes every log-probability of its row NaN, so what is returned of it suffices.
        self._refuse_no_numbers((values < np.inf).all(2) & (step.next_log_probabilities < np.inf))
        rule_out_unwritable(values, ids)
        for sentence in special:
            place, age = sentence.place, sentence.age
            forced = float(step.next_log_probabilities[place, 0])
            sentence.constraints.apply(self._read[place, :, :age], values[place], ids[place], forced)
        if self._width == 1:
            self._choose_one(values[:, 0], ids[:, 0])
        else:
            self._choose(values, ids)

    def _look(self, step: Step) -> None:
        if step.cross_attention is not None:
            self._see(step.cross_attention[:, :, :, None])
        if step.decoder_attention is not None:
            ages = np.array([sentence.age for sentence in self.sentences])
            columns = self._grid.columns(self._rows[:, :, : ages.max()], ages)
            decoder = np.take_along_axis(step.decoder_attention, columns[:, None, None], -1)
            for sentence, looks in zip(self.sentences, decoder, strict=True):
                sentence.look_at_target(looks, 1, np.arange(sentence.age + 1))

    def _see(self, looks: Float[np.ndarray, "sentence layer head step row source"]) -> None:
        self._seen.add(looks)
        if self._seen.steps >= SEEN:
            for sentence in self.sentences:
                sentence.gather()
            self._seen.clear()

    def _refuse_no_numbers(self, numbers: Bool[np.ndarray, "sentence row"]) -> None:
        unknown = ~numbers & (self._totals > -np.inf)
        if unknown.any():
            place = int(unknown.any(1).argmax())
            raise NotANumberError(
                f"after {self.sentences[place].age} tokens of an answer the model's log-probabilities are no numbers, "
                f"in {np.count_nonzero(unknown)} of {unknown.size} rows: its values overflowed, or its weights "
                "are damaged"
            )

    def _live(self, sentence: Sentence) -> list[Chain]:
        place = sentence.place
        return [self._chain(place, row) for row in range(self._width) if self._totals[place, row] > -math.inf]

    def _chain(self, place: int, row: int) -> Chain:
        count = self.sentences[place].age
        history = (place, row, slice(count))
        return Chain(
            self._read[history].copy(),
            self._values[history].copy(),
            self._rows[history].copy(),
            float(self._totals[place, row]),
        )

    def _step_ahead(self, model: StepsAhead, most: int, needed: frozenset[Family]) -> None:
        """Several greedy steps in one call."""
        sentences = self.sentences
        fewest = len(sentences) - max(1, len(sentences) // LEAVE_TOGETHER)
        made, columns = self._grid.greedy(model, self._tokens, most, fewest, needed)
        ids, values = made.ids.T, made.log_probabilities.T.astype(np.float64)
        ended = ids == END
        taken = np.where(ended.any(1), ended.argmax(1) + 1, ids.shape[1])
        values[np.arange(ids.shape[1]) >= taken[:, None]] = 0.0  # what came after an end token means nothing
        self._refuse_no_numbers(np.all(values < np.inf, axis=1, keepdims=True))
        if made.cross_attention is not None:
            self._see(made.cross_attention[:, :, :, :, None])
        if made.decoder_attention is not None:
            for sentence, looks, own, count in zip(sentences, made.decoder_attention, columns, taken, strict=True):
                sentence.look_at_target(looks, int(count), own)
        self._take(ids, values, taken)

    def _choose_one(self, values: Float[np.ndarray, "sentence top"], ids: Int[np.ndarray, "sentence top"]) -> None:
        places = np.arange(len(values))
        best = values.argmax(1)
        self._take(ids[places, best][:, None], values[places, best][:, None], np.ones(len(values), np.int64))

    def _take(
        self,
        ids: Int[np.ndarray, "sentence step"],
        values: Float[np.ndarray, "sentence step"],
        taken: Int[np.ndarray, " sentence"],
    ) -> None:
        """Let the one row of each sentence go on by the first so many tokens."""
        for column in values.T:  # one after the other: a sum must not depend on how many were taken at a time
            self._totals[:, 0] += column
        ages = np.array([sentence.age for sentence in self.sentences])
        self._make_longer(int(ages.max()) + ids.shape[1])
        places, times = np.arange(len(ids))[:, None], ages[:, None] + np.arange(ids.shape[1])
        self._read[places, 0, times], self._values[places, 0, times] = ids, values
        self._tokens = ids[:, -1:]
        rows = zip(self.sentences, taken.tolist(), self._totals[:, 0].tolist(), strict=True)
        for place, (sentence, count, total) in enumerate(rows):
            sentence.age += count
            if total == -math.inf:
                sentence.fail()
            elif ids[place, count - 1] == END or sentence.age == sentence.options.longest:
                sentence.finish(self._chain(place, 0))
                sentence.done = True

    def _choose(self, values: Float[np.ndarray, "sentence row top"], ids: Int[np.ndarray, "sentence row top"]) -> None:
        width, top = self._width, ids.shape[2]
        count = len(values)
        sentence = np.arange(count)[:, None]
        totals = (self._totals[:, :, None] + values).reshape(count, -1)
        # Stable: ties go to the better row, and within a row to the model's own order.
        order = np.argsort(-totals, 1, kind="stable")[:, : 2 * width]
        best = sentence * (width * top) + order
        totals, tokens, values, parents = totals.take(best), ids.take(best), values.take(best), order // top
        possible = totals > -np.inf
        ends = possible & (tokens == END)
        live = possible & ~ends
        ends[:, width:] = False
        for place, rank in zip(*np.nonzero(ends), strict=True):
            self._end(int(place), int(parents[place, rank]), float(values[place, rank]), float(totals[place, rank]))
        # The first `width` that go on; where there are fewer, the rest of the rows is dead.
        kept = sentence * order.shape[1] + np.argsort(~live, 1, kind="stable")[:, :width]
        alive = live.take(kept)
        self._totals = np.where(alive, totals.take(kept), -np.inf)
        self._parents = np.where(alive, parents.take(kept), 0)
        self._tokens = np.where(alive, tokens.take(kept), BEGIN)
        self._branch(sentence * width + self._parents)
        self._write(self._tokens, values.take(kept), self._parents)
        self._advance(alive)

    def _advance(self, alive: Bool[np.ndarray, "sentence row"]) -> None:
        for sentence, best, goes_on in zip(
            self.sentences, self._totals[:, 0].tolist(), alive[:, 0].tolist(), strict=True
        ):
            sentence.age += 1
            if not goes_on and not sentence.finished:
                sentence.fail()
            elif sentence.age == sentence.options.longest:
                for chain in self._live(sentence):
                    sentence.finish(chain)
                sentence.done = True
            elif not goes_on or sentence.finished >= self._width or sentence.unbeatable(best):
                sentence.done = True

    def _end(self, place: int, row: int, value: float, total: float) -> None:
        sentence = self.sentences[place]
        history = (place, row, slice(sentence.age))
        sentence.finish(
            Chain(
                np.append(self._read[history], END),
                np.append(self._values[history], value),
                np.append(self._rows[history], row),
                total,
            )
        )

    def _branch(self, rows: Int[np.ndarray, "sentence row"]) -> None:
        """Let histories go on from others, which are counted over all sentences."""
        shape = (-1, self._read.shape[2])
        self._read = self._read.reshape(shape).take(rows, 0)
        self._values = self._values.reshape(shape).take(rows, 0)
        self._rows = self._rows.reshape(shape).take(rows, 0)

    def _write(
        self,
        tokens: Int[np.ndarray, "sentence row"],
        values: Float[np.ndarray, "sentence row"],
        rows: Int[np.ndarray, "sentence row"],
    ) -> None:
        ages = np.array([sentence.age for sentence in self.sentences])
        self._make_longer(int(ages.max()) + 1)
        places = np.arange(len(ages))
        for history, new in ((self._read, tokens), (self._values, values), (self._rows, rows)):
            history[places, :, ages] = new

    def _make_longer(self, tokens: int) -> None:
        if tokens > self._read.shape[2]:
            shape = (*self._read.shape[:2], 2 * tokens)
            self._read, self._values, self._rows = (
                larger(history, shape) for history in (self._read, self._values, self._rows)
            )

    def _make_room(self, joined: int) -> None:
        def longer(array: Array, value: float) -> Array:
            return np.concatenate((array, np.full((joined, *array.shape[1:]), value, array.dtype)))

        self._tokens, self._parents = longer(self._tokens, BEGIN), longer(self._parents, 0)
        self._totals = longer(self._totals, -np.inf)
        self._totals[-joined:, 0] = 0.0
        self._read, self._values, self._rows = (
            longer(history, 0) for history in (self._read, self._values, self._rows)
        )

    def _keep(self, places: Int[np.ndarray, " kept"]) -> None:
        self._tokens, self._parents, self._totals = self._tokens[places], self._parents[places], self._totals[places]
        self._read, self._values, self._rows = self._read[places], self._values[places], self._rows[places]


def search(
    model: StepModel,
    sources: Sequence[Sequence[int]],
    options: Sequence[SearchOptions],
    attention: frozenset[Family] = ALL_FAMILIES,
) -> list[list[Hypothesis]]:
    """Decode a batch to the end.

    Args:
        model: what computes the steps.
        sources: token ids of each sentence, the end token last.
        options: how to decode each; of one beam size.
        attention: families that the hypotheses are to carry.

    Returns:
        For each sentence its n best hypotheses, best first.

    Raises:
        InvalidRequestError: options left no token to choose.
        NotANumberError: the model gave NaN.
    """
    decoding = Decoding(model, options[0].beam_size)
    memory = read(model, sources)
    sentences = decoding.join(memory, range(len(sources)), options, [attention] * len(sources))
    while decoding.sentences:
        decoding.step(STEPS_AHEAD)
    return [sentence.results() for sentence in sentences]
