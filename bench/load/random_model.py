"""An untrained model of the size of a small translation model: d 256, 3+3 layers, vocabulary 10,000.

    python -m bench.load.random_model FOLDER

Writes FOLDER/checkpoint, FOLDER/validation.tsv and FOLDER/sources.txt. A network of random weights never ends an answer
of itself, and answers of one length would hide what mixed lengths cost. So the end token's row of the output projection
points along slow sines of the position, into which the layers write little: its score rises with the length, and when
it wins depends on the source.
"""

import random
import sys
from pathlib import Path

import torch

from model.checkpoint import Checkpoint, build_model, save_checkpoint
from model.config import Config, parse_config
from model.tokenizer import Tokenizer, train_tokenizers
from model.transformer import Transformer
from model.vocabulary import BEGIN, END, PAD

VOCABULARY = 10_000
SOURCES = 2000
SHORTEST, LONGEST = 3, 50
"""Words of a source."""

SLOWEST, FASTEST = 1 / 60, 1 / 25
"""Radians a position of the sines that end an answer: they still rise where answers should end."""

RISE = 2.0
"""How steeply the end token's score rises."""

START = 0.4
"""How far below the other tokens it starts, as a share of the cosines."""

NOISE = 0.15
"""What the layers write into those dimensions, as a share of what they write elsewhere: it spreads the lengths."""


def configuration(folder: Path) -> Config:
    """Everything of the checkpoint but weights and tokenizers."""
    files = {"tsv": str((folder / "validation.tsv").absolute())}
    symbols = {"kind": "symbols", "vocabulary_size": VOCABULARY}
    shape = {
        "d_model": 256,
        "heads": 8,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "feed_forward": 1024,
        "tied_embeddings": "none",
        "longest_source": 64,
        "longest_target": 64,
    }
    values = {
        "name": "random",
        "task": "text",
        "data": {"kind": "pairs", "train": files, "validation": files},
        "tokenizer": {"source": symbols, "target": symbols},
        "model": shape,
    }
    return parse_config(values, "bench/load/random_model.py")


def draw_sources(generator: random.Random, words: list[str]) -> list[str]:
    """Sources whose lengths are spread as those of sentences are: many short ones, a long tail."""
    lengths = [min(max(round(generator.lognormvariate(2.8, 0.5)), SHORTEST), LONGEST) for _ in range(SOURCES)]
    return [" ".join(generator.choices(words, k=length)) for length in lengths]


def untrained(config: Config, source: Tokenizer, target: Tokenizer) -> Transformer:
    """A network that ends its answers."""
    torch.manual_seed(0)
    model = build_model(config, source, target).eval()
    width = config.model.d_model
    frequency = 10_000.0 ** (-2 * torch.arange(width // 2) / width)
    slow = ((frequency > SLOWEST) & (frequency < FASTEST)).float()
    share = torch.cat((1 - (1 - NOISE) * slow, torch.ones(width // 2)))
    with torch.no_grad():
        table = model.decoder.projection.weight
        table.normal_(std=width**-0.5)
        table[[PAD, BEGIN]] = 0.0  # never the best: the search would leave them out, other decoders would not
        table[END] = RISE * torch.cat((slow, -START * slow))
        model.decoder.embedding.tokens.weight.mul_(share)
        for name, parameter in model.decoder.named_parameters():
            if name.endswith(("output.weight", "outer.weight")):
                parameter.mul_(share[:, None])
    return model


def main(folder: Path) -> None:
    """Write checkpoint, validation pairs and sources."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"w{index}" for index in range(VOCABULARY - 4)]  # the four special tokens fill it up
    config = configuration(folder)
    source, target = train_tokenizers(config.tokenizer, words, words)
    sources = draw_sources(random.Random(0), words)
    (folder / "sources.txt").write_text("\n".join(sources) + "\n", encoding="utf-8")
    pairs = "".join(f"{text}\t{text}\n" for text in sources[:20])
    (folder / "validation.tsv").write_text(pairs, encoding="utf-8")
    model = untrained(config, source, target)
    checkpoint = Checkpoint(config=config, model=model, source=source, target=target, metrics={"update": 0})
    save_checkpoint(folder / "checkpoint", checkpoint)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
