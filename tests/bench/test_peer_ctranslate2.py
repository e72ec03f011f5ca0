"""CTranslate2 with our weights decodes what our search decodes, whatever the configuration."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.search import SearchOptions, search
from model.torch_steps import TorchStepModel
from model.transformer import Transformer
from model.vocabulary import BEGIN, END, PAD

pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed: pip install 'limelight[bench]'")

from bench.peer_ctranslate2 import Peer, build_peer

CHOICES: dict[str, dict[str, Any]] = {
    "pre": {"encoder_layers": 2, "decoder_layers": 1},
    "post": {"norm": "post", "final_norm": False, "positions": "interleaved", "activation": "gelu"},
    "post with a final norm": {"norm": "post", "activation": "swish", "tied_embeddings": "none"},
    "unscaled": {"embedding_scale": False, "tied_embeddings": "all"},
}
SIZES = {"d_model": 16, "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "feed_forward": 24}
VOCABULARY = 30
LONGEST = 12
TOLERANCES = {"score": 1e-5}
"""Largest differences from PyTorch, of scores down to -5; 2.1e-6 was measured."""


def network(name: str) -> Transformer:
    """Every parameter is random: zero biases and unit norms would hide one that is left out."""
    torch.manual_seed(5)
    model = Transformer(ModelConfig.model_validate(SIZES | CHOICES[name]), VOCABULARY, VOCABULARY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.decoder.projection.weight[[PAD, BEGIN]] *= 0.01  # ours does not write them
        model.decoder.projection.weight[END] *= 3  # often enough the best, and often the worst
    return model


def sources() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [[*generator.integers(4, VOCABULARY, length).tolist(), END] for length in (1, 5, 9, 3, 7, 2, 11, 4)]


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("length_penalty", [1.0, 0.6])
@pytest.mark.parametrize("name", CHOICES)
def test_same_tokens_and_scores(name: str, length_penalty: float, beam_size: int, tmp_path: Path) -> None:
    model = network(name)
    build_peer(model, tmp_path / "peer", "float32", 32)
    peer = Peer(tmp_path / "peer", "float32", threads=1)
    options = SearchOptions(longest=LONGEST, beam_size=beam_size, length_penalty=length_penalty)
    expected = search(TorchStepModel(model), sources(), [options] * len(sources()))
    found = peer.decode(
        peer.prepare(sources()),
        beam_size=beam_size,
        longest=LONGEST,
        length_penalty=length_penalty,
        attention="none",
        scores=True,
    )
    assert peer.answers(found) == [hypotheses[0].tokens for hypotheses in expected]
    differences = np.abs(np.array(peer.scores(found)) - [hypotheses[0].score for hypotheses in expected])
    assert differences.max() <= TOLERANCES["score"], f"the largest difference is {differences.max():.1e}"


def test_some_answers_end_and_some_reach_the_limit() -> None:
    reasons = {
        hypotheses[0].finish_reason
        for name in CHOICES
        for hypotheses in search(
            TorchStepModel(network(name)), sources(), [SearchOptions(longest=LONGEST)] * len(sources())
        )
    }
    assert reasons == {"stop", "length"}


def test_quantising_leaves_our_weights_alone(tmp_path: Path) -> None:
    model = network("pre")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    build_peer(model, tmp_path / "peer", "int8", 32)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    peer = Peer(tmp_path / "peer", "int8", threads=1)
    found = peer.decode(peer.prepare(sources()), beam_size=1, longest=3, length_penalty=1.0, attention="cross")
    assert len(peer.answers(found)) == len(sources())
