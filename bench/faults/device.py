"""What a model under test does at each of its steps: it tells the runner, and does as it is told.

Standard library alone: this runs inside all three servers, each in an environment of its own. Where nobody listens,
every step goes on at once.
"""

import json
import os
import signal
import socket
from collections.abc import Callable, Sequence

PLACE = "LIMELIGHT_FAULTS_SOCKET"
"""Variable with the path of the Unix socket on which the runner listens."""

SECRET = "secret of the model"
"""Text of an error of the model, which no client is to read."""


def enter(what: str, texts: Sequence[str] = (), rows: int = 0, die: Callable[[], None] | None = None) -> None:
    """Tell the runner of a step, and wait for its answer.

    Args:
        what: "load", "encode" or "step".
        texts: that are in it, where the model knows them.
        rows: of it; by default as many as there are texts.
        die: what to do when told to die; by default the process kills itself.

    Raises:
        RuntimeError: the runner wants the model to fail.
    """
    answer = _ask({"pid": os.getpid(), "what": what, "rows": rows or len(texts), "texts": list(texts)})
    if answer == "fail":
        raise RuntimeError(SECRET)
    if answer == "die":
        (die or _kill)()


def _ask(told: object) -> str:
    with socket.socket(socket.AF_UNIX) as runner:
        try:
            runner.connect(os.environ.get(PLACE, ""))
            runner.sendall(json.dumps(told).encode() + b"\n")
            return runner.recv(16).decode()
        except OSError:
            return "go"  # the runner has gone, and with it whoever would have let this step through


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
