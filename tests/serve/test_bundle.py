"""Loading a bundle: what is damaged, missing or senseless is refused before the server says that it is ready."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest

from export.manifest import BundleError, Precision, describe_file
from model.errors import CheckpointError
from model.steps import Question, Step
from serve import bundle as serving_bundle
from serve.bundle import Provider, ServedModel, choose_provider, default_precision, load_model, warm_up
from serve.errors import ProviderError
from tests.reversal import Reversal
from tests.serve.steps import Echo

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def copy(reversal: Reversal, tmp_path: Path) -> Path:
    """A copy of the bundle, to be damaged."""
    return Path(shutil.copytree(reversal.bundle, tmp_path / "bundle"))


def test_a_bundle_is_loaded_as_asked_for(reversal: Reversal) -> None:
    model = load_model(reversal.bundle, provider="cpu", precision="int8", threads=1)
    assert (model.precision, model.provider, model.threads) == ("int8", "cpu", 1)
    assert model.manifest == reversal.manifest
    assert (len(model.source), len(model.target)) == (12, 12)


def test_by_default_it_is_fp32_on_all_processors(reversal: Reversal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_bundle, "available_cpus", lambda: 2)
    model = load_model(reversal.bundle, provider="cpu")
    assert (model.precision, model.threads) == ("fp32", 2)


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "bundle.json"
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Put something else there, checksum and all."""
    (bundle / name).write_bytes(content)
    entry = describe_file(bundle / name).model_dump()
    rewrite(bundle, lambda values: values["files"].update({name: entry}))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no manifest": (
        lambda bundle: (bundle / "bundle.json").unlink(),
        BundleError,
        r"not a bundle, it has no bundle\.json; make one with: limelight export CHECKPOINT .*bundle$",
    ),
    "a changed weight": (
        lambda bundle: flip(bundle / "fp32/weights.bin"),
        BundleError,
        r"weights\.bin: does not match",
    ),
    "a changed graph": (
        lambda bundle: flip(bundle / "int8/decoder.onnx"),
        BundleError,
        r"decoder\.onnx: does not match",
    ),
    "no tokenizer": (
        lambda bundle: (bundle / "tokenizer.target.json").unlink(),
        BundleError,
        r"tokenizer\.target\.json: missing, though bundle\.json lists it: the bundle is incomplete$",
    ),
    "a tokenizer of another vocabulary": (
        lambda bundle: rewrite(bundle, lambda values: values.update(target_vocabulary=13)),
        BundleError,
        "the tokenizers have 12 and 12 entries, not what the graphs take$",
    ),
    "a tokenizer that is none": (
        lambda bundle: replace_file(bundle, "tokenizer.source.json", b"{}"),
        CheckpointError,
        r"tokenizer\.source\.json: not a tokenizer file: ",
    ),
    "a graph that is none": (
        lambda bundle: replace_file(bundle, "fp32/encoder.onnx", b"none"),
        BundleError,
        r"encoder\.onnx: ONNX Runtime cannot load it: ",
    ),
    "another graph": (
        lambda bundle: replace_file(bundle, "fp32/encoder.onnx", (bundle / "fp32/decoder.onnx").read_bytes()),
        BundleError,
        r"^fp32/encoder\.onnx: memory\.0\.key is .*, the manifest says .* \(\d+ differ\)$",
    ),
}
"""How a bundle is damaged, and what is said of it."""


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_bundle_is_refused(copy: Path, what: str) -> None:
    damage, kind, message = DAMAGE[what]
    damage(copy)
    with pytest.raises(kind, match=message):
        load_model(copy, provider="cpu", threads=1)


def test_a_precision_that_is_not_there_is_refused(reversal: Reversal) -> None:
    with pytest.raises(BundleError, match=r"bundle: has no precision 'fp16', only fp32, int8$"):
        load_model(reversal.bundle, provider="cpu", precision="fp16", threads=1)


@pytest.mark.parametrize(
    ("wanted", "available", "chosen"),
    [
        ("auto", [CPU], "cpu"),
        ("auto", ["AzureExecutionProvider", CPU], "cpu"),
        ("auto", [CUDA, CPU], "cuda"),
        ("cuda", [CUDA, CPU], "cuda"),
        ("cpu", [CUDA, CPU], "cpu"),
    ],
)
def test_the_provider_that_is_tried(
    monkeypatch: pytest.MonkeyPatch, wanted: Provider, available: list[str], chosen: str
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    assert choose_provider(wanted) == chosen


def test_without_a_build_for_gpus_it_says_what_to_install(reversal: Reversal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider", CPU])
    with pytest.raises(ProviderError) as caught:
        load_model(reversal.bundle, provider="cuda")
    assert str(caught.value) == (
        "--provider cuda: this onnxruntime offers AzureExecutionProvider, CPUExecutionProvider only; install "
        "limelight[gpu] in place of limelight[serve], or use --provider cpu"
    )


class Fallen(Echo):
    """Graphs that were to run on a GPU, where ONNX Runtime found none and fell back."""

    asked: ClassVar[list[object]] = []

    def __init__(self, *arguments: object) -> None:
        self.providers = [CPU]
        self.asked.append(arguments[2])


@pytest.fixture
def without_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for GPUs on a machine without one."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(serving_bundle, "OnnxStepModel", Fallen)
    monkeypatch.setattr(serving_bundle, "OnnxGreedyModel", Fallen)


@pytest.mark.usefixtures("without_device")
def test_falling_back_unasked_is_refused(reversal: Reversal) -> None:
    message = rf"^ONNX Runtime could not start {CUDA} and fell back to \['{CPU}'\]"
    with pytest.raises(ProviderError, match=message):
        load_model(reversal.bundle, provider="cuda", threads=1)


@pytest.mark.usefixtures("without_device")
@pytest.mark.parametrize("precision", [None, "int8"])
def test_auto_falls_back_and_says_so(
    reversal: Reversal, monkeypatch: pytest.MonkeyPatch, precision: Precision | None
) -> None:
    monkeypatch.setattr(serving_bundle, "default_precision", lambda manifest, provider: DEFAULTS[provider])
    Fallen.asked.clear()
    model = load_model(reversal.bundle, provider="auto", precision=precision, threads=1)
    assert (model.provider, model.precision) == ("cpu", precision or "fp32")
    assert Fallen.asked == [precision or "fp16", precision or "fp32"]


DEFAULTS: dict[str, Precision] = {"cuda": "fp16", "cpu": "fp32"}


class Started(Echo):
    """Graphs that run on a GPU."""

    def __init__(self, *_: object) -> None:
        self.providers = [CUDA, CPU]


def test_on_cuda_the_state_stays_on_the_device(reversal: Reversal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(serving_bundle, "OnnxStepModel", Started)
    monkeypatch.setattr(serving_bundle, "ResidentStepModel", Resident)
    for provider in ("cuda", "auto"):
        model = load_model(reversal.bundle, provider=provider, threads=1)
        assert (model.provider, model.precision) == ("cuda", "fp32")
        assert isinstance(model.steps, Resident)
        assert isinstance(model.steps.graphs, Started)


class Resident(Echo):
    """Other graphs, with their state on the device."""

    def __init__(self, graphs: object) -> None:
        self.graphs = graphs


def test_float16_is_for_cuda_where_there_is_any(reversal: Reversal) -> None:
    without = reversal.manifest
    graphs = {**without.graphs, "fp16": without.graphs["fp32"]}
    with_it = without.model_copy(update={"graphs": graphs})
    assert [default_precision(manifest, "cuda") for manifest in (without, with_it)] == ["fp32", "fp16"]
    assert [default_precision(manifest, "cpu") for manifest in (without, with_it)] == ["fp32", "fp32"]


class Senseless(Echo):
    """Answers with the same value in place of every log-probability."""

    def __init__(self, value: float) -> None:
        self._value = value

    def step(self, question: Question) -> Step:
        step = super().step(question)
        return dataclasses.replace(step, top_log_probabilities=np.full_like(step.top_log_probabilities, self._value))


NO_NUMBERS = "that are no numbers$"
SENSELESS = {np.nan: NO_NUMBERS, -np.inf: NO_NUMBERS, np.inf: NO_NUMBERS, 0.5: r"\[0\.5"}
"""In place of every log-probability, and what is said of it."""


@pytest.mark.parametrize("value", SENSELESS)
def test_the_warm_up_refuses_what_is_no_probability(served: ServedModel, value: float) -> None:
    with pytest.raises(BundleError, match=f"^reversal: the warm-up gave log-probabilities {SENSELESS[value]}"):
        warm_up(dataclasses.replace(served, steps=Senseless(value)))


def test_the_warm_up_lets_a_certain_answer_pass(served: ServedModel) -> None:
    warm_up(dataclasses.replace(served, steps=Senseless(0.0)))
    warm_up(served)
