"""ONNX Runtime tells nobody that it is used: neither the server nor the exporter lets it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["serve.doctor", "export.runtime"])
def test_nothing_is_kept_of_the_device(module: str, tmp_path: Path) -> None:
    """ONNX Runtime writes an identifier of the device when it is loaded, before anything could be called to stop it."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env=environment | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        check=True,
    )
    assert [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name.lower()] == []
