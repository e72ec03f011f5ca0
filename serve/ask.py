"""`limelight ask`: answers from a server, and which input each output came from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

import typer
from rich.console import Console

from model.picture import draw_png
from serve import ask_options as options
from serve.answers import Answer, ModelInfo
from serve.channel import Credentials
from serve.client import Client
from serve.credential_options import with_credentials
from serve.page import write_page
from serve.show import show_details, show_map, show_pieces, show_text, to_json
from serve.view import View
from serve.wanted import WantedSearch, Which


@dataclass(frozen=True, kw_only=True)
class Session:
    """One run of the command.

    Attributes:
        client: the server to ask.
        which: model of it.
        search: how to search.
        target: an answer to score instead; None to search.
        view: what to show.
        stream: print the answer as it comes.
        console: where to.
    """

    client: Client
    which: Which
    search: WantedSearch
    target: str | None
    view: View
    stream: bool
    console: Console = field(default_factory=lambda: Console(highlight=False, markup=False, emoji=False))

    def run(self, texts: Sequence[str]) -> None:
        """Ask about each text in turn."""
        info = self.client.describe(**self.which)
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
            penalty = self.search.get("length_penalty")
            return self.client.score(text, self.target, length_penalty=penalty, **self.which, **wanted)
        if self.stream:
            return show_pieces(self.console, self.client.stream(text, **self.which, **self.search, **wanted))
        return self.client.generate(text, **self.which, **self.search, **wanted)

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


@with_credentials()
def ask(
    context: typer.Context,
    texts: options.Texts,
    *,
    address: options.Address = "127.0.0.1:50051",
    model: options.Model = "",
    target: options.Target = None,
    stream: options.Stream = False,
    json: options.Json = False,
    timeout: options.Timeout = 30.0,
    beam_size: options.BeamSize = None,
    n_best: options.NBest = None,
    length_penalty: options.LengthPenalty = None,
    coverage_penalty: options.CoveragePenalty = None,
    longest: options.Longest = None,
    shortest: options.Shortest = None,
    prefix: options.Prefix = None,
    suppress: options.Suppress = None,
    no_repeat_ngram: options.NoRepeat = None,
    shortlist: options.Shortlist = False,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    attention: options.Attention = "cross",
    layer: options.Layer = None,
    head: options.Head = None,
    reduce: options.Reduce = None,
    plot: options.Plot = None,
    no_heat_map: options.NoHeatMap = False,
    **credentials: Unpack[Credentials],
) -> None:
    """Ask a server, and see which input each output came from."""
    options.refuse_without_effect(context)
    search = WantedSearch(
        beam_size=n_best if beam_size is None else beam_size,
        hypotheses=n_best,
        length_penalty=length_penalty,
        coverage_penalty=coverage_penalty,
        longest=longest,
        shortest=shortest,
        prefix=prefix,
        suppressed=suppress,
        no_repeat_ngram=no_repeat_ngram,
        shortlist=shortlist,
        sampling=options.chosen_sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
    )
    view = View(
        family=attention,
        layers=tuple(layer or ()),
        heads=tuple(head or ()),
        how=reduce,
        as_json=json,
        heat_map=not no_heat_map,
        plot=plot,
    )
    which = options.chosen_model(model)
    with Client(address, timeout=timeout, **credentials) as client:
        session = Session(client=client, which=which, search=search, target=target, view=view, stream=stream)
        session.run(texts)
