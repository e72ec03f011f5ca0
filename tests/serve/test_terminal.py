import io
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pytest
from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console

from model.picture import AttentionPicture
from serve.terminal import heat_map


def picture(
    rows: tuple[str, ...], columns: tuple[str, ...], weights: Sequence[Sequence[float]] | None = None
) -> AttentionPicture:
    drawn = np.random.default_rng(0).dirichlet(np.ones(len(columns)) / 4, len(rows))
    shaped = np.array(drawn if weights is None else weights, np.float32)[None, None]
    return AttentionPicture(family="cross", layers=(1,), heads=(3,), rows=rows, columns=columns, weights=shaped)


def printed(
    shown: AttentionPicture, width: int | None = None, encoding: str = "utf-8", environ: Mapping[str, str] | None = None
) -> list[str]:
    """What a console of 80 columns that is no terminal prints."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    console = Console(file=stream, width=80, _environ=environ or {}, force_terminal=environ is not None)
    console.print(heat_map(shown, 1, 3, "mean", width))
    return raw.getvalue().decode(encoding).splitlines()


def test_without_colours_it_is_shaded_and_says_where_each_row_looks() -> None:
    shown = picture(("o", "n", "</s>"), ("n", "o", "</s>"), [[0.1, 0.6, 0.3], [0.8, 0.2, 0], [0, 0, 1]])
    assert printed(shown) == [
        "Cross-attention, layer 1, head 3",
        "",
        "     n  o  </s>",
        "   o    ▒▒ ░░░░  ← o 60%",
        "   n ▓▓ ░░       ← n 80%",
        "</s>       ████  ← </s> 100%",
        "",
        "0%    ░░ ▒▒ ▓▓ ██  100%",
    ]


def test_no_color_is_obeyed() -> None:
    lines = printed(picture(("a",), ("b",)), environ={"NO_COLOR": "1", "TERM": "xterm-256color"})
    assert any("██" in line for line in lines)
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", "\n".join(lines))


@pytest.mark.parametrize(
    ("color_system", "expected"), [("truecolor", ColorSystem.TRUECOLOR), ("256", ColorSystem.EIGHT_BIT)]
)
def test_with_colours_the_background_brightens_with_the_weight(
    color_system: Literal["truecolor", "256"], expected: ColorSystem
) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=color_system, _environ={})
    assert console._color_system == expected
    shown = picture(("a",), ("b", "c", "d", "e"), [[0, 0.2, 0.3, 0.5]])
    lines = console.render_lines(heat_map(shown, 1, 3, "mean"))
    backgrounds = [s.style.bgcolor.get_truecolor() for s in lines[3] if s.style and s.style.bgcolor]
    brightness = [sum(colour) for colour in backgrounds]
    assert len(brightness) == 4
    assert brightness == sorted(set(brightness))
    assert not re.search("[░▒▓█]", "".join(segment.text for line in lines for segment in line))


def test_sixteen_colours_are_too_few_for_a_ramp() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system="standard", _environ={})
    console.print(heat_map(picture(("a",), ("b",)), 1, 3, "mean"))
    assert "██" in stream.getvalue()


def test_coloured_rows_keep_all_their_cells_in_every_block() -> None:
    console = Console(file=io.StringIO(), width=40, force_terminal=True, color_system="truecolor", _environ={})
    shown = picture(("a", "b"), tuple("abcdefghijklmnopqrstuvwxyz"))
    lines = console.render_lines(heat_map(shown, 1, 3, "mean", 40), pad=False)
    cells = [segment for line in lines[:-1] for segment in line if segment.style and segment.style.bgcolor]
    assert len(cells) == 2 * 26


def test_wide_labels_keep_the_columns_straight() -> None:
    lines = printed(picture(("ラ", "Ix"), ("石", "灰", "b"), [[0, 0, 1], [0, 0, 1]]))
    header, first, second = lines[2:5]
    assert header == "   石 灰 b"
    assert first == "ラ       ██  ← b 100%"
    assert second == "Ix       ██  ← b 100%"
    assert cell_len(header[: header.index("b")]) == cell_len(first[: first.index("█")]) == 9


@pytest.mark.parametrize("width", [30, 47, 80])
def test_splits_into_blocks_that_fit(width: int) -> None:
    rows, columns = tuple(f"r{i}" for i in range(6)), tuple(f"c{i}" for i in range(40))
    shown = picture(rows, columns)
    lines = printed(shown, width)
    assert max(cell_len(line) for line in lines[2:]) <= width
    headers = [line.split() for line in lines if line.strip().startswith("c")]
    assert [name for header in headers for name in header] == list(columns)
    for row, token in enumerate(rows):
        arrows = [line for line in lines if line.startswith(token) and "←" in line]
        best = int(shown.weights[0, 0, row].argmax())
        assert len(arrows) == 1
        assert f"← c{best} " in arrows[0]


def test_takes_the_width_of_the_console_by_default() -> None:
    lines = printed(picture(("a",), ("token",) * 40))
    assert len([line for line in lines if "token token" in line]) > 1
    assert max(map(cell_len, lines)) <= 80


def test_a_terminal_that_is_far_too_narrow_gets_a_column_a_block() -> None:
    lines = printed(picture(("a",), ("long", "longer", "longest")), width=5)
    assert [line.strip() for line in lines if line.strip().startswith("long")] == ["long", "longer", "longest"]


def test_shortens_labels_that_are_too_long() -> None:
    lines = printed(picture(("y" * 50,), ("x" * 50,)))
    assert lines[2].strip() == "x" * 11 + "…"
    assert lines[3].startswith("y" * 19 + "… ")


def test_markup_and_invisible_characters_are_shown_as_they_are() -> None:
    text = "\n".join(printed(picture(("[b]", "[/]", ":smile:"), (" ", "\x1b[31m", "[red]", "\u202e"))))
    for shown in ("[b]", "[/]", ":smile:", "␣", "␛[31m", "[red]", "⟨202E⟩"):
        assert shown in text
    assert "\x1b" not in text


def test_an_encoding_without_blocks_gets_ascii() -> None:
    lines = printed(picture(("é",), ("石", "b" * 20), [[0.2, 0.8]]), encoding="cp1252")
    text = "\n".join(lines)
    assert text.isascii()
    assert "\\u77f3 bbbbbbbbbb.." in text
    assert "<- bbbbbbbbbb.. 80%" in text
    assert "\\xe9" in text


def test_refuses_a_head_that_is_not_there_at_once() -> None:
    with pytest.raises(ValueError, match="head=0 is not in this picture, which holds 3"):
        heat_map(picture(("a",), ("b",)), 1, 0, "mean")


def test_weights_that_are_all_zero_are_drawn() -> None:
    assert printed(picture(("a",), ("b",), [[0.0]]))[3].endswith("← b 0%")
