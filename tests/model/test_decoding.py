"""Decoding from a cache: in steps, at different ages, after forced prefixes and with beams, it is one function."""

from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from model.layers import KeyValue
from model.transformer import Decoded, Encoded, Output, Transformer, target_visible
from tests.model.toy import small_batch, small_transformer

TOLERANCES = {"logits": 1e-5, "decoder": 1e-6, "cross": 1e-6}
"""Largest difference between two ways to the same position. Measured: 1e-6 of logits up to 5, and 4e-7."""

LENGTH = 6
JUNK = 1e4
"""Finite rubbish in the cache's padding, far larger than any key or value."""


class Prepared(NamedTuple):
    """A network, three sources that it has read, targets for them, and the pass over both."""

    model: Transformer
    encoded: Encoded
    source_mask: Tensor
    target_ids: Tensor
    whole: Output


@pytest.fixture(params=["pre", "post"])
def prepared(request: pytest.FixtureRequest) -> Prepared:
    model, batch = small_transformer(norm=request.param), small_batch((7, 4, 1), LENGTH)
    encoded = model.encode(batch.source_ids, batch.source_mask)
    return Prepared(model, encoded, batch.source_mask, batch.target_ids, model(*batch))


def select(caches: list[KeyValue], rows: Tensor) -> list[KeyValue]:
    return [KeyValue(cache.key[rows], cache.value[rows]) for cache in caches]


def step(
    prepared: Prepared, rows: Tensor, ids: Tensor, first: Tensor | int, past: list[KeyValue] | None = None
) -> Decoded:
    """Read `ids`, of which each row's first stands at position `first`, for some of the sentences."""
    positions = torch.as_tensor(first).expand(len(rows))[:, None] + torch.arange(ids.shape[1])
    memory = select(prepared.encoded.memory, rows)
    decoded: Decoded = prepared.model.decoder(ids, positions, memory, prepared.source_mask[rows], past)
    return decoded


def assert_near(what: str, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=TOLERANCES[what], msg=lambda message: f"{what}: {message}"
    )


def assert_same_step(actual: Decoded, expected: Decoded, row: int, queries: slice = slice(None)) -> None:
    """One row of a batch, at some of its queries, is what it is alone; padded keys on its left are exactly zero."""
    one = slice(row, row + 1)
    assert_near("logits", actual.logits[one, queries], expected.logits)
    for mine, alone in zip(actual.decoder_attention, expected.decoder_attention, strict=True):
        padding = mine.shape[-1] - alone.shape[-1]
        assert_near("decoder", mine[one, :, queries, padding:], alone)
        assert mine[one, :, queries, :padding].count_nonzero() == 0
    for mine, alone in zip(actual.cross_attention, expected.cross_attention, strict=True):
        assert_near("cross", mine[one, :, queries], alone)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (3, 1, 2), (1, 5), (6,)], ids=str)
def test_steps_from_a_cache_equal_one_pass(prepared: Prepared, sizes: tuple[int, ...]) -> None:
    rows, whole = torch.arange(3), prepared.whole
    start, past = 0, None
    for size in sizes:
        end = start + size
        decoded = step(prepared, rows, prepared.target_ids[:, start:end], start, past)
        assert_near("logits", decoded.logits, whole.logits[:, start:end])
        for mine, full in zip(decoded.decoder_attention, whole.decoder_attention, strict=True):
            assert_near("decoder", mine, full[:, :, start:end, :end])
        for mine, full in zip(decoded.cross_attention, whole.cross_attention, strict=True):
            assert_near("cross", mine, full[:, :, start:end])
        start, past = end, decoded.state
    assert start == LENGTH
    assert past is not None
    assert [cache.key.shape[2] for cache in past] == [LENGTH] * len(whole.cross_attention)


def alone_at_age(prepared: Prepared, row: int, age: int, new: int) -> Decoded:
    """A row's step of `new` tokens after `age` tokens."""
    rows, ids = torch.tensor([row]), prepared.target_ids[row : row + 1]
    past = step(prepared, rows, ids[:, :age], 0).state if age else None
    return step(prepared, rows, ids[:, age : age + new], age, past)


def right_aligned(states: list[list[KeyValue]], ages: tuple[int, ...]) -> list[KeyValue]:
    """The first positions of each row's state, as old as it is, in one batch with junk before the younger ones."""
    longest = max(ages)

    def batch(tensors: Iterable[Tensor]) -> Tensor:
        padded = (
            pad(x[:, :, :age], (0, 0, longest - age, 0), value=JUNK) for x, age in zip(tensors, ages, strict=True)
        )
        return torch.cat(list(padded))

    layers = zip(*states, strict=True)
    return [KeyValue(batch(row.key for row in layer), batch(row.value for row in layer)) for layer in layers]


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("ages", [(0, 1, 4), (4, 2, 1), (3, 3, 3)], ids=str)
def test_rows_of_different_ages_share_a_batch(prepared: Prepared, ages: tuple[int, ...], new: int) -> None:
    alone = [alone_at_age(prepared, row, age, new) for row, age in enumerate(ages)]
    past = right_aligned([decoded.state for decoded in alone], ages)
    ids = torch.stack([prepared.target_ids[row, age : age + new] for row, age in enumerate(ages)])
    together = step(prepared, torch.arange(3), ids, torch.tensor(ages), past)
    for row, expected in enumerate(alone):
        assert_same_step(together, expected, row)


@pytest.mark.parametrize("lengths", [(1, 3, 4), (4, 4, 2)], ids=str)
def test_forced_prefixes_of_different_lengths_share_a_batch(prepared: Prepared, lengths: tuple[int, ...]) -> None:
    longest, rows = max(lengths), torch.arange(3)
    ids = torch.stack(
        [
            torch.cat((torch.zeros(longest - length, dtype=torch.long), prepared.target_ids[row, :length]))
            for row, length in enumerate(lengths)
        ]
    )
    prefix = step(prepared, rows, ids, torch.tensor(lengths) - longest)
    next_ids = torch.stack([prepared.target_ids[row, length : length + 1] for row, length in enumerate(lengths)])
    following = step(prepared, rows, next_ids, torch.tensor(lengths), prefix.state)
    for row, length in enumerate(lengths):
        alone = step(prepared, rows[row : row + 1], ids[row : row + 1, longest - length :], 0)
        assert_same_step(prefix, alone, row, slice(longest - length, None))
        for weights in prefix.decoder_attention:
            assert weights[row, :, : longest - length].count_nonzero() == 0
        after = step(prepared, rows[row : row + 1], next_ids[row : row + 1], length, alone.state)
        assert_same_step(following, after, row)


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_beams_look_at_one_memory_as_at_copies_of_it(prepared: Prepared, beams: int, new: int) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 13, (3 * beams, 2 + new), generator=generator)
    copies = torch.arange(3).repeat_interleave(beams)
    past_shared, past_copied = None, None
    for part in (slice(0, 2), slice(2, None)):
        positions = torch.arange(2 + new)[None, part].expand(3 * beams, -1)
        shared = prepared.model.decoder(
            ids[:, part], positions, prepared.encoded.memory, prepared.source_mask, past_shared
        )
        copied = step(prepared, copies, ids[:, part], part.start, past_copied)
        past_shared, past_copied = shared.state, copied.state
        assert_near("logits", shared.logits, copied.logits)
        for mine, theirs in zip(shared.cross_attention, copied.cross_attention, strict=True):
            assert_near("cross", mine, theirs)
        for mine, theirs in zip(shared.decoder_attention, copied.decoder_attention, strict=True):
            assert_near("decoder", mine, theirs)


@pytest.mark.parametrize(
    ("positions", "past", "expected"),
    [
        ([[0, 1, 2]], 0, ["x..", "xx.", "xxx"]),
        ([[3]], 3, ["xxxx"]),
        ([[1]], 3, ["..xx"]),
        ([[0]], 3, ["...x"]),
        ([[1, 2]], 2, [".xx.", ".xxx"]),
        ([[-2, -1, 0, 1]], 0, ["....", "....", "..x.", "..xx"]),
    ],
    ids=["start", "oldest", "younger", "newest", "two new", "forced prefix"],
)
def test_what_a_new_position_may_see(positions: list[list[int]], past: int, expected: list[str]) -> None:
    visible = target_visible(torch.tensor(positions), past)
    assert ["".join("x" if seen else "." for seen in row) for row in visible[0, 0].tolist()] == expected
