"""Faults of TLS: who does not speak it, whose certificate is none, and a certificate that is replaced (41)."""

import dataclasses
import socket
import ssl
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import trustme

from bench.faults.asking import Asker, Ended
from bench.faults.case import GOOD, Case, Fault
from bench.faults.passes import PATIENCE
from bench.faults.running import Running, started
from bench.faults.wanted import Files
from bench.load.authority import YESTERDAY, Pair, pair
from serve.channel import Credentials, open_channel

REFUSED = ("UNAVAILABLE",)
"""What gRPC's clients make of a connection that does not come about."""


def certificates(case: Case) -> None:
    """Fault 41: mutual TLS, on a server of its own."""
    with TemporaryDirectory() as temporary:
        folder, ours, other = Path(temporary), trustme.CA(), trustme.CA()
        server = pair(folder / "server", ours)
        clients: dict[str, Pair | None] = {
            "no certificate": None,
            "another authority's certificate": pair(folder / "other", other),
            "an expired certificate": pair(folder / "expired", ours, not_after=YESTERDAY),
        }
        tls = Files(server.certificate, server.key, server.ca)
        with started(case.running.kind, dataclasses.replace(case.running.wanted, tls=tls)) as running:
            plain = grpc.insecure_channel(f"127.0.0.1:{running.ports.service}")
            ended = {"plain text": _asked(running, plain)} | {
                what: _asked(running, _channel(running, server.ca, client)) for what, client in clients.items()
            }
            case.told(*ended.values())
            case.expect_each(ended, REFUSED)
            case.never("somebody is let in", any(one.code == "OK" for one in ended.values()))
            _rotate(case, running, folder, ours)


def _channel(running: Running, ca: Path, own: Pair | None) -> grpc.Channel:
    files: Credentials = {"ca": ca}
    if own is not None:
        files |= {"certificate": own.certificate, "key": own.key}
    return open_channel(f"127.0.0.1:{running.ports.service}", (("grpc.use_local_subchannel_pool", 1),), **files)


def _asked(running: Running, channel: grpc.Channel) -> Ended:
    with channel:
        asker = Asker(channel, running.kind.model)
        return asker.begin(asker.request(GOOD), timeout=PATIENCE).end()


def _rotate(case: Case, running: Running, folder: Path, authority: trustme.CA) -> None:
    before = _shown(running)
    pair(folder / "server", authority)
    after = _shown(running)
    with running.asker() as asker:
        answered = asker.begin(asker.request(GOOD)).end()
    case.expect("a new certificate is used", after != before, "a new certificate is not used until a restart")
    case.never("with a new certificate in place, nobody is answered", not case.right(answered))


def _shown(running: Running) -> bytes | None:
    """The certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", running.ports.service), PATIENCE) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        return wrapped.getpeercert(binary_form=True)


FAULTS = (
    Fault(
        number=41,
        name="no, wrong or expired certificates; a new one",
        expected="refused; used without a restart",
        put=certificates,
        lacking={"mlserver": "its gRPC has no TLS"},
    ),
)
