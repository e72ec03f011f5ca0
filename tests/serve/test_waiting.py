"""Who may wait, who is next, and who is told at once that it would be too late."""

import random
from collections import Counter
from typing import Any

import pytest

import serve.jobs
import serve.waiting
from model.search import SearchOptions
from serve.bundle import ServedModel
from serve.errors import ExpiredError, QueueFullError
from serve.jobs import PATIENCE, Decoded, EngineLimits, Ticket
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.waiting import MOST_CAUTION, REMEMBERED, Waiting
from tests.serve.jobs import SHORT, MakeEngine, job, occupied, submitted, tokens
from tests.serve.running import PATIENCE as PATIENCE_OF_TESTS
from tests.serve.running import serving
from tests.serve.steps import Gated

NOW = 1000.0


class Times:
    """What the queue and its tickets take for the time."""

    def __init__(self) -> None:
        self.now = NOW

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    times = Times()
    monkeypatch.setattr(serve.jobs, "time", times)
    monkeypatch.setattr(serve.waiting, "time", times)
    return times


def ticket(times: Times, *, length: int = 8, **choices: Any) -> Ticket:
    """One that counts as so many tokens."""
    made = Ticket(job(SHORT, options=SearchOptions(longest=length - len(SHORT)), **choices))
    made._arrived = times.now
    return made


def filled(limits: EngineLimits, *tickets: Ticket) -> Waiting:
    waiting = Waiting(limits)
    for one in tickets:
        waiting.add(one)
    return waiting


def emptied(waiting: Waiting) -> list[Ticket]:
    """All, in turn."""
    taken = []
    while waiting:
        first = waiting.first()
        taken.append(waiting.take())
        assert taken[-1] is first
    return taken


def test_the_most_urgent_is_first_and_who_has_no_deadline_is_patient(times: Times) -> None:
    patient = ticket(times)
    deadlines = [NOW + 9.0, NOW + 1.0, NOW + PATIENCE + 1.0, NOW + 4.0, NOW + 4.0]
    late, soon, later, middle, second = (ticket(times, deadline=deadline) for deadline in deadlines)
    waiting = filled(EngineLimits(), patient, late, soon, later, middle, second)
    assert emptied(waiting) == [soon, middle, second, late, patient, later]
    assert (len(waiting), waiting.first(), waiting.tokens) == (0, None, 0)
    with pytest.raises(IndexError):
        waiting.take()


def test_nobody_waits_for_ever_behind_more_urgent_ones(times: Times) -> None:
    """Ever new ones that are due in a second: whoever has no deadline has its turn after half a minute."""
    waiting = Waiting(EngineLimits())
    patient = ticket(times)
    waiting.add(patient)
    waiting.add(ticket(times, deadline=times.now + 1.0))
    while (taken := waiting.take()) is not patient:
        assert taken.job.deadline is not None
        times.now += 0.9
        waiting.add(ticket(times, deadline=times.now + 1.0))
    assert times.now == pytest.approx(NOW + PATIENCE, abs=1.0)


def test_clients_have_alike_whatever_they_ask_for(times: Times) -> None:
    """One hands in forty large ones before the other two come: from then on each has as many tokens as the others."""
    limits = EngineLimits()
    greedy = [ticket(times, client="greedy", length=100) for _ in range(40)]
    modest = [ticket(times, client=name, length=25) for name in ("one", "two") for _ in range(40)]
    waiting = filled(limits, *greedy)
    for _ in range(10):
        waiting.take()
    for one in modest:
        waiting.add(one)
    had: Counter[str] = Counter()
    while min(had.get(name, 0) for name in ("one", "two")) < 40 * 25:
        taken = waiting.take()
        had[taken.job.client] += taken.job.tokens
        assert max(had[name] for name in ("greedy", "one", "two")) - min(had[name] for name in ("one", "two")) <= 125
    assert {one.job.client for one in emptied(waiting)} == {"greedy"}


def test_who_comes_back_has_no_credit(times: Times) -> None:
    waiting = filled(EngineLimits(), *(ticket(times, client="stays") for _ in range(10)))
    for _ in range(4):
        waiting.take()
    for _ in range(3):
        waiting.add(ticket(times, client="back"))
    order = [one.job.client for one in emptied(waiting)]
    assert order == ["back", "stays", "back", "stays", "back", *["stays"] * 4]


def test_who_had_more_waits_even_if_it_was_away(times: Times) -> None:
    waiting = filled(EngineLimits(), ticket(times, client="large", length=40))
    waiting.take()
    small = [ticket(times, client="small", length=10) for _ in range(6)]
    for one in small:
        waiting.add(one)
    again = ticket(times, client="large", length=40, deadline=NOW + 0.1)
    waiting.add(again)
    assert emptied(waiting) == [*small[:4], again, *small[4:]]


def test_among_clients_that_had_alike_the_most_urgent_is_first(times: Times) -> None:
    deadlines = [5.0, 3.0, 9.0, 1.0]
    tickets = [ticket(times, client=str(number), deadline=NOW + after) for number, after in enumerate(deadlines)]
    assert [one.job.client for one in emptied(filled(EngineLimits(), *tickets))] == ["3", "1", "0", "2"]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_counted_is_what_waits(times: Times, seed: int) -> None:
    """Random arrivals, departures and cancels: nobody is lost or counted twice, and every client is served in turn."""
    draw = random.Random(seed)
    waiting, inside, ended = Waiting(EngineLimits(queue=10_000, client_queue=10_000)), set[Ticket](), 0
    for _ in range(400):
        action = draw.random()
        if action < 0.5:
            deadline = draw.choice([None, times.now + draw.uniform(0.1, 5.0)])
            one = ticket(
                times, length=draw.randint(3, 30), client=draw.choice("abc"), deadline=deadline, size=draw.randint(0, 9)
            )
            waiting.add(one)
            inside = {other for other in inside if not other.cancelled and not other.expired} | {one}
        elif action < 0.8 and waiting:
            inside.remove(waiting.take())
            ended += 1
        elif action < 0.9 and inside:
            draw.choice(sorted(inside, key=id)).cancel()
        else:
            times.now += draw.uniform(0.0, 0.5)
            waiting.drop_unwanted()
            gone = {one for one in inside if one.cancelled or one.expired}
            assert all(one.future.done() for one in gone)
            inside -= gone
        assert len(waiting) == len(inside)
        assert waiting.tokens == sum(one.job.tokens for one in inside)
        assert waiting.bytes == sum(one.job.size for one in inside)
    assert ended > 50
    assert set(waiting.clear()) == inside
    assert (len(waiting), waiting.tokens, waiting.bytes, waiting.first()) == (0, 0, 0, None)


OVER: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {
    "requests": ({"queue": 2}, {}, "2 requests are waiting, the limit is 2: retry later"),
    "tokens": ({"queue_tokens": 20}, {}, "requests of 16 tokens are waiting, the limit is 20: retry later"),
    "bytes": ({"queue_bytes": 25}, {}, "requests of 20 bytes are waiting, the limit is 25: retry later"),
    "of a client": ({"client_queue": 2}, {}, "2 requests of this client are waiting, the limit is 2: retry later"),
}


@pytest.mark.parametrize("what", OVER)
def test_fault_22_what_is_too_much_is_refused_and_what_leaves_makes_room(times: Times, what: str) -> None:
    limits, choices, message = OVER[what]
    first, second = (ticket(times, size=10, **choices) for _ in range(2))
    waiting = filled(EngineLimits(**limits), first, second)
    with pytest.raises(QueueFullError, match=f"^{message}$"):
        waiting.add(ticket(times, size=10, **choices))
    assert len(waiting) == 2
    second.cancel()
    third = ticket(times, size=10)
    waiting.add(third)
    assert emptied(waiting) == [first, third]


@pytest.mark.parametrize("limits", [{"queue_tokens": 1}, {"queue_bytes": 1}], ids=str)
def test_fault_22_what_is_over_a_limit_by_itself_waits_alone(times: Times, limits: dict[str, int]) -> None:
    large = ticket(times, size=10)
    waiting = filled(EngineLimits(**limits), large)
    with pytest.raises(QueueFullError):
        waiting.add(ticket(times, size=10))
    assert emptied(waiting) == [large]
    waiting.add(ticket(times, size=10))


def test_one_client_leaves_an_eighth_of_the_queue_to_the_others(times: Times) -> None:
    limits = EngineLimits(queue=16)
    waiting = filled(limits, *(ticket(times, client="greedy") for _ in range(14)))
    with pytest.raises(QueueFullError, match="14 requests of this client are waiting, the limit is 14"):
        waiting.add(ticket(times, client="greedy"))
    for name in ("one", "two"):
        waiting.add(ticket(times, client=name))
    with pytest.raises(QueueFullError, match="16 requests are waiting, the limit is 16"):
        waiting.add(ticket(times, client="three"))
    limits_of_a_client = [one.waiting_of_a_client for one in (EngineLimits(queue=1), EngineLimits(client_queue=3))]
    assert limits_of_a_client == [1, 3]


def test_fault_24_who_would_be_too_late_is_told_at_once(times: Times) -> None:
    """Ten leave a second: before ten who are in less of a hurry, half a second is enough for five, and no more."""
    waiting = filled(EngineLimits(), *(ticket(times, deadline=NOW + 5.0) for _ in range(20)))
    times.now += 1.0
    for _ in range(10):
        waiting.take()
    waiting.took(10)
    with pytest.raises(ExpiredError, match=r"^the deadline passed before the request's turn came$"):
        waiting.add(ticket(times, deadline=times.now))
    message = r"^the deadline would pass before the answer is ready: that takes about 0\.5 s, and 0\.5 s are left$"
    for _ in range(5):
        waiting.add(ticket(times, deadline=times.now + 0.5))
    with pytest.raises(ExpiredError, match=message):
        waiting.add(ticket(times, deadline=times.now + 0.5))
    waiting.add(ticket(times, deadline=times.now + 0.6))
    waiting.add(ticket(times, client="another", deadline=times.now + 0.1))  # whose turn it is, as it had nothing so far
    waiting.add(ticket(times))
    assert len(waiting) == 18


def test_fault_24_what_was_slow_some_time_ago_is_not_held_against_who_comes_now(times: Times) -> None:
    waiting = filled(EngineLimits(), ticket(times))
    times.now += 5.0
    waiting.take()
    waiting.took(1)
    times.now += 3.0
    for _ in range(32):
        waiting.add(ticket(times, deadline=times.now + 1.0))
    assert len(waiting) == 32


def paced(times: Times, *tickets: Ticket) -> Waiting:
    """A queue that is known to let ten out a second; one is left in it, so that it goes on."""
    last = ticket(times, client="first", deadline=NOW + 1000.0)
    waiting = filled(EngineLimits(), last, *(ticket(times, client="first") for _ in range(10)), *tickets)
    times.now += 1.0
    for _ in range(10):
        assert waiting.take().job.client == "first"
    waiting.took(10)
    return waiting


def decoded(times: Times, waiting: Waiting, seconds: float) -> None:
    """Let answers to a source as long as all others take so long lately."""
    one = ticket(times)
    one.begin()
    times.now += seconds
    one.finish(Decoded(None, []))
    waiting.answered(one)
    times.now -= seconds


def test_fault_24_the_time_of_the_answer_counts_too(times: Times) -> None:
    """Ten leave a second, and three tenths go by until the answer: 0.55 s are enough for three, and no more."""
    waiting = filled(EngineLimits(), *(ticket(times, deadline=NOW + 5.0) for _ in range(20)))
    times.now += 1.0
    for _ in range(10):
        waiting.take()
    waiting.took(10)
    decoded(times, waiting, 0.3)
    for _ in range(3):
        waiting.add(ticket(times, deadline=times.now + 0.55))
    with pytest.raises(ExpiredError, match=r"is ready: that takes about 0\.6 s, and 0\.55 s are left$"):
        waiting.add(ticket(times, deadline=times.now + 0.55))
    waiting.add(ticket(times, deadline=times.now + 0.7))
    waiting.add(ticket(times, client="another", deadline=times.now + 0.2))  # whose turn it is, may try


def test_fault_25_who_cannot_have_an_answer_in_time_makes_room_for_others(times: Times) -> None:
    waiting = paced(times)
    decoded(times, waiting, 0.4)
    late, early = (ticket(times, deadline=times.now + seconds) for seconds in (1.0, 1.2))
    waiting.add(late)
    waiting.add(early)
    times.now += 0.85
    waiting.drop_unwanted()
    assert [one.future.done() for one in (late, early)] == [True, False]
    with pytest.raises(ExpiredError, match=r"^the deadline would pass before the answer is ready$"):
        late.future.result(0)


def test_who_waits_alone_is_tried_however_little_time_is_left(times: Times) -> None:
    waiting = Waiting(EngineLimits())
    decoded(times, waiting, 10.0)
    one = ticket(times, deadline=times.now + 0.1)
    waiting.add(one)
    waiting.drop_unwanted()
    assert waiting.first() is one


def test_fault_24_whom_nobody_waits_for_is_not_counted(times: Times) -> None:
    others = [ticket(times, client="first", deadline=NOW + 100.0) for _ in range(90)]
    waiting = paced(times)
    for one in others:
        waiting.add(one)
        one.cancel()
    waiting.add(ticket(times, deadline=times.now + 5.0))
    assert len(waiting) == 2


def test_fault_24_who_is_next_by_fairness_is_not_refused_for_the_others_sake(times: Times) -> None:
    heavy = [ticket(times, client=f"heavy {number}", length=1000, deadline=NOW + 90.0) for number in range(50)]
    waiting = paced(times)
    for one in heavy:
        waiting.add(one)
    for one in heavy:  # each has had a thousand tokens
        assert waiting.take() is one
    for number in range(50):
        waiting.add(ticket(times, client=f"heavy {number}", length=1000, deadline=NOW + 90.0))
    waiting.add(ticket(times, client="light"))
    light = ticket(times, client="light", deadline=times.now + 0.5)
    waiting.add(light)
    assert waiting.take() is light


def test_fault_24_who_had_much_and_would_wait_for_all_others_is_told(times: Times) -> None:
    waiting = paced(times)
    waiting.add(ticket(times, client="heavy", length=100_000))
    waiting.take()
    for _ in range(100):
        waiting.add(ticket(times, client="light", deadline=NOW + 90.0))
    with pytest.raises(ExpiredError, match=r"that takes about 10\.1 s, and 1 s are left"):
        waiting.add(ticket(times, client="heavy", deadline=times.now + 1.0))


def test_fault_24_answers_that_took_longer_than_expected_make_the_queue_careful_for_a_while(times: Times) -> None:
    """Ten leave a second: three quarters of one are enough behind five, but not while expectations do not hold."""
    waiting = paced(times)
    for _ in range(5):
        waiting.add(ticket(times, client="one", deadline=times.now + 0.7))
    assert waiting.refusal("one", times.now + 0.75) is None
    for _ in range(5):
        took(times, waiting, expected=0.5, seconds=1.0)
    assert isinstance(waiting.refusal("one", times.now + 0.75), ExpiredError)
    with pytest.raises(ExpiredError, match=r"is ready: that takes about 1 s, and 0\.75 s are left$"):
        waiting.add(ticket(times, client="one", deadline=times.now + 0.75))
    for _ in range(100):
        took(times, waiting, expected=0.1, seconds=1.0)
    times.now += 1.0
    assert waiting._outflow.caution == pytest.approx(MOST_CAUTION)
    times.now += 50.0
    assert waiting._outflow.caution < 1.02


@pytest.mark.parametrize(("expected", "seconds"), [(0.0, 100.0), (1.0, 0.9)])
def test_what_took_no_longer_or_was_not_expected_to_end_teaches_nothing(
    times: Times, expected: float, seconds: float
) -> None:
    waiting = paced(times)
    for _ in range(10):
        took(times, waiting, expected=expected, seconds=seconds)
    assert waiting._outflow.caution == 1.0


def test_only_who_waits_for_others_and_whose_answer_can_be_foreseen_has_expectations(times: Times) -> None:
    waiting = paced(times)
    alone = ticket(times, client="alone", deadline=times.now + 50.0)
    Waiting(EngineLimits()).add(alone)
    unforeseen = ticket(times, client="unforeseen", deadline=times.now + 50.0)
    waiting.add(unforeseen)
    decoded(times, waiting, 0.4)
    foreseen = ticket(times, client="foreseen", deadline=times.now + 50.0)
    waiting.add(foreseen)
    scored = ticket(times, client="scored", deadline=times.now + 50.0, target=[3])
    waiting.add(scored)
    found = [one.expected for one in (alone, unforeseen, foreseen, scored)]
    assert found == [0.0, 0.0, pytest.approx(0.6), 0.0]


def took(times: Times, waiting: Waiting, *, expected: float, seconds: float) -> None:
    """One of which so much was expected has failed after so many seconds."""
    one = ticket(times, deadline=times.now + 100.0)
    one.expected = expected
    times.now += seconds
    one.fail(ExpiredError("too late"))
    waiting.answered(one)
    times.now -= seconds


def test_what_was_cancelled_leaves_nothing_behind(times: Times) -> None:
    """Behind one that waits for ever, any number may come and go."""
    waiting = filled(EngineLimits(), ticket(times, deadline=times.now + 1.0))
    for _ in range(1000):
        one = ticket(times, deadline=times.now + 1000.0)
        waiting.add(one)
        one.cancel()
    waiting.drop_unwanted()
    assert len(waiting) == 1
    assert sum(len(client.heap) for client in waiting._clients.values()) <= 2
    assert not waiting._cancelled


def test_fault_24_who_cannot_be_answered_is_known_by_client_and_deadline(times: Times) -> None:
    """Ten leave a second: behind five of its own, a client's next takes half a second."""
    waiting = paced(times)
    for _ in range(5):
        waiting.add(ticket(times, client="one", deadline=times.now + 1.0))
    refusal = waiting.refusal("one", times.now + 1.1)
    assert refusal is None
    assert waiting.refusal("one", times.now + 0.3) is None  # more urgent than those that wait
    times.now += 0.7
    refusal = waiting.refusal("one", times.now + 0.4)
    assert isinstance(refusal, ExpiredError)
    assert str(refusal).startswith("the deadline would pass before the answer is ready: that takes about 0.")
    assert str(refusal).endswith(" s, and 0.4 s are left")
    assert waiting.refusal("one", times.now + 0.8) is None
    assert waiting.refusal("one", None) is None
    assert waiting.refusal("another", times.now + 0.01) is None  # it may be its turn


def test_fault_24_clients_that_ask_for_as_much_are_expected_to_take_turns(times: Times) -> None:
    """Ten leave a second: behind ten of its own a client waits for a second, and for three where two others wait."""
    waiting = paced(times)
    for _ in range(10):
        waiting.add(ticket(times, client="one", deadline=times.now + 2.0))
    assert waiting.refusal("one", times.now + 2.0) is None
    for name in ("two", "three"):
        for _ in range(10):
            waiting.add(ticket(times, client=name))
    assert isinstance(waiting.refusal("one", times.now + 2.0), ExpiredError)
    assert waiting.refusal("one", times.now + 3.5) is None


def test_fault_22_who_finds_the_queue_full_is_known_too(times: Times) -> None:
    waiting = filled(EngineLimits(queue=3, client_queue=2), ticket(times, client="one"), ticket(times, client="one"))
    assert str(waiting.refusal("one", None)) == "2 requests of this client are waiting, the limit is 2: retry later"
    assert waiting.refusal("another", None) is None
    last = ticket(times, client="another")
    waiting.add(last)
    assert str(waiting.refusal("third", None)) == "3 requests are waiting, the limit is 3: retry later"
    last.cancel()
    assert waiting.refusal("third", None) is None


def test_clients_of_whom_nothing_waits_cost_nothing(times: Times) -> None:
    """Every look at the queue goes over those who wait; of the others, only who had more than these is known."""
    waiting = Waiting(EngineLimits(queue=10 * REMEMBERED))
    for number in range(REMEMBERED + 10):
        waiting.add(ticket(times, client=str(number)))
    for _ in range(REMEMBERED + 10):
        waiting.take()
    assert (len(waiting._clients), len(waiting._order), len(waiting._had)) == (0, 0, REMEMBERED)
    for number in range(100):
        waiting.add(ticket(times, client=str(number), length=20))
        waiting.take()
    assert len(waiting._had) <= REMEMBERED
    assert waiting.first() is None


def test_the_engine_serves_clients_in_turn(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine(rows=1)
    occupied(engine, steps)
    tickets = [engine.submit(job(SHORT, client=client)) for client in "aaaabb"]
    steps.open()
    assert [tokens(one) for one in tickets] == [SHORT] * 6
    order = sorted(tickets, key=lambda one: one.timings.queue + one._arrived)
    assert "".join(one.job.client for one in order) == "ababaa"


HEADER = "x-limelight-client"


@pytest.mark.parametrize(
    ("header", "sent", "clients"),
    [
        (None, "alice", {"ipv4:127.0.0.1"}),
        (HEADER, "alice", {f"{HEADER}:alice"}),
        (HEADER, None, {"ipv4:127.0.0.1"}),
    ],
)
def test_a_client_is_an_address_or_what_a_header_says(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch, header: str | None, sent: str | None, clients: set[str]
) -> None:
    with serving(served, client_header=header) as running:
        seen = submitted(running.engine, monkeypatch)
        about: Any = {"metadata": () if sent is None else ((HEADER, sent),), "timeout": PATIENCE_OF_TESTS}
        running.stub.Generate(pb.GenerateRequest(source="abc"), **about)
        running.stub.Score(pb.ScoreRequest(source="abc", target="cba"), **about)
        assert list(running.stub.GenerateStream(pb.GenerateStreamRequest(source="abc"), **about))
        many = pb.GenerateManyRequest(id="one", request=pb.GenerateRequest(source="abc"))
        assert len(list(running.stub.GenerateMany(iter([many]), **about))) == 1
    assert {job.client for job in seen} == clients
    assert [job.size for job in seen] == [5, 10, 5, 5]
