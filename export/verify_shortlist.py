"""Hold the search among candidates to PyTorch, and count the answers that it leaves as they are."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from export.graphs import CANDIDATE_IDS
from export.manifest import SHORTLIST_ANSWERS, SHORTLIST_VALUES, Precision
from export.runtime import OnnxStepModel
from export.verify import Parity, VerificationError, compare_values, decode_pairs, over_tolerance
from model.checkpoint import Checkpoint
from model.pairs import Pair
from model.steps import Array, Memory, Question, Step, StepModel
from model.torch_steps import TorchStepModel


class AmongCandidates:
    """A step model whose log-probabilities are those of another, of some candidates alone and renormalised.

    Args:
        model: with log-probabilities of the whole vocabulary.
        short: names each sentence's candidates.
    """

    def __init__(self, model: StepModel, short: OnnxStepModel) -> None:
        self.memory, self.state, self.dtype, self.vocabulary = short.memory, model.state, model.dtype, model.vocabulary
        self._model, self._short = model, short
        self._place = [spec.name for spec in short.memory_specs].index(CANDIDATE_IDS)

    def encode(
        self,
        source_ids: Int[np.ndarray, "batch source"],
        source_mask: Bool[np.ndarray, "batch source"],
        attention: bool = True,
    ) -> Memory:
        """See `StepModel.encode`; the candidates' ids come last."""
        ids = self._short.encode(source_ids, source_mask, attention=False).tensors[self._place]
        memory = self._model.encode(source_ids, source_mask, attention)
        return dataclasses.replace(memory, tensors=(*memory.tensors, ids))

    def step(self, question: Question) -> Step:
        """See `StepModel.step`; the best are at most as many as there are candidates."""
        *tensors, ids = question.memory.tensors
        memory = dataclasses.replace(question.memory, tensors=tuple(tensors))
        step = self._model.step(dataclasses.replace(question, memory=memory, top=self.vocabulary))
        everything = np.empty_like(step.top_log_probabilities)
        np.put_along_axis(everything, step.top_ids, step.top_log_probabilities, -1)
        allowed = np.zeros((len(ids), self.vocabulary), bool)
        np.put_along_axis(allowed, ids, True, -1)
        values = _renormalised(np.where(allowed[:, None], everything, -np.inf))
        order = np.argsort(-values, -1, kind="stable")[..., : min(question.top, ids.shape[1])]
        return dataclasses.replace(
            step,
            top_log_probabilities=np.take_along_axis(values, order, -1),
            top_ids=order,
            next_log_probabilities=np.take_along_axis(values, question.next_ids[..., None], -1)[..., 0],
        )


def _renormalised(log_probabilities: Array) -> Array:
    highest = log_probabilities.max(-1, keepdims=True)
    total = np.exp(log_probabilities - highest).sum(-1, keepdims=True)
    renormalised: Array = log_probabilities - highest - np.log(total)
    return renormalised


def verify_shortlist(
    checkpoint: Checkpoint,
    models: Mapping[Precision, OnnxStepModel],
    pairs: Sequence[Pair],
    exact: Parity,
    progress: Callable[[str, int], None] = lambda what, count: None,
) -> None:
    """Compare every precision's search among candidates with PyTorch, and count its answers that are the exact ones.

    Args:
        checkpoint: the network.
        models: the searches among candidates, by precision.
        pairs: what to decode.
        exact: what the verification of the exact graphs found with the same pairs; the figures are added to it.
        progress: told what was decoded, and how many more sources.

    Raises:
        VerificationError: log-probabilities, attention or state are further from PyTorch's than `TOLERANCES` allows.
    """
    reference, problems = TorchStepModel(checkpoint.model), []
    for precision, model in models.items():
        found = compare_values(AmongCandidates(reference, model), model, checkpoint)
        problems += over_tolerance(precision, found)
        exact.differences[precision][SHORTLIST_VALUES] = found["log_probabilities"]
    if problems:
        raise VerificationError("the shortlist differs from the checkpoint: " + "; ".join(problems))
    for precision, model in models.items():

        def told(count: int, name: str = f"{precision}, shortlist") -> None:
            progress(name, count)

        tokens = decode_pairs(model, checkpoint, pairs, told).tokens
        equal = sum(one == other for one, other in zip(tokens, exact.tokens[precision], strict=True))
        exact.differences[precision][SHORTLIST_ANSWERS] = float(equal)
