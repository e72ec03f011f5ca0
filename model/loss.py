"""What training minimises: cross-entropy with label smoothing, and R-Drop on request."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from model.batches import Batch
from model.vocabulary import PAD


def token_loss(model: nn.Module, batch: Batch, label_smoothing: float) -> Tensor:
    """Cross-entropy summed over the batch's target tokens (5.4 for the smoothing)."""
    return _cross_entropy(_logits(model, batch), batch, label_smoothing)


def training_loss(model: nn.Module, batch: Batch, label_smoothing: float, r_drop: float) -> Tensor:
    """What one batch adds to the loss, summed over its target tokens.

    R-Drop (Liang et al. 2021) reads the batch twice, each time with other dropout, and holds the two predictions
    together: the mean of their cross-entropies and r_drop / 4 of their Kullback-Leibler divergences, both ways. That
    is half of the paper's sum, so that the rate need not change with it.

    Args:
        model: in training mode; called once.
        batch: what it learns from.
        label_smoothing: probability spread over the whole vocabulary.
        r_drop: the paper's alpha; 0 reads the batch once.
    """
    if not r_drop:
        return token_loss(model, batch, label_smoothing)
    twice = Batch(*(torch.cat((ids, ids)) for ids in batch))
    logits = _logits(model, twice)
    first, second = log_softmax(logits, -1).chunk(2)
    divergence = ((first.exp() - second.exp()) * (first - second)).sum(-1)
    real = batch.next_ids != PAD
    return _cross_entropy(logits, twice, label_smoothing) / 2 + r_drop / 4 * divergence[real].sum()


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch.source_ids, batch.source_mask, batch.target_ids).logits
    return logits.float()


def _cross_entropy(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    return cross_entropy(
        logits.flatten(0, 1),
        batch.next_ids.flatten(),
        ignore_index=PAD,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
