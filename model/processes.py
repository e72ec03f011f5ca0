"""One training over several processes: what `torchrun` starts, joined by PyTorch's DistributedDataParallel."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's place among those of a training.

    Attributes:
        rank: its number; 0 validates, reports and writes.
        world: how many there are.
        device: where this one computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """This is the process that validates, reports and writes."""
        return self.rank == 0

    def total(self, value: float) -> float:
        """Sum of a number over all processes."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.item()

    def agree(self, value: float) -> float:
        """The first process's number, in every process; the others wait for it."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return tensor.item()

    def share(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process: for what two of them would not make alike."""
        if self.world == 1:
            return make()
        made = [make()] if self.first else [None]
        dist.broadcast_object_list(made, 0, device=self.device)
        return cast("T", made[0])


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that `torchrun` started (gloo on CPU, nccl on GPU), or stand alone without it."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Processes(0, 1, device)
        return
    # The others wait while the first validates, which may take longer than the default's ten minutes.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    try:
        yield Processes(rank, world, device)
    finally:
        dist.destroy_process_group()
