"""Faults of stopping: signals to a server that is idle, busy or loading, twice, or that kill it (36, 37)."""

import signal
import time

from bench.faults.case import GOOD, SOON, Case, Fault
from bench.faults.passes import PATIENCE
from bench.faults.queueing import blocked
from bench.faults.running import Running, again, started
from bench.faults.wanted import Wanted

GRACE = 20.0
"""Seconds for what is begun, where a server can be told."""

AT_ONCE = 5.0
"""Seconds within which a second signal ends it."""

LOAD = frozenset({"load"})


def stopped(case: Case) -> None:
    """Fault 36: busy, and then another server that is idle."""
    case.ends = True
    call = blocked(case)
    case.running.process.send_signal(signal.SIGTERM)
    time.sleep(SOON)
    case.expect("not ready at once", not case.asker.ready(), "still ready")
    new = case.asker.begin(case.asker.request(GOOD)).end(AT_ONCE)
    case.told(new)
    case.expect_codes("new calls", [new], ("UNAVAILABLE",))
    case.never("new calls: NOT_FOUND", new.code == "NOT_FOUND")
    case.passes.open()
    begun = call.end()
    case.told(begun)
    case.never("what was begun is lost", not case.right(begun), f"what was begun ends with {begun.code}")
    _ends_well(case, "busy", case.running)
    with started(case.running.kind, case.running.wanted) as idle:
        idle.process.send_signal(signal.SIGTERM)
        _ends_well(case, "idle", idle)


def _ends_well(case: Case, what: str, running: Running) -> None:
    status = running.ended(GRACE + AT_ONCE)
    case.never(f"{what}: it hangs", status is None)
    case.expect(f"{what}: exit 0", status in {None, 0}, f"{what}: exit status {status}")


def impatient(case: Case) -> None:
    """Fault 37."""
    case.ends = True
    _twice(case)
    _loading(case)
    _killed(case)


def _twice(case: Case) -> None:
    call = blocked(case)
    case.running.process.send_signal(signal.SIGTERM)
    time.sleep(SOON)
    case.running.process.send_signal(signal.SIGTERM)
    status = case.running.ended(AT_ONCE)
    case.expect("a second signal ends it", status is not None, f"a second signal does not end it in {AT_ONCE:.0f} s")
    case.passes.open()
    case.told(call.end())
    case.never("it hangs after a second signal", case.running.ended(GRACE + AT_ONCE) is None)


def _loading(case: Case) -> None:
    with started(case.running.kind, case.running.wanted, ready=False) as loading:
        loading.passes.hold(LOAD)
        loading.passes.wait_held()
        loading.process.send_signal(signal.SIGTERM)
        time.sleep(SOON)
        loading.passes.open()
        _ends_well(case, "loading", loading)


def _killed(case: Case) -> None:
    with started(case.running.kind, case.running.wanted) as killed:
        killed.process.kill()
        killed.ended(PATIENCE)
        killed.passes.close()
        with again(killed.kind, killed.wanted, killed.folder, killed.ports) as second, second.asker() as asker:
            answered = asker.begin(asker.request(GOOD)).end()
            case.told(answered)
            case.never("killed, it does not serve again on its port", not case.right(answered))


FAULTS = (
    Fault(
        number=36,
        name="SIGTERM, idle or busy",
        expected="not ready, new calls UNAVAILABLE, the rest finishes, exit 0",
        put=stopped,
        wanted=Wanted(grace=GRACE),
    ),
    Fault(
        number=37,
        name="SIGTERM twice, and while loading; SIGKILL and start again",
        expected="at once; exit 0; serves on the same port",
        put=impatient,
        wanted=Wanted(grace=GRACE),
    ),
)
