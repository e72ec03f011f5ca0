"""Decoding from a cache: in steps, at different ages, after forced prefixes and with beams, it is one function."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from model import steps
from model.attention import KeyValue
from model.transformer import Decoded, Encoded, Output, Transformer, causal
from tests.model.toy import small_batch, small_transformer

TOLERANCES = {"logits": 1e-5, "decoder": 1e-6, "cross": 1e-6}
"""Largest difference between two ways to the same position. Measured: 1e-6 of logits up to 5, and 4e-7."""

LENGTH = 6
JUNK = 1e4
"""Finite rubbish in columns that a row does not see, far larger than any key or value."""


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
    prepared: Prepared,
    rows: Tensor,
    ids: Tensor,
    first: Tensor | int,
    past: list[KeyValue] | None = None,
    past_visible: Tensor | None = None,
) -> Decoded:
    """Read `ids`, of which each row's first stands at position `first`, for some of the sentences."""
    positions = torch.as_tensor(first).expand(len(rows))[:, None] + torch.arange(ids.shape[1])
    if past is not None and past_visible is None:
        past_visible = torch.ones(len(rows), past[0].key.shape[2], dtype=torch.bool)
    decoded: Decoded = prepared.model.decoder(
        ids,
        positions,
        select(prepared.encoded.memory, rows),
        prepared.source_mask[rows],
        causal(ids.shape[1]).expand(len(rows), -1, -1),
        past,
        None if past_visible is None else past_visible[:, None].expand(-1, ids.shape[1], -1),
    )
    return decoded


def assert_near(what: str, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=TOLERANCES[what], msg=lambda message: f"{what}: {message}"
    )


def assert_same_step(actual: Decoded, expected: Decoded, row: int, queries: Tensor, columns: Tensor) -> None:
    """One row of a batch, at some of its queries, is what it is alone; what it does not see is exactly zero."""
    assert_near("logits", actual.logits[row, queries], expected.logits[0])
    for mine, alone in zip(actual.decoder_attention, expected.decoder_attention, strict=True):
        weights = mine[row, :, queries]
        assert_near("decoder", weights[..., columns], alone[0])
        others = torch.ones(weights.shape[-1], dtype=torch.bool)
        others[columns] = False
        assert weights[..., others].count_nonzero() == 0
    for mine, alone in zip(actual.cross_attention, expected.cross_attention, strict=True):
        assert_near("cross", mine[row, :, queries], alone[0])


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
        assert [new.key.shape[2] for new in decoded.state] == [size] * len(whole.cross_attention)
        start, past = end, lengthened(decoded.state, past)
    assert start == LENGTH


def alone_at_age(prepared: Prepared, row: int, age: int, new: int) -> Decoded:
    """A row's step of `new` tokens after `age` tokens."""
    rows, ids = torch.tensor([row]), prepared.target_ids[row : row + 1]
    past = step(prepared, rows, ids[:, :age], 0).state if age else None
    return step(prepared, rows, ids[:, age : age + new], age, past)


def scattered(states: list[list[KeyValue]], places: list[Tensor], size: int) -> list[KeyValue]:
    """The first positions of each row's state, each in a column of its own, in one batch with junk in the others."""

    def batch(tensors: list[Tensor]) -> Tensor:
        heads, _, width = tensors[0].shape[1:]
        wide = torch.full((len(tensors), heads, size, width), JUNK)
        for row, (tensor, columns) in enumerate(zip(tensors, places, strict=True)):
            wide[row, :, columns] = tensor[0, :, : len(columns)]
        return wide

    layers = zip(*states, strict=True)
    return [KeyValue(batch([row.key for row in layer]), batch([row.value for row in layer])) for layer in layers]


def visible_at(places: list[Tensor], size: int) -> Tensor:
    visible = torch.zeros(len(places), size, dtype=torch.bool)
    for row, columns in enumerate(places):
        visible[row, columns] = True
    return visible


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("size", [4, 7])
@pytest.mark.parametrize("ages", [(0, 1, 4), (4, 2, 1), (3, 3, 3)], ids=str)
def test_rows_of_different_ages_share_a_batch(prepared: Prepared, ages: tuple[int, ...], size: int, new: int) -> None:
    generator = torch.Generator().manual_seed(6)
    alone = [alone_at_age(prepared, row, age, new) for row, age in enumerate(ages)]
    places = [torch.randperm(size, generator=generator)[:age] for age in ages]
    befores = [step(prepared, torch.tensor([row]), prepared.target_ids[row : row + 1, :4], 0) for row in range(3)]
    past = scattered([before.state for before in befores], places, size)
    ids = torch.stack([prepared.target_ids[row, age : age + new] for row, age in enumerate(ages)])
    together = step(prepared, torch.arange(3), ids, torch.tensor(ages), past, visible_at(places, size))
    for row, expected in enumerate(alone):
        columns = torch.cat((places[row], size + torch.arange(new)))
        assert_same_step(together, expected, row, torch.arange(new), columns)


def arranged(order: str, length: int, room: int) -> Tensor:
    """Columns in which the tokens of a prefix lie, where there is room for longer ones."""
    if order == "shuffled":
        return torch.randperm(room, generator=torch.Generator().manual_seed(length))[:length]
    return torch.arange(length) + (room - length if order == "left" else 0)


@pytest.mark.parametrize("padded", ["left", "right", "shuffled"])
@pytest.mark.parametrize("lengths", [(1, 3, 4), (4, 4, 2)], ids=str)
def test_forced_prefixes_of_different_lengths_share_a_batch(
    prepared: Prepared, lengths: tuple[int, ...], padded: str
) -> None:
    longest, rows = max(lengths), torch.arange(3)
    places = [arranged(padded, length, longest) for length in lengths]
    ids, positions = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    new_visible = torch.eye(longest, dtype=torch.bool)[None].repeat(3, 1, 1)
    for row, columns in enumerate(places):
        ids[row, columns] = prepared.target_ids[row, : len(columns)]
        positions[row, columns] = torch.arange(len(columns))
        new_visible[row, columns[:, None], columns] = causal(len(columns))[0]
    prefix = prepared.model.decoder(ids, positions, prepared.encoded.memory, prepared.source_mask, new_visible)
    next_ids = torch.stack([prepared.target_ids[row, length : length + 1] for row, length in enumerate(lengths)])
    following = step(prepared, rows, next_ids, torch.tensor(lengths), prefix.state, visible_at(places, longest))
    for row, (length, columns) in enumerate(zip(lengths, places, strict=True)):
        one = rows[row : row + 1]
        alone = step(prepared, one, prepared.target_ids[one, :length], 0)
        assert_same_step(prefix, alone, row, columns, columns)
        after = step(prepared, one, next_ids[one], length, alone.state)
        assert_same_step(following, after, row, torch.tensor([0]), torch.cat((columns, torch.tensor([longest]))))


def by_beam(tensor: Tensor, beams: int) -> Tensor:
    """Queries of all beams of a sentence, as rows: batch * beam, ..., new."""
    return torch.unflatten(tensor, -1, (beams, -1)).movedim(-2, 1).flatten(0, 1)


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_beams_are_queries_of_one_sentence_as_they_are_rows_of_copies(prepared: Prepared, beams: int, new: int) -> None:
    generator = torch.Generator().manual_seed(3)
    copies, among = (
        torch.arange(3).repeat_interleave(beams),
        torch.kron(torch.eye(beams), causal(new)[0].float()).bool(),
    )
    visible = torch.zeros(3, beams, 0, dtype=torch.bool)
    shared: Decoded | None = None
    copied: Decoded | None = None
    kept: list[KeyValue] | None = None
    for first in range(0, 4 * new, new):
        parents = torch.randint(beams, (3, beams), generator=generator)
        ids = torch.randint(1, 13, (3, beams * new), generator=generator)
        visible = visible.gather(1, parents[..., None].expand_as(visible))
        shared = prepared.model.decoder(
            ids,
            (first + torch.arange(new)).repeat(3, beams),
            prepared.encoded.memory,
            prepared.source_mask,
            among.expand(3, -1, -1),
            kept,
            visible.repeat_interleave(new, 1) if kept else None,
        )
        followed = (torch.arange(3)[:, None] * beams + parents).flatten()
        own = None if copied is None else select(lengthened(copied.state, None), followed)
        copied = step(prepared, copies, by_beam(ids, beams), first, own)
        copied = copied._replace(state=lengthened(copied.state, own))
        assert_beams_alike(shared, copied, beams, visible)
        kept = lengthened(shared.state, kept)
        fresh = torch.eye(beams, dtype=torch.bool).repeat_interleave(new, 1)
        visible = torch.cat((visible, fresh.expand(3, -1, -1)), -1)


def lengthened(state: list[KeyValue], past: list[KeyValue] | None) -> list[KeyValue]:
    if past is None:
        return state
    return [
        KeyValue(torch.cat((old.key, new.key), 2), torch.cat((old.value, new.value), 2))
        for old, new in zip(past, state, strict=True)
    ]


def assert_beams_alike(shared: Decoded, copied: Decoded, beams: int, visible: Tensor) -> None:
    """Queries are what the rows are; what a query sees in the past lies in the columns that it sees, in order."""
    assert_near("logits", torch.unflatten(shared.logits, 1, (beams, -1)).flatten(0, 1), copied.logits)
    for mine, theirs in zip(shared.cross_attention, copied.cross_attention, strict=True):
        assert_near("cross", by_beam(mine.movedim(2, -1), beams).movedim(-1, 2), theirs)
    past = visible.shape[-1]
    for mine, theirs in zip(shared.decoder_attention, copied.decoder_attention, strict=True):
        rows = by_beam(mine.movedim(2, -1), beams).movedim(-1, 2)
        new = rows.shape[2]
        for row, seen in enumerate(visible.flatten(0, 1)):
            beam = row % beams
            columns = torch.cat((seen.nonzero()[:, 0], past + beam * new + torch.arange(new)))
            assert_near("decoder", rows[row][..., columns], theirs[row])
            others = torch.ones(rows.shape[-1], dtype=torch.bool)
            others[columns] = False
            assert rows[row][..., others].count_nonzero() == 0


@pytest.mark.parametrize(
    ("count", "expected"), [(1, ["x"]), (3, ["x..", "xx.", "xxx"]), (4, ["x...", "xx..", "xxx.", "xxxx"])]
)
def test_a_position_sees_itself_and_those_before_it(count: int, expected: list[str]) -> None:
    for visible in (causal(count), steps.causal(count)):
        assert visible.shape == (1, count, count)
        assert ["".join("x" if seen else "." for seen in row) for row in visible[0].tolist()] == expected
