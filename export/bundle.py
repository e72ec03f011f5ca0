"""Write a bundle: export, quantise, verify, and only then let the folder appear.

checkpoint ── trace ── fp32 graphs ─┬─ quantise ── int8 graphs ─┬─ verify all against PyTorch ── rename into place
                                    └─ halve ───── fp16 graphs ─┘   (fp16 where it is asked for)

Where it is asked for, each precision also gets its encoder and search in one file, held to the answers of the two; or
graphs for a search among a few candidates of each sentence.
"""

import importlib.metadata
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from export.calibrate import calibrate, renamed
from export.generate import GENERATE, assemble, generate_spec, save_generate, search_step
from export.graph_bytes import OPSET
from export.graphs import ExampleSizes, Exported, decoder_graph, encoder_graph
from export.greedy import GREEDY, greedy_graph
from export.halve import halve, halve_specs
from export.lexicon import Lexicon, learn_lexicon
from export.manifest import (
    MANIFEST,
    BundleError,
    FamilyShape,
    Graphs,
    GraphSpec,
    Limits,
    Manifest,
    Precision,
    Provenance,
    Shortlist,
    describe_file,
)
from export.onnx_writer import finish, save_graphs, trace
from export.optimise import optimise
from export.quantise import quantise
from export.runtime import OnnxGreedyModel, OnnxStepModel
from export.shortlist import (
    CANDIDATES,
    SHORTLIST_DECODER,
    SHORTLIST_GREEDY,
    candidates_graph,
    check_size,
    quantise_candidates,
    shortlist_decoder_graph,
)
from export.verify import Parity, verify
from export.verify_generate import verify_generate
from export.verify_shortlist import verify_shortlist
from model.card import CARD
from model.checkpoint import SOURCE_TOKENIZER, TARGET_TOKENIZER, WEIGHTS, Checkpoint, atomic_folder, load_checkpoint
from model.pairs import Pair

SEARCH_STEP = "search step"
"""What becomes a part of generate.onnx, and no file of its own."""

VERSIONED = ("limelight", "torch", "onnx", "onnxscript", "onnxruntime", "tokenizers")
"""Packages whose versions the manifest records."""

POSITIONS = {
    "encoder": "source_ids",
    "decoder": "target_ids",
    SHORTLIST_DECODER: "target_ids",
    SEARCH_STEP: "carried.totals",
}
"""Of each traced graph, an input with one entry for every position that its rows stand for."""


class Shortlisting(NamedTuple):
    """A search among candidates that is asked for."""

    size: int
    """Candidates of each sentence."""
    pairs: Sequence[Pair]
    """Training pairs that its lexicon is learnt from."""


Told = Callable[[str, int], None]
Traced = dict[str, tuple[onnx.ModelProto, Exported]]


def export_bundle(
    checkpoint_folder: Path,
    bundle: Path,
    pairs: Sequence[Pair],
    version: str | None = None,
    verified_on: Mapping[str, Any] | None = None,
    progress: Told = lambda what, count: None,
    *,
    generate: bool = False,
    fp16: bool = False,
    shortlist: Shortlisting | None = None,
) -> tuple[Manifest, Parity]:
    """Export a checkpoint in float32 and int8, and on request in float16.

    Args:
        checkpoint_folder: what to export.
        bundle: where to; a bundle that is there is replaced, once the new one is verified.
        pairs: validation pairs, decoded by PyTorch and by every precision.
        version: of the model; by default the first twelve digits of its weights' checksum.
        verified_on: what the pairs are, for the manifest; by default the checkpoint's own data.
        progress: told what is being done, and how many more sources were decoded in it.
        generate: add generate.onnx to each precision, which doubles the bundle: its weights are its own.
        fp16: float16 too, for GPUs: a CPU computes it in float32, with casts around everything.
        shortlist: add a search among candidates to each precision, for requests that ask for it.

    Raises:
        BundleError: something is there that is no bundle, a weight is too large for float16, or the vocabulary has no
            shortlist of such a size.
        DataError: no pair fits the model, so int8 cannot be made; or there is none to learn a lexicon from.
        CheckpointError: the checkpoint cannot be read.
        VerificationError: the graphs differ from the checkpoint; nothing is written.
    """
    bundle = bundle.absolute()
    _refuse_to_replace(bundle)
    checkpoint = load_checkpoint(checkpoint_folder)
    digest = describe_file(checkpoint_folder / WEIGHTS).sha256
    if shortlist is not None:
        check_size(shortlist.size, len(checkpoint.target))
    with atomic_folder(bundle) as folder:
        graphs = _write_graphs(checkpoint, folder, pairs, progress, generate=generate, fp16=fp16, shortlist=shortlist)
        checkpoint.source.save(folder / SOURCE_TOKENIZER)
        checkpoint.target.save(folder / TARGET_TOKENIZER)
        if (checkpoint_folder / CARD).is_file():
            shutil.copyfile(checkpoint_folder / CARD, folder / CARD)
        manifest = _describe(checkpoint, folder, graphs, digest, version or digest[:12])
        models = {precision: OnnxGreedyModel(folder, manifest, precision) for precision in graphs}
        parity = verify(checkpoint, models, pairs, progress)
        if shortlist is not None:
            short = {
                precision: OnnxGreedyModel(folder, manifest, precision, shortlist_of=model)
                for precision, model in models.items()
            }
            verify_shortlist(checkpoint, short, pairs, parity, progress)
        if generate:
            progress("comparing generate.onnx", 0)
            _verify_generate(checkpoint, folder, models, pairs)
        manifest = _with_findings(manifest, parity, dict(verified_on or manifest.provenance.data))
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest, parity


def _refuse_to_replace(bundle: Path) -> None:
    empty = bundle.is_dir() and not any(bundle.iterdir())
    if bundle.exists() and not empty and not (bundle / MANIFEST).is_file():
        raise BundleError(f"{bundle}: is there already and is no bundle: name a new folder, or remove it first")


def _write_graphs(
    checkpoint: Checkpoint,
    folder: Path,
    pairs: Sequence[Pair],
    progress: Told,
    *,
    generate: bool,
    fp16: bool,
    shortlist: Shortlisting | None,
) -> dict[Precision, Graphs]:
    lexicon = None
    if shortlist is not None:
        progress("learning the lexicon of the shortlist", 0)
        lexicon = learn_lexicon(shortlist.pairs, checkpoint.source, checkpoint.target)
    exported = _modules(checkpoint, generate=generate, shortlist=shortlist)
    traced = {}
    for name, module in exported.items():
        progress(f"tracing the {name}", 0)
        traced[name] = trace(module)
        optimise(traced[name], POSITIONS[name])
    progress("looking at the values of real pairs", 0)
    ranges = calibrate({name: traced[name] for name in ("encoder", "decoder")}, exported, checkpoint, pairs)
    for name in traced.keys() - ranges.keys():
        ranges[name] = renamed(ranges["decoder"], traced["decoder"].graph, traced[name].graph)
    progress("quantising", 0)
    precisions: dict[Precision, Traced] = {
        "fp32": {name: (model, exported[name]) for name, model in traced.items()},
        "int8": {name: (quantise(model, ranges[name]), exported[name]) for name, model in traced.items()},
    }
    if fp16:
        precisions["fp16"] = {name: _halved(model, exported[name]) for name, model in traced.items()}
    specs: dict[Precision, Graphs] = {}
    for precision, made in precisions.items():
        step, _ = made.pop(SEARCH_STEP, (None, None))
        models = {name: model for name, (model, _) in made.items()}
        single = None if step is None else assemble(models["encoder"], step, checkpoint.config.model)
        contracts = {name: finish(model, contract) for name, (model, contract) in made.items()}
        models[GREEDY], contracts[GREEDY] = greedy_graph(
            models["decoder"], contracts["decoder"], len(checkpoint.target)
        )
        if lexicon is not None:
            _add_candidates(precision, checkpoint, lexicon, models, contracts)
        save_graphs(folder / precision, {f"{name}.onnx": model for name, model in models.items()})
        specs[precision] = _specs(precision, contracts)
        if single is not None:
            file = f"{precision}/{GENERATE}.onnx"
            save_generate(folder / file, single)
            spec = generate_spec(file, checkpoint.config.model)
            specs[precision] = specs[precision].model_copy(update={"generate": spec})
    return specs


def _modules(checkpoint: Checkpoint, *, generate: bool, shortlist: Shortlisting | None) -> dict[str, Exported]:
    """What is to be traced."""
    sizes, vocabulary = ExampleSizes(), len(checkpoint.target)
    exported = {
        "encoder": encoder_graph(checkpoint.model, len(checkpoint.source), sizes),
        "decoder": decoder_graph(checkpoint.model, vocabulary, sizes),
    }
    if shortlist is not None:
        exported[SHORTLIST_DECODER] = shortlist_decoder_graph(checkpoint.model, shortlist.size, vocabulary, sizes)
    if generate:
        exported[SEARCH_STEP] = search_step(checkpoint.model, sizes)
    return exported


def _add_candidates(
    precision: Precision,
    checkpoint: Checkpoint,
    lexicon: Lexicon,
    models: dict[str, onnx.ModelProto],
    contracts: dict[str, Exported],
) -> None:
    """What goes with a finished decoder among candidates."""
    decoder = contracts[SHORTLIST_DECODER]
    projection = checkpoint.model.decoder.projection.weight.detach().numpy()
    found, contracts[CANDIDATES] = candidates_graph(lexicon, projection, contracts["encoder"], decoder)
    models[CANDIDATES] = quantise_candidates(found) if precision == "int8" else found
    models[SHORTLIST_GREEDY], contracts[SHORTLIST_GREEDY] = greedy_graph(
        models[SHORTLIST_DECODER], decoder, len(checkpoint.target)
    )


def _halved(model: onnx.ModelProto, exported: Exported) -> tuple[onnx.ModelProto, Exported]:
    contract = exported._replace(inputs=halve_specs(exported.inputs), outputs=halve_specs(exported.outputs))
    names = {spec.name for spec in (*contract.inputs, *contract.outputs) if spec.dtype == "float16"}
    return halve(model, names), contract


def _specs(precision: Precision, contracts: Mapping[str, Exported]) -> Graphs:
    specs = {
        name: GraphSpec(file=f"{precision}/{name}.onnx", inputs=exported.inputs, outputs=exported.outputs)
        for name, exported in contracts.items()
    }
    if CANDIDATES not in specs:
        return Graphs(**specs)
    candidates = specs.pop(CANDIDATES)
    decoder, greedy = specs.pop(SHORTLIST_DECODER), specs.pop(SHORTLIST_GREEDY)
    size = int(candidates.outputs[0].axes[1])
    return Graphs(**specs, shortlist=Shortlist(size=size, candidates=candidates, decoder=decoder, greedy=greedy))


def _verify_generate(
    checkpoint: Checkpoint, folder: Path, models: Mapping[Precision, OnnxStepModel], pairs: Sequence[Pair]
) -> None:
    limits = checkpoint.config.model
    encoded = checkpoint.source.encode_ids([pair.source for pair in pairs])
    sources = [ids for ids in encoded if len(ids) <= limits.longest_source]
    for precision, model in models.items():
        path = folder / precision / f"{GENERATE}.onnx"
        verify_generate(path, precision, model, sources, limits.longest_target)


def _describe(
    checkpoint: Checkpoint, folder: Path, graphs: Mapping[Precision, Graphs], digest: str, version: str
) -> Manifest:
    config, shape = checkpoint.config, checkpoint.config.model
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    decoder = FamilyShape(layers=shape.decoder_layers, heads=shape.heads)
    return Manifest(
        name=config.name,
        version=version,
        task=config.task,
        architecture="transformer",
        source_vocabulary=len(checkpoint.source),
        target_vocabulary=len(checkpoint.target),
        limits=Limits(longest_source=shape.longest_source, longest_target=shape.longest_target),
        attention={
            "encoder": FamilyShape(layers=shape.encoder_layers, heads=shape.heads),
            "decoder": decoder,
            "cross": decoder,
        },
        source_tokenizer=SOURCE_TOKENIZER,
        target_tokenizer=TARGET_TOKENIZER,
        graphs=dict(graphs),
        files={path.relative_to(folder).as_posix(): describe_file(path) for path in files},
        provenance=Provenance(
            checkpoint_sha256=digest,
            data=config.data.model_dump(mode="json"),
            training=dict(checkpoint.metrics),
            verified_on={},
            answers={},
            parity={},
            opset=OPSET,
            versions={name: installed_version(name) for name in VERSIONED},
        ),
    )


def installed_version(package: str) -> str:
    """Of a package, or of its build for GPUs, which takes its place under another name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version(f"{package}-gpu")


def _with_findings(manifest: Manifest, parity: Parity, verified_on: dict[str, Any]) -> Manifest:
    findings = {
        precision: {**differences, "answers": float(parity.answers), "equal_answers": float(parity.equal[precision])}
        for precision, differences in parity.differences.items()
    }
    provenance = manifest.provenance.model_copy(
        update={"verified_on": verified_on, "answers": parity.quality, "parity": findings}
    )
    return manifest.model_copy(update={"provenance": provenance})
