"""`docs/deployment.md`, as the tests read it."""

import re
import shlex

from tests.deploy.manifests import REPOSITORY

PAGE = REPOSITORY / "docs" / "deployment.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Contents of the blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The words of each command."""
    return [
        shlex.split(line[2:]) for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")
    ]


def hardening() -> list[str]:
    """The options of `docker run` that take rights from the container, not those that say which and where it is."""
    (command,) = (words for words in commands() if words[:2] == ["docker", "run"])
    options = command[2:-1]
    for name in ("--name", "--publish", "--volume"):
        at = options.index(name)
        del options[at : at + 2]
    options.remove("--detach")
    return options
