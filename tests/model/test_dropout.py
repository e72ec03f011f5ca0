import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.dropout import Dropout, drop_mask

COUNT = 400_000


def deviations(rate: float, expected: float, count: int) -> float:
    """How many standard deviations of a binomial share lie between a rate and what it should be."""
    return abs(rate - expected) / math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_elements_are_dropped_at_the_rate_and_the_others_scaled(p: float) -> None:
    torch.manual_seed(1)
    dropped = Dropout(p)(torch.full((COUNT,), 3.0))
    assert deviations((dropped == 0).double().mean().item(), p, COUNT) < 4
    assert dropped[dropped != 0].unique().tolist() == pytest.approx([3 / (1 - p)])


@pytest.mark.parametrize("p", [0.99999, 1 - 2**-20])
def test_a_rate_next_to_one_is_as_exact_as_sixteen_bits(p: float) -> None:
    torch.manual_seed(1)
    assert 0 < (~drop_mask(torch.Size([COUNT * 10]), p)).sum() < 200


def shifted(mask: Tensor, by: int) -> tuple[Tensor, Tensor]:
    return mask[:-by], mask[by:]


def of_two_draws(mask: Tensor, _: int) -> tuple[Tensor, Tensor]:
    return mask, drop_mask(mask.shape, 0.3)


@pytest.mark.parametrize(
    ("pair", "by"),
    [(shifted, 1), (shifted, 2), (shifted, 3), (shifted, 4), (shifted, 8), (shifted, 64), (of_two_draws, 0)],
)
def test_neighbours_are_independent(pair: Callable[[Tensor, int], tuple[Tensor, Tensor]], by: int) -> None:
    torch.manual_seed(2)
    one, other = pair(drop_mask(torch.Size([COUNT]), 0.3), by)
    assert deviations((one & other).double().mean().item(), 0.09, COUNT) < 4


@pytest.mark.parametrize("lane", range(4))
def test_each_part_of_a_draw_has_the_rate(lane: int) -> None:
    torch.manual_seed(3)
    mask = drop_mask(torch.Size([COUNT]), 0.1)[lane::4]
    assert deviations(mask.double().mean().item(), 0.1, COUNT // 4) < 4


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 3, 5), (7, 1)], ids=str)
def test_any_shape_is_kept(shape: tuple[int, ...]) -> None:
    assert Dropout(0.5)(torch.ones(shape)).shape == shape
    assert drop_mask(torch.Size(shape), 0.5).dtype == torch.bool


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_nothing_happens_without_training_or_rate(p: float, training: bool) -> None:
    x = torch.randn(5, 7)
    before = torch.get_rng_state()
    assert Dropout(p).train(training)(x) is x
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gradient_goes_where_the_values_went() -> None:
    torch.manual_seed(4)
    x = torch.randn(100, requires_grad=True)
    y = Dropout(0.25)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 1 / 0.75))
    assert 0 < (y == 0).sum() < 100


def test_a_seed_repeats_and_another_does_not() -> None:
    x = torch.ones(1000)
    masks = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        masks.append(Dropout(0.5)(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[2], Dropout(0.5)(x))


def test_what_is_dropped_is_exactly_zero_even_beside_the_infinite() -> None:
    torch.manual_seed(7)
    dropped = Dropout(0.5)(torch.full((100,), math.inf))
    assert set(dropped.tolist()) == {0.0, math.inf}


def test_printing_tells_the_rate() -> None:
    assert repr(Dropout(0.25)) == "Dropout(p=0.25)"
