"""What Triton's Python backend runs in the tests: answers of the shapes that ours have, without a network.

Imported by the backend's stub, in the environment that has nvidia-pytriton.
"""

from typing import Any

import numpy as np
import triton_python_backend_utils as triton

Array = np.ndarray[Any, Any]


class TritonPythonModel:
    """Reverses texts; the names are Triton's."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with the outputs that it asks for."""
        return [_response(request) for request in requests]


def _response(request: Any) -> Any:
    texts = [text.decode() for text in triton.get_input_tensor_by_name(request, "SOURCE").as_numpy()[:, 0]]
    known = outputs(texts)
    return triton.InferenceResponse(
        output_tensors=[triton.Tensor(name, known[name]) for name in request.requested_output_names()]
    )


def outputs(texts: list[str]) -> dict[str, Array]:
    """Every output, as a model of one decoder layer, two encoder layers and two heads has it."""
    count, longest = len(texts), max((len(text) + 1 for text in texts), default=0)
    lengths = np.array([[len(text) + 1] for text in texts], np.int64).reshape(count, 1)
    tokens = np.array([[*text, *["</s>"] * (longest - len(text))] for text in texts], object).reshape(count, longest)
    return {
        "TEXT": np.array([[text[::-1].encode()] for text in texts], object).reshape(count, 1),
        "SCORE": np.zeros((count, 1), np.float32),
        "LOG_PROBABILITY": np.zeros((count, 1), np.float32),
        "FINISH_REASON": np.full((count, 1), b"stop", object),
        "TOKENS": tokens.reshape(count, 1, longest),
        "TARGET_LENGTH": lengths,
        "SOURCE_TOKENS": tokens,
        "SOURCE_LENGTH": lengths,
        "CROSS_ATTENTION": np.zeros((count, 1, 1, 2, longest, longest), np.float32),
        "DECODER_ATTENTION": np.zeros((count, 1, 1, 2, longest, longest), np.float32),
        "ENCODER_ATTENTION": np.zeros((count, 2, 2, longest, longest), np.float32),
    }
