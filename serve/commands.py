"""`limelight serve`."""

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from serve.bundle import ServedModel, load_model
from serve.server import ServerOptions, serve_until_signal
from serve.settings import PREFIX, read_settings, with_flags


@with_flags
def serve(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, from `limelight export`.")],
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, envvar=f"{PREFIX}CONFIG", show_envvar=False, help="TOML file of settings."
        ),
    ] = None,
    **given: Any,
) -> None:
    """Serve a bundle over gRPC, with health and reflection, until SIGTERM or Ctrl-C; needs no PyTorch.

    Every option can also be a variable, as LIMELIGHT_SERVE_QUEUE_TOKENS, or a key of the TOML file, as queue_tokens. A
    flag goes before a variable, and that before the file.
    """
    settings = read_settings(config, given, os.environ)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    model = load_model(bundle, provider=settings.provider, precision=settings.precision, threads=settings.threads)
    _run(model, settings.options, settings.port_file)


def _run(model: ServedModel, options: ServerOptions, port_file: Path | None) -> None:
    def ready(bound: int) -> None:
        _announce(model, f"{options.host}:{bound}")
        if port_file is not None:
            _write_port(port_file, bound)

    finished = asyncio.run(serve_until_signal(model, options, ready))
    if not finished:
        # The engine's thread may be deep in a run that nothing can join: leave without tearing the interpreter down.
        logging.shutdown()
        os._exit(1)


def _announce(model: ServedModel, address: str) -> None:
    Console(stderr=True).print(
        f"[bold]{model.manifest.name}[/bold] {model.manifest.version} ({model.precision}, {model.provider}, "
        f"{model.threads} threads) on [bold]{address}[/bold]; ask it: limelight ask TEXT -a {address}"
    )


def _write_port(path: Path, port: int) -> None:
    """Whole or not at all: somebody waits for the file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(f"{port}\n", encoding="ascii")
    temporary.replace(path)
