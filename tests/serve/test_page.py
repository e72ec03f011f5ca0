import base64
import html
import json
import re
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from matplotlib.image import imread

from model.picture import LIGHT_RAMP, AttentionPicture, How, visible
from serve.page import render_page, write_page

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "</script><script>document.body.dataset.error='broke out'</script><!--"


def picture(**changes: object) -> AttentionPicture:
    values: dict[str, Any] = {
        "family": "cross",
        "layers": (0, 1),
        "heads": (0, 1, 2),
        "rows": ("F", "OW", "N", "IY", "</s>"),
        "columns": (*"phonet", "</s>"),
    }
    values.update(changes)
    sizes = (len(values["layers"]) or 1, len(values["heads"]) or 1, len(values["rows"]))
    weights = np.random.default_rng(0).dirichlet(np.ones(len(values["columns"])) / 2, sizes)
    return AttentionPicture(**{"weights": weights.astype(np.float32)} | values)


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return cast("dict[str, Any]", json.loads(found[1]))


def test_weights_come_back_to_four_decimals() -> None:
    full = picture()
    values = embedded(render_page("t", "a", [full], {}))["pictures"][0]
    weights = np.frombuffer(base64.b64decode(values["weights"]), "<u2").reshape(full.weights.shape) / 65535
    difference = np.abs(weights - full.weights).max()
    assert difference <= 0.5 / 65535 + 1e-9, difference
    assert values["rows"] == list(full.rows)
    assert values["columns"] == list(full.columns)
    assert (values["layers"], values["heads"]) == ([0, 1], [0, 1, 2])


def test_zero_and_one_are_exact_and_rounding_errors_are_cut_off() -> None:
    weights = np.array([[[[0.0, 1.0, 1.0005, -0.0005]]]])
    shown = picture(layers=(0,), heads=(0,), rows=("a",), columns=tuple("bcde"), weights=weights)
    values = embedded(render_page("t", "a", [shown], {}))["pictures"][0]
    assert np.frombuffer(base64.b64decode(values["weights"]), "<u2").tolist() == [0, 65535, 65535, 0]


def test_a_weight_takes_under_three_bytes() -> None:
    tokens = tuple("x" * 100)
    full = picture(rows=tokens, columns=tokens)
    empty = len(files("serve").joinpath("page.html").read_bytes())
    assert len(render_page("t", "a", [full], {})) < empty + 3 * full.weights.size


def test_nothing_comes_from_elsewhere() -> None:
    page = render_page("t", "a", [picture()], {})
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|\bsrc=|@import|url\(", page)


def test_no_text_can_leave_its_place() -> None:
    shown = picture(rows=(HOSTILE, "a", "b", "c", "d"))
    page = render_page(HOSTILE, HOSTILE, [shown], {HOSTILE: HOSTILE}, source=HOSTILE)
    plain = render_page("t", "a", [picture()], {"n": "v"}, source="s")
    assert page.count("</script") == plain.count("</script")
    assert "<!--" not in page
    assert embedded(page)["pictures"][0]["rows"][0] == visible(HOSTILE)
    assert page.count(html.escape(HOSTILE)) == 6


def test_places_are_filled_once() -> None:
    page = render_page("{{data}}", "{{answer}} {{details}}", [picture()], {"{{title}}": "\\1 \\g<0>"})
    assert '<h1 dir="auto">{{data}}</h1>' in page
    assert "{{answer}} {{details}}</p>" in page
    assert "<dt>{{title}}</dt><dd>\\1 \\g&lt;0&gt;</dd>" in page


def test_source_is_left_out_where_there_is_none() -> None:
    assert "<h2>Source</h2>" not in render_page("t", "a", [picture()], {})
    assert '<h2>Source</h2><p dir="auto">x</p>' in render_page("t", "a", [picture()], {}, source="x")


def test_invisible_tokens_are_made_visible() -> None:
    values = embedded(render_page("t", "a", [picture(rows=(" ", "\n", "\u202e", "\ud800", ""))], {}))
    assert values["pictures"][0]["rows"] == ["␣", "␊", "⟨202E⟩", "⟨D800⟩", "∅"]


@pytest.mark.parametrize("pictures", [[], [picture(), picture()]])
def test_refuses_no_pictures_and_two_of_one_family(pictures: list[AttentionPicture]) -> None:
    with pytest.raises(ValueError, match="a page shows at least one picture, and each family once"):
        render_page("t", "a", pictures, {})


def test_writes_one_file(tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", "lone surrogate \ud800", "a", [picture()], {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    assert "lone surrogate ?" in (tmp_path / "a.html").read_text(encoding="utf-8")


def browse(page: Path, fragment: str, *options: str) -> str:
    """Open a page in headless Chromium and return its document when it has loaded."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={page.parent / 'profile'}", "--window-size=1200,900", *options),
        f"{page.as_uri()}#{fragment}",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def opened(folder: Path, pictures: list[AttentionPicture], fragment: str = "", script: str = "") -> str:
    page = folder / "page.html"
    write_page(page, "phonet", "F OW N IY", pictures, {"Model": "test"}, source="phonet")
    document = page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    page.write_text(document, encoding="utf-8")
    dumped = browse(page, fragment, "--dump-dom")
    assert "data-error" not in dumped.split("<main>")[0]
    return dumped


@pytest.mark.browser
@pytest.mark.parametrize(
    ("fragment", "drawn", "choice"),
    [
        ("", "cross all all mean 5x7", (None, None, "mean")),
        ("cross/1/all/max", "cross 1 all max 5x7", (1, None, "max")),
        ("cross/all/2/mean/row", "cross all 2 mean 5x7", (None, 2, "mean")),
        ("encoder/1/2", "encoder 1 2 mean 7x7", (1, 2, "mean")),
        ("decoder/9/nonsense/%", "decoder all all mean 5x5", (None, None, "mean")),
    ],
)
def test_the_browser_merges_as_python_does(
    tmp_path: Path, fragment: str, drawn: str, choice: tuple[int | None, int | None, How]
) -> None:
    source, output = picture().columns, picture().rows
    pictures = [
        picture(),
        picture(family="encoder", rows=source),
        picture(family="decoder", columns=("<s>", *output[:-1])),
    ]
    document = opened(tmp_path, pictures, fragment)
    assert f'data-drawn="{drawn}"' in document
    shown = next(each for each in pictures if each.family == drawn.split(maxsplit=1)[0])
    found = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", document)
    matrix = shown.reduce(*choice)
    assert [html.unescape(row) for row, _, _ in found] == list(shown.rows)
    assert [html.unescape(column) for _, column, _ in found] == [shown.columns[best] for best in matrix.argmax(-1)]
    np.testing.assert_allclose([float(weight) for _, _, weight in found], matrix.max(-1), atol=1e-4)


@pytest.mark.browser
def test_each_head_apart_is_a_button_that_enlarges_it(tmp_path: Path) -> None:
    document = opened(tmp_path, [picture()], "cross/all/each")
    assert 'data-drawn="cross all each mean 5x7"' in document
    assert len(re.findall(r'<button type="button"><canvas [^>]*></canvas>Head \d</button>', document)) == 6
    clicked = opened(tmp_path, [picture()], "cross/all/each", "document.querySelectorAll('.grid button')[4].click()")
    assert 'data-drawn="cross 1 1 mean 5x7"' in clicked


@pytest.mark.browser
def test_pointing_at_a_cell_reads_it(tmp_path: Path) -> None:
    script = """
const edge = canvas.getBoundingClientRect();
const clientX = edge.left + view.left + 4.5 * view.cell, clientY = edge.top + view.top + 2.5 * view.cell;
canvas.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY }));
"""
    document = opened(tmp_path, [picture()], "cross/1/0", script)
    weight = float(picture().weights[1, 0, 2, 4])
    tip = re.search(r'<div id="tip"[^>]*>N ← e +([0-9.]+)</div>', document)
    assert tip
    assert float(tip[1]) == pytest.approx(weight, abs=1e-4)
    assert "(row 3, column 5)</p>" in document


@pytest.mark.browser
def test_arrow_keys_read_cells_and_scroll_to_them(tmp_path: Path) -> None:
    tokens = tuple(f"t{i}" for i in range(300))
    script = """
for (const key of ["ArrowDown", "End", ...Array(13).fill("PageDown"), "ArrowLeft"]) {
  box.dispatchEvent(new KeyboardEvent("keydown", { key }));
}
document.body.dataset.scrolled = `${box.scrollLeft > 1000} ${box.scrollTop > 1000}`;
"""
    document = opened(tmp_path, [picture(rows=tokens, columns=tokens)], "", script)
    assert "t130 ← t298" in document
    assert 'data-scrolled="true true"' in document


@pytest.mark.browser
def test_hostile_tokens_stay_text(tmp_path: Path) -> None:
    shown = picture(layers=(), heads=(), rows=(HOSTILE,), columns=(HOSTILE, "<img src=x onerror=alert(1)>"))
    document = opened(tmp_path, [shown])
    assert 'data-drawn="cross all all mean 1x2"' in document
    assert "<img" not in document.replace("&lt;img", "")


@pytest.mark.browser
def test_cells_are_painted_in_the_colours_of_their_weights(tmp_path: Path) -> None:
    weights = np.fliplr(np.eye(6))[None, None]
    shown = picture(layers=(0,), heads=(0,), rows=tuple("fedcba"), columns=tuple("abcdef"), weights=weights)
    write_page(tmp_path / "page.html", "reversed", "fedcba", [shown], {})
    browse(tmp_path / "page.html", "", f"--screenshot={tmp_path / 'page.png'}")
    pixels = np.rint(imread(tmp_path / "page.png")[..., :3] * 255).astype(int)
    strongest = [int(LIGHT_RAMP[-1][i : i + 2], 16) for i in (1, 3, 5)]
    rows, columns = np.nonzero((pixels == strongest).all(-1))
    assert len(rows) > 6 * 20 * 20
    assert np.corrcoef(rows, columns)[0, 1] < -0.9
