"""Dropout on a CPU: ours (sixteen random bits an element) against PyTorch's, interleaved, median of many rounds.

python -m bench.dropout --json FILE
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from bench.machine import describe_machine
from model.dropout import Dropout


def seconds(module: nn.Module, x: torch.Tensor) -> float:
    """Time of one forward and backward pass."""
    begun = time.perf_counter()
    module(x).sum().backward()
    return time.perf_counter() - begun


def main(
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; the median counts.")] = 101,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 1,
) -> None:
    """Measure both on a thousand positions of a feed-forward network 512 wide."""
    torch.set_num_threads(threads)
    machine, x = describe_machine(), torch.randn(1000, 512, requires_grad=True)
    ours, theirs = Dropout(0.1), nn.Dropout(0.1)
    pairs = [(seconds(ours, x), seconds(theirs, x)) for _ in range(rounds)]
    ratio = statistics.median(one / other for one, other in pairs)
    print(f"ours takes {100 * ratio:.0f} % of PyTorch's time ({threads} thread(s), {machine['processor']})")
    if as_json is not None:
        content = {"machine": machine, "ratio": ratio, "rounds": rounds, "threads": threads}
        as_json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
