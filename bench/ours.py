"""Our side of `bench.decode` and `bench.cuda`: a bundle that decodes ids to ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from export.manifest import Precision as Graphs
from export.manifest import read_manifest
from export.resident import Device, ResidentStepModel
from export.runtime import PROVIDERS, OnnxGreedyModel, OnnxStepModel, RuntimeOptions
from model.reading import read
from model.search import STEPS_AHEAD, Decoding, Hypothesis, SearchOptions
from model.steps import Family, StepModel

GRAPHS: dict[str, Graphs] = {"float32": "fp32", "int8": "int8", "float16": "fp16"}
"""What a bundle calls the precisions of the benchmarks."""

FAMILIES: dict[str, frozenset[Family]] = {
    "none": frozenset(),
    "cross": frozenset({"cross"}),
    "all": frozenset({"encoder", "decoder", "cross"}),
}
"""What each setting of attention asks for."""

Ids: TypeAlias = Sequence[Sequence[int]]


def decode_ours(
    model: StepModel, sources: Ids, options: Sequence[SearchOptions], families: frozenset[Family]
) -> list[list[Hypothesis]]:
    """Decode one batch, with some families of attention: encoder attention is computed and handed over too."""
    decoding = Decoding(model, options[0].beam_size)
    memory = read(model, sources, attention="encoder" in families)
    sentences = decoding.join(memory, range(len(sources)), options, [families] * len(sources))
    while decoding.sentences:
        decoding.step(STEPS_AHEAD)
    return [sentence.results() for sentence in sentences]


class Ours:
    """A bundle's graphs of one precision.

    Args:
        bundle: its folder.
        precision: "float32", "int8" or "float16".
        threads: threads of ONNX Runtime.
        spinning: see `RuntimeOptions`.
        device: what computes.
        resident: leave memory and state on the device.
    """

    def __init__(
        self,
        bundle: Path,
        precision: str,
        threads: int,
        *,
        spinning: bool = False,
        device: Device = "cpu",
        resident: bool = False,
    ) -> None:
        options = RuntimeOptions(providers=PROVIDERS[device], threads=threads, spinning=spinning)
        made = OnnxStepModel if resident else OnnxGreedyModel
        graphs = made(bundle, read_manifest(bundle), GRAPHS[precision], options)
        self._model: StepModel = ResidentStepModel(graphs, device) if resident else graphs

    @staticmethod
    def prepare(sources: Ids) -> Ids:
        """Sources as it takes them: as they are."""
        return sources

    def decode(
        self, sources: Ids, *, beam_size: int, longest: int, length_penalty: float, attention: str
    ) -> list[list[Hypothesis]]:
        """Decode one batch.

        Args:
            sources: token ids, the end token last in each.
            beam_size: 1 for greedy search.
            longest: most tokens to generate, the end token among them.
            length_penalty: see `SearchOptions`.
            attention: a key of FAMILIES.
        """
        options = SearchOptions(longest=longest, beam_size=beam_size, length_penalty=length_penalty)
        return decode_ours(self._model, sources, [options] * len(sources), FAMILIES[attention])

    @staticmethod
    def answers(found: list[list[Hypothesis]]) -> list[list[int]]:
        """Ids of the best hypotheses."""
        return [hypotheses[0].tokens for hypotheses in found]
