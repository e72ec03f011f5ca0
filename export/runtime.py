"""A bundle's graphs as a step model for `model.search`, run by ONNX Runtime. Torch-free.

Everything is done by the manifest's roles and axes: this code does not know which architecture the graphs hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
from jaxtyping import Bool, Int

from export.manifest import BundleError, Graphs, GraphSpec, Manifest, Precision, TensorSpec
from model.steps import Array, Family, Kept, Memory, Question, Step

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
        self.vocabulary = manifest.target_vocabulary
        self._options = options or RuntimeOptions()
        self._encoder = self._session(bundle, self.graphs.encoder)
        self._decoder = self._session(bundle, self.graphs.decoder)
        decoder = self.graphs.decoder
        memory = [spec for spec in decoder.inputs if spec.role == "memory"]
        state = [spec for spec in decoder.inputs if spec.role == "state"]
        following = {spec.feeds: spec.name for spec in decoder.outputs if spec.role == "state"}
        self._memory_names = [spec.name for spec in memory]
        self._state_names = [spec.name for spec in state]
        self._next_names = [following[spec.name] for spec in state]
        self.memory: Sequence[Kept] = [_kept(spec) for spec in memory]
        self.state: Sequence[Kept] = [_kept(spec) for spec in state]

    @property
    def providers(self) -> list[str]:
        """Execution providers in use, as ONNX Runtime names them."""
        return list(self._decoder.get_providers())

    def encode(
        self,
        source_ids: Int[np.ndarray, "batch source"],
        source_mask: Bool[np.ndarray, "batch source"],
        attention: bool = True,
    ) -> Memory:
        """See `StepModel.encode`."""
        names = [*self._memory_names, *(["encoder_attention"] if attention else [])]
        feeds = {"source_ids": source_ids, "source_mask": source_mask, "want_encoder_attention": np.array(attention)}
        found = self._encoder.run(names, feeds)
        count = len(self._memory_names)
        return Memory(tuple(found[:count]), source_mask, found[count] if attention else None)

    def step(self, question: Question) -> Step:
        """See `StepModel.step`."""
        families: list[Family] = [family for family in ("cross", "decoder") if family in question.attention]
        names = ["top_log_probabilities", "top_ids", "next_log_probabilities", *self._next_names]
        feeds: dict[str, Array] = {
            "target_ids": question.target_ids,
            "positions": question.positions,
            "new_visible": question.new_visible,
            "past_visible": question.past_visible,
            "next_ids": question.next_ids,
            "source_mask": question.memory.source_mask,
            "top": np.array([question.top]),
            "want_cross_attention": np.array("cross" in families),
            "want_decoder_attention": np.array("decoder" in families),
            **dict(zip(self._memory_names, question.memory.tensors, strict=True)),
            **dict(zip(self._state_names, question.state, strict=True)),
        }
        found = self._decoder.run([*names, *(f"{family}_attention" for family in families)], feeds)
        weights = dict(zip(families, found[len(names) :], strict=True))
        return Step(
            top_log_probabilities=found[0],
            top_ids=found[1],
            next_log_probabilities=found[2],
            cross_attention=weights.get("cross"),
            decoder_attention=weights.get("decoder"),
            state=tuple(found[3 : len(names)]),
        )

    def _session(self, bundle: Path, graph: GraphSpec) -> ort.InferenceSession:
        path = str(bundle / graph.file)
        try:
            session = ort.InferenceSession(path, self._options.session_options(), list(self._options.providers))
        except Exception as error:  # onnxruntime's own errors have no base of their own
            raise BundleError(f"{path}: ONNX Runtime cannot load it: {error}") from error
        _check_signature(graph, session)
        return session


def _kept(spec: TensorSpec) -> Kept:
    """How the model's own tensors are laid out, without the sentence."""
    names: dict[str | int, Literal["source", "past", "row"]] = {"source": "source", "past": "past", "query": "row"}
    return tuple(axis if isinstance(axis, int) else names[axis] for axis in spec.axes[1:])


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
