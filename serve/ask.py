"""`limelight ask`: answers from a server, and which input each output came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from model.picture import How, draw_png
from serve.answers import Answer, FamilyName, ModelInfo
from serve.client import Client, Sampling, WantedSearch
from serve.page import write_page
from serve.show import show_details, show_map, show_pieces, show_text, to_json
from serve.view import View


@dataclass(frozen=True, kw_only=True)
class Session:
    """One run of the command.

    Attributes:
        client: the server to ask.
        search: how to search.
        target: an answer to score instead; None to search.
        view: what to show.
        stream: print the answer as it comes.
        console: where to.
    """

    client: Client
    search: WantedSearch
    target: str | None
    view: View
    stream: bool
    console: Console

    def run(self, texts: Sequence[str]) -> None:
        """Ask about each text in turn."""
        info = self.client.describe()
        view = self.view.aligned(info)
        for number, text in enumerate(texts, 1):
            several = len(texts) > 1
            if several and not view.as_json:
                self._divide(number, text)
            self._one(info, view.numbered(number) if several else view, text)

    def _divide(self, number: int, text: str) -> None:
        if number > 1:
            self.console.print()
        self.console.rule(" ".join(text.split()), align="left", style="dim")

    def _one(self, info: ModelInfo, view: View, text: str) -> None:
        answer = self._ask(info, view, text)
        if view.as_json:
            typer.echo(to_json(text, answer, view.pictures(answer), view.how))
        else:
            self._show(view, text, answer)
        if view.plot is not None:
            _draw(view.plot, view, info, text, answer)
            # Beside the answer, not in it: standard output may be read by a program.
            typer.echo(f"wrote {view.plot}", err=True)

    def _ask(self, info: ModelInfo, view: View, text: str) -> Answer:
        wanted = view.wanted(info)
        if self.target is not None:
            return self.client.score(text, self.target, length_penalty=self.search.get("length_penalty"), **wanted)
        if self.stream:
            return show_pieces(self.console, self.client.stream(text, **self.search, **wanted))
        return self.client.generate(text, **self.search, **wanted)

    def _show(self, view: View, text: str, answer: Answer) -> None:
        if not self.stream:
            show_text(self.console, answer)
        picture = view.picture(answer) if view.needed else None
        show_details(self.console, text, answer, picture, view.merged)
        if picture is not None and view.heat_map:
            show_map(self.console, picture, view.merged)


def _draw(path: Path, view: View, info: ModelInfo, text: str, answer: Answer) -> None:
    if not view.page:
        draw_png(view.picture(answer), None, None, view.merged, path)
        return
    best = answer.best
    details = {
        "Model": f"{answer.model} {answer.version}",
        "Architecture": info.architecture,
        "Precision": info.precision,
        "Score": f"{best.score:.3f}",
        "Log-probability": f"{best.log_probability:.3f}",
    }
    pictures = [answer.picture(family) for family in view.wanted(info)["families"]]
    write_page(path, f"Attention of {answer.model}", best.text, pictures, details, source=text)


def _check_plot(plot: Path | None) -> Path | None:
    if plot is not None and plot.suffix not in (".png", ".html"):
        raise typer.BadParameter(f"{plot}: the suffix says what is drawn: .png or .html")
    if plot is not None and not plot.parent.is_dir():
        raise typer.BadParameter(f"{plot}: there is no folder {plot.parent}: create it first")
    return plot


def _refuse_together(option: str, others: Mapping[str, bool]) -> None:
    """An option that would have no effect is a mistake worth knowing of."""
    for other, given in others.items():
        if given:
            raise typer.BadParameter(f"has no effect with {other}: leave one of them out", param_hint=option)


Texts = Annotated[list[str], typer.Argument(metavar="TEXT", help="Texts to answer.", show_default=False)]
Address = Annotated[str, typer.Option("--address", "-a", envvar="LIMELIGHT_ADDRESS", help="Server, HOST:PORT.")]
BeamSize = Annotated[
    int | None,
    typer.Option("--beam-size", "-b", show_default="--n-best, or 1, greedy", help="Hypotheses kept at a time."),
]
NBest = Annotated[int | None, typer.Option("--n-best", "-n", show_default="1", help="Hypotheses returned.")]
LengthPenalty = Annotated[
    float | None, typer.Option(show_default="1", help="A score is log-probability / length ^ this.")
]
Longest = Annotated[int | None, typer.Option(show_default="the model's limit", help="Most tokens to generate.")]
Shortest = Annotated[int | None, typer.Option(show_default="1", help="Fewest tokens to generate.")]
Prefix = Annotated[str | None, typer.Option(metavar="TEXT", help="What the answer must begin with.")]
Suppress = Annotated[
    list[str] | None, typer.Option(metavar="TOKEN", help="Token that is never generated; may be repeated.")
]
NoRepeat = Annotated[
    int | None, typer.Option("--no-repeat-ngram", metavar="N", help="Let no run of so many tokens occur twice.")
]
Coverage = Annotated[
    float | None,
    typer.Option("--coverage-penalty", show_default="0", help="Weight of source tokens that got little attention."),
]
Temperature = Annotated[
    float | None, typer.Option(show_default="1", help="Draw tokens; below 1, the likely becomes likelier.")
]
TopK = Annotated[int | None, typer.Option(show_default="all", help="Draw tokens, from so many likeliest.")]
TopP = Annotated[float | None, typer.Option(show_default="1", help="Draw tokens, from those with so much probability.")]
Seed = Annotated[int | None, typer.Option(show_default="0", help="Draw tokens; another seed, another answer.")]
Target = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Score this answer instead of generating one (forced decoding).")
]
Attention = Annotated[FamilyName, typer.Option("--attention", "-f", help="Family of attention to show.")]
Layer = Annotated[
    list[int] | None,
    typer.Option(metavar="N", show_default="what aligns best, or all", help="Layer to show, from 0; may be repeated."),
]
Head = Annotated[
    list[int] | None,
    typer.Option(metavar="N", show_default="what aligns best, or all", help="Head to show, from 0; may be repeated."),
]
Reduce = Annotated[
    How | None, typer.Option(show_default="mean; in JSON kept apart", help="How layers and heads are merged.")
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        callback=_check_plot,
        help="Draw: a .png of what is shown, or an .html page of all families, layers and heads. With several texts "
        "their number is put before the suffix.",
    ),
]
Stream = Annotated[bool, typer.Option("--stream", help="Print the answer as it is generated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, a line for each text, with all layers and heads.")]
NoHeatMap = Annotated[bool, typer.Option("--no-heat-map", help="Leave out the heat map, in JSON the attention.")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds to wait for each answer.")]


def ask(
    texts: Texts,
    *,
    address: Address = "127.0.0.1:50051",
    beam_size: BeamSize = None,
    n_best: NBest = None,
    length_penalty: LengthPenalty = None,
    longest: Longest = None,
    shortest: Shortest = None,
    prefix: Prefix = None,
    suppress: Suppress = None,
    no_repeat: NoRepeat = None,
    coverage: Coverage = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    target: Target = None,
    attention: Attention = "cross",
    layer: Layer = None,
    head: Head = None,
    reduce: Reduce = None,
    plot: Plot = None,
    stream: Stream = False,
    as_json: AsJson = False,
    no_heat_map: NoHeatMap = False,
    timeout: Timeout = 30.0,
) -> None:
    """Ask a server, and see which input each output came from."""
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sampling = {name: value for name, value in drawn.items() if value is not None}
    searched: dict[str, object] = {
        "--beam-size": beam_size,
        "--n-best": n_best,
        "--longest": longest,
        "--shortest": shortest,
    }
    searched |= {"--prefix": prefix, "--suppress": suppress, "--no-repeat-ngram": no_repeat}
    searched |= {"--coverage-penalty": coverage, "--temperature, --top-k, --top-p, --seed": sampling or None}
    for option, value in searched.items():
        _refuse_together(option, {"--target": value is not None and target is not None})
    _refuse_together("--stream", {"--json": stream and as_json, "--target": stream and target is not None})
    search = WantedSearch(
        beam_size=n_best if beam_size is None else beam_size,
        hypotheses=n_best,
        length_penalty=length_penalty,
        longest=longest,
        shortest=shortest,
        prefix=prefix,
        suppressed=suppress,
        no_repeat_ngram=no_repeat,
        coverage_penalty=coverage,
        sampling=Sampling(**sampling) if sampling else None,  # type: ignore[arg-type]
    )
    view = View(
        family=attention,
        layers=tuple(layer or ()),
        heads=tuple(head or ()),
        how=reduce,
        as_json=as_json,
        heat_map=not no_heat_map,
        plot=plot,
    )
    console = Console(highlight=False, markup=False, emoji=False)
    with Client(address, timeout=timeout) as client:
        session = Session(client=client, search=search, target=target, view=view, stream=stream, console=console)
        session.run(texts)
