"""Threads come from affinity and the container's quota, whatever the host has."""

import os
from pathlib import Path

import pytest

from export.cpu import available_cpus, cpu_quota


def unified(folder: Path, content: str) -> Path:
    (folder / "cpu.max").write_text(content)
    return folder


def legacy(folder: Path, quota: str, period: str = "100000") -> Path:
    (folder / "cpu").mkdir()
    (folder / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu" / "cpu.cfs_period_us").write_text(f"{period}\n")
    return folder


@pytest.mark.parametrize(
    ("content", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("50000 100000\n", 0.5), ("", None)]
)
def test_quota_of_unified_control_groups(tmp_path: Path, content: str, quota: float | None) -> None:
    assert cpu_quota(unified(tmp_path, content)) == quota


@pytest.mark.parametrize(("value", "quota"), [("-1", None), ("200000", 2.0), ("25000", 0.25)])
def test_quota_of_legacy_control_groups(tmp_path: Path, value: str, quota: float | None) -> None:
    assert cpu_quota(legacy(tmp_path, value)) == quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "missing") is None


@pytest.mark.parametrize(("quota", "cpus"), [(None, 8), (0.5, 1), (1.5, 2), (3.0, 3), (64.0, 8)])
def test_the_lesser_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: float | None, cpus: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    content = "max 100000" if quota is None else f"{int(quota * 100_000)} 100000"
    assert available_cpus(unified(tmp_path, content)) == cpus
