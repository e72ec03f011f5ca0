"""What MLServer runs under faults: a custom runtime that turns texts round.

Imported by MLServer and its workers, in the environment that has mlserver.
"""

from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput

from bench.faults import device
from bench.faults.reverser import decode, understood


class Reverser(MLModel):  # type: ignore[misc]
    """Reverses texts; the names are MLServer's."""

    async def load(self) -> bool:
        """Load nothing, but take as long for it as the runner wants."""
        device.enter("load", [str(self.version)])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer a batch, which MLServer has put together into one request."""
        try:
            texts = [understood(_bytes(element)) for element in _source(payload).data]
        except ValueError as error:
            raise InferenceError(str(error)) from None
        decode(lambda: texts)
        answers = StringCodec.encode_output("TEXT", [text[::-1] for text in texts])
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=[answers])


def _source(payload: InferenceRequest) -> RequestInput:
    """The only input, for the only output. MLServer leaves it to a runtime to check them.

    Raises:
        ValueError: it is not what this model takes.
    """
    if any(one.name != "TEXT" for one in payload.outputs or ()):
        raise ValueError("outputs: there is TEXT alone")
    if [one.name for one in payload.inputs] != ["SOURCE"]:
        raise ValueError(f"inputs: SOURCE is wanted, got {len(payload.inputs)} inputs")
    tensor = payload.inputs[0]
    if tensor.datatype != "BYTES" or tensor.shape not in ([len(tensor.data)], [len(tensor.data), 1]):
        raise ValueError(f"SOURCE: BYTES [texts, 1] is wanted, got {tensor.datatype} {tensor.shape}")
    return tensor


def _bytes(element: bytes | str) -> bytes:
    return element.encode() if isinstance(element, str) else element
