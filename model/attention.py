"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2), with its weights as a return value.

    query ── · keyᵀ / √d ── mask ── softmax ──►  weights  ── · value ──►  output
                                                   │
                                                   └──►  returned, every head apart

The product, the softmax and the second product are spelled out in standard operators, so that the same lines train in
PyTorch, export to any ONNX execution provider, and hand out the weights at no cost.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from model.dropout import Dropout


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, heads apart."""

    key: Float[Tensor, "*batch position width"]
    value: Float[Tensor, "*batch position width"]


def hide(visible: Bool[Tensor, "*shape"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """What to add to scores so that softmax gives exactly 0 to what is not visible: 0, or the type's lowest value."""
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # of two numbers, `where` makes float32
    hidden: Tensor = torch.where(visible, 0.0, lowest).to(dtype)
    return hidden


def similarity(
    query: Float[Tensor, "*batch query width"], key: Float[Tensor, "*batch key width"]
) -> Float[Tensor, "*batch query key"]:
    """Scaled dot products: query · keyᵀ / √width (equation 1)."""
    products: Tensor = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return products


def attention_weights(
    query: Float[Tensor, "*batch query width"],
    key: Float[Tensor, "*batch key width"],
    hidden: Float[Tensor, "*#batch #query all"],
    past_key: Float[Tensor, "*batch past width"] | None = None,
) -> Float[Tensor, "*batch query all"]:
    """How much each query looks at each key: softmax(query · keyᵀ / √width) over the visible keys (equation 1).

    Args:
        query: one vector a query.
        key: one vector a key.
        hidden: from `hide`, for the past keys and then the others; leading axes broadcast.
        past_key: keys that come before the others, kept apart so that a long past is never copied to lengthen it.

    Returns:
        Weights that sum to 1 over the visible keys and are exactly 0 elsewhere. A query that sees nothing (padding) has
        equal weights, which mean nothing.
    """
    scores = similarity(query, key)
    if past_key is not None:
        scores = torch.cat((similarity(query, past_key), scores), -1)
    return (scores + hidden).softmax(-1)


def split_heads(x: Float[Tensor, "batch position d_model"], heads: int) -> Float[Tensor, "batch head position width"]:
    """Cut the model width into heads (3.2.2)."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "batch head position width"]) -> Float[Tensor, "batch position d_model"]:
    """Concatenate the heads again (3.2.2)."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """What self- and cross-attention share: weigh the values, merge the heads, project (3.2.2).

    Args:
        d_model: width of input and output.
        heads: number of heads; divides d_model.
        dropout: probability of dropping a weight on its way to the values. The returned weights are without it.
    """

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(d_model, d_model)

    def attend(
        self,
        query: Float[Tensor, "batch head query width"],
        new: KeyValue,
        hidden: Float[Tensor, "#batch 1 #query all"],
        past: KeyValue | None = None,
    ) -> tuple[Float[Tensor, "batch query d_model"], Float[Tensor, "batch head query all"]]:
        """Returns the projected output and the weights that produced it, over the past and then the new positions."""
        weights = attention_weights(query, new.key, hidden, None if past is None else past.key)
        dropped = self.dropout(weights)
        if past is None:
            return self.output(merge_heads(dropped @ new.value)), weights
        count = past.key.shape[-2]
        attended = dropped[..., :count] @ past.value + dropped[..., count:] @ new.value
        return self.output(merge_heads(attended)), weights


class SelfAttention(Attention):
    """Attention of a sequence to itself: queries, keys and values in one product."""

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__(d_model, heads, dropout)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)

    def project(
        self, x: Float[Tensor, "batch position d_model"]
    ) -> tuple[Float[Tensor, "batch head position width"], KeyValue]:
        """Queries, and keys and values, of each position."""
        query, key, value = split_heads(self.query_key_value(x), 3 * self.heads).chunk(3, 1)
        return query, KeyValue(key, value)


class CrossAttention(Attention):
    """Attention of the target to the memory; its keys and values are computed once a source."""

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__(d_model, heads, dropout)
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)

    def project_query(self, x: Float[Tensor, "batch target d_model"]) -> Float[Tensor, "batch head target width"]:
        """Queries of the target positions."""
        return split_heads(self.query(x), self.heads)

    def project_memory(self, encoded: Float[Tensor, "batch source d_model"]) -> KeyValue:
        """Keys and values of the source positions."""
        return KeyValue(*split_heads(self.key_value(encoded), 2 * self.heads).chunk(2, 1))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "swish": nn.functional.silu,
}
"""Non-linearities of the feed-forward network, by their names in the configuration."""
