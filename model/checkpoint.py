"""A checkpoint: a folder that describes itself, written whole or not at all.

model.safetensors            weights
config.json                  the whole configuration of the run
tokenizer.source.json        Hugging Face tokenizers, offsets included
tokenizer.target.json
metrics.json                 where in the training it stands, and what it scored
MODEL_CARD.md                of a final checkpoint
training.pt                  optimiser and place in the data, only where training can go on
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.card import CARD
from model.config import Config, load_config
from model.errors import CheckpointError, ConfigError
from model.tokenizer import Tokenizer
from model.transformer import Transformer

WEIGHTS, CONFIG, METRICS, TRAINING = "model.safetensors", "config.json", "metrics.json", "training.pt"
SOURCE_TOKENIZER, TARGET_TOKENIZER = "tokenizer.source.json", "tokenizer.target.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network with all that is needed to use it."""

    config: Config
    model: Transformer
    source: Tokenizer
    target: Tokenizer
    metrics: Mapping[str, Any]
    training: Mapping[str, Any] | None = None


def build_model(config: Config, source: Tokenizer, target: Tokenizer) -> Transformer:
    """A freshly initialised network for these vocabularies."""
    return Transformer(config.model, len(source), len(target))


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None, card: str | None = None
) -> None:
    """Write a checkpoint atomically: the folder appears complete, or not at all.

    Args:
        folder: where to; replaced if it exists.
        checkpoint: what.
        dtype: store the weights in this type, float16 to halve the size; None as they are.
        card: a model card to put beside them.
    """
    with atomic_folder(folder) as temporary:
        save_file(_own_weights(checkpoint.model, dtype), temporary / WEIGHTS)
        (temporary / CONFIG).write_text(checkpoint.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        checkpoint.source.save(temporary / SOURCE_TOKENIZER)
        checkpoint.target.save(temporary / TARGET_TOKENIZER)
        (temporary / METRICS).write_text(json.dumps(dict(checkpoint.metrics), indent=2) + "\n", encoding="utf-8")
        if card is not None:
            (temporary / CARD).write_text(card, encoding="utf-8")
        if checkpoint.training is not None:
            torch.save(dict(checkpoint.training), temporary / TRAINING)


def load_checkpoint(folder: Path, *, training: bool = False) -> Checkpoint:
    """Read a checkpoint onto the CPU, in evaluation mode.

    Args:
        folder: the checkpoint.
        training: read what is needed to go on training too.

    Raises:
        CheckpointError: the folder or a file is missing, damaged, or does not fit its own configuration.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    missing = [name for name in (WEIGHTS, CONFIG, SOURCE_TOKENIZER, TARGET_TOKENIZER) if not (folder / name).is_file()]
    if missing and (folder / "final" / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: the folder of a run, not a checkpoint: did you mean {folder / 'final'}?")
    if missing:
        raise CheckpointError(f"{folder}: not a checkpoint, it has no {', '.join(missing)}")
    config = _read_config(folder / CONFIG)
    source, target = Tokenizer.load(folder / SOURCE_TOKENIZER), Tokenizer.load(folder / TARGET_TOKENIZER)
    try:
        model = build_model(config, source, target)
    except ValueError as error:
        raise CheckpointError(f"{folder}: the tokenizers do not fit the configuration: {error}") from error
    _load_weights(model, folder / WEIGHTS)
    return Checkpoint(
        config=config,
        model=model.eval(),
        source=source,
        target=target,
        metrics=_read_metrics(folder / METRICS),
        training=_load_training(folder) if training else None,
    )


def average_weights(folders: list[Path]) -> dict[str, Tensor]:
    """The mean of several checkpoints' weights (Vaswani et al. 2017, section 6.1), summed in float64."""
    total: dict[str, Tensor] = {}
    for folder in folders:
        for name, weight in _read_weights(folder / WEIGHTS).items():
            total[name] = total[name] + weight.double() if name in total else weight.double()
    return {name: (weight / len(folders)).float() for name, weight in total.items()}


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place, flushed to disk, when the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        _replace(temporary, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, folder: Path) -> None:
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_weights(model: Transformer, dtype: torch.dtype | None) -> dict[str, Tensor]:
    # named_parameters lists a tied table once, which is how it is stored.
    return {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in model.named_parameters()}


def _read_config(path: Path) -> Config:
    try:
        return load_config(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _read_metrics(path: Path) -> Mapping[str, Any]:
    try:
        metrics: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return metrics


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _load_weights(model: Transformer, path: Path) -> None:
    weights = _read_weights(path)
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        different = sorted(weights.keys() ^ parameters.keys())
        raise CheckpointError(
            f"{path}: does not fit its configuration: {len(different)} weights differ, {different[:3]}"
        )
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise CheckpointError(f"{path}: {name} is {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}")
        parameter.data.copy_(weights[name])


def _load_training(folder: Path) -> Mapping[str, Any]:
    if not (folder / TRAINING).is_file():
        raise CheckpointError(f"{folder}: holds no training state, so training cannot go on from it")
    try:
        state: Mapping[str, Any] = torch.load(folder / TRAINING, weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise CheckpointError(f"{folder / TRAINING}: cannot be read: {error}") from error
    return state
