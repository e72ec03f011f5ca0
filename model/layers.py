"""The parts of a Transformer around its attention: positions, embeddings, feed-forward network, residuals, layers."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.attention import ACTIVATIONS, CrossAttention, KeyValue, SelfAttention
from model.config import ModelConfig
from model.dropout import Dropout


def sinusoids(
    positions: Int[Tensor, "row position"], d_model: int, layout: str
) -> Float[Tensor, "row position d_model"]:
    """Positional encoding (3.5): sin and cos of position / 10000^(2i / d_model), computed, so without a longest one.

    Args:
        positions: position of each token, from 0.
        d_model: even width.
        layout: "half" puts all sines before all cosines; "interleaved" alternates them, as the paper writes it.
    """
    # Frequencies in float64, rounded once: so PyTorch and an exported graph, which computes them its own way, agree.
    pair = torch.arange(d_model // 2, device=positions.device, dtype=torch.float64)
    frequency = torch.exp(pair * (-2 * math.log(10_000.0) / d_model)).to(torch.float32)
    angle = positions[..., None].to(torch.float32) * frequency
    if layout == "interleaved":
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)
    return torch.cat((angle.sin(), angle.cos()), -1)


class Embedding(nn.Module):
    """Token embeddings plus positions (3.4, 3.5), with dropout on the sum (5.4)."""

    def __init__(self, vocabulary: int, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, config.d_model)
        self.scale = math.sqrt(config.d_model) if config.embedding_scale else 1.0
        self.layout = config.positions
        self.dropout = Dropout(config.dropout)

    def forward(
        self, ids: Int[Tensor, "row position"], positions: Int[Tensor, "row position"]
    ) -> Float[Tensor, "row position d_model"]:
        """Embed tokens at their positions."""
        x: Tensor = self.tokens(ids)
        embedded: Tensor = self.dropout(x * self.scale + sinusoids(positions, x.shape[-1], self.layout))
        return embedded


class FeedForward(nn.Module):
    """Position-wise feed-forward network (3.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(config.d_model, config.feed_forward)
        self.outer = nn.Linear(config.feed_forward, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position d_model"]:
        """Two affine maps with a non-linearity between."""
        y: Tensor = self.outer(self.dropout(self.activation(self.inner(x))))
        return y


class Residual(nn.Module):
    """The residual connection around a sub-layer, with layer normalisation before it or after the sum (3.1).

    pre:   x ──┬── norm ── sub-layer ── dropout ── + ──►          post:   x ──┬── sub-layer ── dropout ── + ── norm ──►
               └───────────────────────────────────┘                          └───────────────────────────┘
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.pre = config.norm == "pre"
        self.dropout = Dropout(config.dropout)

    def enter(self, x: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position d_model"]:
        """What the sub-layer gets to see."""
        return self.norm(x) if self.pre else x

    def leave(
        self, x: Float[Tensor, "row position d_model"], y: Float[Tensor, "row position d_model"]
    ) -> Float[Tensor, "row position d_model"]:
        """The sub-layer's output y, joined to its input x."""
        total: Tensor = x + self.dropout(y)
        return total if self.pre else self.norm(total)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network (3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config.d_model, config.heads, config.attention_dropout)
        self.feed_forward = FeedForward(config)
        self.attention_residual = Residual(config)
        self.feed_forward_residual = Residual(config)

    def forward(
        self, x: Float[Tensor, "batch source d_model"], hidden: Float[Tensor, "batch 1 1 source"]
    ) -> tuple[Float[Tensor, "batch source d_model"], Float[Tensor, "batch head source source"]]:
        """Returns the layer's output and its attention weights; rows of padding mean nothing in either."""
        query, new = self.self_attention.project(self.attention_residual.enter(x))
        attended, weights = self.self_attention.attend(query, new, hidden)
        x = self.attention_residual.leave(x, attended)
        x = self.feed_forward_residual.leave(x, self.feed_forward(self.feed_forward_residual.enter(x)))
        return x, weights


class DecoderLayer(nn.Module):
    """Masked self-attention, cross-attention and feed-forward network (3.1), over new positions after a cached past."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config.d_model, config.heads, config.attention_dropout)
        self.cross_attention = CrossAttention(config.d_model, config.heads, config.attention_dropout)
        self.feed_forward = FeedForward(config)
        self.self_residual = Residual(config)
        self.cross_residual = Residual(config)
        self.feed_forward_residual = Residual(config)

    def forward(
        self,
        x: Float[Tensor, "batch query d_model"],
        hidden: Float[Tensor, "#batch 1 query target"],
        past: KeyValue | None,
        memory: KeyValue,
        source_hidden: Float[Tensor, "batch 1 1 source"],
    ) -> tuple[
        Float[Tensor, "batch query d_model"],
        Float[Tensor, "batch head query target"],
        Float[Tensor, "batch head query source"],
        KeyValue,
    ]:
        """One layer over the new positions.

        Args:
            x: the new positions of each sentence.
            hidden: from `hide`: which of the past and new positions each new one must not see.
            past: keys and values of the positions before, or nothing.
            memory: keys and values of the source.
            source_hidden: from `hide`: which source positions are padding.

        Returns:
            The output, decoder self-attention, cross-attention, and keys and values of the new positions.
        """
        query, new = self.self_attention.project(self.self_residual.enter(x))
        attended, self_weights = self.self_attention.attend(query, new, hidden, past)
        x = self.self_residual.leave(x, attended)
        query = self.cross_attention.project_query(self.cross_residual.enter(x))
        attended, cross_weights = self.cross_attention.attend(query, memory, source_hidden)
        x = self.cross_residual.leave(x, attended)
        x = self.feed_forward_residual.leave(x, self.feed_forward(self.feed_forward_residual.enter(x)))
        return x, self_weights, cross_weights, new
