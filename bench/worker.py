"""One side of `bench.decode` in a process of its own: fresh, pinned to its processors, its memory measured by itself.

    parent: Worker ── a line of JSON ──►  python -m bench.worker
                   ◄── a line of JSON ──

The first line is the job; then "decode" and "memory" in any order, or "rates" for the machine itself. Only
one worker is asked at a time, so several of them take turns on the same processors. What differs in attention alone is
decoded by one process, batch by batch in turns: two processes with the same graphs differ by more than attention costs.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker does."""

    side: Literal["ours", "peer"]
    folder: str
    """Of the bundle, or of the CTranslate2 model."""
    precision: str
    threads: int
    spinning: bool
    """Of ONNX Runtime's threads; CTranslate2's always spin a little."""
    batches: list[list[list[int]]]
    """Token ids: what one round decodes."""
    beam: int
    longest: int
    length_penalty: float


class Side(Protocol):
    """What both sides do."""

    def prepare(self, sources: Any) -> Any:
        """Sources as the side takes them."""

    def decode(self, sources: Any, *, beam_size: int, longest: int, length_penalty: float, attention: str) -> Any:
        """Decode one batch."""

    def answers(self, found: Any) -> list[list[int]]:
        """Ids of the best hypotheses."""


class Worker:
    """A worker process, seen from the parent.

    Args:
        threads: processors that it may run on, and threads of its libraries.
        job: what it decodes; None for one that only measures the machine.
    """

    def __init__(self, threads: int, job: Job | None = None) -> None:
        # The same processors for all: whoever runs has them to itself.
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # an interrupt is the parent's to handle
            cwd=Path(__file__).parent.parent,
            env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads)),
        )
        self._name = "the measurement of the machine" if job is None else job.side
        self.ask({"cpus": cpus, "job": None if job is None else asdict(job)})

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Send a request, and wait for its answer.

        Raises:
            RuntimeError: the worker has ended; what it said stands on the standard error output.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self._name}: its process ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing its input ends it; after an error or an interrupt nobody waits for what it is doing.
        if kind is not None:
            self._process.kill()
        self._process.communicate()


def run_worker() -> None:
    """Answer requests from standard input until it is closed."""
    first = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, first["cpus"])  # before any library starts threads, which inherit it
    job = None if first["job"] is None else Job(**first["job"])
    side = None if job is None else _open(job)
    batches = [] if job is None or side is None else [side.prepare(batch) for batch in job.batches]
    _say({})
    for line in sys.stdin:
        request = json.loads(line)
        if "rates" in request:
            _say(_rates(**request["rates"]))
        elif request["do"] == "memory":
            _say(peak_memory())
        elif job is not None and side is not None:
            found = _decode(side, job, batches, request["attention"], request.get("turn", 0))
            _say([found[attention] for attention in request["attention"]])


def _open(job: Job) -> Side:
    if job.side == "ours":
        from bench.ours import Ours

        return Ours(Path(job.folder), job.precision, job.threads, spinning=job.spinning)
    # CTranslate2 imports torch where it can, for its converters; it would be counted as memory of the decoder.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from bench.peer_ctranslate2 import Peer

    return Peer(Path(job.folder), job.precision, job.threads)


def _decode(
    side: Side, job: Job, batches: Sequence[Any], attentions: Sequence[str], turn: int
) -> dict[str, tuple[list[float], list[list[int]]]]:
    """Each batch's seconds, and the answers, with each attention; the order of these changes all the time."""
    seconds: dict[str, list[float]] = {attention: [0.0] * len(batches) for attention in attentions}
    answers: dict[str, list[list[int]]] = {attention: [] for attention in attentions}
    for index, batch in enumerate(batches):
        first = (turn + index) % len(attentions)
        order = [*attentions[first:], *attentions[:first]]
        for attention in order if turn % 2 else order[::-1]:
            begun = time.perf_counter()
            found = side.decode(
                batch,
                beam_size=job.beam,
                longest=job.longest,
                length_penalty=job.length_penalty,
                attention=attention,
            )
            seconds[attention][index] += time.perf_counter() - begun
            answers[attention] += side.answers(found)
            begun = time.perf_counter()
            del found  # what it takes to free the attention is a part of its price
            seconds[attention][index] += time.perf_counter() - begun
    return {attention: (seconds[attention], answers[attention]) for attention in attentions}


def _rates(precision: str, weight_bytes: int, threads: int, seconds: float) -> dict[str, float]:
    from bench.limit import measure_rates

    return asdict(measure_rates(precision, weight_bytes, threads, seconds))


def peak_memory() -> int:
    """Largest resident memory of this process, in bytes.

    Not `getrusage`, whose figure begins with that of the process that started this one.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: the peak memory of a process is measured on Linux alone")


def _say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    run_worker()
