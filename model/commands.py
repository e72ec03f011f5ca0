"""`limelight train`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from model.config import load_config


def train(
    config: Annotated[Path, typer.Argument(help="TOML configuration; see configs/.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the run; by default runs/NAME, after the configuration."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoint in the folder, or start if there is none."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove a run that is in the folder.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace one value: section.key=value, for example training.updates=2000."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to compute with; by default as PyTorch chooses.")
    ] = None,
) -> None:
    """Train a model on pairs of text; Ctrl-C saves, and --resume goes on.

    On several processes or hosts: torchrun --nproc-per-node 2 -m serve train CONFIG.
    """
    loaded = load_config(config, settings or ())  # before torch: a bad key is told at once
    import torch

    from model.train import train as run

    if threads is not None:
        torch.set_num_threads(threads)
    folder = output or Path("runs") / loaded.name
    try:
        run(loaded, folder, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        again = ["limelight", "train", str(config), "--output", str(folder), "--resume"]
        again += [part for setting in settings or () for part in ("--set", setting)]
        typer.echo(f"interrupted; go on with: {shlex.join(again)}", err=True)
        raise typer.Exit(130) from None
