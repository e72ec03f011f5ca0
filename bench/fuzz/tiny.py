"""The model that is served while it is fuzzed: an untrained one of width 16, so that what is sent is what costs.

    python -m bench.fuzz.tiny FOLDER

Writes FOLDER/checkpoint and FOLDER/bundle, with a shortlist, so that searches with one are let in too. What it answers
means nothing, but is always the same; some answers end by themselves, some at the longest length.
"""

import random
import sys
from pathlib import Path

import torch

from export.bundle import Shortlisting, export_bundle
from model.checkpoint import Checkpoint, build_model, save_checkpoint
from model.config import Config, parse_config
from model.pairs import Pair
from model.tokenizer import train_tokenizers

LETTERS = "abcdefghé漢😀'"
"""Of both vocabularies: of one to four bytes, and one that Unicode can also write as two code points."""

LONGEST_SOURCE, LONGEST_TARGET, SHORTLIST = 24, 16, 10

SPREAD = 2.0
"""By which random weights are enlarged: answers differ between sources, and no two are as likely as each other."""

PAIRS = 400
"""Random ones, that the shortlist is learnt from; a few of them compare the export with PyTorch."""


def configuration() -> Config:
    """Everything of the checkpoint but weights and tokenizers."""
    files = {"tsv": "pairs.tsv"}
    shape = {
        "d_model": 16,
        "heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "feed_forward": 32,
        "tied_embeddings": "none",
        "longest_source": LONGEST_SOURCE,
        "longest_target": LONGEST_TARGET,
    }
    values = {"name": "tiny", "data": {"kind": "pairs", "train": files, "validation": files}, "model": shape}
    return parse_config(values, "bench/fuzz/tiny.py")


def main(folder: Path) -> None:
    """Write checkpoint and bundle."""
    config, draw = configuration(), random.Random(0)
    texts = ["".join(draw.choices(LETTERS, k=draw.randint(1, 12))) for _ in range(PAIRS)]
    source, target = train_tokenizers(config.tokenizer, texts, texts)
    torch.manual_seed(0)
    model = build_model(config, source, target).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(SPREAD)
    checkpoint = Checkpoint(config=config, model=model, source=source, target=target, metrics={"update": 0})
    save_checkpoint(folder / "checkpoint", checkpoint)
    pairs = [Pair(text, text) for text in texts]
    export_bundle(folder / "checkpoint", folder / "bundle", pairs[:20], "1", shortlist=Shortlisting(SHORTLIST, pairs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
