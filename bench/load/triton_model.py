"""What Triton's Python backend runs: our search over the bundle's graphs, a batch at a time.

Imported by the backend's stub, in the environment that has nvidia-pytriton.
"""

import json
import shlex
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from bench.load.options import read_peer
from export.manifest import read_manifest
from export.runtime import OnnxStepModel, RuntimeOptions
from model.search import SearchOptions, search
from model.steps import NO_FAMILIES
from model.tokenizer import Tokenizer


class TritonPythonModel:
    """Text in, text out; the names are Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle that the model's parameters name."""
        command = json.loads(args["model_config"])["parameters"]["command"]["string_value"]
        peer = read_peer(shlex.split(command))
        self._options = peer.options
        self._search = SearchOptions(longest=peer.options.longest, beam_size=peer.options.beam)
        manifest = read_manifest(peer.model)
        self._source = Tokenizer.load(peer.model / manifest.source_tokenizer)
        self._target = Tokenizer.load(peer.model / manifest.target_tokenizer)
        self._steps = OnnxStepModel(
            peer.model, manifest, peer.options.precision.value, RuntimeOptions(threads=peer.options.threads)
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the batch that Triton formed, in several where its tokens are too many for one."""
        texts = [triton.get_input_tensor_by_name(request, "SOURCE").as_numpy()[0, 0].decode() for request in requests]
        answers: list[str] = []
        batch: list[list[int]] = []
        longest = 0
        for ids in self._source.encode_ids(texts):
            longest = max(longest, len(ids))
            if batch and not self._options.fits(len(batch) + 1, longest):
                answers += self._decode(batch)
                batch, longest = [], len(ids)
            batch.append(ids)
        answers += self._decode(batch)
        return [_response(text) for text in answers]

    def _decode(self, batch: list[list[int]]) -> list[str]:
        found = search(self._steps, batch, [self._search] * len(batch), NO_FAMILIES)
        return [self._target.decode(hypotheses[0].tokens) for hypotheses in found]


def _response(text: str) -> Any:
    tensor = triton.Tensor("TEXT", np.array([[text.encode()]], dtype=object))
    return triton.InferenceResponse(output_tensors=[tensor])
