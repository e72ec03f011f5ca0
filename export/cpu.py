"""How many processors this process may really use: its affinity and its container's quota, whichever is less.

ONNX Runtime goes by the host's cores whatever the quota, and then threads wait for each other in turns.
"""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = CGROUP) -> int:
    """Processors to plan with, at least 1.

    Args:
        cgroup: where control groups are mounted (version 2, or 1 in its `cpu` folder).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(cgroup)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """Processors that the control group's quota amounts to; None without one."""
    unified = _read(cgroup / "cpu.max").split()
    if len(unified) == 2 and unified[0] != "max":
        return int(unified[0]) / int(unified[1])
    quota, period = _read(cgroup / "cpu" / "cpu.cfs_quota_us"), _read(cgroup / "cpu" / "cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        return int(quota) / int(period)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
