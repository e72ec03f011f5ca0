"""What our sampling draws from, beside Hugging Face's processors of logits and CTranslate2's draws."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.constraints import Constraints
from model.options import Sampling
from model.search import search
from model.steps import NO_FAMILIES
from model.torch_steps import TorchStepModel
from model.vocabulary import END
from tests.model.test_sampling import assert_distributed
from tests.peers.networks import VOCABULARY, network, options, sources

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'limelight[peers]'")
pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed: pip install 'limelight[peers]'")

import ctranslate2
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bench.peer_ctranslate2 import Peer
from tests.peers import hugging_face, translate

DRAWS = 1000
SAMPLINGS = {
    "as it is": Sampling(),
    "cold": Sampling(temperature=0.4),
    "hot": Sampling(temperature=3.0),
    "likeliest four": Sampling(top_k=4),
    "nucleus": Sampling(top_p=0.8),
    "small nucleus": Sampling(top_p=0.3),
    "likeliest of the nucleus": Sampling(top_k=6, top_p=0.9),
    "all together": Sampling(temperature=1.7, top_k=9, top_p=0.7),
}


class Recorder:
    """Stands in for random numbers: remembers with which probabilities it was to draw."""

    def __init__(self) -> None:
        self.probabilities = np.empty(0)

    def choice(self, count: int, p: np.ndarray[Any, Any]) -> int:
        assert len(p) == count
        self.probabilities = p
        return 0


@pytest.mark.parametrize("what", SAMPLINGS)
def test_the_probabilities_are_those_of_their_processors(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling, generator = SAMPLINGS[what], np.random.default_rng(3)
    for sharpness in (0.3, 1.0, 3.0, 8.0):
        for constrained in (False, True):
            scores = torch.from_numpy(generator.normal(0, sharpness, (1, VOCABULARY))).log_softmax(-1)
            read = generator.integers(4, 9, 5)
            chosen = options(
                sampling=sampling,
                **({"suppressed": frozenset({7, 30}), "shortest": 9, "no_repeat_ngram": 2} if constrained else {}),
            )
            values, ids = scores.sort(descending=True)
            constraints, recorder = Constraints(chosen, VOCABULARY), Recorder()
            monkeypatch.setattr(constraints, "_draw", recorder)
            constraints.apply(read[None], values.numpy().copy(), ids.numpy(), 0.0)
            expected = processors(sampling, constrained)(torch.from_numpy(read)[None], scores).softmax(-1)[0].numpy()
            found = np.zeros(VOCABULARY)
            found[: len(recorder.probabilities)] = recorder.probabilities
            np.testing.assert_allclose(found, np.sort(expected)[::-1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("what", SAMPLINGS)
def test_we_draw_as_their_processors_say(what: str) -> None:
    sampling = SAMPLINGS[what]
    chosen = [
        options(longest=2, prefix=(11,), sampling=Sampling(**vars(sampling) | {"seed": draw})) for draw in range(DRAWS)
    ]
    found = search(TorchStepModel(network("post", 2)), [sources()[1]] * DRAWS, chosen, NO_FAMILIES)
    counts = Counter(tuple(one.tokens[1:]) for (one,) in found)
    assert_distributed(counts, exact([11], sampling))


@pytest.mark.parametrize("what", SAMPLINGS)
def test_ctranslate2_draws_from_the_same(what: str, tmp_path: Path) -> None:
    sampling = SAMPLINGS[what]
    peer = translate.convert(network("post", 2), tmp_path)
    ctranslate2.set_random_seed(1)
    (found,) = peer.translate_batch(
        Peer.prepare([sources()[1]]),
        Peer.prepare([[11]]),
        beam_size=1,
        num_hypotheses=DRAWS,
        sampling_topk=sampling.top_k,
        sampling_topp=sampling.top_p,
        sampling_temperature=sampling.temperature,
        max_decoding_length=2,
        min_decoding_length=0,
        return_end_token=True,
    )
    counts = Counter(tuple(translate.ids(tokens)[1:]) for tokens in found.hypotheses)
    assert_distributed(counts, exact([11], sampling))


def exact(prefix: list[int], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of each token after a prefix of the second source, by their network and their processors."""
    logits = hugging_face.logits(hugging_face.convert(network("post", 2)), [sources()[1]], [prefix])[:, -1].double()
    left = processors(sampling, constrained=False)(torch.tensor([prefix]), logits).softmax(-1)[0]
    return {(token,): share for token, share in enumerate(left.tolist()) if share > 0}


def processors(sampling: Sampling, constrained: bool) -> Any:
    chain: list[Any] = []
    if constrained:
        chain += [NoRepeatNGramLogitsProcessor(2), MinNewTokensLengthLogitsProcessor(0, 8, END)]
        chain += [SuppressTokensLogitsProcessor([7, 30])]
    chain += [TemperatureLogitsWarper(sampling.temperature)]
    chain += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    chain += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList(chain)
