"""How fast decoding could be on this machine at most: its physical limit, from two rates that are measured in the run.

A step can be no faster than its weights can be read, and no faster than its products can be multiplied and added. Its
limit is the longer of the two times; a batch's limit is the sum over its encoder pass and its steps.

- *Bytes*: every matrix that the pass multiplies by, once, at 4 bytes a weight in float32 and 1 in int8. The embedding
  tables are looked up, not read; keys, values, scales, biases and norms are left out.
- *Bandwidth*: the best rate at which a buffer as large as those weights is read again and again. Where the weights fit
  into a cache, so does the buffer: the limit is that of this machine, not of its slowest memory.
- *Multiply-adds*: real tokens times weights, padding left out; and the two products of each attention, counted at the
  float32 rate in both precisions, as both engines compute them.
- *Matrix rate*: the best run of a large product, 256 x 1024 x 1024, in ONNX Runtime (for float32 in numpy too).

Rows are those of the best answers: a sentence takes part as long as its answer, with `beam` rows after the first step.
What a search does after its best answer is finished is not counted, nor is the choice of the best tokens, so the limit
is on the low side, and so is an engine's share of it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

WEIGHT_BYTES = {"float32": 4, "int8": 1}

ROWS, INNER, OUTER = 256, 1024, 1024
"""Sizes of the products that give the matrix rate: large enough to be bound by arithmetic, small enough for a cache."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Sizes of a Transformer, and what they amount to."""

    d_model: int
    feed_forward: int
    encoder_layers: int
    decoder_layers: int
    target_vocabulary: int

    @property
    def encoder_weights(self) -> int:
        """Matrix elements that a source token is multiplied by, the decoder's cross keys and values among them."""
        layer = 4 * self.d_model**2 + 2 * self.d_model * self.feed_forward
        return self.encoder_layers * layer + self.decoder_layers * 2 * self.d_model**2

    @property
    def decoder_weights(self) -> int:
        """Matrix elements that a target token is multiplied by, the output projection among them."""
        layer = 6 * self.d_model**2 + 2 * self.d_model * self.feed_forward
        return self.decoder_layers * layer + self.d_model * self.target_vocabulary


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the machine can do with so many threads."""

    bandwidth: float
    """Bytes/s."""
    matrix: float
    """Multiply-adds/s in the precision of the weights."""
    float32: float
    """Multiply-adds/s in float32."""


@dataclass(frozen=True)
class Batch:
    """Lengths of sentences that are decoded together, their end tokens counted."""

    sources: Sequence[int]
    targets: Sequence[int]


def limit_seconds(network: Network, batch: Batch, beam: int, precision: str, rates: Rates) -> float:
    """The least time in which a batch can be decoded, counted as this module's description says."""
    size = WEIGHT_BYTES[precision]
    encoder_attention = sum(2 * network.d_model * length**2 for length in batch.sources) * network.encoder_layers
    seconds = _pass_seconds(network.encoder_weights, sum(batch.sources), encoder_attention, size, rates)
    for position in range(max(batch.targets)):
        seen = [
            source + position + 1
            for source, target in zip(batch.sources, batch.targets, strict=True)
            if target > position
        ]
        beams = beam if position else 1
        attention = 2 * network.d_model * sum(seen) * beams * network.decoder_layers
        seconds += _pass_seconds(network.decoder_weights, len(seen) * beams, attention, size, rates)
    return seconds


def _pass_seconds(weights: int, rows: int, attention: int, size: int, rates: Rates) -> float:
    return max(weights * size / rates.bandwidth, weights * rows / rates.matrix + attention / rates.float32)


def measure_rates(precision: str, weight_bytes: int, threads: int, seconds: float = 0.3) -> Rates:
    """Measure this machine.

    Args:
        precision: "float32" or "int8".
        weight_bytes: size of what a step reads.
        threads: threads of ONNX Runtime; those of numpy's library are set by its environment.
        seconds: time for each kernel; its best run counts, since others can only slow it down.
    """
    float32 = max(_rate(_numpy_product(), seconds), _rate(_product("float32", threads), seconds)) * ROWS * INNER * OUTER
    matrix = float32 if precision == "float32" else _rate(_product("int8", threads), seconds) * ROWS * INNER * OUTER
    columns = max(1, weight_bytes // (4 * INNER))
    readers = (_numpy_reader(weight_bytes), _reader(columns, threads))
    bandwidth = max(_rate(reader, seconds) for reader in readers) * 4 * INNER * columns
    return Rates(bandwidth=bandwidth, matrix=matrix, float32=float32)


def _rate(kernel: Callable[[], object], seconds: float) -> float:
    """Runs a second of the fastest run."""
    kernel()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        begun = time.perf_counter()
        kernel()
        now = time.perf_counter()
        best = min(best, now - begun)
        if now > end:
            return 1 / best


def _numpy_product() -> Callable[[], object]:
    left, right = np.ones((ROWS, INNER), np.float32), np.ones((INNER, OUTER), np.float32)
    return lambda: left @ right


def _numpy_reader(size: int) -> Callable[[], object]:
    left, right = np.ones((2, max(1, size // 8)), np.float32)  # a dot product reads both once, and writes nothing
    return lambda: left.dot(right)


def _product(precision: str, threads: int) -> Callable[[], object]:
    random = np.random.default_rng(0)
    if precision == "int8":
        left = random.integers(0, 128, (ROWS, INNER), np.uint8)
        weights = random.integers(-64, 64, (INNER, OUTER), np.int8)
        return _kernel("MatMulInteger", left, weights, TensorProto.INT32, threads)
    left, weights = np.ones((ROWS, INNER), np.float32), np.ones((INNER, OUTER), np.float32)
    return _kernel("MatMul", left, weights, TensorProto.FLOAT, threads)


def _reader(columns: int, threads: int) -> Callable[[], object]:
    left, weights = np.ones((1, INNER), np.float32), np.ones((INNER, columns), np.float32)
    return _kernel("MatMul", left, weights, TensorProto.FLOAT, threads)


def _kernel(
    operator: str, left: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], result: int, threads: int
) -> Callable[[], object]:
    """One product in ONNX Runtime with a constant right side, as weights are."""
    inputs = [helper.make_tensor_value_info("left", helper.np_dtype_to_tensor_dtype(left.dtype), left.shape)]
    outputs = [helper.make_tensor_value_info("product", result, (left.shape[0], weights.shape[1]))]
    node = helper.make_node(operator, ["left", "weights"], ["product"])
    graph = helper.make_graph([node], "product", inputs, outputs, [numpy_helper.from_array(weights, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda: session.run(None, {"left": left})
