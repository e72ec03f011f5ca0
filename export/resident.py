"""Memory and state that stay on the device between steps. Torch-free.

    host      ids, masks ─────────┐                 ┌──► best candidates, attention that was asked for
                                  ▼                 │
    device    memory, state ──► decoder ── new columns ──► write ──► state
                 ▲                                                     │
                 └────────────── join, leave, narrow, resize ◄─────────┘

Sessions are run through ONNX Runtime's IO binding, and tensors are moved by small graphs on the same device
(`export.store_graphs`). With "cpu" for a device everything takes the same way, which is how it is tested without one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import onnxruntime as ort
from jaxtyping import Bool, Int

from export import store_graphs
from export.graph_bytes import GraphBytes
from export.manifest import TensorSpec
from export.runtime import CPU, CUDA, OnnxStepModel, RuntimeOptions
from export.store_graphs import Tensor
from model.steps import Array, Kept, Memory, Question, Step

Device: TypeAlias = Literal["cuda", "cpu"]
"""Where tensors stay, as ONNX Runtime names it."""


def has_cuda() -> bool:
    """Whether ONNX Runtime can compute on a CUDA device here: it was built to, and there is one."""
    if CUDA not in ort.get_available_providers():
        return False
    graph = GraphBytes()
    graph.output(graph.node("Neg", [graph.input("x", "float32", 1)], "y"), "float32", 1)
    return CUDA in RuntimeOptions(providers=(CUDA, CPU)).session(graph.model()).get_providers()


class ResidentStepModel:
    """A bundle's graphs, with memory and state as handles of what lies on the device.

    Args:
        steps: the graphs, run by a provider of that device.
        device: where memory and state stay.

    Attributes:
        memory: see `StepModel.memory`.
        state: see `StepModel.state`.
        dtype: of the state.
        vocabulary: entries of the target vocabulary.
    """

    def __init__(self, steps: OnnxStepModel, device: Device = "cuda") -> None:
        self.memory, self.state, self.dtype, self.vocabulary = steps.memory, steps.state, steps.dtype, steps.vocabulary
        self._steps, self._device = steps, device
        memory, state = _tensors(steps.memory_specs, steps.memory), _tensors(steps.state_specs, steps.state)
        self._mover = Mover(memory, state, steps.options, device)

    @property
    def providers(self) -> list[str]:
        """Execution providers in use, as ONNX Runtime names them."""
        return self._steps.providers

    def encode(
        self,
        source_ids: Int[np.ndarray, "batch source"],
        source_mask: Bool[np.ndarray, "batch source"],
        attention: bool = True,
    ) -> Memory:
        """See `StepModel.encode`; the memory stays on the device."""
        names, feeds = self._steps.encoder_call(source_ids, source_mask, attention)
        resident = {spec.name for spec in self._steps.memory_specs}
        found = run_bound(self._steps.encoder, feeds, names, resident, self._device)
        if self._steps.candidates is not None:
            names, feeds = self._steps.candidates_call(source_ids, source_mask)
            found |= run_bound(self._steps.candidates, feeds, names, resident, self._device)
        return self._steps.as_memory(found, source_mask)

    def step(self, question: Question) -> Step:
        """See `StepModel.step`; of a state that lies on the device, what is new of it stays there too."""
        names, feeds = self._steps.decoder_call(question)
        there = any(isinstance(tensor, ort.OrtValue) for tensor in question.state)
        resident = set(self._steps.next_names if there else ())
        return self._steps.as_step(run_bound(self._steps.decoder, feeds, names, resident, self._device))

    def new_store(self, width: int) -> "ResidentStore":
        """See `model.grid.KeepsState`."""
        return ResidentStore(self._mover, width)


class ResidentStore:
    """Memory and state of a running batch on the device: see `model.store.Store`.

    Args:
        mover: what moves them.
        width: rows of each sentence.
    """

    def __init__(self, mover: "Mover", width: int) -> None:
        self._mover, self._width = mover, width
        self._count, self._source, self._ring = 0, 0, 0
        self._memory: list[Any] = []
        self._state: list[Any] = []

    def begin(self, memory: Memory, sentences: Sequence[int], ring: int) -> None:
        """See `Store.begin`."""
        self._count, self._source = memory.source_mask.shape
        self._ring, self._memory = ring, list(memory.tensors)
        self._state = self._mover.blank(self._shapes(self._count))
        if list(sentences) != list(range(self._count)):
            self.leave(sentences)

    def join(self, memory: Memory, sentences: Sequence[int], source: int) -> None:
        """See `Store.join`."""
        index = {
            "sentences": np.array(sentences, np.int64),
            "columns": _fit(self._source, source),
            "arriving_columns": _fit(memory.source_mask.shape[1], source),
        }
        shapes = self._shapes(len(sentences))
        self._memory, self._state = self._mover.join(self._memory, self._state, memory.tensors, shapes, index)
        self._count, self._source = self._count + len(sentences), source

    def leave(self, order: Sequence[int]) -> None:
        """See `Store.leave`."""
        self._memory, self._state = self._mover.leave(self._memory, self._state, np.array(order, np.int64))
        self._count = len(order)

    def narrow(self, source: int) -> None:
        """See `Store.narrow`."""
        self._memory, self._source = self._mover.narrow(self._memory, np.arange(source)), source

    def resize(self, before: Int[np.ndarray, " column"], after: Int[np.ndarray, " column"], ring: int) -> None:
        """See `Store.resize`."""
        columns = np.zeros((ring, self._width), np.int64)
        columns[after] = before[:, None] * self._width + np.arange(self._width)
        self._state, self._ring = self._mover.resize(self._state, columns.ravel()), ring

    def memory(self) -> tuple[Any, ...]:
        """See `Store.memory`."""
        return tuple(self._memory)

    def state(self, parents: Int[np.ndarray, "sentence row"]) -> tuple[Any, ...]:
        """See `Store.state`."""
        return tuple(self._state if self._width == 1 else self._mover.follow(self._state, parents))

    def write(self, news: Sequence[Any], column: int) -> None:
        """See `Store.write`."""
        self._state = self._mover.write(self._state, news, np.arange(self._ring) == column, self._width)

    def _shapes(self, count: int) -> list[Array]:
        sizes = {"past": self._ring * self._width, "row": self._width, "source": self._source}
        return [
            np.array([count, *(sizes[size] if isinstance(size, str) else size for size in kept)], np.int64)
            for kept in self._mover.state_kept
        ]


class Mover:
    """Runs the graphs of `export.store_graphs` for one model.

    Args:
        memory: its memory.
        state: its state.
        options: how to run the graphs, by a provider of the device.
        device: where the tensors are.

    Attributes:
        state_kept: how the state is laid out.
    """

    def __init__(
        self, memory: Sequence[Tensor], state: Sequence[Tensor], options: RuntimeOptions, device: Device
    ) -> None:
        self.state_kept: Sequence[Kept] = [tensor.kept for tensor in state]
        self._memory, self._state, self._options, self._device = memory, state, options, device
        self._sessions = {
            name: self._session(content)
            for name, content in {
                "blank": store_graphs.blank(state),
                "join": store_graphs.join(memory, state),
                "leave": store_graphs.take([*memory, *state], None, "order"),
                "narrow": store_graphs.take(memory, "source", "columns"),
                "resize": store_graphs.take(state, "past", "columns"),
                "follow": store_graphs.follow(state),
            }.items()
        }

    def blank(self, shapes: Sequence[Array]) -> list[Any]:
        """A state of these shapes, zero."""
        return self._run("blank", self._state, [None] * len(self._state), self._of_shapes(shapes))

    def join(
        self,
        memory: Sequence[Any],
        state: Sequence[Any],
        arriving: Sequence[Any],
        shapes: Sequence[Array],
        index: Mapping[str, Array],
    ) -> tuple[list[Any], list[Any]]:
        """Memory of more sentences after the others, and a blank state of these shapes."""
        feeds = {store_graphs.arriving(one): value for one, value in zip(self._memory, arriving, strict=True)}
        return self._run_all("join", memory, state, {**index, **feeds, **self._of_shapes(shapes)})

    def leave(self, memory: Sequence[Any], state: Sequence[Any], order: Array) -> tuple[list[Any], list[Any]]:
        """Memory and state of the sentences at some places."""
        return self._run_all("leave", memory, state, {"order": order})

    def narrow(self, memory: Sequence[Any], columns: Array) -> list[Any]:
        """Some source columns."""
        return self._run("narrow", self._memory, memory, {"columns": columns})

    def resize(self, state: Sequence[Any], columns: Array) -> list[Any]:
        """Columns of the past in another order."""
        return self._run("resize", self._state, state, {"columns": columns})

    def follow(self, state: Sequence[Any], parents: Array) -> list[Any]:
        """Each row's own part as its parent had it."""
        feeds = {}
        for tensor in self._state:
            if (axis := tensor.axis("row")) is not None:
                shape = [len(parents) if place == 0 else -1 if place == axis else 1 for place in range(tensor.rank)]
                feeds[store_graphs.parents_of(tensor)] = parents.reshape(shape)
        return self._run("follow", self._state, state, feeds)

    def write(self, state: Sequence[Any], news: Sequence[Any], here: Array, width: int) -> list[Any]:
        """What is new, in its column of the past or in place of what was."""
        name = f"write {width}"
        if name not in self._sessions:
            self._sessions[name] = self._session(store_graphs.write(self._state, width))
        past = [tensor.axis("past") is not None for tensor in self._state]
        feeds = {store_graphs.news(one): new for one, new, has in zip(self._state, news, past, strict=True) if has}
        kept = [one if has else new for one, new, has in zip(state, news, past, strict=True)]
        return self._run(name, self._state, kept, {"here": here, **feeds})

    def _run_all(
        self, name: str, memory: Sequence[Any], state: Sequence[Any], feeds: Mapping[str, Any]
    ) -> tuple[list[Any], list[Any]]:
        found = self._run(name, [*self._memory, *self._state], [*memory, *state], feeds)
        return found[: len(memory)], found[len(memory) :]

    def _run(self, name: str, tensors: Sequence[Tensor], values: Sequence[Any], feeds: Mapping[str, Any]) -> list[Any]:
        """What a graph makes of the tensors that it takes; the others as they are."""
        session = self._sessions[name]
        if session is None:
            return list(values)
        taken, made = ({one.name for one in some} for some in (session.get_inputs(), session.get_outputs()))
        feeds = {one.name: value for one, value in zip(tensors, values, strict=True) if one.name in taken} | {**feeds}
        found = run_bound(session, feeds, sorted(made), made, self._device)
        return [found.get(store_graphs.result(one), value) for one, value in zip(tensors, values, strict=True)]

    def _session(self, content: bytes) -> ort.InferenceSession | None:
        return self._options.session(content) if content else None

    def _of_shapes(self, shapes: Sequence[Array]) -> dict[str, Array]:
        return {store_graphs.shape_of(one): shape for one, shape in zip(self._state, shapes, strict=True)}


def run_bound(
    session: ort.InferenceSession,
    feeds: Mapping[str, Any],
    names: Sequence[str],
    resident: set[str],
    device: Device,
) -> dict[str, Any]:
    """Run a graph with inputs from either side.

    Args:
        session: of the graph.
        feeds: arrays, which are copied to where the graph reads them, and handles.
        names: outputs to compute.
        resident: which of them stay on the device and are returned as handles; the others come back as arrays.
        device: which one.
    """
    binding = session.io_binding()
    for name, value in feeds.items():
        if isinstance(value, ort.OrtValue):
            binding.bind_ortvalue_input(name, value)
        else:
            binding.bind_cpu_input(name, np.asarray(value, order="C"))
    for name in names:
        binding.bind_output(name, device if name in resident else "cpu")
    session.run_with_iobinding(binding)
    found = dict(zip(names, binding.get_outputs(), strict=True))
    return {name: value if name in resident else value.numpy() for name, value in found.items()}


def _tensors(specs: Sequence[TensorSpec], kept: Sequence[Kept]) -> list[Tensor]:
    return [Tensor(spec.name, spec.dtype, sizes) for spec, sizes in zip(specs, kept, strict=True)]


def _fit(there: int, wanted: int) -> Array:
    """Columns that are there, and then any."""
    columns = np.arange(wanted)
    return np.where(columns < there, columns, 0)
