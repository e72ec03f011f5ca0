"""Who sees what is in the masks alone: what is not seen has no influence, wherever it lies and whatever it holds."""

import numpy as np
import pytest

from export.manifest import Precision
from model.steps import Array, Memory, Step, StepModel
from tests.export.case import (
    JUNK,
    SOURCES,
    Case,
    Past,
    apart,
    ask,
    assert_near,
    blank,
    case_of,
    columns,
    longer,
    of_sentences,
    put,
    values,
)
from tests.export.toy import Toy
from tests.reversal import Reversal

BATCH = len(SOURCES)
HYPOTHESES = 3
PARENTS = ((0, 0, 0), (2, 0, 2), (1, 0, 1), (0, 1, 2))
"""Which hypothesis of the step before each one goes on from: some die out, some part ways, some stay."""


@pytest.fixture
def case(exported: Toy | Reversal) -> Case:
    return case_of(exported)


@pytest.fixture(params=["fp32", "int8"])
def either(exported: Toy | Reversal, request: pytest.FixtureRequest) -> Case:
    """The graphs of each precision in turn."""
    precision: Precision = request.param
    return case_of(exported, precision)


def assert_equal(actual: Step, expected: Step) -> None:
    """Bit by bit."""
    for name in ("top_ids", "top_log_probabilities", "next_log_probabilities", "cross_attention", "decoder_attention"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
    for left, right in zip(actual.state, expected.state, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("order", ["at the end", "at the beginning", "anywhere"])
@pytest.mark.parametrize("ages", [(1, 2, 4), (4, 2, 1), (3, 3, 3)], ids=str)
def test_sentences_of_different_ages_share_a_batch(case: Case, ages: tuple[int, ...], order: str, new: int) -> None:
    random, size = np.random.default_rng(5), max(ages) + 2
    state, visible = blank(case.onnx, BATCH, size), np.zeros((BATCH, new, size), bool)
    alone, places = list[Step](), list[Array]()
    for sentence, age in enumerate(ages):
        ids = case.target_ids[sentence : sentence + 1]
        past = columns(case.onnx, case.read([sentence], ids[:, :age], [0]).state, range(age))
        alone.append(case.read([sentence], ids[:, age : age + new], [age], past))
        first = {"at the end": np.arange(size - age, size), "at the beginning": np.arange(age)}
        places.append(first[order] if order in first else random.permutation(size)[:age])
        put(case.onnx, state, sentence, places[-1], past)
        visible[sentence][:, places[-1]] = True
    ids = np.stack([case.target_ids[sentence, age : age + new] for sentence, age in enumerate(ages)])
    positions = np.array(ages)[:, None] + np.arange(new)
    together = ask(case.onnx, case.memory, ids, positions, Past(state, visible))
    assert together.decoder_attention is not None
    assert together.cross_attention is not None
    for sentence, expected in enumerate(alone):
        own, seen = together.decoder_attention[sentence], [*places[sentence], *range(size, size + new)]
        assert expected.decoder_attention is not None
        assert expected.cross_attention is not None
        assert_near("log_probabilities", values(together)[sentence], values(expected)[0])
        assert_near("cross", together.cross_attention[sentence], expected.cross_attention[0])
        assert_near("decoder", own[..., seen], expected.decoder_attention[0])
        assert np.count_nonzero(np.delete(own, seen, -1)) == 0
        for tensor, other in zip(together.state, expected.state, strict=True):
            assert_near("state", tensor[sentence], other[0])


@pytest.mark.parametrize("junk", [0.0, -JUNK, 1e30], ids=str)
def test_columns_that_are_not_seen_may_hold_anything(either: Case, junk: float) -> None:
    model, random = either.onnx, np.random.default_rng(6)
    own = ask(model, either.memory, either.target_ids, np.arange(6)[None].repeat(BATCH, 0)).state
    visible = random.random((BATCH, HYPOTHESES, 12)) < 0.5
    order = random.permutation(12)
    visible[..., np.argsort(order)[6:]] = False
    ids = either.target_ids[:, :HYPOTHESES]
    first, other = (
        ask(
            model,
            either.memory,
            ids,
            np.full_like(ids, 6),
            Past(columns(model, longer(model, own, blank(model, BATCH, 6, value)), order), visible),
            new_visible=apart(BATCH, HYPOTHESES),
        )
        for value in (JUNK, junk)
    )
    assert_equal(other, first)
    assert first.decoder_attention is not None
    hidden = ~np.concatenate((visible, apart(BATCH, HYPOTHESES)), -1)[:, None, None]
    assert np.count_nonzero(np.where(hidden, first.decoder_attention, 0)) == 0


def test_the_order_of_the_columns_is_of_no_account(case: Case) -> None:
    model, random = case.onnx, np.random.default_rng(7)
    own = ask(model, case.memory, case.target_ids, np.arange(6)[None].repeat(BATCH, 0)).state
    visible, order = random.random((BATCH, HYPOTHESES, 6)) < 0.5, random.permutation(6)
    ids, alone = case.target_ids[:, :HYPOTHESES], apart(BATCH, HYPOTHESES)
    straight, mixed = (
        ask(
            model,
            case.memory,
            ids,
            np.full_like(ids, 6),
            Past(columns(model, own, chosen), visible[..., chosen]),
            new_visible=alone,
        )
        for chosen in (np.arange(6), order)
    )
    assert straight.decoder_attention is not None
    assert_near("log_probabilities", values(mixed), values(straight))
    assert_near("cross", mixed.cross_attention, straight.cross_attention)
    assert_near("decoder", mixed.decoder_attention, straight.decoder_attention[..., [*order, 6, 7, 8]])


def test_padding_of_the_memory_may_hold_anything(either: Case) -> None:
    memory, positions = either.memory, np.arange(6)[None].repeat(BATCH, 0)
    spoilt = []
    for tensor, kept in zip(memory.tensors, either.onnx.memory, strict=True):
        mask = memory.source_mask.reshape(
            *(size if axis in (0, 1 + kept.index("source")) else 1 for axis, size in enumerate(tensor.shape))
        )
        spoilt.append(np.where(mask, tensor, np.float32(JUNK)))
        assert (spoilt[-1] != tensor).any()
    steps = (
        ask(either.onnx, Memory(tensors, memory.source_mask), either.target_ids, positions)
        for tensors in (memory.tensors, tuple(spoilt))
    )
    assert_equal(*steps)


def test_tokens_in_the_padding_of_a_source_change_nothing(either: Case) -> None:
    other = np.where(either.source_mask, either.source_ids, 5)
    assert (other != either.source_ids).any()
    memories = [either.onnx.encode(ids, either.source_mask) for ids in (either.source_ids, other)]
    for weights in (memory.encoder_attention for memory in memories):
        assert weights is not None
        np.testing.assert_array_equal(weights, memories[0].encoder_attention)
    for left, right, kept in zip(*(memory.tensors for memory in memories), either.onnx.memory, strict=True):
        axis = 1 + kept.index("source")
        real = [np.moveaxis(tensor, axis, 1)[either.source_mask] for tensor in (left, right)]
        np.testing.assert_array_equal(*real)


def grow(model: StepModel, memory: Memory, tokens: Array, parents: Array) -> list[Step]:
    """Steps of hypotheses that part ways: nothing of the past is moved, who sees what is."""
    batch, count = tokens.shape[1:]
    state, visible, steps = blank(model, batch, 1), np.zeros((batch, count, 1), bool), list[Step]()
    for t, (ids, origin) in enumerate(zip(tokens, parents, strict=True)):
        visible = np.take_along_axis(visible, origin[:, :, None], 1)
        past = Past(state, visible)
        steps.append(ask(model, memory, ids, np.full_like(ids, t), past, new_visible=apart(batch, count)))
        state = longer(model, state, steps[-1].state)
        visible = np.concatenate((visible, apart(batch, count)), -1)
    return steps


def tree(case: Case) -> tuple[Array, Array]:
    """Tokens and parents of each step's hypotheses: other ones in every sentence."""
    tokens = np.random.default_rng(8).integers(1, case.vocabulary, (len(PARENTS), BATCH, HYPOTHESES))
    parents = np.stack([np.array(PARENTS)] * BATCH, 1)
    parents[1:, 1] = parents[1:, 1, ::-1]
    return tokens, parents


def ancestors(parents: Array, sentence: int, hypothesis: int) -> list[int]:
    """Which hypothesis of each step a hypothesis of the last one goes back to."""
    rows = [hypothesis]
    for origin in parents[:0:-1, sentence]:
        rows.append(int(origin[rows[-1]]))
    return rows[::-1]


def test_hypotheses_that_do_not_see_each_other_are_as_each_alone(case: Case) -> None:
    tokens, parents = tree(case)
    last = grow(case.onnx, case.memory, tokens, parents)[-1]
    assert last.decoder_attention is not None
    assert last.cross_attention is not None
    for sentence in range(BATCH):
        for hypothesis in range(HYPOTHESES):
            rows = ancestors(parents, sentence, hypothesis)
            ids = tokens[range(len(rows)), sentence, rows][None]
            alone = case.read([sentence], ids, [0])
            assert alone.decoder_attention is not None
            assert alone.cross_attention is not None
            own = last.decoder_attention[sentence, :, :, hypothesis]
            seen = [1 + HYPOTHESES * t + row for t, row in enumerate(rows)]
            assert_near("log_probabilities", values(last)[sentence, hypothesis], values(alone)[0, -1])
            assert_near("cross", last.cross_attention[sentence, :, :, hypothesis], alone.cross_attention[0, :, :, -1])
            assert_near("decoder", own[..., seen], alone.decoder_attention[0, :, :, -1, 1:])
            assert np.count_nonzero(np.delete(own, seen, -1)) == 0
            for tensors in zip(
                columns(case.onnx, last.state, [hypothesis]), columns(case.onnx, alone.state, [-1]), strict=True
            ):
                assert_near("state", tensors[0][sentence], tensors[1][0])


def test_hypotheses_that_part_ways_equal_the_networks_own(case: Case) -> None:
    tokens, parents = tree(case)
    sides = [grow(side, case.memory, tokens, parents) for side in (case.onnx, case.torch)]
    for steps in zip(*sides, strict=True):
        assert_near("log_probabilities", *map(values, steps))
        assert_near("cross", *(step.cross_attention for step in steps))
        assert_near("decoder", *(step.decoder_attention for step in steps))
        for pair in zip(*(step.state for step in steps), strict=True):
            assert_near("state", *pair)


def test_choosing_parents_in_the_mask_is_as_copying_their_columns(case: Case) -> None:
    model, tokens, parents = case.onnx, *tree(case)
    first = ask(model, case.memory, tokens[0], np.zeros_like(tokens[0]), new_visible=apart(BATCH, HYPOTHESES))
    ids, one = tokens[1], np.ones_like(tokens[1])
    among = apart(BATCH, HYPOTHESES)
    chosen = Past(first.state, np.take_along_axis(among, parents[1][:, :, None], 1))
    copies = tuple(np.stack([tensor[s][:, parents[1, s]] for s in range(BATCH)]) for tensor in first.state)
    by_mask, copied, kept = (
        ask(model, case.memory, ids, one, past, new_visible=among)
        for past in (chosen, Past(copies, among), Past(first.state, among))
    )
    assert_near("log_probabilities", values(by_mask), values(copied))
    assert_near("cross", by_mask.cross_attention, copied.cross_attention)
    assert np.abs(values(by_mask) - values(kept)).max() > 1e-3


@pytest.mark.parametrize("count", [2, 4])
def test_hypotheses_look_at_one_memory_as_at_copies_of_it(case: Case, count: int) -> None:
    ids = np.random.default_rng(3).integers(1, case.vocabulary, (BATCH, count))
    zero, copies = np.zeros_like(ids), of_sentences(case.memory, np.repeat(np.arange(BATCH), count).tolist())
    assert len(copies.source_mask) == count * len(case.memory.source_mask)
    shared = ask(case.onnx, case.memory, ids, zero, new_visible=apart(BATCH, count))
    copied = ask(case.onnx, copies, ids.reshape(-1, 1), zero.reshape(-1, 1))
    assert shared.cross_attention is not None
    assert copied.cross_attention is not None
    assert_near("log_probabilities", values(shared).reshape(values(copied).shape), values(copied))
    beside = shared.cross_attention.transpose(0, 3, 1, 2, 4)
    assert_near("cross", beside.reshape(copied.cross_attention[:, :, :, 0].shape), copied.cross_attention[:, :, :, 0])
    for tensor, other in zip(shared.state, copied.state, strict=True):
        assert_near("state", tensor.transpose(0, 2, 1, 3).reshape(other[:, :, 0].shape), other[:, :, 0])


def test_what_one_hypothesis_reads_is_nothing_to_the_others(either: Case) -> None:
    ids, among = either.target_ids[:, :HYPOTHESES].copy(), apart(BATCH, HYPOTHESES)
    steps = []
    for token in (4, 5):
        ids[:, 1] = token
        steps.append(ask(either.onnx, either.memory, ids, np.zeros_like(ids), new_visible=among))
    for hypothesis, same in ((0, True), (1, False), (2, True)):
        left, right = (values(step)[:, hypothesis] for step in steps)
        assert np.array_equal(left, right) is same
        for before, after in zip(steps[0].state, steps[1].state, strict=True):
            assert np.array_equal(before[:, :, hypothesis], after[:, :, hypothesis]) is same
