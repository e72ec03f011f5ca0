import itertools
import random
import re
from collections import Counter

import pytest
import torch

from model.batches import Batch, BatchStream, Example, bucket, collate, encode_pairs
from model.config import ModelConfig
from model.errors import DataError
from model.loss import token_loss
from model.pairs import Pair
from model.vocabulary import BEGIN, END, PAD
from tests.model.texts import trained
from tests.model.toy import small_transformer


def examples(count: int = 200, longest: int = 9) -> list[Example]:
    """Every source begins with a number of its own, so that a batch tells which examples it holds."""
    draw = random.Random(5)
    lengths = [(draw.randint(0, longest - 2), draw.randint(0, longest - 1)) for _ in range(count)]
    return [
        Example([100 + index, *[4] * source, END], [5 + index % 6] * target + [END])
        for index, (source, target) in enumerate(lengths)
    ]


EXAMPLES = examples()


def names(batch: Batch) -> list[int]:
    return (batch.source_ids[:, 0] - 100).tolist()


def first_epoch(stream: BatchStream) -> list[Batch]:
    taken = []
    for batch in stream:
        if stream.epoch:
            break
        taken.append(batch)
    return taken


@pytest.mark.parametrize("tokens", [9, 10, 50, 200, 100_000])
def test_a_batch_keeps_within_its_budget_on_both_sides(tokens: int) -> None:
    for indices in bucket(EXAMPLES, tokens, seed=1, epoch=0):
        batch = collate([EXAMPLES[index] for index in indices])
        assert max(batch.source_ids.numel(), batch.target_ids.numel(), batch.next_ids.numel()) <= tokens


def test_a_pair_over_the_budget_has_a_batch_of_its_own() -> None:
    pairs = [Example([1] * 30, [2]), Example([1], [2] * 40), Example([1], [2]), Example([1], [2])]
    assert sorted(map(sorted, bucket(pairs, 8, seed=1, epoch=0))) == [[0], [1], [2, 3]]


@pytest.mark.parametrize("tokens", [9, 50, 100_000])
def test_an_epoch_has_every_example_once(tokens: int) -> None:
    batches = bucket(EXAMPLES, tokens, seed=1, epoch=3)
    assert sorted(itertools.chain(*batches)) == list(range(len(EXAMPLES)))


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    first = bucket(EXAMPLES, 50, seed=1, epoch=0)
    random.seed(99)
    torch.manual_seed(99)
    assert bucket(EXAMPLES, 50, seed=1, epoch=0) == first
    assert bucket(EXAMPLES, 50, seed=2, epoch=0) != first
    assert bucket(EXAMPLES, 50, seed=1, epoch=1) != first


def test_neighbours_change_between_epochs() -> None:
    equals = [Example([1, END], [2, END])] * 40
    first, second = ({frozenset(batch) for batch in bucket(equals, 8, seed=1, epoch=epoch)} for epoch in (0, 1))
    assert len(first) == len(second) == 10
    assert len(first & second) < 5


def test_little_is_padded_where_long_sources_have_long_targets() -> None:
    draw = random.Random(6)
    lengths = [draw.randint(1, 30) for _ in range(3000)]
    pairs = [Example([4] * length, [5] * (length + draw.randint(0, 3))) for length in lengths]
    batches = [collate([pairs[index] for index in batch]) for batch in bucket(pairs, 600, seed=1, epoch=0)]
    sources, targets = sum(int(batch.source_mask.sum()) for batch in batches), sum(x.target_tokens for x in batches)
    assert sources / sum(batch.source_mask.numel() for batch in batches) > 0.93
    assert targets / sum(batch.next_ids.numel() for batch in batches) > 0.97


def test_pairs_are_padded_on_the_right() -> None:
    batch = collate([Example([7, END], [8, 9, END]), Example([6, 5, END], [END])])
    assert batch.source_ids.tolist() == [[7, END, PAD], [6, 5, END]]
    assert batch.source_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.target_ids.tolist() == [[BEGIN, 8, 9], [BEGIN, PAD, PAD]]
    assert batch.next_ids.tolist() == [[8, 9, END], [END, PAD, PAD]]
    assert batch.target_tokens == 4


def test_pairs_over_a_limit_are_left_out_and_counted() -> None:
    tokenizer = trained("characters", ["ab"])
    limits = ModelConfig(longest_source=3, longest_target=4)
    pairs = [Pair("ab", "aba"), Pair("aba", "a"), Pair("a", "abab"), Pair("b", ""), Pair("abab", "ababa")]
    encoded = encode_pairs(pairs, tokenizer, tokenizer, limits, "training data")
    texts = [(tokenizer.decode(source), tokenizer.decode(target)) for source, target in encoded.examples]
    assert texts == [("ab", "aba"), ("b", "")]
    assert encoded.too_long == 3


def test_data_over_the_limits_altogether_is_refused() -> None:
    tokenizer = trained("characters", ["ab"])
    limits = ModelConfig(longest_source=3, longest_target=4)
    words = "test data: no pairs are left; all 2 are longer than longest_source=3 or longest_target=4 tokens"
    with pytest.raises(DataError, match=re.escape(words)):
        encode_pairs([Pair("aba", "a"), Pair("a", "abab")], tokenizer, tokenizer, limits, "test data")


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_batch_between_them(world: int) -> None:
    whole = first_epoch(BatchStream(EXAMPLES, 60, seed=4))
    shares = [first_epoch(BatchStream(EXAMPLES, 60, seed=4, rank=rank, world=world)) for rank in range(world)]
    for batch, *parts in zip(whole, *shares, strict=True):
        learnt = [name for part in parts for name in names(part) if part.target_tokens]
        assert Counter(learnt) == Counter(names(batch))
        assert sum(part.target_tokens for part in parts) == batch.target_tokens


def test_a_process_without_a_share_learns_nothing() -> None:
    only = [Example([7, 6, END], [8, 9, END])]
    batch = next(iter(BatchStream(only, 60, seed=4, rank=1, world=2)))
    assert batch.source_ids.tolist() == [[7, 6, END]]
    assert (batch.target_tokens, batch.next_ids.tolist()) == (0, [[PAD, PAD, PAD]])
    model = small_transformer()
    loss = token_loss(model, batch, 0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad for weight in model.parameters()]
    assert loss.item() == 0
    assert all(gradient is not None and gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.parametrize("taken", [1, 7, "epoch", "epoch and one", "two epochs"])
def test_a_stream_goes_on_from_any_place(taken: int | str) -> None:
    count = len(bucket(EXAMPLES, 50, seed=4, epoch=0))
    places = {"epoch": count, "epoch and one": count + 1, "two epochs": count + len(bucket(EXAMPLES, 50, 4, 1))}
    skipped = taken if isinstance(taken, int) else places[taken]
    stream = BatchStream(EXAMPLES, 50, seed=4)
    batches = iter(stream)
    for _ in range(skipped):
        next(batches)
    resumed = iter(BatchStream(EXAMPLES, 50, seed=4, epoch=stream.epoch, place=stream.place))
    for _ in range(count):
        for mine, other in zip(next(batches), next(resumed), strict=True):
            assert torch.equal(mine, other)


def test_a_stream_goes_through_one_epoch_after_another() -> None:
    stream = BatchStream(EXAMPLES, 50, seed=4)
    counts: Counter[int] = Counter()
    for batch in stream:
        if stream.epoch == 2:
            break
        counts.update(names(batch))
    assert counts == Counter(range(len(EXAMPLES))) + Counter(range(len(EXAMPLES)))
