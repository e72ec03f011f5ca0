"""What the server does at several times what it can do: fault 23, as `make overload`.

    python -m bench.overload --seconds 60

First its capacity: answers a second in a closed loop with more callers than rows. Then requests in an open loop at five
times that rate, each given up after its deadline. A server that works for requests that will be too late, or lets its
queue grow, collapses here: it is as busy as before and answers nobody in time. Counted are answers within the deadline,
refusals by status, and how late those answers came.
"""

import json
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.load.cells import percentile
from bench.load.options import ServingOptions
from bench.load.servers import ROOT, Client, LoadError, Server, ServerName, share_processors, started
from bench.load.workload import ModelName, prepare

GOODPUT = 0.9
"""Share of the capacity that is to be left."""

REFUSED = ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
"""How a request may end that is not answered."""

CALLERS, WARM_UP = 128, 2.0
"""Of the closed loop; seconds before it that do not count."""

Figures = dict[str, Any]


def overloaded(
    server: Server, sources: list[str], *, times: float, seconds: float, deadline: float, for_generator: int
) -> Figures:
    """Measure a server's capacity, and what is left of it at so many times that rate.

    Args:
        server: which.
        sources: what is asked.
        times: the load, in capacities.
        seconds: how long it lasts.
        deadline: seconds after which a request is given up; an answer within them is good.
        for_generator: processors of the load generator.

    Raises:
        LoadError: a process did not do its part.
    """
    processors = share_processors(for_generator)
    with TemporaryDirectory() as temporary, started(server, Path(temporary), processors) as running:
        client = Client(server, running.port, sources, processors)
        patient = {"deadline": 60.0, "keep": 0, "seed": 0}
        try:
            client.run("closed", callers=CALLERS, seconds=WARM_UP, **patient)
            closed = client.run("closed", callers=CALLERS, seconds=max(5.0, seconds / 3), **patient)
            capacity = len(closed["latencies"]) / closed["seconds"]
            found = client.run("open", rate=times * capacity, seconds=seconds, seed=1, deadline=deadline, keep=0)
            after = client.run("closed", callers=CALLERS, seconds=max(5.0, seconds / 3), **patient)
        finally:
            client.close()
        if running.process.poll() is not None:
            raise LoadError(f"the server has ended; its log ends so:\n{running.tail()}")
    figures = judged(capacity, found, deadline, len(after["latencies"]) / after["seconds"])
    return figures | {"times": times, "seconds": seconds, "deadline": deadline}


def judged(capacity: float, found: Figures, deadline: float, afterwards: float) -> Figures:
    """What a run under overload amounts to.

    Args:
        capacity: answers a second that the server can give.
        found: the generator's `Load`.
        deadline: seconds within which an answer is good.
        afterwards: answers a second that it gives when the overload is over.
    """
    latencies, errors = found["latencies"], found["errors"]
    good = sum(latency <= deadline for latency in latencies) / found["seconds"]
    asked = len(latencies) + sum(errors.values())
    figures = {
        "capacity": capacity,
        "capacity_after": afterwards,
        "offered": asked / found["seconds"],
        "goodput": good,
        "share": good / capacity,
        "p99_of_answers": percentile(latencies, 0.99) if latencies else math.inf,
        "errors": errors,
        "generator_busy": found["busy"],
    }
    unlike = sorted(set(errors) - set(REFUSED))
    failures = [f"requests ended with {', '.join(unlike)}"] if unlike else []
    if figures["share"] < GOODPUT:
        failures.append(f"goodput is {100 * figures['share']:.0f} % of the capacity, not {100 * GOODPUT:.0f}")
    if afterwards < GOODPUT * capacity:
        failures.append(f"afterwards it gives {100 * afterwards / capacity:.0f} % of the answers that it gave before")
    if figures["p99_of_answers"] > deadline:
        failures.append(f"the 99th percentile of answers is {figures['p99_of_answers']:.2f} s")
    return figures | {"failures": failures}


def main(
    seconds: Annotated[float, typer.Option(min=1, help="Of overload.")] = 60.0,
    times: Annotated[float, typer.Option(min=1, help="The load, in capacities.")] = 5.0,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds after which a request is given up.")] = 2.0,
    model: Annotated[ModelName, typer.Option(help="Served: the shipped one, or an untrained one for translation.")] = (
        ModelName.RANDOM
    ),
    beam: Annotated[int, typer.Option(min=1, help="Beam size: the larger, the less the generator has to send.")] = 4,
    for_generator: Annotated[int, typer.Option(min=0, help="Processors set aside for the load generator.")] = 0,
    as_json: Annotated[Path, typer.Option("--json", help="Where to.")] = Path("bench/results/overload.json"),
) -> None:
    """Overload a server, and judge what it still does."""
    console = Console(stderr=True)
    workload = prepare(model, ROOT / "build" / "load", reuse=True)
    options = ServingOptions(beam=beam, longest=workload.longest)
    bundle = workload.model_of(ServerName.LIMELIGHT, options.precision)
    server = Server(name=ServerName.LIMELIGHT, python=Path(sys.executable), model=bundle, options=options)
    with console.status(f"{times:g} times what the server can do, for {seconds:g} seconds"):
        figures = overloaded(
            server, workload.sources, times=times, seconds=seconds, deadline=deadline, for_generator=for_generator
        )
    Console().print(table(figures))
    report = {"machine": machine.describe_machine(), "command": ["bench.overload", *sys.argv[1:]], **figures}
    as_json.parent.mkdir(parents=True, exist_ok=True)
    as_json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if figures["failures"]:
        console.print(f"[bold red]failed:[/bold red] {'; '.join(figures['failures'])}")
        raise typer.Exit(1)


def table(figures: Figures) -> Table:
    """For people."""
    made = Table("", "requests/s", title=f"{figures['times']:g} times the capacity for {figures['seconds']:g} s")
    made.columns[1].justify = "right"
    made.add_row("capacity", f"{figures['capacity']:.0f}")
    made.add_row("offered", f"{figures['offered']:.0f}")
    made.add_row(f"answered within {figures['deadline']:g} s", f"{figures['goodput']:.0f}")
    for code, count in figures["errors"].items():
        made.add_row(code, f"{count / figures['seconds']:.0f}")
    made.add_row("capacity afterwards", f"{figures['capacity_after']:.0f}")
    made.add_row("share of the capacity", f"{100 * figures['share']:.0f} %")
    made.add_row("99th percentile of answers", f"{1000 * figures['p99_of_answers']:.0f} ms")
    return made


if __name__ == "__main__":
    typer.run(main)
