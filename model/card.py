"""A model card to begin with: what a training knows of its model, and what only its maker can add. Torch-free."""

from collections.abc import Mapping
from typing import Any

from model.config import Config

CARD = "MODEL_CARD.md"
"""The file in a checkpoint and in a bundle."""


def model_card(config: Config, metrics: Mapping[str, Any], parameters: int) -> str:
    """Markdown that says what the model is, what it learnt from and what it scored.

    Args:
        config: of the run.
        metrics: of the final checkpoint, on the validation part.
        parameters: how many weights it has.
    """
    shape, data = config.model, config.data.model_dump(mode="json", exclude_none=True)
    figures = [f"| {name} | {value:.2f} |" for name, value in metrics.items() if isinstance(value, float)]
    lines = [
        f"# {config.name}",
        "",
        f"An encoder-decoder Transformer for task `{config.task}`: {parameters:,} parameters, "
        f"{shape.encoder_layers} encoder and {shape.decoder_layers} decoder layers, width {shape.d_model}, "
        f"{shape.heads} heads. It takes {shape.longest_source} source tokens and gives {shape.longest_target}, the end "
        "tokens among them.",
        "",
        "## Figures",
        "",
        f"On up to {config.training.validation_pairs:,} sources of the validation part, decoded greedily "
        f"({metrics.get('chosen', '')}):",
        "",
        "| metric | value |",
        "| --- | ---: |",
        *figures,
        "",
        "## Training",
        "",
        f"Data: `{data}`. Seed {config.training.seed}, {metrics.get('update', 0):,} updates of up to "
        f"{config.training.tokens_per_batch:,} tokens; the whole recipe is in `config.json`.",
        "",
        "## Limits and licence",
        "",
        "To be written by whoever publishes the model: what its data allow, and what it should not be used for.",
        "",
    ]
    return "\n".join(lines)
