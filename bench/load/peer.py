"""A checkpoint's weights as a CTranslate2 model, so that the peer decodes the same network. Torch-free.

Run in the environment that has ctranslate2. Nothing outside this module knows how the conversion is done: it can be
replaced by another `build_peer` of the same signature.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from ctranslate2.specs import Activation, TransformerSpec
from safetensors.numpy import load_file

from model.config import Config, ModelConfig, load_config
from model.tokenizer import Tokenizer

Precision = Literal["fp32", "int8"]

ACTIVATIONS = {"relu": Activation.RELU, "gelu": Activation.GELU, "swish": Activation.SWISH}

LAYER_NORM_EPSILON = 1e-5
"""PyTorch's, which the checkpoint was trained with."""


class Weights:
    """The tensors of a checkpoint by their PyTorch names, as CTranslate2's layers take them."""

    def __init__(self, path: Path) -> None:
        self._tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(path).items()}

    def array(self, *names: str) -> np.ndarray[Any, Any]:
        """The first of these names that is there: a tied table is stored once, under one of them."""
        return next(self._tensors[name] for name in names if name in self._tensors)

    def linear(self, spec: Any, *names: str) -> None:
        """Fill a linear layer, several maps joined into one product."""
        spec.weight = np.concatenate([self.array(f"{name}.weight") for name in names])
        spec.bias = np.concatenate([self.array(f"{name}.bias") for name in names])

    def norm(self, spec: Any, name: str) -> None:
        """Fill a layer normalisation."""
        spec.gamma, spec.beta = self.array(f"{name}.weight"), self.array(f"{name}.bias")

    def feed_forward(self, spec: Any, layer: str) -> None:
        """Fill a feed-forward network with the normalisation around it."""
        self.norm(spec.layer_norm, f"{layer}.feed_forward_residual.norm")
        self.linear(spec.linear_0, f"{layer}.feed_forward.inner")
        self.linear(spec.linear_1, f"{layer}.feed_forward.outer")

    def self_attention(self, spec: Any, layer: str, residual: str) -> None:
        """Fill a self-attention with the normalisation around it."""
        self.norm(spec.layer_norm, f"{layer}.{residual}.norm")
        self.linear(spec.linear[0], f"{layer}.self_attention.query_key_value")
        self.linear(spec.linear[1], f"{layer}.self_attention.output")


def build_peer(checkpoint: Path, folder: Path, precision: Precision) -> None:
    """Write a CTranslate2 model with a checkpoint's weights.

    Args:
        checkpoint: folder of the checkpoint.
        folder: where to; must not exist.
        precision: of the weights.

    Raises:
        ValueError: CTranslate2 has no layer for a choice of the checkpoint's configuration.
    """
    config = load_config(checkpoint / "config.json")
    spec = _spec(config, Weights(checkpoint / "model.safetensors"))
    sides = {"source": spec.register_source_vocabulary, "target": spec.register_target_vocabulary}
    for side, register in sides.items():
        tokenizer = Tokenizer.load(checkpoint / f"tokenizer.{side}.json")
        register([tokenizer.token_text(index) for index in range(len(tokenizer))])
    spec.config.add_source_eos = False  # the tokenizer puts the end token there
    spec.config.layer_norm_epsilon = LAYER_NORM_EPSILON
    spec.validate()
    spec.optimize(quantization=None if precision == "fp32" else precision)
    folder.mkdir(parents=True)
    spec.save(str(folder))


def _spec(config: Config, weights: Weights) -> Any:
    shape = config.model
    pre = shape.norm == "pre"
    if pre != shape.final_norm:
        raise ValueError(f"norm={shape.norm!r} with final_norm={shape.final_norm}: CTranslate2 has no such network")
    layers = (shape.encoder_layers, shape.decoder_layers)
    spec = TransformerSpec.from_config(layers, shape.heads, pre_norm=pre, activation=ACTIVATIONS[shape.activation])
    _fill_encoder(spec.encoder, shape, weights)
    _fill_decoder(spec.decoder, shape, weights)
    return spec


def _fill_encoder(spec: Any, shape: ModelConfig, weights: Weights) -> None:
    spec.embeddings[0].weight = weights.array(
        "encoder.embedding.tokens.weight", "decoder.embedding.tokens.weight", "decoder.projection.weight"
    )
    spec.scale_embeddings = shape.embedding_scale
    spec.position_encodings.encodings = sinusoids(shape.longest_source, shape)
    for index, layer in enumerate(spec.layer):
        name = f"encoder.layers.{index}"
        weights.self_attention(layer.self_attention, name, "attention_residual")
        weights.feed_forward(layer.ffn, name)
    if shape.final_norm:
        weights.norm(spec.layer_norm, "encoder.norm")


def _fill_decoder(spec: Any, shape: ModelConfig, weights: Weights) -> None:
    tables = ("decoder.embedding.tokens.weight", "encoder.embedding.tokens.weight", "decoder.projection.weight")
    spec.embeddings.weight = weights.array(*tables)
    spec.projection.weight = weights.array("decoder.projection.weight", *tables)
    spec.scale_embeddings = shape.embedding_scale
    spec.position_encodings.encodings = sinusoids(shape.longest_target, shape)
    for index, layer in enumerate(spec.layer):
        name = f"decoder.layers.{index}"
        weights.self_attention(layer.self_attention, name, "self_residual")
        weights.norm(layer.attention.layer_norm, f"{name}.cross_residual.norm")
        weights.linear(layer.attention.linear[0], f"{name}.cross_attention.query")
        weights.linear(layer.attention.linear[1], f"{name}.cross_attention.key_value")
        weights.linear(layer.attention.linear[2], f"{name}.cross_attention.output")
        weights.feed_forward(layer.ffn, name)
    if shape.final_norm:
        weights.norm(spec.layer_norm, "decoder.norm")


def sinusoids(positions: int, shape: ModelConfig) -> np.ndarray[Any, Any]:
    """The table of `model.layers.sinusoids`: CTranslate2's own differs."""
    frequency = np.exp(np.arange(shape.d_model // 2) * (-2 * np.log(10_000.0) / shape.d_model))
    angle = np.arange(positions)[:, None] * frequency
    if shape.positions == "interleaved":
        return np.stack((np.sin(angle), np.cos(angle)), -1).reshape(positions, -1).astype(np.float32)
    return np.concatenate((np.sin(angle), np.cos(angle)), -1).astype(np.float32)
