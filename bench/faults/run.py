"""Every fault to every server, each started afresh for it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import machine
from bench.faults.case import Case, Fault, Finding, Verdict
from bench.faults.kinds import Kind
from bench.faults.running import started
from bench.grid import commit
from bench.load.servers import LoadError, run_tool

TRIES = 2
"""Times that a fault is tried which cannot be put: a busy machine may be the reason."""

PACKAGES = (*machine.PACKAGES, "protobuf", "nvidia-pytriton", "mlserver", "uvloop")
"""Whose versions matter, in any of the environments."""


def put(fault: Fault, kind: Kind) -> Finding:
    """Put a fault to a server that is started for it."""
    if kind.name in fault.lacking:
        return _unput(fault, kind, Verdict.INAPPLICABLE, fault.lacking[kind.name])
    failure = ""
    for _ in range(TRIES):
        try:
            with started(kind, fault.wanted) as running, running.asker() as asker:
                case = Case(running, asker)
                fault.put(case)
                case.close()
                return case.finding(fault.number)
        except LoadError as error:
            failure = str(error)
    return _unput(fault, kind, Verdict.FAILED, failure.splitlines()[0])


def _unput(fault: Fault, kind: Kind, verdict: Verdict, reason: str) -> Finding:
    return Finding(fault=fault.number, server=kind.name, verdict=verdict, reason=reason)


def put_all(faults: Sequence[Fault], kinds: Sequence[Kind], tell: Callable[[Finding], None]) -> list[Finding]:
    """Put faults to servers, one after the other; `tell` is told of each finding."""
    findings = []
    for fault in faults:
        for kind in kinds:
            findings.append(put(fault, kind))
            tell(findings[-1])
    return findings


def versions(kinds: Sequence[Kind]) -> dict[str, dict[str, str]]:
    """What is installed in each server's environment."""
    found = {}
    for kind in kinds:
        listed = json.loads(run_tool(kind.python, "pip", "list", "--format=json", "--disable-pip-version-check"))
        every = {package["name"]: package["version"] for package in listed}
        found[kind.name] = {package: every[package] for package in PACKAGES if package in every}
    return found


def save(path: Path, about: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    """Write what was found, and where."""
    content = {**about, "rows": [asdict(finding) for finding in findings]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(kinds: Sequence[Kind], command: Sequence[str]) -> dict[str, Any]:
    """Machine, commit, versions and command, for the JSON."""
    where = machine.describe_machine()
    about = {key: value for key, value in where.items() if key not in ("versions", "command")}
    measured = commit("model", "export", "serve", "bench")
    return {"machine": about, "commit": measured, "versions": versions(kinds), "command": list(command)}
