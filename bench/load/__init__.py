"""The parts of `bench.serve_load`: arrivals, the load generator, the servers it is run against, and their accounts.

The process that runs the benchmark imports neither grpc nor onnxruntime; each server and the load generator are
processes of their own, started afresh, each in the environment that has what it needs.
"""
