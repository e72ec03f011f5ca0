"""A bundle's graphs as a step model for `model.search`, run by ONNX Runtime. Torch-free.

Everything is done by the manifest's roles and axes: this code does not know which architecture the graphs hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from jaxtyping import Bool, Int

from export.manifest import BundleError, Graphs, GraphSpec, Manifest, Precision
from model.steps import Memory, Scores, Step

Array: TypeAlias = np.ndarray[Any, Any]

LOG_ERRORS = 3
"""ONNX Runtime's log level: its warnings about graphs that are fine would otherwise fill the log."""


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """How ONNX Runtime runs the graphs."""

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """Execution providers, the preferred one first."""
    threads: int = 1
    """Threads that one run may use."""
    spinning: bool = False
    """Let idle threads spin: a little faster, at the price of a busy core while nothing is to do."""

    def session_options(self) -> ort.SessionOptions:
        """As ONNX Runtime takes them."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = LOG_ERRORS
        options.enable_mem_pattern = False  # shapes change at every step: patterns would only pile up
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spinning else "0")
        return options


class OnnxStepModel:
    """The encoder and decoder graphs of one precision.

    Args:
        bundle: folder of the bundle, its files already checked.
        manifest: its description.
        precision: which graphs.
        options: how to run them.

    Raises:
        BundleError: the bundle has no such precision, or its graphs are not what the manifest says.
    """

    def __init__(
        self, bundle: Path, manifest: Manifest, precision: Precision, options: RuntimeOptions | None = None
    ) -> None:
        if precision not in manifest.graphs:
            raise BundleError(f"{bundle}: has no precision {precision!r}, only {', '.join(manifest.graphs)}")
        self.graphs: Graphs = manifest.graphs[precision]
        self._vocabulary = manifest.target_vocabulary
        self._options = options or RuntimeOptions()
        self._encoder = self._session(bundle, self.graphs.encoder)
        self._decoder = self._session(bundle, self.graphs.decoder)
        decoder = self.graphs.decoder
        self._state_inputs = [spec for spec in decoder.inputs if spec.role == "state"]
        self._next_names = {spec.feeds: spec.name for spec in decoder.outputs if spec.role == "state"}
        self._state_names = [self._next_names[spec.name] for spec in self._state_inputs]

    @property
    def providers(self) -> list[str]:
        """Execution providers in use, as ONNX Runtime names them."""
        return list(self._decoder.get_providers())

    def encode(
        self, source_ids: Int[np.ndarray, "batch source"], source_mask: Bool[np.ndarray, "batch source"]
    ) -> Memory:
        """See `StepModel.encode`."""
        graph = self.graphs.encoder
        names = [*graph.names("memory"), *graph.names("encoder_attention")]
        feeds = {graph.names("source_ids")[0]: source_ids, graph.names("source_mask")[0]: source_mask}
        *memory, attention = self._encoder.run(names, feeds)
        return Memory(dict(zip(graph.names("memory"), memory, strict=True)), source_mask, attention)

    def select(self, memory: Memory, sentences: Int[np.ndarray, " kept"]) -> Memory:
        """See `StepModel.select`."""
        kept = {name: tensor[sentences] for name, tensor in memory.tensors.items()}
        return Memory(kept, memory.source_mask[sentences], memory.encoder_attention)

    def step(
        self,
        target_ids: Int[np.ndarray, "row new"],
        positions: Int[np.ndarray, "row new"],
        memory: Memory,
        state: Any,
        state_rows: Int[np.ndarray, " row"],
        top: int,
    ) -> Step:
        """See `StepModel.step`."""
        wanted = ("top_log_probabilities", "top_ids", "cross_attention", "decoder_attention")
        feeds = self._feeds(target_ids, positions, memory, top)
        if state is None:
            feeds |= self._empty_state()
            feeds["state_rows"] = np.zeros(len(target_ids), np.int64)
        else:
            feeds |= state
            feeds["state_rows"] = state_rows
        return Step(*self._decode(wanted, feeds))

    def score(
        self, target_ids: Int[np.ndarray, "row new"], next_ids: Int[np.ndarray, "row new"], memory: Memory
    ) -> Scores:
        """See `StepModel.score`."""
        positions = np.broadcast_to(np.arange(target_ids.shape[1]), target_ids.shape).copy()
        wanted = ("log_probabilities", "cross_attention", "decoder_attention")
        feeds = self._feeds(target_ids, positions, memory, 1) | self._empty_state()
        feeds["state_rows"] = np.zeros(len(target_ids), np.int64)
        log_probabilities, cross, own, _ = self._decode(wanted, feeds)
        return Scores(np.take_along_axis(log_probabilities, next_ids[..., None], -1)[..., 0], cross, own)

    def _feeds(self, target_ids: Array, positions: Array, memory: Memory, top: int) -> dict[str, Array]:
        return {
            "target_ids": target_ids,
            "positions": positions,
            "source_mask": memory.source_mask,
            "top": np.array([min(top, self._vocabulary)]),
            **memory.tensors,
        }

    def _empty_state(self) -> dict[str, Array]:
        # One row without a past, which every row goes on from: fixed axes keep their size, growing ones start at 0.
        sizes = {"past_row": 1, "past": 0}
        return {
            spec.name: np.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes], spec.dtype)
            for spec in self._state_inputs
        }

    def _decode(self, wanted: Sequence[str], feeds: dict[str, Array]) -> list[Any]:
        values = self._decoder.run([*wanted, *self._state_names], feeds)
        state = dict(zip((spec.name for spec in self._state_inputs), values[len(wanted) :], strict=True))
        return [*values[: len(wanted)], state]

    def _session(self, bundle: Path, graph: GraphSpec) -> ort.InferenceSession:
        path = str(bundle / graph.file)
        try:
            session = ort.InferenceSession(path, self._options.session_options(), list(self._options.providers))
        except Exception as error:  # onnxruntime's own errors have no base of their own
            raise BundleError(f"{path}: ONNX Runtime cannot load it: {error}") from error
        _check_signature(graph, session)
        return session


_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "bool": "tensor(bool)",
}


def _check_signature(graph: GraphSpec, session: ort.InferenceSession) -> None:
    """Names, types and axes of the graph must be those of the manifest."""
    for specs, values in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
        expected = {spec.name: (_ORT_TYPES[spec.dtype], list(spec.axes)) for spec in specs}
        found = {value.name: (value.type, list(value.shape)) for value in values}
        if expected != found:
            different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            name = different[0]
            raise BundleError(
                f"{graph.file}: {name} is {found.get(name, 'missing')}, "
                f"the manifest says {expected.get(name, 'nothing')}"
                f" ({len(different)} differ)"
            )
