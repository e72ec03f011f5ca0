"""Step models for the tests of the engine: one without a network, and one that waits to be let through."""

import threading
from collections.abc import Sequence

import numpy as np

from model.steps import Array, Family, Kept, Memory, Question, Step, StepModel
from tests.serve.running import PATIENCE


class Echo:
    """Repeats its source, nearly sure of each token, looking at it with all its cross-attention.

    Its decoder attention is the same for all that a row has read. Of its past it keeps the positions.
    """

    memory: Sequence[Kept] = [("source",)]
    state: Sequence[Kept] = [("past",)]
    dtype = np.dtype(np.float32)
    vocabulary = 12

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:
        real = source_mask[:, None, None, :, None] & source_mask[:, None, None, None, :]
        weights = (real / np.maximum(real.sum(-1, keepdims=True), 1)).astype(np.float32)
        return Memory((source_ids.copy(),), source_mask.copy(), weights if attention else None)

    def step(self, question: Question) -> Step:
        log_probabilities, cross, own = self._read(question)
        ids = np.argsort(-log_probabilities, -1, kind="stable")[..., : question.top]
        following = np.take_along_axis(log_probabilities, question.next_ids[..., None], -1)
        return Step(
            top_log_probabilities=np.take_along_axis(log_probabilities, ids, -1),
            top_ids=ids,
            next_log_probabilities=following[..., 0],
            cross_attention=cross if "cross" in question.attention else None,
            decoder_attention=own if "decoder" in question.attention else None,
            state=(question.positions.astype(np.float32),),
        )

    def _read(self, question: Question) -> tuple[Array, Array, Array]:
        (sources,), lengths = question.memory.tensors, question.memory.source_mask.sum(-1)
        at = np.minimum(question.positions, lengths[:, None] - 1)  # past its end it stays at the end token
        right = np.take_along_axis(sources, at, 1)
        logits = np.where(np.arange(self.vocabulary) == right[..., None], 5.0, -0.1 * np.arange(self.vocabulary))
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        cross = np.eye(sources.shape[1])[at][:, None, None]
        return log_probabilities.astype(np.float32), cross.astype(np.float32), _own(question)


def _own(question: Question) -> Array:
    seen = np.concatenate((question.past_visible, question.new_visible), 2)
    read = np.concatenate((question.state[0], question.positions), 1)[:, None]
    rows, times = question.positions[..., None], np.arange(seen.shape[2])
    expected = np.where(times <= rows, times, np.inf)
    assert np.array_equal(np.sort(np.where(seen, read, np.inf), -1), expected), "a row sees each of its positions once"
    weights: Array = (seen / (rows + 1)).astype(np.float32)
    return weights[:, None, None]


class Gated:
    """Another model's steps, each of which waits until a test lets it through.

    Attributes:
        batches: sentences of each batch that was encoded.
        rows: rows of each step (tokens, where targets are scored), as it arrived.
        passes: what was asked for in turn: "encode" or "step".
        families: attention that each pass was asked for.
    """

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self.memory, self.state, self.vocabulary = model.memory, model.state, model.vocabulary
        self.dtype = model.dtype
        self._arrived, self._passes = threading.Semaphore(0), threading.Semaphore(0)
        self._open = threading.Event()
        self.batches: list[int] = []
        self.rows: list[int] = []
        self.passes: list[str] = []
        self.families: list[frozenset[Family]] = []

    def wait(self, steps: int = 1) -> None:
        """Until so many more steps have arrived, of which the last waits to be let through."""
        for _ in range(steps):
            assert self._arrived.acquire(timeout=PATIENCE), "no step arrived"

    def let(self, steps: int = 1) -> None:
        """Let so many steps through."""
        self._passes.release(steps)

    def open(self) -> None:
        """Let all steps through from now on."""
        self._open.set()
        self._passes.release()

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:
        self.batches.append(len(source_ids))
        self.passes.append("encode")
        self.families.append(frozenset({"encoder"} if attention else ()))
        return self._model.encode(source_ids, source_mask, attention)

    def step(self, question: Question) -> Step:
        self.passes.append("step")
        self.families.append(question.attention)
        self._enter(question.target_ids.size)
        return self._model.step(question)

    def _enter(self, rows: int) -> None:
        self.rows.append(rows)
        self._arrived.release()
        if not self._open.is_set():
            assert self._passes.acquire(timeout=PATIENCE), "no step was let through"
