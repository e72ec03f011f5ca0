"""The `limelight` command: one line of registration for each subcommand, and one place where errors are printed.

Subcommands import what is heavy when they run, so `limelight serve` and `--help` work where there is no PyTorch.
"""

import importlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from model.errors import LimelightError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

# gRPC's core reads it when it is imported. It writes a line for every TLS handshake that fails and, even of errors,
# for every header that it cannot read: anybody who can connect could fill a disk. What is told of an error, we tell.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

if os.getpid() == 1:
    # A container's first process gets no signal that it does not handle: without this, who stops a container while the
    # command is being loaded waits until it is killed. Once it serves, the server has handlers of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))

EXTRAS = {
    "grpc": "serve",
    "grpc_health": "serve",
    "grpc_reflection": "serve",
    "google": "serve",
    "google.protobuf": "serve",
    "cryptography": "serve",
    "onnxruntime": "serve",
    "opentelemetry": "tracing",
    "opentelemetry.sdk": "tracing",
    "opentelemetry.exporter": "tracing",
    "torch": "train",
    "safetensors": "train",
    "tensorboard": "train",
    "onnx": "export",
    "onnxscript": "export",
}
"""Which extra brings a package that a subcommand found missing."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"limelight {importlib.metadata.version('limelight')}")
        raise typer.Exit


@app.callback()
def limelight(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train a Transformer, export it to ONNX with its attention exposed, serve it over gRPC, and ask it."""


def main() -> None:
    """Run the command line: errors of Limelight are printed as one line; anything else is a bug and shows its trace."""
    try:
        app()
    except LimelightError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _fail(f"this command needs the package {error.name!r}: pip install 'limelight[{EXTRAS[error.name]}]'")


def _fail(message: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(1)


def _register(module: str, name: str) -> None:
    """Add a subcommand, or, where its packages are not installed, one that says so."""
    try:
        command: Callable[..., None] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as missing:
        if missing.name not in EXTRAS:
            raise
        error = missing

        def command() -> None:
            raise error

        command.__doc__ = f"Needs limelight[{EXTRAS[error.name or '']}], which is not installed."
        # Whatever options it is given: what matters is that it cannot run.
        app.command(name, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(command)
        return
    app.command(name)(command)


_register("model.commands", "train")
_register("export.commands", "export")
_register("export.commands", "evaluate")
_register("export.align", "align")
_register("serve.commands", "serve")
_register("serve.ask", "ask")
_register("serve.doctor", "doctor")
_register("serve.probe", "probe")
_register("serve.token", "token")
