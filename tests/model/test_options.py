import math
import re

import pytest

from model.errors import InvalidRequestError
from model.options import LARGEST_BEAM, LARGEST_SEED, MOST_SUPPRESSED, Sampling, SearchOptions
from model.vocabulary import BEGIN, END, PAD
from tests.model.searching import options

SAMPLING = Sampling()


@pytest.mark.parametrize(
    ("choices", "field", "message"),
    [
        ({"beam_size": 0}, "beam_size", "beam_size: 0 is not from 1 to 16"),
        ({"beam_size": LARGEST_BEAM + 1}, "beam_size", "beam_size: 17 is not from 1 to 16"),
        ({"hypotheses": 0}, "hypotheses", "hypotheses: 0 is not from 1 to 1 (beam_size)"),
        ({"beam_size": 2, "hypotheses": 3}, "hypotheses", "hypotheses: 3 is not from 1 to 2 (beam_size)"),
        ({"length_penalty": math.nan}, "length_penalty", "length_penalty: nan is not from 0.0 to 10.0"),
        ({"length_penalty": -0.1}, "length_penalty", "length_penalty: -0.1 is not from 0.0 to 10.0"),
        ({"length_penalty": math.inf}, "length_penalty", "length_penalty: inf is not from 0.0 to 10.0"),
        ({"coverage_penalty": math.nan}, "coverage_penalty", "coverage_penalty: nan is not from 0.0 to 10.0"),
        ({"coverage_penalty": -1.0}, "coverage_penalty", "coverage_penalty: -1.0 is not from 0.0 to 10.0"),
        ({"coverage_penalty": 10.5}, "coverage_penalty", "coverage_penalty: 10.5 is not from 0.0 to 10.0"),
        ({"longest": 0}, "longest", "longest: 0 is not at least 1"),
        ({"longest": -3}, "longest", "longest: -3 is not at least 1"),
        ({"shortest": 0}, "shortest", "shortest: 0 is not from 1 to 6 (longest)"),
        ({"shortest": 7}, "shortest", "shortest: 7 is not from 1 to 6 (longest)"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram", "no_repeat_ngram: -1 is not at least 0"),
        (
            {"suppressed": frozenset(range(4, 5 + MOST_SUPPRESSED))},
            "suppressed",
            "suppressed: 257 is not from 0 to 256 tokens",
        ),
        ({"suppressed": frozenset({7, END})}, "suppressed", "suppressed: holds the end token: set shortest instead"),
        ({"prefix": (5,) * 6}, "prefix", "prefix: 6 is not from 0 to 5 tokens (below longest)"),
        ({"prefix": (5, END)}, "prefix", "prefix: holds a padding, begin or end token"),
        ({"prefix": (BEGIN, 5)}, "prefix", "prefix: holds a padding, begin or end token"),
        ({"prefix": (PAD,)}, "prefix", "prefix: holds a padding, begin or end token"),
        (
            {"sampling": SAMPLING, "beam_size": 3},
            "sampling",
            "sampling: draws one answer, beam_size=3 searches: choose one",
        ),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(choices: dict[str, object], field: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{re.escape(message)}$") as caught:
        options(**choices)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("choices", "field", "message"),
    [
        ({"temperature": 0.0}, "sampling.temperature", "sampling.temperature: 0.0 is not from 0.01 to 100.0"),
        ({"temperature": math.nan}, "sampling.temperature", "sampling.temperature: nan is not from 0.01 to 100.0"),
        ({"temperature": 101.0}, "sampling.temperature", "sampling.temperature: 101.0 is not from 0.01 to 100.0"),
        ({"top_k": -1}, "sampling.top_k", "sampling.top_k: -1 is not at least 0"),
        ({"top_p": 0.0}, "sampling.top_p", "sampling.top_p: 0.0 is not from 1e-06 to 1.0"),
        ({"top_p": 1.1}, "sampling.top_p", "sampling.top_p: 1.1 is not from 1e-06 to 1.0"),
        ({"top_p": math.nan}, "sampling.top_p", "sampling.top_p: nan is not from 1e-06 to 1.0"),
        ({"seed": -1}, "sampling.seed", "sampling.seed: -1 is not from 0 to 9223372036854775807"),
        (
            {"seed": LARGEST_SEED + 1},
            "sampling.seed",
            "sampling.seed: 9223372036854775808 is not from 0 to 9223372036854775807",
        ),
    ],
    ids=str,
)
def test_sampling_out_of_range_is_refused(choices: dict[str, float], field: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{re.escape(message)}$") as caught:
        Sampling(**choices)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_the_limits_themselves_are_allowed() -> None:
    widest = SearchOptions(
        longest=8,
        shortest=8,
        beam_size=LARGEST_BEAM,
        hypotheses=LARGEST_BEAM,
        length_penalty=10.0,
        coverage_penalty=10.0,
        prefix=(5,) * 7,
        suppressed=frozenset(range(4, 4 + MOST_SUPPRESSED)),
    )
    drawn = options(sampling=Sampling(temperature=0.01, top_k=0, top_p=1e-6, seed=LARGEST_SEED))
    assert (widest.shortest, drawn.beam_size) == (8, 1)


OUTSIDE: dict[str, dict[str, object]] = {
    "prefix: 9 is not from 0 to 8 (ids of the vocabulary)": {"prefix": (4, 9)},
    "prefix: -1 is not from 0 to 8 (ids of the vocabulary)": {"prefix": (-1, 4)},
    "suppressed: 9 is not from 0 to 8 (ids of the vocabulary)": {"suppressed": frozenset({4, 9, 10})},
    "suppressed: -1 is not from 0 to 8 (ids of the vocabulary)": {"suppressed": frozenset({4, -1})},
}


@pytest.mark.parametrize("message", OUTSIDE)
def test_ids_that_the_vocabulary_does_not_have_are_refused(message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{re.escape(message)}$") as caught:
        options(**OUTSIDE[message]).check_vocabulary(9)
    assert caught.value.field == message.partition(":")[0]


def test_every_id_of_the_vocabulary_is_allowed() -> None:
    options(prefix=(4, 8), suppressed=frozenset({0, 8})).check_vocabulary(9)
