"""Load a bundle for serving: checksums first, then tokenizers and graphs, then a warm-up."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort

from export.cpu import available_cpus
from export.manifest import BundleError, Manifest, Precision, check_files, read_manifest
from export.resident import ResidentStepModel
from export.runtime import CUDA, PROVIDERS, OnnxGreedyModel, OnnxStepModel, RuntimeOptions
from model.errors import InvalidRequestError, NotANumberError
from model.search import SearchOptions, search
from model.steps import StepModel
from model.tokenizer import Tokenizer
from model.vocabulary import END
from serve.errors import ProviderError

Provider = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class ServedModel:
    """A model that is ready to answer.

    Attributes:
        manifest: what the bundle says of itself.
        source: source tokenizer.
        target: target tokenizer.
        steps: its graphs.
        precision: of its weights.
        provider: what runs it, "cpu" or "cuda".
        threads: that one run may use.
        shortlist: the graphs of a search among candidates, if the bundle has them.
    """

    manifest: Manifest
    source: Tokenizer
    target: Tokenizer
    steps: StepModel
    precision: Precision
    provider: str
    threads: int
    shortlist: StepModel | None = None


def load_model(
    bundle: Path, *, provider: Provider = "auto", precision: Precision | None = None, threads: int | None = None
) -> ServedModel:
    """Check, load and warm up a bundle.

    Args:
        bundle: its folder.
        provider: "auto" takes CUDA where there is a device, and the CPU elsewhere.
        precision: which graphs; by default float16 on CUDA if the bundle has it, and float32 elsewhere.
        threads: for one run; by default the processors that affinity and quota allow.

    Raises:
        BundleError: the bundle is damaged, or has no such precision.
        ProviderError: the provider that was asked for is not there.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    count = threads or available_cpus()
    chosen = choose_provider(provider)
    options = RuntimeOptions(providers=PROVIDERS[chosen], threads=count)
    found = precision or default_precision(manifest, chosen)
    made = OnnxStepModel if chosen == "cuda" else OnnxGreedyModel
    graphs = made(bundle, manifest, found, options)
    if PROVIDERS[chosen][0] not in graphs.providers:
        if provider == "auto":
            return load_model(bundle, provider="cpu", precision=precision, threads=threads)
        raise ProviderError(f"ONNX Runtime could not start {PROVIDERS[chosen][0]} and fell back to {graphs.providers}")
    steps = _where_it_belongs(graphs, chosen)
    shortlist = None
    if manifest.graphs[found].shortlist is not None:
        shortlist = _where_it_belongs(made(bundle, manifest, found, options, shortlist_of=graphs), chosen)
    source, target = (
        Tokenizer.load(bundle / manifest.source_tokenizer),
        Tokenizer.load(bundle / manifest.target_tokenizer),
    )
    if (len(source), len(target)) != (manifest.source_vocabulary, manifest.target_vocabulary):
        raise BundleError(
            f"{bundle}: the tokenizers have {len(source)} and {len(target)} entries, not what the graphs take"
        )
    model = ServedModel(manifest, source, target, steps, found, chosen, count, shortlist)
    warm_up(model)
    return model


def _where_it_belongs(graphs: OnnxStepModel, provider: str) -> StepModel:
    """A device keeps memory and state to itself."""
    return ResidentStepModel(graphs) if provider == "cuda" else graphs


def choose_provider(wanted: Provider) -> str:
    """Which provider to try: "cpu" or "cuda".

    Raises:
        ProviderError: CUDA is asked for, and this ONNX Runtime was built without it.
    """
    available = ort.get_available_providers()
    if wanted == "cuda" and CUDA not in available:
        raise ProviderError(
            f"--provider cuda: this onnxruntime offers {', '.join(available)} only; install limelight[gpu] in place of "
            "limelight[serve], or use --provider cpu"
        )
    if wanted == "auto":
        return "cuda" if CUDA in available else "cpu"
    return wanted


def default_precision(manifest: Manifest, provider: str) -> Precision:
    """float16 is what a GPU is fast in, and what a CPU only computes with casts around everything."""
    return "fp16" if provider == "cuda" and "fp16" in manifest.graphs else "fp32"


def warm_up(model: ServedModel) -> None:
    """Decode a short source, so that the first caller does not pay for first allocations; checks the answers too.

    Raises:
        BundleError: the graphs answer with something that is not a probability.
    """
    longest = min(4, model.manifest.limits.longest_target)
    try:
        answers = [
            search(steps, [[END]], [SearchOptions(longest=longest, beam_size=width)])[0][0]
            for steps in (model.steps, model.shortlist)
            if steps is not None
            for width in (1, 2)
        ]
    except (InvalidRequestError, NotANumberError) as error:  # without constraints, only infinity rules everything out
        raise BundleError(f"{model.manifest.name}: the warm-up gave log-probabilities that are no numbers") from error
    values = np.concatenate([answer.log_probabilities for answer in answers])
    if not np.all(np.isfinite(values) & (values <= 1e-5)):
        raise BundleError(f"{model.manifest.name}: the warm-up gave log-probabilities {values.tolist()}")
