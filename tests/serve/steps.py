"""Step models for the tests of the engine: one without a network, and one that waits to be let through."""

import threading
from typing import Any, TypeAlias

import numpy as np

from model.steps import Memory, Scores, Step, StepModel
from tests.serve.running import PATIENCE

Array: TypeAlias = np.ndarray[Any, Any]

VOCABULARY = 12


class Echo:
    """Repeats its source, nearly sure of each token, looking at it with all its cross-attention."""

    def encode(self, source_ids: Array, source_mask: Array) -> Memory:
        real = source_mask[:, None, None, :, None] & source_mask[:, None, None, None, :]
        attention = real / np.maximum(real.sum(-1, keepdims=True), 1)
        return Memory(source_ids, source_mask, attention.astype(np.float32))

    def select(self, memory: Memory, sentences: Array) -> Memory:
        return Memory(memory.tensors[sentences], memory.source_mask[sentences], memory.encoder_attention)

    def step(
        self, target_ids: Array, positions: Array, memory: Memory, state: Any, state_rows: Array, top: int
    ) -> Step:
        assert state is None or np.array_equal(state[state_rows] + 1, positions), "rows go on from others of their age"
        log_probabilities, cross, own = self._read(target_ids, positions, memory)
        ids = np.argsort(-log_probabilities, -1, kind="stable")[..., :top]
        best = np.take_along_axis(log_probabilities, ids, -1)
        return Step(best, ids, cross, own, positions)

    def score(self, target_ids: Array, next_ids: Array, memory: Memory) -> Scores:
        positions = np.arange(target_ids.shape[1])[None].repeat(len(target_ids), 0)
        log_probabilities, cross, own = self._read(target_ids, positions, memory)
        return Scores(np.take_along_axis(log_probabilities, next_ids[..., None], -1)[..., 0], cross, own)

    def _read(self, target_ids: Array, positions: Array, memory: Memory) -> tuple[Array, Array, Array]:
        beam = len(target_ids) // len(memory.tensors)
        sources, lengths = (np.repeat(one, beam, 0) for one in (memory.tensors, memory.source_mask.sum(-1)))
        at = np.minimum(positions, lengths[:, None] - 1)  # past its end it stays at the end token
        right = np.take_along_axis(sources, at, 1)
        logits = np.where(np.arange(VOCABULARY) == right[..., None], 5.0, -0.1 * np.arange(VOCABULARY))
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        cross = np.eye(sources.shape[1])[at][:, None, None]
        length = int(positions.max()) + 1
        own = np.tril(np.ones((length, length)))[positions] / (positions + 1)[..., None]
        return log_probabilities.astype(np.float32), cross.astype(np.float32), own.astype(np.float32)[:, None, None]


class Gated:
    """Another model's steps, each of which waits until a test lets it through.

    Attributes:
        batches: sentences of each batch that was encoded.
        rows: rows of each step, as it arrived.
    """

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self._arrived, self._passes = threading.Semaphore(0), threading.Semaphore(0)
        self._open = threading.Event()
        self.batches: list[int] = []
        self.rows: list[int] = []

    def wait(self) -> None:
        """Until one more step has arrived, and waits to be let through."""
        assert self._arrived.acquire(timeout=PATIENCE), "no step arrived"

    def let(self, steps: int = 1) -> None:
        """Let so many steps through."""
        self._passes.release(steps)

    def open(self) -> None:
        """Let all steps through from now on."""
        self._open.set()
        self._passes.release()

    def encode(self, source_ids: Array, source_mask: Array) -> Memory:
        self.batches.append(len(source_ids))
        return self._model.encode(source_ids, source_mask)

    def select(self, memory: Memory, sentences: Array) -> Memory:
        return self._model.select(memory, sentences)

    def step(
        self, target_ids: Array, positions: Array, memory: Memory, state: Any, state_rows: Array, top: int
    ) -> Step:
        self._enter(len(target_ids))
        return self._model.step(target_ids, positions, memory, state, state_rows, top)

    def score(self, target_ids: Array, next_ids: Array, memory: Memory) -> Scores:
        self._enter(len(target_ids))
        return self._model.score(target_ids, next_ids, memory)

    def _enter(self, rows: int) -> None:
        self.rows.append(rows)
        self._arrived.release()
        if not self._open.is_set():
            assert self._passes.acquire(timeout=PATIENCE), "no step was let through"
