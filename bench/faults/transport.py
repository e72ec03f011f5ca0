"""Faults of what carries the calls (18 to 20), and of clients that go or do not read (28, 29)."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import grpc

from bench.faults.asking import SERVICE, Ended, infer_request, status_of
from bench.faults.case import Case, Fault
from bench.faults.wanted import Wanted
from bench.load import frames
from bench.load.frames import Frame
from bench.load.servers import ROOT

METHOD = f"{SERVICE}/ModelInfer"

LARGE = 64 * 1024 * 1024
"""Bytes of a message that no caller of a small model needs."""

HANG_UP = 10.0
"""Seconds within which a server answers, or hangs up on, what is no client of its."""

WINDOW_UPDATE = 8
"""Of HTTP/2's frames: there is room."""

WRITE_TIMEOUT, UNREAD = 1.0, 5.0
"""Seconds that a reader may not read, where a server can be told; and that this one does not."""

KEEPALIVE = 1.0
"""Seconds, where a server can be told."""


def over_the_limit(case: Case) -> None:
    """Fault 18."""
    _grows(case, grpc.Compression.NoCompression)


def bomb(case: Case) -> None:
    """Fault 20: a few thousand bytes that become 64 MB."""
    _grows(case, grpc.Compression.Gzip)


def _grows(case: Case, compression: grpc.Compression) -> None:
    request = infer_request(case.asker.model, [b"a" * LARGE]).SerializeToString()
    peak = case.running.megabytes.peak
    found = case.asker.raw(METHOD, request, compression=compression).end()
    case.told(found)
    grown = case.running.megabytes.peak - peak
    case.expect_codes("64 MB", [found], ("RESOURCE_EXHAUSTED",))
    case.never("it is buffered", grown > LARGE / 2**20, f"memory peaks {grown:.0f} MB higher")


NOT_GRPC = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),
    "zeros after the preface": frames.PREFACE + bytes(4096),
    "a frame of 16 MB": frames.PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
}


def garbage(case: Case) -> None:
    """Fault 19."""
    message = case.asker.raw(METHOD, bytes(range(255, 0, -1))).end()
    method = case.asker.raw(f"{SERVICE}/Explain", b"").end()
    case.told(message, method)
    case.expect_codes("garbage", [message], ("INVALID_ARGUMENT", "INTERNAL"))
    case.expect_codes("unknown method", [method], ("UNIMPLEMENTED",))
    for what, data in NOT_GRPC.items():
        with frames.connection(case.running.ports.service) as opened:
            opened.sendall(data)
            case.expect(f"{what}: answered or hung up on", _heard(opened), f"{what}: left waiting")


def _heard(opened: socket.socket) -> bool:
    opened.settimeout(HANG_UP)
    try:
        opened.recv(1)
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True
    return True


CLIENT = """
import sys
import grpc

call = grpc.insecure_channel(sys.argv[1]).unary_unary(sys.argv[2])
call(bytes.fromhex(sys.argv[3]), timeout=60)
"""


def gone(case: Case) -> None:
    """Fault 28: a client that is killed, one that resets its connection, one that goes without a word."""
    _killed(case)
    _reset(case)
    _half_open(case)


def _message(case: Case, text: str) -> bytes:
    return infer_request(case.asker.model, [text.encode()]).SerializeToString()


def _killed(case: Case) -> None:
    case.passes.hold()
    address = f"127.0.0.1:{case.running.ports.service}"
    command = [sys.executable, "-c", CLIENT, address, METHOD, _message(case, "abcdeg").hex()]
    with subprocess.Popen(command, cwd=ROOT) as client:
        case.passes.wait_held()
        client.kill()
    case.wasted("killed")


def _reset(case: Case) -> None:
    case.passes.hold()
    with frames.connection(case.running.ports.service) as opened:
        frames.begin(opened)
        frames.call(opened, METHOD, _message(case, "abcdeh"))
        case.passes.wait_held()
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closing is RST, not FIN
    case.wasted("reset")


def _half_open(case: Case) -> None:
    case.passes.hold()
    with frames.connection(case.running.ports.service) as opened:
        found = frames.begin(opened)
        frames.call(opened, METHOD, _message(case, "abcdfg"))
        case.passes.wait_held()
        hung_up = heard(opened, found, lambda _: False)  # no ping among them is answered
        case.expect("half open: noticed by keepalive", hung_up, f"half open: not noticed in {HANG_UP:.0f} s")
        if hung_up:
            case.wasted("half open")
        case.passes.open()


def heard(opened: socket.socket, found: Iterator[Frame], wanted: Callable[[Frame], bool]) -> bool:
    """Whether such a frame comes in time, or the server hangs up."""
    end = time.monotonic() + HANG_UP
    opened.settimeout(HANG_UP)
    try:
        for one in found:
            if wanted(one):
                return True
            if time.monotonic() > end:
                return False
    except TimeoutError:
        return False
    return True


def ending(opened: socket.socket, found: Iterator[Frame]) -> Ended:
    """How the call on stream 1 ends, if it does in time."""
    payloads = list[bytes]()

    def ends(frame: Frame) -> bool:
        payloads.append(frame.payload if frame.stream == 1 else b"")
        return frame.stream == 1 and (frame.kind == frames.RST_STREAM or b"grpc-status" in frame.payload)

    heard(opened, found, ends)
    return Ended(status_of(b"".join(payloads)))


def unread(case: Case) -> None:
    """Fault 29: a stream whose reader has no room for a single byte, and looks much later what became of it.

    The status comes behind the answer, so it can be heard only then.
    """
    with frames.connection(case.running.ports.service) as opened:
        opened.sendall(frames.PREFACE)
        frames.send(opened, Frame(frames.SETTINGS, payload=b"\0\4" + bytes(4)))  # INITIAL_WINDOW_SIZE 0
        found = frames.received(opened)
        frames.call(opened, f"{SERVICE}/ModelStreamInfer", _message(case, "abcdeg"))
        case.never("others wait for it", not case.answers())
        time.sleep(UNREAD)
        frames.send(opened, Frame(WINDOW_UPDATE, payload=(2**20).to_bytes(4), stream=1))
        ended = ending(opened, found)
    case.told(ended)
    given_up = ended.code in {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    case.expect("the stream is given up", given_up, f"not given up in {UNREAD:.0f} s")


FAULTS = (
    Fault(number=18, name="request over the limit", expected="RESOURCE_EXHAUSTED, not buffered", put=over_the_limit),
    Fault(
        number=19,
        name="garbage, unknown methods, other protocols",
        expected="INTERNAL or INVALID_ARGUMENT; UNIMPLEMENTED; hung up on",
        put=garbage,
    ),
    Fault(number=20, name="compression bomb", expected="RESOURCE_EXHAUSTED, memory stays", put=bomb),
    Fault(
        number=28,
        name="client killed, reset, or gone without a word",
        expected="its work ends",
        put=gone,
        wanted=Wanted(keepalive=KEEPALIVE),
    ),
    Fault(
        number=29,
        name="client that never reads",
        expected="its stream alone waits, and is given up",
        put=unread,
        wanted=Wanted(write_timeout=WRITE_TIMEOUT),
    ),
)
