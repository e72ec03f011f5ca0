"""TLS and mutual TLS: certificates are checked before they are used, and read again when their files change.

gRPC asks for the certificate before every handshake, so a new one serves the next connection; those there are live on.
"""

import datetime as dt
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from model.errors import ConfigError
from serve.security import Security
from serve.watched import Watched, is_open_to_all, read_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Version:
    """What the files held at a time."""

    configuration: grpc.ServerCertificateConfiguration
    expires: dt.datetime
    context: ssl.SSLContext | None


class Tls:
    """The server's side of TLS.

    Args:
        certificate: PEM file of the server's certificate, then those between it and its CA.
        key: PEM file of its private key.
        client_ca: PEM file of CA certificates, one of which must have signed each client's; None asks for none.
        contexts: there is something besides gRPC that asks for `context`.

    Raises:
        ConfigError: a file cannot be read or is no such thing, the two do not match, or a certificate is not valid now.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None, *, contexts: bool = False) -> None:
        files = [certificate, key] if client_ca is None else [certificate, key, client_ca]
        self._files = Watched(files, lambda: _read(certificate, key, client_ca, contexts=contexts))
        self._mutual = client_ca is not None

    def credentials(self) -> grpc.ServerCredentials:
        """For one port of gRPC's: each port is told of changes by itself."""
        used = self._files.current()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """Called by gRPC before each handshake, from threads of its own; None where nothing is new."""
            nonlocal used
            current = self._files.current()
            if current is used:
                return None
            used = current
            return current.configuration

        fetch: Any = changed  # grpc's types leave out that None is an answer, which its documentation names
        return grpc.dynamic_ssl_server_credentials(
            used.configuration, fetch, require_client_authentication=self._mutual
        )

    @property
    def seconds_left(self) -> float:
        """Until a certificate expires; negative afterwards."""
        return (self._files.current().expires - _now()).total_seconds()

    def context(self) -> ssl.SSLContext:
        """For the next connection, of what is not gRPC."""
        context = self._files.current().context
        if context is None:
            raise ValueError("this was made without contexts")
        return context


def server_tls(security: Security) -> Tls | None:
    """TLS as a server is set to speak it; None where it is not.

    Raises:
        ConfigError: as `Tls`.
    """
    if security.tls_certificate is None or security.tls_key is None:
        return None
    return Tls(security.tls_certificate, security.tls_key, security.tls_client_ca, contexts=security.metrics_tls)


def _read(certificate: Path, key: Path, client_ca: Path | None, *, contexts: bool) -> _Version:
    chain, private = read_file("tls_certificate", certificate), read_file("tls_key", key)
    certificates = _certificates("tls_certificate", certificate, chain)
    _check_key(certificate, certificates[0], key, private)
    _check_dates(certificate, certificates)
    roots = None if client_ca is None else read_file("tls_client_ca", client_ca)
    if client_ca is not None and roots is not None:
        _certificates("tls_client_ca", client_ca, roots)
    configuration = grpc.ssl_server_certificate_configuration([(private, chain)], root_certificates=roots)
    context = _context(certificate, key, roots) if contexts else None
    return _Version(configuration, min(one.not_valid_after_utc for one in certificates), context)


def _context(certificate: Path, key: Path, roots: bytes | None) -> ssl.SSLContext:
    """Python takes a certificate from files alone: if they change just now, they are looked at again afterwards."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
        if roots is not None:
            context.load_verify_locations(cadata=roots.decode("ascii"))
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tls_certificate: {certificate}: cannot be used for metrics: {error}") from None
    return context


def _certificates(setting: str, file: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError(f"{setting}: {file}: holds no certificate in PEM, or a damaged one") from None


def _check_key(certificate: Path, first: x509.Certificate, file: Path, pem: bytes) -> None:
    try:
        key = load_pem_private_key(pem, None)
    except TypeError:
        raise ConfigError(
            f"tls_key: {file}: is encrypted: store it without a password, readable by you alone"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"tls_key: {file}: holds no private key in PEM, or a damaged one") from None
    if not isinstance(key, RSAPrivateKey | EllipticCurvePrivateKey):
        raise ConfigError(f"tls_key: {file}: is neither an RSA nor an EC key, which are what gRPC takes")
    if key.public_key() != first.public_key():
        raise ConfigError(f"tls_key: {file}: is not the key of the first certificate in {certificate}")
    if is_open_to_all(file):
        log.warning("tls_key: %s: is open to everybody on this machine: chmod o-rwx it", file)


def _check_dates(file: Path, certificates: Sequence[x509.Certificate]) -> None:
    now = _now()
    for one in certificates:
        if one.not_valid_after_utc < now:
            raise ConfigError(f"tls_certificate: {file}: has expired at {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
        if one.not_valid_before_utc > now:
            raise ConfigError(
                f"tls_certificate: {file}: is not valid before {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            )


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
