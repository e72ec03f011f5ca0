"""What Triton's Python backend runs under faults: texts turned round, each request refused or cancelled by itself.

Imported by the backend's stub, in the environment that has nvidia-pytriton.
"""

from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from bench.faults import device
from bench.faults.reverser import decode, understood


class TritonPythonModel:
    """Reverses texts; the names are Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load nothing, but take as long for it as the runner wants."""
        device.enter("load", [args["model_version"]])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch. Who cancels is left out at the next step, as NVIDIA's guide has it."""
        taken = [_taken(request) for request in requests]
        decode(lambda: [text for texts, request in _live(taken, requests) for text in texts])
        return [_response(texts, request) for texts, request in zip(taken, requests, strict=True)]


def _taken(request: Any) -> list[str] | str:
    """The texts of a request, or why it is refused."""
    elements = triton.get_input_tensor_by_name(request, "SOURCE").as_numpy().reshape(-1)
    try:
        return [understood(element) for element in elements]
    except ValueError as error:
        return str(error)


def _live(taken: list[list[str] | str], requests: list[Any]) -> list[tuple[list[str], Any]]:
    return [
        (texts, request)
        for texts, request in zip(taken, requests, strict=True)
        if not isinstance(texts, str) and not request.is_cancelled()
    ]


def _response(texts: list[str] | str, request: Any) -> Any:
    error = triton.TritonError
    if isinstance(texts, str):
        return triton.InferenceResponse(error=error(texts, error.INVALID_ARG))
    if request.is_cancelled():
        return triton.InferenceResponse(error=error("cancelled", error.CANCELLED))
    answers = np.array([[text[::-1].encode()] for text in texts], dtype=object)
    return triton.InferenceResponse(output_tensors=[triton.Tensor("TEXT", answers)])
