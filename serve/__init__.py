"""Serve a bundle over gRPC from ONNX Runtime, without PyTorch: load, queue, decode, answer; and ask it."""
