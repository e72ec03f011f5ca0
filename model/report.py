"""What a training shows of itself: a progress bar, lines that stay, TensorBoard scalars and an attention picture."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from model.config import Config
from model.picture import AttentionPicture, draw_pixels
from model.transformer import Transformer

if TYPE_CHECKING:
    from model.train import Material

SCALARS_EVERY = 50
"""Updates between two TensorBoard points: enough for a curve, too few to slow anything."""


class Report:
    """Shows the progress of one process; silent when not enabled.

    Args:
        config: of the run.
        events: TensorBoard's folder.
        done: updates done before, when resumed.
        enabled: false in all processes but the first.
    """

    def __init__(self, config: Config, events: Path, done: int, *, enabled: bool) -> None:
        self._config, self._done, self._enabled = config, done, enabled
        self.console = Console(stderr=True, quiet=not enabled)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            disable=not enabled or not self.console.is_terminal,
        )
        self._writer = SummaryWriter(str(events), purge_step=done + 1) if enabled else None
        self._losses: list[tuple[float, int]] = []
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        self._task = self._progress.add_task(
            self._config.name, total=self._config.training.updates, completed=self._done, loss="-", speed="-"
        )
        self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def data(self, material: "Material", model: Transformer) -> None:
        """What is learnt from, what was left out, and how large the network is."""
        parameters = sum(weight.numel() for weight in model.parameters())
        withheld = f", {material.withheld:,} of sources that are scored" if material.withheld else ""
        self.console.print(
            f"{len(material.train.examples):,} training and {len(material.validation.examples):,} validation pairs; "
            f"left out: {material.empty:,} empty, {material.train.too_long + material.validation.too_long:,} over "
            f"{self._config.model.longest_source} source or {self._config.model.longest_target} target tokens{withheld}"
        )
        self.console.print(
            f"{parameters:,} parameters; vocabularies of {len(material.source):,} and {len(material.target):,} tokens"
        )
        if self._done:
            self.console.print(f"resumed after update {self._done:,}")

    def update(self, update: int, loss: float, rate: float, tokens: int) -> None:
        """One update is done."""
        if not self._enabled:
            return
        self._losses.append((loss, tokens))
        if update % SCALARS_EVERY:
            self._progress.update(self._task, completed=update)
            return
        total = sum(count for _, count in self._losses)
        mean = sum(value * count for value, count in self._losses) / total
        speed = total / (time.monotonic() - self._since)
        self._losses, self._since = [], time.monotonic()
        self._progress.update(self._task, completed=update, loss=f"{mean:.3f}", speed=f"{speed:,.0f}")
        self._scalars(update, {"train/loss": mean, "train/learning_rate": rate, "train/tokens_per_second": speed})

    def validation(self, update: int, measured: Mapping[str, float], picture: AttentionPicture | None) -> None:
        """A validation is done; its time does not count as training."""
        values = "  ".join(f"{name} {value:.3f}" for name, value in measured.items())
        self.console.print(f"update {update:,}: validation {values}")
        self._scalars(update, {f"validation/{name}": value for name, value in measured.items()})
        if self._writer is not None and picture is not None:
            pixels = draw_pixels(picture, layer=None, head=None, how="mean")
            self._writer.add_image("validation/cross_attention", pixels, update, dataformats="HWC")
        self._since = time.monotonic()
        self._losses = []

    def final(self, folder: Path, measured: Mapping[str, Any]) -> None:
        """The run is over."""
        values = "  ".join(
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in measured.items()
        )
        self.console.print(f"[bold]{folder}[/bold]: {values}")

    def _scalars(self, update: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, update)
