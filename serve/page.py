"""Attention as one HTML page that needs nothing else: no network, no library, no server.

`page.html` beside this file holds the page's looks and behaviour; here its data is put in. Weights travel as 16-bit
fixed point (0 is exactly 0, 65535 is 1, steps of 0.000015) in base64: half of what four decimals would take.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from model.picture import DARK_RAMP, FAMILIES, LIGHT_RAMP, AttentionPicture, visible, write_atomically


def write_page(
    path: Path,
    title: str,
    answer: str,
    pictures: Sequence[AttentionPicture],
    details: Mapping[str, str],
    *,
    source: str = "",
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the HTML file to write.
        title: heading of the page.
        answer: what the model wrote.
        pictures: one for each family, the one shown first in front.
        details: names and values shown below the picture, such as model and score.
        source: what the model read; left out of the page where empty.

    Raises:
        ValueError: there are no pictures, or two of one family.
    """
    page = render_page(title, answer, pictures, details, source=source)
    write_atomically(path, page.encode("utf-8", errors="replace"))  # lone surrogates have no UTF-8


def render_page(
    title: str, answer: str, pictures: Sequence[AttentionPicture], details: Mapping[str, str], *, source: str = ""
) -> str:
    """The page that `write_page` writes.

    Raises:
        ValueError: there are no pictures, or two of one family.
    """
    families = [picture.family for picture in pictures]
    if not families or len(set(families)) < len(families):
        raise ValueError(f"pictures={families}: a page shows at least one picture, and each family once")
    parts = {
        "title": escape(title),
        "texts": _text("Source", source) + _text("Answer", answer),
        "details": "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(details[name])}</dd></div>" for name in details),
        "data": _data(pictures),
    }
    template = files("serve").joinpath("page.html").read_text(encoding="utf-8")
    # One pass over the template: what is put in is never searched for places again.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _text(name: str, text: str) -> str:
    return f'<div><h2>{name}</h2><p dir="auto">{escape(text)}</p></div>' if text else ""


def _data(pictures: Sequence[AttentionPicture]) -> str:
    values = {"ramps": {"light": LIGHT_RAMP, "dark": DARK_RAMP}, "pictures": [_values(picture) for picture in pictures]}
    # A script element ends at the first "</script", also inside a string; JSON may write "<" as an escape.
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


def _values(picture: AttentionPicture) -> dict[str, Any]:
    names = FAMILIES[picture.family]
    fixed = np.rint(picture.weights.astype(np.float64).clip(0, 1) * 65535).astype("<u2")
    return {
        "family": picture.family,
        "title": names.title,
        "rowName": names.rows,
        "columnName": names.columns,
        "layers": picture.layers,
        "heads": picture.heads,
        "rows": [visible(token) for token in picture.rows],
        "columns": [visible(token) for token in picture.columns],
        "weights": base64.b64encode(fixed.tobytes()).decode("ascii"),
    }
