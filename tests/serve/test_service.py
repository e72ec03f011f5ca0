"""One answer, however it is asked for: alone, streamed, among others, scored, or searched by PyTorch itself."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from model.checkpoint import load_checkpoint
from model.search import Hypothesis, SearchOptions, search
from model.tokenizer import Tokenizer
from model.torch_steps import TorchStepModel
from serve.bundle import ServedModel
from serve.pb.limelight.v1 import limelight_pb2 as pb
from tests.reversal import Reversal, parts
from tests.serve.attention import CROSS, DECODER, ENCODER
from tests.serve.running import PATIENCE, Running, array, serving

TOLERANCES = {"log_probabilities": 1e-4, "attention": 1e-5}
"""Largest difference between two ways to one answer. Measured: 2e-5 and 3e-6."""

STRINGS = [*parts()["test"][:12], "a", "hgfedcbahgfedcbahgfedcb"]
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"beam_size": 4, "hypotheses": 3},
    "short": {"beam_size": 2, "longest": 3},
}
"""A beam's n-best, and an answer that the limit ends, besides the best guess."""

EVERYTHING = pb.AttentionOptions(families=[ENCODER, DECODER, CROSS])


class One(NamedTuple):
    """A hypothesis, whoever found it."""

    text: str
    ids: list[int]
    log_probabilities: list[float]
    score: float
    stopped: bool
    cross: np.ndarray[Any, Any]
    decoder: np.ndarray[Any, Any]


class Answer(NamedTuple):
    """All hypotheses for a source, with its encoder attention."""

    encoder: np.ndarray[Any, Any]
    hypotheses: list[One]


def one(hypothesis: pb.Hypothesis, attention: Sequence[pb.Attention]) -> One:
    decoder, cross = attention
    assert (decoder.family, cross.family) == (DECODER, CROSS)
    return One(
        hypothesis.text,
        [token.id for token in hypothesis.tokens],
        [token.log_probability for token in hypothesis.tokens],
        hypothesis.score,
        hypothesis.finish_reason == pb.FINISH_REASON_STOP,
        array(cross),
        array(decoder),
    )


def generated(answer: pb.GenerateResponse) -> Answer:
    (encoder,) = answer.attention
    return Answer(array(encoder), [one(hypothesis, hypothesis.attention) for hypothesis in answer.hypotheses])


def searched(hypothesis: Hypothesis, tokenizer: Tokenizer) -> One:
    assert hypothesis.cross_attention is not None
    assert hypothesis.decoder_attention is not None
    return One(
        tokenizer.decode(hypothesis.tokens),
        hypothesis.tokens,
        hypothesis.log_probabilities,
        hypothesis.score,
        hypothesis.finish_reason == "stop",
        hypothesis.cross_attention,
        hypothesis.decoder_attention,
    )


def request(source: str, choices: dict[str, Any]) -> pb.GenerateRequest:
    return pb.GenerateRequest(source=source, search=pb.SearchOptions(**choices), attention=EVERYTHING)


def stream(running: Running, source: str, choices: dict[str, Any]) -> list[pb.GenerateStreamResponse]:
    asked = pb.GenerateStreamRequest(source=source, search=pb.SearchOptions(**choices), attention=EVERYTHING)
    return list(running.stub.GenerateStream(asked, timeout=PATIENCE))


def streamed(events: Sequence[pb.GenerateStreamResponse]) -> Answer:
    """What a stream amounts to, the best hypothesis's attention put together from its rows."""
    start, tokens, end = events[0].start, [event.token for event in events[1:-1]], events[-1].end
    best, *others = end.hypotheses
    rows = [[array(attention) for attention in token.attention] for token in tokens]
    decoder = np.zeros((*rows[0][0].shape[:2], len(rows), len(rows)), np.float32)
    for index, (row, _) in enumerate(rows):
        decoder[:, :, index, : index + 1] = row[:, :, 0]
    cross = np.concatenate([row for _, row in rows], 2)
    whole = One(
        "".join(token.text for token in tokens),
        [token.token.id for token in tokens],
        [token.token.log_probability for token in tokens],
        best.score,
        best.finish_reason == pb.FINISH_REASON_STOP,
        cross,
        decoder,
    )
    return Answer(array(start.attention[0]), [whole, *(one(other, other.attention) for other in others)])


def assert_same(left: Answer, right: Answer) -> None:
    assert_near("attention", left.encoder, right.encoder)
    for mine, other in zip(left.hypotheses, right.hypotheses, strict=True):
        assert (mine.text, mine.ids, mine.stopped) == (other.text, other.ids, other.stopped)
        assert_near("log_probabilities", mine.log_probabilities, other.log_probabilities)
        assert_near("log_probabilities", mine.score, other.score)
        assert_near("attention", mine.cross, other.cross)
        assert_near("attention", mine.decoder, other.decoder)


def assert_near(what: str, left: Any, right: Any) -> None:
    np.testing.assert_allclose(left, right, rtol=0, atol=TOLERANCES[what], err_msg=what)


@pytest.fixture(scope="module", params=SEARCHES)
def choices(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SEARCHES[request.param]


@pytest.fixture(scope="module")
def alone(running: Running, choices: dict[str, Any]) -> list[Answer]:
    """Each string's answer, asked for by itself."""
    return [generated(running.stub.Generate(request(string, choices), timeout=PATIENCE)) for string in STRINGS]


def test_answers_are_those_of_pytorch(reversal: Reversal, choices: dict[str, Any], alone: list[Answer]) -> None:
    checkpoint = load_checkpoint(reversal.checkpoint)
    steps, options = TorchStepModel(checkpoint.model), SearchOptions(**{"longest": 20} | choices)
    for string, answer in zip(STRINGS, alone, strict=True):
        ids = [token.id for token in checkpoint.source.encode(string)]
        found = [searched(hypothesis, checkpoint.target) for hypothesis in search(steps, [ids], [options])[0]]
        encoder = steps.encode(np.array([ids]), np.ones((1, len(ids)), bool)).encoder_attention
        assert encoder is not None
        assert_same(answer, Answer(encoder[0], found))


def test_asking_for_many_at_once_changes_nothing(
    running: Running, choices: dict[str, Any], alone: list[Answer]
) -> None:
    calls = [running.stub.Generate.future(request(string, choices), timeout=PATIENCE) for string in STRINGS * 3]
    for answer, call in zip(alone * 3, calls, strict=True):
        assert_same(generated(call.result()), answer)


def test_a_stream_amounts_to_the_same(running: Running, choices: dict[str, Any], alone: list[Answer]) -> None:
    for string, answer in zip(STRINGS, alone, strict=True):
        assert_same(streamed(stream(running, string, choices)), answer)


def test_scoring_a_hypothesis_finds_what_the_search_found(running: Running, alone: list[Answer]) -> None:
    for string, answer in zip(STRINGS, alone, strict=True):
        for hypothesis in answer.hypotheses:
            asked = pb.ScoreRequest(source=string, target=hypothesis.text, attention=EVERYTHING)
            found = running.stub.Score(asked, timeout=PATIENCE)
            length = len(hypothesis.ids)  # where the limit ended the answer, an end token more is scored
            again = one(found.hypothesis, found.hypothesis.attention)
            assert again.ids[:length] == hypothesis.ids
            assert_near("log_probabilities", again.log_probabilities[:length], hypothesis.log_probabilities)
            assert_near("attention", again.cross[:, :, :length], hypothesis.cross)
            assert_near("attention", again.decoder[:, :, :length, :length], hypothesis.decoder)
            assert_near("attention", array(found.attention[0]), answer.encoder)
            if hypothesis.stopped:
                assert_near("log_probabilities", again.score, hypothesis.score)


def test_the_limit_ends_an_answer(running: Running) -> None:
    (best,) = running.stub.Generate(request("abcdefgh", {"longest": 3})).hypotheses
    assert (best.text, best.finish_reason) == ("hgf", pb.FINISH_REASON_LENGTH)
    assert [token.text for token in best.tokens] == ["h", "g", "f"]


def test_hypotheses_come_best_first(running: Running) -> None:
    answer = running.stub.Generate(request("abcdabcd", {"beam_size": 8, "hypotheses": 8}))
    scores = [hypothesis.score for hypothesis in answer.hypotheses]
    assert len(scores) == 8
    assert scores == sorted(scores, reverse=True)
    assert len({hypothesis.text for hypothesis in answer.hypotheses}) == 8
    for hypothesis in answer.hypotheses:
        assert hypothesis.log_probability == pytest.approx(sum(token.log_probability for token in hypothesis.tokens))
        assert hypothesis.score == pytest.approx(hypothesis.log_probability / len(hypothesis.tokens))


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "prefix": ({"prefix": "hgb"}, "hgb"),
    "suppressed": ({"suppressed": ["f", "c"]}, "hg"),
    "no repeats": ({"no_repeat_ngram": 1}, "hgfedcba"),
    "shortest": ({"shortest": 12}, "hgfedcba"),
    "sampling": ({"sampling": pb.Sampling(top_k=1, seed=4)}, "hgfedcba"),
}
"""Ways to search, and what the reverse of abcdefgh begins with then."""


@pytest.mark.parametrize("what", OPTIONS)
def test_an_answer_is_searched_as_asked(running: Running, what: str) -> None:
    options, begins = OPTIONS[what]
    (best,) = running.stub.Generate(request("abcdefgh", options)).hypotheses
    texts = [token.text for token in best.tokens]
    assert best.text.startswith(begins)
    assert not {*texts} & {*options.get("suppressed", ())}
    assert len(texts) >= options.get("shortest", 1)
    assert "no_repeat_ngram" not in options or len({*texts}) == len(texts)
    whole = streamed(stream(running, "abcdefgh", options)).hypotheses[0]
    assert (whole.text, whole.ids) == (best.text, [token.id for token in best.tokens])


def test_the_same_seed_draws_the_same_answer(running: Running) -> None:
    def drawn(seed: int) -> str:
        options = {"sampling": pb.Sampling(temperature=5.0, seed=seed)}
        return running.stub.Generate(request("abcdefgh", options)).hypotheses[0].text

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("penalty", [0.0, 0.5, 2.0])
def test_the_length_penalty_divides_the_score(running: Running, penalty: float) -> None:
    search_options = pb.SearchOptions(beam_size=2, length_penalty=penalty)
    (best,) = running.stub.Generate(pb.GenerateRequest(source="abcabc", search=search_options)).hypotheses
    scored = running.stub.Score(pb.ScoreRequest(source="abcabc", target=best.text, length_penalty=penalty)).hypothesis
    for hypothesis in (best, scored):
        assert hypothesis.score == pytest.approx(hypothesis.log_probability / 7**penalty, abs=1e-4)


def test_a_stream_begins_with_the_source_and_ends_with_all_hypotheses(running: Running) -> None:
    events = stream(running, "abcdef", {"beam_size": 3, "hypotheses": 2})
    kinds = [event.WhichOneof("event") for event in events]
    best, other = events[-1].end.hypotheses
    assert kinds == ["start", *["token"] * len(best.tokens), "end"]
    assert events[0].start.model == pb.ModelVersion(name="reversal", version="1")
    assert "".join(token.text for token in events[0].start.source_tokens) == "abcdef</s>"
    assert [event.token.token for event in events[1:-1]] == list(best.tokens)
    assert not best.attention  # it was sent row by row
    assert [attention.family for attention in other.attention] == [DECODER, CROSS]


def test_only_what_is_asked_for_is_sent(running: Running) -> None:
    plain = running.stub.Generate(pb.GenerateRequest(source="abcd", model="reversal"))
    assert (plain.model.name, plain.model.version) == ("reversal", "1")
    assert not plain.attention
    assert not plain.hypotheses[0].attention
    wanted = pb.AttentionOptions(
        families=[CROSS], heads=[1], reduction=pb.REDUCTION_MEAN, float_type=pb.FLOAT_TYPE_FLOAT16
    )
    chosen = running.stub.Generate(pb.GenerateRequest(source="abcd", attention=wanted))
    (half,) = chosen.hypotheses[0].attention
    whole = generated(running.stub.Generate(request("abcd", {}))).hypotheses[0]
    assert not chosen.attention
    assert (list(half.layers), list(half.heads), list(half.shape)) == ([0], [1], [5, 5])
    np.testing.assert_allclose(array(half), whole.cross[0, 1], rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def aligned(served: ServedModel) -> Iterator[Running]:
    alignment = {"layers": [0], "heads": [1]}
    manifest = served.manifest.model_copy(update={"alignment": alignment})
    with serving(dataclasses.replace(served, manifest=manifest, precision="int8")) as server:
        yield server


def test_the_model_describes_itself(running: Running, reversal: Reversal) -> None:
    found = running.stub.GetModel(pb.GetModelRequest(model="reversal"))
    assert found == running.stub.GetModel(pb.GetModelRequest())
    assert found.model == pb.ModelVersion(name="reversal", version="1")
    assert (found.task, found.architecture, found.precision, found.provider) == ("text", "transformer", "fp32", "cpu")
    assert (found.longest_source, found.longest_target) == (24, 20)
    shapes = {shape.family: (shape.layers, shape.heads) for shape in found.attention}
    assert shapes == {ENCODER: (2, 2), DECODER: (1, 2), CROSS: (1, 2)}
    training = reversal.manifest.provenance.training
    assert dict(found.quality) == {name: training[name] for name in ("loss", "bleu", "chrf")}
    assert not found.HasField("alignment")
    assert found.shortlist == 0


def test_the_heads_that_align_are_told_where_they_were_measured(aligned: Running) -> None:
    found = aligned.stub.GetModel(pb.GetModelRequest())
    assert found.alignment == pb.Alignment(layers=[0], heads=[1])
    assert found.precision == "int8"
