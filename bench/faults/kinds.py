"""The three servers: how each is laid out, started and given another version, by the settings that it documents."""

import abc
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.faults.wanted import ADMIN_HEADER, ADMIN_TOKEN, LARGEST_MESSAGE, Ports, Wanted
from bench.load.servers import ROOT
from bench.load.triton_server import CONFIG
from export.manifest import MANIFEST
from serve.access import Entry, hash_token

Spoil = Callable[[Path], None]
"""Damages what is in the folder of a model."""

BATCH = 64
"""Most texts that the peers decode together, as our server has it by default."""


@dataclass(frozen=True)
class Kind(abc.ABC):
    """One kind of server.

    Attributes:
        name: as the command line has it.
        title: as a table has it.
        python: interpreter of the environment that it runs in.
        model: that it serves.
    """

    name: str
    title: str
    python: Path
    model: str

    @abc.abstractmethod
    def lay_out(self, folder: Path, wanted: Wanted, ports: Ports) -> None:
        """Write what the server needs into an empty folder, its models below `folder`/models."""

    @abc.abstractmethod
    def command(self, folder: Path, wanted: Wanted, ports: Ports) -> list[str]:
        """Its command line."""

    @property
    def credentials(self) -> tuple[str, str]:
        """What a call brings that shows that it may load models."""
        return ADMIN_HEADER, ADMIN_TOKEN

    @abc.abstractmethod
    def put_version(self, folder: Path, number: int) -> None:
        """Put another version in place of the one that is there; it is loaded when it is asked for."""

    @property
    @abc.abstractmethod
    def spoils(self) -> Mapping[str, Spoil]:
        """Ways to damage the model's folder, by what is wrong with it then."""

    def place(self, folder: Path) -> Path:
        """The model's folder."""
        return folder / "models" / self.model


@dataclass(frozen=True)
class Limelight(Kind):
    """Ours.

    Attributes:
        bundle: that is served.
    """

    bundle: Path

    @property
    def credentials(self) -> tuple[str, str]:
        """See `Kind`."""
        return ADMIN_HEADER, f"Bearer {ADMIN_TOKEN}"

    def lay_out(self, folder: Path, wanted: Wanted, ports: Ports) -> None:  # noqa: ARG002
        """See `Kind`."""
        shutil.copytree(self.bundle, self.place(folder))
        if wanted.credentials:
            line = f"{Entry('runner', 'admin', hash_token(ADMIN_TOKEN))}\n"
            with os.fdopen(os.open(folder / "tokens", os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(line)

    def command(self, folder: Path, wanted: Wanted, ports: Ports) -> list[str]:
        """See `Kind`."""
        # One client asks here, and gets all of the queue.
        flags = {
            "port": ports.service,
            "admin-port": ports.admin,
            "provider": "cpu",
            "threads": 1,
            "queue": wanted.queue,
            "client-queue": wanted.queue,
            "queue-tokens": wanted.queue_tokens,
            "watchdog": wanted.watchdog,
            "write-timeout": wanted.write_timeout,
            "handshake": wanted.handshake,
            "keepalive": wanted.keepalive,
            "keepalive-timeout": wanted.keepalive,
            "grace": wanted.grace,
            "token-file": folder / "tokens" if wanted.credentials else None,
            "tls-certificate": wanted.tls and wanted.tls.certificate,
            "tls-key": wanted.tls and wanted.tls.key,
            "tls-client-ca": wanted.tls and wanted.tls.ca,
        }
        given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        return [str(self.python), "-m", "bench.faults.limelight_server", "serve", str(folder / "models"), *given]

    def put_version(self, folder: Path, number: int) -> None:
        """See `Kind`."""
        path = self.place(folder) / MANIFEST
        manifest = json.loads(path.read_text(encoding="utf-8"))
        replace(path, json.dumps(manifest | {"version": str(number)}))

    @property
    def spoils(self) -> Mapping[str, Spoil]:
        """See `Kind`."""
        return {
            "half written": lambda place: os.truncate(place / "fp32" / "weights.bin", 1000),
            "no description to read": lambda place: os.truncate(place / MANIFEST, 20),
            "a file missing": lambda place: (place / "fp32" / "encoder.onnx").unlink(),
        }


@dataclass(frozen=True)
class Triton(Kind):
    """NVIDIA's tritonserver, with its Python backend."""

    @property
    def credentials(self) -> tuple[str, str]:
        """See `Kind`."""
        return f"triton-grpc-protocol-{ADMIN_HEADER}", ADMIN_TOKEN

    def lay_out(self, folder: Path, wanted: Wanted, ports: Ports) -> None:  # noqa: ARG002
        """See `Kind`."""
        place = self.place(folder)
        place.mkdir(parents=True)
        (place / "config.pbtxt").write_text(
            CONFIG.format(model=self.model, batch=BATCH, queue=wanted.queue or 0, policy=POLICY), encoding="utf-8"
        )
        self.put_version(folder, 1)

    def command(self, folder: Path, wanted: Wanted, ports: Ports) -> list[str]:
        """See `Kind`."""
        options = {
            "model-control-mode": "explicit",
            "load-model": self.model,
            "exit-timeout-secs": round(wanted.grace),
            "grpc-http2-min-recv-ping-interval-without-data": 5000,  # as ours; the default cuts off a ping every 10 s
            "grpc-http2-max-ping-strikes": 3,
            "grpc-keepalive-permit-without-calls": 1,
        }
        if wanted.keepalive is not None:
            milliseconds = round(1000 * wanted.keepalive)
            options |= {"grpc-keepalive-time": milliseconds, "grpc-keepalive-timeout": milliseconds}
            options |= {"grpc-http2-max-pings-without-data": 0}
        if wanted.credentials:
            options["grpc-restricted-protocol"] = f"model-repository:{ADMIN_HEADER}={ADMIN_TOKEN}"
        if wanted.tls is not None:
            options |= {
                "grpc-use-ssl-mutual": "true",
                "grpc-server-cert": str(wanted.tls.certificate),
                "grpc-server-key": str(wanted.tls.key),
                "grpc-root-cert": str(wanted.tls.ca),
            }
        given = [f"--{name}={value}" for name, value in options.items()]
        arguments = [str(folder / "models"), str(folder), str(ports.service), *given]
        return [str(self.python), "-m", "bench.faults.triton_server", *arguments]

    def put_version(self, folder: Path, number: int) -> None:
        """See `Kind`."""
        version = self.place(folder) / str(number)
        version.mkdir()
        replace(version / "model.py", "from bench.faults.triton_model import TritonPythonModel as TritonPythonModel\n")

    @property
    def spoils(self) -> Mapping[str, Spoil]:
        """See `Kind`. It is the version that is asked for next that is damaged."""

        def spoilt(place: Path, text: str) -> None:
            number = 1 + max(int(path.name) for path in place.iterdir() if path.is_dir())
            (place / str(number)).mkdir()
            replace(place / str(number) / "model.py", text)

        return {
            "half written": lambda place: spoilt(place, "from bench.faults.triton_model impo"),
            "no description to read": lambda place: replace(place / "config.pbtxt", "name: {"),
            "a file missing": lambda place: (place / "1" / "model.py").unlink(),
        }


@dataclass(frozen=True)
class MLServer(Kind):
    """Seldon's MLServer, with a runtime of our own and one worker, as it has by default."""

    def lay_out(self, folder: Path, wanted: Wanted, ports: Ports) -> None:  # noqa: ARG002
        """See `Kind`."""
        settings = {
            "debug": False,
            "host": "127.0.0.1",
            "grpc_port": ports.service,
            "http_port": ports.admin,  # it cannot be left out
            "metrics_endpoint": None,
            "grpc_max_message_length": LARGEST_MESSAGE,
            "environments_dir": str(folder / "environments"),
            "metrics_dir": str(folder / "metrics"),
        }
        self.place(folder).mkdir(parents=True)
        (folder / "models" / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        self.put_version(folder, 1)

    def command(self, folder: Path, wanted: Wanted, ports: Ports) -> list[str]:  # noqa: ARG002
        """See `Kind`."""
        return [str(self.python), "-c", "from mlserver.cli import main; main()", "start", str(folder / "models")]

    def put_version(self, folder: Path, number: int) -> None:
        """See `Kind`."""
        settings = {
            "name": self.model,
            "implementation": "bench.faults.mlserver_model.Reverser",
            "max_batch_size": BATCH,
            "max_batch_time": 0.05,
            "parameters": {"version": str(number)},
        }
        replace(self.place(folder) / "model-settings.json", json.dumps(settings))

    @property
    def spoils(self) -> Mapping[str, Spoil]:
        """See `Kind`."""

        def changed(place: Path, **values: str) -> None:
            path = place / "model-settings.json"
            replace(path, json.dumps(json.loads(path.read_text(encoding="utf-8")) | values))

        return {
            "half written": lambda place: changed(place, implementation="bench.faults.mlserver_model.Rever"),
            "no description to read": lambda place: os.truncate(place / "model-settings.json", 20),
            "a file missing": lambda place: (place / "model-settings.json").unlink(),
        }


POLICY = "timeout_action: REJECT allow_timeout_override: true"
"""Of Triton's queue: a request is dropped after the time that it brings."""


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def kinds(bundle: Path, environments: Mapping[str, Path]) -> dict[str, Kind]:
    """All three.

    Args:
        bundle: that ours serves.
        environments: the peers', by their names.
    """
    model = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["name"]
    triton, mlserver = (environments[name] / "bin" / "python" for name in ("triton", "mlserver"))
    found = (
        Limelight("limelight", "Limelight", Path(sys.executable), model, bundle),
        Triton("triton", "tritonserver 2.51", triton, "reverser"),
        MLServer("mlserver", "MLServer 1.7.1", mlserver, "reverser"),
    )
    return {kind.name: kind for kind in found}


ENVIRONMENTS = {name: ROOT / "build" / "load" / f"{name}-environment" for name in ("triton", "mlserver")}
"""Where `make faults` installs the peers."""
