"""The yardstick: CTranslate2 with our own weights, so that both sides decode the same network.

What was found out about version 4.8.5, by comparing with `model.search`:

- Sources are token strings. Ours are the ids written as numbers, so nothing is tokenised while the clock runs.
- Lengths count the end token, in the length limit and in the length penalty, as ours do.
- Beam search stops when `beam_size` hypotheses are finished (`patience=1`), and an end token counts only among the
  `beam_size` best candidates: the rules of `model.search`. Ours also stops when no live hypothesis can win any more,
  which changes no answer. With a length penalty of 0 it has another rule, and stops when the best candidate of all is
  an end token, however many hypotheses are finished; the benchmark uses 1. `tests/peers` compares all options.
- Quantising multiplies the arrays that it is given in place: it must be given copies.
- Ours never writes padding and begin tokens. Here they could be suppressed (`suppress_sequences`), at a price; trained
  networks do not write them, and the random ones of the benchmark cannot, so nothing is suppressed.
- `return_attention` gives one matrix, the mean over some heads of one layer; the default, the last layer's first head,
  is the least work, so it is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ctranslate2
import numpy as np
from ctranslate2.specs.common_spec import Activation
from ctranslate2.specs.transformer_spec import TransformerSpec

from model.vocabulary import BEGIN, END, SPECIAL_TOKENS, UNKNOWN

if TYPE_CHECKING:  # whoever only runs a model needs no torch, and its memory is measured without it
    from model.transformer import Transformer

ACTIVATIONS = {"relu": Activation.RELU, "gelu": Activation.GELU, "swish": Activation.SWISH}
"""Names in our configuration; GELU is the exact one in both."""

QUANTISATION = {"float32": None, "int8": "int8"}
"""What `optimize` takes for each precision of the benchmark."""


def build_peer(model: Transformer, folder: Path, precision: str, longest: int) -> None:
    """Write a CTranslate2 model with the weights of one of ours.

    Args:
        model: the network.
        folder: where to; made if missing.
        precision: "float32" or "int8".
        longest: positions that its table of position encodings holds, in source and target.
    """
    config = model.config
    spec = TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers),
        config.heads,
        pre_norm=config.final_norm,  # only so does the specification hold final norms
        activation=ACTIVATIONS[config.activation],
    )
    positions = _positions(longest, config.d_model, config.positions)
    for side, part in ((spec.encoder, model.encoder), (spec.decoder, model.decoder)):
        side.pre_norm = config.norm == "pre"
        side.scale_embeddings = config.embedding_scale
        side.position_encodings.encodings = positions
        if config.final_norm:
            _set_norm(side.layer_norm, part.norm)
    spec.encoder.embeddings[0].weight = _array(model.encoder.embedding.tokens.weight)
    spec.decoder.embeddings.weight = _array(model.decoder.embedding.tokens.weight)
    spec.decoder.projection.weight = _array(model.decoder.projection.weight)
    for layer, ours in zip(spec.encoder.layer, model.encoder.layers, strict=True):
        _set_self_attention(layer.self_attention, ours, "attention_residual")
        _set_feed_forward(layer.ffn, ours)
    for layer, ours in zip(spec.decoder.layer, model.decoder.layers, strict=True):
        _set_self_attention(layer.self_attention, ours, "self_residual")
        _set_cross_attention(layer.attention, ours)
        _set_feed_forward(layer.ffn, ours)
    spec.config.add_source_eos = False
    spec.register_source_vocabulary(_vocabulary(model.encoder.embedding.tokens.num_embeddings))
    spec.register_target_vocabulary(_vocabulary(model.decoder.embedding.tokens.num_embeddings))
    spec.validate()
    spec.optimize(quantization=QUANTISATION[precision])
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


class Peer:
    """A CTranslate2 model that decodes ids to ids.

    Args:
        folder: what `build_peer` wrote.
        precision: "float32" or "int8".
        threads: threads of one call.
    """

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        self._translator: Any = ctranslate2.Translator(
            str(folder), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
        )

    @staticmethod
    def prepare(sources: Sequence[Sequence[int]]) -> list[list[str]]:
        """Sources as it takes them."""
        return [[_name(index) for index in source] for source in sources]

    def decode(
        self,
        sources: list[list[str]],
        *,
        beam_size: int,
        longest: int,
        length_penalty: float,
        attention: str,
        scores: bool = False,
    ) -> list[Any]:
        """Decode one batch.

        Args:
            sources: from `prepare`.
            beam_size: 1 for greedy search.
            longest: most tokens to generate, the end token among them.
            length_penalty: see `SearchOptions`.
            attention: anything but "none" asks for its one matrix.
            scores: compute scores too; without them greedy search saves the normalisation, so that is what is timed.

        Returns:
            Its own results, which `answers` and `scores` read.
        """
        found: list[Any] = self._translator.translate_batch(
            sources,
            max_batch_size=0,
            beam_size=beam_size,
            patience=1,
            length_penalty=length_penalty,
            return_end_token=True,
            max_input_length=0,
            max_decoding_length=longest,
            min_decoding_length=0,
            return_scores=scores,
            return_attention=attention != "none",
        )
        return found

    @staticmethod
    def answers(found: list[Any]) -> list[list[int]]:
        """Ids of the best hypotheses, the end token last unless the limit came first."""
        return [[_id(token) for token in result.hypotheses[0]] for result in found]

    @staticmethod
    def scores(found: list[Any]) -> list[float]:
        """Their log-probability / length ** length_penalty, where `scores` were asked for."""
        return [result.scores[0] for result in found]


def _name(index: int) -> str:
    # Special tokens by their own names, which its configuration looks up; all others are their number.
    return SPECIAL_TOKENS[index] if index in (UNKNOWN, BEGIN, END) else str(index)


def _id(token: str) -> int:
    return int(token) if token.isdecimal() else SPECIAL_TOKENS.index(token)


def _vocabulary(size: int) -> list[str]:
    return [_name(index) for index in range(size)]


def _array(tensor: Any) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = tensor.detach().numpy().copy()  # quantising works in place
    return found


def _positions(longest: int, d_model: int, layout: str) -> np.ndarray[Any, Any]:
    """The sinusoids of `model.layers`, as a table: CTranslate2's own has other frequencies."""
    frequency = np.exp(np.arange(d_model // 2) * (-2 * np.log(10_000.0) / d_model)).astype(np.float32)
    angle = np.arange(longest, dtype=np.float32)[:, None] * frequency
    if layout == "interleaved":
        return np.stack((np.sin(angle), np.cos(angle)), -1).reshape(longest, d_model)
    return np.concatenate((np.sin(angle), np.cos(angle)), -1)


def _set_norm(spec: Any, norm: Any) -> None:
    spec.gamma, spec.beta = _array(norm.weight), _array(norm.bias)


def _set_linear(spec: Any, linear: Any) -> None:
    spec.weight, spec.bias = _array(linear.weight), _array(linear.bias)


def _set_self_attention(spec: Any, layer: Any, residual: str) -> None:
    _set_norm(spec.layer_norm, getattr(layer, residual).norm)
    _set_linear(spec.linear[0], layer.self_attention.query_key_value)
    _set_linear(spec.linear[1], layer.self_attention.output)


def _set_cross_attention(spec: Any, layer: Any) -> None:
    _set_norm(spec.layer_norm, layer.cross_residual.norm)
    _set_linear(spec.linear[0], layer.cross_attention.query)
    _set_linear(spec.linear[1], layer.cross_attention.key_value)
    _set_linear(spec.linear[2], layer.cross_attention.output)


def _set_feed_forward(spec: Any, layer: Any) -> None:
    _set_norm(spec.layer_norm, layer.feed_forward_residual.norm)
    _set_linear(spec.linear_0, layer.feed_forward.inner)
    _set_linear(spec.linear_1, layer.feed_forward.outer)
