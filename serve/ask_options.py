"""The options of `limelight ask`: their names and help, and which of them do not go together."""

from pathlib import Path
from typing import Annotated, Any

import typer

from model.options import Sampling
from model.picture import How
from serve.answers import FamilyName
from serve.wanted import Which

SEARCH, ATTENTION = "Search", "Attention"
SAMPLING = "Sampling: any of these draws an answer instead of searching for the best"
"""Titles in the help."""

WITHOUT_EFFECT = {
    "json": ("stream",),
    "target": (
        "beam_size",
        "n_best",
        "longest",
        "shortest",
        "prefix",
        "suppress",
        "no_repeat_ngram",
        "coverage_penalty",
        "temperature",
        "top_k",
        "top_p",
        "seed",
        "shortlist",
        "stream",
    ),
}
"""Options that leave others without any."""


def refuse_without_effect(context: typer.Context) -> None:
    """Refuse options that would have no effect: that is a mistake worth knowing of.

    Raises:
        BadParameter: with both options, and the way out.
    """
    given = {
        option.name: option.opts[0]
        for option in context.command.params
        if option.name and (source := context.get_parameter_source(option.name)) and source.name == "COMMANDLINE"
    }
    for strong, weak in WITHOUT_EFFECT.items():
        for name in weak:
            if strong in given and name in given:
                message = f"has no effect with {given[strong]}: leave one of them out"
                raise typer.BadParameter(message, param_hint=given[name])


def chosen_model(text: str) -> Which:
    """Which model NAME or NAME@VERSION means."""
    name, _, version = text.partition("@")
    return Which(model=name, version=version)


def chosen_sampling(**chosen: float | None) -> Sampling | None:
    """How to draw tokens, by the names of `Sampling`; None, to search, where nothing is chosen."""
    given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    return Sampling(**given) if given else None


def _check_plot(plot: Path | None) -> Path | None:
    if plot is not None and plot.suffix not in (".png", ".html"):
        raise typer.BadParameter(f"{plot}: the suffix says what is drawn: .png or .html")
    if plot is not None and not plot.parent.is_dir():
        raise typer.BadParameter(f"{plot}: there is no folder {plot.parent}: create it first")
    return plot


Texts = Annotated[list[str], typer.Argument(metavar="TEXT", help="Texts to answer.", show_default=False)]
Address = Annotated[str, typer.Option("--address", "-a", envvar="LIMELIGHT_ADDRESS", help="Server, HOST:PORT.")]
Target = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Score this answer instead of generating one (forced decoding).")
]
Stream = Annotated[bool, typer.Option("--stream", help="Print the answer as it is generated.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, a line for each text, with all layers and heads.")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds to wait for each answer.")]

BeamSize = Annotated[
    int | None,
    typer.Option(
        "--beam-size",
        "-b",
        rich_help_panel=SEARCH,
        show_default="--n-best, or 1, greedy",
        help="Hypotheses kept at a time.",
    ),
]
NBest = Annotated[
    int | None, typer.Option("--n-best", "-n", rich_help_panel=SEARCH, show_default="1", help="Hypotheses returned.")
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(rich_help_panel=SEARCH, show_default="1", help="A score is log-probability / length ^ this."),
]
Model = Annotated[
    str, typer.Option(metavar="NAME[@VERSION]", help="Which model, where several are served; by default its newest.")
]
CoveragePenalty = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=SEARCH,
        show_default="0",
        help="How much it counts against an answer that source tokens got little attention.",
    ),
]
Longest = Annotated[
    int | None, typer.Option(rich_help_panel=SEARCH, show_default="the model's limit", help="Most tokens to generate.")
]
Shortest = Annotated[
    int | None, typer.Option(rich_help_panel=SEARCH, show_default="1", help="Fewest tokens to generate.")
]
Prefix = Annotated[
    str | None, typer.Option(rich_help_panel=SEARCH, metavar="TEXT", help="What the answer must begin with.")
]
Suppress = Annotated[
    list[str] | None,
    typer.Option(rich_help_panel=SEARCH, metavar="TOKEN", help="Token that is never generated; may be repeated."),
]
NoRepeat = Annotated[
    int | None,
    typer.Option(
        "--no-repeat-ngram", rich_help_panel=SEARCH, metavar="N", help="Let no run of so many tokens occur twice."
    ),
]
Shortlist = Annotated[
    bool,
    typer.Option(
        "--shortlist",
        rich_help_panel=SEARCH,
        help="Choose among a few candidates that the source suggests: faster, not exact.",
    ),
]

Temperature = Annotated[
    float | None,
    typer.Option(rich_help_panel=SAMPLING, show_default="1", help="Below 1, the likely becomes likelier."),
]
TopK = Annotated[
    int | None, typer.Option(rich_help_panel=SAMPLING, show_default="all", help="Only from so many likeliest tokens.")
]
TopP = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=SAMPLING, show_default="1", help="Only from the likeliest tokens that are so probable together."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(rich_help_panel=SAMPLING, show_default="0", help="The same one draws the same answer again."),
]

Attention = Annotated[
    FamilyName, typer.Option("--attention", "-f", rich_help_panel=ATTENTION, help="Family of attention to show.")
]
Layer = Annotated[
    list[int] | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        metavar="N",
        show_default="what aligns best, or all",
        help="Layer to show, from 0; may be repeated.",
    ),
]
Head = Annotated[
    list[int] | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        metavar="N",
        show_default="what aligns best, or all",
        help="Head to show, from 0; may be repeated.",
    ),
]
Reduce = Annotated[
    How | None,
    typer.Option(
        rich_help_panel=ATTENTION, show_default="mean; in JSON kept apart", help="How layers and heads are merged."
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        metavar="PATH",
        callback=_check_plot,
        help="Draw: a .png of what is shown, or an .html page of all families, layers and heads. With several texts "
        "their number is put before the suffix.",
    ),
]
NoHeatMap = Annotated[
    bool,
    typer.Option("--no-heat-map", rich_help_panel=ATTENTION, help="Leave out the heat map, in JSON the attention."),
]
