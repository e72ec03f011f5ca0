"""Faults of loading: a model swapped under load, a damaged one, names that are paths, and who may load (38 to 40)."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from bench.faults.asking import Asker, Ended, Metadata
from bench.faults.case import GOOD, Case, Fault
from bench.faults.kinds import Spoil
from bench.faults.passes import PATIENCE
from bench.faults.running import started
from bench.faults.wanted import Wanted
from serve.pb.inference import grpc_service_pb2 as pb

SWAPS, CLIENTS = 20, 8

AGAIN = 5
"""Times that a version is loaded that is there already."""

LOAD = 30.0
"""Seconds that loading a model may take."""

PATHS = ("../passes", "/etc/passwd", "..", "a/../../b", ".")
"""Names of models that are none."""

PLANTED = "planted"


def load(
    administrator: Asker, name: str, parameters: Mapping[str, bytes] | None = None, metadata: Metadata | None = None
) -> Ended:
    """Have a model loaded."""
    given = {key: pb.ModelRepositoryParameter(bytes_param=value) for key, value in (parameters or {}).items()}
    request = pb.RepositoryModelLoadRequest(model_name=name, parameters=given)
    return administrator.begin(request, call="RepositoryModelLoad", timeout=LOAD, metadata=metadata).end(2 * LOAD)


@contextmanager
def asking(case: Case) -> Iterator[list[Ended]]:
    """Clients that ask all the time, each over a connection of its own; what became of it."""
    over, ended = threading.Event(), list[Ended]()
    begun = threading.Barrier(CLIENTS + 1)

    def client() -> None:
        with case.running.asker() as asker:
            ended.append(asker.begin(asker.request(GOOD)).end())
            begun.wait(PATIENCE)
            while not over.is_set():
                ended.append(asker.begin(asker.request(GOOD)).end())

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        begun.wait(PATIENCE)
        try:
            yield ended
        finally:
            over.set()
            for one in clients:
                one.result()


def swapped(case: Case) -> None:
    """Fault 38: new versions, and then the last of them again and again."""
    numbers = [str(number) for number in range(2, 2 + SWAPS)]
    loaded = list[Ended]()
    with case.running.administrator() as administrator:
        with asking(case) as ended:
            for number in numbers:
                case.running.kind.put_version(case.running.folder, int(number))
                loaded.append(load(administrator, case.asker.model))
                ended.append(case.asker.begin(case.asker.request(GOOD)).end())
        _none_lost(case, "new versions", ended)
        with asking(case) as later:
            loaded += [load(administrator, case.asker.model) for _ in range(AGAIN)]
        _none_lost(case, "the same version again", later)
    case.expect_codes("loading", loaded, ("OK",))
    last = case.asker.begin(case.asker.request(GOOD)).end().version
    case.expect("the last version is served", last == numbers[-1], f"version {last} is served at the end")
    told = {one.version for one in ended if one.code == "OK"}
    case.expect("versions are told", told >= {numbers[0], numbers[-1]}, "versions are not told")


def _none_lost(case: Case, what: str, ended: list[Ended]) -> None:
    case.told(*ended)
    wrong = sum(not case.right(one) for one in ended)
    case.never(f"{what}: calls are lost", wrong > 0, f"{what}: {wrong} of {len(ended)} calls lost")


def spoilt(case: Case) -> None:
    """Fault 39: each damage to a server of its own."""
    ended = {what: _spoilt(case, what, spoil) for what, spoil in case.running.kind.spoils.items()}
    case.told(*ended.values())
    case.expect_each(ended, ("FAILED_PRECONDITION",))


def _spoilt(case: Case, what: str, spoil: Spoil) -> Ended:
    with (
        started(case.running.kind, case.running.wanted) as running,
        running.administrator() as administrator,
        running.asker() as asker,
    ):
        spoil(running.kind.place(running.folder))
        found = load(administrator, asker.model)
        case.never(f"{what}: not ready any more", not asker.ready(PATIENCE))
        answered = asker.begin(asker.request(GOOD)).end()
        case.never(f"{what}: the old one is gone", not case.right(answered), f"{what}: {answered.code} from then on")
        return found


def named(case: Case) -> None:
    """Fault 40."""
    with case.running.administrator() as administrator:
        nobody = load(administrator, case.asker.model, metadata=())
        case.told(nobody)
        case.expect_codes("without credentials", [nobody], ("UNAUTHENTICATED", "PERMISSION_DENIED"))
        case.never("without credentials: UNAVAILABLE", nobody.code == "UNAVAILABLE")
        found = {path: load(administrator, path) for path in PATHS}
        for path, ended in found.items():
            case.told(ended, sent=path)
        case.expect_codes("paths", list(found.values()), ("INVALID_ARGUMENT",))
        for depth in range(1, 5):
            planted = {"config": b"{}", f"file:{'../' * depth}{PLANTED}": b"x"}
            case.told(load(administrator, case.asker.model, planted))
        above = case.running.folder.parent / PLANTED
        written = above.exists() or any(case.running.folder.rglob(PLANTED))
        case.never("a file is written", written)
        above.unlink(missing_ok=True)


FAULTS = (
    Fault(
        number=38,
        name=f"the model is swapped {SWAPS} times under load",
        expected="every call answered",
        put=swapped,
    ),
    Fault(number=39, name="a damaged model is loaded", expected="FAILED_PRECONDITION, the old one serves", put=spoilt),
    Fault(
        number=40,
        name="paths as names; loading without credentials",
        expected="INVALID_ARGUMENT; UNAUTHENTICATED or PERMISSION_DENIED",
        put=named,
        wanted=Wanted(credentials=True),
    ),
)
