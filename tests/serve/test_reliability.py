"""The table of faults in docs/reliability.md is true: each has a row, and tests where the row says."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FAULTS = range(1, 43)

ROW = re.compile(r"^\| (\d+) \| .+ \| .+ \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"^(?:async )?def test_fault_(\d+)_", re.MULTILINE)


def written() -> dict[int, list[set[str]]]:
    """Of every fault, the files that its rows name."""
    found: dict[int, list[set[str]]] = defaultdict(list)
    for number, files in ROW.findall((REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")):
        found[int(number)].append(set(re.findall(r"`(test_\w+)`", files)))
    return found


def there() -> dict[int, set[str]]:
    """Of every fault, the files with tests of its name."""
    found: dict[int, set[str]] = defaultdict(set)
    for path in REPOSITORY.glob("tests/**/test_*.py"):
        for number in TEST.findall(path.read_text(encoding="utf-8")):
            found[int(number)].add(path.stem)
    return found


def test_no_other_faults_are_told_of() -> None:
    assert set(written()) == set(there()) == set(FAULTS)


@pytest.mark.parametrize("number", FAULTS)
def test_a_fault_has_one_row_and_the_tests_that_it_names(number: int) -> None:
    assert written()[number] == [there()[number]]
    assert there()[number]
