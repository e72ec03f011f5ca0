"""`limelight ask` and how to search: what it sends, what comes of it, and what is refused."""

import dataclasses
from typing import Any

import pytest

from model.errors import InvalidRequestError
from model.options import Sampling
from serve.client import ServerError
from serve.pb.limelight.v1 import limelight_pb2 as pb
from tests.serve import asking, fake_server
from tests.serve.running import Running


def drawn(**choices: Any) -> pb.SearchOptions:
    return pb.SearchOptions(sampling=pb.Sampling(**dataclasses.asdict(Sampling(**choices))))


SENT: dict[str, pb.SearchOptions] = {
    "": pb.SearchOptions(),
    "--shortest 4": pb.SearchOptions(shortest=4),
    "--prefix F": pb.SearchOptions(prefix="F"),
    "--suppress Z --suppress OW1": pb.SearchOptions(suppressed=["Z", "OW1"]),
    "--no-repeat-ngram 2": pb.SearchOptions(no_repeat_ngram=2),
    "--no-repeat-ngram 0": pb.SearchOptions(no_repeat_ngram=0),
    "--coverage-penalty 0.25": pb.SearchOptions(coverage_penalty=0.25),
    "--temperature 0.5": drawn(temperature=0.5),
    "--top-k 3": drawn(top_k=3),
    "--top-p 0.75": drawn(top_p=0.75),
    "--seed 0": drawn(seed=0),
    "--temperature 2 --top-k 5 --top-p 0.9 --seed 7": drawn(temperature=2.0, top_k=5, top_p=0.9, seed=7),
}
"""Options, and what a server is sent."""


@pytest.mark.parametrize("stream", ["", " --stream"])
@pytest.mark.parametrize("options", SENT)
def test_what_is_asked_for_is_sent(options: str, stream: str) -> None:
    service = fake_server.FakeService()
    with fake_server.running(service) as address:
        asking.run("phone", *(options + stream).split(), "--address", address)
    request = service.requests[-1]
    assert isinstance(request, pb.GenerateStreamRequest if stream else pb.GenerateRequest)
    assert request.search == SENT[options]


SEARCHING = [
    "--beam-size 2",
    "--n-best 2",
    "--longest 9",
    "--shortest 4",
    "--prefix F",
    "--suppress Z",
    "--no-repeat-ngram 2",
    "--coverage-penalty 0",
    "--temperature 1",
    "--top-k 3",
    "--top-p 1",
    "--seed 0",
]


@pytest.mark.parametrize("option", SEARCHING)
def test_a_target_leaves_nothing_to_search(option: str) -> None:
    name, value = option.split()
    result = asking.run("phone", "--target", "F", name, value)
    assert result.exit_code == 2
    assert f"{name}: has no effect with --target: leave one of them out" in asking.said(result)


NO_SAMPLING = {
    "--temperature 0": "sampling.temperature: 0.0 is not from 0.01 to 100.0",
    "--top-k -1": "sampling.top_k: -1 is not at least 0",
    "--top-p 1.5": "sampling.top_p: 1.5 is not from 1e-06 to 1.0",
    "--seed -1": "sampling.seed: -1 is not from 0 to 9223372036854775807",
}


@pytest.mark.parametrize("options", NO_SAMPLING)
def test_sampling_out_of_range_is_refused_before_anyone_is_asked(options: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        asking.run("phone", *options.split())
    assert str(caught.value) == NO_SAMPLING[options]


REFUSED = {
    "--temperature 2 --beam-size 3": "sampling: draws one answer, beam_size=3 searches: choose one",
    "--seed 1 --n-best 2": "sampling: draws one answer, beam_size=2 searches: choose one",
    "--prefix hx": "prefix: 'x' is not in the target vocabulary",
    "--prefix hgf --longest 3": "prefix: 3 is not from 0 to 2 tokens (below longest)",
    "--suppress x": "suppressed: 'x' is not in the target vocabulary",
    "--suppress </s>": "suppressed: holds the end token: set shortest instead",
    "--shortest 5 --longest 4": "shortest: 5 is not from 1 to 4 (longest)",
    "--no-repeat-ngram -1": "no_repeat_ngram: -1 is not at least 0",
    "--coverage-penalty 11": "coverage_penalty: 11.0 is not from 0.0 to 10.0",
    "--no-repeat-ngram 1 --shortest 20": (
        "search: after 9 tokens every other one is ruled out: suppress fewer, or allow repeats"
    ),
}
"""What a real server says."""


@pytest.mark.parametrize("options", REFUSED)
def test_a_search_that_cannot_be_is_refused(running: Running, options: str) -> None:
    with pytest.raises(ServerError) as caught:
        asking.run("abcdefgh", *options.split(), "--address", running.address)
    assert caught.value.message == REFUSED[options]


def answer(running: Running, options: str) -> str:
    """To abcdefgh, of a real server."""
    result = asking.run("abcdefgh", *options.split(), "--no-heat-map", "--address", running.address)
    return result.stdout.splitlines()[0]


@pytest.mark.parametrize("stream", ["", " --stream"])
def test_an_answer_is_searched_as_asked(running: Running, stream: str) -> None:
    assert answer(running, stream) == "hgfedcba"
    assert answer(running, "--prefix hgb" + stream).startswith("hgb")
    assert not {*answer(running, "--suppress f --suppress c" + stream)} & {*"fc"}
    assert len(answer(running, "--shortest 12" + stream)) >= 11  # the end token is one of the 12
    assert answer(running, "--top-k 1 --seed 4" + stream) == "hgfedcba"


def test_another_seed_draws_another_answer(running: Running) -> None:
    found = [answer(running, f"--temperature 5 --seed {seed}") for seed in (1, 2, 3, 1)]
    assert found[0] == found[3]
    assert len({*found}) > 1
