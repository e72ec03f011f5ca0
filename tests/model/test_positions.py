"""Sinusoidal positions against the formula of section 3.5, and the embedding that adds them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.layers import Embedding, sinusoids
from tests.model.toy import small_config

Formula = Callable[[int, int], list[float]]

WIDTHS = [2, 16, 130]
VOCABULARY = 7

TOLERANCES = {range(64): 8e-6, range(1990, 2054): 3e-4, range(5000, 5064): 1e-3}
"""Largest difference from double precision. It grows with the position, by the rounding of the float32 angle."""


def angle(position: int, pair: int, d_model: int) -> float:
    return float(position / 10_000 ** (2 * pair / d_model))


def interleaved(position: int, d_model: int) -> list[float]:
    """The paper's own: PE(pos, 2i) = sin, PE(pos, 2i+1) = cos."""
    encoding = []
    for pair in range(d_model // 2):
        encoding += [math.sin(angle(position, pair, d_model)), math.cos(angle(position, pair, d_model))]
    return encoding


def half(position: int, d_model: int) -> list[float]:
    sines = [math.sin(angle(position, pair, d_model)) for pair in range(d_model // 2)]
    return sines + [math.cos(angle(position, pair, d_model)) for pair in range(d_model // 2)]


def embedding(training: bool = False, **choices: object) -> Embedding:
    torch.manual_seed(4)
    return Embedding(VOCABULARY, small_config(**choices)).train(training)


def ids_and_positions() -> tuple[Tensor, Tensor]:
    return torch.tensor([[0, 6, 3], [5, 5, 1]]), torch.tensor([[0, 1, 2], [7, 8, 9]])


@pytest.mark.parametrize("positions", TOLERANCES, ids=str)
@pytest.mark.parametrize("d_model", WIDTHS)
@pytest.mark.parametrize("formula", [interleaved, half])
def test_sinusoids_follow_the_paper(formula: Formula, d_model: int, positions: range) -> None:
    actual = sinusoids(torch.tensor([list(positions)]), d_model, formula.__name__)
    expected = torch.tensor([[formula(position, d_model) for position in positions]])
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCES[positions])


@pytest.mark.parametrize("d_model", WIDTHS)
def test_the_layouts_differ_by_a_permutation_of_dimensions(d_model: int) -> None:
    positions = torch.tensor([[0, 1, 77, 5000]])
    order = [side * (d_model // 2) + pair for pair in range(d_model // 2) for side in (0, 1)]
    assert sorted(order) == list(range(d_model))
    halves, turns = (sinusoids(positions, d_model, layout) for layout in ("half", "interleaved"))
    assert torch.equal(turns, halves[..., order])
    assert torch.equal(turns, halves) == (d_model == 2)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_each_row_has_its_own_positions(layout: str) -> None:
    together = sinusoids(torch.tensor([[0, 1], [40, 3]]), 16, layout)
    apart = sinusoids(torch.tensor([[0, 1, 40, 3]]), 16, layout)
    assert torch.equal(together.flatten(0, 1), apart[0])
    assert not torch.isclose(together[0], together[1]).all(-1).any()


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_no_two_positions_of_the_longest_default_are_encoded_alike(layout: str) -> None:
    encoded = sinusoids(torch.arange(2048)[None], 16, layout)[0]
    distances = torch.cdist(encoded, encoded, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.fill_diagonal_(math.inf).min() > 0.1


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_negative_positions_of_padding_are_harmless(layout: str) -> None:
    encoded = sinusoids(torch.tensor([[-9, -1]]), 16, layout)
    assert encoded.isfinite().all()
    assert encoded.abs().max() <= 1


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("scaled", "factor"), [(True, 4.0), (False, 1.0)])
def test_an_embedding_is_the_scaled_token_and_its_position(scaled: bool, factor: float, layout: str) -> None:
    embed = embedding(embedding_scale=scaled, positions=layout, dropout=0.5)
    ids, positions = ids_and_positions()
    expected = embed.tokens.weight[ids] * factor + sinusoids(positions, 16, layout)
    torch.testing.assert_close(embed(ids, positions), expected, rtol=0, atol=0)


def test_dropout_falls_on_the_sum_in_training_alone() -> None:
    ids, positions = ids_and_positions()
    certain = embedding(dropout=0.5)(ids, positions)
    dropped = embedding(training=True, dropout=0.5)(ids, positions)
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped[kept], 2 * certain[kept], rtol=0, atol=0)
