"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2), with its weights as a return value.

    query ── · keyᵀ / √d ── mask ── softmax ──►  weights  ── · value ──►  output
                                                   │
                                                   └──►  returned, every head apart

The product, the softmax and the second product are spelled out in standard operators, so that the same lines train in
PyTorch, export to any ONNX execution provider, and hand out the weights at no cost.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from model.dropout import Dropout


def attention_weights(
    query: Float[Tensor, "*batch query width"],
    key: Float[Tensor, "*batch key width"],
    visible: Bool[Tensor, "*#batch #query key"],
) -> Float[Tensor, "*batch query key"]:
    """How much each query looks at each key: softmax(query · keyᵀ / √width) over the visible keys (equation 1).

    Args:
        query: one vector a query.
        key: one vector a key.
        visible: which keys a query may see; leading axes broadcast.

    Returns:
        Weights that sum to 1 over the visible keys and are exactly 0 elsewhere. A query that sees nothing (padding)
        gets zeros.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    lowest = torch.finfo(scores.dtype).min
    seen: Tensor = scores.masked_fill(~visible, lowest)
    return seen.softmax(-1).masked_fill(~visible, 0.0)


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
        key: Float[Tensor, "batch head key width"],
        value: Float[Tensor, "batch head key width"],
        visible: Bool[Tensor, "#batch 1 #query key"],
    ) -> tuple[Float[Tensor, "batch query d_model"], Float[Tensor, "batch head query key"]]:
        """Returns the projected output and the weights that produced it."""
        weights = attention_weights(query, key, visible)
        return self.output(merge_heads(self.dropout(weights) @ value)), weights


class SelfAttention(Attention):
    """Attention of a sequence to itself: queries, keys and values in one product."""

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__(d_model, heads, dropout)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)

    def project(
        self, x: Float[Tensor, "batch position d_model"]
    ) -> tuple[
        Float[Tensor, "batch head position width"],
        Float[Tensor, "batch head position width"],
        Float[Tensor, "batch head position width"],
    ]:
        """Queries, keys and values of each position."""
        query, key, value = self.query_key_value(x).chunk(3, -1)
        return split_heads(query, self.heads), split_heads(key, self.heads), split_heads(value, self.heads)


class CrossAttention(Attention):
    """Attention of the target to the memory; its keys and values are computed once a source."""

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__(d_model, heads, dropout)
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)

    def project_query(self, x: Float[Tensor, "batch target d_model"]) -> Float[Tensor, "batch head target width"]:
        """Queries of the target positions."""
        return split_heads(self.query(x), self.heads)

    def project_memory(
        self, encoded: Float[Tensor, "batch source d_model"]
    ) -> tuple[Float[Tensor, "batch head source width"], Float[Tensor, "batch head source width"]]:
        """Keys and values of the source positions."""
        key, value = self.key_value(encoded).chunk(2, -1)
        return split_heads(key, self.heads), split_heads(value, self.heads)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "swish": nn.functional.silu,
}
"""Non-linearities of the feed-forward network, by their names in the configuration."""
