"""What training minimises, against its definition spelled out."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from model.batches import Batch, Example, collate
from model.loss import token_loss, training_loss
from model.vocabulary import END, PAD
from tests.model.toy import small_transformer

EXAMPLES = [Example([5, 6, 7, END], [8, 9, END]), Example([9, END], [5, END])]
SMOOTHING = 0.1


@pytest.fixture
def batch() -> Batch:
    return collate(EXAMPLES)


def divergences(batch: Batch, first: Tensor, second: Tensor) -> Tensor:
    """Of two readings' predictions, both ways, over what is to be predicted."""
    total = torch.zeros(())
    for row, column in (batch.next_ids != PAD).nonzero().tolist():
        one, other = (logits[row, column].log_softmax(-1) for logits in (first, second))
        total = total + kl_div(one, other, log_target=True, reduction="sum")
        total = total + kl_div(other, one, log_target=True, reduction="sum")
    return total


def test_r_drop_is_the_mean_loss_of_two_readings_and_what_parts_them(batch: Batch) -> None:
    model = small_transformer(dropout=0.3).train()
    twice = Batch(*(torch.cat((ids, ids)) for ids in batch))
    torch.manual_seed(3)
    first, second = model(twice.source_ids, twice.source_mask, twice.target_ids).logits.chunk(2)
    torch.manual_seed(3)
    both = token_loss(model, twice, SMOOTHING)
    torch.manual_seed(3)
    found = training_loss(model, batch, SMOOTHING, 5.0)
    apart = divergences(batch, first, second)
    assert apart > 0.01
    torch.testing.assert_close(found, both / 2 + 5.0 / 4 * apart)


def test_without_dropout_two_readings_are_one(batch: Batch) -> None:
    model = small_transformer(dropout=0.0).train()
    torch.testing.assert_close(training_loss(model, batch, SMOOTHING, 5.0), token_loss(model, batch, SMOOTHING))


def test_without_r_drop_the_batch_is_read_once(batch: Batch) -> None:
    model = small_transformer(dropout=0.3).train()
    torch.manual_seed(3)
    expected = token_loss(model, batch, SMOOTHING)
    torch.manual_seed(3)
    assert training_loss(model, batch, SMOOTHING, 0.0).item() == expected.item()
