"""Our networks as Hugging Face's, which decodes them by itself: Marian's if normalised after, Pegasus's if before.

Its options and ours, for version 5.23:

- It counts tokens after the prompt: `max_new_tokens` is `longest` less the prefix, `min_new_tokens` one less than
  `shortest`, because it leaves the end token out there. Its length penalty counts the end token, as ours does.
- `early_stopping=True` is our rule: as soon as `num_beams` hypotheses are finished. The others go on after that.
- What is ruled out keeps its probability: the other log-probabilities are not renormalised while beams are compared,
  nor are ours.
- A prompt (`decoder_input_ids`) counts for nothing: neither log-probability nor length. Our prefix counts for both.
- It has no coverage penalty.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
)

from model.options import UNWRITABLE
from model.search import SearchOptions
from model.steps import pad
from model.transformer import Transformer
from model.vocabulary import BEGIN, END, PAD
from tests.peers.networks import VOCABULARY, Answer


@functools.cache
def convert(model: Transformer) -> Any:
    """The same network, there."""
    config = model.config
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "d_model": config.d_model,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.feed_forward,
        "decoder_ffn_dim": config.feed_forward,
        "activation_function": config.activation,
        "scale_embedding": config.embedding_scale,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "decoder_start_token_id": BEGIN,
        "forced_eos_token_id": None,
        "tie_word_embeddings": config.tied_embeddings == "all",
        "attn_implementation": "eager",  # the one that gives attention
    }
    if config.norm == "post":
        peer = MarianMTModel(MarianConfig(share_encoder_decoder_embeddings=False, **shared))
    else:
        peer = PegasusForConditionalGeneration(PegasusConfig(**shared))
    missing, unexpected = peer.load_state_dict(_weights(model), strict=False)
    assert not unexpected
    computed = ("final_logits_bias", "embed_positions.weight", "shared.weight")
    assert all(name.endswith(computed) for name in missing), missing
    return peer.eval()


def logits(peer: Any, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Tensor:
    """After the begin token and each token of a target."""
    found: Tensor = _forward(peer, sources, targets).logits
    return found


def cross_attention(peer: Any, source: Sequence[int], target: Sequence[int]) -> Tensor:
    """Layer, head, target, source: row t is of the step that chose token t."""
    found = _forward(peer, [source], [target], output_attentions=True).cross_attentions
    return torch.cat(found)[:, :, : len(target)]


@torch.inference_mode()
def decode(
    peer: Any,
    sources: Sequence[Sequence[int]],
    options: SearchOptions,
    prefixes: Sequence[Sequence[int]] = (),
    early_stopping: bool | Literal["never"] = True,
) -> list[list[Answer]]:
    """Its n best answers to each source.

    Args:
        peer: what `convert` made.
        sources: token ids.
        options: what to decode by; its `prefix` is not read.
        prefixes: forced beginnings, one a source and of one length.
        early_stopping: when its beam search ends.

    Returns:
        Answers, whose tokens hold the prefix; their scores and log-probabilities do not count it.
    """
    ids, mask = pad(sources)
    forced = [[BEGIN, *prefix] for prefix in prefixes] or [[BEGIN]] * len(sources)
    count = len(forced[0]) - 1
    beams = {"length_penalty": options.length_penalty, "early_stopping": early_stopping}
    generated = peer.generate(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask).long(),
        decoder_input_ids=torch.tensor(forced),
        generation_config=GenerationConfig(
            num_beams=options.beam_size,
            num_return_sequences=options.hypotheses,
            do_sample=False,
            **(beams if options.beam_size > 1 else {}),
            max_new_tokens=options.longest - count,
            min_new_tokens=max(options.shortest - 1 - count, 0),
            no_repeat_ngram_size=options.no_repeat_ngram,
            suppress_tokens=sorted(UNWRITABLE | options.suppressed),
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=BEGIN,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        ),
    )
    values = peer.compute_transition_scores(
        generated.sequences, generated.logits, generated.get("beam_indices"), normalize_logits=True
    )
    answers = [
        _answer(tokens, chosen, count, options)
        for tokens, chosen in zip(generated.sequences[:, 1:].tolist(), values.tolist(), strict=True)
    ]
    if options.beam_size > 1:
        scores = generated.sequences_scores.tolist()
        answers = [replace(answer, score=score) for answer, score in zip(answers, scores, strict=True)]
    return [answers[row : row + options.hypotheses] for row in range(0, len(answers), options.hypotheses)]


def _answer(tokens: list[int], values: list[float], count: int, options: SearchOptions) -> Answer:
    real = tokens[: tokens.index(END) + 1] if END in tokens else tokens
    values = values[: len(real) - count]
    return Answer(real, sum(values) / len(values) ** options.length_penalty, values)


@torch.inference_mode()
def _forward(peer: Any, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], **choices: object) -> Any:
    ids, mask = pad(sources)
    read, _ = pad([[BEGIN, *target] for target in targets])
    return peer(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask).long(),
        decoder_input_ids=torch.from_numpy(read),
        **choices,
    )


def _weights(model: Transformer) -> dict[str, Tensor]:
    """By its names: queries, keys and values apart."""
    found: dict[str, Tensor] = {"lm_head.weight": model.decoder.projection.weight}
    sides: dict[str, Any] = {"encoder": model.encoder, "decoder": model.decoder}
    for side, part in sides.items():
        found[f"model.{side}.embed_tokens.weight"] = part.embedding.tokens.weight
        if model.config.final_norm:
            found |= _named(f"model.{side}.layer_norm", part.norm)
        for index, layer in enumerate(part.layers):
            at = f"model.{side}.layers.{index}"
            own = layer.attention_residual if side == "encoder" else layer.self_residual
            found |= _named(f"{at}.self_attn_layer_norm", own.norm)
            found |= _split(layer.self_attention.query_key_value, f"{at}.self_attn", "qkv")
            found |= _named(f"{at}.self_attn.out_proj", layer.self_attention.output)
            if side == "decoder":
                found |= _named(f"{at}.encoder_attn_layer_norm", layer.cross_residual.norm)
                found |= _named(f"{at}.encoder_attn.q_proj", layer.cross_attention.query)
                found |= _split(layer.cross_attention.key_value, f"{at}.encoder_attn", "kv")
                found |= _named(f"{at}.encoder_attn.out_proj", layer.cross_attention.output)
            found |= _named(f"{at}.final_layer_norm", layer.feed_forward_residual.norm)
            found |= _named(f"{at}.fc1", layer.feed_forward.inner)
            found |= _named(f"{at}.fc2", layer.feed_forward.outer)
    return found


def _named(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


def _split(linear: nn.Linear, name: str, parts: str) -> dict[str, Tensor]:
    return {
        f"{name}.{part}_proj.{key}": value
        for key, whole in linear.state_dict().items()
        for part, value in zip(parts, whole.chunk(len(parts)), strict=True)
    }
