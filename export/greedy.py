"""Several greedy steps in one call: the decoder graph as the body of a Loop.

    target_ids ──► Loop [ decoder ── best candidates ── the likeliest that may be written ]──► chosen_ids, next.*
                     ▲                                          │
                     └────── ids, positions, visible, state ◄───┘    until `steps`, or no more than `fewest` go on

A short step costs less than what surrounds it: the call, its inputs and outputs, and the choice in Python. The body is
the finished decoder of any architecture and precision, put in by the roles of its inputs and outputs; its weights are
the decoder's own.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper, parser

from export.graph_bytes import OPSET
from export.graphs import Exported
from export.manifest import TensorSpec
from export.onnx_writer import switch, value_info
from export.optimise import drop_unused, reads_of
from model.options import UNWRITABLE
from model.steps import Array
from model.vocabulary import END

GREEDY = "greedy"
"""Name of the graph."""

KEPT = ("target_ids", "positions", "past_visible", "source_mask", "memory", "state")
"""Roles of the decoder's inputs that this graph has too."""

CHOICE = """
choice () => () {
  allowed = Gather (writable, step_top_ids)
  masked = Add (step_top_log_probabilities, allowed)
  value, rank = TopK (masked, one)
  id = GatherElements <axis: int = 2> (step_top_ids, rank)
  next_ids = Squeeze (id, two)
  chosen = Squeeze (value, two)
  ended = Equal (next_ids, end)
  going_on = Not (ended)
  next_live = And (live, going_on)
  live_count = Cast <to: int = 7> (next_live)
  count = ReduceSum <keepdims: int = 0> (live_count)
  next_going = Greater (count, fewest)
  next_positions = Add (now_positions, one)
  next_visible = Concat <axis: int = 2> (now_past_visible, alone)
  loop_ids = Squeeze (next_ids, one)
  loop_values = Squeeze (chosen, one)
}
"""
"""What follows the decoder in every step, in ONNX's own text."""

STEPS_INPUT = TensorSpec(name="steps", role="steps", dtype="int64", axes=())
FEWEST_INPUT = TensorSpec(name="fewest", role="fewest", dtype="int64", axes=())


def greedy_graph(decoder: ModelProto, contract: Exported, vocabulary: int) -> tuple[ModelProto, Exported]:
    """Make the graph, and its contract, from a finished decoder's.

    Args:
        decoder: with its weights inside; left as it is.
        contract: of the decoder.
        vocabulary: entries of the target vocabulary.
    """
    by_role = {spec.role: spec for spec in (*contract.inputs, *contract.outputs)}
    states = [spec for spec in contract.inputs if spec.role == "state"]
    news = {spec.feeds: spec for spec in contract.outputs if spec.role == "state"}
    inputs, outputs = _contract(contract, states, news)
    body, weights = _body(decoder, states, news)
    constants = {
        "one": np.array([1]),
        "two": np.array([2]),
        "row_axis": np.array([4]),
        "end": np.array(END),
        "no": np.array(False),
        "yes": np.array(True),
        "last": np.array([np.iinfo(np.int64).max]),
        "best": np.array([min(len(UNWRITABLE) + 1, vocabulary)]),
        "writable": _writable(vocabulary, by_role["top_log_probabilities"].dtype),
    }
    model = helper.make_model(
        helper.make_graph(
            [*_before(), *body, *_after(states, news, by_role["cross_attention"])],
            GREEDY,
            [value_info(spec) for spec in inputs],
            [value_info(spec) for spec in outputs],
            [*weights, *(numpy_helper.from_array(value, name) for name, value in constants.items())],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=decoder.ir_version,
    )
    return model, contract._replace(inputs=inputs, outputs=outputs)


def _contract(
    contract: Exported, states: list[TensorSpec], news: Mapping[str | None, TensorSpec]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    def one_row(spec: TensorSpec) -> TensorSpec:
        return spec.model_copy(update={"axes": tuple(1 if axis == "query" else axis for axis in spec.axes)})

    def all_steps(spec: TensorSpec) -> TensorSpec:
        return spec.model_copy(update={"axes": tuple("step" if axis == "query" else axis for axis in spec.axes)})

    by_role = {spec.role: spec for spec in contract.outputs}
    wanted = next(spec for spec in contract.inputs if spec.feeds == "cross_attention")
    kept = [one_row(spec) for spec in contract.inputs if spec.role in KEPT]
    ids, values = by_role["top_ids"], by_role["top_log_probabilities"]
    chosen = [
        TensorSpec(name="chosen_ids", role="chosen_ids", dtype=ids.dtype, axes=("step", "batch")),
        TensorSpec(
            name="chosen_log_probabilities",
            role="chosen_log_probabilities",
            dtype=values.dtype,
            axes=("step", "batch"),
        ),
    ]
    grown = [all_steps(news[spec.name]) if _past_axis(spec) else one_row(news[spec.name]) for spec in states]
    return (
        (*kept, STEPS_INPUT, FEWEST_INPUT, wanted),
        (*chosen, all_steps(by_role["cross_attention"]), *grown),
    )


def _past_axis(spec: TensorSpec) -> int | None:
    """Where a state grows; None where each step replaces it."""
    return spec.axes.index("past") if "past" in spec.axes else None


def _body(
    decoder: ModelProto, states: list[TensorSpec], news: Mapping[str | None, TensorSpec]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """The Loop, after what is the same in every step, and the decoder's weights, which its body reads from around."""
    graph = ModelProto.FromString(decoder.SerializeToString()).graph
    carried = ["target_ids", "positions", "past_visible", *(spec.name for spec in states)]
    inside = {
        "new_visible": "alone",
        "next_ids": "target_ids",
        "top": "best",
        "want_decoder_attention": "no",
        "top_ids": "step_top_ids",
        "top_log_probabilities": "step_top_log_probabilities",
        "cross_attention": "loop_cross",
        **{name: f"now_{name}" for name in carried},
    }
    around = {value.name for value in graph.input} - inside.keys()
    _rename(graph.node, lambda name: inside.get(name, name if name in around or not name else f"step/{name}"))
    for tensor in graph.initializer:
        tensor.name = f"step/{tensor.name}"
    following = []
    for spec in states:
        new, axis = f"step/{news[spec.name].name}", _past_axis(spec)
        if axis is None:
            following.append(new)
        else:
            graph.node.append(helper.make_node("Concat", [f"now_{spec.name}", new], [f"next_{spec.name}"], axis=axis))
            following.append(f"next_{spec.name}")
    graph.node.extend(parser.parse_graph(CHOICE).node)
    described = (*graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in described}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in described}

    def info(name: str, like: str) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, types[like], [None] * ranks[like])

    def flag(name: str) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.BOOL, [])

    def live(name: str) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.BOOL, [None, 1])

    carried_out = ["next_ids", "next_positions", "next_visible", *following]
    inner = helper.make_graph(
        graph.node,
        "step",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            flag("going"),
            live("live"),
            *(info(f"now_{name}", name) for name in carried),
        ],
        [
            flag("next_going"),
            live("next_live"),
            *(info(out, name) for out, name in zip(carried_out, carried, strict=True)),
            helper.make_tensor_value_info("loop_ids", types["top_ids"], [None]),
            helper.make_tensor_value_info("loop_values", types["top_log_probabilities"], [None]),
            info("loop_cross", "cross_attention"),
        ],
    )
    used = helper.make_graph(graph.node, "used", [], inner.output, graph.initializer)
    drop_unused(used)
    still: list[NodeProto] = []
    del inner.node[:]
    changing, given = {value.name for value in inner.input}, around | {"alone"}
    for node in used.node:
        read = set(reads_of(node))
        # What reads constants alone stays as well: a weight's own type is found again only beside its product.
        if changing & read or not given & read:
            changing |= set(node.output)
            inner.node.append(node)
        else:
            given |= set(node.output)
            still.append(node)
    loop = helper.make_node(
        "Loop",
        ["steps", "yes", "first_live", *carried],
        [
            "last_live",
            *(f"last_{name}" for name in carried),
            "chosen_ids",
            "chosen_log_probabilities",
            "looks",
        ],
        "search",
        body=inner,
    )
    return [*still, loop], list(used.initializer)


def _rename(nodes: Iterable[NodeProto], renamed: Callable[[str], str]) -> None:
    """Give every tensor another name, in place, in the branches of an If too."""
    for node in nodes:
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)
        for branch in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
            _rename(branch.node, renamed)
            for value in branch.output:
                value.name = renamed(value.name)


def _before() -> list[NodeProto]:
    return [
        helper.make_node("Equal", ["target_ids", "target_ids"], ["first_live"]),
        helper.make_node("Unsqueeze", ["first_live", "two"], ["alone"]),
    ]


def _after(states: list[TensorSpec], news: Mapping[str | None, TensorSpec], cross: TensorSpec) -> list[NodeProto]:
    """Of what grew, what is new; and the attention of all steps side by side."""
    nodes = []
    for spec in states:
        name, axis, last = news[spec.name].name, _past_axis(spec), f"last_{spec.name}"
        if axis is None:
            nodes.append(helper.make_node("Identity", [last], [name]))
            continue
        where = numpy_helper.from_array(np.array([axis]), "")
        nodes += [
            helper.make_node("Shape", [spec.name], [f"past_of_{spec.name}"], start=axis, end=axis + 1),
            helper.make_node("Constant", [], [f"axis_of_{spec.name}"], value=where),
            helper.make_node("Slice", [last, f"past_of_{spec.name}", "last", f"axis_of_{spec.name}"], [name]),
        ]
    turned = [
        helper.make_node("Squeeze", ["looks", "row_axis"], ["looks_of_steps"]),
        helper.make_node("Transpose", ["looks_of_steps"], ["cross_attention"], perm=[1, 2, 3, 0, 4]),
    ]
    return [*nodes, switch(cross, turned)]


def _writable(vocabulary: int, dtype: str) -> Array:
    """What is added to each token's log-probability: minus infinity for what stands for no text."""
    table = np.zeros(vocabulary, dtype)
    table[sorted(UNWRITABLE)] = -np.inf
    return table
