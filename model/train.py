"""The training loop: Adam with warm-up, label smoothing, accumulation, checkpoints, early stopping, averaging.

Every random choice follows from the seed and the number of the update, so a resumed run repeats an uninterrupted one
bit for bit on a CPU, wherever it was interrupted.
"""

import itertools
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from model.batches import Batch, BatchStream, Examples, encode_pairs
from model.card import model_card
from model.checkpoint import Checkpoint, average_weights, build_model, load_checkpoint, save_checkpoint
from model.config import Config
from model.errors import CheckpointError
from model.loss import training_loss
from model.metrics import LOWER_IS_BETTER
from model.pairs import Pairs, read_pairs
from model.processes import Processes, join_processes
from model.report import Report
from model.run import RunFolder, check_same_run
from model.schedule import learning_rate
from model.tokenizer import Tokenizer, train_tokenizers
from model.transformer import Transformer
from model.validation import Validation

MAY_CHANGE = {"dropout", "attention_dropout", "longest_source", "longest_target"}
"""Settings of the network that weights trained with others still fit."""


@dataclass(frozen=True)
class Material:
    """What a run learns from: read, tokenised and encoded once."""

    source: Tokenizer
    target: Tokenizer
    train: Examples
    validation: Examples
    validation_pairs: Pairs
    empty: int
    withheld: int


def prepare(config: Config, processes: Processes, begin: Checkpoint | None = None) -> Material:
    """Read the data, train the tokenizers (or take those of the checkpoint that training begins with), encode.

    Raises:
        DataError: the data cannot be used.
    """
    train, validation = read_pairs(config.data, "train"), read_pairs(config.data, "validation")
    if begin is not None:
        source, target = begin.source, begin.target
    else:
        sources, targets = [pair.source for pair in train.pairs], [pair.target for pair in train.pairs]
        source, target = processes.share(lambda: train_tokenizers(config.tokenizer, sources, targets))
    return Material(
        source,
        target,
        encode_pairs(train.pairs, source, target, config.model, "training data"),
        encode_pairs(validation.pairs, source, target, config.model, "validation data"),
        validation,
        train.empty + validation.empty,
        train.withheld,
    )


def train(config: Config, folder: Path, *, resume: bool = False, overwrite: bool = False) -> Mapping[str, Any]:
    """Train a model, from the start or from its newest checkpoint.

    Args:
        config: the run.
        folder: where checkpoints go.
        resume: go on from the newest checkpoint in the folder.
        overwrite: remove a run that is there.

    Returns:
        The final checkpoint's metrics.

    Raises:
        ConfigError: the folder holds a run and neither resume nor overwrite is set.
        DataError: the data cannot be used.
        CheckpointError: the run to go on with is damaged, or had another configuration.
    """
    with join_processes() as processes:
        run = RunFolder(folder)
        start = run.prepare(resume=resume, overwrite=overwrite) if processes.first else None
        processes.agree(0)  # the folder is ready
        if not processes.first and resume:
            start = run.newest()
        if start is not None:
            check_same_run(start, config)
        resumed = load_checkpoint(start, training=True) if start is not None else None
        begin = resumed or _initial(config)
        trainer = Trainer(config, run, processes, prepare(config, processes, begin), begin)
        with Report(config, run.events, trainer.update, enabled=processes.first) as report:
            return trainer.run_to_end(report)


class Trainer:
    """One run of the optimisation.

    Attributes:
        update: updates done.
    """

    def __init__(
        self, config: Config, run: RunFolder, processes: Processes, material: Material, begin: Checkpoint | None
    ) -> None:
        self._config, self._options, self._run, self._processes = config, config.training, run, processes
        self._material = material
        torch.manual_seed(self._options.seed)
        self.model = (begin.model if begin else build_model(config, material.source, material.target)).train()
        self.model.to(processes.device)
        self._optimiser = _optimiser(self.model, config)
        self._stream = BatchStream(
            material.train.examples,
            self._options.tokens_per_batch,
            self._options.seed,
            processes.rank,
            processes.world,
        )
        self.update, self._best, self._stale = 0, math.inf, 0
        self._interrupted = threading.Event()
        if begin is not None and begin.training is not None:
            self._restore(begin.training)
        self._validation = Validation(
            config,
            material.validation_pairs,
            material.validation.examples,
            material.source,
            material.target,
            processes.device,
        )

    def run_to_end(self, report: Report) -> Mapping[str, Any]:
        """Train until the last update, early stopping, or an interrupt; average; return the final metrics.

        Raises:
            KeyboardInterrupt: after a checkpoint was written, when the run was interrupted.
        """
        report.data(self._material, self.model)
        network = self._wrapped()
        batches = iter(self._stream)
        with self._interruptible():
            while self.update < self._options.updates and not self._early():
                self._advance(network, list(itertools.islice(batches, self._options.accumulate)), report)
                if self._interrupted.is_set():
                    self._save()
                    raise KeyboardInterrupt
        if self._processes.first and not self._run.checkpoint(self.update).exists():
            self._save()
        return self._finish(report) if self._processes.first else {}

    def _advance(self, network: nn.Module, batches: list[Batch], report: Report) -> None:
        self.update += 1
        rate = learning_rate(self._options, self._config.model.d_model, self.update)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        loss, tokens = self._learn(network, batches)
        report.update(self.update, loss, rate, tokens)
        last = self.update == self._options.updates
        if self.update % self._options.validate_every == 0 or last:
            self._validate(report)
        if (self.update % self._options.checkpoint_every == 0 or last) and self._processes.first:
            self._save()

    def _learn(self, network: nn.Module, batches: list[Batch]) -> tuple[float, int]:
        """One update; returns the loss a token and the number of tokens, over all processes."""
        # Dropout depends on the number of the update alone, so there is no generator's state to save.
        torch.manual_seed((self._options.seed * 1_000_003 + self.update * 1009 + self._processes.rank) % 2**63)
        tokens = self._processes.total(sum(batch.target_tokens for batch in batches))
        total = 0.0
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            synchronise = nullcontext() if last or self._processes.world == 1 else network.no_sync()  # type: ignore[operator]
            with synchronise, self._autocast():
                loss = training_loss(
                    network, batch.to(self._processes.device), self._options.label_smoothing, self._options.r_drop
                )
                # DistributedDataParallel averages gradients over the processes; the sum over all tokens is wanted.
                (loss * (self._processes.world / tokens)).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        if self._options.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._options.clip_norm)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return self._processes.total(total) / tokens, int(tokens)

    def _validate(self, report: Report) -> None:
        value = 0.0
        if self._processes.first:
            measured = self._validation.measure(self.model)
            report.validation(self.update, measured, self._validation.picture(self.model))
            metric = self._options.metric
            value = measured[metric] if LOWER_IS_BETTER[metric] else -measured[metric]
            if value < self._best:
                save_checkpoint(self._run.best, self._checkpoint({"update": self.update, **measured}))
        value = self._processes.agree(value)
        self._stale = 0 if value < self._best else self._stale + 1
        self._best = min(self._best, value)

    def _early(self) -> bool:
        return 0 < self._options.patience <= self._stale

    def _finish(self, report: Report) -> Mapping[str, Any]:
        """Keep the better of two: the average of the newest checkpoints (6.1), or the best one by itself."""
        folders = self._run.checkpoints()[-self._options.average :]
        candidates = {f"average of {len(folders)} checkpoints": folders}
        if self._run.best.exists():
            candidates[f"best checkpoint by {self._options.metric}"] = [self._run.best]
        sign = 1 if LOWER_IS_BETTER[self._options.metric] else -1
        chosen: dict[str, Any] = {}
        for name, averaged in candidates.items():
            measured = self._measure_average(averaged)
            if not chosen or sign * measured[self._options.metric] < sign * chosen[self._options.metric]:
                update = load_checkpoint(averaged[-1]).metrics["update"]
                chosen = {"update": update, "chosen": name, **measured}
                card = model_card(self._config, chosen, sum(weight.numel() for weight in self.model.parameters()))
                save_checkpoint(self._run.final, self._checkpoint(chosen), self._final_dtype, card)
        report.final(self._run.final, chosen)
        return chosen

    @property
    def _final_dtype(self) -> torch.dtype:
        return torch.float16 if self._options.final_dtype == "float16" else torch.float32

    def _measure_average(self, folders: list[Path]) -> dict[str, float]:
        # Measured as they will be stored: rounding is part of the model.
        for name, weight in average_weights(folders).items():
            self.model.get_parameter(name).data.copy_(weight.to(self._final_dtype).float())
        return self._validation.measure(self.model)

    def _save(self) -> None:
        state = {
            "update": self.update,
            "epoch": self._stream.epoch,
            "place": self._stream.place,
            "best": self._best,
            "stale": self._stale,
            "optimiser": self._optimiser.state_dict(),
        }
        save_checkpoint(self._run.checkpoint(self.update), self._checkpoint({"update": self.update}, state))
        self._run.thin(self._options.keep, self._options.average, self._options.checkpoint_every)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.update, self._best, self._stale = state["update"], state["best"], state["stale"]
        self._stream.epoch, self._stream.place = state["epoch"], state["place"]
        self._optimiser.load_state_dict(state["optimiser"])

    def _checkpoint(self, metrics: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> Checkpoint:
        return Checkpoint(
            config=self._config,
            model=self.model,
            source=self._material.source,
            target=self._material.target,
            metrics=metrics,
            training=state,
        )

    def _wrapped(self) -> nn.Module:
        if self._processes.world == 1:
            return self.model
        return DistributedDataParallel(self.model)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._processes.device.type, torch.bfloat16, enabled=self._options.bf16)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let Ctrl-C finish the update and save, where one process runs and signals can be taken."""
        if self._processes.world > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.getsignal(signal.SIGINT)

        def interrupt(*_: object) -> None:
            self._interrupted.set()
            signal.signal(signal.SIGINT, previous)  # a second one stops at once

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _initial(config: Config) -> Checkpoint | None:
    """The configured network with the weights of the checkpoint that a fresh run begins with, if it names one.

    Raises:
        CheckpointError: it is not there, is damaged, or is of another network.
    """
    if config.training.initial is None:
        return None
    initial = load_checkpoint(config.training.initial)
    wanted, found = (settings.model_dump(exclude=MAY_CHANGE) for settings in (config.model, initial.config.model))
    unlike = [f"{name}={found[name]}, expected {value}" for name, value in wanted.items() if found[name] != value]
    if unlike:
        raise CheckpointError(f"training.initial={config.training.initial}: another network, {'; '.join(unlike)}")
    model = build_model(config, initial.source, initial.target)
    model.load_state_dict(initial.model.state_dict())
    return replace(initial, config=config, model=model)


def _optimiser(model: Transformer, config: Config) -> AdamW:
    """Adam (5.3), with weight decay on matrices alone."""
    options = config.training
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=0.0, betas=options.betas, eps=options.epsilon, fused=True)
