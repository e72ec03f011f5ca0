"""What callers ask of a server that is soaked: everything, in every way, some of it badly."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import grpc

from serve.pb.limelight.v1 import limelight_pb2 as pb

ENDS = {
    "good": {"OK"},
    "given up": {"OK", "CANCELLED"},
    "bad": {"INVALID_ARGUMENT", "NOT_FOUND"},
}
"""How calls of each kind may end."""

GIVEN_UP, BAD = 0.05, 0.01
"""Shares of the calls."""

FAMILIES = (pb.ATTENTION_FAMILY_ENCODER, pb.ATTENTION_FAMILY_DECODER, pb.ATTENTION_FAMILY_CROSS)


@dataclass(frozen=True)
class Texts:
    """What is asked for.

    Attributes:
        letters: of the texts.
        longest: of them, in characters.
        target: that is scored.
    """

    letters: str
    longest: int
    target: str


class Callers:
    """Any number of them.

    Args:
        texts: what they ask for.
        seed: of all that is random.

    Attributes:
        ends: how calls of each kind ended, counted.
        going: set while they ask.
        under_way: calls that have not ended.
    """

    def __init__(self, texts: Texts, seed: int) -> None:
        self._texts, self._random = texts, random.Random(seed)
        self.ends: dict[str, Counter[str]] = {kind: Counter() for kind in ENDS}
        self.going = asyncio.Event()
        self.under_way = 0

    async def until(self, stub: Any, end: float) -> None:
        """One caller: asks, one call after another, until a second of `time.monotonic`."""
        calls = (self._unary, self._stream, self._score, self._many)
        while time.monotonic() < end:
            await self.going.wait()
            self.under_way += 1
            call = self._random.choices(calls, (6, 3, 1, 1))[0]
            kind = self._random.choices(tuple(ENDS), (1 - GIVEN_UP - BAD, GIVEN_UP, BAD))[0]
            task = asyncio.create_task(call(stub, kind))
            if kind == "given up":
                await asyncio.wait((task,), timeout=self._random.expovariate(50))
                task.cancel()
            try:
                code = await task
            except asyncio.CancelledError:
                code = "CANCELLED"
            except grpc.aio.AioRpcError as error:
                code = error.code().name
            self.ends[kind][code] += 1
            self.under_way -= 1

    async def _unary(self, stub: Any, kind: str) -> str:
        await stub.Generate(pb.GenerateRequest(**self._asked(kind)), timeout=60)
        return "OK"

    async def _stream(self, stub: Any, kind: str) -> str:
        async for _ in stub.GenerateStream(pb.GenerateStreamRequest(**self._asked(kind)), timeout=60):
            pass
        return "OK"

    async def _score(self, stub: Any, kind: str) -> str:
        asked = self._asked(kind)
        del asked["search"]
        if kind == "bad":
            asked["source"] = ""
        await stub.Score(pb.ScoreRequest(target=self._texts.target, **asked), timeout=60)
        return "OK"

    async def _many(self, stub: Any, kind: str) -> str:
        items = [
            pb.GenerateManyRequest(id=str(number), request=pb.GenerateRequest(**self._asked(kind)))
            for number in range(self._random.randint(1, 20))
        ]
        codes = Counter[int]()
        async for answer in stub.GenerateMany(iter(items), timeout=60):
            codes[answer.error.code] += 1
        if codes.total() != len(items):
            return "LOST"
        names = {next(code.name for code in grpc.StatusCode if code.value[0] == number) for number in codes}
        return " and ".join(sorted(names - ENDS[kind])) or min(names)

    def _asked(self, kind: str) -> dict[str, Any]:
        letters = self._random.choices(self._texts.letters, k=self._random.randint(1, self._texts.longest))
        beam = self._random.choice((1, 1, 1, 2, 4, 8))
        search = pb.SearchOptions(beam_size=beam, hypotheses=self._random.randint(1, beam))
        families = [family for family in FAMILIES if self._random.random() < 0.3]
        asked = {
            "source": "".join(letters),
            "search": search,
            "attention": pb.AttentionOptions(families=families),
        }
        if kind == "bad":
            wrong: list[dict[str, Any]] = [
                {"source": ""},
                {"source": "x" * 100_000},
                {"search": pb.SearchOptions(beam_size=10**6)},
                {"model": "no such model"},
            ]
            asked |= self._random.choice(wrong)
        return asked
