"""How each server is spoken to: the method, and text to bytes and back.

The load generator sends and receives bytes, so that what it does for a request is the same whatever the protocol.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Name = Literal["limelight", "triton"]


@dataclass(frozen=True)
class Wire:
    """A protocol.

    Attributes:
        method: full name of the unary method.
        encode: makes the request for a source.
        decode: takes the text of the best answer out of a response.
    """

    method: str
    encode: Callable[[str], bytes]
    decode: Callable[[bytes], str]


def load_wire(name: Name, beam: int, longest: int) -> Wire:
    """A protocol by name; imports what it needs, which is not everywhere.

    Args:
        name: "limelight" for limelight.v1, "triton" for the Open Inference Protocol.
        beam: hypotheses kept at a time.
        longest: most tokens to generate.
    """
    return limelight(beam, longest) if name == "limelight" else triton()


def limelight(beam: int, longest: int) -> Wire:
    """`limelight.v1`, without attention: the peers have none to give."""
    from serve.pb.limelight.v1 import limelight_pb2 as pb

    search = pb.SearchOptions(beam_size=beam, longest=longest)

    def encode(source: str) -> bytes:
        return pb.GenerateRequest(source=source, search=search).SerializeToString()

    def decode(response: bytes) -> str:
        return pb.GenerateResponse.FromString(response).hypotheses[0].text

    return Wire("/limelight.v1.LimelightService/Generate", encode, decode)


def triton() -> Wire:
    """The Open Inference Protocol v2 as tritonclient has it; how to search is the server's own option."""
    from tritonclient.grpc import InferResult, service_pb2

    def encode(source: str) -> bytes:
        request = service_pb2.ModelInferRequest(model_name="limelight")
        request.inputs.add(name="SOURCE", datatype="BYTES", shape=[1, 1])
        data = source.encode()
        # A string among raw contents: its length in four bytes, little-endian, then itself.
        request.raw_input_contents.append(len(data).to_bytes(4, "little") + data)
        return bytes(request.SerializeToString())

    def decode(response: bytes) -> str:
        result = InferResult(service_pb2.ModelInferResponse.FromString(response))
        return str(result.as_numpy("TEXT")[0, 0].decode())

    return Wire("/inference.GRPCInferenceService/ModelInfer", encode, decode)
