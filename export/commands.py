"""`limelight export` and `limelight evaluate`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from export import options
from export.manifest import MANIFEST, SHORTLIST_ANSWERS, Manifest, Precision, check_files, read_manifest
from model.config import Config, Data, PairFiles, load_config, override_data
from model.errors import ConfigError, DataError
from model.evaluate import Decoder, Evaluation
from model.evaluate import evaluate as measure
from model.pairs import Pair, Pairs, Part, read_given, read_pairs, sample_pairs

COMPARED = "an export is compared with PyTorch on validation data"
LEARNT = "a shortlist is learnt from training data"
"""What an export needs data for, if it is not there."""


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder to export.")],
    bundle: Annotated[Path, typer.Argument(help="Bundle folder to write; replaced once the new one is verified.")],
    settings: options.Settings = None,
    validation_pairs: Annotated[
        int | None, typer.Option(min=1, help="Validation sources to decode; by default all.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="Version of the model; by default from the checksum of its weights.")
    ] = None,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate", help="Add generate.onnx: the whole search in one file, for callers without a decoder."
        ),
    ] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Write float16 graphs too, for GPUs; a CPU is no faster with them.")
    ] = False,
    shortlist: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Add graphs for a search among K candidates of each sentence, 256 for example, by a lexicon of up to "
            "200,000 training pairs. Requests ask for it; by default answers stay exact.",
        ),
    ] = None,
) -> None:
    """Export a checkpoint to a bundle, in float32 and int8, verified against PyTorch before it is written."""
    console = Console()
    config = load_config(checkpoint / "config.json") if (checkpoint / "config.json").is_file() else None
    data = None if config is None else override_data(config.data, settings or ())
    pairs = [] if data is None else sample_pairs(_read_part(data, "validation", COMPARED), validation_pairs)
    from export.bundle import Shortlisting, export_bundle

    training = [] if data is None or shortlist is None else _read_part(data, "train", LEARNT)
    with console.status("reading the checkpoint") as status:
        manifest, parity = export_bundle(
            checkpoint,
            bundle,
            pairs,
            version,
            {} if data is None else data.model_dump(mode="json"),
            lambda what, count: status.update(what if not count else f"decoding: {what}"),
            generate=generate,
            fp16=fp16,
            shortlist=None if shortlist is None else Shortlisting(shortlist, training),
        )
    console.print(parity_table(manifest))
    size = {
        precision: sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(precision))
        for precision in manifest.graphs
    }
    sizes = ", ".join(f"{precision} {count / 1e6:.1f} MB" for precision, count in size.items())
    console.print(
        f"[bold]{bundle}[/bold]: {manifest.name} {manifest.version}, {sizes}; {parity.answers:,} sources decoded"
    )


def _read_part(data: Data, part: Part, why: str) -> list[Pair]:
    try:
        read = read_pairs(data, part)
    except DataError as error:
        raise DataError(
            f"{error}; {why}: name others with --set, for example data.kind=cmudict, or data.{part}.source=FILE and "
            f"data.{part}.target=FILE"
        ) from None
    _tell_empty(read)
    return read.pairs


def parity_table(manifest: Manifest) -> Table:
    """The figures of the verification, as they stand in the manifest."""
    table = Table(title="Exported against PyTorch: largest differences, and answers")
    precisions = list(manifest.graphs)
    table.add_column("")
    table.add_column("PyTorch", justify="right")
    for precision in precisions:
        table.add_column(precision, justify="right")
    parity, quality = manifest.provenance.parity, manifest.provenance.answers
    for name in ("log_probabilities", "encoder_attention", "decoder_attention", "cross_attention"):
        table.add_row(name.replace("_", " "), "", *(f"{parity[precision][name]:.1e}" for precision in precisions))
    equal = [
        f"{parity[precision]['equal_answers']:.0f} of {parity[precision]['answers']:.0f}" for precision in precisions
    ]
    table.add_row("equal answers", "", *equal)
    if all(SHORTLIST_ANSWERS in found for found in parity.values()):
        kept = [f"{found[SHORTLIST_ANSWERS]:.0f} of {found['answers']:.0f}" for found in parity.values()]
        table.add_row("shortlist: as without", "", *kept)
    for metric, value in quality["torch"].items():
        table.add_row(
            metric.upper(), f"{value:.2f}", *(f"{quality[precision][metric]:.2f}" for precision in precisions)
        )
    return table


def evaluate(
    model: options.Model,
    part: options.Part = "validation",
    source: options.Source = None,
    target: options.Target = None,
    tsv: options.Tsv = None,
    settings: options.Settings = None,
    limit: options.Limit = None,
    beam_size: Annotated[int, typer.Option("--beam-size", "-b", min=1, max=16, help="1 is greedy search.")] = 1,
    length_penalty: Annotated[float, typer.Option(min=0, max=10, help="See the README on search.")] = 1.0,
    precision: options.Precision = "fp32",
    shortlist: Annotated[
        bool, typer.Option("--shortlist", help="Search among candidates, with a bundle that was exported so.")
    ] = False,
    threads: options.Threads = None,
    output: Annotated[Path | None, typer.Option(help="Write source, answer and references as TSV.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Score a checkpoint or a bundle: word and phoneme error rate (g2p), or BLEU and chrF (text)."""
    decoder, task, data = load_decoder(model, precision, threads, shortlist=shortlist)
    if tsv or source or target:
        read = given_pairs(source, target, tsv)
    else:
        read = read_pairs(override_data(data, settings or ()), part)
    _tell_empty(read)
    pairs = sample_pairs(read.pairs, limit)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task_id = progress.add_task(
            "decoding", total=len({pair.source for pair in pairs}) if task == "g2p" else len(pairs)
        )
        found = measure(
            decoder, task, pairs, beam_size, length_penalty, lambda count: progress.advance(task_id, count), read.others
        )
    if output:
        _write_answers(output, found, pairs)
    _print(model, found, beam_size, shortlist=shortlist, as_json=as_json)


def given_pairs(source: Path | None, target: Path | None, tsv: Path | None) -> Pairs:
    """Pairs of files that the command names.

    Raises:
        ConfigError: it names none, or too many.
        DataError: they cannot be read.
    """
    try:
        files = PairFiles(source=source, target=target, tsv=tsv)
    except ValidationError:
        raise ConfigError("give either --source and --target, or --tsv") from None
    return read_given(files)


def _tell_empty(read: Pairs) -> None:
    if read.empty:
        typer.echo(f"left out: {read.empty:,} pairs that are empty on one side or both", err=True)


def load_decoder(
    model: Path, precision: Precision, threads: int | None, *, shortlist: bool
) -> tuple[Decoder, str, Data]:
    """A checkpoint or a bundle, its task, and where its data lies.

    Args:
        model: folder of either.
        precision: of a bundle.
        threads: of ONNX Runtime; None for all processors.
        shortlist: search among candidates, with a bundle.

    Raises:
        ConfigError: a checkpoint has no such thing.
        CheckpointError, BundleError: it cannot be loaded.
    """
    if (model / MANIFEST).is_file():
        return _load_bundle(model, precision, threads, shortlist=shortlist)
    if shortlist:
        raise ConfigError(f"--shortlist: {model} is no bundle; a checkpoint is searched exactly, by PyTorch")
    if precision != "fp32":
        raise ConfigError(f"--precision {precision}: {model} is no bundle; a checkpoint is run by PyTorch in fp32")
    from model.checkpoint import load_checkpoint
    from model.torch_steps import TorchStepModel

    checkpoint = load_checkpoint(model)
    config = checkpoint.config
    decoder = Decoder(
        TorchStepModel(checkpoint.model),
        checkpoint.source,
        checkpoint.target,
        config.model.longest_source,
        config.model.longest_target,
    )
    return decoder, config.task, config.data


def _load_bundle(
    bundle: Path, precision: Precision, threads: int | None, *, shortlist: bool
) -> tuple[Decoder, str, Data]:
    from export.cpu import available_cpus
    from export.runtime import OnnxGreedyModel, RuntimeOptions
    from model.tokenizer import Tokenizer

    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    runtime = RuntimeOptions(threads=threads or available_cpus())
    steps = OnnxGreedyModel(bundle, manifest, precision, runtime)
    if shortlist:
        steps = OnnxGreedyModel(bundle, manifest, precision, runtime, shortlist_of=steps)
    decoder = Decoder(
        steps,
        Tokenizer.load(bundle / manifest.source_tokenizer),
        Tokenizer.load(bundle / manifest.target_tokenizer),
        manifest.limits.longest_source,
        manifest.limits.longest_target,
    )
    return decoder, manifest.task, cast("Any", Config.model_validate({"data": manifest.provenance.data})).data


def _write_answers(path: Path, found: Evaluation, pairs: Sequence[Pair]) -> None:
    references: dict[str, list[str]] = {}
    for pair in pairs:
        references.setdefault(pair.source, []).append(pair.target)
    rows = (
        "\t".join((source, answer, *references[source]))
        for source, answer in zip(found.sources, found.answers, strict=True)
    )
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def _print(model: Path, found: Evaluation, beam_size: int, *, shortlist: bool, as_json: bool) -> None:
    if as_json:
        values = {
            "model": str(model),
            "sources": len(found.sources),
            "too_long": found.too_long,
            "beam_size": beam_size,
            "shortlist": shortlist,
        }
        typer.echo(json.dumps(values | dict(found.metrics)))
        return
    figures = "  ".join(f"{name.upper()} {value:.2f}" for name, value in found.metrics.items())
    too_long = f", {found.too_long} of them too long and answered with nothing" if found.too_long else ""
    how = f"beam {beam_size}, shortlist" if shortlist else f"beam {beam_size}"
    typer.echo(f"{figures}  ({len(found.sources):,} sources{too_long}; {how})")
