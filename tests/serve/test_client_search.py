"""How to search, through the client: what it sends, what a real engine makes of it, and what is refused."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from model.errors import InvalidRequestError
from model.hypotheses import LEAST_COVERAGE
from serve.client import Client, End, Sampling, ServerError
from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.wanted import WantedSearch
from tests.serve import fake_server
from tests.serve.running import PATIENCE, Running

DRAWN = Sampling(temperature=0.5, top_k=3, top_p=0.75, seed=9)

SENT: dict[str, tuple[WantedSearch, pb.SearchOptions]] = {
    "nothing": ({}, pb.SearchOptions()),
    "None": (dict.fromkeys(WantedSearch.__annotations__), pb.SearchOptions()),  # type: ignore[dict-item]
    "constraints": (
        {"shortest": 4, "prefix": "F OW1", "no_repeat_ngram": 2, "suppressed": ["Z", "N"], "coverage_penalty": 0.25},
        pb.SearchOptions(shortest=4, prefix="F OW1", no_repeat_ngram=2, suppressed=["Z", "N"], coverage_penalty=0.25),
    ),
    "zeros": (
        {"no_repeat_ngram": 0, "coverage_penalty": 0.0, "prefix": "", "suppressed": ()},
        pb.SearchOptions(no_repeat_ngram=0, coverage_penalty=0.0),
    ),
    "sampling": ({"sampling": DRAWN}, pb.SearchOptions(sampling=pb.Sampling(**dataclasses.asdict(DRAWN)))),
    "sampling by default": (
        {"sampling": Sampling()},
        pb.SearchOptions(sampling=pb.Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=0)),
    ),
}
"""What is wanted, and what a server is sent."""


@pytest.mark.parametrize("what", SENT)
def test_what_is_wanted_is_sent(what: str) -> None:
    wanted, expected = SENT[what]
    service = fake_server.FakeService()
    with fake_server.running(service) as address, Client(address) as client:
        client.generate("phone", **wanted)
        assert isinstance([*client.stream("phone", **wanted)][-1], End)
    generate, stream = service.requests
    assert isinstance(generate, pb.GenerateRequest)
    assert isinstance(stream, pb.GenerateStreamRequest)
    assert generate.search == stream.search == expected


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    """Of a real server."""
    with Client(running.address, timeout=PATIENCE) as client:
        yield client


UNSENDABLE: list[WantedSearch] = [
    {"no_repeat_ngram": 2**31},
    {"shortest": 2**31},
    {"prefix": "\udcff"},
    {"suppressed": ["a", "\udcff"]},
    {"sampling": Sampling(top_k=2**31)},
]


@pytest.mark.parametrize("wanted", UNSENDABLE, ids=str)
def test_what_protobuf_cannot_hold_is_not_sent(client: Client, wanted: WantedSearch) -> None:
    with pytest.raises(InvalidRequestError, match=r"^request: cannot be sent: "):
        client.generate("abcd", **wanted)


def test_an_option_that_does_not_exist_is_refused(client: Client) -> None:
    with pytest.raises(TypeError, match=r"^no such option: beams, temperature$"):
        client.generate("abcd", temperature=0.5, beams=3)  # type: ignore[call-arg]  # the mistake that is tested
    with pytest.raises(TypeError, match=r"^no such option: seed$"):
        client.stream("abcd", seed=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^no such option: beam_size, prefix$"):
        client.score("abcd", "dcba", prefix="d", beam_size=2)  # type: ignore[call-arg]


def test_an_answer_begins_as_it_must(client: Client) -> None:
    best = client.generate("abcdefgh", prefix="hgb").best
    scored = client.score("abcdefgh", best.text).best
    assert best.text.startswith("hgb")
    assert best.log_probability == pytest.approx(scored.log_probability, abs=1e-3)


def test_suppressed_tokens_are_left_out(client: Client) -> None:
    for suppressed in (["f", "c"], {"f", "c"}, iter(("f", "c"))):
        assert not {*client.generate("abcdefgh", suppressed=suppressed, beam_size=3).best.text} & {*"fc"}


def test_no_run_occurs_twice(client: Client) -> None:
    text = client.generate("ababab", no_repeat_ngram=2, longest=8).best.text
    pairs = [text[i : i + 2] for i in range(len(text) - 1)]
    assert client.generate("ababab").best.text == "bababa"
    assert len({*pairs}) == len(pairs)


def test_an_answer_is_as_long_as_it_must_be(client: Client) -> None:
    assert len(client.generate("abcd", shortest=9).best.tokens) >= 9


@pytest.mark.parametrize("beam_size", [1, 3])
def test_the_coverage_penalty_counts_what_was_not_looked_at(client: Client, beam_size: int) -> None:
    wanted: dict[str, Any] = {"beam_size": beam_size, "longest": 4}  # half of the source is left
    plain = client.generate("abcdefgh", **wanted).best
    best = client.generate("abcdefgh", **wanted, coverage_penalty=0.5, families=["cross"]).best
    received = best.attention["cross"].weights.mean((0, 1), dtype=np.float64).sum(0)
    term = 0.5 * float(np.log(received.clip(LEAST_COVERAGE, 1.0)).sum())
    assert best.score == pytest.approx(best.log_probability / len(best.tokens) + term, abs=1e-4)
    assert best.score < plain.score


def test_a_seed_draws_the_same_answer_again(client: Client) -> None:
    def drawn(seed: int) -> str:
        return client.generate("abcdefgh", sampling=Sampling(temperature=5.0, seed=seed)).best.text

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1
    assert client.generate("abcdefgh", sampling=Sampling(top_k=1, seed=4)).best.text == "hgfedcba"


def test_a_stream_draws_what_generate_draws(client: Client) -> None:
    wanted: WantedSearch = {"sampling": Sampling(temperature=3.0, seed=5), "suppressed": ["a"], "shortest": 3}
    *_, end = client.stream("abcdefgh", **wanted)
    assert isinstance(end, End)
    assert end.answer.best.text == client.generate("abcdefgh", **wanted).best.text


REFUSED: dict[str, WantedSearch] = {
    "sampling: draws one answer, beam_size=3 searches: choose one": {"sampling": Sampling(), "beam_size": 3},
    "prefix: 'x' is not in the target vocabulary": {"prefix": "hx"},
    "prefix: is empty": {"prefix": " "},
    "prefix: 3 is not from 0 to 2 tokens (below longest)": {"prefix": "hgf", "longest": 3},
    "suppressed: 'x' is not in the target vocabulary": {"suppressed": ["a", "x"]},
    "suppressed: holds the end token: set shortest instead": {"suppressed": ["</s>"]},
    "shortest: 5 is not from 1 to 4 (longest)": {"shortest": 5, "longest": 4},
    "no_repeat_ngram: -1 is not at least 0": {"no_repeat_ngram": -1},
    "coverage_penalty: 11.0 is not from 0.0 to 10.0": {"coverage_penalty": 11.0},
    "search: after 9 tokens every other one is ruled out: suppress fewer, or allow repeats": {
        "no_repeat_ngram": 1,
        "shortest": 20,
    },
}
"""What a server says, and to what."""


@pytest.mark.parametrize("message", REFUSED)
def test_a_search_that_cannot_be_is_refused(client: Client, message: str) -> None:
    for ask in (client.generate, lambda source, **wanted: list(client.stream(source, **wanted))):
        with pytest.raises(ServerError) as caught:
            ask("abcdefgh", **REFUSED[message])
        assert (caught.value.code, caught.value.message) == (grpc.StatusCode.INVALID_ARGUMENT, message)
