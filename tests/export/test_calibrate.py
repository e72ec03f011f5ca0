"""Ranges of activations: what real pairs show, rarest values cut off, padding left out."""

import numpy as np
import onnx
import pytest

from export.calibrate import _keep, _range, calibrate, renamed
from export.graphs import ExampleSizes, decoder_graph, encoder_graph
from export.optimise import optimise
from export.quantise import LEVELS, Ranges, product_inputs, quantise
from model.checkpoint import load_checkpoint
from model.errors import DataError
from model.pairs import Pair
from model.steps import Array
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


def test_padding_is_not_looked_at() -> None:
    found = {"x": np.array([[1.0], [2.0], [1e9], [3.0]], np.float32)}
    seen: dict[str, list[Array]] = {"x": []}
    _keep(seen, found, np.array([[True, True], [False, True]]))
    assert sorted(set(np.concatenate(seen["x"]).tolist())) == [1.0, 2.0, 3.0]


def test_a_sample_of_many_values_holds_the_extremes_and_every_column() -> None:
    found = {"x": np.arange(4096 * 128, dtype=np.float32).reshape(4096, 128)}
    seen: dict[str, list[Array]] = {"x": []}
    _keep(seen, found, np.ones((4096, 1), bool))
    values = np.concatenate(seen["x"])
    assert (values.min(), values.max()) == (0, 4096 * 128 - 1)
    assert set((values % 128).astype(int).tolist()) == set(range(128))


def test_pairs_that_do_not_fit_are_an_error_that_says_so(untied: Toy) -> None:
    with pytest.raises(DataError, match="none of 2 pairs has 2 to 512 tokens on either side"):
        ranges(untied, [Pair("a" * 500, "b"), Pair("a", "b" * 500)])


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


def test_ranges_of_one_graph_fit_another_with_the_same_products(tied: Toy, untied: Toy) -> None:
    for toy in (tied, untied):
        decoder = graphs(toy)["decoder"].graph
        step = onnx.ModelProto.FromString(toy.traced["SearchStep"])
        optimise(step, "carried.totals")
        assert [weights.tobytes() for weights in first_weights(decoder)] == [
            weights.tobytes() for weights in first_weights(step.graph)
        ]
        found = ranges(toy, PAIRS)["decoder"]
        assert list(renamed(found, decoder, step.graph).items()) == list(
            zip(product_inputs(step.graph), found.values(), strict=True)
        )


def first_weights(graph: onnx.GraphProto) -> list[Array]:
    """Of each of the inputs of products, the weights that it meets first."""
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    turned = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in values]
    values |= {node.output[0]: values[node.input[0]].T for node in turned}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in values]
    return [next(values[node.input[1]] for node in products if node.input[0] == name) for name in product_inputs(graph)]


def test_a_product_without_a_range_is_an_error(tied: Toy) -> None:
    model = graphs(tied)["encoder"]
    found = dict(ranges(tied, PAIRS)["encoder"])
    del found[product_inputs(model.graph)[0]]
    with pytest.raises(KeyError):
        quantise(model, found)
