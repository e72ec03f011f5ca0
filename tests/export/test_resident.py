"""With memory and state left on the device, answers are what they are with arrays, to the bit, whoever comes and goes.

The device is "cpu" here: its handles take the same way through ONNX Runtime as a GPU's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export import store_graphs
from export.graph_bytes import GraphBytes
from export.manifest import Precision
from export.resident import Mover, ResidentStepModel, ResidentStore, run_bound
from export.runtime import OnnxStepModel, RuntimeOptions
from export.store_graphs import Tensor
from model.forced import score
from model.grid import Grid
from model.search import Decoding, Hypothesis, SearchOptions
from model.steps import ALL_FAMILIES, Array, Family, Memory, Question, Step, StepModel, pad
from model.vocabulary import BEGIN, END
from tests.export.case import SOURCES, case_of
from tests.export.toy import Toy
from tests.model.searching import FAMILIES, assert_same
from tests.model.steps import RowModel, SeedModel
from tests.model.test_grid import Follower
from tests.reversal import Reversal


class Lodger:
    """Another model's steps, with memory and state left on the device."""

    def __init__(self, model: SeedModel) -> None:
        self.model = model
        self.memory, self.state, self.dtype, self.vocabulary = model.memory, model.state, model.dtype, model.vocabulary
        self.stores = list[ResidentStore]()

    def new_store(self, width: int) -> ResidentStore:
        memory = [Tensor(f"memory.{index}", "int64", kept) for index, kept in enumerate(self.memory)]
        state = [Tensor(f"state.{index}", self.dtype.name, kept) for index, kept in enumerate(self.state)]
        self.stores.append(ResidentStore(Mover(memory, state, RuntimeOptions(), "cpu"), width))
        return self.stores[-1]

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:
        memory = self.model.encode(source_ids, source_mask, attention)
        return replace(memory, tensors=tuple(map(lodge, memory.tensors)))

    def step(self, question: Question) -> Step:
        tensors = tuple(tensor.numpy() for tensor in question.memory.tensors)
        step = self.model.step(
            replace(
                question,
                memory=replace(question.memory, tensors=tensors),
                state=tuple(tensor.numpy() for tensor in question.state),
            )
        )
        return replace(step, state=tuple(map(lodge, step.state)))


def lodge(array: Array) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


class Lodging(Follower):
    """A grid whose tensors are on the device, and what each of its rows should have read."""

    def __init__(self, model: SeedModel, width: int) -> None:
        super().__init__(model, width)
        self.lodger = Lodger(model)
        self.grid = Grid(self.lodger, width)

    def join(self, *sources: list[int]) -> None:
        self.take(sources, range(len(sources)))

    def take(self, sources: Sequence[list[int]], indices: Sequence[int]) -> None:
        self.grid.join(self.lodger.encode(*pad(sources)), indices)
        self.sources += [sources[index] for index in indices]
        self.read += [[()] * self.width for _ in indices]


@pytest.mark.parametrize("kind", [SeedModel, RowModel])
@pytest.mark.parametrize("width", [1, 3])
def test_every_row_goes_on_from_its_parent_whoever_comes_and_goes(width: int, kind: type[SeedModel]) -> None:
    follower, draw = Lodging(kind(3), width), np.random.default_rng(5)
    for _ in range(50):
        if not follower.sources or (len(follower.sources) < 6 and draw.random() < 0.3):
            lengths = draw.integers(0, 12, draw.integers(1, 4))
            sources = [[*draw.integers(4, 7, length).tolist(), END] for length in lengths]
            follower.take(sources, draw.permutation(len(sources))[: draw.integers(1, len(sources) + 1)].tolist())
        elif draw.random() < 0.25:
            count = len(follower.sources)
            follower.leave(*draw.choice(count, draw.integers(0, count + 1), replace=False).tolist())
        if follower.sources:
            follower.step()


@pytest.mark.parametrize("width", [1, 2])
def test_the_ring_and_the_sources_grow_and_shrink(width: int) -> None:
    model = SeedModel(3)
    follower = Lodging(model, width)
    follower.join([4, END])
    for _ in range(40):
        follower.step()
    follower.join([5] * 30 + [END], [6, END])
    follower.step()
    assert model.shapes[-1] == (follower.grid.ring * width, 32)
    assert follower.grid.ring == 64
    follower.leave(0)
    follower.leave(1)
    assert follower.sources == [[6, END]]
    for _ in range(3):
        follower.step()
    assert model.shapes[-1] == (16 * width, 2)


GRAPHS = {"SeedModel": SeedModel(3), "RowModel": RowModel(3)}


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_graphs_that_move_tensors_are_valid_onnx(kind: str) -> None:
    model = GRAPHS[kind]
    memory = [Tensor(f"memory.{index}", "float16", kept) for index, kept in enumerate(model.memory)]
    state = [Tensor(f"state.{index}", "float16", kept) for index, kept in enumerate(model.state)]
    found = {
        "blank": store_graphs.blank(state),
        "join": store_graphs.join(memory, state),
        "leave": store_graphs.take([*memory, *state], None, "order"),
        "narrow": store_graphs.take(memory, "source", "columns"),
        "resize": store_graphs.take(state, "past", "columns"),
        "follow": store_graphs.follow(state),
        "write": store_graphs.write(state, 4),
    }
    empty = {"SeedModel": {"follow"}, "RowModel": {"resize", "write"}}
    assert {name for name, content in found.items() if not content} == empty[kind]
    for content in filter(None, found.values()):
        onnx.checker.check_model(onnx.ModelProto.FromString(content), full_check=True)


def test_a_graph_is_written_as_the_onnx_package_writes_it() -> None:
    graph = GraphBytes()
    graph.constant("shape", np.array([-1, 300], np.int64))
    graph.node("Reshape", [graph.input("x", "float16", 2), "shape"], "y", allowzero=1)
    graph.node("Transpose", ["y"], "z", perm=[1, 0])
    graph.output("z", "float16", 2)
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, [None, None]) for name in ("x", "z")]
    nodes = [
        onnx.helper.make_node("Reshape", ["x", "shape"], ["y"], allowzero=1),
        onnx.helper.make_node("Transpose", ["y"], ["z"], perm=[1, 0]),
    ]
    shape = onnx.numpy_helper.from_array(np.array([-1, 300]), "shape")
    expected = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "store", values[:1], values[1:], [shape]),
        ir_version=8,
        opset_imports=[onnx.helper.make_opsetid("", 18)],
    )
    found = onnx.ModelProto.FromString(graph.model())
    found.opset_import[0].domain = ""  # left out, which means the same
    assert found == expected
    assert GraphBytes().model() == b""


@pytest.fixture(params=["fp32", "int8"])
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


def test_what_stays_is_never_an_array(untied: Toy, precision: Precision) -> None:
    model = ResidentStepModel(OnnxStepModel(untied.bundle, untied.manifest, precision), "cpu")
    asked = list[Question]()

    class Watched:
        memory, state, dtype, vocabulary = model.memory, model.state, model.dtype, model.vocabulary
        encode, new_store = model.encode, model.new_store

        def step(self, question: Question) -> Step:
            asked.append(question)
            step = model.step(question)
            assert all(isinstance(tensor, ort.OrtValue) for tensor in step.state)
            assert isinstance(step.top_ids, np.ndarray)
            return step

    decode(Watched(), [Arrival(0, [5, 6, END], 6, 9), Arrival(2, [7] * 9 + [END], 6, 3)], 2, ALL_FAMILIES)
    assert len(asked) > 3
    for question in asked:
        assert all(isinstance(tensor, ort.OrtValue) for tensor in (*question.memory.tensors, *question.state))


def test_an_array_and_a_handle_are_as_good_as_each_other_in_a_question(untied: Toy) -> None:
    case = case_of(untied)
    model = ResidentStepModel(case.onnx, "cpu")
    targets = [row.tolist() for row in case.target_ids]
    sources = [row[:length].tolist() for row, length in zip(case.source_ids, SOURCES, strict=True)]
    expected = score(case.onnx, sources, targets)
    assert_same(score(model, sources, targets), expected)
    assert_same(score(model, sources, targets, memory=case.memory), expected)


def test_encoder_attention_comes_back_where_it_is_asked_for(untied: Toy) -> None:
    case = case_of(untied)
    model = ResidentStepModel(case.onnx, "cpu")
    np.testing.assert_array_equal(
        model.encode(case.source_ids, case.source_mask).encoder_attention, case.memory.encoder_attention
    )
    assert model.encode(case.source_ids, case.source_mask, attention=False).encoder_attention is None
    assert model.providers == ["CPUExecutionProvider"]


def test_an_array_in_another_order_is_read_as_it_is_meant() -> None:
    graph = GraphBytes()
    graph.output(graph.node("Neg", [graph.input("x", "float32", 2)], "y"), "float32", 2)
    session = RuntimeOptions().session(graph.model())
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for given_array in (x, np.asfortranarray(x), x.T.copy().T):
        np.testing.assert_array_equal(run_bound(session, {"x": given_array}, ["y"], set(), "cpu")["y"], -x)


@dataclass(frozen=True)
class Arrival:
    """A sentence that is to be decoded."""

    clock: int
    """The step before which it joins."""
    source: list[int]
    longest: int
    patience: int
    """Steps after which it is taken out, if it is not done."""


def decode(
    model: StepModel, arrivals: Sequence[Arrival], width: int, families: frozenset[Family]
) -> list[list[Hypothesis]]:
    """What becomes of each sentence, and of those that were taken out, nothing."""
    running, under_way, clock = Decoding(model, width), dict[int, Any](), 0
    found: list[list[Hypothesis]] = [[] for _ in arrivals]
    while clock <= max(one.clock for one in arrivals) or running.sentences:
        together = [index for index, one in enumerate(arrivals) if one.clock == clock]
        if together:
            memory = model.encode(*pad([arrivals[index].source for index in together]), attention=False)
            chosen = [SearchOptions(longest=arrivals[index].longest, beam_size=width) for index in together]
            order = list(reversed(range(len(together))))
            joined = running.join(memory, order, chosen, [families] * len(order))
            under_way |= {together[place]: sentence for place, sentence in zip(order, joined, strict=True)}
        if running.sentences:
            running.step()
        clock += 1
        tired = [
            index
            for index, sentence in under_way.items()
            if not sentence.done and clock - arrivals[index].clock >= arrivals[index].patience
        ]
        running.leave([under_way.pop(index) for index in tired])
    for index, sentence in under_way.items():
        found[index] = sentence.results()
    return found


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    words = st.lists(st.integers(BEGIN + 2, 11), max_size=12)
    return [
        Arrival(draw(st.integers(0, 12)), [*draw(words), END], draw(st.integers(1, 12)), draw(st.sampled_from((3, 99))))
        for _ in range(draw(st.integers(1, 6)))
    ]


def test_any_sentences_in_any_order_are_answered_as_with_arrays(reversal: Reversal, untied: Toy, halved: Toy) -> None:
    bundles: tuple[tuple[Toy | Reversal, Precision], ...] = ((reversal, "fp32"), (untied, "int8"), (halved, "fp16"))
    graphs = [OnnxStepModel(one.bundle, one.manifest, precision) for one, precision in bundles]
    pairs = [(one, ResidentStepModel(one, "cpu")) for one in graphs]

    @settings(deadline=None, derandomize=True, max_examples=25)
    @given(st.sampled_from(pairs), arrivals(), st.sampled_from((1, 2, 4)), st.sampled_from(FAMILIES))
    def compare(
        pair: tuple[StepModel, StepModel], coming: list[Arrival], width: int, families: frozenset[Family]
    ) -> None:
        for expected, found in zip(*(decode(model, coming, width, families) for model in pair), strict=True):
            assert_same(found, expected)

    compare()
