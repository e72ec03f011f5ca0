"""Attention as a picture: weights, the tokens they belong to, one matrix of them on request, and a drawing of it.

            source tokens (columns, the keys)
           ┌──────────────────────────────┐
    output │ weights[layer, head, r, c]:  │   every head of every layer is kept;
    tokens │ how much row r looks at c    │   which ones to look at, or how to merge
    (rows) └──────────────────────────────┘   them, is chosen when it is drawn

Torch-free, and matplotlib is imported only to draw.
"""

import os
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Float, UInt8

from model.errors import MissingExtraError

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

How = Literal["mean", "max"]
"""How several layers or heads become one: the mean keeps rows that sum to 1, the maximum keeps rare strong links."""

LIGHT_RAMP = ("#fdfdf9", "#e3eebf", "#a5cd6c", "#4f9444", "#1c5b36", "#0b3022")
"""Colours from weight 0 to the strongest, on a light ground. Lightness alone tells them apart."""
DARK_RAMP = ("#171b19", "#1f3f33", "#2f7048", "#6ca646", "#bfda5b", "#f7ffbf")
"""Colours from weight 0 to the strongest, on a dark ground."""

_FONTS = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei")
_TOLERANCE = 1e-3  # what float16 can add to a weight of 1


class Family(NamedTuple):
    """How to name one kind of attention and its axes."""

    title: str
    rows: str
    columns: str


FAMILIES = {
    "encoder": Family("Encoder self-attention", "source", "source"),
    "decoder": Family("Decoder self-attention", "output", "output so far"),
    "cross": Family("Cross-attention", "output", "source"),
}
"""The three kinds of attention of an encoder-decoder Transformer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionPicture:
    """The attention of one family for one pair of texts.

    Attributes:
        family: "encoder", "decoder" or "cross".
        layers: layer numbers of axis 0, counted from 0; empty where the layers came already merged into one.
        heads: head numbers of axis 1, counted from 0; empty where the heads came already merged into one.
        rows: token of each row, the one that looks: output tokens for decoder and cross.
        columns: token of each column, the one looked at.
        weights: how much each row looks at each column, from 0 to 1.

    Raises:
        ValueError: an unknown family, an empty axis, labels that do not fit the weights, or weights that are none.
    """

    family: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    weights: Float[np.ndarray, "layer head row column"]

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} is unknown: choose from {', '.join(FAMILIES)}")
        labelled = (len(self.layers) or 1, len(self.heads) or 1, len(self.rows), len(self.columns))
        if self.weights.shape != labelled or not self.weights.size:
            raise ValueError(
                f"{self.family} weights have shape {self.weights.shape}, but {len(self.layers)} layers, "
                f"{len(self.heads)} heads, {len(self.rows)} rows and {len(self.columns)} columns are named: expected "
                f"the non-empty shape [layer, head, row, column] = {labelled}"
            )
        low, high = float(self.weights.min()), float(self.weights.max())
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # written so that NaN fails it
            raise ValueError(f"{self.family} weights must lie between 0 and 1, got {low:g} to {high:g}")

    def reduce(self, layer: int | None, head: int | None, how: How) -> Float[np.ndarray, "row column"]:
        """One matrix out of all layers and heads, as float32.

        Args:
            layer: number of the layer to take; None merges all of them.
            head: number of the head to take; None merges all of them.
            how: how to merge.

        Raises:
            ValueError: the picture has no such layer or head.
        """
        weights = self.weights
        if layer is not None:
            weights = weights[[_index("layer", layer, self.layers)]]
        if head is not None:
            weights = weights[:, [_index("head", head, self.heads)]]
        weights = weights.astype(np.float32)
        return np.asarray(weights.mean((0, 1)) if how == "mean" else weights.max((0, 1)))

    def describe(self, layer: int | None, head: int | None, how: How) -> str:
        """A title for one matrix, such as "Cross-attention, layer 2, mean of 4 heads"."""
        parts = (_part("layer", layer, self.layers, how), _part("head", head, self.heads, how))
        return ", ".join((FAMILIES[self.family].title, *parts))


def visible(token: str) -> str:
    """A token with everything made visible that would not print: spaces, control characters, lone combining marks."""
    if not token:
        return "∅"
    text = "".join(_visible(character, alone=len(token) == 1) for character in token)
    return f"◌{text}" if unicodedata.category(token[0]).startswith("M") else text


def figure(picture: AttentionPicture, layer: int | None, head: int | None, how: How) -> "matplotlib.figure.Figure":
    """Draw one matrix, its source along the top; nothing of pyplot's global state is touched.

    Args:
        picture: what to draw.
        layer: number of the layer to take; None merges all of them.
        head: number of the head to take; None merges all of them.
        how: how to merge.

    Returns:
        A figure that grows with the tokens, up to some 25 inches; labels are thinned where there are still too many.

    Raises:
        ValueError: the picture has no such layer or head.
        MissingExtraError: matplotlib is not installed.
    """
    matrix = picture.reduce(layer, head, how)
    cell = min(max(12 / max(matrix.shape), 0.12), 0.42, 24 / max(matrix.shape))
    drawing = _matplotlib("figure").Figure(figsize=_inches(picture, cell), dpi=144, layout="compressed")
    axes = drawing.add_subplot()
    ramp = _matplotlib("colors").LinearSegmentedColormap.from_list("limelight", LIGHT_RAMP)
    image = axes.imshow(matrix, cmap=ramp, vmin=0.0, vmax=float(matrix.max()) or 1.0, interpolation="nearest")
    tall = min(1.0, 5 / drawing.get_figheight())
    bar = drawing.colorbar(image, ax=axes, shrink=tall, anchor=(0, 1), aspect=24, pad=0.02, label="weight")
    bar.outline.set_visible(False)
    drawing.suptitle(picture.describe(layer, head, how), fontsize=11)
    _label(axes, picture, cell)
    return cast("matplotlib.figure.Figure", drawing)


def draw_png(picture: AttentionPicture, layer: int | None, head: int | None, how: How, path: Path) -> None:
    """Write `figure` as a PNG file, whole or not at all.

    Raises:
        ValueError: the picture has no such layer or head.
        MissingExtraError: matplotlib is not installed.
    """
    drawing, content = figure(picture, layer, head, how), BytesIO()
    with _missing_glyphs_allowed():
        drawing.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def draw_pixels(
    picture: AttentionPicture, layer: int | None, head: int | None, how: How
) -> UInt8[np.ndarray, "height width 3"]:
    """`figure` as red, green and blue pixels, for TensorBoard's `add_image(..., dataformats="HWC")`.

    Raises:
        ValueError: the picture has no such layer or head.
        MissingExtraError: matplotlib is not installed.
    """
    drawing = figure(picture, layer, head, how)
    canvas = _matplotlib("backends.backend_agg").FigureCanvasAgg(drawing)
    with _missing_glyphs_allowed():
        canvas.draw()
    return np.array(canvas.buffer_rgba(), np.uint8)[..., :3]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that a reader sees whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _matplotlib(module: str) -> ModuleType:
    try:
        return import_module(f"matplotlib.{module}")
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "drawing a PNG") from None


@contextmanager
def _missing_glyphs_allowed() -> Iterator[None]:
    # A script that no installed font has is drawn as boxes; that must not end a training run with warnings as errors.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font", category=UserWarning)
        yield


def _index(name: str, number: int, numbers: tuple[int, ...]) -> int:
    if number not in numbers:
        held = f"holds {', '.join(map(str, numbers))}" if numbers else "came already merged"
        raise ValueError(f"{name}={number} is not in this picture, which {held}: choose one of them, or None for all")
    return numbers.index(number)


def _part(name: str, number: int | None, numbers: tuple[int, ...], how: How) -> str:
    if number is None and not numbers:
        return f"{name}s merged"
    if number is None and len(numbers) > 1:
        return f"{how} of {len(numbers)} {name}s"
    return f"{name} {numbers[0] if number is None else number}"


def _visible(character: str, *, alone: bool) -> str:
    code, category = ord(character), unicodedata.category(character)
    if code <= 0x20 or code == 0x7F:
        return "␣" if code == 0x20 else "␡" if code == 0x7F else chr(0x2400 + code)
    if character in "\u200c\u200d" and not alone:
        return character  # joiners shape their neighbours in Indic scripts and emoji
    return f"⟨{code:04X}⟩" if category in ("Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co", "Cn") else character


def _shorten(token: str) -> str:
    text = visible(token)
    return text if len(text) <= 16 else f"{text[:15]}…"


def _inches(picture: AttentionPicture, cell: float) -> tuple[float, float]:
    longest_row = max(len(_shorten(token)) for token in picture.rows)
    longest_column = max(len(_shorten(token)) for token in picture.columns)
    width = len(picture.columns) * cell + longest_row * 0.09 + 1.6
    height = len(picture.rows) * cell + longest_column * 0.09 + 1.0
    return max(width, 4.2), max(height, 2.4)


def _label(axes: "matplotlib.axes.Axes", picture: AttentionPicture, cell: float) -> None:
    installed = {font.name for font in _matplotlib("font_manager").fontManager.ttflist}
    fonts = [name for name in _FONTS if name in installed]
    step, size = ceil(0.115 / cell), min(max(cell * 72 * 0.55, 5.5), 10)
    columns, rows = ([_shorten(token) for token in side[::step]] for side in (picture.columns, picture.rows))
    level = max(map(len, columns)) * size * 0.6 / 72 < cell * step
    # Tokens are not mathematics: without parse_math=False a "$" in one of them would be read as TeX.
    style: dict[str, Any] = {"fontsize": size, "family": fonts, "parse_math": False}
    axes.set_xticks(range(0, len(picture.columns), step), columns, rotation=0 if level else 90, **style)
    axes.set_yticks(range(0, len(picture.rows), step), rows, **style)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(FAMILIES[picture.family].columns, fontsize=9, color="#666666")
    axes.set_ylabel(FAMILIES[picture.family].rows, fontsize=9, color="#666666")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=2, color="#999999")
    axes.spines[:].set(color="#dddddd", linewidth=0.5)
