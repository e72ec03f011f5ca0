"""`python -m serve.probe`: whether a server serves, for what starts, restarts and replaces containers.

It is run every few seconds beside a server with few processors, so it loads gRPC and little else: a quarter of what the
`limelight` command takes to begin, which has it too, as `limelight probe`.
"""

import os
from typing import Annotated, Any, NoReturn

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from model.errors import LimelightError
from serve.channel import explain_unreachable, open_channel
from serve.credential_options import with_credentials

PORT_VARIABLE, PORT = "LIMELIGHT_SERVE_PORT", "50051"
"""Where a server learns its port, and what it is without that."""

SERVING = health_pb2.HealthCheckResponse.SERVING


@with_credentials("ca", "certificate", "key")
def probe(
    address: Annotated[
        str | None, typer.Argument(help=f"HOST:PORT; by default this machine at {PORT_VARIABLE}, or {PORT}.")
    ] = None,
    service: Annotated[str, typer.Option(metavar="NAME", help="Whose health; by default that of the server.")] = "",
    name: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="Whom the server's certificate is for, where it is not for ADDRESS."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that the server has to answer.")] = 3.0,
    **credentials: Any,
) -> None:
    """Say whether a server serves; exit with 1 if it does not, or does not answer. Health needs no token."""
    address = address or f"127.0.0.1:{os.environ.get(PORT_VARIABLE, PORT)}"
    try:
        channel = _open(address, name, credentials)
    except LimelightError as error:
        _fail(str(error))
    with channel:
        try:
            asked = health_pb2.HealthCheckRequest(service=service)
            status = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=timeout).status
        except grpc.RpcError as error:
            _fail(_why(address, service, error))
    if status != SERVING:
        _fail(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
    typer.echo("SERVING")


def _open(address: str, name: str | None, credentials: dict[str, Any]) -> grpc.Channel:
    return open_channel(address, [] if name is None else [("grpc.ssl_target_name_override", name)], **credentials)


def _why(address: str, service: str, error: Any) -> str:
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return f"{address}: has no service {service!r}"
    return explain_unreachable(address, f"{error.code().name}: {error.details()}")


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(probe)
