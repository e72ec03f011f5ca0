"""A tritonserver over a model repository, for the tests: run in the environment that has nvidia-pytriton.

python -m tests.peers.triton_server REPOSITORY FOLDER PORT
"""

import importlib.util
import os
import sys
from pathlib import Path

from bench.load.triton_server import environment, prepare_backends


def main() -> None:
    """Become tritonserver."""
    repository, folder, port = sys.argv[1:]
    found = importlib.util.find_spec("pytriton")
    if found is None or not found.submodule_search_locations:
        sys.exit("this Python has no nvidia-pytriton")
    distribution = Path(found.submodule_search_locations[0]) / "tritonserver"
    command = [
        str(distribution / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={prepare_backends(distribution, Path(folder))}",
        "--disable-auto-complete-config",
        "--allow-http=false",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
    ]
    os.execve(command[0], command, environment(distribution))


if __name__ == "__main__":
    main()
