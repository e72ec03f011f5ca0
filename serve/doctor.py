"""`limelight doctor`: what is wrong with a machine, a bundle, or a server that runs, and the way out."""

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack

import grpc
import onnxruntime as ort
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.markup import escape

from export.cpu import available_cpus
from export.manifest import check_files, read_manifest
from model.errors import LimelightError
from serve.bundle import load_model
from serve.channel import Credentials, open_channel
from serve.client import Client, ServerError
from serve.credential_options import with_credentials

Level = Literal["ok", "warning", "error"]

LEVELS: dict[Level, str] = {
    "ok": "[green]ok     [/green]",
    "warning": "[yellow]warning[/yellow]",
    "error": "[red]error  [/red]",
}

ROOM, MEMORY = 1 << 30, 1 << 30
"""Bytes in the temporary folder, where bundles are copied to while they are loaded; and of memory."""

SECONDS = 10.0
"""That a server has to answer."""


@dataclass(frozen=True)
class Finding:
    """Something that was looked at."""

    level: Level
    what: str


def machine() -> Iterator[Finding]:
    """What a server needs of the machine."""
    python = platform.python_version()
    yield Finding("ok" if sys.version_info >= (3, 11) else "error", f"Python {python}, 3.11 or newer is needed")
    yield Finding("ok", f"onnxruntime {ort.__version__} with {', '.join(ort.get_available_providers())}")
    there, mine = os.cpu_count() or 1, available_cpus()
    yield Finding("ok", f"{mine} of {there} processors may be used, by affinity and quota")
    free = _available_memory()
    if free is not None:
        level: Level = "ok" if free >= MEMORY else "warning"
        yield Finding(level, f"{free / 2**30:.1f} GiB of memory are available; a server of a small model takes 0.2")
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile():
            room = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding("error", f"{folder}: cannot be written ({error.strerror}), set TMPDIR to a folder that can")
    else:
        yield Finding(
            "ok" if room >= ROOM else "warning",
            f"{folder}: {room / 2**30:.1f} GiB free; bundles are copied there while they are loaded, TMPDIR moves it",
        )


def bundle(folder: Path) -> Iterator[Finding]:
    """Whether a bundle is whole, and answers in each of its precisions."""
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
    except LimelightError as error:
        yield Finding("error", str(error))
        return
    size = sum(entry.bytes for entry in manifest.files.values())
    yield Finding(
        "ok",
        f"{manifest.name} {manifest.version}: {len(manifest.files)} files, {size / 2**20:.1f} MiB, checksums right",
    )
    for precision in manifest.graphs:
        begun = time.perf_counter()
        try:
            load_model(folder, provider="cpu", precision=precision)
        except LimelightError as error:
            yield Finding("error", f"{precision}: {error}")
        else:
            yield Finding("ok", f"{precision}: loaded and answering on the CPU in {time.perf_counter() - begun:.1f} s")
    if manifest.alignment is None:
        yield Finding("warning", "no alignment heads are stored: pictures show the mean of all heads")


def server(address: str, **credentials: Unpack[Credentials]) -> Iterator[Finding]:
    """Whether a server is there, healthy and answering."""
    try:
        with open_channel(address, (), **credentials) as channel:
            grpc.channel_ready_future(channel).result(SECONDS)
            yield _health(channel)
        client = Client(address, timeout=SECONDS, **credentials)
    except grpc.FutureTimeoutError:
        how = "with TLS, and a certificate of this CA" if credentials.get("ca") else "without TLS (else give --ca)"
        yield Finding(
            "error", f"{address}: nothing answers within {SECONDS:g} s: is it running, on this port, and {how}?"
        )
        return
    except LimelightError as error:
        yield Finding("error", str(error))
        return
    with client:
        try:
            served = client.models()
        except ServerError as error:
            yield Finding("error", f"the models cannot be listed: {error}")
            return
        for one in served:
            yield _asked(client, one.name, one.version, f"{one.name} {one.version} ({one.precision}, {one.provider})")
    if not served:
        yield Finding("error", "no model is loaded: look into its log, or call ListEntries of its administrative port")


def _health(channel: grpc.Channel) -> Finding:
    try:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status
    except grpc.RpcError as error:
        return Finding("error", f"no health is told ({error}): is it a Limelight server?")
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    serving = status == health_pb2.HealthCheckResponse.SERVING
    return Finding("ok" if serving else "error", f"health: {name}")


def _asked(client: Client, model: str, version: str, what: str) -> Finding:
    begun = time.perf_counter()
    try:
        answer = client.generate("a", model=model, version=version)
    except ServerError as error:
        # A model of other characters may refuse the text: that is an answer too.
        refused = error.code is grpc.StatusCode.INVALID_ARGUMENT
        return Finding("ok" if refused else "error", f"{what}: {error}")
    seconds = time.perf_counter() - begun
    return Finding("ok", f"{what}: {len(answer.hypotheses[0].tokens)} tokens in {1000 * seconds:.0f} ms")


@with_credentials()
def doctor(
    what: Annotated[
        list[str] | None, typer.Argument(help="Bundle folders and addresses HOST:PORT; none for the machine alone.")
    ] = None,
    **credentials: Any,
) -> None:
    """Say what is wrong with this machine, with bundles, or with servers that run; exit with 1 if anything is."""
    console, failed = Console(), False
    subjects: list[tuple[str, Callable[[], Iterator[Finding]]]] = [("this machine", machine)]
    for name in what or []:
        path = Path(name)
        if ":" in name and not path.exists():
            subjects.append((f"server {name}", lambda name=name: server(name, **credentials)))  # type: ignore[misc]
        else:
            subjects.append((f"bundle {name}", lambda path=path: bundle(path)))  # type: ignore[misc]
    for title, look in subjects:
        console.print(f"[bold]{escape(title)}[/bold]")
        for finding in look():
            failed |= finding.level == "error"
            console.print(f"  {LEVELS[finding.level]} {escape(finding.what)}", soft_wrap=True, highlight=False)
    if failed:
        raise typer.Exit(1)


def _available_memory() -> int | None:
    """Bytes; None where /proc does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
