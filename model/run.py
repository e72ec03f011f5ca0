"""The folder of a training run: its checkpoints, the best and the final one, and what TensorBoard reads.

runs/g2p-en/
  update-00004500/  update-00005000/ ...   to resume from and to average
  best/                                    best by the configured metric
  final/                                   what to export
  events/                                  TensorBoard
"""

import shutil
from pathlib import Path

from model.checkpoint import TRAINING, load_checkpoint
from model.config import Config
from model.errors import CheckpointError, ConfigError


class RunFolder:
    """Finds and keeps the checkpoints of one run.

    Args:
        path: the folder; made when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best"
        self.final = path / "final"
        self.events = path / "events"

    def checkpoint(self, update: int) -> Path:
        """Where the checkpoint of an update lies."""
        return self.path / f"update-{update:08d}"

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(path for path in self.path.glob("update-*") if path.is_dir())

    def newest(self) -> Path | None:
        """The checkpoint to go on from, if there is one."""
        return max(self.checkpoints(), default=None)

    def prepare(self, *, resume: bool, overwrite: bool) -> Path | None:
        """Get the folder ready.

        Args:
            resume: go on from the newest checkpoint, or start where there is none.
            overwrite: remove a run that is there.

        Returns:
            The checkpoint to go on from, if any.

        Raises:
            ConfigError: a run is there, and neither was asked for.
        """
        if not self.path.exists():  # tells at once, not after reading the data, whether it can be made
            self.path.mkdir(parents=True)
            self.path.rmdir()
        found = self.checkpoints()
        if (found or self.final.exists()) and not (resume or overwrite):
            raise ConfigError(
                f"{self.path} holds a training run already: --resume goes on with it, --overwrite removes it"
            )
        self._clean()
        found = self.checkpoints()
        if overwrite and not resume:
            for path in (*found, self.best, self.final, self.events):
                shutil.rmtree(path, ignore_errors=True)
            return None
        return self.newest() if resume else None

    def thin(self, keep: int, average: int, every: int) -> None:
        """Drop checkpoints that neither resuming nor averaging needs; older ones lose their training state.

        Args:
            keep: how many keep their training state.
            average: how many are averaged in the end.
            every: updates between checkpoints. An older one that is not at a multiple comes from an interrupt, and
                would change the average.
        """
        for path in self.checkpoints()[:-1]:
            if int(path.name.removeprefix("update-")) % every:
                shutil.rmtree(path)
        found = self.checkpoints()
        for path in found[: -max(keep, average)]:
            shutil.rmtree(path)
        for path in found[-max(keep, average) : -keep]:
            (path / TRAINING).unlink(missing_ok=True)

    def _clean(self) -> None:
        # A kill in the middle of writing leaves a temporary folder behind, never a broken checkpoint; one between the
        # two renames of a replacement leaves the old checkpoint under another name.
        for path in self.path.glob(".*.old"):
            original = self.path / path.name.removeprefix(".").rsplit(".", 2)[0]
            if not original.exists():
                path.rename(original)
        for path in (*self.path.glob(".*.tmp"), *self.path.glob(".*.old")):
            shutil.rmtree(path, ignore_errors=True)


def check_same_run(folder: Path, config: Config) -> None:
    """Refuse to go on with another configuration; only the number of updates may be raised.

    Raises:
        CheckpointError: naming the sections that differ.
    """
    stored = load_checkpoint(folder).config
    same = config.model_copy(
        update={"training": config.training.model_copy(update={"updates": stored.training.updates})}
    )
    if same != stored:
        differing = [name for name in Config.model_fields if getattr(same, name) != getattr(stored, name)]
        raise CheckpointError(
            f"{folder} was trained with another configuration ({', '.join(differing)} differ): resume with the same, "
            "or train into another folder"
        )
