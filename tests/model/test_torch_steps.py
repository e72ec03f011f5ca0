import numpy as np
import pytest
from numpy.testing import assert_allclose

from model.forced import score
from model.grid import Grid
from model.search import SearchOptions, search
from model.steps import Family, pad
from model.torch_steps import TorchStepModel
from model.vocabulary import BEGIN, END
from tests.model.searching import assert_near
from tests.model.toy import SMALL, small_transformer

SOURCES = [[5, 6, 7, END], [8, END], [9, 4, 4, 4, 6, 10, END], [END]]
LAYERS, HEADS = SMALL["decoder_layers"], SMALL["heads"]


@pytest.fixture(params=["pre", "post"])
def model(request: pytest.FixtureRequest) -> TorchStepModel:
    return TorchStepModel(small_transformer(norm=request.param))


def options(beam_size: int, longest: int = 8, length_penalty: float = 1.0) -> SearchOptions:
    return SearchOptions(longest=longest, beam_size=beam_size, hypotheses=beam_size, length_penalty=length_penalty)


@pytest.mark.parametrize("beam_size", [1, 2, 4, 16])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_every_hypothesis_is_what_forced_decoding_says_of_it(
    model: TorchStepModel, beam_size: int, length_penalty: float
) -> None:
    chosen = options(beam_size, length_penalty=length_penalty)
    found = search(model, SOURCES, [chosen] * len(SOURCES))
    for source, hypotheses in zip(SOURCES, found, strict=True):
        assert len(hypotheses) == beam_size
        targets = [one.tokens for one in hypotheses]
        forced = score(model, [source] * beam_size, targets, [length_penalty] * beam_size)
        for one, expected in zip(hypotheses, forced, strict=True):
            assert_near(one, expected)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_sentence_is_decoded_in_a_batch_as_alone(model: TorchStepModel, beam_size: int) -> None:
    chosen = [options(beam_size, longest) for longest in (8, 3, 6, 5)]
    together = search(model, SOURCES, chosen)
    for source, own, found in zip(SOURCES, chosen, together, strict=True):
        for one, expected in zip(found, search(model, [source], [own])[0], strict=True):
            assert_near(one, expected)


def test_attention_has_an_axis_for_each_layer_and_head_and_sums_to_one(model: TorchStepModel) -> None:
    encoded = model.encode(*pad(SOURCES)).encoder_attention
    assert encoded is not None
    assert encoded.shape == (4, SMALL["encoder_layers"], HEADS, 7, 7)
    for index, (source, hypotheses) in enumerate(
        zip(SOURCES, search(model, SOURCES, [options(2)] * len(SOURCES)), strict=True)
    ):
        own = encoded[index]
        assert_allclose(own[..., : len(source), : len(source)].sum(-1), 1, atol=1e-5)
        assert np.count_nonzero(own[..., len(source) :]) == 0
        assert np.count_nonzero(own[..., len(source) :, :]) == 0
        for one in hypotheses:
            count = len(one.tokens)
            assert one.cross_attention is not None
            assert one.decoder_attention is not None
            assert one.cross_attention.shape == (LAYERS, HEADS, count, len(source))
            assert one.decoder_attention.shape == (LAYERS, HEADS, count, count)
            assert_allclose(one.cross_attention.sum(-1), 1, atol=1e-5)
            assert_allclose(one.decoder_attention.sum(-1), 1, atol=1e-5)
            assert np.count_nonzero(np.triu(one.decoder_attention, 1)) == 0


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("families", [(), ("cross",), ("decoder",), ("cross", "decoder")], ids=str)
def test_hypotheses_carry_the_attention_that_was_asked_for(
    model: TorchStepModel, beam_size: int, families: tuple[Family, ...]
) -> None:
    chosen = [options(beam_size)] * len(SOURCES)
    everything = search(model, SOURCES, chosen)
    for found, expected in zip(search(model, SOURCES, chosen, frozenset(families)), everything, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert (one.tokens, one.log_probabilities) == (other.tokens, other.log_probabilities)
            for family in ("cross", "decoder"):
                weights = getattr(one, f"{family}_attention")
                if family in families:
                    np.testing.assert_array_equal(weights, getattr(other, f"{family}_attention"))
                else:
                    assert weights is None


def test_targets_of_different_lengths_are_scored_together_as_alone(model: TorchStepModel) -> None:
    targets = [[5, 6, END], [END], [4, 4, 4, 12, 9, END], [7, 8]]
    together = score(model, SOURCES, targets)
    assert [one.finish_reason for one in together] == ["stop", "stop", "stop", "length"]
    for source, target, one in zip(SOURCES, targets, together, strict=True):
        assert_near(one, score(model, [source], [target])[0])


@pytest.mark.parametrize("top", [1, 5, 13])
def test_a_step_ranks_candidates(model: TorchStepModel, top: int) -> None:
    grid = Grid(model, 1)
    grid.join(model.encode(np.array([[5, 6, END]]), np.ones((1, 3), bool)), [0])
    begin = np.array([[BEGIN]])
    step = grid.step(begin, np.zeros_like(begin), np.array([[7]]), top)
    values = step.top_log_probabilities[0, 0]
    assert step.top_ids.shape == (1, 1, top)
    assert len(set(step.top_ids[0, 0].tolist())) == top
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    if top == 13:
        assert np.exp(values).sum() == pytest.approx(1, abs=1e-5)
        assert step.next_log_probabilities[0, 0] == values[step.top_ids[0, 0] == 7][0]
