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

from model.attention import KeyValue, hide
from model.config import ModelConfig
from model.layers import DecoderLayer, Embedding, EncoderLayer


class Encoded(NamedTuple):
    """What the encoder makes of a batch of sources."""

    memory: list[KeyValue]
    """Cross-attention keys and values, one pair a decoder layer."""
    attention: list[Float[Tensor, "batch head source source"]]
    """Encoder self-attention, one tensor a layer."""


class Decoded(NamedTuple):
    """What the decoder makes of some new target positions."""

    logits: Float[Tensor, "batch query vocabulary"]
    """Scores of the next token after each new position."""
    decoder_attention: list[Float[Tensor, "batch head query target"]]
    """Decoder self-attention over the past and then the new positions, one tensor a layer."""
    cross_attention: list[Float[Tensor, "batch head query source"]]
    """Attention to the source, one tensor a layer."""
    state: list[KeyValue]
    """Self-attention keys and values of the new positions, one pair a layer: a later step's past."""
    features: Float[Tensor, "batch query d_model"]
    """What the output projection makes the logits of."""


class Output(NamedTuple):
    """A whole pass over given pairs."""

    logits: Float[Tensor, "batch target vocabulary"]
    encoder_attention: list[Float[Tensor, "batch head source source"]]
    decoder_attention: list[Float[Tensor, "batch head target target"]]
    cross_attention: list[Float[Tensor, "batch head target source"]]


def causal(count: int, device: torch.device | None = None) -> Bool[Tensor, "1 count count"]:
    """Each position sees itself and those before it (3.2.3)."""
    return torch.ones(count, count, dtype=torch.bool, device=device).tril()[None]


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
        hidden = hide(source_mask[:, None, None, :], x.dtype)
        attention = []
        for layer in self.layers:
            x, weights = layer(x, hidden)
            attention.append(weights.masked_fill(~source_mask[:, None, :, None], 0.0))
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
        target_ids: Int[Tensor, "batch query"],
        positions: Int[Tensor, "batch query"],
        memory: list[KeyValue],
        source_mask: Bool[Tensor, "batch source"],
        new_visible: Bool[Tensor, "#batch query query"],
        past: list[KeyValue] | None = None,
        past_visible: Bool[Tensor, "batch query past"] | None = None,
    ) -> Decoded:
        """Run the new positions of each sentence, after its past.

        What is new may be the next position of one hypothesis, of several (the beams of a sentence, none of which sees
        the others), or many positions of one; the past likewise holds positions of all of them in any order. Who
        follows whom is in the masks alone, so that hypotheses part ways without a key or value being copied:

            past columns   a b c d e f | new   x y        "a b d" and "a c" are in the beam
            sees           a b . d . . |       x .        x follows d
                           a . c . . . |       . y        y follows c; e and f died out

        Args:
            target_ids: tokens to read.
            positions: their positions from 0.
            memory: from the encoder, one pair a layer.
            source_mask: true for real source tokens.
            new_visible: which new positions each new one sees, itself among them; one for all where there is no past.
            past: keys and values that earlier calls returned; nothing at the start.
            past_visible: which of them each new position sees.
        """
        x = self.embedding(target_ids, positions)
        visible = new_visible if past_visible is None else torch.cat((past_visible, new_visible), -1)
        hidden, source_hidden = hide(visible[:, None], x.dtype), hide(source_mask[:, None, None, :], x.dtype)
        decoder_attention, cross_attention, state = [], [], []
        for index, layer in enumerate(self.layers):
            before = None if past is None else past[index]
            x, self_weights, cross_weights, new = layer(x, hidden, before, memory[index], source_hidden)
            decoder_attention.append(self_weights)
            cross_attention.append(cross_weights)
            state.append(new)
        features = self.norm(x)
        return Decoded(self.projection(features), decoder_attention, cross_attention, state, features)


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
        memory = [layer.cross_attention.project_memory(encoded) for layer in layers]
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
        visible = causal(target_ids.shape[1], target_ids.device)
        decoded = self.decoder(target_ids, positions, encoded.memory, source_mask, visible)
        return Output(decoded.logits, encoded.attention, decoded.decoder_attention, decoded.cross_attention)
