"""An answer on the terminal, and as JSON.

    F OW1 N
    score -0.11  log-probability -0.44  g2p 3

    tokens     F -0.01  OW1 -0.25  N -0.00  </s> -0.00
    alignment  p→F  o→OW1  n→N

What the server sent is printed with its control characters made visible: it may steer no terminal.
"""

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.text import Text

from model.picture import AttentionPicture, How, visible
from serve.answers import Answer, End, Hypothesis, Piece, Start, Token
from serve.terminal import heat_map

_UNSURE = np.log(0.5)
"""A token less probable than this is coloured."""
_GAP = "  "
_INDENT = len("alignment" + _GAP)


def show_pieces(console: Console, events: Iterable[Start | Piece | End]) -> Answer:
    """Print a stream's text as it comes; returns the answer at its end."""
    answers = []
    try:
        for event in events:
            if isinstance(event, Piece):
                console.print(_printable(event.text), style="bold", end="", soft_wrap=True)
            elif isinstance(event, End):
                answers.append(event.answer)
    finally:
        console.print()
    return answers[-1]


def show_text(console: Console, answer: Answer) -> None:
    """Print the best answer's text, never broken into lines."""
    console.print(_printable(answer.best.text), style="bold", soft_wrap=True)


def show_details(console: Console, source: str, answer: Answer, picture: AttentionPicture | None, how: How) -> None:
    """Print scores, tokens, the other hypotheses and, for cross-attention, which source each output came from.

    Args:
        console: where to.
        source: the text that was asked.
        answer: what came back.
        picture: attention of the best hypothesis; None shows no alignment.
        how: how its layers and heads are merged.
    """
    best = answer.best
    summary = Text(f"score {best.score:.3f}  log-probability {best.log_probability:.3f}", style="dim")
    summary.append(f"  {answer.model} {answer.version}")
    if best.finish_reason == "length":
        summary.append("  cut off at the longest length", style="not dim yellow")
    console.print(summary)
    console.print()
    if len(answer.hypotheses) > 1:
        _section(console, "n-best", map(_ranked, answer.hypotheses))
    room = console.width - _INDENT
    _section(console, "tokens", _flow(map(_token, best.tokens), room))
    if picture is not None and picture.family == "cross":
        arrow = "->" if console.options.ascii_only else "→"
        links = alignment(source, answer, picture.reduce(None, None, how))
        _section(console, "alignment", _flow((_link(*link, arrow) for link in links), room))


def show_map(console: Console, picture: AttentionPicture, how: How) -> None:
    """Print a heat map below what was printed before."""
    console.print()
    console.print(heat_map(picture, None, None, how))


def alignment(source: str, answer: Answer, weights: Float[np.ndarray, "row column"]) -> list[tuple[str, str]]:
    """Which part of the source each part of the best answer looked at most.

    Args:
        source: the text that was asked.
        answer: what came back.
        weights: cross-attention of its best hypothesis.

    Returns:
        Pairs of source and output text, in the order of the output; neighbours that looked at one token are together.
        Begin and end tokens of the output, which stand for no text, are left out.
    """
    looks = [
        (token, int(row.argmax()))
        for token, row in zip(answer.best.tokens, weights, strict=True)
        if token.start < token.end
    ]
    return [
        (_words(source, [answer.source_tokens[column]]), _words(answer.best.text, [token for token, _ in group]))
        for column, group in groupby(looks, key=lambda look: look[1])
    ]


def to_json(source: str, answer: Answer, pictures: Sequence[AttentionPicture], how: How | None) -> str:
    """An answer as one line of ASCII.

    Args:
        source: the text that was asked.
        answer: what came back.
        pictures: attention of each hypothesis, or once the encoder's; empty for none.
        how: how layers and heads are merged; None keeps them apart: [layer][head][row][column].
    """
    hypotheses = [_plain(hypothesis) for hypothesis in answer.hypotheses]
    result = {
        "model": {"name": answer.model, "version": answer.version},
        "source": source,
        "source_tokens": list(map(_plain_token, answer.source_tokens)),
        "answer": answer.best.text,
        "hypotheses": hypotheses,
    }
    for index, picture in enumerate(pictures):
        owner = result if picture.family == "encoder" else hypotheses[index]
        owner["attention"] = {picture.family: _weights(picture, how)}
    return json.dumps(result)


def _section(console: Console, name: str, lines: Iterable[Text]) -> None:
    for index, line in enumerate(lines):
        margin = "" if index else name
        console.print(Text.assemble((f"{margin:<{_INDENT}}", "dim"), line), soft_wrap=True)


def _flow(items: Iterable[Text], width: int) -> Iterator[Text]:
    """Items side by side in lines of `width` cells; none is broken."""
    line = Text()
    for item in items:
        if line and line.cell_len + len(_GAP) + item.cell_len > width:
            yield line
            line = Text()
        line.append(_GAP if line else "").append_text(item)
    if line:
        yield line


def _ranked(hypothesis: Hypothesis) -> Text:
    line = Text.assemble((f"{hypothesis.score:.3f}", "dim"), _GAP, _printable(hypothesis.text))
    return line.append("  cut off", style="yellow") if hypothesis.finish_reason == "length" else line


def _token(token: Token) -> Text:
    log_probability = token.log_probability or 0.0
    text = Text(visible(token.text) + " ")
    return text.append(f"{log_probability:.2f}", style="yellow" if log_probability < _UNSURE else "dim")


def _link(source: str, output: str, arrow: str) -> Text:
    return Text.assemble(source, (arrow, "dim"), output)


def _words(text: str, tokens: Sequence[Token]) -> str:
    """What some tokens stand for in a text; what has no characters there is written as the vocabulary does."""
    span = text[tokens[0].start : tokens[-1].end]
    return str(_printable(span)) if span.strip() else visible(tokens[0].text)


def _printable(text: str) -> Text:
    return Text("".join(visible(one) if unicodedata.category(one) == "Cc" else one for one in text))


def _plain(hypothesis: Hypothesis) -> dict[str, Any]:
    return {
        "text": hypothesis.text,
        "score": hypothesis.score,
        "log_probability": hypothesis.log_probability,
        "finish_reason": hypothesis.finish_reason,
        "tokens": [asdict(token) for token in hypothesis.tokens],
    }


def _plain_token(token: Token) -> dict[str, Any]:
    return {name: value for name, value in asdict(token).items() if value is not None}


def _weights(picture: AttentionPicture, how: How | None) -> dict[str, Any]:
    weights = picture.weights if how is None else picture.reduce(None, None, how)
    return {
        "layers": picture.layers,
        "heads": picture.heads,
        "reduction": how or "none",
        "rows": picture.rows,
        "columns": picture.columns,
        "weights": weights.astype(np.float64).round(6).tolist(),
    }
