"""The tritonserver of nvidia-pytriton with a Python backend over the same bundle: peer (b).

    python -m bench.load.triton_server BUNDLE FOLDER --threads=1 ...

Run in the environment that has nvidia-pytriton. Writes a model repository into FOLDER and becomes tritonserver, started
as pytriton starts it, but with the decode loop in Triton's own Python backend: pytriton's would pass every batch on to
another process. Beam and length are the server's here, not the request's.
"""

import importlib.util
import os
import shlex
import shutil
import socket
import sys
import sysconfig
from pathlib import Path

from bench.load.options import Peer, read_peer, write_port

MODEL = "limelight"

CONFIG = """\
name: "{model}"
backend: "python"
max_batch_size: {batch}
input [{{ name: "SOURCE", data_type: TYPE_STRING, dims: [1] }}]
output [{{ name: "TEXT", data_type: TYPE_STRING, dims: [1] }}]
instance_group [{{ kind: KIND_CPU, count: 1 }}]
dynamic_batching {{ default_queue_policy {{ max_queue_size: {queue} {policy} }} }}
"""
"""One instance, and no delay: a batch is whatever waits when the last one is done, as in the other servers."""

BACKEND = "from bench.load.triton_model import TritonPythonModel as TritonPythonModel\n"


def write_repository(peer: Peer) -> Path:
    """Write the model repository; returns its folder."""
    repository = peer.folder / "models"
    version = repository / MODEL / "1"
    version.mkdir(parents=True, exist_ok=True)
    options = peer.options
    config = CONFIG.format(model=MODEL, batch=options.rows // options.beam, queue=options.queue, policy="")
    values = [str(peer.model.absolute()), str(peer.folder.absolute()), *options.arguments()]
    parameters = f'parameters {{ key: "command" value: {{ string_value: "{shlex.join(values)}" }} }}\n'
    (repository / MODEL / "config.pbtxt").write_text(config + parameters, encoding="utf-8")
    (version / "model.py").write_text(BACKEND, encoding="utf-8")
    return repository


def prepare_backends(distribution: Path, folder: Path) -> Path:
    """Lay out the Python backend with the stub for this Python, as pytriton does; returns the backends' folder."""
    backends = folder / "backends"
    if backends.is_dir():
        return backends  # as the last server left it: its stub may still run
    shutil.copytree(distribution / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = "triton_python_backend_stub"
    shutil.copy(distribution / "python_backend_stubs" / version / stub, backends / "python" / stub)
    return backends


def free_port() -> int:
    """A port that nobody listens on: Triton cannot tell which one it was given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(distribution: Path) -> dict[str, str]:
    """For the stub, which embeds Python: this one, with this environment's packages and this repository's."""
    binaries = Path(sys.executable).parent
    libraries = [
        str(distribution.parents[1] / "nvidia_pytriton.libs"),
        str(sysconfig.get_config_var("LIBDIR")),
        os.environ.get("LD_LIBRARY_PATH", ""),
    ]
    return {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path.cwd()),
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
    }


def become(repository: Path, folder: Path, port: int, *options: str) -> None:
    """Become tritonserver over a model repository.

    Args:
        repository: this.
        folder: where the backends may be laid out.
        port: to listen on.
        options: more of the command line.
    """
    found = importlib.util.find_spec("pytriton")
    if found is None or not found.submodule_search_locations:
        sys.exit("this Python has no nvidia-pytriton: use the environment that `make bench-load` makes")
    distribution = Path(found.submodule_search_locations[0]) / "tritonserver"
    command = [
        str(distribution / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={prepare_backends(distribution, folder)}",
        "--disable-auto-complete-config",
        "--allow-http=false",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        *options,
    ]
    os.execve(command[0], command, environment(distribution))


def main() -> None:
    """Become tritonserver over the bundle, once the port is told."""
    peer = read_peer()
    port = free_port()
    repository = write_repository(peer)
    write_port(peer.port_file, port)
    become(repository, peer.folder, port)


if __name__ == "__main__":
    main()
