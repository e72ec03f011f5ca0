"""Several greedy steps in one call: the decoder graph as the body of a Loop.

    target_ids ──► Loop [ decoder ── best candidates ── the likeliest that may be written ]──► chosen_ids, next.*
                     ▲                                          │
                     └────── ids, positions, visible, state ◄───┘    until `steps`, or no more than `fewest` go on

A short step costs less than what surrounds it: the call, its inputs and outputs, and the choice in Python. The body is
the finished decoder of any architecture and precision, put in by the roles of its inputs and outputs, and made simpler
where one position a sentence allows it (`export.one_query`); its weights are the decoder's own.
"""

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, parser

from export.graph_bytes import OPSET
from export.graphs import Exported
from export.manifest import TensorSpec
from export.one_query import Grown, for_one_query
from export.onnx_writer import value_info
from export.optimise import drop_unused, reads_of, rename
from model.options import UNWRITABLE
from model.steps import Array
from model.vocabulary import END

GREEDY = "greedy"
"""Name of the graph."""

KEPT = ("target_ids", "positions", "past_visible", "source_mask", "memory", "state", "wanted")
"""Roles of the decoder's inputs that this graph has too."""

VISIBLE = "past_visible"
"""Of those, the one that gets longer with every step though it is no state."""

CHOSEN = {"chosen_ids": "top_ids", "chosen_log_probabilities": "top_log_probabilities"}
"""What is returned of every step, and which of the decoder's outputs it is chosen from."""

AXES = ("step", "batch")
"""Of both."""

CHOICE = """
choice () => () {
  allowed = Gather (writable, row_top_ids)
  masked = Add (row_top_log_probabilities, allowed)
  loop_chosen_log_probabilities, rank = TopK (masked, one)
  next_ids = GatherElements <axis: int = 1> (row_top_ids, rank)
  loop_chosen_ids = Identity (next_ids)
  ends = Equal (next_ids, end)
  next_ended = Or (ended, ends)
  ended_number = Cast <to: int = 7> (next_ended)
  ended_count = ReduceSum <keepdims: int = 0> (ended_number)
  next_going = Less (ended_count, enough)
  next_positions = Add (now_positions, one)
}
"""
"""What follows the decoder in every step, in ONNX's own text."""

BEFORE = """
before () => () {
  known = Equal (target_ids, target_ids)
  first_ended = Not (known)
  alone = Unsqueeze (known, two)
  batch_list = Shape <start: int = 0, end: int = 1> (target_ids)
  batch = Squeeze (batch_list)
  enough = Sub (batch, fewest)
}
"""
"""What comes before the first of them."""

TAIL = """
tail () => () {
  last_step = Sub (steps, one_scalar)
  missing = Sub (last_step, step)
  missing_list = Reshape (missing, one)
  pads = Concat <axis: int = 0> (zero, missing_list)
  NAME = Pad (step_NAME, pads, , last_axis)
}
"""
"""Attention to columns that grow in number, made as long in every step."""

STEPS_INPUT = TensorSpec(name="steps", role="steps", dtype="int64", axes=())
FEWEST_INPUT = TensorSpec(name="fewest", role="fewest", dtype="int64", axes=())


def greedy_graph(decoder: ModelProto, contract: Exported, vocabulary: int) -> tuple[ModelProto, Exported]:
    """Make the graph, and its contract, from a finished decoder's.

    Args:
        decoder: with its weights inside; left as it is.
        contract: of the decoder.
        vocabulary: entries of the target vocabulary.
    """
    return _Assembly(decoder, contract, vocabulary).model()


class _Assembly:
    """The parts of one such graph.

    What goes from step to step is called `now_...` where a step takes it in, and `next_...` where it leaves it.
    """

    def __init__(self, decoder: ModelProto, contract: Exported, vocabulary: int) -> None:
        decoder = ModelProto.FromString(decoder.SerializeToString())
        self.graph = decoder.graph
        self.ir_version, self.contract, self.vocabulary = decoder.ir_version, contract, vocabulary
        self.by_role: dict[str, TensorSpec] = {spec.role: spec for spec in contract.outputs}
        self.states = [spec for spec in contract.inputs if spec.role == "state"]
        self.news = {spec.feeds: spec for spec in contract.outputs if spec.role == "state"}
        self.looks = [spec for spec in contract.outputs if spec.role in ("cross_attention", "decoder_attention")]
        self.carried = ["target_ids", "positions", VISIBLE, *(spec.name for spec in self.states)]
        self.around = {spec.name for spec in contract.inputs if spec.role in KEPT} - set(self.carried)
        described = (*self.graph.input, *self.graph.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in described}
        grown = {spec.name: self.news[spec.name].name for spec in self.states} | {VISIBLE: "new_visible"}
        self.grown = {
            spec.name: Grown(grown[spec.name], f"next_{spec.name}", axis, len(spec.axes))
            for spec in contract.inputs
            if spec.name in grown and (axis := _past_axis(spec)) is not None
        }
        for_one_query(decoder, self.grown)

    def model(self) -> tuple[ModelProto, Exported]:
        """The graph and its contract."""
        inputs, outputs = self.inputs(), self.outputs()
        self.place_decoder()
        inner, still = self.body()
        nodes = [*parser.parse_graph(BEFORE).node, *still, self.loop(inner), *self.after()]
        weights = [
            *self.graph.initializer,
            *(numpy_helper.from_array(*pair[::-1]) for pair in self.constants().items()),
        ]
        graph = helper.make_graph(nodes, GREEDY, [*map(value_info, inputs)], [*map(value_info, outputs)], weights)
        drop_unused(graph)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=self.ir_version)
        return model, self.contract._replace(inputs=inputs, outputs=outputs)

    def inputs(self) -> tuple[TensorSpec, ...]:
        """The decoder's, for one row a sentence, and how many steps to take."""
        kept = [_with_query(spec, 1) for spec in self.contract.inputs if spec.role in KEPT]
        return (*kept, STEPS_INPUT, FEWEST_INPUT)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """The chosen tokens, attention and new state of all steps."""
        chosen = [
            TensorSpec.model_validate({"name": name, "role": name, "dtype": self.by_role[like].dtype, "axes": AXES})
            for name, like in CHOSEN.items()
        ]
        looks = [_by_step(spec) for spec in self.looks]
        grown = [_with_query(self.news[spec.name], "step" if _past_axis(spec) else 1) for spec in self.states]
        return (*chosen, *looks, *grown)

    def place_decoder(self) -> None:
        """Name the decoder's tensors as the body of the Loop has them, and apart from all others."""
        names = {"new_visible": "alone", "next_ids": "target_ids", "top": "best"}
        names |= {name: f"now_{name}" for name in self.carried} | {name: name for name in self.around}
        names |= {self.rows_of(name): f"row_{name}" for name in ("top_ids", "top_log_probabilities")}
        names |= {spec.name: f"{'step' if _grows(spec) else 'loop'}_{spec.name}" for spec in self.looks}
        names |= {grown.whole: grown.whole for grown in self.grown.values()}
        rename(self.graph.node, lambda name: names.get(name, f"step/{name}" if name else ""))
        for tensor in self.graph.initializer:
            tensor.name = f"step/{tensor.name}"

    def rows_of(self, output: str) -> str:
        """What the writer makes this output of: with one position a sentence, [batch top]."""
        return next(node for node in self.graph.node if output in node.output and node.op_type == "Reshape").input[0]

    def body(self) -> tuple[GraphProto, list[NodeProto]]:
        """One step; and apart from it, what is the same in every step."""
        nodes = [*self.graph.node, *parser.parse_graph(CHOICE).node]
        following = ["next_ids", "next_positions", self.grown[VISIBLE].whole]
        for spec in self.states:
            grown = self.grown.get(spec.name)
            following.append(f"step/{self.news[spec.name].name}" if grown is None else grown.whole)
        for spec in self.looks:
            wanted = next(node for node in nodes if {f"step_{spec.name}", f"loop_{spec.name}"} & set(node.output))
            self.lay_side_by_side(wanted)
            if _grows(spec):
                _lengthen(wanted, spec)
        value = helper.make_tensor_value_info
        inner = helper.make_graph(
            nodes,
            "step",
            [
                value("step", TensorProto.INT64, []),
                value("going", TensorProto.BOOL, []),
                value("ended", TensorProto.BOOL, None),
                *(value(f"now_{name}", self.types[name], None) for name in self.carried),
            ],
            [
                value("next_going", TensorProto.BOOL, []),
                value("next_ended", TensorProto.BOOL, None),
                *(value(out, self.types[name], None) for out, name in zip(following, self.carried, strict=True)),
                *(value(f"loop_{name}", self.types[like], None) for name, like in CHOSEN.items()),
                *(value(f"loop_{spec.name}", self.types[spec.name], None) for spec in self.looks),
            ],
        )
        return inner, self.take_out(inner)

    def lay_side_by_side(self, wanted: NodeProto) -> None:
        """Let the If that stacks the layers' attention lay them along the heads' axis, in place.

        That is an operator a step, not one a layer too; and nothing is to be copied after the Loop, as every part of
        the result lies where it belongs. What is not stacked layer by layer is reshaped.
        """
        then, otherwise = (
            next(attribute.g for attribute in wanted.attribute if attribute.name == f"{branch}_branch")
            for branch in ("then", "else")
        )
        *layers, stack = then.node
        axes = {tensor.name for tensor in self.graph.initializer if numpy_helper.to_array(tensor).tolist() == [1]}
        alone = all(layer.op_type == "Unsqueeze" and layer.input[1] in axes for layer in layers)
        if stack.op_type == "Concat" and alone and list(stack.input) == [layer.output[0] for layer in layers]:
            side_by_side = helper.make_node("Concat", [layer.input[0] for layer in layers], stack.output, axis=1)
            del then.node[:]
        else:
            stacked, stack.output[0] = stack.output[0], f"{stack.output[0]}_stacked"
            side_by_side = helper.make_node("Reshape", [stack.output[0], "heads_of_layers"], [stacked])
        then.node.append(side_by_side)
        del otherwise.node[0].attribute[0].t.dims[-1:]
        for branch in (then, otherwise):
            del branch.output[0].type.tensor_type.shape.dim[-1:]

    def take_out(self, inner: GraphProto) -> list[NodeProto]:
        """Take out of a step, and return, what is the same in every one."""
        drop_unused(inner)
        nodes, still = list(inner.node), []
        del inner.node[:]
        changing, given = {value.name for value in inner.input}, self.around | {"alone"}
        for node in nodes:
            read = set(reads_of(node))
            # What reads constants alone stays as well: a weight's own type is found again only beside its product.
            if changing & read or not given & read:
                changing |= set(node.output)
                inner.node.append(node)
            else:
                given |= set(node.output)
                still.append(node)
        return still

    def loop(self, inner: GraphProto) -> NodeProto:
        """The Loop; what its body does not carry, it reads from the graph around it."""
        last = ["last_ended", *(f"last_{name}" for name in self.carried)]
        collected = [*(f"all_{name}" for name in CHOSEN), *(spec.name for spec in self.looks)]
        return helper.make_node(
            "Loop", ["steps", "yes", "first_ended", *self.carried], [*last, *collected], "search", body=inner
        )

    def after(self) -> list[NodeProto]:
        """Of what grew, what is new; and what was chosen in all steps side by side."""
        nodes = [helper.make_node("Squeeze", [f"all_{name}", "two"], [name]) for name in CHOSEN]
        for spec in self.states:
            name, axis, last = self.news[spec.name].name, _past_axis(spec), f"last_{spec.name}"
            if axis is None:
                nodes.append(helper.make_node("Identity", [last], [name]))
                continue
            nodes += [
                helper.make_node("Shape", [spec.name], [f"past_of_{spec.name}"], start=axis, end=axis + 1),
                helper.make_node("Constant", [], [f"axis_of_{spec.name}"], value_ints=[axis]),
                helper.make_node("Slice", [last, f"past_of_{spec.name}", "last", f"axis_of_{spec.name}"], [name]),
            ]
        return nodes

    def constants(self) -> dict[str, Array]:
        """Of the text above, and of what stands around it."""
        writable = np.zeros(self.vocabulary, self.by_role["top_log_probabilities"].dtype)
        writable[sorted(UNWRITABLE)] = -np.inf
        return {
            "zero": np.array([0]),
            "one_scalar": np.array(1),
            "one": np.array([1]),
            "two": np.array([2]),
            "last_axis": np.array([-1]),
            "heads_of_layers": np.array([0, _by_step(self.looks[0]).axes[2], 1, -1]),
            "end": np.array(END),
            "yes": np.array(True),
            "last": np.array([np.iinfo(np.int64).max]),
            "best": np.array([min(len(UNWRITABLE) + 1, self.vocabulary)]),
            "writable": writable,
        }


def _with_query(spec: TensorSpec, count: int | str) -> TensorSpec:
    return spec.model_copy(update={"axes": tuple(count if axis == "query" else axis for axis in spec.axes)})


def _by_step(spec: TensorSpec) -> TensorSpec:
    """Attention of all steps as the Loop collects it, all layers' heads in a row: to turn it would be to copy it."""
    batch, layers, heads, _, seen = spec.axes
    return spec.model_copy(update={"axes": ("step", batch, int(layers) * int(heads), 1, seen)})


def _past_axis(spec: TensorSpec) -> int | None:
    """Where a state grows; None where each step replaces it."""
    return spec.axes.index("past") if "past" in spec.axes else None


def _grows(spec: TensorSpec) -> bool:
    """Attention to what is generated has a column more in every step."""
    return spec.role == "decoder_attention"


def _lengthen(wanted: NodeProto, spec: TensorSpec) -> None:
    """Let the If that makes a step's attention make it as long as the last step's, in place."""
    then = next(attribute.g for attribute in wanted.attribute if attribute.name == "then_branch")
    then.node.extend(parser.parse_graph(TAIL.replace("NAME", spec.name)).node)
    then.output[0].name = spec.name
    wanted.output[:] = [f"loop_{spec.name}"]
