"""`make faults`: the same faults to Limelight, tritonserver and MLServer.

python -m bench.faults                                 all of them; JSON in bench/results/
python -m bench.faults --server limelight --fault 21   some of them; the table alone, unless --json says where to
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.faults.case import Finding, Verdict
from bench.faults.catalogue import FAULTS
from bench.faults.kinds import ENVIRONMENTS, kinds
from bench.faults.run import describe, put_all, save
from bench.faults.table import RESULTS, STYLES, cell, terminal
from bench.load.servers import ROOT, LoadError, ServerName
from bench.load.workload import ModelName, prepare


def main(
    server: Annotated[list[str] | None, typer.Option(help="Which; repeat for several. All, if left out.")] = None,
    fault: Annotated[list[int] | None, typer.Option(help="Its number; repeat for several. All, if left out.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="What Limelight serves; by default the shipped model.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Where to.")] = None,
) -> None:
    """Put faults to servers, and tell what came of each."""
    console = Console()
    chosen = [one for one in FAULTS if not fault or one.number in fault]
    found = kinds(bundle or _shipped(), ENVIRONMENTS)
    servers = [kind for kind in found.values() if not server or kind.name in server]
    if unknown := {*(server or ())} - found.keys() or {*(fault or ())} - {one.number for one in FAULTS}:
        raise typer.BadParameter(f"{sorted(map(str, unknown))}: no such server, or no fault that is put to servers")
    for kind in servers:
        if not kind.python.is_file():
            raise LoadError(f"{kind.python}: no such environment for {kind.name}: `make faults` makes it")
    about = describe(servers, ["python", "-m", "bench.faults", *sys.argv[1:]])

    def tell(finding: Finding) -> None:
        style = STYLES.get(Verdict(finding.verdict), "dim")
        what = finding.reason or cell(asdict(finding))
        console.print(f"{finding.fault:3} {finding.server:10} [{style}]{finding.verdict}[/]: {what}", highlight=False)

    findings = put_all(chosen, servers, tell)
    console.print(terminal([asdict(finding) for finding in findings]))
    whole = len(chosen) == len(FAULTS) and len(servers) == len(found)
    path = as_json or (RESULTS if whole else None)
    if path is not None:
        save(path, about, findings)
        console.print(f"{path}: written")
    if any(one.verdict == Verdict.FAILED for one in findings):
        raise typer.Exit(1)


def _shipped() -> Path:
    workload = prepare(ModelName.G2P_EN, ROOT / "build" / "load", reuse=True)
    return workload.model_of(ServerName.LIMELIGHT, "fp32")


if __name__ == "__main__":
    typer.run(main)
