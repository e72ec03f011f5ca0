"""The exported modules, and their inputs and outputs as data.

The encoder runs once a batch, the decoder once a step. Between them go each decoder layer's cross keys and values
(`memory.*`), and from step to step its self-attention keys and values (`state.*` in, what is new of them out as
`next.*`). Each has a role and named axes in the manifest, so whoever runs the graphs need not know what they hold.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from export.manifest import TensorSpec
from model.attention import KeyValue
from model.config import ModelConfig
from model.transformer import Transformer


class Exported(NamedTuple):
    """A module ready to be exported."""

    module: nn.Module
    example: tuple[Any, ...]
    """Arguments that it is traced with."""
    inputs: tuple[TensorSpec, ...]
    """One for each tensor in the arguments, in order."""
    outputs: tuple[TensorSpec, ...]
    """One for each tensor returned, in order."""


class EncoderGraph(nn.Module):
    """Source ids to memory and encoder attention."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, source_ids: Tensor, source_mask: Tensor) -> tuple[Tensor, ...]:
        """Returns every layer's memory key and value, then all encoder attention [batch layer head source source]."""
        encoded = self.model.encode(source_ids, source_mask)
        return (*_flat(encoded.memory), torch.stack(encoded.attention, 1))


class DecoderGraph(nn.Module):
    """One step: new target positions after a past, seen through masks."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self,
        target_ids: Tensor,
        positions: Tensor,
        new_visible: Tensor,
        past_visible: Tensor,
        next_ids: Tensor,
        source_mask: Tensor,
        memory: list[Tensor],
        state: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Returns log-probabilities of all tokens and of the given next ones, cross- and decoder attention, new state.

        The first, [batch query vocabulary], does not leave the finished graph: the writer takes the best of it.
        """
        decoded = self.decoder(
            target_ids, positions, key_values(memory), source_mask, new_visible, key_values(state), past_visible
        )
        log_probabilities = decoded.logits.log_softmax(-1)
        return (
            log_probabilities,
            log_probabilities.gather(-1, next_ids[..., None])[..., 0],
            torch.stack(decoded.cross_attention, 1),
            torch.stack(decoded.decoder_attention, 1),
            *_flat(decoded.state),
        )


@dataclass(frozen=True)
class ExampleSizes:
    """Sizes that the graphs are traced with: all different, so that no two axes can be taken for one."""

    batch: int = 2
    query: int = 3
    source: int = 5
    past: int = 7


def encoder_graph(model: Transformer, source_vocabulary: int, sizes: ExampleSizes) -> Exported:
    """The encoder with its contract."""
    config = model.config
    ids = torch.randint(source_vocabulary, (sizes.batch, sizes.source))
    mask = torch.ones(sizes.batch, sizes.source, dtype=torch.bool)
    inputs = (_spec("source_ids", "int64", "batch", "source"), _spec("source_mask", "bool", "batch", "source"))
    attention = ("batch", config.encoder_layers, config.heads, "source", "source")
    outputs = (*memory_specs(config), _spec("encoder_attention", "float32", *attention))
    return Exported(EncoderGraph(model), (ids, mask), inputs, outputs)


def decoder_graph(model: Transformer, target_vocabulary: int, sizes: ExampleSizes) -> Exported:
    """The decoder step with its contract."""
    config = model.config
    batch, query, heads, width = sizes.batch, sizes.query, config.heads, config.head_width
    example = (
        torch.randint(target_vocabulary, (batch, query)),
        torch.arange(sizes.past, sizes.past + query).expand(batch, -1).contiguous(),
        torch.ones(batch, query, query, dtype=torch.bool),
        torch.ones(batch, query, sizes.past, dtype=torch.bool),
        torch.randint(target_vocabulary, (batch, query)),
        torch.ones(batch, sizes.source, dtype=torch.bool),
        [torch.randn(batch, heads, sizes.source, width) for _ in memory_specs(config)],
        [torch.randn(batch, heads, sizes.past, width) for _ in memory_specs(config)],
    )
    inputs = (
        _spec("target_ids", "int64", "batch", "query"),
        _spec("positions", "int64", "batch", "query"),
        _spec("new_visible", "bool", "batch", "query", "query"),
        _spec("past_visible", "bool", "batch", "query", "past"),
        _spec("next_ids", "int64", "batch", "query"),
        _spec("source_mask", "bool", "batch", "source"),
        *memory_specs(config),
        *_state(config, "state", "past"),
    )
    attention = ("batch", config.decoder_layers, heads, "query")
    outputs = (
        TensorSpec(
            name=LOG_PROBABILITIES,
            role="top_log_probabilities",
            dtype="float32",
            axes=("batch", "query", target_vocabulary),
        ),
        _spec("next_log_probabilities", "float32", "batch", "query"),
        _spec("cross_attention", "float32", *attention, "source"),
        _spec("decoder_attention", "float32", *attention, "target"),
        *_state(config, "next", "query"),
    )
    return Exported(DecoderGraph(model), example, inputs, outputs)


LOG_PROBABILITIES = "log_probabilities"
"""Name of the traced decoder's output that the writer takes the best of, and that does not leave the graph."""

CANDIDATE_IDS = "memory.candidate_ids"
"""Name of the input with the vocabulary ids of a shortlist's candidates, where log-probabilities are over those."""

TOP_INPUT = TensorSpec(name="top", role="top", dtype="int64", axes=(1,))
"""How many candidates the decoder graph is to return; added to the traced graph by the writer."""

TOP_OUTPUTS = (
    TensorSpec(
        name="top_log_probabilities", role="top_log_probabilities", dtype="float32", axes=("batch", "query", "top")
    ),
    TensorSpec(name="top_ids", role="top_ids", dtype="int64", axes=("batch", "query", "top")),
)
"""The best next tokens, best first: whole vocabularies do not leave the graph."""


def wanted_input(output: TensorSpec) -> TensorSpec:
    """The switch of an output that costs nothing when it is off; added to the traced graph by the writer."""
    return TensorSpec(name=f"want_{output.name}", role="wanted", dtype="bool", axes=(), feeds=output.name)


def _spec(name: Any, dtype: Any, *axes: str | int) -> TensorSpec:
    return TensorSpec(name=name, role=name, dtype=dtype, axes=axes)


def memory_specs(config: ModelConfig) -> list[TensorSpec]:
    """Cross keys and values of every decoder layer."""
    axes = ("batch", config.heads, "source", config.head_width)
    return [
        TensorSpec(name=f"memory.{layer}.{part}", role="memory", dtype="float32", axes=axes)
        for layer in range(config.decoder_layers)
        for part in KeyValue._fields
    ]


def _state(config: ModelConfig, prefix: str, position: str) -> list[TensorSpec]:
    axes = ("batch", config.heads, position, config.head_width)
    names = [f"{layer}.{part}" for layer in range(config.decoder_layers) for part in KeyValue._fields]
    return [
        TensorSpec(
            name=f"{prefix}.{name}",
            role="state",
            dtype="float32",
            axes=axes,
            feeds=f"state.{name}" if prefix == "next" else None,
        )
        for name in names
    ]


def _flat(pairs: list[KeyValue]) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair]


def key_values(tensors: list[Tensor]) -> list[KeyValue]:
    """Keys and values that stand in turn, a pair a layer."""
    return [KeyValue(*tensors[index : index + 2]) for index in range(0, len(tensors), 2)]
