"""Small networks and batches, shared by the tests of the network."""

from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer

SOURCE_VOCABULARY = 11
TARGET_VOCABULARY = 13
SMALL = {"d_model": 16, "heads": 4, "encoder_layers": 2, "decoder_layers": 3, "feed_forward": 24, "dropout": 0.0}


class Batch(NamedTuple):
    """The arguments of `Transformer.forward`."""

    source_ids: Tensor
    source_mask: Tensor
    target_ids: Tensor


def small_config(**choices: object) -> ModelConfig:
    return ModelConfig.model_validate(SMALL | choices)


def small_transformer(**choices: object) -> Transformer:
    """Every parameter is random: zero biases and unit norms would hide one that is left out."""
    torch.manual_seed(20)
    model = Transformer(small_config(**choices), SOURCE_VOCABULARY, TARGET_VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def small_batch(source_lengths: tuple[int, ...] = (7, 4, 1), target_length: int = 6) -> Batch:
    """Random sources, padded on the right with id 0, and random targets."""
    generator = torch.Generator().manual_seed(21)
    rows, longest = len(source_lengths), max(source_lengths)
    mask = torch.arange(longest)[None] < torch.tensor(source_lengths)[:, None]
    source_ids = torch.randint(1, SOURCE_VOCABULARY, (rows, longest), generator=generator)
    target_ids = torch.randint(1, TARGET_VOCABULARY, (rows, target_length), generator=generator)
    return Batch(source_ids * mask, mask, target_ids)
