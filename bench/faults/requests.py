"""Faults of requests: texts that are none, and inputs that the protocol does not allow (3 to 5, 9 to 12, 15, 16)."""

import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from bench.faults.asking import SERVICE, Asker, Ended, infer_request
from bench.faults.case import GOOD, SOON, Case, Fault
from bench.faults.wanted import LARGEST_MESSAGE
from serve.pb.inference import grpc_service_pb2 as pb
from serve.tensors import pack_bytes

LARGE, STALL = 5, 0.05
"""Times that a large text is sent; seconds longer that another call may take meanwhile, at the median."""

INVALID = ("INVALID_ARGUMENT",)

RAW = pack_bytes([GOOD.encode()])

Tensor = pb.ModelInferRequest.InferInputTensor
Requests = Callable[[str], dict[str, pb.ModelInferRequest]]
"""Of a model's name: requests, by what is wrong with them."""


def source(shape: Iterable[int] = (1, 1), datatype: str = "BYTES", name: str = "SOURCE", **contents: Any) -> Tensor:
    """An input as it stands."""
    typed = pb.InferTensorContents(**contents) if contents else None
    return Tensor(name=name, datatype=datatype, shape=shape, contents=typed)


def asked(model: str, *inputs: Tensor, raw: Iterable[bytes] = (RAW,), outputs: Iterable[str] = ("TEXT",)) -> Any:
    """A request as it stands."""
    wanted = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs]
    return infer_request(model, [GOOD.encode()], inputs=inputs, raw_input_contents=raw, outputs=wanted)


def inputs(model: str) -> dict[str, pb.ModelInferRequest]:
    """Fault 9."""
    return {
        "no input": asked(model, raw=()),
        "unknown input": asked(model, source(name="TEXT")),
        "extra input": asked(model, source(), source(name="MORE"), raw=(RAW, RAW)),
        "input twice": asked(model, source(), source(), raw=(RAW, RAW)),
    }


def types(model: str) -> dict[str, pb.ModelInferRequest]:
    """Fault 10."""
    return {
        "other type": asked(model, source(datatype="FP32"), raw=(bytes(4),)),
        "bogus type": asked(model, source(datatype="TEXT")),
        "no type": asked(model, source(datatype="")),
        "rank 0": asked(model, source(())),
        "rank 3": asked(model, source((1, 1, 1))),
    }


def sizes(model: str) -> dict[str, pb.ModelInferRequest]:
    """Fault 11."""
    return {
        "negative": asked(model, source((-1, 1))),
        "2^62": asked(model, source((2**62, 1))),
        "product of 2^64": asked(model, source((2**32, 2**32))),
        "too few elements": asked(model, source((2, 1))),
        "too many elements": asked(model, source(), raw=(RAW + RAW,)),
        "length past the end": asked(model, source(), raw=(b"\x09\0\0\0ab",)),
        "raw and typed": asked(model, source(bytes_contents=[b"ab"])),
        "neither": asked(model, source(), raw=()),
    }


def outputs(model: str) -> dict[str, pb.ModelInferRequest]:
    """Fault 16."""
    return {
        "unknown output": asked(model, source(), outputs=("TEXT", "NONE")),
        "output twice": asked(model, source(), outputs=("TEXT", "TEXT")),
    }


def refused(requests: Requests, never: str = "", unseen: Collection[str] = ()) -> Callable[[Case], None]:
    """Faults of which each request is to be refused as invalid.

    Args:
        requests: these.
        never: a status that none may end with.
        unseen: of these, the model must see nothing.
    """

    def put(case: Case) -> None:
        ended, saw = dict[str, Ended](), list[str]()
        for what, request in requests(case.asker.model).items():
            before = len(case.passes.seen)
            ended[what] = case.asker.begin(request).end()
            if what in unseen and len(case.passes.seen) > before:
                saw.append(what)
        case.told(*ended.values())
        case.expect_each(ended, INVALID)
        if never:
            case.never(never, any(one.code == never for one in ended.values()))
        if unseen:
            case.never("the model sees it", bool(saw), f"the model sees {', '.join(saw)}")

    return put


def large(case: Case) -> None:
    """Fault 3."""
    request = infer_request(case.asker.model, [b"ab" * (LARGEST_MESSAGE // 2 - 1000)])
    ended, stalls = list[Ended](), list[float]()
    for _ in range(LARGE):
        with pinged(case.asker) as usual:
            time.sleep(SOON)  # what a call takes when nothing is the matter
        with pinged(case.asker) as meanwhile:
            ended.append(case.asker.begin(request).end())
        stalls.append(max(meanwhile, default=0.0) - max(usual, default=0.0))
    case.told(*ended)
    case.expect_codes("4 MB", ended, (*INVALID, "RESOURCE_EXHAUSTED"))
    stall = statistics.median(stalls)
    case.never("other calls wait for it", stall > STALL, f"other calls wait {1000 * stall:.0f} ms")


@contextmanager
def pinged(asker: Asker) -> Iterator[list[float]]:
    """Ask all the time whether the server lives; how long each answer took."""
    over, seconds = threading.Event(), list[float]()

    def ask() -> None:
        while not over.is_set():
            begun = time.monotonic()
            asker.live(patience=5.0)
            seconds.append(time.monotonic() - begun)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield seconds
    finally:
        over.set()
        thread.join()


def no_utf8(case: Case) -> None:
    """Fault 4: in a string of the message, and in the text."""
    wrong = pb.ModelInferRequest(model_name="ABCD").SerializeToString().replace(b"ABCD", b"\xff\xfe\xed\xa0")
    name = case.asker.raw(f"{SERVICE}/ModelInfer", wrong).end()
    texts = [case.asker.begin(infer_request(case.asker.model, [text])).end() for text in (b"a\xff", b"\xed\xa0\x80")]
    case.told(name, *texts)
    case.expect_codes("in a name", [name], (*INVALID, "INTERNAL"))
    case.expect_codes("in a text", texts, INVALID)


ODD = {
    "NUL and control": "a\0b\x01\x7f\r\n",
    "emoji": "\N{FAMILY}\u200d\N{WOMAN}\u200d\N{GIRL}",
    "right to left": "\u202e\u05e9\u05dc\u05d5\u05dd\u202c",
    "100,000 combining marks": "a" + 100_000 * "\u0301",
    "unknown letters": "\u6f22\u5b57",
}


def odd_texts(case: Case) -> None:
    """Fault 5."""
    ended = {what: case.asker.begin(case.asker.request(text)).end() for what, text in ODD.items()}
    case.told(*ended.values())
    case.expect_each(ended, ("OK", *INVALID))


def empty(case: Case) -> None:
    """Fault 12."""
    batch = case.asker.begin(asked(case.asker.model, source((0, 1)), raw=(b"",))).end()
    row = case.asker.begin(asked(case.asker.model, source((1, 0)), raw=(b"",))).end()
    case.told(batch, row)
    case.expect_codes("empty batch", [batch], ("OK", *INVALID))
    case.expect_codes("row without a text", [row], INVALID)


def unknown(case: Case) -> None:
    """Fault 15."""
    known = case.asker.model

    def infer(model: str, version: str) -> Ended:
        return case.asker.begin(case.asker.request(GOOD, model_name=model, model_version=version)).end()

    missing = [infer("none", ""), infer(known, "777")]
    wrong = infer(known, "newest")
    ready = case.asker.begin(pb.ModelReadyRequest(name="none"), call="ModelReady").end()
    case.told(*missing, wrong)
    case.expect_codes("unknown", missing, ("NOT_FOUND",))
    case.expect_codes("version no number", [wrong], INVALID)
    case.expect_codes("ModelReady of an unknown model", [ready], ("OK",))
    case.never("UNAVAILABLE", any(one.code == "UNAVAILABLE" for one in missing), "UNAVAILABLE")


FAULTS = (
    Fault(number=3, name="4 MB of text", expected="refused, nobody waits", put=large),
    Fault(number=4, name="invalid UTF-8", expected="INVALID_ARGUMENT", put=no_utf8),
    Fault(number=5, name="odd texts", expected="answered or INVALID_ARGUMENT", put=odd_texts),
    Fault(
        number=9,
        name="no, unknown, extra or duplicate input",
        expected="INVALID_ARGUMENT",
        put=refused(inputs, never="INTERNAL"),
    ),
    Fault(number=10, name="wrong type or rank", expected="INVALID_ARGUMENT", put=refused(types, unseen=types(""))),
    Fault(
        number=11,
        name="sizes that are negative, overflow, or do not match",
        expected="INVALID_ARGUMENT",
        put=refused(sizes, unseen=("negative", "2^62", "product of 2^64")),
    ),
    Fault(number=12, name="tensors of size zero", expected="empty answer or INVALID_ARGUMENT", put=empty),
    Fault(number=15, name="unknown model or version", expected="NOT_FOUND; INVALID_ARGUMENT; not ready", put=unknown),
    Fault(number=16, name="unknown or duplicate output", expected="INVALID_ARGUMENT", put=refused(outputs)),
)
