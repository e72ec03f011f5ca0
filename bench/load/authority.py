"""Certificates for tests and benchmarks, of authorities that they make themselves."""

import datetime as dt
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

YESTERDAY = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
TOMORROW = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate for 127.0.0.1 and its key, in files.

    Attributes:
        ca: file of the authority that signed it.
        pem: the certificate.
    """

    certificate: Path
    key: Path
    ca: Path
    pem: bytes


def pair(folder: Path, authority: trustme.CA, **about: Any) -> Pair:
    """Write a new pair there, in place of any that was, each file at once; `about` is for `CA.issue_cert`."""
    folder.mkdir(exist_ok=True)
    issued = authority.issue_cert("127.0.0.1", **about)
    pem = b"".join(one.bytes() for one in issued.cert_chain_pems)
    return Pair(
        replace(folder / "certificate.pem", pem),
        replace(folder / "key.pem", issued.private_key_pem.bytes()),
        replace(folder / "ca.pem", authority.cert_pem.bytes()),
        pem,
    )


def replace(file: Path, data: bytes) -> Path:
    """Write a file that only its owner may read, whole or not at all."""
    fresh = file.with_suffix(".new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as opened:
        opened.write(data)
    return fresh.replace(file)
