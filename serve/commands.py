"""`limelight serve`."""

import asyncio
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from serve import heap
from serve.bundle import load_model
from serve.folder import Load, ModelFolder
from serve.logs import written
from serve.models import Models
from serve.server import Server, serve_until_signal
from serve.settings import PREFIX, Settings, read_settings, refuse_service_links, with_flags

log = logging.getLogger(__name__)

SWITCH = 0.0005
"""Seconds for which one Python thread may keep another waiting; Python's own 5 ms are as long as several decoder steps,
and each of them may wait for the event loop, and that for each of them."""


def _before_variables_are_read(value: Path | None) -> Path | None:
    refuse_service_links(os.environ)
    return value


@with_flags
def serve(
    bundle: Annotated[Path, typer.Argument(help="Bundle from `limelight export`, or a folder of bundles.")],
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            envvar=f"{PREFIX}CONFIG",
            show_envvar=False,
            is_eager=True,
            callback=_before_variables_are_read,
            help="TOML file of settings.",
        ),
    ] = None,
    **given: Any,
) -> None:
    """Serve bundles over gRPC, with health and reflection, until SIGTERM or Ctrl-C; needs no PyTorch.

    SIGHUP, --poll and administrative calls (--admin-port) have the folder looked at again: bundles that are new or have
    changed are loaded and swapped in without losing a request.

    Every option can also be a variable, as LIMELIGHT_SERVE_QUEUE_TOKENS, or a key of the TOML file, as queue_tokens. A
    flag goes before a variable, and that before the file.
    """
    settings = read_settings(config, given, os.environ)
    load = partial(load_model, provider=settings.provider, precision=settings.precision, threads=settings.threads)
    _run(bundle, load, settings)


def _run(root: Path, load: Load, settings: Settings) -> None:
    heap.keep_together()
    sys.setswitchinterval(SWITCH)
    with written(settings.log_format, settings.log_level):
        finished = asyncio.run(_serve(root, load, settings))
    if not finished:
        # The engine's thread may be deep in a run that nothing can join: leave without tearing the interpreter down.
        os._exit(1)


async def _serve(root: Path, load: Load, settings: Settings) -> bool:
    def ready(server: Server) -> None:
        _announce(server, f"{options.host}:{server.port}", options.security.client_options)
        if settings.port_file is not None:
            _write_port(settings.port_file, server.port)

    loop, options = asyncio.get_running_loop(), settings.options
    loading = asyncio.current_task()
    if loading is not None:
        loop.add_signal_handler(signal.SIGTERM, _stop_loading, loading)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)  # what it asks for is under way
    models = Models(options.limits)
    folder = ModelFolder(root, load, models)
    try:
        await folder.load_all()
        return await serve_until_signal(models, options, ready, folder)
    except asyncio.CancelledError:
        log.info("stopped before anything was served")
        return True


def _stop_loading(loading: asyncio.Task[Any]) -> None:
    """Once what is being loaded is loaded, so that nothing is left of it; asked again, at once."""
    if loading.cancelling():
        os._exit(1)
    loading.cancel()


def _announce(server: Server, address: str, needed: str) -> None:
    for serving in server.models:
        model = serving.model
        what = f"{serving.name} {serving.version} ({model.precision}, {model.provider}, {model.threads} threads)"
        log.info("%s on %s; ask it: limelight ask TEXT -a %s%s", what, address, address, needed)


def _write_port(path: Path, port: int) -> None:
    """Whole or not at all: somebody waits for the file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(f"{port}\n", encoding="ascii")
    temporary.replace(path)
