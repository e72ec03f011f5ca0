"""Attention as a heat map in a terminal, readable with colours and without.

         p  h  o  n  e  </s>
       F ██ ▓▓ ░░                ← p 61%
     OW1    ░░ ██ ▒▒             ← o 54%

Source tokens along the top, output tokens down the side, and after each row the source token it looks at most. Where a
terminal has 256 colours or more a cell is a coloured block; elsewhere (NO_COLOR, a pipe) it is shaded with ░▒▓█.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderableType
from rich.style import Style
from rich.text import Text

from model.picture import DARK_RAMP, AttentionPicture, How, visible

_SHADES = " ░▒▓█"
_ASCII_SHADES = " .:*#"
_LONGEST_COLUMN = 12
_LONGEST_ROW = 20
_LEVELS = 64
_RAMP = np.array([Color.parse(stop).get_truecolor() for stop in DARK_RAMP], np.float64)


def heat_map(
    picture: AttentionPicture, layer: int | None, head: int | None, how: How, width: int | None = None
) -> RenderableType:
    """One matrix of a picture, to be printed by a rich console.

    Args:
        picture: the attention to show.
        layer: number of the layer to take; None merges all of them.
        head: number of the head to take; None merges all of them.
        how: how to merge.
        width: columns of the terminal to use; None takes what the console has. What does not fit beside each other is
            split into blocks below each other.

    Raises:
        ValueError: the picture has no such layer or head.
    """
    matrix = picture.reduce(layer, head, how)
    title = picture.describe(layer, head, how)
    return _HeatMap(title, picture.rows, picture.columns, matrix, width)


@dataclass(frozen=True, eq=False)
class _HeatMap:
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    matrix: Float[np.ndarray, "row column"]
    width: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = self.width or options.max_width
        coloured = console.color_system in ("256", "truecolor") and not console.no_color
        yield from _Layout.fit(self, width, options.ascii_only, coloured).lines()


@dataclass(frozen=True)
class _Layout:
    """Where everything goes: all widths in terminal cells."""

    heat: _HeatMap
    rows: list[str]
    columns: list[str]
    ascii_only: bool
    coloured: bool
    row_width: int
    column_widths: list[int]
    blocks: list[slice]

    @classmethod
    def fit(cls, heat: _HeatMap, width: int, ascii_only: bool, coloured: bool) -> "_Layout":
        rows = [_label(token, _LONGEST_ROW, ascii_only) for token in heat.rows]
        columns = [_label(token, _LONGEST_COLUMN, ascii_only) for token in heat.columns]
        row_width = max(cell_len(label) for label in rows)
        column_widths = [max(cell_len(label), 2) + 1 for label in columns]
        reading = max(column_widths) + len(" ← 100%")
        blocks = _blocks(column_widths, width - row_width - 1 - reading)
        return cls(heat, rows, columns, ascii_only, coloured, row_width, column_widths, blocks)

    def lines(self) -> Iterator[Text]:
        yield Text(self.heat.title, style="bold")
        for block in self.blocks:
            yield Text()
            yield self._header(block)
            yield from (self._row(row, block) for row in range(len(self.rows)))
        yield Text()
        yield self._legend()

    def _header(self, block: slice) -> Text:
        cells = zip(self.columns[block], self.column_widths[block], strict=True)
        names = "".join(set_cell_size(label, width) for label, width in cells)
        return Text(" " * (self.row_width + 1) + names.rstrip(), no_wrap=True)

    def _row(self, row: int, block: slice) -> Text:
        weights = self.heat.matrix[row]
        label = self.rows[row]
        line = Text(" " * (self.row_width - cell_len(label)) + label + " ", no_wrap=True)
        strongest = float(self.heat.matrix.max()) or 1.0
        for weight, width in zip(weights[block], self.column_widths[block], strict=True):
            line.append_text(self._cell(float(weight) / strongest, width))
        if block.start <= (best := int(weights.argmax())) < block.stop:
            arrow = "<-" if self.ascii_only else "←"
            line.append(f" {arrow} {self.columns[best]}", style="bold")
            line.append(f" {weights[best]:.0%}", style="dim")
        elif not self.coloured:
            line.rstrip()
        return line

    def _cell(self, share: float, width: int) -> Text:
        if self.coloured:
            return Text(" " * width, style=_background(round(share * _LEVELS)))
        shades = _ASCII_SHADES if self.ascii_only else _SHADES
        # The gap between cells keeps neighbours apart that have one shade.
        return Text(shades[round(share * (len(shades) - 1))] * (width - 1) + " ")

    def _legend(self) -> Text:
        legend = Text("0% ", style="dim")
        for step in range(5):
            legend.append_text(self._cell(step / 4, 3))
        return legend.append(f" {float(self.heat.matrix.max()):.0%}")


def _blocks(widths: Sequence[int], room: int) -> list[slice]:
    """Cut columns into runs that fit into `room`; one that is too wide for it is a run of its own."""
    starts, used = [0], 0
    for index, width in enumerate(widths):
        if used and used + width > room:
            starts.append(index)
            used = 0
        used += width
    return [slice(start, stop) for start, stop in pairwise([*starts, len(widths)])]


def _label(token: str, longest: int, ascii_only: bool) -> str:
    label = visible(token)
    if ascii_only:
        label = label.encode("ascii", "backslashreplace").decode("ascii")
    if cell_len(label) <= longest:
        return label
    return set_cell_size(label, longest - 2) + ".." if ascii_only else set_cell_size(label, longest - 1) + "…"


@cache
def _background(level: int) -> Style:
    """The colour of a weight, in `_LEVELS` parts of the strongest one: between the two nearest stops of the ramp."""
    stops = np.linspace(0, _LEVELS, len(_RAMP))
    red, green, blue = (np.interp(level, stops, channel) for channel in _RAMP.T)
    return Style(bgcolor=Color.from_rgb(red, green, blue))
