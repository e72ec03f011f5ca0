"""Sources read in groups of like length: little padding, and the memory of one pass."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.reading import WASTE, alike, read
from model.steps import pad
from model.torch_steps import TorchStepModel
from tests.model.toy import small_transformer


@given(st.lists(st.integers(1, 200), min_size=1, max_size=70))
def test_groups_hold_everybody_once_and_waste_little(lengths: list[int]) -> None:
    groups = alike(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert sum(longest - lengths[index] for index in group) <= WASTE
    ends = [(max(one), min(one)) for one in ([lengths[index] for index in group] for group in groups)]
    assert all(after[0] <= before[1] for before, after in itertools.pairwise(ends))


def test_sources_of_like_length_are_one_group_in_the_order_given() -> None:
    assert alike([5, 5, 5]) == [[0, 1, 2]]
    assert len(alike([1] + [WASTE] * 3)) == 1
    assert len(alike([1] + [WASTE + 2] * 3)) == 2


def test_memory_of_groups_is_that_of_one_pass() -> None:
    model = TorchStepModel(small_transformer())
    random = np.random.default_rng(2)
    sources = [random.integers(4, 9, length).tolist() for length in (3, 60, 1, 58, 31, 30)]
    assert len(alike(list(map(len, sources)))) > 2
    found, expected = read(model, sources, attention=True), model.encode(*pad(sources), True)
    np.testing.assert_array_equal(found.source_mask, expected.source_mask)
    for one, other, kept in zip(found.tensors, expected.tensors, model.memory, strict=True):
        ours, theirs = (np.moveaxis(tensor, 1 + list(kept).index("source"), 1) for tensor in (one, other))
        np.testing.assert_allclose(ours[found.source_mask], theirs[found.source_mask], atol=1e-5)
    assert found.encoder_attention is not None
    assert expected.encoder_attention is not None
    np.testing.assert_allclose(found.encoder_attention, expected.encoder_attention, atol=1e-5)
