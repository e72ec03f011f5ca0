"""The physical limit, counted by hand for a network small enough."""

import pytest

from bench.limit import Batch, Network, Rates, limit_seconds, measure_rates
from model.config import ModelConfig
from model.transformer import Transformer

NETWORK = Network(d_model=4, feed_forward=8, encoder_layers=2, decoder_layers=1, target_vocabulary=10)
ENCODER = 2 * (4 * 16 + 2 * 32) + 2 * 16
DECODER = (6 * 16 + 2 * 32) + 40

ENDLESS = 1e30


def rates(bandwidth: float = ENDLESS, matrix: float = ENDLESS, float32: float = ENDLESS) -> Rates:
    return Rates(bandwidth=bandwidth, matrix=matrix, float32=float32)


def test_weights_are_those_of_the_network() -> None:
    config = ModelConfig(d_model=4, heads=2, encoder_layers=2, decoder_layers=1, feed_forward=8, tied_embeddings="none")
    model = Transformer(config, 7, 10)
    matrices = {name: weight.numel() for name, weight in model.named_parameters() if weight.dim() == 2}
    kept = sum(count for name, count in matrices.items() if "embedding" not in name)
    assert (NETWORK.encoder_weights, NETWORK.decoder_weights) == (ENCODER, DECODER)
    assert kept == ENCODER + DECODER


def test_a_step_reads_its_weights() -> None:
    batch = Batch([3], [5])
    assert limit_seconds(NETWORK, batch, 1, "float32", rates(bandwidth=1)) == 4 * (ENCODER + 5 * DECODER)
    assert limit_seconds(NETWORK, batch, 1, "int8", rates(bandwidth=1)) == ENCODER + 5 * DECODER


@pytest.mark.parametrize(("beam", "rows"), [(1, 2 + 2 + 1), (4, 2 + 4 * 2 + 4)])
def test_a_step_multiplies_the_rows_that_are_left(beam: int, rows: int) -> None:
    batch = Batch([3, 4], [2, 3])
    found = limit_seconds(NETWORK, batch, beam, "int8", rates(matrix=1))
    assert found == pytest.approx(7 * ENCODER + rows * DECODER)


def test_attention_is_counted_at_the_float32_rate() -> None:
    found = limit_seconds(NETWORK, Batch([3], [2]), 1, "int8", rates(float32=1))
    assert found == pytest.approx(2 * 2 * 4 * 9 + 2 * 4 * ((3 + 1) + (3 + 2)))


def test_the_longer_time_counts_in_each_pass() -> None:
    # Reading is the longer one for the decoder's single row, multiplying for the encoder's three.
    found = limit_seconds(NETWORK, Batch([3], [1]), 1, "int8", rates(bandwidth=1, matrix=0.5))
    assert found == pytest.approx(max(ENCODER, 3 * ENCODER / 0.5) + max(DECODER, DECODER / 0.5))
    found = limit_seconds(NETWORK, Batch([3], [1]), 1, "int8", rates(bandwidth=1, matrix=2))
    assert found == pytest.approx(3 * ENCODER / 2 + DECODER)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_rates_are_measured(precision: str) -> None:
    found = measure_rates(precision, 100_000, threads=1, seconds=0.01)
    assert min(found.bandwidth, found.matrix, found.float32) > 1e6
    assert (found.matrix == found.float32) == (precision == "float32")
