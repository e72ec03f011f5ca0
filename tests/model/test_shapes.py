"""The shape types are real: beartype refuses a wrong argument and a wrong result, and torch.export can go without."""

from collections.abc import Callable
from types import FunctionType

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from model import attention, dropout, layers, transformer
from model.attention import KeyValue, SelfAttention, attention_weights, hide, merge_heads, split_heads
from model.layers import FeedForward, sinusoids
from tests.model.toy import small_batch, small_config, small_transformer

SEEN = torch.ones(2, 3, 4, dtype=torch.bool)
HIDDEN = torch.zeros(2, 3, 4)

WRONG: dict[str, tuple[str, Callable[[], object]]] = {
    "widths of query and key": ("key", lambda: attention_weights(torch.ones(2, 3, 8), torch.ones(2, 4, 6), HIDDEN)),
    "past keys of another width": ("past_key", lambda: weigh(torch.zeros(2, 3, 5), torch.ones(2, 1, 6))),
    "past keys of another batch": ("past_key", lambda: weigh(torch.zeros(2, 3, 5), torch.ones(3, 1, 8))),
    "queries and mask": ("hidden", lambda: weigh(torch.zeros(2, 2, 4))),
    "mask of booleans": ("hidden", lambda: weigh(SEEN)),
    "mask of numbers": ("visible", lambda: hide(HIDDEN)),
    "two axes to split": ("x", lambda: split_heads(torch.ones(3, 8), 2)),
    "three axes to merge": ("x", lambda: merge_heads(torch.ones(2, 3, 8))),
    "fractional positions": ("positions", lambda: sinusoids(torch.ones(2, 3), 8, "half")),
    "a width that is text": ("d_model", lambda: sinusoids(torch.ones(2, 3, dtype=torch.int), "8", "half")),  # type: ignore[arg-type]
    "mask of another batch": ("source_mask", lambda: run(source_mask=torch.ones(2, 7, dtype=torch.bool))),
    "targets of another batch": ("target_ids", lambda: run(target_ids=torch.ones(2, 6, dtype=torch.long))),
    "targets without a batch": ("target_ids", lambda: run(target_ids=torch.ones(6, dtype=torch.long))),
}
"""What is wrong, the parameter that is to be named, and the call."""


def weigh(hidden: Tensor, past_key: Tensor | None = None) -> Tensor:
    return attention_weights(torch.ones(2, 3, 8), torch.ones(2, 4, 8), hidden, past_key)


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


@pytest.mark.parametrize(
    ("keys", "past", "error"),
    [(5, None, RuntimeError), (3, None, RuntimeError), (4, 1, RuntimeError), (1, None, TypeCheckError)],
)
def test_a_mask_for_other_keys_is_refused(keys: int, past: int | None, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"size of tensor|the return value of model\.attention\.attention_weights"):
        weigh(torch.zeros(2, 3, keys), None if past is None else torch.ones(2, past, 8))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("new_visible", torch.ones(3, 2, 3, dtype=torch.bool)),
        ("new_visible", torch.ones(3, 3, 3)),
        ("past_visible", torch.ones(1, 3, 4, dtype=torch.bool)),
        ("past_visible", torch.ones(3, 2, 4, dtype=torch.bool)),
    ],
)
def test_the_decoders_masks_are_per_sentence_and_query(name: str, wrong: Tensor) -> None:
    model, batch = small_transformer(), small_batch((7, 4, 1), 3)
    masks = {
        "new_visible": torch.ones(3, 3, 3, dtype=torch.bool),
        "past_visible": torch.ones(3, 3, 4, dtype=torch.bool),
        name: wrong,
    }
    memory = model.encode(batch.source_ids, batch.source_mask).memory
    past = [KeyValue(torch.ones(3, 4, 4, 4), torch.ones(3, 4, 4, 4))] * 3
    positions = torch.arange(3).expand(3, 3)
    with pytest.raises(TypeCheckError, match=f"parameter '{name}'"):
        model.decoder(batch.target_ids, positions, memory, batch.source_mask, past=past, **masks)


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
    query, new = self_attention.project(torch.ones(2, 3, 8))
    with pytest.raises(TypeCheckError, match="parameter 'hidden'"):
        self_attention.attend(query, new, torch.zeros(2, 2, 3, 3))


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
