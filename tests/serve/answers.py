"""What the client gives back, compared."""

import numpy as np

from serve.answers import Answer


def assert_same(one: Answer, other: Answer) -> None:
    assert (one.model, one.version, one.source_tokens) == (other.model, other.version, other.source_tokens)
    arrays = [(one.attention, other.attention)]
    for left, right in zip(one.hypotheses, other.hypotheses, strict=True):
        assert (left.text, left.tokens, left.score) == (right.text, right.tokens, right.score)
        assert (left.log_probability, left.finish_reason) == (right.log_probability, right.finish_reason)
        arrays.append((left.attention, right.attention))
    for held, expected in arrays:
        assert held.keys() == expected.keys()
        for family, array in expected.items():
            assert (held[family].layers, held[family].heads) == (array.layers, array.heads)
            np.testing.assert_array_equal(held[family].weights, array.weights, strict=True)
