"""The same faults, put to three servers over the one protocol that all of them speak: `make faults`.

The Open Inference Protocol v2 over gRPC, plain HTTP/2 and signals are all that is used. Every server has a model that
tells the runner of each step and waits for its answer (`device`, `passes`), so that a queue is full, a batch is under
way or a model hangs when the runner says so, in all three alike.
"""
