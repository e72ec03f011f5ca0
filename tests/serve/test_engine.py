"""What the engine answers: each job's own result, whatever its batch mates are and do."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from model.forced import score
from model.search import Node, SearchOptions
from model.steps import NO_FAMILIES, Family
from serve.errors import EngineError
from serve.jobs import Decoded
from tests.serve.jobs import (
    LONG,
    MIDDLE,
    SHORT,
    MakeEngine,
    alone,
    encoded_alone,
    job,
    occupied,
    result,
    same,
    tokens,
)
from tests.serve.steps import Echo, Gated


def test_a_job_is_decoded(make_engine: MakeEngine, steps: Gated) -> None:
    steps.open()
    decoded = result(make_engine().submit(job(MIDDLE)))
    assert [hypothesis.tokens for hypothesis in decoded.hypotheses] == [MIDDLE]
    np.testing.assert_array_equal(decoded.hypotheses[0].cross_attention, np.eye(4)[None, None])
    read = np.tri(4) / np.arange(1, 5)[:, None]
    np.testing.assert_array_equal(decoded.hypotheses[0].decoder_attention, read[None, None].astype(np.float32))
    np.testing.assert_array_equal(decoded.encoder_attention, np.full((1, 1, 4, 4), 0.25))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_batch_mates_leave_a_result_as_it_is(make_engine: MakeEngine, steps: Gated, beam_size: int) -> None:
    engine = make_engine()
    occupied(engine, steps)
    sources = [SHORT, LONG, MIDDLE, SHORT]
    tickets = [engine.submit(job(source, beam_size=beam_size, hypotheses=beam_size)) for source in sources]
    steps.open()
    for ticket, source in zip(tickets, sources, strict=True):
        decoded, expected = result(ticket), alone(source, beam_size)
        assert len(decoded.hypotheses) == len(expected) == beam_size
        assert same(decoded.hypotheses, expected)
        assert encoded_alone(decoded, len(source))
    assert steps.batches == [1, 4]


def test_a_short_answer_does_not_wait_for_a_long_one(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    occupied(engine, steps)
    short, long = engine.submit(job(SHORT)), engine.submit(job(LONG))
    steps.let(3)  # one step of the first job, two of all that are left
    assert tokens(short) == SHORT
    assert not long.future.done()
    steps.open()
    assert tokens(long) == LONG


def test_scores_are_those_of_forced_decoding(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    occupied(engine, steps)
    pairs = [(SHORT, MIDDLE), (LONG, SHORT), (MIDDLE, MIDDLE)]
    penalties = [0.0, 1.0, 2.0]
    tickets = [
        engine.submit(job(source, target=target, options=SearchOptions(longest=16, length_penalty=penalty)))
        for (source, target), penalty in zip(pairs, penalties, strict=True)
    ]
    steps.open()
    for ticket, (source, target), penalty in zip(tickets, pairs, penalties, strict=True):
        decoded, (expected,) = result(ticket), score(Echo(), [source], [target], [penalty])
        assert same(decoded.hypotheses, [expected])
        assert decoded.hypotheses[0].tokens == target
        assert encoded_alone(decoded, len(source))
    assert steps.batches == [1, 3]


FAMILIES: dict[str, frozenset[Family]] = {
    "none": NO_FAMILIES,
    "encoder": frozenset({"encoder"}),
    "decoder": frozenset({"decoder"}),
    "cross": frozenset({"cross"}),
    "cross and encoder": frozenset({"cross", "encoder"}),
}


def has(decoded: Decoded) -> set[str]:
    """Families that an answer carries, all its hypotheses alike."""
    hypotheses = {(one.cross_attention is not None, one.decoder_attention is not None) for one in decoded.hypotheses}
    ((cross, decoder),) = hypotheses
    given = {"encoder": decoded.encoder_attention is not None, "decoder": decoder, "cross": cross}
    return {family for family in given if given[family]}


@pytest.mark.parametrize("families", FAMILIES)
@pytest.mark.parametrize(("beam_size", "target"), [(1, None), (3, None), (1, LONG)], ids=["greedy", "beam", "score"])
def test_attention_that_was_not_asked_for_is_not_computed(
    make_engine: MakeEngine, steps: Gated, families: str, beam_size: int, target: list[int] | None
) -> None:
    steps.open()
    wanted = FAMILIES[families]
    decoded = result(make_engine().submit(job(MIDDLE, beam_size, beam_size, attention=wanted, target=target)))
    assert has(decoded) == wanted
    assert steps.families[0] == wanted & {"encoder"}
    assert set(steps.families[1:]) == {wanted - {"encoder"}}


def test_attention_is_computed_while_someone_wants_it(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    occupied(engine, steps)
    wanted: list[tuple[list[int], frozenset[Family]]] = [
        (LONG, NO_FAMILIES),
        (MIDDLE, frozenset({"cross"})),
        (SHORT, frozenset({"decoder"})),
    ]
    tickets = [engine.submit(job(source, attention=families)) for source, families in wanted]
    steps.open()
    for ticket, (source, families) in zip(tickets, wanted, strict=True):
        assert tokens(ticket) == source
        assert has(result(ticket)) == families
    both, cross = frozenset({"cross", "decoder"}), frozenset({"cross"})
    assert steps.families[2:] == [NO_FAMILIES, both, both, cross, cross, *[NO_FAMILIES] * 6]


def test_scores_carry_what_each_asked_for(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    occupied(engine, steps)
    tickets = [engine.submit(job(MIDDLE, target=LONG, attention=wanted)) for wanted in FAMILIES.values()]
    steps.open()
    assert [has(result(ticket)) for ticket in tickets] == list(FAMILIES.values())
    assert steps.batches == [1, len(FAMILIES)]


def test_what_the_search_itself_needs_is_not_given_to_who_did_not_ask(make_engine: MakeEngine, steps: Gated) -> None:
    steps.open()
    options = SearchOptions(longest=16, beam_size=2, coverage_penalty=0.5)
    decoded = result(make_engine().submit(job(MIDDLE, attention=NO_FAMILIES, options=options)))
    assert has(decoded) == set()
    assert set(steps.families[1:]) == {frozenset({"cross"})}


class Listener:
    """Keeps what it is told, and what thread it is told by.

    Attributes:
        settled: the tokens that were certain after each step.
    """

    def __init__(self, fails_after: int | None = None) -> None:
        self.settled: list[list[int]] = []
        self.nodes: list[Node] = []
        self.begun: list[Decoded] = []
        self.threads: set[str] = set()
        self._fails_after = fails_after

    def __call__(self, begun: Decoded, nodes: Sequence[Node]) -> None:
        if len(self.settled) == self._fails_after:
            raise RuntimeError("the listener is gone")
        self.settled.append([node.token for node in nodes])
        self.nodes = list(nodes)
        self.begun.append(begun)
        self.threads.add(threading.current_thread().name)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_listener_is_told_of_each_token_once_it_is_certain(
    make_engine: MakeEngine, steps: Gated, beam_size: int
) -> None:
    listener, engine = Listener(), make_engine()
    occupied(engine, steps)
    mate, ticket = engine.submit(job(LONG, beam_size)), engine.submit(job(MIDDLE, beam_size, on_settled=listener))
    steps.open()
    best = tokens(ticket)
    assert listener.settled[-1] == best == MIDDLE
    for earlier, later in zip(listener.settled, listener.settled[1:], strict=False):
        assert later[: len(earlier)] == earlier
    if beam_size == 1:
        assert listener.settled == [MIDDLE[:count] for count in range(1, len(MIDDLE) + 1)]
    assert all(encoded_alone(begun, len(MIDDLE)) for begun in listener.begun)
    assert not any(begun.hypotheses for begun in listener.begun)
    assert listener.threads == {"limelight-engine"}
    assert tokens(mate) == LONG


@pytest.mark.parametrize("families", FAMILIES)
def test_a_listener_is_told_the_attention_that_was_asked_for(
    make_engine: MakeEngine, steps: Gated, families: str
) -> None:
    listener, engine, wanted = Listener(), make_engine(), FAMILIES[families]
    occupied(engine, steps, LONG)
    ticket = engine.submit(job(MIDDLE, 2, attention=wanted, on_settled=listener))
    steps.open()
    best = result(ticket).hypotheses[0]
    assert {begun.encoder_attention is not None for begun in listener.begun} == {"encoder" in wanted}
    for t, node in enumerate(listener.nodes):
        for family, weights in (("cross", node.cross_attention), ("decoder", node.decoder_attention)):
            if family in wanted:
                whole = getattr(best, f"{family}_attention")[:, :, t]
                np.testing.assert_array_equal(weights, whole if family == "cross" else whole[:, :, : t + 1])
            else:
                assert weights is None


@pytest.mark.parametrize("fails_after", [0, 2, len(MIDDLE) - 1], ids=["first", "middle", "last"])
def test_a_listener_that_fails_harms_no_one_else(make_engine: MakeEngine, steps: Gated, fails_after: int) -> None:
    listener, engine = Listener(fails_after), make_engine()
    occupied(engine, steps)
    bad = engine.submit(job(MIDDLE, on_settled=listener))
    mates = [engine.submit(job(source)) for source in (SHORT, MIDDLE, LONG)]
    steps.open()
    with pytest.raises(EngineError, match=r"^the stream could not be written$"):
        result(bad)
    assert [tokens(mate) for mate in mates] == [SHORT, MIDDLE, LONG]
    assert len(listener.settled) == fails_after
    assert steps.batches == [1, 4]
