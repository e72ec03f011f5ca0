"""Ranges of activations: what real pairs show, rarest values cut off, padding left out."""

import numpy as np
import onnx
import pytest

from export.calibrate import _range, calibrate, renamed
from export.graphs import ExampleSizes, decoder_graph, encoder_graph
from export.optimise import optimise
from export.quantise import LEVELS, Ranges, product_inputs, quantise
from model.checkpoint import load_checkpoint
from model.pairs import Pair
from tests.export.toy import PAIRS, Toy


def graphs(toy: Toy) -> dict[str, onnx.ModelProto]:
    found = {}
    for name, like in (("Encoder", "source_ids"), ("Decoder", "target_ids")):
        model = onnx.ModelProto.FromString(toy.traced[f"{name}Graph"])
        optimise(model, like)
        found[name.lower()] = model
    return found


def ranges(toy: Toy, pairs: list[Pair]) -> dict[str, Ranges]:
    checkpoint = load_checkpoint(toy.checkpoint)
    sizes = ExampleSizes()
    contracts = {
        "encoder": encoder_graph(checkpoint.model, len(checkpoint.source), sizes),
        "decoder": decoder_graph(checkpoint.model, len(checkpoint.target), sizes),
    }
    return calibrate(graphs(toy), contracts, checkpoint, pairs)


def test_every_input_of_a_product_gets_a_range_with_zero_inside(tied: Toy, untied: Toy) -> None:
    for toy in (tied, untied):
        found = ranges(toy, PAIRS)
        for name, model in graphs(toy).items():
            assert list(found[name]) == product_inputs(model.graph)
            assert all(low <= 0 <= high and low < high for low, high in found[name].values())


def test_padding_is_not_looked_at(untied: Toy) -> None:
    """A short pair beside a long one gives what it gives alone, joined to what the long one gives alone."""
    long, short = Pair("quick brown fox jumps over", "lazy dog"), Pair("a", "b")
    alone = [ranges(untied, [pair])["encoder"] for pair in (long, short)]
    together = ranges(untied, [long, short])["encoder"]
    for name, (low, high) in together.items():
        assert low >= min(one[name][0] for one in alone) * 1.6
        assert high <= max(one[name][1] for one in alone) * 1.6


def test_long_tails_are_cut_off_and_short_ones_kept() -> None:
    random = np.random.default_rng(0)
    even = random.uniform(-1, 2, 20_000)
    low, high = _range(even)
    assert low == pytest.approx(-1, abs=0.05)
    assert high == pytest.approx(2, abs=0.1)
    tailed = random.laplace(size=100_000)
    assert _range(tailed)[1] < 0.95 * tailed.max()
    assert _range(np.zeros(3)) == (0.0, 1.0)


def test_the_range_chosen_rounds_better_than_the_full_one() -> None:
    values = np.random.default_rng(1).laplace(size=100_000)

    def error(low: float, high: float) -> float:
        step = (high - low) / LEVELS
        return float(np.square(np.rint((values.clip(low, high) - low) / step) * step + low - values).mean())

    assert error(*_range(values)) < error(values.min(), values.max())


def test_ranges_of_one_graph_fit_another_with_the_same_products(tied: Toy) -> None:
    decoder = graphs(tied)["decoder"].graph
    step = onnx.ModelProto.FromString(tied.traced["SearchStep"])
    optimise(step, "carried.totals")
    found = ranges(tied, PAIRS)["decoder"]
    assert list(renamed(found, decoder, step.graph).values()) == list(found.values())
    assert list(renamed(found, decoder, step.graph)) == product_inputs(step.graph)


def test_a_product_without_a_range_is_an_error(tied: Toy) -> None:
    model = graphs(tied)["encoder"]
    found = dict(ranges(tied, PAIRS)["encoder"])
    del found[product_inputs(model.graph)[0]]
    with pytest.raises(KeyError):
        quantise(model, found)
