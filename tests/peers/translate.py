"""Our networks as CTranslate2's, which decodes them by itself.

Its options and ours, for version 4.8.5, beside what `bench.peer_ctranslate2` says:

- `min_decoding_length` leaves the end token out, so it is one less than `shortest`.
- What is ruled out loses its probability: log-probabilities are renormalised over the rest, and so are the scores by
  which beams are compared. Ours are the network's own.
- A prefix (`target_prefix`) counts for the length, but has log-probability 0. Ours counts for both. In the step after
  it, beam search takes an end token only if that is the best candidate of all.
- With a length penalty of 0 and no coverage penalty, beam search ends when the best candidate of all is an end token,
  however many hypotheses are finished. A length penalty of 1e-9 is as good as none and does not have this effect.
- Its coverage is of the attention that it returns: the mean over some heads of one layer, by default the first head of
  the last layer. In a batch, the first step of beam search takes that of another sentence (row i of batch * beam for
  sentence i), so coverage is right for one sentence at a time.
- At the length limit the `beam_size` best candidates become hypotheses; ours takes the live ones below them too, which
  cannot come among the n best unless a coverage penalty lifts them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2

from bench.peer_ctranslate2 import Peer, build_peer
from model.search import SearchOptions
from model.transformer import Transformer
from model.vocabulary import SPECIAL_TOKENS
from tests.peers.networks import Answer


def convert(model: Transformer, folder: Path) -> Any:
    """The same network, there."""
    build_peer(model, folder, "float32", 64)
    return ctranslate2.Translator(str(folder), device="cpu", compute_type="float32", inter_threads=1, intra_threads=1)


def decode(
    peer: Any,
    sources: Sequence[Sequence[int]],
    options: SearchOptions,
    prefixes: Sequence[Sequence[int]] = (),
) -> list[list[Answer]]:
    """Its n best answers to each source.

    Args:
        peer: what `convert` made.
        sources: token ids.
        options: what to decode by; its `prefix` is not read.
        prefixes: forced beginnings, one a source.

    Returns:
        Answers, with their prefix, and the peer's own scores.
    """
    found = peer.translate_batch(
        Peer.prepare(sources),
        Peer.prepare(prefixes) if prefixes else None,
        beam_size=options.beam_size,
        num_hypotheses=options.hypotheses,
        patience=1,
        length_penalty=options.length_penalty,
        coverage_penalty=options.coverage_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram,
        suppress_sequences=[[token] for token in Peer.prepare([sorted(options.suppressed)])[0]] or None,
        return_end_token=True,
        max_input_length=0,
        max_decoding_length=options.longest,
        min_decoding_length=options.shortest - 1,
        return_scores=True,
        return_attention=bool(options.coverage_penalty),  # greedy search crashes with the penalty alone
    )
    return [
        [Answer(ids(tokens), score) for tokens, score in zip(one.hypotheses, one.scores, strict=True)] for one in found
    ]


def score(peer: Any, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of each token of given targets, and of an end token after them."""
    found = peer.score_batch(Peer.prepare(sources), Peer.prepare(targets), max_input_length=0)
    return [list(one.log_probs) for one in found]


def ids(tokens: Sequence[str]) -> list[int]:
    """Ours, of its token strings."""
    return [int(token) if token.isdecimal() else SPECIAL_TOKENS.index(token) for token in tokens]
