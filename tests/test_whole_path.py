"""The test that counts: train, export, serve, ask; the answers are right, and the attention shows why.

A string is reversed by looking at its letters from the last to the first: cross-attention must be the anti-diagonal.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from serve.bundle import load_model
from serve.pb.limelight.v1 import limelight_pb2 as pb
from tests.reversal import Reversal, parts, reversal_model
from tests.serve.running import PATIENCE, Running, array, serving

ENOUGH = 0.95
"""Share of the strings that must be right, and of the positions that must look at their mirror image."""

CHOSEN_ON, TESTED_ON = parts()["validation"], parts()["test"]
"""Strings that the model has not seen: the head is chosen on some, and tested on others."""


@pytest.fixture(scope="module")
def reversal(tmp_path_factory: pytest.TempPathFactory) -> Reversal:
    return reversal_model(tmp_path_factory.getbasetemp() / "reversal")


@pytest.fixture(scope="module")
def running(reversal: Reversal) -> Iterator[Running]:
    with serving(load_model(reversal.bundle, provider="cpu", threads=1)) as server:
        yield server


class Seen(NamedTuple):
    """An answer, and the cross-attention that came with it: [head, row, column], the heads of all layers."""

    string: str
    answer: pb.GenerateResponse
    cross: np.ndarray[Any, Any]


def ask(running: Running, strings: list[str]) -> list[Seen]:
    wanted = pb.AttentionOptions(families=[pb.ATTENTION_FAMILY_CROSS])
    requests = [pb.GenerateRequest(source=one, attention=wanted) for one in strings]
    answers = [call.result(PATIENCE) for call in map(running.stub.Generate.future, requests)]
    crosses = [array(answer.hypotheses[0].attention[0]) for answer in answers]
    return [
        Seen(string, answer, cross.reshape(-1, *cross.shape[2:]))
        for string, answer, cross in zip(strings, answers, crosses, strict=True)
    ]


def mirrored(seen: list[Seen], head: int) -> tuple[int, int]:
    """Of the rows of right answers' letters, how many look most at the mirrored letter, and how many there are."""
    hits = rows = 0
    for string, answer, cross in seen:
        if answer.hypotheses[0].text == string[::-1]:
            looked_at = cross[head, : len(string)].argmax(-1)
            hits += int((looked_at == np.arange(len(string))[::-1]).sum())
            rows += len(string)
    return hits, rows


@pytest.fixture(scope="module")
def seen(running: Running) -> list[Seen]:
    return ask(running, TESTED_ON)


def test_unseen_strings_are_reversed(seen: list[Seen]) -> None:
    assert not set(TESTED_ON) & {*parts()["train"], *CHOSEN_ON}
    wrong = [one.string for one in seen if one.answer.hypotheses[0].text != one.string[::-1]]
    assert len(wrong) <= (1 - ENOUGH) * len(seen), wrong


def test_cross_attention_is_the_anti_diagonal(running: Running, seen: list[Seen]) -> None:
    chosen_on = ask(running, CHOSEN_ON)
    best = max(range(len(seen[0].cross)), key=lambda head: mirrored(chosen_on, head))
    hits, rows = mirrored(seen, best)
    assert rows > ENOUGH * sum(map(len, TESTED_ON))
    assert hits >= ENOUGH * rows, f"{hits} of {rows} rows"


def test_rows_and_columns_are_labelled_with_their_letters(seen: list[Seen]) -> None:
    for string, answer, cross in seen:
        best = answer.hypotheses[0]
        assert cross.shape[1:] == (len(best.tokens), len(answer.source_tokens))
        for text, tokens in ((string, answer.source_tokens), (best.text, best.tokens)):
            assert [text[token.start : token.end] for token in tokens] == [*text, ""]
            assert [token.text for token in tokens] == [*text, "</s>"]
