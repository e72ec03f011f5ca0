"""What `bench.decode` decodes: a trained model and random ones, each with a bundle, CTranslate2 models and sources.

Random weights never end a sentence sensibly by themselves, and CTranslate2 takes one length limit a call, not one a
sentence. So the random networks are made to end by themselves, on both sides alike: eight dimensions of the decoder
carry nothing but slow sinusoids of the position (nothing else writes to them), and the end token's weights read them.
Its score rises until it passes the best of the others, sooner or later in each sentence as its other weights, which
are as random as theirs, have it. Lengths then spread around 25 tokens, and `prepare` checks that they do.
"""

import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.grid import BenchError
from bench.limit import Network
from export.bundle import export_bundle
from model.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from model.config import Cmudict07bData, CmudictData, Config, Data, parse_config
from model.pairs import Pair, read_pairs, sample_pairs
from model.search import SearchOptions, search
from model.tokenizer import train_tokenizers
from model.torch_steps import TorchStepModel
from model.transformer import Transformer
from model.vocabulary import BEGIN, END, PAD

SENTENCES = 64
"""Sources of each model."""

VERIFIED = 1000
"""Validation sources of the trained model that its export is verified on."""

LONGEST = 100
"""Length limit of the random models: far enough that none of their sentences reaches it."""

MIDDLE = 24
"""Position at which the end token's score is level with the best of the others, on average."""

PERIOD = 320
"""Positions in a period of the slow sinusoids: they rise for a quarter of it, so for longer than any sentence."""

CLOCK = 8
"""Dimensions that carry them."""


@dataclass(frozen=True, kw_only=True)
class RandomSize:
    """Size of a random model."""

    d_model: int
    layers: int
    """Of the encoder, and as many of the decoder."""
    vocabulary: int = 10_000
    sharpness: float = 3.0
    """Standard deviation of the logits: about that of trained models, so that beams are not all ties."""

    @property
    def name(self) -> str:
        """What the rows call it."""
        return f"random-d{self.d_model}-{self.layers}-{self.layers}"


SIZES = {"d256": RandomSize(d_model=256, layers=3), "d512": RandomSize(d_model=512, layers=6, sharpness=2.0)}
"""The random models of the grid. Logits of the larger one, as sharp as the other's, lose more than an export may."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model that is ready to be decoded by both sides."""

    name: str
    """What the rows call it."""
    folder: Path
    sources: list[list[int]]
    """Token ids, an end token last in each."""
    longest: int
    """Length limit of the search."""
    network: Network
    """Its sizes."""

    @property
    def bundle(self) -> Path:
        """Our side."""
        return self.folder / "bundle"

    def peer(self, precision: str) -> Path:
        """CTranslate2's model."""
        return self.folder / f"ctranslate2-{precision}"


def prepare_random(
    size: RandomSize, folder: Path, told: Callable[[str], None], *, peers: bool = True, fp16: bool = False
) -> Prepared:
    """Make, export and convert a random model, unless that was done since the code last changed.

    Args:
        size: of the model.
        folder: where to.
        told: told what is being done.
        peers: convert it for CTranslate2 too.
        fp16: export float16 too.

    Raises:
        BenchError: its answers are not of realistic lengths.
    """
    origin = folder / "checkpoint"
    if not _is_fresh(folder, ()):
        told(f"{size.name}: making it")
        checkpoint = random_checkpoint(size)
        sources = random_sources(size.vocabulary)
        check_lengths(size.name, checkpoint.model, sources[: SENTENCES // 4])
        save_checkpoint(origin, checkpoint)
        # No answer resembles these targets, so int8 is not held to a metric that random answers cannot have.
        pairs = [Pair(checkpoint.source.decode(source), "☃") for source in sources[:4]]
        _export(origin, folder, pairs, size.name, told, fp16=fp16)
        _write(folder, checkpoint, size.name, sources, LONGEST, peers=peers)
    return _read(folder)


def prepare_trained(checkpoint_folder: Path, folder: Path, told: Callable[[str], None]) -> Prepared:
    """Export and convert a checkpoint, unless that was done since it or the code last changed."""
    if not _is_fresh(folder, checkpoint_folder.iterdir()):
        checkpoint = load_checkpoint(checkpoint_folder)
        name = checkpoint.config.name
        data = built_in(checkpoint.config.data)
        pairs = sample_pairs(read_pairs(data, "validation").pairs, VERIFIED)
        _export(checkpoint_folder, folder, pairs, name, told)
        _write(folder, checkpoint, name, trained_sources(checkpoint, data), checkpoint.config.model.longest_target)
    return _read(folder)


def built_in(data: Data) -> Data:
    """The data of a checkpoint, or the built-in dictionary in place of the published split, which may not be here."""
    return CmudictData() if isinstance(data, Cmudict07bData) else data


def trained_sources(checkpoint: Checkpoint, data: Data) -> list[list[int]]:
    """Sources drawn from the test part, or where there is none from the validation part."""
    part: Any = "validation" if getattr(data, "test", data) is None else "test"
    texts = sorted({pair.source for pair in read_pairs(data, part).pairs})
    encoded = checkpoint.source.encode_ids(random.Random(0).sample(texts, len(texts)))
    fitting = [ids for ids in encoded if len(ids) <= checkpoint.config.model.longest_source][:SENTENCES]
    if len(fitting) < SENTENCES:
        raise BenchError(f"{checkpoint.config.name}: its {part} data holds {len(fitting)} sources, {SENTENCES} needed")
    return fitting


def random_sources(vocabulary: int) -> list[list[int]]:
    """Sentences of random tokens, of log-normal lengths as real ones are: 4 to 60, with 20 in the middle."""
    generator = random.Random(0)
    lengths = [min(60, max(4, round(generator.lognormvariate(math.log(20), 0.4)))) for _ in range(SENTENCES)]
    return [[*(generator.randrange(END + 1, vocabulary) for _ in range(length - 1)), END] for length in lengths]


def random_checkpoint(size: RandomSize) -> Checkpoint:
    """A network with random weights that ends its sentences; equal for equal sizes."""
    config = random_config(size)
    words = " ".join(f"w{index}" for index in range(END + 1, size.vocabulary))
    source, target = train_tokenizers(config.tokenizer, [words], [words])
    torch.manual_seed(1)
    model = build_model(config, source, target).eval()
    end_by_position(model, size.sharpness)
    return Checkpoint(config=config, model=model, source=source, target=target, metrics={})


def random_config(size: RandomSize) -> Config:
    """Its configuration: heads of 64 dimensions and a feed-forward network four times as wide, as in the paper."""
    shape = {
        "d_model": size.d_model,
        "heads": max(1, size.d_model // 64),
        "encoder_layers": size.layers,
        "decoder_layers": size.layers,
        "feed_forward": 4 * size.d_model,
        "tied_embeddings": "none",  # a tied projection of random weights repeats what it reads
        "longest_source": 2 * LONGEST,
        "longest_target": 2 * LONGEST,
    }
    tokens = {"shared": True, "source": {"kind": "symbols"}}
    return parse_config({"name": size.name, "model": shape, "tokenizer": tokens}, "bench")


@torch.no_grad()
def end_by_position(model: Transformer, sharpness: float) -> None:
    """Give the output projection sharp logits, and an end token whose score rises with the position."""
    d_model, weights = model.config.d_model, model.decoder.projection.weight
    # The frequency of dimension i is 10000^(-2i / d_model): this one has the period that is wanted.
    middle = round(math.log(PERIOD / (2 * math.pi)) / math.log(10_000) * d_model / 2)
    clock = slice(middle - CLOCK // 2, middle + CLOCK // 2)
    model.decoder.embedding.tokens.weight[:, clock] = 0
    for name, weight in model.decoder.named_parameters():
        if name.endswith(("attention.output.weight", "feed_forward.outer.weight")):
            weight[clock] = 0
    weights.normal_(std=sharpness * d_model**-0.5)
    weights[[PAD, BEGIN]] = 0  # never the best: ours does not write them, and CTranslate2 must not either
    own = weights[END].clone()
    weights[END] = 0
    weights[END, clock] = 1
    ids = torch.randint(END + 1, len(weights), (8, MIDDLE + 1))
    logits = model(ids, torch.ones_like(ids, dtype=torch.bool), ids).logits[:, MIDDLE]
    own[clock] += logits.amax(-1).mean() / logits[:, END].mean()
    weights[END] = own


def check_lengths(name: str, model: Transformer, sources: list[list[int]]) -> None:
    """Decode some sources greedily, and refuse lengths that are all alike, tiny, or up to the limit.

    Raises:
        BenchError: with the lengths.
    """
    found = search(TorchStepModel(model), sources, [SearchOptions(longest=LONGEST)] * len(sources))
    lengths = sorted(len(hypotheses[0].tokens) for hypotheses in found)
    low, middle, high = statistics.quantiles(lengths, n=4)
    if not (lengths[0] > 2 and lengths[-1] < LONGEST and 10 < middle < 50 and high - low >= 2):
        raise BenchError(f"{name}: its answers have unrealistic lengths, {lengths}: change MIDDLE or PERIOD")


def _export(
    checkpoint: Path, folder: Path, pairs: list[Pair], name: str, told: Callable[[str], None], *, fp16: bool = False
) -> None:
    export_bundle(checkpoint, folder / "bundle", pairs, progress=lambda what, _: told(f"{name}: {what}"), fp16=fp16)


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    name: str,
    sources: list[list[int]],
    longest: int,
    *,
    peers: bool = True,
) -> None:
    shape = checkpoint.config.model
    network = Network(
        d_model=shape.d_model,
        feed_forward=shape.feed_forward,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        target_vocabulary=len(checkpoint.target),
    )
    prepared = Prepared(name=name, folder=folder, sources=sources, longest=longest, network=network)
    positions = 1 + max(longest, *map(len, sources))
    for precision in ("float32", "int8") if peers else ():
        from bench.peer_ctranslate2 import build_peer

        build_peer(checkpoint.model, prepared.peer(precision), precision, positions)
    # Last: with this file there, all of it is.
    _summary(folder).write_text(json.dumps(asdict(prepared) | {"folder": folder.name}) + "\n", encoding="utf-8")


def _read(folder: Path) -> Prepared:
    values = json.loads(_summary(folder).read_text(encoding="utf-8"))
    return Prepared(**values | {"folder": folder, "network": Network(**values["network"])})


def _summary(folder: Path) -> Path:
    return folder / "prepared.json"


def _is_fresh(folder: Path, sources: Iterator[Path] | tuple[()]) -> bool:
    # Like make: an engine that is being worked on must not be measured with a bundle of yesterday's exporter.
    made = _summary(folder)
    root = Path(__file__).parent.parent
    code = [path for package in ("model", "export") for path in (root / package).glob("*.py")]
    needed = [*sources, *code, Path(__file__), root / "bench" / "peer_ctranslate2.py"]
    return made.is_file() and all(path.stat().st_mtime < made.stat().st_mtime for path in needed)
