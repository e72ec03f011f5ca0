"""One graph that needs no decoder beside it: `generate.onnx`, token ids in, answers and cross-attention out.

    source_ids ── encoder ── memory ──┐
                                      ▼
    beam_size ── first beams ── Loop [ SearchStep ] ── final beams ── best answer ──► target_ids, scores
                                   │                                       ▼
                                   └── cross-attention of every step ── its rows ──► cross_attention

Encoder and step are traced modules; what stands before and after the Loop is written out here, in ONNX's own text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, compose, helper, numpy_helper, parser

from export.graph_bytes import OPSET
from export.graphs import ExampleSizes, Exported, memory_specs
from export.manifest import GraphSpec, TensorSpec
from export.onnx_writer import needed_alone, value_info
from export.search_step import Beams, SearchStep
from model.attention import KeyValue
from model.config import ModelConfig
from model.steps import Array
from model.transformer import Transformer
from model.vocabulary import BEGIN

GENERATE = "generate"
"""Name of the graph."""

CARRIED: dict[str, tuple[str, tuple[str, ...]]] = {
    "totals": ("float64", ("batch", "beam")),
    "read": ("int64", ("batch", "beam", "age")),
    "values": ("float32", ("batch", "beam", "age")),
    "rows": ("int64", ("batch", "beam", "age")),
    "visible": ("bool", ("batch", "beam", "past")),
    "score": ("float64", ("batch",)),
    "best_read": ("int64", ("batch", "age")),
    "best_values": ("float32", ("batch", "age")),
    "best_rows": ("int64", ("batch", "age")),
    "length": ("int64", ("batch",)),
    "finished": ("int64", ("batch",)),
    "done": ("bool", ("batch",)),
}
"""Type and axes of what goes from step to step, by its field of `Beams`; the states come after."""

FIRST = """
first () => () {
  batch = Shape <start = 0, end = 1> (source_ids)
  batch_one = Concat <axis = 0> (batch, one)
  beam = Reshape (beam_size, one)
  batch_beam = Concat <axis = 0> (batch, beam)
  batch_beam_one = Concat <axis = 0> (batch_beam, one)
  lanes = Range (zero, beam_size, one_scalar)
  alive = Equal (lanes, zero)
  first_lane = Where (alive, nothing, impossible)
  first_totals = Expand (first_lane, batch_beam)
  first_read = Expand (begin, batch_beam_one)
  first_values = Expand (zero_value, batch_beam_one)
  first_rows = Expand (zero, batch_beam_one)
  first_visible = Expand (no, batch_beam_one)
  first_score = Expand (impossible, batch)
  first_best_read = Expand (begin, batch_one)
  first_best_values = Expand (zero_value, batch_one)
  first_best_rows = Expand (zero, batch_one)
  first_length = Expand (zero, batch)
  first_finished = Expand (zero, batch)
  first_done = Expand (no, batch)
  column = Concat <axis = 0> (batch, heads_one_width)
  first_state = Expand (zero_state, column)
}
"""
"""Beams before the first step: of each sentence one row, which has read nothing but the begin token."""

LAST = """
last () => () {
  most = ReduceMax <keepdims = 1> (final_length)
  stop = Add (most, one)
  target_ids = Slice (final_best_read, one, stop, one)
  log_probabilities = Slice (final_best_values, one, stop, one)
  best_rows = Slice (final_best_rows, one, stop, one)
  score = Cast <to = 1> (final_score)
  most_scalar = Squeeze (most)
  times = Range (zero, most_scalar, one_scalar)
  batch_scalar = Squeeze (batch)
  sentences = Range (zero, batch_scalar, one_scalar)
  sentence_column = Unsqueeze (sentences, one)
  earlier = Mul (times, batch_scalar)
  places = Add (earlier, sentence_column)
  before = Mul (places, beam_size)
  look = Add (before, best_rows)
  look_shape = Shape <start = 3> (looks)
  flat_shape = Concat <axis = 0> (minus_one, look_shape)
  flat = Reshape (looks, flat_shape)
  followed = Gather (flat, look)
  lengths = Unsqueeze (final_length, one)
  real = Less (times, lengths)
  real_rows = Unsqueeze (real, last_three)
  honest = Where (real_rows, followed, zero_value)
  cross_attention = Transpose <perm = [0, 2, 3, 1, 4]> (honest)
}
"""
"""From the final beams to the answer: the begin token and columns after the longest answer go, and of every step's
cross-attention stays what the rows of the best hypothesis looked at."""


def search_step(model: Transformer, sizes: ExampleSizes) -> Exported:
    """The body of the Loop with its contract."""
    config = model.config
    example = {"batch": sizes.batch, "beam": sizes.query, "source": sizes.source, "past": sizes.past, "age": 4}
    carried, memory = [*_carried("carried"), *_state(config, "carried", "past")], memory_specs(config)
    mask = _spec("source_mask", "bool", "batch", "source")
    options = (_spec("longest", "int64"), _spec("length_penalty", "float32"))

    def of(spec: TensorSpec) -> torch.Tensor:
        shape = [axis if isinstance(axis, int) else example[axis] for axis in spec.axes]
        return torch.ones(shape, dtype=getattr(torch, spec.dtype))

    count = len(CARRIED)
    beams = Beams._make([*(of(spec) for spec in carried[:count]), [of(spec) for spec in carried[count:]]])
    arguments = (torch.tensor(3), beams, [of(spec) for spec in memory], of(mask), *(of(spec) for spec in options))
    following = [*_carried("next", "age_next", "past_next"), *_state(config, "next", "past_next")]
    cross = ("batch", "beam", config.decoder_layers, config.heads, "source")
    return Exported(
        SearchStep(model),
        arguments,
        (_spec("step", "int64", role="positions"), *carried, *memory, mask, *options),
        (
            _spec("going_on", "bool", role="wanted"),
            *following,
            _spec("look", "float32", *cross, role="cross_attention"),
        ),
    )


def generate_spec(file: str, config: ModelConfig) -> GraphSpec:
    """The graph as the manifest describes it."""
    cross = ("batch", config.decoder_layers, config.heads, "target", "source")
    return GraphSpec(
        file=file,
        inputs=(
            _spec("source_ids", "int64", "batch", "source"),
            _spec("source_mask", "bool", "batch", "source"),
            _spec("beam_size", "int64"),
            _spec("longest", "int64"),
            _spec("length_penalty", "float32"),
        ),
        outputs=(
            _spec("target_ids", "int64", "batch", "target"),
            _spec("log_probabilities", "float32", "batch", "target"),
            _spec("score", "float32", "batch"),
            _spec("cross_attention", "float32", *cross),
        ),
    )


def assemble(encoder: ModelProto, step: ModelProto, config: ModelConfig) -> ModelProto:
    """Put a traced encoder and a traced step, of any precision, into one graph.

    Args:
        encoder: from `export.graphs.encoder_graph`; left as it is.
        step: from `search_step`; left as it is.
        config: of the network.
    """
    head, body = _apart(encoder.graph, "encoder/"), _apart(step.graph, "step/")
    unwanted = {node.output[0] for node in needed_alone(head, "encoder_attention")}
    spec = generate_spec("", config)
    first, last = _parsed(FIRST), _parsed(LAST)
    constants = [numpy_helper.from_array(value, name) for name, value in _constants(config, _state_type(step)).items()]
    weights = _stored_once([*constants, *head.initializer, *body.initializer], [*head.node, *first, *body.node, *last])
    nodes = [node for node in head.node if node.output[0] not in unwanted]
    nodes += [*first, _loop(body, config), *last]
    graph = helper.make_graph(
        nodes, GENERATE, [value_info(one) for one in spec.inputs], [value_info(one) for one in spec.outputs], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=encoder.ir_version)


def save_generate(path: Path, model: ModelProto) -> None:
    """Write the graph, its weights inside."""
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _apart(graph: GraphProto, prefix: str) -> GraphProto:
    """A copy in which all names but those of inputs and outputs are its own."""
    return compose.add_prefix_graph(graph, prefix, rename_inputs=False, rename_outputs=False)


def _loop(body: GraphProto, config: ModelConfig) -> NodeProto:
    """The Loop; memory, mask and options its body reads from the graph around it, and so the weights."""
    states = [spec.name.removeprefix("carried.") for spec in _state(config, "carried", "past")]
    inner = helper.make_graph(
        body.node,
        "step",
        [
            *(value for value in body.input if value.name == "step"),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            *(value for value in body.input if value.name.startswith("carried.")),
        ],
        body.output,
    )
    return helper.make_node(
        "Loop",
        ["longest", "", *(f"first_{name}" for name in CARRIED), *("first_state" for _ in states)],
        [*(f"final_{name}" for name in (*CARRIED, *states)), "looks"],
        "search",
        body=inner,
    )


def _parsed(text: str) -> list[NodeProto]:
    return list(parser.parse_graph(text).node)


def _state_type(step: ModelProto) -> np.dtype[Any]:
    """Of the keys and values that a step carries."""
    kind = next(value for value in step.graph.input if value.name.startswith("carried.0.")).type.tensor_type.elem_type
    return helper.tensor_dtype_to_np_dtype(kind)


def _constants(config: ModelConfig, state: np.dtype[Any]) -> dict[str, Array]:
    return {
        "zero": np.array(0),
        "one_scalar": np.array(1),
        "one": np.array([1]),
        "minus_one": np.array([-1]),
        "last_three": np.array([2, 3, 4]),
        "begin": np.array(BEGIN),
        "no": np.array(False),
        "zero_value": np.array(0, np.float32),
        "zero_state": np.array(0, state),
        "nothing": np.array(0.0),
        "impossible": np.array(-np.inf),
        "heads_one_width": np.array([config.heads, 1, config.head_width]),
    }


def _stored_once(initializers: Sequence[TensorProto], nodes: Sequence[NodeProto]) -> list[TensorProto]:
    """One of each, as encoder and step may share a table; the nodes read that one from now on."""
    kept: dict[tuple[int, tuple[int, ...], bytes], TensorProto] = {}
    names = {}
    for tensor in initializers:
        content = numpy_helper.to_array(tensor).tobytes()
        names[tensor.name] = kept.setdefault((tensor.data_type, tuple(tensor.dims), content), tensor).name
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
    return list(kept.values())


def _spec(name: str, dtype: str, *axes: str | int, role: str | None = None) -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "role": role or name, "dtype": dtype, "axes": axes})


def _carried(prefix: str, age: str = "age", past: str = "past") -> list[TensorSpec]:
    renamed = {"age": age, "past": past}
    return [
        _spec(f"{prefix}.{name}", dtype, *(renamed.get(axis, axis) for axis in axes), role="state")
        for name, (dtype, axes) in CARRIED.items()
    ]


def _state(config: ModelConfig, prefix: str, past: str) -> list[TensorSpec]:
    axes = ("batch", config.heads, past, config.head_width)
    return [_spec(f"{prefix}.{name}", "float32", *axes, role="state") for name in _parts(config)]


def _parts(config: ModelConfig) -> list[str]:
    return [f"{layer}.{part}" for layer in range(config.decoder_layers) for part in KeyValue._fields]
