"""Faults of the model: it fails for one of a batch, it hangs, its worker dies (32, 34, 35)."""

import time

from bench.faults.case import SOON, Case, Fault
from bench.faults.passes import Pass
from bench.faults.queueing import MATES, blocked
from bench.faults.wanted import Wanted

POISON = "abcdfh"
"""A text with which the whole batch fails in the model."""

NOTICED = 15.0
"""Seconds within which a server is to notice that its model hangs or is dead: here it is told 2, where it can be."""

WATCHDOG = 2.0


def poison(case: Case) -> None:
    """Fault 32."""
    alone = [case.asker.begin(case.asker.request(text)).end().texts for text in MATES]
    first = blocked(case)
    calls = [case.asker.begin(case.asker.request(text)) for text in (*MATES, POISON)]
    time.sleep(SOON)  # all of them are in the queue
    batches = list[int]()

    def answer(one: Pass) -> str:
        if POISON in one.texts:
            batches.append(len(one.texts))
            return "fail"
        return "go"

    case.passes.open(answer)
    ended = case.finish([first, *calls])
    case.expect("it fails in a batch", max(batches, default=0) > 1, "it was alone in its batch")
    case.expect_codes("what fails", ended[-1:], ("INTERNAL",))
    failed = sum(one.texts != right for one, right in zip(ended[1:-1], alone, strict=True))
    case.never("the whole batch fails", failed > 0, f"{failed} of {len(MATES)} others fail with it")


def hangs(case: Case) -> None:
    """Fault 34."""
    case.ends = True
    call = blocked(case)
    waiting = case.asker.begin(case.asker.request(MATES[0]))
    unready, status = _watched(case)
    case.expect("it says that it is not ready", unready, f"ready after {NOTICED:.0f} s")
    case.expect("it ends with an error", status not in {None, 0}, "does not end" if status is None else "ends with 0")
    ended = [one.end(SOON) for one in (call, waiting)]
    told = [one for one in ended if one.code != "NONE"]
    case.told(*told)
    case.expect_codes("calls", told, ("UNAVAILABLE",))
    case.expect("callers are told", len(told) == len(ended), f"{len(ended) - len(told)} callers wait on")
    case.never("live and silent", not unready and status is None, "live and ready, and answers nobody")


def _watched(case: Case) -> tuple[bool, int | None]:
    """Whether the server says that it is not ready, or ends, in time; and its exit status, if it ends."""
    end = time.monotonic() + NOTICED
    while (ready := case.asker.ready()) and case.running.alive and time.monotonic() < end:
        time.sleep(0.1)
    return not ready or not case.running.alive, case.running.ended(max(0.1, end - time.monotonic()))


def dies(case: Case) -> None:
    """Fault 35."""
    case.ends = True
    first = blocked(case)
    waiting = [case.asker.begin(case.asker.request(text)) for text in MATES]
    time.sleep(SOON)
    pid = case.passes.seen[-1].pid
    died = list[Pass]()

    def answer(one: Pass) -> str:
        """Only what is under way dies: a worker that is started in its place lives."""
        if one.pid == pid and not died:
            died.append(one)
            return "die"
        return "go"

    case.passes.open(answer)
    ended = case.finish([first, *waiting], NOTICED)
    case.expect_codes("calls", ended, ("UNAVAILABLE", "OK"))
    again, status = case.answers(NOTICED), case.running.ended(0.1)
    unready = not case.running.alive or not case.asker.ready()
    case.never('"healthy" but dead', not again and not unready, "ready, but answers nobody")
    if status is not None:
        case.expect("it ends with an error", status != 0, f"exit status {status}")


FAULTS = (
    Fault(
        number=32,
        name="the model fails for a batch with one bad text in it",
        expected="only what fails alone is INTERNAL",
        put=poison,
    ),
    Fault(
        number=34,
        name="the model hangs",
        expected="not ready, UNAVAILABLE, ends with an error",
        put=hangs,
        wanted=Wanted(watchdog=WATCHDOG),
    ),
    Fault(
        number=35,
        name="the engine's thread or worker dies",
        expected="restarted, or not ready; UNAVAILABLE",
        put=dies,
        wanted=Wanted(watchdog=WATCHDOG),
    ),
)
