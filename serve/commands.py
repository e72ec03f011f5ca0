"""`limelight serve`."""

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from serve.bundle import ServedModel, load_model
from serve.jobs import EngineLimits
from serve.server import ServerOptions, serve_until_signal

DEFAULTS = EngineLimits()


def serve(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, from `limelight export`.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="Port; 0 takes a free one.")] = 50051,
    provider: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="What computes; auto takes CUDA where there is a device.")
    ] = "auto",
    precision: Annotated[
        Literal["fp32", "int8", "fp16"] | None,
        typer.Option(help="Of the weights; by default fp16 on CUDA if the bundle has it (export --fp16), else fp32."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that compute; by default as affinity and quota allow.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Most requests waiting; one more is refused.")] = DEFAULTS.queue,
    rows: Annotated[
        int, typer.Option(min=1, help="Most rows (sentences times beams) decoded together.")
    ] = DEFAULTS.rows,
    encode_tokens: Annotated[
        int, typer.Option(min=1, help="Most padded source tokens read between two decoder steps.")
    ] = DEFAULTS.encode_tokens,
    tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens, over all rows, that keys and values are kept of.")
    ] = DEFAULTS.tokens,
    attention: Annotated[
        int, typer.Option(min=1, help="Most weights of one attention head kept for answers under way.")
    ] = DEFAULTS.attention,
    call_seconds: Annotated[
        float, typer.Option(min=0, help="Several steps go into one call that ends in this time; 0 takes single steps.")
    ] = DEFAULTS.call_seconds,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that calls in flight have when stopping.")] = 30.0,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port for Prometheus' scrapes, on the same host; none if left out."),
    ] = None,
    watchdog: Annotated[
        float, typer.Option(min=0.1, help="Seconds that one computation may take; then the server fails and ends.")
    ] = 60.0,
    port_file: Annotated[
        Path | None, typer.Option(help="Write the port here once the server answers; for scripts using port 0.")
    ] = None,
) -> None:
    """Serve a bundle over gRPC, with health and reflection, until SIGTERM or Ctrl-C; needs no PyTorch."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    model = load_model(bundle, provider=provider, precision=precision, threads=threads)
    limits = EngineLimits(
        queue=queue,
        rows=rows,
        encode_tokens=encode_tokens,
        tokens=tokens,
        attention=attention,
        call_seconds=call_seconds,
    )
    options = ServerOptions(
        host=host, port=port, grace=grace, limits=limits, metrics_port=metrics_port, watchdog=watchdog
    )

    _run(model, options, port_file)


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
