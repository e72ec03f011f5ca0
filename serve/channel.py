"""A client's way to a server: in plain text or over TLS, with a certificate or a token to say whose calls they are."""

import json
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import grpc

from model.errors import ConfigError
from serve.addresses import host_of, is_loopback
from serve.watched import read_file

HEADER = "authorization"
"""Metadata key that a token comes under."""

REPLICAS = (
    (
        "grpc.service_config",
        json.dumps(
            {
                "loadBalancingConfig": [{"round_robin": {}}],
                "healthCheckConfig": {"serviceName": "limelight.v1.LimelightService"},
                "methodConfig": [
                    {
                        "name": [{}],
                        "retryPolicy": {
                            "maxAttempts": 4,
                            "initialBackoff": "0.05s",
                            "maxBackoff": "1s",
                            "backoffMultiplier": 3,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    }
                ],
            }
        ),
    ),
)
"""Channel options where an address is that of several servers: calls are spread over those whose health is SERVING,
which gRPC watches, and what one refuses because it stops goes to another."""


class Credentials(TypedDict, total=False):
    """What a client needs where a server is protected; nothing of it for one that is not."""

    ca: str | Path | None
    """PEM file of CA certificates, one of which signed the server's; with it the connection is TLS."""
    certificate: str | Path | None
    """PEM file of the client's own certificate, for mutual TLS."""
    key: str | Path | None
    """PEM file of that certificate's private key."""
    token: str | None
    """Sent with each call."""
    plaintext_token: bool
    """Send the token without TLS over a network too: something between encrypts it."""


def open_channel(address: str, options: Sequence[tuple[str, Any]], **credentials: Unpack[Credentials]) -> grpc.Channel:
    """A channel to a server.

    Raises:
        ConfigError: a file cannot be read, or one of the files needs another.
    """
    ca, certificate, key = credentials.get("ca"), credentials.get("certificate"), credentials.get("key")
    if ca is None:
        if certificate is not None or key is not None:
            raise ConfigError("certificate and key: are of no use without ca, the CA of the server")
        return grpc.insecure_channel(address, options=options)
    if (certificate is None) != (key is None):
        raise ConfigError("certificate and key: one is of no use without the other: give both")
    _check(ca, certificate, key)
    read = [None if file is None else read_file("credentials", Path(file)) for file in (ca, key, certificate)]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*read), options=options)


def token_metadata(address: str, **credentials: Unpack[Credentials]) -> tuple[tuple[str, str], ...]:
    """What each call brings.

    Raises:
        ConfigError: the token would cross a network in plain text, or is none.
    """
    token = credentials.get("token")
    if token is None:
        return ()
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise ConfigError("token: is empty, or has spaces or letters that no token has")
    private = credentials.get("ca") is not None or is_loopback(host_of(address))
    if not (private or credentials.get("plaintext_token")):
        raise ConfigError(
            f"token: would be sent to {address} in plain text: give ca, the CA of the server, "
            "or plaintext_token if something between encrypts it"
        )
    return ((HEADER, f"Bearer {token}"),)


def explain_unreachable(address: str, details: str) -> str:
    """Why no server could be spoken to, and the way out, from what gRPC says of it."""
    why = next((words for sign, words in _FAILED.items() if sign in details), _NOBODY)
    return f"{address}: {why} ({details})"


_NOBODY = "no Limelight server answers there: start one with `limelight serve BUNDLE`, or name the address of another"

_FAILED = {
    "WRONG_VERSION_NUMBER": "the server does not speak TLS: leave ca out",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is signed by no authority in ca, or is not valid now",
    "Hostname Verification": "the server's certificate is for another name: use the name or address that it is for",
    "Socket closed": "the server hung up: if it speaks TLS, give ca; if it wants a certificate, a valid one of yours; "
    "if neither, it had too many connections: try again",
}
"""What words of gRPC's mean."""


def _check(ca: str | Path, certificate: str | Path | None, key: str | Path | None) -> None:
    """GRPC itself would fail when connecting, and not say why."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=read_file("ca", Path(ca)).decode("ascii", "replace"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"ca: {ca}: holds no certificate in PEM, or a damaged one") from None
    if certificate is None or key is None:
        return
    read_file("certificate", Path(certificate))
    read_file("key", Path(key))
    try:
        context.load_cert_chain(certificate, key, password="")  # an encrypted key is refused, not asked about
    except ssl.SSLError:
        raise ConfigError(
            f"certificate and key: {certificate} and {key} are no certificate in PEM and its unencrypted key"
        ) from None
