"""A bundle's graphs as a step model for `model.search`, run by ONNX Runtime. Torch-free.

Everything is done by the manifest's roles and axes: this code does not know which architecture the graphs hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from jaxtyping import Bool, Int

from export.manifest import BundleError, Graphs, GraphSpec, Manifest, Precision, TensorSpec
from model.steps import Array, Family, GreedySteps, Kept, Memory, Question, Step

LOG_ERRORS = 3
"""ONNX Runtime's log level: its warnings about graphs that are fine would otherwise fill the log."""

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

PROVIDERS: Mapping[str, tuple[str, ...]] = {"cpu": (CPU,), "cuda": (CUDA, CPU)}
"""What ONNX Runtime calls the providers, with what each leaves to another."""

PROVIDER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    CUDA: {
        # Sizes change at nearly every step: an arena that doubles would hold up to twice what is needed.
        "arena_extend_strategy": "kSameAsRequested",
        # float32 is to mean float32: TF32 has 10 bits of mantissa, and the export is held to 1e-4.
        "use_tf32": "0",
    }
}
"""What is set of each provider; everything else is as ONNX Runtime has it."""


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """How ONNX Runtime runs the graphs."""

    providers: tuple[str, ...] = (CPU,)
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

    def session(self, model: str | bytes) -> ort.InferenceSession:
        """A session of a graph, from its file or its bytes."""
        providers = [(name, dict(PROVIDER_OPTIONS.get(name, {}))) for name in self.providers]
        return ort.InferenceSession(model, self.session_options(), providers)


SMALL_OUTPUTS = ("top_log_probabilities", "top_ids", "next_log_probabilities")
"""What every step returns, wherever the rest of it stays."""


DECODERS: tuple[Family, ...] = ("cross", "decoder")
"""Families of attention that the decoder has."""

LOOKS = tuple(f"{family}_attention" for family in DECODERS)
"""Their outputs."""

CHOSEN = ("chosen_ids", "chosen_log_probabilities")
"""What several steps always return."""


class OnnxStepModel:
    """The encoder and decoder graphs of one precision.

    Args:
        bundle: folder of the bundle, its files already checked.
        manifest: its description.
        precision: which graphs.
        options: how to run them.
        shortlist_of: a model with the same encoder. With it the search is among each sentence's candidates; by default
            it is exact.

    Attributes:
        memory: see `StepModel.memory`.
        state: see `StepModel.state`.
        dtype: of the state.
        vocabulary: entries of the target vocabulary.
        graphs: as the manifest describes them.
        options: how they are run.
        encoder: session of the encoder.
        decoder: session of the decoder.
        candidates: session of the graph that finds a sentence's candidates, where the search is among those.
        most: candidates that a step can return.
        memory_specs: the decoder's inputs that hold the memory.
        state_specs: the decoder's inputs that hold the state.
        next_names: for each of them, the output with what is new of it.

    Raises:
        BundleError: the bundle has no such precision or no shortlist, or its graphs are not what the manifest says.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        precision: Precision,
        options: RuntimeOptions | None = None,
        *,
        shortlist_of: "OnnxStepModel | None" = None,
    ) -> None:
        if precision not in manifest.graphs:
            raise BundleError(f"{bundle}: has no precision {precision!r}, only {', '.join(manifest.graphs)}")
        self.graphs: Graphs = manifest.graphs[precision]
        if shortlist_of is not None and self.graphs.shortlist is None:
            raise BundleError(f"{bundle}: {precision} has no shortlist: export the model again with --shortlist")
        self.source_vocabulary, self.vocabulary = manifest.source_vocabulary, manifest.target_vocabulary
        self.options = options or RuntimeOptions()
        self._shortlist = None if shortlist_of is None else self.graphs.shortlist
        self.most = self.vocabulary if self._shortlist is None else self._shortlist.size
        decoder = self.graphs.decoder if self._shortlist is None else self._shortlist.decoder
        self.encoder: ort.InferenceSession = (
            self._session(bundle, self.graphs.encoder) if shortlist_of is None else shortlist_of.encoder
        )
        self.candidates = None if self._shortlist is None else self._session(bundle, self._shortlist.candidates)
        self.decoder = self._session(bundle, decoder)
        following = {spec.feeds: spec.name for spec in decoder.outputs if spec.role == "state"}
        self.memory_specs = [spec for spec in decoder.inputs if spec.role == "memory"]
        self.state_specs = [spec for spec in decoder.inputs if spec.role == "state"]
        self.next_names = [following[spec.name] for spec in self.state_specs]
        self.memory: Sequence[Kept] = [_kept(spec) for spec in self.memory_specs]
        self.state: Sequence[Kept] = [_kept(spec) for spec in self.state_specs]
        self.dtype = _dtype(decoder, self.state_specs)

    @property
    def providers(self) -> list[str]:
        """Execution providers in use, as ONNX Runtime names them."""
        return list(self.decoder.get_providers())

    def encode(
        self,
        source_ids: Int[np.ndarray, "batch source"],
        source_mask: Bool[np.ndarray, "batch source"],
        attention: bool = True,
    ) -> Memory:
        """See `StepModel.encode`."""
        names, feeds = self.encoder_call(source_ids, source_mask, attention)
        found = dict(zip(names, self.encoder.run(names, feeds), strict=True))
        if self.candidates is not None:
            names, feeds = self.candidates_call(source_ids, source_mask)
            found |= zip(names, self.candidates.run(names, feeds), strict=True)
        return self.as_memory(found, source_mask)

    def step(self, question: Question) -> Step:
        """See `StepModel.step`."""
        names, feeds = self.decoder_call(question)
        return self.as_step(dict(zip(names, self.decoder.run(names, feeds), strict=True)))

    def encoder_call(self, source_ids: Array, source_mask: Array, attention: bool) -> tuple[list[str], dict[str, Any]]:
        """Outputs to fetch from the encoder, and its inputs.

        Raises:
            ValueError: an id that the encoder has no embedding for.
        """
        _check_ids("source_ids", source_ids, self.source_vocabulary)
        names = [*self.graphs.encoder.names("memory"), *(["encoder_attention"] if attention else [])]
        feeds = {"source_ids": source_ids, "source_mask": source_mask, "want_encoder_attention": np.array(attention)}
        return names, feeds

    def candidates_call(self, source_ids: Array, source_mask: Array) -> tuple[list[str], dict[str, Any]]:
        """Outputs to fetch from the graph that finds candidates, none for an exact search, and its inputs."""
        names = [] if self._shortlist is None else self._shortlist.candidates.names("memory")
        return names, {"source_ids": source_ids, "source_mask": source_mask}

    def as_memory(self, found: Mapping[str, Any], source_mask: Array) -> Memory:
        """What the encoder returned, and the graph that finds candidates."""
        tensors = tuple(found[spec.name] for spec in self.memory_specs)
        return Memory(tensors, source_mask, found.get("encoder_attention"))

    def decoder_call(self, question: Question) -> tuple[list[str], dict[str, Any]]:
        """Outputs to fetch from the decoder, and its inputs.

        Raises:
            ValueError: an id that the decoder has no embedding for.
        """
        _check_ids("next_ids", question.next_ids, self.vocabulary)
        own = {
            "new_visible": question.new_visible,
            "next_ids": question.next_ids,
            "top": np.array([min(question.top, self.most)]),
        }
        names, feeds = self._call(question)
        return [*SMALL_OUTPUTS, *names], feeds | own

    def as_step(self, found: Mapping[str, Any]) -> Step:
        """What the decoder returned."""
        return Step(
            **{name: found[name] for name in SMALL_OUTPUTS},
            cross_attention=found.get("cross_attention"),
            decoder_attention=found.get("decoder_attention"),
            state=tuple(found[name] for name in self.next_names),
        )

    def _call(self, question: Question) -> tuple[list[str], dict[str, Any]]:
        """What one step and several have in common of their outputs and inputs."""
        _check_ids("target_ids", question.target_ids, self.vocabulary)
        families = [family for family in DECODERS if family in question.attention]
        specs, tensors = [*self.memory_specs, *self.state_specs], [*question.memory.tensors, *question.state]
        feeds: dict[str, Any] = {
            "target_ids": question.target_ids,
            "positions": question.positions,
            "past_visible": question.past_visible,
            "source_mask": question.memory.source_mask,
            **{f"want_{family}_attention": np.array(family in families) for family in DECODERS},
            **{spec.name: tensor for spec, tensor in zip(specs, tensors, strict=True)},
        }
        return [*self.next_names, *(f"{family}_attention" for family in families)], feeds

    def _session(self, bundle: Path, graph: GraphSpec) -> ort.InferenceSession:
        path = str(bundle / graph.file)
        try:
            session = self.options.session(path)
        except Exception as error:  # onnxruntime's own errors have no base of their own
            raise BundleError(f"{path}: ONNX Runtime cannot load it: {error}") from error
        _check_signature(graph, session)
        return session


class OnnxGreedyModel(OnnxStepModel):
    """The same, and the graph that takes several greedy steps in one call; it holds the decoder's weights once more.

    Args:
        bundle: folder of the bundle, its files already checked.
        manifest: its description.
        precision: which graphs.
        options: how to run them.
        shortlist_of: see `OnnxStepModel`.

    Raises:
        BundleError: the bundle has no such precision or no such graph, or its graphs are not what the manifest says.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        precision: Precision,
        options: RuntimeOptions | None = None,
        *,
        shortlist_of: OnnxStepModel | None = None,
    ) -> None:
        super().__init__(bundle, manifest, precision, options, shortlist_of=shortlist_of)
        greedy = self.graphs.greedy if self._shortlist is None else self._shortlist.greedy
        if greedy is None:
            raise BundleError(f"{bundle}: {precision} has no graph for several steps: export the model again")
        self._greedy = self._session(bundle, greedy)
        if any(spec.axes[:2] != ("step", "batch") for spec in greedy.outputs if spec.role in LOOKS):
            raise BundleError(f"{bundle / greedy.file}: its attention is laid out as no more: export the model again")
        decoder = self.graphs.decoder
        self._layers_heads = {spec.name: spec.axes[1:3] for spec in decoder.outputs if spec.role in LOOKS}

    def greedy(self, question: Question, steps: int, fewest: int) -> GreedySteps:
        """See `StepsAhead.greedy`."""
        names, feeds = self._call(question)
        names, feeds = [*CHOSEN, *names], feeds | {"steps": np.array(steps), "fewest": np.array(fewest)}
        found = dict(zip(names, self._greedy.run(names, feeds), strict=True))
        for name in self._layers_heads.keys() & found.keys():
            steps, batch, *_, seen = found[name].shape
            found[name] = found[name].reshape(steps, batch, *self._layers_heads[name], seen).transpose(1, 2, 3, 0, 4)
        return GreedySteps(
            ids=found["chosen_ids"],
            log_probabilities=found["chosen_log_probabilities"],
            cross_attention=found.get("cross_attention"),
            decoder_attention=found.get("decoder_attention"),
            state=tuple(found[name] for name in self.next_names),
        )


def _check_ids(name: str, ids: Array, vocabulary: int) -> None:
    """The graphs do not: on a CPU a negative id wraps, on a GPU any other reads what lies beyond the table."""
    lowest, highest = int(ids.min(initial=0)), int(ids.max(initial=0))
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"{name}: {wrong} is no id of a vocabulary of {vocabulary}: ids run from 0 to {vocabulary - 1}"
        )


def _dtype(graph: GraphSpec, state: Sequence[TensorSpec]) -> np.dtype[Any]:
    """Element type of the state: one for all of it."""
    found = sorted({spec.dtype for spec in state})
    if len(found) > 1:
        raise BundleError(f"{graph.file}: its state is of the types {', '.join(found)}: export it with one")
    return np.dtype(found[0] if found else "float32")


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
