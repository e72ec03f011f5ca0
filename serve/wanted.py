"""What a caller can ask of `serve.client.Client`, as typed keywords."""

from collections.abc import Iterable
from typing import TypedDict

from model.options import Sampling
from serve.answers import FamilyName, FloatName, ReductionName


class Which(TypedDict):
    """Which model to ask; empty as for `Client.generate`."""

    model: str
    version: str


class WantedSearch(TypedDict, total=False):
    """How to search; what is left out or None is left to the server, whose API says what each means."""

    beam_size: int | None
    hypotheses: int | None
    length_penalty: float | None
    longest: int | None
    coverage_penalty: float | None
    shortest: int | None
    prefix: str | None
    no_repeat_ngram: int | None
    suppressed: Iterable[str] | None
    sampling: Sampling | None
    shortlist: bool | None


class WantedAttention(TypedDict, total=False):
    """Which attention to return.

    Families, none by default; their layers and heads from 0, all by default; what becomes of these; and the type of the
    weights: float16 halves the bytes and keeps three digits.
    """

    families: Iterable[FamilyName]
    layers: Iterable[int]
    heads: Iterable[int]
    reduction: ReductionName
    float_type: FloatName


class Wanted(WantedSearch, WantedAttention):
    """What `Client.generate` takes."""
