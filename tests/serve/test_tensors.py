"""Tensors: bytes to elements and back, and answers of different sizes side by side."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InvalidRequestError
from model.hypotheses import Hypothesis
from serve.bundle import ServedModel
from serve.infer import Answers, infer_response, understand_batch
from serve.jobs import Decoded
from serve.tensors import pack, pack_bytes, padded, unpack_bytes
from tests.serve.inferring import request, tensors

ELEMENTS = st.lists(st.binary(max_size=6), max_size=5)


@given(ELEMENTS)
def test_elements_are_unpacked_as_they_were_packed(elements: list[bytes]) -> None:
    assert unpack_bytes(pack_bytes(elements), len(elements)) == elements


@given(ELEMENTS, st.data())
def test_no_other_number_of_bytes_is_taken(elements: list[bytes], data: st.DataObject) -> None:
    packed = pack_bytes(elements)
    longer = packed + data.draw(st.binary(min_size=1, max_size=9))
    with pytest.raises(InvalidRequestError, match="raw_input_contents: "):
        unpack_bytes(longer, len(elements))
    if packed:
        shorter = packed[: data.draw(st.integers(0, len(packed) - 1))]
        with pytest.raises(InvalidRequestError, match="raw_input_contents: element "):
            unpack_bytes(shorter, len(elements))


@given(st.binary(max_size=40), st.integers(0, 8))
def test_whatever_comes_is_unpacked_or_refused(raw: bytes, count: int) -> None:
    try:
        elements = unpack_bytes(raw, count)
    except InvalidRequestError:
        return
    assert pack_bytes(elements) == raw


def test_numbers_are_packed_row_by_row_the_lowest_byte_first() -> None:
    assert pack(np.array([[1, 256]], "<i8")) == b"\1" + bytes(8) + b"\1" + bytes(6)


def test_parts_are_filled_up_to_the_longest() -> None:
    parts = [np.ones((1, 2)), np.ones((2, 1))]
    assert padded(parts, (0, 0), "FP32", 0).tolist() == [[[1, 1], [0, 0]], [[1, 0], [1, 0]]]
    assert padded([], (2, 0), "FP32", 0).shape == (0, 2, 0)


def test_where_there_are_fewer_hypotheses_than_asked_for_the_rest_is_empty(served: ServedModel) -> None:
    """Of two texts, the first has one hypothesis of two tokens, the second two of one; a layer of two heads."""
    names = ["TEXT", "SCORE", "TARGET_LENGTH", "FINISH_REASON", "TOKENS", "CROSS_ATTENTION"]
    batch = understand_batch(served, request(["ab", "c"], names, beam_size=2, hypotheses=2))

    def hypothesis(ids: list[int], columns: int) -> Hypothesis:
        cross = np.ones((1, 2, len(ids), columns), np.float32)
        return Hypothesis(ids, [-1.0] * len(ids), -1.0, "stop", cross)

    a, end = served.target.encode("a")
    decoded = [
        Decoded(None, [hypothesis([a.id, end.id], 3)]),
        Decoded(None, [hypothesis([end.id], 2), hypothesis([a.id], 2)]),
    ]
    found = tensors(infer_response("", Answers(batch, decoded)))
    assert found["TEXT"].tolist() == [["a", ""], ["", "a"]]
    assert found["SCORE"].tolist() == [[-1, -math.inf], [-1, -1]]
    assert found["TARGET_LENGTH"].tolist() == [[2, 0], [1, 1]]
    assert found["FINISH_REASON"].tolist() == [["stop", ""], ["stop", "stop"]]
    assert found["TOKENS"].tolist() == [[["a", end.text], ["", ""]], [[end.text, ""], ["a", ""]]]
    assert found["CROSS_ATTENTION"].shape == (2, 2, 1, 2, 2, 3)
    assert found["CROSS_ATTENTION"].sum((2, 3, 4, 5)).tolist() == [[12, 0], [4, 4]]
