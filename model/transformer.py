"""The encoder-decoder Transformer of "Attention Is All You Need" (Vaswani et al. 2017), top to bottom.

    source ids ── Encoder ── memory (keys and values for every decoder layer) ──┐
                    │                                                           │
                    └─► encoder attention                     target ids ── Decoder ── logits
                                                                                │
                                                        decoder attention ◄─────┴─────► cross-attention

All three families of attention are returned, one tensor a layer, every head apart.
"""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import DecoderLayer, Embedding, EncoderLayer, KeyValue


class Encoded(NamedTuple):
    """What the encoder makes of a batch of sources."""

    memory: list[KeyValue]
    """Cross-attention keys and values, one pair a decoder layer."""
    attention: list[Float[Tensor, "batch head source source"]]
    """Encoder self-attention, one tensor a layer."""


class Decoded(NamedTuple):
    """What the decoder makes of some new target positions."""

    logits: Float[Tensor, "row new vocabulary"]
    """Scores of the next token after each new position."""
    decoder_attention: list[Float[Tensor, "row head new target"]]
    """Decoder self-attention over past and new positions, one tensor a layer."""
    cross_attention: list[Float[Tensor, "row head new source"]]
    """Attention to the source, one tensor a layer."""
    state: list[KeyValue]
    """Self-attention keys and values of past and new positions, one pair a layer: the next step's past."""


class Output(NamedTuple):
    """A whole pass over given pairs."""

    logits: Float[Tensor, "batch target vocabulary"]
    encoder_attention: list[Float[Tensor, "batch head source source"]]
    decoder_attention: list[Float[Tensor, "batch head target target"]]
    cross_attention: list[Float[Tensor, "batch head target source"]]


def target_visible(positions: Int[Tensor, "row new"], past: int) -> Bool[Tensor, "row 1 new target"]:
    """Which of `past` cached and the new target positions each new position may see.

    Pasts are right-aligned, so rows of different ages share a batch:

        past = 3, row of age 3:   k k k | n         the row's first new position has position 3
                  row of age 1:   · · k | n         position 1: two cached positions are padding

    New positions may themselves begin with padding, marked by negative positions (a forced prefix, right-aligned).

    Args:
        positions: position of each new token in its row, counted from 0; negative for padding.
        past: number of cached positions, padding included.
    """
    new = positions.shape[1]
    key = torch.arange(past + new, device=positions.device)
    causal = key[None, :] <= past + torch.arange(new, device=positions.device)[:, None]  # new target
    real = key[None, :] >= past - positions[:, :1]  # row target
    return (causal[None] & real[:, None])[:, None]


class Encoder(nn.Module):
    """Embedding and encoder layers (3.1)."""

    def __init__(self, vocabulary: int, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.d_model) if config.final_norm else nn.Identity()

    def forward(
        self, source_ids: Int[Tensor, "batch source"], source_mask: Bool[Tensor, "batch source"]
    ) -> tuple[Float[Tensor, "batch source d_model"], list[Float[Tensor, "batch head source source"]]]:
        """Returns the encoded positions and the attention of each layer; padding neither sees nor is seen."""
        positions = torch.arange(source_ids.shape[1], device=source_ids.device)[None].expand_as(source_ids)
        x = self.embedding(source_ids, positions)
        visible = (source_mask[:, None, :] & source_mask[:, :, None])[:, None]  # batch 1 source source
        attention = []
        for layer in self.layers:
            x, weights = layer(x, visible)
            attention.append(weights)
        return self.norm(x), attention


class Decoder(nn.Module):
    """Embedding, decoder layers and output projection (3.1, 3.4)."""

    def __init__(self, vocabulary: int, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.d_model) if config.final_norm else nn.Identity()
        self.projection = nn.Linear(config.d_model, vocabulary, bias=False)

    def forward(
        self,
        target_ids: Int[Tensor, "row new"],
        positions: Int[Tensor, "row new"],
        memory: list[KeyValue],
        source_mask: Bool[Tensor, "batch source"],
        past: list[KeyValue] | None = None,
    ) -> Decoded:
        """Run the new positions of each row, after its past.

        Args:
            target_ids: tokens to read; row = batch * beam, the beams of a sentence side by side.
            positions: their positions from 0; negative for padding before a row's first token.
            memory: from the encoder, one pair a layer.
            source_mask: true for real source tokens.
            past: the state that the last call returned, its rows chosen by the caller; nothing at the start.
        """
        x = self.embedding(target_ids, positions)
        visible = target_visible(positions, 0 if past is None else past[0].key.shape[2])
        source_visible = source_mask[:, None, None, :]
        decoder_attention, cross_attention, state = [], [], []
        for index, layer in enumerate(self.layers):
            before = None if past is None else past[index]
            x, self_weights, cross_weights, present = layer(x, visible, before, memory[index], source_visible)
            decoder_attention.append(self_weights)
            cross_attention.append(cross_weights)
            state.append(present)
        return Decoded(self.projection(self.norm(x)), decoder_attention, cross_attention, state)


class Transformer(nn.Module):
    """The whole network.

    Args:
        config: its shape.
        source_vocabulary: entries of the source vocabulary.
        target_vocabulary: entries of the target vocabulary; equal to the source's where all embeddings are tied.
    """

    def __init__(self, config: ModelConfig, source_vocabulary: int, target_vocabulary: int) -> None:
        super().__init__()
        if config.tied_embeddings == "all" and source_vocabulary != target_vocabulary:
            raise ValueError(f"one table cannot hold vocabularies of {source_vocabulary} and {target_vocabulary}")
        self.config = config
        self.encoder = Encoder(source_vocabulary, config)
        self.decoder = Decoder(target_vocabulary, config)
        self._initialise()
        if config.tied_embeddings != "none":
            self.decoder.projection.weight = self.decoder.embedding.tokens.weight
        if config.tied_embeddings == "all":
            self.encoder.embedding.tokens.weight = self.decoder.embedding.tokens.weight

    def _initialise(self) -> None:
        """Xavier uniform weights (Glorot and Bengio 2010), zero biases.

        Where one product holds several maps, each is drawn for itself. Embeddings have variance 1 / d_model, so that
        the tied projection starts with logits near 1.
        """
        for name, parameter in self.named_parameters():
            if "embedding" in name:
                nn.init.normal_(parameter, std=self.config.d_model**-0.5)
            elif parameter.dim() == 2:
                fused = 3 if "query_key_value" in name else 2 if "key_value" in name else 1
                for part in parameter.chunk(fused):
                    nn.init.xavier_uniform_(part)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def encode(self, source_ids: Int[Tensor, "batch source"], source_mask: Bool[Tensor, "batch source"]) -> Encoded:
        """Read the sources, and compute what every decoder layer will look at."""
        encoded, attention = self.encoder(source_ids, source_mask)
        layers = cast("Iterable[DecoderLayer]", self.decoder.layers)
        memory = [KeyValue(*layer.cross_attention.project_memory(encoded)) for layer in layers]
        return Encoded(memory, attention)

    def forward(
        self,
        source_ids: Int[Tensor, "batch source"],
        source_mask: Bool[Tensor, "batch source"],
        target_ids: Int[Tensor, "batch target"],
    ) -> Output:
        """Score given targets (teacher forcing): `logits[:, t]` predicts the token after `target_ids[:, t]`.

        Args:
            source_ids: tokens, padded on the right.
            source_mask: true for real source tokens.
            target_ids: a begin token and the target, padded on the right; padding is never seen by what comes before.
        """
        encoded = self.encode(source_ids, source_mask)
        positions = torch.arange(target_ids.shape[1], device=target_ids.device)[None].expand_as(target_ids)
        decoded = self.decoder(target_ids, positions, encoded.memory, source_mask)
        return Output(decoded.logits, encoded.attention, decoded.decoder_attention, decoded.cross_attention)
