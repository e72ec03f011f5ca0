"""A tritonserver over a model repository: run in the environment that has nvidia-pytriton.

python -m bench.faults.triton_server REPOSITORY FOLDER PORT [OPTIONS]
"""

import sys
from pathlib import Path

from bench.load.triton_server import become

if __name__ == "__main__":
    repository, folder, port, *options = sys.argv[1:]
    become(Path(repository), Path(folder), int(port), *options)
