"""`limelight align`, with a model of which every link is known: it reverses strings."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from export.commands import load_decoder
from export.manifest import MANIFEST
from model.align import Link, pharaoh, word_attention
from model.errors import ConfigError, DataError
from model.pairs import Pair
from serve.cli import app
from tests.reversal import Reversal, parts

STRINGS = parts()["test"][:60]


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Options that name strings and what they are reversed."""
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{one}\t{one[::-1]}\n" for one in STRINGS), encoding="utf-8")
    return ["--tsv", str(path), "--units", "tokens"]


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    """The links of these strings, from 1 and the target first."""
    path = tmp_path / "gold"
    lines = (" ".join(f"{len(one) - place}-{place + 1}" for place in range(len(one))) for one in STRINGS)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, ["align", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def mirrored(string: str) -> str:
    return pharaoh(Link(len(string) - 1 - place, place) for place in range(len(string)))


@pytest.mark.parametrize("kind", ["bundle", "checkpoint"])
def test_the_chosen_head_links_each_letter_with_its_mirror_image(
    reversal: Reversal, kind: str, given: list[str], gold: Path
) -> None:
    model = getattr(reversal, kind)
    options = ("--gold", gold, "--first", "1", "--gold-reversed")
    chosen = run(model, *given, *options, "--choose", "--json")
    figures = json.loads(chosen.stderr)
    assert figures["aer"] < 5
    assert (figures["shift"], figures["pairs"], figures["layers"]) == (False, len(STRINGS), [0])
    lines = chosen.stdout.splitlines()
    right = sum(line == mirrored(string) for line, string in zip(lines, STRINGS, strict=True))
    assert right > 0.8 * len(STRINGS)
    heads = [part for head in figures["heads"] for part in ("--head", str(head))]
    again = run(model, *given, *options, "--layer", "0", *heads)
    assert again.stdout == chosen.stdout
    assert again.stderr.strip().startswith(f"AER {figures['aer']:.2f}  ({len(STRINGS)} pairs; --layer 0 --head ")
    shifted = run(model, *given, *options, "--shift", "--layer", "0", *heads)
    assert shifted.stderr.rstrip().endswith("--shift)")
    assert shifted.stdout != chosen.stdout


def test_what_aligns_best_is_taken_from_the_bundle(reversal: Reversal, tmp_path: Path, given: list[str]) -> None:
    bundle = shutil.copytree(reversal.bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    stored = manifest | {"alignment": {"layers": [0], "heads": [1]}}
    (bundle / MANIFEST).write_text(json.dumps(stored), encoding="utf-8")
    figures = json.loads(run(bundle, *given, "--json").stderr)
    assert (figures["layers"], figures["heads"]) == ([0], [1])
    assert run(bundle, *given).stdout == run(reversal.bundle, *given, "--layer", "0", "--head", "1").stdout
    assert json.loads(run(reversal.bundle, *given, "--json").stderr)["heads"] == [0, 1]


def test_words_of_a_whole_string_are_one(reversal: Reversal, tmp_path: Path) -> None:
    output = tmp_path / "links"
    result = run(
        reversal.bundle,
        "--limit",
        "5",
        "--part",
        "test",
        "--output",
        output,
        "--set",
        f"data.test.tsv={reversal.folder / 'test.tsv'}",
    )
    assert result.stdout == ""
    assert output.read_text(encoding="utf-8") == "0-0\n" * 5


def test_rows_of_a_real_model_sum_to_at_most_one(reversal: Reversal) -> None:
    decoder, _, _ = load_decoder(reversal.bundle, "fp32", 1, shortlist=False)
    for one in word_attention(decoder, [Pair(string, string[::-1]) for string in STRINGS[:5]], units="tokens"):
        assert (one.sum(-1) <= 1 + 1e-5).all()
        assert (one.sum(-1) > 0.5).any()


def test_what_makes_no_sense_is_refused(reversal: Reversal, tmp_path: Path, given: list[str], gold: Path) -> None:
    few = tmp_path / "few"
    few.write_text("1-1\n", encoding="utf-8")
    cases: list[tuple[tuple[str | Path, ...], type[Exception], str]] = [
        ((*given, "--choose"), ConfigError, "--choose: needs --gold"),
        ((*given, "--gold", gold, "--choose", "--head", "0"), ConfigError, "leave out --layer and --head"),
        ((*given, "--head", "2"), ConfigError, "--head 2: does not exist, there are 0 to 1"),
        (("--gold", gold), ConfigError, "--gold: belongs to given pairs"),
        ((*given, "--gold", few), DataError, "has 1 lines for 60 pairs"),
        ((*given, "--gold", gold), DataError, r"line 1: links word \d+ with \d+ \(from 0\), and there are"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            run(reversal.bundle, *arguments)
