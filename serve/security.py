"""How a server is protected, as a whole: which files it takes, and which of them make no sense without another."""

import logging
from dataclasses import dataclass
from pathlib import Path

from model.errors import ConfigError
from serve.addresses import is_loopback

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Security:
    """How a server is protected; by default not at all, which is for this machine alone."""

    tls_certificate: Path | None = None
    """PEM file of the server's certificate, then those between it and its CA; with it the port speaks TLS only."""
    tls_key: Path | None = None
    """PEM file of the certificate's private key."""
    tls_client_ca: Path | None = None
    """PEM file of CA certificates; with it, clients must show a certificate that one of them signed."""
    token_file: Path | None = None
    """File of tokens, as `serve.access` says; with it, calls must bring one of them."""
    plaintext_tokens: bool = False
    """Tokens may come without TLS over a network: something in front ends it."""
    metrics_tls: bool = False
    """Scrapes are answered over TLS, with the same files."""
    admin_tls: bool = False
    """So are administrative calls."""

    @property
    def client_options(self) -> str:
        """What `limelight ask` needs for it, in words."""
        needed = {
            "--ca FILE": self.tls_certificate,
            "--certificate FILE --key FILE": self.tls_client_ca,
            "--token TOKEN": self.token_file,
        }
        return "".join(f" {option}" for option, setting in needed.items() if setting is not None)

    def check(self, host: str, admin_host: str = "127.0.0.1") -> None:
        """Refuse what would protect less than it seems.

        Args:
            host: that the server listens on.
            admin_host: that it listens on for administrative calls.

        Raises:
            ConfigError: a setting needs another one, or tokens would cross a network in plain text.
        """
        self._check_pair()
        self._check_administration(admin_host)
        if self.tls_certificate is not None or is_loopback(host):
            return
        if self.token_file is None:
            log.warning("%s is not of this machine alone: whoever reaches it may ask, and nothing is encrypted", host)
        elif not self.plaintext_tokens:
            raise ConfigError(
                f"token_file: tokens would be sent to {host} in plain text: set tls_certificate and tls_key, "
                "or plaintext_tokens=true if something in front of this server ends TLS"
            )

    def _check_pair(self) -> None:
        if self.tls_certificate is None and self.tls_key is not None:
            raise ConfigError("tls_key: is of no use without tls_certificate: set both")
        if self.tls_certificate is not None and self.tls_key is None:
            raise ConfigError("tls_certificate: is of no use without tls_key: set both")
        if self.tls_certificate is None and self.tls_client_ca is not None:
            raise ConfigError("tls_client_ca: is of no use without tls_certificate and tls_key: set all three")
        for setting in ("metrics_tls", "admin_tls"):
            if self.tls_certificate is None and getattr(self, setting):
                raise ConfigError(f"{setting}: is of no use without tls_certificate and tls_key: set all three")

    def _check_administration(self, host: str) -> None:
        if is_loopback(host):
            return
        if self.token_file is None:
            raise ConfigError(
                f"admin_host: {host} is not of this machine alone, where whoever reaches it could load and unload: set "
                "token_file, so that calls must bring a token of the role admin"
            )
        if not (self.admin_tls or self.plaintext_tokens):
            raise ConfigError(
                f"admin_host: tokens would be sent to {host} in plain text: set admin_tls=true, "
                "or plaintext_tokens=true if something in front of this server ends TLS"
            )
