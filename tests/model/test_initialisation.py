"""What a new network starts from: bounds of its weights, tied tables, and dropout that only training sees."""

import math

import pytest
import torch
from torch import Tensor, nn

from model.layers import FeedForward, Residual
from model.transformer import Transformer
from tests.model.toy import SOURCE_VOCABULARY, TARGET_VOCABULARY, small_batch, small_config, small_transformer

D_MODEL, FEED_FORWARD, VOCABULARY = 64, 160, 200

MAPS = {
    "self_attention.query_key_value": 3,
    "cross_attention.query": 1,
    "cross_attention.key_value": 2,
    "self_attention.output": 1,
    "cross_attention.output": 1,
    "feed_forward.inner": 1,
    "feed_forward.outer": 1,
    "projection": 1,
}
"""Every linear map, and how many maps it fuses into one product."""

SPREAD = 0.03
"""Largest relative distance of a standard deviation from its expectation; over three standard errors."""

SUM_OF_ROW = 1e-6


@pytest.fixture
def fresh() -> Transformer:
    torch.manual_seed(5)
    config = small_config(d_model=D_MODEL, feed_forward=FEED_FORWARD, tied_embeddings="none")
    return Transformer(config, VOCABULARY, VOCABULARY)


def linear_maps(model: Transformer, ending: str = "") -> list[nn.Linear]:
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [module for name, module in found if name.endswith(ending)]


def tables(model: Transformer) -> dict[str, Tensor]:
    return {
        "source": model.encoder.embedding.tokens.weight,
        "target": model.decoder.embedding.tokens.weight,
        "projection": model.decoder.projection.weight,
    }


def test_the_table_of_maps_is_complete(fresh: Transformer) -> None:
    listed = [id(layer) for ending in MAPS for layer in linear_maps(fresh, ending)]
    assert sorted(listed) == sorted(id(layer) for layer in linear_maps(fresh))


@pytest.mark.parametrize(("ending", "fused"), MAPS.items(), ids=MAPS)
def test_each_map_fills_its_xavier_bound(fresh: Transformer, ending: str, fused: int) -> None:
    for layer in linear_maps(fresh, ending):
        for part in layer.weight.chunk(fused):
            bound = math.sqrt(6 / sum(part.shape))
            assert 0.98 * bound < part.abs().max() <= bound
            assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=SPREAD)


@pytest.mark.parametrize("side", ["source", "target"])
def test_embeddings_have_variance_1_over_d_model(fresh: Transformer, side: str) -> None:
    table = tables(fresh)[side]
    assert table.std().item() == pytest.approx(D_MODEL**-0.5, rel=SPREAD)
    assert table.abs().max() > 3 * D_MODEL**-0.5


def test_biases_start_at_zero_and_norms_at_the_identity(fresh: Transformer) -> None:
    norms = [module for module in fresh.modules() if isinstance(module, nn.LayerNorm)]
    biases = [parameter for name, parameter in fresh.named_parameters() if name.endswith("bias")]
    assert len(norms) == 2 * 2 + 3 * 3 + 2
    assert len(biases) == len(norms) + len(linear_maps(fresh)) - 1
    assert all(norm.weight.eq(1).all() for norm in norms)
    assert all(bias.eq(0).all() for bias in biases)


@pytest.mark.parametrize(
    ("tied", "groups"),
    [
        ("none", [{"source"}, {"target"}, {"projection"}]),
        ("decoder", [{"source"}, {"target", "projection"}]),
        ("all", [{"source", "target", "projection"}]),
    ],
)
def test_tied_tables_are_one_storage(tied: str, groups: list[set[str]]) -> None:
    model = Transformer(small_config(tied_embeddings=tied), VOCABULARY, VOCABULARY)
    storages: dict[int, set[str]] = {}
    for name, table in tables(model).items():
        storages.setdefault(table.data_ptr(), set()).add(name)
    assert sorted(storages.values(), key=sorted) == sorted(groups, key=sorted)
    owned = [parameter.shape for parameter in model.parameters() if VOCABULARY in parameter.shape]
    assert len(owned) == len(groups)


@pytest.mark.parametrize("tied", ["decoder", "all"])
def test_a_tied_table_starts_as_an_embedding(tied: str) -> None:
    torch.manual_seed(6)
    model = Transformer(small_config(d_model=D_MODEL, tied_embeddings=tied), VOCABULARY, VOCABULARY)
    for table in tables(model).values():
        assert table.std().item() == pytest.approx(D_MODEL**-0.5, rel=SPREAD)
        assert table.abs().max() > 3 * D_MODEL**-0.5


def test_one_table_for_two_vocabularies_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^one table cannot hold vocabularies of 11 and 13$"):
        Transformer(small_config(tied_embeddings="all"), 11, 13)


@pytest.mark.parametrize("tied", ["none", "decoder"])
def test_two_tables_hold_two_vocabularies(tied: str) -> None:
    sizes = {name: len(table) for name, table in tables(small_transformer(tied_embeddings=tied)).items()}
    assert sizes == {"source": SOURCE_VOCABULARY, "target": TARGET_VOCABULARY, "projection": TARGET_VOCABULARY}


@pytest.mark.parametrize("choices", [{"dropout": 0.3}, {"attention_dropout": 0.3}], ids=str)
def test_dropout_is_drawn_in_training_alone(choices: dict[str, float]) -> None:
    model, batch = small_transformer(**choices), small_batch()
    certain = small_transformer()(*batch).logits
    assert torch.equal(model(*batch).logits, certain)
    first, second = (model.train()(*batch).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, certain)


def test_dropout_falls_on_what_a_sub_layer_adds() -> None:
    torch.manual_seed(7)
    residual = Residual(small_config(dropout=0.5))
    x, y = torch.full((2, 3, 16), 10.0), torch.ones(2, 3, 16)
    assert set(residual.train().leave(x, y).flatten().tolist()) == {10.0, 12.0}
    assert set(residual.eval().leave(x, y).flatten().tolist()) == {11.0}


def test_dropout_falls_between_the_maps_of_the_feed_forward_network() -> None:
    torch.manual_seed(8)
    network = FeedForward(small_config(dropout=0.5, feed_forward=16))
    for layer, weight, bias in ((network.inner, torch.zeros(16, 16), 1.0), (network.outer, torch.eye(16), 0.0)):
        layer.load_state_dict({"weight": weight, "bias": torch.full((16,), bias)})
    x = torch.zeros(2, 3, 16)
    assert set(network.train()(x).flatten().tolist()) == {0.0, 2.0}
    assert set(network.eval()(x).flatten().tolist()) == {1.0}


@pytest.mark.parametrize("family", ["encoder_attention", "decoder_attention", "cross_attention"])
def test_returned_attention_is_without_dropout(family: str) -> None:
    model, batch = small_transformer(attention_dropout=0.9, decoder_layers=1), small_batch()
    certain, drawn = model(*batch), model.train()(*batch)
    assert not torch.equal(drawn.logits, certain.logits)
    for rows, like in zip(getattr(drawn, family), getattr(certain, family), strict=True):
        torch.testing.assert_close(rows.sum(-1), like.sum(-1), rtol=0, atol=SUM_OF_ROW)
    if family != "cross_attention":  # its queries have passed a layer that drops
        assert torch.equal(getattr(drawn, family)[0], getattr(certain, family)[0])


@pytest.mark.parametrize("embedding_scale", [True, False])
def test_the_scale_of_embeddings_reaches_both_sides(embedding_scale: bool) -> None:
    model = small_transformer(embedding_scale=embedding_scale)
    expected = 4.0 if embedding_scale else 1.0
    assert (model.encoder.embedding.scale, model.decoder.embedding.scale) == (expected, expected)


def test_every_parameter_has_a_gradient() -> None:
    model, batch = small_transformer(tied_embeddings="none"), small_batch()
    model(*batch).logits.square().sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
