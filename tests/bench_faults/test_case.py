"""What is made of what was seen: verdicts follow by rule, and every rule can fail."""

from collections.abc import Sequence
from typing import Any, Self, cast

import pytest

from bench.faults import device
from bench.faults.asking import Ended, infer_request, status_of, texts_of
from bench.faults.case import EXCERPT, GOOD, MEMORY, Case, Check, Verdict, excerpt, verdict
from bench.faults.passes import Pass
from bench.load.accounts import Memory
from serve.pb.inference import grpc_service_pb2 as pb

RIGHT = Ended("OK", texts=("right",))


def check(*, passed: bool, must_not: bool) -> Check:
    return Check("what", must_not, passed, "seen")


@pytest.mark.parametrize(
    ("checks", "follows"),
    [
        ([check(passed=True, must_not=False), check(passed=True, must_not=True)], Verdict.EXPECTED),
        ([check(passed=True, must_not=False), check(passed=False, must_not=False)], Verdict.OTHERWISE),
        ([check(passed=False, must_not=False), check(passed=False, must_not=True)], Verdict.NEVER),
        ([check(passed=False, must_not=True)], Verdict.NEVER),
    ],
)
def test_a_verdict_is_that_of_the_worst_check(checks: Sequence[Check], follows: Verdict) -> None:
    assert verdict(checks) == verdict(list(reversed(checks))) == follows


def test_what_was_not_looked_at_has_no_verdict() -> None:
    with pytest.raises(ValueError, match="nothing was looked at"):
        verdict([])


class FakeAsker:
    """Gets the right answer."""

    model = "model"

    def __init__(self, running: "FakeRunning") -> None:
        self._running = running

    def request(self, *texts: str) -> Any:
        return texts

    def begin(self, request: Any, **options: Any) -> Any:  # noqa: ARG002
        return self

    def end(self, patience: float = 0.0) -> Ended:  # noqa: ARG002
        return self._running.answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FakeRunning:
    """A server that is as the test says."""

    class Kind:
        name, title = "limelight", "Limelight"

    kind = Kind()

    def __init__(self) -> None:
        self.alive, self.answer, self.resident = True, RIGHT, 100.0
        self.passes = FakePasses()

    def asker(self) -> FakeAsker:
        return FakeAsker(self)

    @property
    def megabytes(self) -> Memory:
        return Memory(self.resident, self.resident, self.resident)


class FakePasses:
    def __init__(self) -> None:
        self.seen: list[Pass] = []

    def open(self) -> None:
        pass


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> FakeRunning:
    monkeypatch.setattr("bench.faults.case.SETTLED", 0.0)
    monkeypatch.setattr("bench.faults.case.PATIENCE", 0.01)
    monkeypatch.setattr("bench.faults.case.SOON", 0.0)
    return FakeRunning()


@pytest.fixture
def case(running: FakeRunning) -> Case:
    return Case(cast("Any", running), cast("Any", FakeAsker(running)))


def closed(case: Case) -> str:
    """The verdict, once what every fault must leave behind has been looked at."""
    case.expect("something", passed=True)
    case.close()
    return case.finding(1).verdict


def failed(case: Case) -> list[str]:
    return [one.seen for one in case.checks if not one.passed]


def test_nothing_is_left_behind(case: Case) -> None:
    case.told(RIGHT, Ended("INVALID_ARGUMENT", "SOURCE: is empty", 0.5))
    assert closed(case) == Verdict.EXPECTED
    finding = case.finding(7)
    assert (finding.fault, finding.server, finding.statuses) == (7, "limelight", {"OK": 1, "INVALID_ARGUMENT": 1})
    assert (finding.message, finding.seconds, finding.alive, finding.megabytes) == ("SOURCE: is empty", 0.25, True, 0.0)
    assert finding.checks[0]["what"] == "something"


SAID = [
    'Traceback (most recent call last): File "x"',
    "at /usr/lib/python3/model",
    "error in site-packages",
    f"RuntimeError: {device.SECRET}",
    "model.py: line 3",
]


@pytest.mark.parametrize("said", SAID)
def test_insides_in_a_message_must_not_be(case: Case, said: str) -> None:
    case.told(Ended("INTERNAL", said))
    assert closed(case) == Verdict.NEVER
    assert failed(case) == ["messages with insides: 1"]


def test_what_the_client_sent_is_nothing_of_the_insides(case: Case) -> None:
    case.told(Ended("NOT_FOUND", "model /etc/passwd is not there"), sent="/etc/passwd")
    assert closed(case) == Verdict.EXPECTED


def test_a_call_without_a_status_must_not_be(case: Case) -> None:
    case.told(Ended("NONE", "no status came", 30.0))
    assert closed(case) == Verdict.NEVER
    assert failed(case) == ["calls without a status: 1"]
    assert case.finding(1).seconds is None


def test_a_server_must_not_end(case: Case, running: FakeRunning) -> None:
    running.alive = False
    assert closed(case) == Verdict.NEVER
    assert failed(case) == ["the process ended"]


def test_a_fault_may_be_one_that_ends_the_server(case: Case, running: FakeRunning) -> None:
    running.alive, case.ends = False, True
    assert closed(case) == Verdict.EXPECTED
    assert not case.finding(1).alive


def test_a_server_must_answer_afterwards(case: Case, running: FakeRunning) -> None:
    running.answer = Ended("OK", texts=("wrong",))
    assert closed(case) == Verdict.NEVER
    assert failed(case) == ["does not answer afterwards"]


def test_memory_must_be_given_back(case: Case, running: FakeRunning) -> None:
    running.resident += MEMORY + 1.0
    assert closed(case) == Verdict.NEVER
    assert failed(case) == ["65 MB are kept"]
    assert case.finding(1).megabytes == MEMORY + 1.0


def test_statuses_are_counted_against_those_that_are_allowed(case: Case) -> None:
    ended = [Ended("OK"), Ended("UNAVAILABLE"), Ended("UNAVAILABLE"), Ended("INTERNAL")]
    case.expect_codes("calls", ended, ("OK",))
    case.expect_codes("calls", ended, ("OK", "UNAVAILABLE", "INTERNAL"))
    case.expect_each({"one": ended[0], "two": ended[1], "three": ended[2]}, ("OK",))
    case.expect_each({"one": ended[0]}, ("OK",))
    assert failed(case) == ["calls: 2 UNAVAILABLE, INTERNAL", "UNAVAILABLE for two, three"]


@pytest.mark.parametrize(("more", "follows"), [(0, []), (3, ["cancel: 3 more steps for nobody"])])
def test_steps_for_who_is_gone_are_counted(case: Case, running: FakeRunning, more: int, follows: list[str]) -> None:
    """Here the good text takes no step at all."""
    running.passes.open = lambda: running.passes.seen.extend([Pass(1, "step", 1, ())] * more)  # type: ignore[method-assign]
    case.wasted("cancel")
    assert failed(case) == follows


def test_what_the_model_has_seen_is_found_by_its_text(case: Case, running: FakeRunning) -> None:
    running.passes.seen += [Pass(1, "step", 2, ("ab", "cd")), Pass(1, "step", 1, ("cd",)), Pass(1, "step", 1, ())]
    assert [case.seen_by_model(texts) for texts in (["cd"], ["ab"], ["ab", "cd"], ["x"])] == [2, 1, 2, 0]
    assert case.rows_since(1) == 2


def test_the_most_telling_message_is_kept_and_shortened() -> None:
    assert excerpt([RIGHT]) == ""
    assert excerpt([Ended("INTERNAL", "first\n  line"), Ended("INTERNAL", "second")]) == "first line"
    assert excerpt([Ended("INTERNAL", "first"), Ended("INTERNAL", "Traceback ...")]) == "Traceback ..."
    long = excerpt([Ended("INTERNAL", "x" * 500)])
    assert (len(long), long[-1]) == (EXCERPT, "…")


def test_texts_are_read_from_raw_and_typed_contents() -> None:
    output = pb.ModelInferResponse.InferOutputTensor(name="TEXT", datatype="BYTES", shape=[1, 1])
    raw = infer_request("m", [GOOD.encode()]).raw_input_contents
    assert texts_of(pb.ModelInferResponse(outputs=[output], raw_output_contents=raw)) == (GOOD,)
    output.contents.bytes_contents.append(b"typed")
    assert texts_of(pb.ModelInferResponse(outputs=[output])) == ("typed",)
    output.shape[0] = 2**62
    assert texts_of(pb.ModelInferResponse(outputs=[output], raw_output_contents=raw)) != (GOOD,)
    assert texts_of(pb.ModelInferResponse()) == ()


def test_a_status_is_read_from_frames() -> None:
    assert status_of(b"..@\x0bgrpc-status\x014..") == "DEADLINE_EXCEEDED"
    assert status_of(b"..@\x0bgrpc-status\x0214..") == "UNAVAILABLE"
    assert status_of(b"..") == "NONE"
