"""Small random networks that two other libraries can be given, and what an answer of theirs is compared by."""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch

from model.config import ModelConfig
from model.search import Decoding, Hypothesis, SearchOptions, Sentence
from model.steps import NO_FAMILIES, Array, Family, StepModel, pad
from model.torch_steps import TorchStepModel
from model.transformer import Transformer
from model.vocabulary import BEGIN, END, PAD

SIZES = {"d_model": 32, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "feed_forward": 48}
KINDS: dict[str, dict[str, Any]] = {
    "post": {"norm": "post", "final_norm": False, "activation": "swish", "tied_embeddings": "none"},
    "pre": {"norm": "pre", "tied_embeddings": "all"},
    "plain": {"norm": "pre", "tied_embeddings": "none", "heads": 1, "decoder_layers": 1},
}
"""Architectures: Marian's, Pegasus's, and one whose cross-attention is a single matrix."""
SCALES = {"post": (0.7, 0.5, 1.0), "pre": (0.4, 2.0, 3.75), "plain": (0.4, 1.0, 1.0)}
"""Of embeddings, attention and output: so tokens, positions and source all matter, and few repeat one token."""
SEEDS = {"post": (2, 10, 28), "pre": (3, 9, 29), "plain": (14, 24, 39)}
"""Chosen because their answers are of many lengths."""
VOCABULARY = 40
LONGEST = 12

PREFIXES = [[5, 6], [7, 30], [11, 4], [39, 39], [20, 8], [1, 9]]
"""One for each of `sources`."""
NETWORKS = [(kind, seed) for kind, seeds in SEEDS.items() for seed in seeds]
SEARCHES = [
    {"beam_size": beam_size, "hypotheses": beam_size, "length_penalty": length_penalty}
    for beam_size, length_penalty in [(1, 1.0), (2, 0.6), (4, 1.0), (4, 0.0), (8, 2.0), (16, 1.0), (16, 0.6)]
]

TOLERANCES = {"logit": 1e-5, "log-probability": 2e-5, "score": 5e-5, "attention": 2e-5}
"""Largest differences from a peer; logits in float64, the rest in float32, where processors differ (of attention,
1.2e-5 was seen). A score is a total of up to twelve log-probabilities where the length does not count."""
CLEAR = 2e-5
"""Two candidates nearer than this may well change places between two ways to multiply the same matrices."""


@dataclass(frozen=True)
class Answer:
    """A hypothesis as a peer gives it."""

    tokens: list[int]
    score: float
    log_probabilities: list[float] | None = None


@functools.cache
def network(kind: str, seed: int, unwritable: float = -30.0) -> Transformer:
    """A network with answers of many lengths. Every parameter is random: zero biases would hide one that is left out.

    Args:
        kind: of `KINDS`.
        seed: another seed, another network.
        unwritable: logit of the padding and begin tokens. So low, they are out of the question, as in a trained
            network: not every peer can be told to leave them.
    """
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.model_validate(SIZES | KINDS[kind]), VOCABULARY, VOCABULARY).eval()
    tokens, attention, output = SCALES[kind]
    last: Any = model.decoder.norm if model.config.final_norm else model.decoder.layers[-1].feed_forward_residual.norm
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if "embedding" in name:
                parameter.mul_(tokens)
            elif "attention" in name and parameter.dim() == 2:
                parameter.mul_(attention)
        last.weight.mul_(output)
        last.bias.mul_(output)
        last.weight[0], last.bias[0] = 0.0, 1.0  # the output begins with a one, so the projection with a bias
        projection = model.decoder.projection.weight
        projection[:, 0] = 0.0
        projection[[PAD, BEGIN]] = 0.0
        projection[[PAD, BEGIN], 0] = unwritable
        projection[END, 0] = 2.0
    return model


def sources() -> list[list[int]]:
    """Of different lengths, so that a batch has padding."""
    generator = np.random.default_rng(0)
    return [[*generator.integers(4, VOCABULARY, length).tolist(), END] for length in (1, 5, 9, 3, 7, 2)]


def options(**choices: Any) -> SearchOptions:
    return SearchOptions(**{"longest": LONGEST, **choices})


class Watched(Decoding):
    """Notes by how much the closest choice of each sentence was made."""

    def __init__(self, model: StepModel, beam_size: int) -> None:
        super().__init__(model, beam_size)
        self.margins: dict[int, float] = {}

    def join(self, *arguments: Any, **choices: Any) -> list[Sentence]:
        joined = super().join(*arguments, **choices)
        self.margins = {id(sentence): np.inf for sentence in joined}
        return joined

    def _choose_one(self, values: Array, ids: Array) -> None:
        self._watch(values[:, None], ids[:, None])
        super()._choose_one(values, ids)

    def _choose(self, values: Array, ids: Array) -> None:
        self._watch(values, ids)
        super()._choose(values, ids)

    def _watch(self, values: Array, ids: Array) -> None:
        """Whether the last hypotheses that go on, or end, are well ahead of the next."""
        for place, sentence in enumerate(self.sentences):
            totals = self._totals[place, :, None] + values[place]
            for some in (totals.ravel(), totals[ids[place] != END]):
                ranked = np.sort(some[some > -np.inf])[::-1]
                ahead = ranked[self._width - 1] - ranked[self._width] if len(ranked) > self._width else np.inf
                self.margins[id(sentence)] = min(self.margins[id(sentence)], ahead)


class Found(NamedTuple):
    """What our search finds for some sentences."""

    best: list[list[Hypothesis]]
    margins: list[float]
    """By how much each sentence's closest choice was made."""
    sentences: list[Sentence]


def ours(
    model: Transformer | StepModel,
    chosen: SearchOptions,
    prefixes: Sequence[Sequence[int]] = (),
    read: Sequence[Sequence[int]] = (),
    attention: frozenset[Family] = NO_FAMILIES,
) -> Found:
    """Decode `sources`, or other ones that are given, each with a prefix of its own where there are any."""
    read = read or sources()
    each = [replace(chosen, prefix=tuple(prefix)) for prefix in prefixes] or [chosen] * len(read)
    steps = TorchStepModel(model) if isinstance(model, Transformer) else model
    decoding = Watched(steps, chosen.beam_size)
    sentences = decoding.join(
        steps.encode(*pad(read), attention=False), range(len(read)), each, [attention] * len(read)
    )
    while decoding.sentences:
        decoding.step()
    margins = []
    for sentence in sentences:
        scores = np.sort([score for score, _ in sentence._finished])[::-1][: chosen.hypotheses + 1]
        margins.append(min(decoding.margins[id(sentence)], -np.diff(scores).max(initial=-np.inf)))
    return Found([sentence.results() for sentence in sentences], margins, sentences)


def frequent(found: Found, count: int) -> frozenset[int]:
    """Tokens that these answers hold most often, but for the end token."""
    held = Counter(token for best in found.best for one in best for token in one.tokens if token != END)
    return frozenset(token for token, _ in held.most_common(count))


def tokens_of(found: Found) -> list[list[list[int]]]:
    return [[one.tokens for one in best] for best in found.best]


def plain(found: Found) -> list[list[Answer]]:
    return [[Answer(one.tokens, one.score, one.log_probabilities) for one in best] for best in found.best]


def assert_same(
    found: Found, expected: Sequence[Sequence[Answer]], converted: Sequence[Sequence[Answer]] | None = None
) -> None:
    """The same tokens in the same order, and the same scores and, where the peer gives them, log-probabilities.

    Sentences with a choice too close to call are left out.

    Args:
        found: by our search.
        expected: by a peer.
        converted: what we found, by the peer's way of scoring.
    """
    clear = [margin > CLEAR for margin in found.margins]
    assert sum(clear) > len(clear) / 2, f"too little is clear: {[f'{margin:.0e}' for margin in found.margins]}"
    for mine, theirs in zip(compress(converted or plain(found), clear), compress(expected, clear), strict=True):
        assert [one.tokens for one in mine] == [other.tokens for other in theirs]
        assert_near([one.score for one in mine], [other.score for other in theirs], "score")
        for one, other in zip(mine, theirs, strict=True):
            if one.log_probabilities is not None and other.log_probabilities is not None:
                assert_near(one.log_probabilities, other.log_probabilities, "log-probability")


def assert_near(found: Any, expected: Any, what: str) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    difference = np.abs(found - expected).max()
    assert difference <= TOLERANCES[what], f"{what}: the largest difference is {difference:.1e}"
