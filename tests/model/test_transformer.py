"""The network against torch.nn.Transformer with the same weights, and its rows against padding and company."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.transformer import Output, Transformer
from tests.model.toy import Batch, small_batch, small_transformer

AGAINST_TORCH = {"logits": 1e-5, "encoder": 1e-6, "decoder": 1e-6, "cross": 1e-6}
"""Largest difference from torch.nn. Measured: mostly none, at most 1.2e-6 of logits up to 5, and 4e-7."""

AGAINST_COMPANY = {"logits": 1e-5, "encoder": 1e-6, "decoder": 1e-6, "cross": 1e-6}
"""Largest difference between a pair alone and in a padded batch."""

RENAMED = {
    "self_attention.query_key_value.": "self_attn.in_proj_",
    "self_attention.output.": "self_attn.out_proj.",
    "cross_attention.output.": "multihead_attn.out_proj.",
    "feed_forward.inner.": "linear1.",
    "feed_forward.outer.": "linear2.",
    "attention_residual.norm.": "norm1.",
    "self_residual.norm.": "norm1.",
    "cross_residual.norm.": "norm2.",
}
"""Our names of a layer's parameters, and those of torch.nn."""


def translated(ours: nn.Module, feed_forward_norm: str) -> dict[str, Tensor]:
    """The state of our stack of layers, under the names of torch.nn.TransformerEncoder or TransformerDecoder."""
    state = {name: value for name, value in ours.state_dict().items() if name.startswith(("layers.", "norm."))}
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".cross_attention.query." in name:
            rest = state[name.replace(".query.", ".key_value.")]
            theirs[name.replace("cross_attention.query.", "multihead_attn.in_proj_")] = torch.cat((value, rest))
        elif ".cross_attention.key_value." not in name:
            theirs[renamed(name, feed_forward_norm)] = value
    return theirs


def renamed(name: str, feed_forward_norm: str) -> str:
    for ours, theirs in (RENAMED | {"feed_forward_residual.norm.": feed_forward_norm}).items():
        name = name.replace(ours, theirs)
    return name


def torch_transformer(ours: Transformer) -> nn.Transformer:
    """torch.nn.Transformer with our weights; loading is strict, so no parameter is left out on either side."""
    config = ours.config
    layer: dict[str, Any] = {
        "d_model": config.d_model,
        "nhead": config.heads,
        "dim_feedforward": config.feed_forward,
        "activation": nn.functional.silu if config.activation == "swish" else config.activation,
        "dropout": 0.0,
        "batch_first": True,
        "norm_first": config.norm == "pre",
    }
    norms = [nn.LayerNorm(config.d_model) if config.final_norm else None for _ in range(2)]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**layer), config.encoder_layers, norms[0], enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), config.decoder_layers, norms[1])
    theirs = nn.Transformer(
        config.d_model, config.heads, custom_encoder=encoder, custom_decoder=decoder, batch_first=True
    )
    encoder.load_state_dict(translated(ours.encoder, "norm2."))  # after the constructor, which draws weights anew
    decoder.load_state_dict(translated(ours.decoder, "norm3."))
    return theirs.eval()


def record(stack: nn.Module, name: str) -> list[Tensor]:
    """A list that fills, layer by layer, with each head's weights, which the layers of torch.nn throw away."""
    rows: list[Tensor] = []

    def ask(_: nn.Module, args: object, options: dict[str, object]) -> tuple[object, object]:
        return args, options | {"need_weights": True, "average_attn_weights": False}

    def keep(_: nn.Module, __: object, result: tuple[Tensor, Tensor]) -> None:
        rows.append(result[1])

    for path, module in stack.named_modules():
        if path.endswith(name):
            module.register_forward_pre_hook(ask, with_kwargs=True)
            module.register_forward_hook(keep)
    return rows


def run_torch(ours: Transformer, batch: Batch) -> Output:
    """torch.nn.Transformer between our embeddings and our projection."""
    theirs = torch_transformer(ours)
    attention = (
        record(theirs.encoder, "self_attn"),
        record(theirs.decoder, "self_attn"),
        record(theirs.decoder, "multihead_attn"),
    )
    output = theirs(
        ours.encoder.embedding(batch.source_ids, counted(batch.source_ids)),
        ours.decoder.embedding(batch.target_ids, counted(batch.target_ids)),
        tgt_mask=torch.ones(batch.target_ids.shape[1], batch.target_ids.shape[1], dtype=torch.bool).triu(1),
        src_key_padding_mask=~batch.source_mask,
        memory_key_padding_mask=~batch.source_mask,
    )
    return Output(ours.decoder.projection(output), *attention)


def counted(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def assert_near(what: str, tolerance: float, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda message: f"{what}: {message}")


def real_queries(weights: Tensor, mask: Tensor) -> Tensor:
    return weights.transpose(1, 2)[mask]  # position head key


@pytest.mark.parametrize("layers", [(1, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "swish"])
@pytest.mark.parametrize("norms", [("pre", True), ("post", True), ("post", False)], ids=str)
def test_same_weights_same_answers_as_torch(norms: tuple[str, bool], activation: str, layers: tuple[int, int]) -> None:
    ours = small_transformer(
        norm=norms[0], final_norm=norms[1], activation=activation, encoder_layers=layers[0], decoder_layers=layers[1]
    )
    batch = small_batch()
    actual, expected = ours(*batch), run_torch(ours, batch)
    assert (len(actual.encoder_attention), len(actual.cross_attention)) == layers
    assert_near("logits", AGAINST_TORCH["logits"], actual.logits, expected.logits)
    for mine, theirs in zip(actual.encoder_attention, expected.encoder_attention, strict=True):
        rows = (real_queries(weights, batch.source_mask) for weights in (mine, theirs))
        assert_near("encoder", AGAINST_TORCH["encoder"], *rows)
    for mine, theirs in zip(actual.decoder_attention, expected.decoder_attention, strict=True):
        assert_near("decoder", AGAINST_TORCH["decoder"], mine, theirs)
    for mine, theirs in zip(actual.cross_attention, expected.cross_attention, strict=True):
        assert_near("cross", AGAINST_TORCH["cross"], mine, theirs)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_pair_alone_equals_the_pair_in_a_padded_batch(row: int, norm: str) -> None:
    model, batch = small_transformer(norm=norm), small_batch((7, 4, 1))
    length = int(batch.source_mask[row].sum())
    one = slice(row, row + 1)
    alone = model(batch.source_ids[one, :length], batch.source_mask[one, :length], batch.target_ids[one])
    together = model(*batch)
    assert_near("logits", AGAINST_COMPANY["logits"], together.logits[one], alone.logits)
    for padded, real in zip(together.encoder_attention, alone.encoder_attention, strict=True):
        assert_near("encoder", AGAINST_COMPANY["encoder"], padded[one, :, :length, :length], real)
    for padded, real in zip(together.decoder_attention, alone.decoder_attention, strict=True):
        assert_near("decoder", AGAINST_COMPANY["decoder"], padded[one], real)
    for padded, real in zip(together.cross_attention, alone.cross_attention, strict=True):
        assert_near("cross", AGAINST_COMPANY["cross"], padded[one, ..., :length], real)


def test_attention_is_exactly_zero_where_nothing_may_be_seen() -> None:
    batch = small_batch()
    output = small_transformer()(*batch)
    padding = ~batch.source_mask
    later = torch.ones(batch.target_ids.shape[1], batch.target_ids.shape[1], dtype=torch.bool).triu(1)
    for weights in output.encoder_attention:
        assert weights.transpose(1, 2)[padding].count_nonzero() == 0
        assert weights.permute(0, 3, 1, 2)[padding].count_nonzero() == 0
    for weights in output.cross_attention:
        assert weights.permute(0, 3, 1, 2)[padding].count_nonzero() == 0
    for weights in output.decoder_attention:
        assert weights[..., later].count_nonzero() == 0


def test_rows_of_all_families_sum_to_1() -> None:
    batch = small_batch()
    output = small_transformer()(*batch)
    for weights in (real_queries(weights, batch.source_mask) for weights in output.encoder_attention):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-6)
    for weights in output.decoder_attention + output.cross_attention:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-6)


def test_what_stands_in_the_padding_changes_nothing() -> None:
    model, batch = small_transformer(), small_batch()
    other = batch._replace(source_ids=batch.source_ids.masked_fill(~batch.source_mask, 5))
    assert not torch.equal(batch.source_ids, other.source_ids)
    first, second = model(*batch), model(*other)
    assert torch.equal(first.logits, second.logits)
    assert all(map(torch.equal, first.encoder_attention, second.encoder_attention))
    assert all(map(torch.equal, first.cross_attention, second.cross_attention))


def test_later_tokens_change_nothing_before_them() -> None:
    model, batch = small_transformer(), small_batch()
    changed = batch.target_ids.clone()
    changed[:, 4:] = changed[:, 4:] % 12 + 1
    first, second = model(*batch), model(*batch._replace(target_ids=changed))
    assert torch.equal(first.logits[:, :4], second.logits[:, :4])
    assert not torch.isclose(first.logits[:, 4:], second.logits[:, 4:]).all(-1).any()
