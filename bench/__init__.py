"""Benchmarks: scripts that print a table and write JSON with machine, versions and command. Never tests."""

import os

# Official builds of ONNX Runtime tell Microsoft of their use unless this is set before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
