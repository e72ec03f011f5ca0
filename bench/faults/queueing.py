"""Faults of waiting: a queue that is full, deadlines that pass in it, and callers who give up (21, 22, 24 to 27)."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.faults.asking import Call, Ended
from bench.faults.case import GOOD, SOON, Case, Fault
from bench.faults.transport import METHOD, ending
from bench.faults.wanted import Wanted
from bench.load import frames
from serve.pb.inference import grpc_service_pb2 as pb

QUEUE, MORE = 8, 5
"""Requests that may wait, and how many come that are too many."""

PROMPT = 0.01
"""Seconds longer than a call that asks for nothing, within which these are refused, at the median."""

SHORT = 1.0
"""Seconds of a deadline that passes in the queue."""

LATE = 5
"""Calls that are too late when they come."""

HUGE, TEXTS = 6, 64
"""Huge requests, and texts of each."""

LOST = 15.0
"""Seconds after which an answer that is held no more is taken for lost."""

MATES = ("abcdeg", "abcdeh", "abcdfg")


def blocked(case: Case) -> Call:
    """A call whose first step is held: whatever comes now waits."""
    case.passes.hold()
    call = case.asker.begin(case.asker.request(GOOD))
    case.passes.wait_held()
    return call


def full(case: Case) -> None:
    """Fault 21."""
    first = blocked(case)
    waiting = [case.asker.begin(case.asker.request(GOOD)) for _ in range(QUEUE)]
    time.sleep(SOON)  # all of them are in the queue
    more = list[Call]()
    for _ in range(MORE):
        more.append(case.asker.begin(case.asker.request(GOOD)))
        more[-1].end(SOON)
    nothing = statistics.median(_seconds(case.asker.live) for _ in range(MORE))
    live, ready = case.asker.live(), case.asker.ready()
    case.passes.open()
    ended = case.finish([first, *waiting, *more])
    refused = [one for one in ended if not case.right(one)]
    seconds = statistics.median(one.seconds for one in refused) - nothing if refused else 0.0
    what = f"{len(refused)} refused, {MORE} too many"
    case.expect(f"{MORE} of {len(ended)} refused", len(refused) == MORE, what)
    case.expect_codes("refused", refused, ("RESOURCE_EXHAUSTED",))
    if refused:
        told = all("grpc-retry-pushback-ms" in one.trailing for one in refused)
        case.expect("they are told when to try again", told, "not told when to try again")
    case.expect("they are refused at once", seconds <= PROMPT, f"refused after {1000 * seconds:.0f} ms")
    case.never("health fails meanwhile", not (live and ready))
    case.never("one that was taken is not answered", any(not case.right(one) for one in ended[: 1 + QUEUE]))


def _seconds(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def huge(case: Case) -> None:
    """Fault 22: few requests, within the limit of their number, that come to much together."""
    first = blocked(case)
    texts = [GOOD * 10] * TEXTS
    calls = [case.asker.begin(case.asker.request(*texts)) for _ in range(HUGE)]
    time.sleep(SOON)
    refused = [call for call in calls if call.over]
    case.passes.open()
    case.finish([first, *calls])
    found = [call.end() for call in refused]
    case.expect("some are refused", bool(found), f"all {HUGE} are taken: the queue is bounded by number alone")
    case.expect_codes("refused", found, ("RESOURCE_EXHAUSTED",))


def expired(case: Case) -> None:
    """Fault 24: a nanosecond is over when the request is read."""
    ended = [_late(case) for _ in range(LATE)]
    case.told(*ended)
    time.sleep(SOON)
    case.expect_codes("late", ended, ("DEADLINE_EXCEEDED",))
    computed = sum("abcdeg" in one.texts for one in case.passes.seen)
    case.never("they are computed", computed > 0, f"computed all the same, {computed} steps for {LATE} calls")


def _late(case: Case) -> Ended:
    """How a call ends that comes too late."""
    request = case.asker.request("abcdeg", parameters=_timeout(1e-6)).SerializeToString()
    with frames.connection(case.running.ports.service) as opened:
        found = frames.begin(opened)
        frames.call(opened, METHOD, request, metadata={"grpc-timeout": "1n"})
        return ending(opened, found)


def _timeout(seconds: float) -> dict[str, pb.InferParameter]:
    """What Triton's queue goes by, and ours knows as well: it has no deadline of a call."""
    return {"timeout": pb.InferParameter(int64_param=round(1e6 * seconds))}


def in_queue(case: Case) -> None:
    """Fault 25."""
    first = blocked(case)
    calls = [case.asker.begin(case.asker.request(text, parameters=_timeout(SHORT)), timeout=SHORT) for text in MATES]
    late = case.finish(calls)
    time.sleep(SOON)
    case.passes.open()
    case.told(first.end())
    case.never("others are not answered", not case.right(first.end()))
    case.expect_codes("late", late, ("DEADLINE_EXCEEDED",))
    case.answers()
    steps = case.seen_by_model(MATES)
    case.never("they come into a batch", steps > 0, f"computed all the same, {steps} steps for {len(MATES)} calls")


def midway(case: Case) -> None:
    """Fault 26: a deadline and a cancel, each after the first step has begun."""
    case.passes.hold()
    late = case.asker.begin(case.asker.request("abcdeg"), timeout=SHORT)
    case.passes.wait_held()
    case.expect_codes("deadline", case.finish([late]), ("DEADLINE_EXCEEDED",))
    case.wasted("deadline")
    case.passes.hold()
    given_up = case.asker.begin(case.asker.request("abcdeg"))
    case.passes.wait_held()
    given_up.cancel()
    case.finish([given_up])
    case.wasted("cancel")


@dataclass(frozen=True)
class Phase:
    """When somebody is cancelled, and by steps of which batch that is found."""

    name: str
    rows: int
    steps: int


PHASES = (Phase("in the queue", 0, 0), Phase("at the first step", 4, 0), Phase("midway", 4, 2))


def one_of_a_batch(case: Case) -> None:
    """Fault 27: in every phase, a call and a stream."""
    alone = [case.asker.begin(case.asker.request(text)).end().texts for text in MATES]
    begin: dict[str, Callable[[], Any]] = {
        "call": lambda: case.asker.begin(case.asker.request("abcdfh")),
        "stream": lambda: case.asker.stream(case.asker.request("abcdfh").SerializeToString()),
    }
    wrong = {
        f"{what} {phase.name}": _others_wrong(case, phase, begun, alone)
        for what, begun in begin.items()
        for phase in PHASES
    }
    seen = ", ".join(f"{count} with a {what}" for what, count in wrong.items() if count)
    case.never("others suffer", any(wrong.values()), f"of {1 + len(MATES)} others suffer {seen}")


def _others_wrong(case: Case, phase: Phase, begin: Callable[[], Any], alone: list[tuple[str, ...]]) -> int:
    """Cancel one; how many others have no answer, or another than alone."""
    first = blocked(case)
    victim = begin()
    mates = [case.asker.begin(case.asker.request(text)) for text in MATES]
    if phase.rows:
        time.sleep(SOON)  # all of them are in the queue
        case.passes.wait_held(lambda one: one.rows >= phase.rows)
        for _ in range(phase.steps):
            case.passes.let()
            case.passes.wait_held()
    victim.cancel()
    time.sleep(SOON)
    case.passes.open()
    ended = case.finish([first, *mates], LOST)
    return sum(one.texts != right for one, right in zip(ended, [case.good, *alone], strict=True))


FAULTS = (
    Fault(
        number=21,
        name="full queue",
        expected="what is too much is RESOURCE_EXHAUSTED at once, with when to try again",
        put=full,
        wanted=Wanted(queue=QUEUE),
    ),
    Fault(
        number=22,
        name="few but huge requests",
        expected="RESOURCE_EXHAUSTED",
        put=huge,
        wanted=Wanted(queue=1024, queue_tokens=10_000),
    ),
    Fault(
        number=24,
        name="a deadline that has passed",
        expected="DEADLINE_EXCEEDED, nothing computed",
        put=expired,
    ),
    Fault(number=25, name="a deadline that passes in the queue", expected="not in any batch", put=in_queue),
    Fault(number=26, name="a deadline or cancel midway", expected="free at the next step", put=midway),
    Fault(
        number=27,
        name="one of a batch is cancelled, in every phase",
        expected="the others are answered as without it",
        put=one_of_a_batch,
    ),
)
