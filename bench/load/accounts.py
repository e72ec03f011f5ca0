"""What a server costs, from /proc: processor time and memory of its whole process tree."""

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
MEGABYTE = 1024.0
"""Kibibytes, which the kernel counts in."""


@dataclass(frozen=True)
class Memory:
    """Megabytes (2^20 bytes) of a process tree.

    Attributes:
        proportional: resident now, pages that processes share counted once (PSS): to compare trees of processes.
        resident: now, each process for itself (RSS): to compare one with itself, whatever shares its pages meanwhile.
        peak: the most that was ever resident (RSS), each process for itself.
    """

    proportional: float
    resident: float
    peak: float


def process_tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for folder in PROC.glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [root]
    for process in found:  # grows while it is walked
        found += children.get(process, [])
    return found


def processor_seconds(root: int) -> float:
    """User and system time of a tree so far, all threads; children that have ended count if they were waited for."""
    spent = 0
    for process in process_tree(root):
        fields = _stat(process)
        spent += sum(int(ticks) for ticks in fields[11:15])
    return spent / TICKS


def memory(root: int) -> Memory:
    """Memory of a tree."""
    tree = process_tree(root)
    proportional = sum(_kibibytes(process, "smaps_rollup", "Pss:") for process in tree)
    resident = sum(_kibibytes(process, "status", "VmRSS:") for process in tree)
    peak = sum(_kibibytes(process, "status", "VmHWM:") for process in tree)
    return Memory(proportional / MEGABYTE, resident / MEGABYTE, peak / MEGABYTE)


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on (proc(5), where that is field 3); none of a process that ended."""
    try:
        # The name before them may hold anything, spaces and brackets too.
        return (PROC / str(process) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _kibibytes(process: int, file: str, name: str) -> float:
    try:
        lines = (PROC / str(process) / file).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith(name)), 0.0)
