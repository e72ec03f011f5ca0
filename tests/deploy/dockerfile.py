"""The Dockerfile, as the tests read it."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from tests.deploy.manifests import REPOSITORY


class Step(NamedTuple):
    """An instruction, and what stands behind it."""

    name: str
    rest: str


@cache
def steps() -> tuple[Step, ...]:
    """All of them, in order, each on one line."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    return tuple(Step(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip())


def last_stage() -> list[Step]:
    """What the image is, without how it is built."""
    begins = [number for number, step in enumerate(steps()) if step.name == "FROM"]
    return list(steps()[begins[-1] :])


def given(name: str) -> str:
    """What stands behind the only instruction of a name in the image's own stage."""
    (found,) = (step.rest for step in last_stage() if step.name == name)
    return found


def words(name: str) -> list[str]:
    """The words of an instruction in its exec form, which no shell stands before."""
    found = json.loads(given(name))
    assert isinstance(found, list)
    return found


def environment() -> dict[str, str]:
    """The variables that the image sets."""

    def pairs() -> Iterator[Any]:
        yield from (word.split("=", maxsplit=1) for word in shlex.split(given("ENV")))

    return dict(pairs())
