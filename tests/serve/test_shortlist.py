"""A search among candidates, where a request asks for it and the bundle has one; everybody else's answers are exact."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.bundle import Shortlisting, export_bundle
from export.manifest import BundleError
from export.runtime import OnnxStepModel
from model.errors import InvalidRequestError
from model.options import Sampling
from model.steps import Question, Step
from serve.batcher import Batcher
from serve.bundle import ServedModel, load_model, warm_up
from serve.client import Client, End, ServerError
from serve.engine import Engine
from serve.errors import EngineError
from serve.jobs import EngineLimits, Ticket
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.wanted import WantedSearch
from tests.reversal import Reversal, pairs, parts
from tests.serve import asking, fake_server
from tests.serve.jobs import LONG, MIDDLE, SHORT, alone, job, result, same
from tests.serve.running import PATIENCE, Running, serving
from tests.serve.steps import Echo, Gated
from tests.serve.test_service_errors import INVALID, refused

SIZE = 8
"""Candidates: end, unknown, the two most frequent letters and four more, of the eight letters that there are."""

FEW, ALL = "abcdabcd", "abcdefgh"
"""A string whose letters are all candidates, and one with more of them than there can be."""


@pytest.fixture(scope="session")
def bundle(reversal: Reversal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shortlist") / "bundle"
    shortlist = Shortlisting(SIZE, pairs(parts()["train"][:500]))
    export_bundle(reversal.checkpoint, folder, pairs(parts()["validation"]), "1", shortlist=shortlist)
    return folder


@pytest.fixture(scope="session")
def short(bundle: Path) -> ServedModel:
    return load_model(bundle, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def shortlisting(short: ServedModel) -> Iterator[Running]:
    with serving(short) as server:
        yield server


@pytest.fixture
def client(shortlisting: Running) -> Iterator[Client]:
    with Client(shortlisting.address, timeout=PATIENCE) as client:
        yield client


@pytest.mark.parametrize("search", [{}, {"beam_size": 3, "hypotheses": 2}], ids=str)
def test_letters_of_the_source_are_candidates(client: Client, search: WantedSearch) -> None:
    among: WantedSearch = {**search, "shortlist": True}
    found, exact = (client.generate(FEW, families=["cross"], **wanted) for wanted in (among, search))
    assert found.best.text == exact.best.text == FEW[::-1]
    assert found.best.log_probability == pytest.approx(exact.best.log_probability, abs=0.01)
    found_weights, weights = (answer.best.attention["cross"].weights for answer in (found, exact))
    np.testing.assert_allclose(found_weights, weights, rtol=0, atol=1e-5)


def test_the_model_tells_how_many_candidates_there_are(client: Client, running: Running) -> None:
    assert client.describe().shortlist == SIZE
    with Client(running.address, timeout=PATIENCE) as other:
        assert other.describe().shortlist is None


def test_only_who_asks_gets_it(client: Client) -> None:
    assert client.generate(ALL).best.text == ALL[::-1]
    assert client.generate(ALL, shortlist=False).best.text == ALL[::-1]
    found = client.generate(ALL, shortlist=True).best.text
    assert found != ALL[::-1]
    assert len({*found}) <= SIZE - 2


def test_a_stream_says_what_generate_says(client: Client) -> None:
    for source in (FEW, ALL):
        *_, end = client.stream(source, shortlist=True)
        assert isinstance(end, End)
        assert end.answer.best.text == client.generate(source, shortlist=True).best.text


@pytest.mark.parametrize("beam_size", [1, 4])
def test_constraints_hold_among_candidates(client: Client, beam_size: int) -> None:
    best = client.generate(FEW, shortlist=True, suppressed=["a"], shortest=12, beam_size=beam_size).best
    assert "a" not in best.text
    assert len(best.tokens) >= 12


CALLS = {"Generate": pb.GenerateRequest, "GenerateStream": pb.GenerateStreamRequest}


@pytest.mark.parametrize("call", CALLS)
def test_a_model_without_one_says_so(running: Running, call: str) -> None:
    expected = "shortlist: this model has none; export it with --shortlist"
    request = CALLS[call](source=FEW, search=pb.SearchOptions(shortlist=True))
    assert refused(running, call, request) == (INVALID, expected)


@pytest.mark.parametrize("call", CALLS)
def test_what_is_forced_may_be_no_candidate(shortlisting: Running, call: str) -> None:
    expected = "shortlist: may lack tokens of the prefix: leave one of them out"
    request = CALLS[call](source=FEW, search=pb.SearchOptions(shortlist=True, prefix="ab"))
    assert refused(shortlisting, call, request) == (INVALID, expected)


def test_a_target_is_scored_exactly(client: Client) -> None:
    with pytest.raises(TypeError, match=r"^no such option: shortlist$"):
        client.score(FEW, FEW[::-1], shortlist=True)  # type: ignore[call-arg]
    engine = Engine(Echo(), EngineLimits(), Echo())
    with pytest.raises(InvalidRequestError, match=r"^shortlist: may lack tokens of the target: leave one of them out$"):
        engine.submit(job(SHORT, shortlist=True, target=SHORT))
    assert engine.stop(PATIENCE)


def test_a_bundle_has_one_or_not(short: ServedModel, served: ServedModel) -> None:
    assert served.shortlist is None
    assert isinstance(short.shortlist, OnnxStepModel)
    assert isinstance(short.steps, OnnxStepModel)
    assert short.shortlist.encoder is short.steps.encoder


class Lost(Echo):
    """Log-probabilities that are no numbers."""

    def step(self, question: Question) -> Step:
        step = super().step(question)
        return dataclasses.replace(step, top_log_probabilities=np.full_like(step.top_log_probabilities, np.nan))


def test_it_is_warmed_up_and_checked_too(short: ServedModel) -> None:
    warm_up(short)
    with pytest.raises(BundleError, match="the warm-up gave log-probabilities that are no numbers"):
        warm_up(dataclasses.replace(short, shortlist=Lost()))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_searches_of_both_kinds_are_kept_apart(beam_size: int) -> None:
    exact, short = Gated(Echo()), Gated(Echo())
    exact.open()
    short.open()
    batcher = Batcher(exact, EngineLimits(), short)
    kinds = [(LONG, False), (MIDDLE, True), (SHORT, True), (LONG, True), (SHORT, False)]
    tickets = [Ticket(job(source, beam_size, beam_size, shortlist=shortlist)) for source, shortlist in kinds]
    batcher.admit(tickets)
    assert (sum(exact.batches), sum(short.batches)) == (2, 3)
    assert batcher.rows == 5 * beam_size
    batcher.step()
    assert (exact.rows, short.rows) == ([2 * beam_size], [3 * beam_size])
    while batcher.busy:
        batcher.step()
    for ticket, (source, _) in zip(tickets, kinds, strict=True):
        assert same(result(ticket).hypotheses, alone(source, beam_size))


def test_one_kind_that_fails_leaves_the_other_alone() -> None:
    class Broken(Echo):
        def encode(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("broken")

    batcher = Batcher(Echo(), EngineLimits(), Broken())
    tickets = [Ticket(job(SHORT, shortlist=shortlist)) for shortlist in (False, True)]
    batcher.admit(tickets)
    while batcher.busy:
        batcher.step()
    assert same(result(tickets[0]).hypotheses, alone(SHORT, 1))
    with pytest.raises(EngineError):
        result(tickets[1])


@pytest.mark.parametrize("stream", ["", " --stream"])
def test_ask_asks_for_it(stream: str) -> None:
    service = fake_server.FakeService()
    with fake_server.running(service) as address:
        for options, expected in (("--shortlist", True), ("", False)):
            asking.run("phone", *(options + stream).split(), "--address", address)
            request = service.requests[-1]
            assert isinstance(request, pb.GenerateStreamRequest if stream else pb.GenerateRequest)
            assert request.search == pb.SearchOptions(shortlist=expected)


def test_ask_gets_it(shortlisting: Running, running: Running) -> None:
    options = ("--shortlist", "--no-heat-map", "--address")
    assert asking.run(FEW, *options, shortlisting.address).stdout.splitlines()[0] == FEW[::-1]
    with pytest.raises(
        ServerError, match=r"^shortlist: this model has none; export it with --shortlist \(request [0-9a-f]{12}\)$"
    ):
        asking.run(FEW, *options, running.address)
    result = asking.run(FEW, "--target", "a", "--shortlist")
    assert "--shortlist: has no effect with --target: leave one of them out" in asking.said(result)


def test_sampling_draws_from_all_candidates(client: Client) -> None:
    def drawn(seed: int) -> str:
        return client.generate(FEW, shortlist=True, sampling=Sampling(temperature=5.0, seed=seed)).best.text

    found = [drawn(seed) for seed in (1, 2, 3, 1)]
    assert found[0] == found[3]
    assert len({*found}) > 1
