"""Serve a bundle over gRPC from ONNX Runtime, without PyTorch: load, queue, decode, answer; and ask it."""

import os

# Official builds of ONNX Runtime tell Microsoft of their use unless this is set before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
