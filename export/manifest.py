"""What a bundle says of itself: the schema of bundle.json, its reading and its checksums. Torch-free.

Writer, verifier and server all go by this one description: the exported graphs are run by role and axis, never by
knowing which architecture they hold.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from model.config import Frozen, describe
from model.errors import LimelightError
from model.steps import Family
from model.vocabulary import BEGIN, END, PAD, UNKNOWN

MANIFEST = "bundle.json"
FORMAT = 3
"""Version of the bundle's format; a reader refuses any other."""

SHORTLIST_VALUES, SHORTLIST_ANSWERS = "shortlist_log_probabilities", "shortlist_equal_answers"
"""Figures of a shortlist's parity: the largest difference from PyTorch, and answers that are the exact search's."""

Precision = Literal["fp32", "int8", "fp16"]


class BundleError(LimelightError):
    """A bundle that is missing, incomplete, damaged, or of another format."""


class TensorSpec(Frozen):
    """One input or output of a graph."""

    name: str
    """Its name in the graph."""
    role: Literal[
        "source_ids",
        "source_mask",
        "target_ids",
        "positions",
        "new_visible",
        "past_visible",
        "next_ids",
        "top",
        "wanted",
        "beam_size",
        "longest",
        "steps",
        "fewest",
        "length_penalty",
        "memory",
        "state",
        "next_log_probabilities",
        "top_log_probabilities",
        "top_ids",
        "chosen_ids",
        "chosen_log_probabilities",
        "log_probabilities",
        "score",
        "encoder_attention",
        "decoder_attention",
        "cross_attention",
    ]
    """What it is for: the engine goes by this."""
    dtype: Literal["float32", "float64", "float16", "int64", "bool"]
    """Element type."""
    axes: tuple[str | int, ...]
    """Name of each dynamic axis, size of each fixed one. `query` counts a sentence's new positions, one for each of its
    hypotheses or many of one; a state input with a `past` axis collects what its output has at `query`."""
    feeds: str | None = None
    """Of a state output: the state input that it goes into. Of a `wanted` input: the output that it switches on."""


class GraphSpec(Frozen):
    """One ONNX graph."""

    file: str
    """Path in the bundle."""
    inputs: tuple[TensorSpec, ...]
    """In the order of the graph."""
    outputs: tuple[TensorSpec, ...]
    """In the order of the graph."""

    def names(self, role: str) -> list[str]:
        """Names of the inputs, or else of the outputs, of a role."""
        return [spec.name for spec in self.inputs if spec.role == role] or [
            spec.name for spec in self.outputs if spec.role == role
        ]


class Shortlist(Frozen):
    """The graphs of a search among a few candidates for each sentence."""

    size: int = Field(ge=1)
    """Candidates of each sentence."""
    candidates: GraphSpec
    """Source to the candidates' ids and rows of the output projection: memory that the decoder reads besides."""
    decoder: GraphSpec
    """One step as `Graphs.decoder`, whose log-probabilities are over the candidates."""
    greedy: GraphSpec
    """Several greedy steps of it in one call."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for spec in self.candidates.outputs:
            if spec.axes[1:2] != (self.size,):
                raise ValueError(f"{spec.name} has the axes {spec.axes}, a shortlist of {self.size} needs that many")
        return self


class Graphs(Frozen):
    """The graphs of one precision."""

    encoder: GraphSpec
    """Source to memory, and encoder attention."""
    decoder: GraphSpec
    """One step over new target positions."""
    greedy: GraphSpec | None = None
    """Several greedy steps in one call; who has no use for it need not have it."""
    generate: GraphSpec | None = None
    """The whole search in one file that needs no other, where it was asked for: the server does without it."""
    shortlist: Shortlist | None = None
    """A search among candidates, where it was asked for: answers are exact without it."""

    @property
    def all(self) -> list[GraphSpec]:
        """Every graph there is."""
        short = self.shortlist
        shortlist = (short.candidates, short.decoder, short.greedy) if short else ()
        found = (self.encoder, self.decoder, self.greedy, self.generate, *shortlist)
        return [graph for graph in found if graph is not None]


class SpecialIds(Frozen):
    """Ids of the special tokens on both sides."""

    pad: int = PAD
    """Padding."""
    unknown: int = UNKNOWN
    """Anything outside the vocabulary."""
    begin: int = BEGIN
    """What the decoder reads first."""
    end: int = END
    """The last token of source and target."""


class Limits(Frozen):
    """What the model takes."""

    longest_source: int
    """Most source tokens, the end token among them."""
    longest_target: int
    """Most target tokens, the end token among them."""


class FamilyShape(Frozen):
    """Size of one family of attention."""

    layers: int
    """Layers that have it."""
    heads: int
    """Heads in each."""


class FileEntry(Frozen):
    """One file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Checksum."""
    bytes: int = Field(ge=0)
    """Size."""


class Provenance(Frozen):
    """Where the bundle comes from."""

    checkpoint_sha256: str
    """Checksum of the checkpoint's weights."""
    data: dict[str, Any]
    """The data section of the training configuration."""
    training: dict[str, Any]
    """What the checkpoint says of its training, its metrics on its own validation data among them."""
    verified_on: dict[str, Any]
    """The data section that the verification's sources came from."""
    answers: dict[str, dict[str, float]]
    """Metrics on those sources, of PyTorch and of each precision, to compare with each other; the model's quality is in
    `training`."""
    parity: dict[str, dict[str, float]]
    """Largest differences from PyTorch, for each precision and output."""
    opset: int
    """ONNX operator set."""
    versions: dict[str, str]
    """Versions of what exported it."""


class Manifest(Frozen):
    """bundle.json."""

    format: Literal[3] = 3
    """Version of this format."""
    name: str
    """Name of the model."""
    version: str
    """Version of the model: by default the first twelve digits of its checkpoint's checksum."""
    task: Literal["g2p", "text"]
    """What its outputs are."""
    architecture: str
    """For people: the engine goes by the graphs' roles and axes."""
    special_ids: SpecialIds = SpecialIds()
    """Ids with a meaning."""
    source_vocabulary: int
    """Entries of the source vocabulary."""
    target_vocabulary: int
    """Entries of the target vocabulary."""
    limits: Limits
    """What the model takes."""
    attention: dict[Family, FamilyShape]
    """The families of attention that the graphs return."""
    alignment: dict[Literal["layers", "heads"], list[int]] | None = None
    """Which layers and heads of the cross-attention align best, where that was measured."""
    source_tokenizer: str
    """Tokenizer file of the source."""
    target_tokenizer: str
    """Tokenizer file of the target."""
    graphs: dict[Precision, Graphs]
    """Graphs of each precision."""
    files: dict[str, FileEntry]
    """Every other file of the bundle, with its checksum."""
    provenance: Provenance
    """Where it comes from."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = [self.source_tokenizer, self.target_tokenizer]
        named += [graph.file for one in self.graphs.values() for graph in one.all]
        for path in (*named, *self.files):
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise ValueError(f"{path!r} points out of the bundle")
        missing = [path for path in named if path not in self.files]
        if missing:
            raise ValueError(f"no checksum for {', '.join(missing)}")
        for one in self.graphs.values():
            if one.shortlist is not None and one.shortlist.size > self.target_vocabulary:
                raise ValueError(f"a shortlist of {one.shortlist.size} from a vocabulary of {self.target_vocabulary}")
        return self


def read_manifest(bundle: Path) -> Manifest:
    """Read and check bundle.json.

    Raises:
        BundleError: it is missing, is not JSON, or does not follow the schema.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{bundle}: not a bundle, it has no {MANIFEST}; make one with: limelight export CHECKPOINT {bundle}"
        )
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise BundleError(f"{path}: not JSON: {error}") from None
    if isinstance(values, dict) and values.get("format") != FORMAT:
        raise BundleError(
            f"{path}: format {values.get('format')!r}, this version reads {FORMAT}: export the model again"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise BundleError(f"{path}: {describe(error)}") from None


def check_files(bundle: Path, manifest: Manifest) -> None:
    """Compare every file with its checksum, before anything in it is parsed.

    Raises:
        BundleError: a file is missing, has another size, or has been changed; or it is a link out of the bundle.
    """
    root = bundle.resolve()
    for name, entry in manifest.files.items():
        path = bundle / name
        if not path.is_file():
            raise BundleError(f"{path}: missing, though {MANIFEST} lists it: the bundle is incomplete")
        if not path.resolve().is_relative_to(root):
            raise BundleError(f"{path}: a link that leads out of the bundle")
        found = describe_file(path)
        if found != entry:
            raise BundleError(
                f"{path}: does not match its checksum in {MANIFEST} ({found.bytes} bytes, sha256 {found.sha256[:12]}…; "
                f"expected {entry.bytes} bytes, {entry.sha256[:12]}…): copy or export the bundle again"
            )


def describe_file(path: Path) -> FileEntry:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(sha256=digest, bytes=path.stat().st_size)
