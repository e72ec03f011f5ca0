"""A server under faults, as a process: started, found to be ready, and ended whatever is left of it."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc

from bench.faults import device
from bench.faults.asking import Asker, Metadata
from bench.faults.kinds import Kind
from bench.faults.passes import PATIENCE, Passes
from bench.faults.wanted import Ports, Wanted
from bench.load import accounts
from bench.load.servers import GRACE, ROOT, LoadError
from serve.channel import Credentials, open_channel

START = 60.0
"""Seconds that a server has to become ready."""

LONGEST_ANSWER = 64 * 1024 * 1024
"""Bytes that a client takes."""


@dataclass(frozen=True)
class Running:
    """A server that was started.

    Attributes:
        kind: what it is.
        wanted: settings that it was started with.
        process: its first process.
        folder: what it has written, its models and its log.
        ports: that it listens on.
        passes: the steps of its model.
    """

    kind: Kind
    wanted: Wanted
    process: "subprocess.Popen[bytes]"
    folder: Path
    ports: Ports
    passes: Passes

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def metadata(self) -> Metadata:
        """What calls must bring."""
        return (self.kind.credentials,) if self.wanted.credentials else ()

    @property
    def megabytes(self) -> accounts.Memory:
        """Of its process tree."""
        return accounts.memory(self.process.pid)

    @property
    def processor_seconds(self) -> float:
        """Of its process tree, so far."""
        return accounts.processor_seconds(self.process.pid)

    def channel(self, port: int | None = None, options: tuple[tuple[str, int], ...] = ()) -> grpc.Channel:
        """A new connection."""
        given = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", LONGEST_ANSWER), *options)
        tls = self.wanted.tls
        files: Credentials = {} if tls is None else {"ca": tls.ca, "certificate": tls.certificate, "key": tls.key}
        return open_channel(f"127.0.0.1:{port or self.ports.service}", given, **files)

    @contextmanager
    def asker(self) -> Iterator[Asker]:
        """A client of the model."""
        with self.channel() as channel:
            yield Asker(channel, self.kind.model, self.metadata)

    @contextmanager
    def administrator(self) -> Iterator[Asker]:
        """A client that may load models: ours has a port for it."""
        port = self.ports.admin if self.kind.name == "limelight" else self.ports.service
        tls = None if self.kind.name == "limelight" else self.wanted.tls
        channel = self.channel(port) if tls == self.wanted.tls else grpc.insecure_channel(f"127.0.0.1:{port}")
        with channel:
            yield Asker(channel, self.kind.model, self.metadata)

    def ended(self, patience: float) -> int | None:
        """Its exit status, if it ends in time."""
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return None

    def until_ready(self) -> None:
        """Until it answers that it is.

        Raises:
            LoadError: it ended, or is not in time.
        """
        end = time.monotonic() + START
        with self.asker() as asker:
            while not asker.ready():
                if not self.alive or time.monotonic() > end:
                    raise LoadError(f"{self.kind.title} did not get ready; its log ends so:\n{self.log}")
                time.sleep(0.05)

    @property
    def log(self) -> str:
        """The end of what it printed."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:]


@contextmanager
def started(kind: Kind, wanted: Wanted, *, ready: bool = True) -> Iterator[Running]:
    """Start a server in a folder of its own.

    Args:
        kind: which.
        wanted: its settings.
        ready: wait until it is.

    Raises:
        LoadError: it did not get ready.
    """
    with TemporaryDirectory() as temporary:
        folder, ports = Path(temporary), Ports.free()
        kind.lay_out(folder, wanted, ports)
        with again(kind, wanted, folder, ports, ready=ready) as running:
            yield running


@contextmanager
def again(kind: Kind, wanted: Wanted, folder: Path, ports: Ports, *, ready: bool = True) -> Iterator[Running]:
    """Start a server in a folder that is laid out."""
    passes = Passes(folder / "passes")
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            kind.command(folder, wanted, ports),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), device.PLACE: str(passes.place)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that all that it starts can be ended
        )
    running = Running(kind, wanted, process, folder, ports, passes)
    try:
        if ready:
            running.until_ready()
        yield running
    finally:
        passes.close()
        process.terminate()
        shared = _shared_memory(process.pid)
        running.ended(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)
        for path in shared:
            path.unlink(missing_ok=True)  # who is killed cannot remove it


def _shared_memory(group: int) -> set[Path]:
    """What the processes of a group have mapped of shared memory."""
    found = set[Path]()
    for maps in accounts.PROC.glob("[0-9]*/maps"):
        with suppress(OSError, ValueError):  # it has ended, or is somebody else's
            if os.getpgid(int(maps.parent.name)) == group:
                names = re.findall(r"(/dev/shm/\S+)$", maps.read_text(encoding="utf-8"), re.MULTILINE)
                found |= {Path(name) for name in names}
    return found
