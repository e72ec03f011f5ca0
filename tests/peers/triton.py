"""A real tritonserver beside ours: started where the environment of `make bench-load` has one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from google.protobuf import text_format

from bench.load.triton_server import free_port
from serve.model_config import model_config
from serve.models import Serving
from tests.serve.running import PATIENCE

REPOSITORY = Path(__file__).parents[2]


def environment_of(peer: str) -> Path:
    """Where `make build/load/PEER-environment/.ready` installs a peer, unless a variable says otherwise."""
    place = REPOSITORY / "build" / "load" / f"{peer}-environment"
    return Path(os.environ.get(f"LIMELIGHT_{peer.upper()}_ENVIRONMENT", place))


ENVIRONMENT = environment_of("triton")
PYTHON, KSERVE = ENVIRONMENT / "bin" / "python", environment_of("kserve") / "bin" / "python"

MISSING = f"{ENVIRONMENT} has no tritonserver: make build/load/triton-environment/.ready"
"""Why a test is skipped."""

BACKEND = "from tests.peers.triton_echo import TritonPythonModel as TritonPythonModel\n"


def write_repository(folder: Path, serving: Serving) -> Path:
    """A model repository for Triton: one model, configured as our server says that ours is."""
    config = model_config(serving)
    config.platform, config.backend = "", "python"
    version = folder / config.name / "1"
    version.mkdir(parents=True)
    (folder / config.name / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    (version / "model.py").write_text(BACKEND, encoding="utf-8")
    return folder


@contextmanager
def triton_server(folder: Path, serving: Serving) -> Iterator[grpc.Channel]:
    """A tritonserver with a model of the same name and tensors, and a channel to it."""
    port = free_port()
    arguments = [str(write_repository(folder / "models", serving)), str(folder), str(port)]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [str(PYTHON), "-m", "bench.faults.triton_server", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                grpc.channel_ready_future(channel).result(PATIENCE)
                yield channel
        finally:
            process.terminate()
            process.wait(PATIENCE)
