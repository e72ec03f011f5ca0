"""How a request of our own API may end, read from what the API promises and not from what the server does.

This is the other half of a differential test: whatever a message has become, by rights it is answered, or refused with
one of a few codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from google.protobuf.message import Message

from bench.fuzz.subject import SPARE_ENTRY, SPARE_VERSION, VERSIONS, Subject
from model.tokenizer import Tokenizer
from model.vocabulary import END, UNKNOWN
from serve.pb.limelight.v1 import limelight_pb2 as pb

Codes = frozenset[str]

OK, INVALID, NOT_FOUND, LATE = "OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"

CHARACTERS = 64
"""Of a text, for each token that it may have: with more it is refused untold how many tokens it has."""

MOST_SUPPRESSED, LONGEST_ID, LARGEST_BEAM = 256, 256, 16


@dataclass
class Faults:
    """What is wrong with a request, by the codes that it may be refused with.

    Attributes:
        sure: there is no way round being refused with one of these.
        maybe: it may be, or not.
    """

    sure: set[str] = field(default_factory=set)
    maybe: set[str] = field(default_factory=set)

    def unless(self, right: bool, code: str = INVALID) -> bool:
        """Something that must be right; returns whether it is."""
        if not right:
            self.sure.add(code)
        return right

    @property
    def codes(self) -> Codes:
        """All that it may end with."""
        return frozenset(self.maybe | (self.sure or {OK}))


def has_unknown_fields(message: Message) -> bool:
    """Somewhere in a message is a field that its type does not have."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    return known.ByteSize() != message.ByteSize()


class Judge:
    """Judges requests of `limelight.v1`.

    Args:
        subject: what is asked.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._limits, self._attention = subject.manifest.limits, subject.manifest.attention

    def generate(self, request: Any) -> Codes:
        """Of a text to answer."""
        faults = self._asked(request)
        self.search(faults, request.search)
        return faults.codes

    def item(self, request: pb.GenerateManyRequest) -> Codes:
        """Of one of many."""
        faults = self._asked(request.request)
        self.search(faults, request.request.search)
        faults.unless(not has_unknown_fields(request))
        faults.unless(len(request.id) <= LONGEST_ID)
        return faults.codes

    def score(self, request: pb.ScoreRequest) -> Codes:
        """Of a pair to score."""
        faults = self._asked(request)
        self.text(faults, request.target, self._subject.target, self._limits.longest_target)
        faults.unless(not request.HasField("length_penalty") or 0 <= request.length_penalty <= 10)
        return faults.codes

    def describe(self, request: pb.GetModelRequest) -> Codes:
        """Of a model to describe."""
        faults = Faults()
        self._which(faults, request)
        faults.unless(not has_unknown_fields(request))
        return faults.codes

    def plain(self, request: Message) -> Codes:
        """Of what has no fields."""
        return frozenset({INVALID if has_unknown_fields(request) else OK})

    def entry(self, request: Any) -> Codes:
        """Of an entry of the model folder to load or unload."""
        faults = Faults()
        self.entry_name(faults, request.name)
        faults.unless(not has_unknown_fields(request))
        return faults.codes

    def entry_name(self, faults: Faults, name: str) -> None:
        """It is the entry that comes and goes, or no path and not there."""
        parts = PurePosixPath(name).parts
        leads_on = not parts or ".." in parts or "/".join(parts) != name or "\0" in name or "\\" in name
        if faults.unless(not leads_on):
            faults.unless(name == SPARE_ENTRY, NOT_FOUND)

    def _asked(self, request: Any) -> Faults:
        """What all requests with a text share."""
        faults = Faults()
        self._which(faults, request)
        faults.unless(not has_unknown_fields(request))
        self.text(faults, request.source, self._subject.source, self._limits.longest_source)
        self.attention(faults, request.attention)
        return faults

    def _which(self, faults: Faults, request: Any) -> None:
        if request.model in ("", self._subject.name) and request.version == SPARE_VERSION:
            faults.maybe.add(NOT_FOUND)
        else:
            served = request.model in ("", self._subject.name) and request.version in ("", *VERSIONS)
            faults.unless(served, NOT_FOUND)

    @staticmethod
    def text(faults: Faults, text: str, tokenizer: Tokenizer, longest: int) -> int:
        """It is not empty, and not too long; returns its tokens, the end token among them."""
        if not (faults.unless(bool(text.strip())) and faults.unless(len(text) <= CHARACTERS * longest)):
            return 0
        tokens = len(tokenizer.encode(text))
        faults.unless(1 < tokens <= longest)
        return tokens

    def search(self, faults: Faults, asked: pb.SearchOptions) -> None:
        """Every number is in its range, and they go together."""

        def given(name: str, default: Any) -> Any:
            return getattr(asked, name) if asked.HasField(name) else default  # type: ignore[arg-type]

        beam, longest = given("beam_size", 1), given("longest", self._limits.longest_target)
        shortest, repeats = given("shortest", 1), given("no_repeat_ngram", 0)
        faults.unless(1 <= beam <= LARGEST_BEAM)
        faults.unless(1 <= given("hypotheses", 1) <= beam)
        faults.unless(0 <= given("length_penalty", 1.0) <= 10)
        faults.unless(0 <= given("coverage_penalty", 0.0) <= 10)
        faults.unless(1 <= longest <= self._limits.longest_target)
        faults.unless(1 <= shortest <= longest)
        faults.unless(repeats >= 0)
        if asked.prefix:
            self._prefix(faults, asked.prefix, longest)
        suppressed = self._suppressed(faults, asked.suppressed)
        if asked.HasField("sampling"):
            faults.unless(beam == 1)
            self._sampling(faults, asked.sampling)
        if asked.shortlist:
            faults.unless(self._subject.shortlist and not asked.prefix)
        ruled_out = suppressed + (longest if repeats else 0) + (shortest > 1)
        if ruled_out >= self._choices(asked):  # nothing may be left to choose
            faults.maybe.add(INVALID)

    def _choices(self, asked: pb.SearchOptions) -> int:
        """Tokens that can be chosen at a step, padding and begin left out."""
        shortlist = self._subject.manifest.graphs["fp32"].shortlist
        return (shortlist.size if asked.shortlist and shortlist else len(self._subject.target)) - 2

    def _prefix(self, faults: Faults, prefix: str, longest: int) -> None:
        tokens = self.text(faults, prefix, self._subject.target, self._limits.longest_target)
        faults.unless(tokens <= longest)
        if tokens:
            faults.unless(all(token.id != UNKNOWN for token in self._subject.target.encode(prefix)))

    def _suppressed(self, faults: Faults, tokens: Sequence[str]) -> int:
        ids = {self._subject.target.token_id(token) for token in tokens}
        faults.unless(None not in ids and END not in ids and len(ids) <= MOST_SUPPRESSED)
        return len(ids)

    @staticmethod
    def _sampling(faults: Faults, asked: pb.Sampling) -> None:
        faults.unless(not asked.HasField("temperature") or 0.01 <= asked.temperature <= 100)
        faults.unless(asked.top_k >= 0 and asked.seed >= 0)
        if asked.HasField("top_p"):
            faults.unless(0 < asked.top_p <= 1)
            if asked.top_p < 1e-5:  # so little that it may be none
                faults.maybe.add(INVALID)

    def attention(self, faults: Faults, asked: pb.AttentionOptions) -> None:
        """What is asked for is there, and asked for once."""
        names = {1: "encoder", 2: "decoder", 3: "cross"}
        faults.unless(asked.reduction in range(4) and asked.float_type in range(3))
        faults.unless(bool(asked.families) or not (asked.layers or asked.heads))
        if not faults.unless(all(number in names for number in asked.families)):
            return
        shapes = [self._attention.get(names[number]) for number in asked.families]  # type: ignore[call-overload]
        if not faults.unless(None not in shapes):
            return
        for chosen, kind in ((asked.families, ""), (asked.layers, "layers"), (asked.heads, "heads")):
            faults.unless(len(set(chosen)) == len(chosen))
            most = min((getattr(shape, kind) for shape in shapes), default=0) if kind else math.inf
            faults.unless(all(0 <= number < most for number in chosen))
