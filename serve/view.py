"""Which part of an answer's attention is asked for and shown."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from model.errors import InvalidRequestError
from model.picture import AttentionPicture, How
from serve.answers import Answer, FamilyName, ModelInfo


class Wanted(TypedDict):
    """Which attention to ask for, as `Client.generate` takes it; no layers or heads are all of them."""

    families: Sequence[FamilyName]
    layers: Sequence[int]
    heads: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class View:
    """What is shown of an answer.

    Attributes:
        family: the attention that is drawn.
        layers: its layers, from 0; all if empty.
        heads: its heads, from 0; all if empty.
        how: how they are merged; None for the mean, and in JSON for keeping them apart.
        as_json: JSON instead of text.
        heat_map: the heat map, or in JSON the attention, is shown.
        plot: a PNG or HTML file to draw into.
    """

    family: FamilyName
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    how: How | None
    as_json: bool
    heat_map: bool
    plot: Path | None

    @property
    def merged(self) -> How:
        """How a picture is merged."""
        return self.how or "mean"

    @property
    def page(self) -> bool:
        """A page is to be written, which shows everything there is."""
        return self.plot is not None and self.plot.suffix == ".html"

    def aligned(self, info: ModelInfo) -> "View":
        """The same with the layers and heads that align best, if that is known and none were chosen."""
        if self.as_json or self.family != "cross" or self.layers or self.heads or info.alignment is None:
            return self
        return replace(self, layers=info.alignment.layers, heads=info.alignment.heads)

    @property
    def needed(self) -> bool:
        """Anything of the attention is shown; text shows at least what cross-attention says of the alignment."""
        reads_alignment = self.family == "cross" and not self.as_json
        return self.heat_map or self.plot is not None or reads_alignment

    def wanted(self, info: ModelInfo) -> Wanted:
        """The attention that it takes, and no more."""
        if self.page:
            others = [family for family in info.attention if family != self.family]
            return Wanted(families=(self.family, *others), layers=(), heads=())
        return Wanted(families=(self.family,) if self.needed else (), layers=self.layers, heads=self.heads)

    def picture(self, answer: Answer, hypothesis: int = 0) -> AttentionPicture:
        """The attention that is drawn.

        Raises:
            InvalidRequestError: it has not these layers and heads.
        """
        whole = answer.picture(self.family, hypothesis)
        layers, heads = self.layers or whole.layers, self.heads or whole.heads
        weights = whole.weights[_places("layers", layers, whole.layers)][:, _places("heads", heads, whole.heads)]
        return replace(whole, layers=layers, heads=heads, weights=weights)

    def pictures(self, answer: Answer) -> list[AttentionPicture]:
        """The attention that JSON holds: the encoder's once, any other's for each hypothesis."""
        if not self.heat_map:
            return []
        owners = 1 if self.family == "encoder" else len(answer.hypotheses)
        return [self.picture(answer, index) for index in range(owners)]

    def numbered(self, number: int) -> "View":
        """The same, drawn into a file of its own."""
        return self if self.plot is None else replace(self, plot=self.plot.with_stem(f"{self.plot.stem}-{number}"))


def _places(name: str, numbers: Sequence[int], held: Sequence[int]) -> list[int]:
    for number in numbers:
        if number not in held:
            raise InvalidRequestError(
                f"attention.{name}", f"{number} does not exist: there are {', '.join(map(str, held))}"
            )
    return [held.index(number) for number in numbers]
