"""Forced decoding: how likely given targets are, all their tokens at once. Torch-free."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from model.errors import NotANumberError
from model.hypotheses import Hypothesis
from model.reading import read
from model.steps import ALL_FAMILIES, Family, Memory, Question, StepModel, causal, pad
from model.vocabulary import BEGIN, END


def score(
    model: StepModel,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    length_penalties: Sequence[float] | None = None,
    memory: Memory | None = None,
    attention: frozenset[Family] = ALL_FAMILIES,
) -> list[Hypothesis]:
    """Forced decoding: how likely given targets are, and the attention on the way to each of their tokens.

    Args:
        model: what computes the pass.
        sources: token ids of each sentence, the end token last.
        targets: token ids of each target, the end token last.
        length_penalties: for the score of each, as in a search; by default 1.
        memory: of the sources, where they were read already.
        attention: families that the hypotheses are to carry.

    Raises:
        NotANumberError: the model gave NaN for a given token.
    """
    _, real = pad(targets)
    step = model.step(_forced(model, targets, memory or read(model, sources), attention - {"encoder"}))
    if (lost := ~(step.next_log_probabilities < np.inf) & real).any():
        raise NotANumberError(
            f"the model's log-probabilities of {np.count_nonzero(lost)} of {np.count_nonzero(real)} given tokens are "
            "no numbers: its values overflowed, or its weights are damaged"
        )
    penalties = length_penalties or [1.0] * len(targets)
    hypotheses = []
    for row, target in enumerate(targets):
        end = len(target)
        values: list[float] = step.next_log_probabilities[row, :end].tolist()
        reason: Literal["stop", "length"] = "stop" if target[-1] == END else "length"
        cross, own = step.cross_attention, step.decoder_attention
        hypotheses.append(
            Hypothesis(
                tokens=list(target),
                log_probabilities=values,
                score=sum(values) / end ** penalties[row],
                finish_reason=reason,
                # Copies: a view would keep the whole batch's attention for as long as one answer lives.
                cross_attention=None if cross is None else cross[row, :, :, :end, : len(sources[row])].copy(),
                decoder_attention=None if own is None else own[row, :, :, :end, 1 : end + 1].copy(),
            )
        )
    return hypotheses


def _forced(
    model: StepModel, targets: Sequence[Sequence[int]], memory: Memory, attention: frozenset[Family]
) -> Question:
    """Whole targets at once, each position seeing those before it."""
    next_ids, _ = pad(targets)
    target_ids, _ = pad([[BEGIN, *target[:-1]] for target in targets])
    count, length = target_ids.shape
    sizes = {"past": 1, "row": 1, "source": 0}
    return Question(
        target_ids=target_ids,
        positions=np.broadcast_to(np.arange(length), target_ids.shape).copy(),
        new_visible=causal(length).repeat(count, 0),
        past_visible=np.zeros((count, length, 1), bool),  # one column that nobody sees: no axis is ever empty
        next_ids=next_ids,
        top=1,
        memory=memory,
        state=tuple(
            np.zeros((count, *(sizes[size] if isinstance(size, str) else size for size in kept)), model.dtype)
            for kept in model.state
        ),
        attention=attention,
    )
