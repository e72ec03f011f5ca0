"""The shape types are real: beartype refuses a wrong argument and a wrong result, and torch.export can go without."""

from collections.abc import Callable
from types import FunctionType

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from model import attention, dropout, layers, transformer
from model.attention import SelfAttention, attention_weights, merge_heads, split_heads
from model.layers import FeedForward, sinusoids
from tests.model.toy import small_batch, small_config, small_transformer

SEEN = torch.ones(2, 3, 4, dtype=torch.bool)

WRONG: dict[str, tuple[str, Callable[[], object]]] = {
    "widths of query and key": ("key", lambda: attention_weights(torch.ones(2, 3, 8), torch.ones(2, 4, 6), SEEN)),
    "keys and mask": ("visible", lambda: attention_weights(torch.ones(2, 3, 8), torch.ones(2, 5, 8), SEEN)),
    "mask of numbers": ("visible", lambda: attention_weights(torch.ones(2, 3, 8), torch.ones(2, 4, 8), SEEN.float())),
    "two axes to split": ("x", lambda: split_heads(torch.ones(3, 8), 2)),
    "three axes to merge": ("x", lambda: merge_heads(torch.ones(2, 3, 8))),
    "fractional positions": ("positions", lambda: sinusoids(torch.ones(2, 3), 8, "half")),
    "a width that is text": ("d_model", lambda: sinusoids(torch.ones(2, 3, dtype=torch.int), "8", "half")),  # type: ignore[arg-type]
    "mask of another batch": ("source_mask", lambda: run(source_mask=torch.ones(2, 7, dtype=torch.bool))),
    "targets of another batch": ("target_ids", lambda: run(target_ids=torch.ones(2, 6, dtype=torch.long))),
    "targets without a batch": ("target_ids", lambda: run(target_ids=torch.ones(6, dtype=torch.long))),
}
"""What is wrong, the parameter that is to be named, and the call."""


def run(**changed: Tensor) -> object:
    return small_transformer()(*small_batch()._replace(**changed))


def functions() -> list[FunctionType]:
    """Every function, and every method of a network, that the modules define."""
    found = []
    for module in (attention, dropout, layers, transformer):
        for thing in vars(module).values():
            if getattr(thing, "__module__", None) == module.__name__:
                network = isinstance(thing, type) and issubclass(thing, nn.Module)
                found += list(vars(thing).values()) if network else [thing]
    return [thing for thing in found if isinstance(thing, FunctionType)]


@pytest.mark.parametrize("function", functions(), ids=lambda function: function.__qualname__)
def test_every_function_is_instrumented(function: FunctionType) -> None:
    assert hasattr(function, "__wrapped__"), f"{function.__module__} was imported before tests/conftest.py"


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_refused_by_name(what: str) -> None:
    parameter, call = WRONG[what]
    with pytest.raises(TypeCheckError, match=f"parameter '{parameter}'"):
        call()


def broken_feed_forward() -> Tensor:
    """One output instead of d_model, which a residual sum would silently broadcast."""
    network = FeedForward(small_config())
    network.outer = nn.Linear(24, 1)
    result: Tensor = network(torch.ones(2, 3, 16))
    return result


def test_a_wrong_result_is_refused() -> None:
    with pytest.raises(TypeCheckError, match=r"the return value of model\.layers\.FeedForward\.forward"):
        broken_feed_forward()


def test_a_decoder_mask_that_is_not_per_query_is_refused() -> None:
    self_attention = SelfAttention(8, 2, 0.0)
    query, key, value = self_attention.project(torch.ones(2, 3, 8))
    with pytest.raises(TypeCheckError, match="parameter 'visible'"):
        self_attention.attend(query, key, value, torch.ones(2, 2, 3, 3, dtype=torch.bool))


@pytest.mark.usefixtures("no_shape_checks")
def test_the_checks_can_be_left_out() -> None:
    assert broken_feed_forward().shape == (2, 3, 1)


@pytest.mark.usefixtures("no_shape_checks")
def test_without_the_checks_the_instrumented_network_exports_with_dynamic_axes() -> None:
    model, traced = small_transformer(encoder_layers=1, decoder_layers=1), small_batch((5, 3), 4)
    axes = tuple({0: torch.export.Dim("batch"), 1: torch.export.Dim(name)} for name in ("source", "source", "target"))
    program = torch.export.export(model, tuple(traced), dynamic_shapes=axes)
    other = small_batch((7, 4, 1), 6)
    torch.testing.assert_close(program.module()(*other).logits, model(*other).logits, rtol=0, atol=1e-6)
