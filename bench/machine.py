"""Where a figure was measured: it means nothing without that."""

import os
import platform
import sys
from pathlib import Path

from export.bundle import installed_version

PACKAGES = ("limelight", "torch", "onnx", "onnxruntime", "numpy", "grpcio", "tokenizers")


def describe_machine() -> dict[str, object]:
    """Processor, cores, versions and the command, for the JSON beside a table."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in PACKAGES},
        "command": ["python", "-m", "bench." + Path(sys.argv[0]).stem, *sys.argv[1:]],
    }


def processor() -> str:
    """The processor's name, as the kernel knows it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
