"""A training of a few seconds, reversing strings, in this process or in another.

As a program it trains the configuration of a file; at an update, or in the middle of a save, it can stop and wait:

    python -m tests.model.training CONFIG FOLDER [--hold update:5 | --hold save:8]
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import model.report
import model.train
from model.checkpoint import load_checkpoint
from model.config import Config, load_config, parse_config
from model.processes import Processes
from model.run import RunFolder
from tests.model.toy import SMALL

ROOT = Path(__file__).parents[2]
TINY = SMALL | {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "dropout": 0.2,
    "attention_dropout": 0.1,
    "longest_source": 8,
    "longest_target": 8,
}
SHORT = {
    "updates": 10,
    "tokens_per_batch": 70,
    "warmup": 4,
    "learning_rate": 0.01,
    "weight_decay": 0.01,
    "validate_every": 3,
    "checkpoint_every": 4,
    "keep": 2,
    "average": 2,
}


def write_pairs(folder: Path, extra: str = "") -> Path:
    """Strings of one to six letters and their reverses, and whatever else a test wants in the training part."""
    draw = random.Random(8)
    strings = ["".join(draw.choices("abcde", k=draw.randint(1, 6))) for _ in range(90)]
    lines = [f"{string}\t{string[::-1]}\n" for string in strings]
    (folder / "train.tsv").write_text("".join(lines[20:]) + extra, encoding="utf-8")
    (folder / "validation.tsv").write_text("".join(lines[:20]), encoding="utf-8")
    return folder


def tiny_config(data: Path, training: Mapping[str, object] | None = None, **network: object) -> Config:
    parts = {part: {"tsv": str(data / f"{part}.tsv")} for part in ("train", "validation")}
    values = {
        "name": "tiny",
        "data": {"kind": "pairs", **parts},
        "model": TINY | network,
        "training": SHORT | dict(training or {}),
    }
    return parse_config(values, "tests")


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: weight.data for name, weight in load_checkpoint(folder).model.named_parameters()}


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of a run."""
    return EventAccumulator(str(folder / "events")).Reload()


def scalars(folder: Path, name: str) -> dict[int, float]:
    found = events(folder).Scalars(name)
    assert len({event.step for event in found}) == len(found), f"{name} has two values at one step"
    return {event.step: event.value for event in found}


def assert_same(actual: object, expected: object, where: str = "") -> None:
    """Bit for bit, through mappings and lists."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert torch.equal(actual, expected), where
    elif isinstance(expected, Mapping):
        assert isinstance(actual, Mapping)
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(actual, list)
        assert len(actual) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(actual[index], value, f"{where}[{index}]")
    else:
        assert actual == expected, where


def assert_same_run(actual: Path, expected: Path) -> None:
    """Weights, optimiser, place in the data, metrics: of the newest checkpoint, the best and the final one."""
    here, there = RunFolder(actual), RunFolder(expected)
    assert [path.name for path in here.checkpoints()] == [path.name for path in there.checkpoints()]
    newest, other = here.newest(), there.newest()
    assert newest is not None
    assert other is not None
    assert_same(load_checkpoint(newest, training=True).training, load_checkpoint(other, training=True).training)
    for mine, its in ((newest, other), (here.best, there.best), (here.final, there.final)):
        assert_same(weights(mine), weights(its), mine.name)
        assert dict(load_checkpoint(mine).metrics) == dict(load_checkpoint(its).metrics)


def bare(patch: pytest.MonkeyPatch) -> None:
    """No pictures, which take longer than all else together, and no GPU, whose sums are not the same each time."""
    patch.setattr("torch.cuda.is_available", lambda: False)
    patch.setattr("model.validation.Validation.picture", lambda *_: None)


def at_update(patch: pytest.MonkeyPatch, update: int, act: Callable[[], object]) -> None:
    """Do something when an update is done, before what belongs to it is validated and saved."""
    report = model.report.Report.update

    def reporting(self: model.report.Report, number: int, *values: Any) -> None:
        report(self, number, *values)
        if number == update:
            act()

    patch.setattr(model.report.Report, "update", reporting)


def at_save(patch: pytest.MonkeyPatch, update: int, act: Callable[[], object]) -> None:
    """Do something in the middle of writing a checkpoint."""
    save = torch.save

    def saving(state: Mapping[str, Any], path: Path) -> None:
        save(state, path)
        if state["update"] == update:
            act()

    patch.setattr(torch, "save", saving)


def recording_share(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Write down, in every process, a number that the first has made up."""
    prepare = model.train.prepare

    def preparing(config: Config, processes: Processes, *more: Any) -> model.train.Material:
        shared = processes.share(os.getpid)
        (folder / f"shared-{processes.rank}").write_text(str(shared), encoding="utf-8")
        return prepare(config, processes, *more)

    patch.setattr(model.train, "prepare", preparing)


def command(config: Config, folder: Path, *more: str) -> list[str]:
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    return ["-m", "tests.model.training", str(path), str(folder), *more]


@contextmanager
def held(config: Config, folder: Path, where: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains, waits at a place for a line of input, and goes on."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipe, program = subprocess.PIPE, [sys.executable, *command(config, folder, "--hold", where)]
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def _hold() -> None:
    print("held", flush=True)
    sys.stdin.readline()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hold", default="update:0")
    parser.add_argument("--shared", type=Path)
    arguments = parser.parse_args()
    place, _, update = arguments.hold.partition(":")
    patch = pytest.MonkeyPatch()
    bare(patch)
    patch.setattr(model.report, "SCALARS_EVERY", 1)
    (at_update if place == "update" else at_save)(patch, int(update), _hold)
    if arguments.shared:
        recording_share(patch, arguments.shared)
    model.train.train(load_config(arguments.config), arguments.folder)


if __name__ == "__main__":
    main()
