"""Attention against the formula of the paper, in plain floats and loops."""

import math

import pytest
import torch
from torch import Tensor, nn

from model.attention import (
    Attention,
    CrossAttention,
    SelfAttention,
    attention_weights,
    hide,
    merge_heads,
    split_heads,
)

Vector = list[float]
Matrix = list[Vector]
Mask = list[list[bool]]

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 4, 5, 6
D_MODEL = HEADS * WIDTH

AGAINST_LOOPS = {
    ("weights", torch.float32): 1e-6,
    ("weights", torch.float64): 2e-15,
    ("output", torch.float32): 4e-6,
    ("output", torch.float64): 8e-15,
}
"""Largest difference from the loops, which compute in double precision, where outputs are about as large as 4."""

SUM_OF_ROW = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest distance of a row's sum from 1, a few units in the last place."""


def dot(x: Vector, y: Vector) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def affine(x: Matrix, weight: Matrix, bias: Vector) -> Matrix:
    return [[dot(vector, row) + b for row, b in zip(weight, bias, strict=True)] for vector in x]


def softmax(scores: Vector, visible: list[bool]) -> Vector:
    powers = [math.exp(score) if seen else 0.0 for score, seen in zip(scores, visible, strict=True)]
    total = math.fsum(powers)
    return [power / total if total else 1 / len(scores) for power in powers]


def weights_by_loops(query: Matrix, key: Matrix, visible: Mask) -> Matrix:
    scores = [[dot(q, k) / math.sqrt(len(q)) for k in key] for q in query]
    return [softmax(row, seen) for row, seen in zip(scores, visible, strict=True)]


def weighted_sum(weights: Matrix, value: Matrix) -> Matrix:
    return [[dot(row, list(column)) for column in zip(*value, strict=True)] for row in weights]


def head_of(x: Matrix, head: int) -> Matrix:
    return [vector[head * WIDTH : (head + 1) * WIDTH] for vector in x]


def attend_by_loops(
    query: Matrix, key: Matrix, value: Matrix, visible: Mask, output: nn.Linear
) -> tuple[Matrix, list[Matrix]]:
    """One sentence: the projected output, and the weights of each head."""
    weights = [weights_by_loops(head_of(query, head), head_of(key, head), visible) for head in range(HEADS)]
    heads = [weighted_sum(weights[head], head_of(value, head)) for head in range(HEADS)]
    merged = [[x for head in heads for x in head[position]] for position in range(len(query))]
    return affine(merged, *plain(output)), weights


def plain(layer: nn.Linear) -> tuple[Matrix, Vector]:
    return layer.weight.tolist(), layer.bias.tolist()


def part(layer: nn.Linear, index: int) -> tuple[Matrix, Vector]:
    """The maps of a fused product, one below the other."""
    weight, bias = plain(layer)
    rows = slice(index * D_MODEL, (index + 1) * D_MODEL)
    return weight[rows], bias[rows]


def hide_some(queries: int, keys: int) -> Tensor:
    """A random mask whose first query sees everything and whose last sees nothing."""
    visible = torch.rand(BATCH, 1, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, :, 0] = True
    visible[:, :, -1] = False
    return visible


def masks(queries: int, keys: int) -> dict[str, Tensor]:
    return {
        "all": torch.ones(BATCH, 1, queries, keys, dtype=torch.bool),
        "causal": torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(),
        "padding": (torch.arange(keys) < torch.tensor([[keys], [2]]))[:, None, None],
        "one": torch.eye(queries, keys, dtype=torch.bool)[None, None],
        "some": hide_some(queries, keys),
    }


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape) + shape[-2]))


def assert_near(actual: Tensor, expected: list[Matrix] | list[list[Matrix]], what: str) -> None:
    torch.testing.assert_close(
        actual.double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=AGAINST_LOOPS[what, actual.dtype],
        msg=lambda message: f"{what}: {message}",
    )


def filled(attention: Attention, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    for parameter in attention.to(dtype).parameters():
        nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("mask", masks(QUERIES, KEYS))
def test_weights_follow_equation_1(mask: str, dtype: torch.dtype) -> None:
    query, key = randn(BATCH, HEADS, QUERIES, WIDTH, dtype=dtype), randn(BATCH, HEADS, KEYS, WIDTH, dtype=dtype)
    visible = masks(QUERIES, KEYS)[mask]
    seen = visible.expand(BATCH, 1, QUERIES, KEYS)[:, 0].tolist()
    expected = [
        [weights_by_loops(query[row, head].tolist(), key[row, head].tolist(), seen[row]) for head in range(HEADS)]
        for row in range(BATCH)
    ]
    assert_near(attention_weights(query, key, hide(visible, dtype)), expected, "weights")


@pytest.mark.parametrize("mask", masks(QUERIES, QUERIES))
def test_self_attention_is_what_the_loops_compute(mask: str, dtype: torch.dtype) -> None:
    attention = SelfAttention(D_MODEL, HEADS, dropout=0.0)
    filled(attention, dtype)
    x, visible = randn(BATCH, QUERIES, D_MODEL, dtype=dtype), masks(QUERIES, QUERIES)[mask]
    seen = visible.expand(BATCH, 1, QUERIES, QUERIES)[:, 0].tolist()
    output, weights = attention.attend(*attention.project(x), hide(visible, dtype))
    expected = []
    for row in range(BATCH):
        query, key, value = (affine(x[row].tolist(), *part(attention.query_key_value, index)) for index in range(3))
        expected.append(attend_by_loops(query, key, value, seen[row], attention.output))
    assert_near(output, [row[0] for row in expected], "output")
    assert_near(weights, [row[1] for row in expected], "weights")


@pytest.mark.parametrize("mask", masks(QUERIES, KEYS))
def test_cross_attention_is_what_the_loops_compute(mask: str, dtype: torch.dtype) -> None:
    attention = CrossAttention(D_MODEL, HEADS, dropout=0.0)
    filled(attention, dtype)
    x, encoded = randn(BATCH, QUERIES, D_MODEL, dtype=dtype), randn(BATCH, KEYS, D_MODEL, dtype=dtype)
    visible = masks(QUERIES, KEYS)[mask]
    seen = visible.expand(BATCH, 1, QUERIES, KEYS)[:, 0].tolist()
    output, weights = attention.attend(
        attention.project_query(x), attention.project_memory(encoded), hide(visible, dtype)
    )
    expected = []
    for row in range(BATCH):
        query = affine(x[row].tolist(), *plain(attention.query))
        key, value = (affine(encoded[row].tolist(), *part(attention.key_value, index)) for index in range(2))
        expected.append(attend_by_loops(query, key, value, seen[row], attention.output))
    assert_near(output, [row[0] for row in expected], "output")
    assert_near(weights, [row[1] for row in expected], "weights")


@pytest.mark.parametrize("past", [1, 3])
@pytest.mark.parametrize("mask", masks(QUERIES, KEYS))
def test_keys_of_the_past_are_looked_at_like_the_others(mask: str, past: int, dtype: torch.dtype) -> None:
    query, key = randn(BATCH, HEADS, QUERIES, WIDTH, dtype=dtype), randn(BATCH, HEADS, KEYS, WIDTH, dtype=dtype)
    hidden = hide(masks(QUERIES, KEYS)[mask], dtype)
    apart = attention_weights(query, key[..., past:, :], hidden, key[..., :past, :])
    together = attention_weights(query, key, hidden)
    torch.testing.assert_close(apart, together, rtol=0, atol=AGAINST_LOOPS["weights", dtype])


@pytest.mark.parametrize("mask", masks(QUERIES, KEYS))
def test_self_attention_after_a_past_is_what_the_loops_compute(mask: str, dtype: torch.dtype) -> None:
    attention = SelfAttention(D_MODEL, HEADS, dropout=0.0)
    filled(attention, dtype)
    x, visible = randn(BATCH, KEYS, D_MODEL, dtype=dtype), masks(QUERIES, KEYS)[mask]
    seen = visible.expand(BATCH, 1, QUERIES, KEYS)[:, 0].tolist()
    (_, past), (query, new) = attention.project(x[:, : KEYS - QUERIES]), attention.project(x[:, KEYS - QUERIES :])
    output, weights = attention.attend(query, new, hide(visible, dtype), past)
    expected = []
    for row in range(BATCH):
        asked, key, value = (affine(x[row].tolist(), *part(attention.query_key_value, index)) for index in range(3))
        expected.append(attend_by_loops(asked[KEYS - QUERIES :], key, value, seen[row], attention.output))
    assert_near(output, [row[0] for row in expected], "output")
    assert_near(weights, [row[1] for row in expected], "weights")


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["moderate", "large scores"])
@pytest.mark.parametrize("precision", SUM_OF_ROW, ids=str)
def test_rows_sum_to_1_over_what_is_visible_and_are_0_elsewhere(precision: torch.dtype, scale: float) -> None:
    query, key = randn(BATCH, HEADS, QUERIES, WIDTH, dtype=precision), randn(BATCH, HEADS, KEYS, WIDTH, dtype=precision)
    visible = hide_some(QUERIES, KEYS)
    weights = attention_weights(query * scale, key, hide(visible, precision))[..., :-1, :]
    visible = visible[..., :-1, :]
    sums = weights.double().sum(-1)
    torch.testing.assert_close(sums, visible.any(-1).double().expand(sums.shape), rtol=0, atol=SUM_OF_ROW[precision])
    hidden = ~visible.expand(weights.shape)
    assert hidden.any()
    assert weights[hidden].count_nonzero() == 0


@pytest.mark.parametrize("precision", SUM_OF_ROW, ids=str)
def test_a_query_that_sees_nothing_gets_numbers_and_harmless_gradients(precision: torch.dtype) -> None:
    query = randn(BATCH, HEADS, QUERIES, WIDTH, dtype=precision).requires_grad_()
    weights = attention_weights(query, query, hide(hide_some(QUERIES, QUERIES), precision))
    assert weights.isfinite().all()
    if precision in {torch.float32, torch.float64}:
        assert torch.equal(weights[..., -1, :], torch.full_like(weights[..., -1, :], 1 / QUERIES))
    (gradient,) = torch.autograd.grad(weights.square().sum(), query)
    assert gradient.isfinite().all()
    assert gradient[..., 0, :].count_nonzero() > 0


@pytest.mark.parametrize("junk", [1e6, -1e6])
def test_hidden_keys_leave_no_trace(junk: float) -> None:
    query, key = (randn(BATCH, HEADS, n, WIDTH, dtype=torch.float32) for n in (QUERIES, KEYS))
    visible = masks(QUERIES, KEYS)["padding"]
    hidden, spoiled = hide(visible), torch.where(visible[..., 0, :, None], key, torch.full_like(key, junk))
    assert not torch.equal(spoiled, key)
    assert torch.equal(attention_weights(query, spoiled, hidden), attention_weights(query, key, hidden))
    apart = attention_weights(query, spoiled[..., 3:, :], hidden, spoiled[..., :3, :])
    assert torch.equal(apart, attention_weights(query, key[..., 3:, :], hidden, key[..., :3, :]))


def test_heads_are_consecutive_slices_of_the_width() -> None:
    x = randn(BATCH, QUERIES, D_MODEL, dtype=torch.float32)
    apart = split_heads(x, HEADS)
    for head in range(HEADS):
        assert torch.equal(apart[:, head], x[..., head * WIDTH : (head + 1) * WIDTH])
    assert torch.equal(merge_heads(apart), x)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_touches_the_output_in_training_and_never_the_returned_weights(training: bool) -> None:
    attention = SelfAttention(D_MODEL, HEADS, dropout=0.5)
    certain = SelfAttention(D_MODEL, HEADS, dropout=0.0)
    certain.load_state_dict(attention.state_dict())
    attention.train(training)
    x, visible = randn(BATCH, QUERIES, D_MODEL, dtype=torch.float32), masks(QUERIES, QUERIES)["causal"]
    output, weights = attention.attend(*attention.project(x), hide(visible))
    expected_output, expected_weights = certain.attend(*certain.project(x), hide(visible))
    assert torch.equal(weights, expected_weights)
    assert torch.equal(output, expected_output) != training
