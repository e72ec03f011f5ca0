"""The server that is fuzzed, in a process of its own; and the faults that can be put into it, which must be found."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.load.servers import Server

START = """
import os
os.setsid()  # Ctrl-C is for who fuzzes
from serve.cli import main
{faults}
main()
"""
"""`limelight`, with faults."""

FAULTS: Mapping[str, str] = {
    "tells": """
from dataclasses import replace
from serve import status
def refusal(error, request, request_id, before=status.refusal):
    return replace(before(error, request, request_id), message=f"{error!r} in {status.__file__}")
status.refusal = refusal
""",
    "refuses": """
from model.errors import InvalidRequestError
from serve import service
def understand_pair(model, request, before=service.understand_pair):
    if request.HasField("length_penalty"):
        raise InvalidRequestError("length_penalty", "is not known")
    return before(model, request)
service.understand_pair = understand_pair
""",
    "accepts": """
from serve import admin, many, messages, service
for module in (admin, many, messages, service):
    module.refuse_unknown_fields = lambda *rest: None
""",
    "hangs": """
import asyncio
from serve import service
async def list_models(self, request, context):
    await asyncio.Event().wait()
service.LimelightService.ListModels = list_models
""",
    "forgets": """
import itertools
from serve import calls
def leave(self, numbers=itertools.count(), before=calls.Calls._leave):
    if next(numbers) % 100 != 99:
        before(self)
calls.Calls._leave = leave
""",
    "differs": """
import itertools
from serve import service
def generate_response(*rest, numbers=itertools.count(), before=service.generate_response):
    response = before(*rest)
    if next(numbers) > 50:
        response.hypotheses[0].tokens[0].text = "other"
    return response
service.generate_response = generate_response
""",
    "floods": """
import logging
from serve import status
def refuse(error, request, before=status.refuse):
    logging.getLogger("serve").warning("refused", exc_info=error)
    return before(error, request)
from serve import calls, wire
calls.refuse = wire.refuse = refuse
""",
    "gives up": """
import itertools
from serve import messages, service
def describe(model, numbers=itertools.count(), before=messages.describe_model):
    if next(numbers) == 3:
        raise SystemExit(1)
    return before(model)
service.describe_model = describe
""",
    "hoards": """
from serve import service
kept, answer = [], service.LimelightService._result
async def result(*rest):
    kept.append(b"x" * 1_000_000)
    return await answer(*rest)
service.LimelightService._result = result
""",
    "is ill": """
import itertools
from grpc_health.v1 import health_pb2
from serve.health import Health
async def check(self, request, context, numbers=itertools.count(), before=Health.Check):
    if next(numbers) > 20:
        return health_pb2.HealthCheckResponse(status="NOT_SERVING")
    return await before(self, request, context)
Health.Check = check
""",
}
"""By name: what is put into the server. None of it is found by what the server says of itself."""


@dataclass(frozen=True, kw_only=True)
class Target(Server):
    """A server of a model folder.

    Attributes:
        metrics_port: where it is scraped.
        admin_port: of administrative calls.
        faults: names of those that it has.
    """

    metrics_port: int
    admin_port: int
    faults: tuple[str, ...] = ()

    def command(self, folder: Path) -> list[str]:
        """See `Server`."""
        python, *arguments = super().command(folder)
        program = START.format(faults="\n".join(FAULTS[name] for name in self.faults))
        ports = (f"--metrics-port={self.metrics_port}", f"--admin-port={self.admin_port}")
        return [python, "-c", program, *arguments[2:], *ports, "--log-format=json"]

    def ports(self, port: int) -> Mapping[str, int]:
        """All of them, by name."""
        return {"port": port, "admin_port": self.admin_port, "metrics_port": self.metrics_port}
