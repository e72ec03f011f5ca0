import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.errors import MissingExtraError
from model.picture import (
    DARK_RAMP,
    LIGHT_RAMP,
    AttentionPicture,
    How,
    draw_pixels,
    draw_png,
    figure,
    visible,
    write_atomically,
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(**changes: object) -> AttentionPicture:
    values: dict[str, Any] = {
        "family": "cross",
        "layers": (0, 2),
        "heads": (0, 1, 5),
        "rows": ("F", "OW", "</s>"),
        "columns": ("p", "h", "o", "</s>"),
        "weights": np.random.default_rng(0).dirichlet(np.ones(4), (2, 3, 3)),
    }
    values.update(changes)
    return AttentionPicture(**values)


def square(columns: tuple[str, ...], rows: tuple[str, ...] = ("a",)) -> AttentionPicture:
    weights = np.full((1, 1, len(rows), len(columns)), 1 / len(columns))
    return picture(layers=(0,), heads=(0,), rows=rows, columns=columns, weights=weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "self"}, r"family='self' is unknown: choose from encoder, decoder, cross"),
        ({"rows": ("F",)}, r"cross weights have shape \(2, 3, 3, 4\), but 2 layers, 3 heads, 1 rows and 4 columns"),
        ({"heads": ()}, r"expected the non-empty shape \[layer, head, row, column\] = \(2, 1, 3, 4\)"),
        ({"weights": np.ones((2, 3, 4, 3))}, r"cross weights have shape \(2, 3, 4, 3\)"),
        ({"rows": (), "weights": np.ones((2, 3, 0, 4))}, "0 rows and 4 columns are named: expected the non-empty"),
        ({"weights": np.full((2, 3, 3, 4), np.nan)}, "cross weights must lie between 0 and 1, got nan to nan"),
        ({"weights": np.full((2, 3, 3, 4), 1.5)}, "must lie between 0 and 1, got 1.5 to 1.5"),
        ({"weights": np.full((2, 3, 3, 4), -0.5)}, "must lie between 0 and 1, got -0.5 to -0.5"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        picture(**changes)


def test_one_not_a_number_is_enough_to_refuse() -> None:
    weights = np.full((2, 3, 3, 4), 0.25)
    weights[1, 2, 0, 3] = np.nan
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        picture(weights=weights)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_reduces_to_the_chosen_layer_and_head(how: How) -> None:
    full = picture()
    merge: Callable[..., Any] = np.mean if how == "mean" else np.max
    cases = [
        (full.reduce(2, 5, how), full.weights[1, 2]),
        (full.reduce(2, None, how), merge(full.weights[1], axis=0)),
        (full.reduce(None, 5, how), merge(full.weights[:, 2], axis=0)),
        (full.reduce(None, None, how), merge(full.weights, axis=(0, 1))),
    ]
    for found, expected in cases:
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_mean_is_still_attention() -> None:
    np.testing.assert_allclose(picture().reduce(None, None, "mean").sum(-1), 1, rtol=1e-6)


def test_float16_is_averaged_in_float32() -> None:
    weights = np.full((2, 3, 3, 4), 0.1, np.float16)
    weights[0] = np.float16(0.2001)
    mean = picture(weights=weights).reduce(None, None, "mean")
    np.testing.assert_allclose(mean, weights.astype(np.float64).mean((0, 1)), rtol=1e-6)


def test_names_what_it_holds_when_asked_for_something_else() -> None:
    with pytest.raises(
        ValueError, match="layer=1 is not in this picture, which holds 0, 2: choose one of them, or None"
    ):
        picture().reduce(1, None, "mean")
    with pytest.raises(ValueError, match="head=0 is not in this picture, which came already merged"):
        picture(heads=(), weights=np.full((2, 1, 3, 4), 0.25)).reduce(None, 0, "mean")


@pytest.mark.parametrize(
    ("layer", "head", "how", "title"),
    [
        (2, 5, "mean", "Cross-attention, layer 2, head 5"),
        (2, None, "mean", "Cross-attention, layer 2, mean of 3 heads"),
        (None, None, "max", "Cross-attention, max of 2 layers, max of 3 heads"),
    ],
)
def test_describes_the_choice(layer: int | None, head: int | None, how: How, title: str) -> None:
    assert picture().describe(layer, head, how) == title


def test_describes_what_came_merged_and_what_is_single() -> None:
    merged = picture(layers=(4,), heads=(), weights=np.full((1, 1, 3, 4), 0.25))
    assert merged.describe(None, None, "mean") == "Cross-attention, layer 4, heads merged"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("", "∅"),
        (" ", "␣"),
        ("a b", "a␣b"),
        ("\t\n\x1b\x7f", "␉␊␛␡"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("\u202e", "⟨202E⟩"),
        ("\u00a0", "⟨00A0⟩"),
        ("\u200d", "⟨200D⟩"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("\ud800", "⟨D800⟩"),
        ("▁lime", "▁lime"),
        ("石", "石"),
    ],
)
def test_makes_everything_visible(token: str, shown: str) -> None:
    assert visible(token) == shown


@pytest.mark.parametrize(("ramp", "sign"), [(LIGHT_RAMP, -1), (DARK_RAMP, 1)])
def test_lightness_alone_tells_the_colours_apart(ramp: tuple[str, ...], sign: int) -> None:
    channels = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in ramp])
    assert np.all(np.diff(channels @ [0.2126, 0.7152, 0.0722]) * sign > 15)


def test_figure_puts_the_source_along_the_top() -> None:
    full = picture()
    drawing = figure(full, 2, None, "mean")
    axes, bar = drawing.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == list(full.columns)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(full.rows)
    assert axes.xaxis.get_ticks_position() == "top"
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("source", "output", "weight")
    assert drawing.get_suptitle() == "Cross-attention, layer 2, mean of 3 heads"
    assert axes.images[0].get_clim() == (0.0, full.reduce(2, None, "mean").max())


def test_grows_with_the_tokens_and_then_thins_their_labels() -> None:
    sizes = [figure(square(("x",) * count), 0, 0, "mean").get_figwidth() for count in (10, 60, 200, 2000)]
    assert sizes == sorted(sizes)
    assert sizes[-1] < 28
    labels = figure(square(("x",) * 2000), 0, 0, "mean").axes[0].get_xticklabels()
    assert 150 < len(labels) < 300


def test_every_token_is_labelled_up_to_200() -> None:
    axes = figure(square(("token",) * 200, ("wort",) * 200), 0, 0, "mean").axes[0]
    assert (len(axes.get_xticklabels()), len(axes.get_yticklabels())) == (200, 200)
    assert float(axes.get_xticklabels()[0].get_fontsize()) >= 5


def test_writes_a_png_and_leaves_nothing_else(tmp_path: Path) -> None:
    draw_png(picture(), None, None, "max", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG_SIGNATURE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_draws_any_token_without_a_warning(tmp_path: Path) -> None:
    tokens = ("$x$", "$\\frac$", "_^{", "क", "𒀀", "\ue000", "\ud800", "אב", "🙂", "a" * 99, "\n", "")
    draw_png(square(tokens, tokens), 0, 0, "mean", tmp_path / "a.png")


def test_draws_weights_that_are_all_zero(tmp_path: Path) -> None:
    draw_png(picture(weights=np.zeros((2, 3, 3, 4))), 0, 0, "mean", tmp_path / "a.png")


def test_pixels_show_the_strongest_cell_darkest() -> None:
    weights = np.array([[[[1.0, 0.0], [0.0, 0.0]]]])
    pixels = draw_pixels(
        picture(layers=(0,), heads=(0,), rows=("a", "b"), columns=("c", "d"), weights=weights), 0, 0, "mean"
    )
    darkest = [int(LIGHT_RAMP[-1][i : i + 2], 16) for i in (1, 3, 5)]
    where = np.argwhere((pixels == darkest).all(-1))
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8
    assert len(where) > 1000


def test_says_which_extra_brings_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        MissingExtraError, match=r"drawing a PNG needs .*'matplotlib'.* pip install 'limelight\[plot\]'"
    ):
        draw_png(picture(), None, None, "mean", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_needs_no_torch_and_no_pyplot() -> None:
    script = """
import sys
import numpy as np
from model.picture import AttentionPicture, draw_pixels
import serve.page, serve.terminal
assert not {"torch", "matplotlib"} & set(sys.modules)
weights = np.ones((1, 1, 1, 1))
picture = AttentionPicture(family="cross", layers=(0,), heads=(0,), rows=("a",), columns=("b",), weights=weights)
draw_pixels(picture, None, None, "mean")
assert not {"torch", "matplotlib.pyplot"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(_: Path, __: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
