"""A search among candidates: which they are, what the network says of them alone, and that nobody else has a say."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest

from export.graphs import CANDIDATE_IDS
from export.manifest import SHORTLIST_ANSWERS, BundleError, Precision
from export.resident import ResidentStepModel
from export.runtime import OnnxStepModel, RuntimeOptions
from export.shortlist import ALWAYS, CANDIDATE_WEIGHTS, FILLER, priority
from model.options import UNWRITABLE
from model.search import SearchOptions, search
from model.steps import ALL_FAMILIES, Array, Memory, StepModel, pad
from model.vocabulary import BEGIN, END, PAD, UNKNOWN
from tests.export.case import LENGTH, SOURCES, ask, case_of
from tests.export.shortlisting import SIZE, Shortlisted, shortlisted_model
from tests.export.test_resident import Arrival, decode
from tests.export.toy import PAIRS, Toy, network
from tests.model.searching import assert_same

NEAR = 1e-4
"""Largest difference of log-probabilities. Measured: 2e-5."""

SOURCE_IDS = [[7, 8, 8, 30, END], [5, END], [9, UNKNOWN, 60, 61, 62, 63, 12, END], [END]]
POSITIONS = np.arange(LENGTH)[None].repeat(len(SOURCES), 0)


def candidates(model: OnnxStepModel, memory: Memory) -> tuple[Array, Array]:
    """Ids and rows of the projection."""
    names = [spec.name for spec in model.memory_specs]
    return memory.tensors[names.index(CANDIDATE_IDS)], memory.tensors[names.index(CANDIDATE_WEIGHTS)]


def by_hand(short: Shortlisted, source: Sequence[int]) -> list[int]:
    """The candidates of one sentence, worked out token by token."""
    lexicon = short.lexicon
    scores = FILLER * lexicon.frequencies
    scores[np.argsort(-lexicon.frequencies, kind="stable")[: SIZE // 3]] += ALWAYS
    for token in source:
        for target, probability in zip(lexicon.ids[token], lexicon.probabilities[token], strict=True):
            scores[target] += probability
    ranked = [index for index in np.argsort(-scores, kind="stable").tolist() if index > END]
    return sorted([UNKNOWN, END, *ranked[: SIZE - 2]])


def restricted(log_probabilities: Array, ids: Array) -> Array:
    """Of the candidates alone [batch query candidate], renormalised."""
    chosen = np.take_along_axis(log_probabilities, np.broadcast_to(ids[:, None], (*ids.shape[:1], LENGTH, SIZE)), -1)
    kept: Array = chosen - np.log(np.exp(chosen).sum(-1, keepdims=True))
    return kept


def in_order(values: Array, ids: Array) -> Array:
    """Values in the order of the vocabulary."""
    return np.take_along_axis(values, np.argsort(ids, -1), -1)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_candidates_are_what_lexicon_and_frequencies_say(shortlisted: Shortlisted, precision: Precision) -> None:
    model = shortlisted.short(precision)
    ids, _ = candidates(model, model.encode(*pad(SOURCE_IDS)))
    assert ids.dtype == np.int64
    for found, source in zip(ids, SOURCE_IDS, strict=True):
        assert sorted(found.tolist()) == by_hand(shortlisted, source)
    assert len({*map(str, np.sort(ids).tolist())}) == len(SOURCE_IDS)


def test_the_end_is_always_a_candidate_and_what_cannot_be_written_never(shortlisted: Shortlisted) -> None:
    values = priority(shortlisted.lexicon, SIZE)
    assert np.flatnonzero(values == np.inf).tolist() == sorted((UNKNOWN, END))
    assert np.flatnonzero(values == -np.inf).tolist() == sorted((PAD, BEGIN)) == sorted(UNWRITABLE)
    assert (values[END + 1 :] >= ALWAYS).sum() == SIZE // 3


def test_weights_are_rows_of_the_projection(shortlisted: Shortlisted) -> None:
    table = network(shortlisted.toy).model.decoder.projection.weight.detach().numpy()
    for precision, limit in (("fp32", 0.0), ("int8", np.abs(table).max() / 63 / 2 * 1.001)):
        model = shortlisted.short(cast("Precision", precision))
        ids, weights = candidates(model, model.encode(*pad(SOURCE_IDS)))
        np.testing.assert_allclose(weights, table[ids], rtol=0, atol=limit)


def test_log_probabilities_are_the_exact_ones_of_the_candidates_alone(shortlisted: Shortlisted) -> None:
    case, short = case_of(shortlisted.toy), shortlisted.short()
    memory = short.encode(case.source_ids, case.source_mask)
    ids, _ = candidates(short, memory)
    step = ask(short, memory, case.target_ids, POSITIONS)
    whole = ask(case.onnx, case.memory, case.target_ids, POSITIONS)
    expected = restricted(in_order(whole.top_log_probabilities, whole.top_ids), np.sort(ids))
    assert step.top_ids.shape == (len(SOURCES), LENGTH, SIZE)
    assert (np.diff(step.top_log_probabilities) <= 0).all()
    np.testing.assert_array_equal(np.sort(step.top_ids, -1), np.sort(ids)[:, None].repeat(LENGTH, 1))
    np.testing.assert_allclose(in_order(step.top_log_probabilities, step.top_ids), expected, rtol=0, atol=NEAR)


class Features:
    """A decoder's session that also keeps what goes into its last product."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        self._name = [node for node in model.graph.node if node.op_type == "QuantizeLinear"][-1].input[0]
        model.graph.output.append(onnx.helper.make_tensor_value_info(self._name, onnx.TensorProto.FLOAT, None))
        self._session = RuntimeOptions().session(model.SerializeToString())
        self.found = np.zeros(0)

    def run(self, names: list[str], feeds: dict[str, Array]) -> list[Array]:
        results: list[Array] = self._session.run([*names, self._name], feeds)
        self.found = results.pop()
        return results


def test_in_int8_only_the_product_with_candidates_is_one_of_floats(
    shortlisted: Shortlisted, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, short = case_of(shortlisted.toy, "int8"), shortlisted.short("int8")
    features = Features(shortlisted.toy.bundle / "int8" / "decoder.onnx")
    monkeypatch.setattr(case.onnx, "decoder", features)
    ask(case.onnx, case.memory, case.target_ids, POSITIONS)
    memory = short.encode(case.source_ids, case.source_mask)
    ids, weights = candidates(short, memory)
    logits = features.found.reshape(len(SOURCES), LENGTH, -1) @ weights.transpose(0, 2, 1)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    step = ask(short, memory, case.target_ids, POSITIONS)
    found = in_order(step.top_log_probabilities, step.top_ids)
    np.testing.assert_allclose(found, in_order(expected, ids[:, None].repeat(LENGTH, 1)), rtol=0, atol=NEAR)


def test_they_are_those_of_pytorch(shortlisted: Shortlisted) -> None:
    case, short = case_of(shortlisted.toy), shortlisted.short()
    memory = short.encode(case.source_ids, case.source_mask)
    ids, _ = candidates(short, memory)
    whole = ask(case.torch, case.torch.encode(case.source_ids, case.source_mask), case.target_ids, POSITIONS)
    expected = restricted(in_order(whole.top_log_probabilities, whole.top_ids), np.sort(ids))
    step = ask(short, memory, case.target_ids, POSITIONS)
    np.testing.assert_allclose(in_order(step.top_log_probabilities, step.top_ids), expected, rtol=0, atol=NEAR)
    for index in range(SIZE):
        next_ids = np.sort(ids)[:, index, None].repeat(LENGTH, 1)
        asked = ask(short, memory, case.target_ids, POSITIONS, next_ids=next_ids, top=1)
        np.testing.assert_allclose(asked.next_log_probabilities, expected[..., index], rtol=0, atol=NEAR)


def test_what_is_no_candidate_is_impossible(shortlisted: Shortlisted) -> None:
    case, short = case_of(shortlisted.toy), shortlisted.short()
    memory = short.encode(case.source_ids, case.source_mask)
    ids, _ = candidates(short, memory)
    others = [next(index for index in range(4, case.vocabulary) if index not in row) for row in ids]
    next_ids = np.array(others)[:, None].repeat(LENGTH, 1)
    step = ask(short, memory, case.target_ids, POSITIONS, next_ids=next_ids)
    np.testing.assert_array_equal(step.next_log_probabilities, np.full(next_ids.shape, -np.inf, np.float32))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_attention_and_state_are_the_exact_decoders(shortlisted: Shortlisted, precision: Precision) -> None:
    case, short = case_of(shortlisted.toy, precision), shortlisted.short(precision)
    memory = short.encode(case.source_ids, case.source_mask)
    step = ask(short, memory, case.target_ids, POSITIONS)
    expected = ask(case.onnx, case.memory, case.target_ids, POSITIONS)
    np.testing.assert_array_equal(memory.encoder_attention, case.memory.encoder_attention)
    np.testing.assert_array_equal(step.cross_attention, expected.cross_attention)
    np.testing.assert_array_equal(step.decoder_attention, expected.decoder_attention)
    for found, right in zip(step.state, expected.state, strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_answer_does_not_depend_on_batch_mates(shortlisted: Shortlisted, precision: Precision, width: int) -> None:
    model = shortlisted.short(precision)
    options = SearchOptions(longest=8, beam_size=width)
    together = search(model, SOURCE_IDS, [options] * len(SOURCE_IDS))
    ids, _ = candidates(model, model.encode(*pad(SOURCE_IDS)))
    for index, source in enumerate(SOURCE_IDS):
        alone, _ = candidates(model, model.encode(*pad([source])))
        np.testing.assert_array_equal(alone[0], ids[index])
        (expected,) = search(model, [source], [options])
        assert [one.tokens for one in together[index]] == [one.tokens for one in expected]
        assert {token for one in expected for token in one.tokens} <= {*ids[index].tolist()}


@pytest.mark.parametrize("width", [1, 2])
def test_sentences_join_and_leave_as_any_others(shortlisted: Shortlisted, width: int) -> None:
    """With arrays and with what stays on a device, among others and alone."""
    model = shortlisted.stepwise()
    coming = [Arrival(clock, source, 9, 99) for clock, source in zip((0, 0, 2, 3), SOURCE_IDS, strict=True)]
    found = decode(model, coming, width, ALL_FAMILIES)
    options = SearchOptions(longest=9, beam_size=width)
    for hypotheses, source in zip(found, SOURCE_IDS, strict=True):
        (expected,) = search(model, [source], [options])
        assert [one.tokens for one in hypotheses] == [one.tokens for one in expected]
    for one, other in zip(decode(ResidentStepModel(model, "cpu"), coming, width, ALL_FAMILIES), found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_several_steps_in_one_call_are_as_many_single_ones(shortlisted: Shortlisted, precision: Precision) -> None:
    options = [SearchOptions(longest=12)] * len(SOURCE_IDS)
    models: tuple[StepModel, ...] = (shortlisted.short(precision), shortlisted.stepwise(precision))
    ahead, single = (search(model, SOURCE_IDS, options) for model in models)
    for one, other in zip(itertools.chain(*ahead), itertools.chain(*single), strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, rtol=0, atol=1e-5)


def test_where_everything_is_a_candidate_answers_are_exact(untied: Toy, tmp_path: Path) -> None:
    most = untied.manifest.target_vocabulary - len(UNWRITABLE)
    short = shortlisted_model(untied, tmp_path, most)
    options = [SearchOptions(longest=12)] * len(SOURCE_IDS)
    found, expected = (search(model, SOURCE_IDS, options) for model in (short.short(), short.exact()))
    assert [one.tokens for (one,) in found] == [one.tokens for (one,) in expected]
    for found_of in short.toy.manifest.provenance.parity.values():
        assert found_of[SHORTLIST_ANSWERS] == found_of["answers"] == len(PAIRS)


@pytest.mark.parametrize("shortlisted", ["untied"], indirect=True)
def test_float16_remembers_rows_in_half(shortlisted: Shortlisted) -> None:
    model = shortlisted.short("fp16")
    ids, weights = candidates(model, model.encode(*pad(SOURCE_IDS)))
    assert (ids.dtype, weights.dtype) == (np.int64, np.float16)
    full = shortlisted.short()
    np.testing.assert_array_equal(ids, candidates(full, full.encode(*pad(SOURCE_IDS)))[0])


def test_the_decoder_is_small(shortlisted: Shortlisted) -> None:
    """Nothing in it is as wide as the vocabulary, but the embedding that it reads tokens by."""
    vocabulary = shortlisted.toy.manifest.target_vocabulary
    graph = onnx.load(shortlisted.toy.bundle / "fp32" / "decoder_shortlist.onnx", load_external_data=False).graph
    assert [list(one.dims) for one in graph.initializer if vocabulary in one.dims] == [[vocabulary, 16]]


def test_a_model_without_one_says_so(untied: Toy) -> None:
    exact = OnnxStepModel(untied.bundle, untied.manifest, "fp32")
    with pytest.raises(BundleError, match=r"bundle: fp32 has no shortlist: export the model again with --shortlist$"):
        OnnxStepModel(untied.bundle, untied.manifest, "fp32", shortlist_of=exact)


def test_the_encoder_is_held_once(shortlisted: Shortlisted) -> None:
    exact = shortlisted.exact()
    short = OnnxStepModel(shortlisted.toy.bundle, shortlisted.toy.manifest, "fp32", shortlist_of=exact)
    assert short.encoder is exact.encoder
    assert (short.vocabulary, short.most) == (exact.vocabulary, SIZE)
