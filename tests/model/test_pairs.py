import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from model.config import PairFiles, PairsData
from model.errors import DataError
from model.pairs import LONGEST_TOKEN, Pair, Pairs, Part, read_files, read_lines, read_pairs

Write = Callable[[str, bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file, gzip if its name says so."""

    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


def refused(path: Path, words: str) -> pytest.RaisesExc[DataError]:
    return pytest.raises(DataError, match=f"^{re.escape(f'{path}{words}')}")


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        (b"one\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),
        (b"one\n\n two \n", ["one", "", " two "]),
        ("a\u2028b\x0bc\x85d\re\n".encode(), ["a\u2028b\x0bc\x85d\re"]),
        (b"", []),
    ],
    ids=["plain", "no last end", "crlf", "bom", "later bom", "spaces", "only newlines end lines", "empty"],
)
def test_lines_are_read(write: Write, ending: str, content: bytes, lines: list[str]) -> None:
    assert list(read_lines(write("text" + ending, content))) == lines


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_two_files_are_read_line_by_line(write: Write, ending: str) -> None:
    source, target = write("source" + ending, b"a b\n\xc3\xa9\n"), write("target", b"A B\r\nE\r\n")
    assert read_files(PairFiles(source=source, target=target)) == [Pair("a b", "A B"), Pair("é", "E")]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [((0, 1), [("a", "b"), ("d", "e")]), ((2, 0), [("c", "a"), ("f ", "d")]), ((1, 1), [("b", "b"), ("e", "e")])],
    ids=str,
)
def test_columns_of_a_table_are_read(
    write: Write, ending: str, columns: tuple[int, int], expected: list[tuple[str, str]]
) -> None:
    path = write("pairs.tsv" + ending, b"\xef\xbb\xbfa\tb\tc\r\nd\te\tf \tmore\r\n")
    assert read_files(PairFiles(tsv=path, columns=columns)) == [Pair(*pair) for pair in expected]


@pytest.mark.parametrize(("sources", "targets"), [(2, 3), (3, 2), (0, 1)])
def test_files_of_different_lengths_are_refused(write: Write, sources: int, targets: int) -> None:
    source, target = write("source", b"a\n" * sources), write("target", b"b\n" * targets)
    words = f" has {sources} lines and {target} has {targets}: line-aligned files need equally many"
    with refused(source, words):
        read_files(PairFiles(source=source, target=target))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_bytes_that_are_not_utf8_are_refused_with_their_place(write: Write, ending: str) -> None:
    path = write("text" + ending, "fine\ncafé\n".encode("latin-1"))
    words = ", line 2: not valid utf-8 (byte 4 is 0xe9); convert the file first, for example with iconv"
    with refused(path, words):
        list(read_lines(path))


def test_a_token_is_at_most_as_long_as_the_limit(write: Write) -> None:
    longest = "x" * LONGEST_TOKEN
    assert list(read_lines(write("fine", f"{longest} {longest}\n".encode()))) == [f"{longest} {longest}"]
    path = write("long", f"a\n{longest}x b\n".encode())
    with refused(path, f", line 2: a token of {LONGEST_TOKEN + 1} characters, the limit is {LONGEST_TOKEN}; is this"):
        list(read_lines(path))


@pytest.mark.parametrize(("columns", "line", "count"), [((0, 1), b"c", 1), ((1, 2), b"c\td", 2), ((2, 0), b"c d", 1)])
def test_a_line_of_too_few_columns_is_refused(write: Write, columns: tuple[int, int], line: bytes, count: int) -> None:
    path = write("pairs.tsv", b"a\tb\tc\n" + line + b"\n")
    words = f", line 2: {count} columns, but columns={columns} are asked for (from 0)"
    with refused(path, words):
        read_files(PairFiles(tsv=path, columns=columns))


@pytest.mark.parametrize("name", ["absent", "absent.gz"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with refused(tmp_path / name, ": no such file"):
        list(read_lines(tmp_path / name))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with refused(tmp_path, ": cannot be read: "):
        list(read_lines(tmp_path))


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def altered(content: bytes) -> bytes:
    return content[:20] + bytes(255 - byte for byte in content[20:40]) + content[40:]


def wrong_sum(content: bytes) -> bytes:
    return content[:-8] + b"\0" * 4 + content[-4:]


@pytest.mark.parametrize("damage", [cut, altered, wrong_sum, gzip.decompress])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "text.gz"
    lines = "".join(f"{number * number} is the square of {number}\n" for number in range(999))
    path.write_bytes(damage(gzip.compress(lines.encode())))
    with refused(path, ": cannot be read: "):
        list(read_lines(path))


PARTS: tuple[Part, ...] = get_args(Part)


def pairs_data(path: Path, **parts: PairFiles) -> PairsData:
    files = PairFiles(tsv=path)
    return PairsData.model_validate({"kind": "pairs", "train": files, "validation": files, **parts})


def test_empty_pairs_are_left_out_and_counted(write: Write) -> None:
    path = write("pairs.tsv", b"a\tb\n\n \t \nc\t\n\td\n\t\ne\t f\n")
    assert read_pairs(pairs_data(path), "train") == Pairs([Pair("a", "b"), Pair("e", " f")], 5)


@pytest.mark.parametrize(("content", "read"), [(b"", 0), (b"\n \t \na\t\n", 3)], ids=["empty", "all empty"])
@pytest.mark.parametrize("part", ["train", "validation"])
def test_data_without_a_pair_is_refused(write: Write, part: Part, content: bytes, read: int) -> None:
    words = f"data of kind 'pairs', part '{part}': no pairs are left of the {read} read"
    with pytest.raises(DataError, match=f"^{re.escape(words)}"):
        read_pairs(pairs_data(write("pairs.tsv", content)), part)


def test_each_part_has_its_files(write: Write) -> None:
    parts = {part: PairFiles(tsv=write(f"{part}.tsv", f"{part}\tx\n".encode())) for part in PARTS}
    data = PairsData.model_validate({"kind": "pairs", **parts})
    assert {part: read_pairs(data, part).pairs for part in parts} == {part: [Pair(part, "x")] for part in parts}


def test_a_part_that_is_not_configured_is_refused(write: Write) -> None:
    words = "data.test is not configured: add [data.test] with source and target, or tsv"
    with pytest.raises(DataError, match=re.escape(words)):
        read_pairs(pairs_data(write("pairs.tsv", b"a\tb\n")), "test")


@pytest.mark.parametrize("tested", [False, True])
def test_more_pairs_are_learnt_but_none_of_a_source_that_is_scored(write: Write, tested: bool) -> None:
    data = PairsData(
        kind="pairs",
        train=PairFiles(tsv=write("train.tsv", b"a\tx\nb\ty\n")),
        validation=PairFiles(tsv=write("validation.tsv", b"b\ty\nc\tz\n")),
        test=PairFiles(tsv=write("test.tsv", b"d\tw\n")) if tested else None,
        extra=PairFiles(tsv=write("extra.tsv.gz", b"c\tz\nd\tw\ne\tv\n\tu\n")),
    )
    more = [Pair("e", "v")] if tested else [Pair("d", "w"), Pair("e", "v")]
    learnt = Pairs([Pair("a", "x"), Pair("b", "y"), *more], empty=1, withheld=3 - len(more))
    assert read_pairs(data, "train") == learnt
    assert read_pairs(data, "validation").pairs == [Pair("b", "y"), Pair("c", "z")]
