"""A server of canned answers: a small "g2p" model with 2 layers of 3 heads, whose attention is known exactly."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np

from serve.pb.limelight.v1 import limelight_pb2 as pb
from serve.pb.limelight.v1.limelight_pb2_grpc import LimelightServiceServicer, add_LimelightServiceServicer_to_server

LAYERS, HEADS = 2, 3
OUTPUT = ("F", "OW1", "N")
"""What is answered, whatever is asked."""
VERSION = pb.ModelVersion(name="g2p", version="3")
ALIGNMENT = pb.Alignment(layers=[1], heads=[2])


def cross_weights(rows: int, columns: int) -> np.ndarray:
    """[layer, head, row, column] float32; head 2 of layer 1 walks along the diagonal, the others are soft."""
    weights = np.random.default_rng(0).dirichlet(np.ones(columns), (LAYERS, HEADS, rows))
    weights[1, 2] = 0.1 / (columns - 1)
    for row in range(rows):
        weights[1, 2, row, min(row * columns // rows, columns - 1)] = 0.9
    return weights.astype(np.float32)


def causal_weights(size: int) -> np.ndarray:
    """[layer, head, row, column] float32; each row looks evenly at what there was by then."""
    rows = np.tril(np.ones((size, size))) / np.arange(1, size + 1)[:, None]
    return np.broadcast_to(rows, (LAYERS, HEADS, size, size)).astype(np.float32)


def attention_message(
    family: pb.AttentionFamily.ValueType, weights: np.ndarray, options: pb.AttentionOptions
) -> pb.Attention:
    layers, heads = (list(side) or list(range(n)) for side, n in ((options.layers, LAYERS), (options.heads, HEADS)))
    chosen = weights[layers][:, heads]
    if options.reduction in (pb.REDUCTION_MEAN, pb.REDUCTION_MAX):
        chosen = chosen.mean((0, 1)) if options.reduction == pb.REDUCTION_MEAN else chosen.max((0, 1))
    dtype = "<f2" if options.float_type == pb.FLOAT_TYPE_FLOAT16 else "<f4"
    return pb.Attention(
        family=family,
        layers=layers,
        heads=heads,
        reduction=options.reduction,
        shape=chosen.shape,
        float_type=options.float_type,
        values=chosen.astype(dtype).tobytes(),
    )


class FakeService(LimelightServiceServicer):
    """Answers from the constants above; sources that start with "!" ask for an error by its name, as in "!NOT_FOUND".

    Attributes:
        requests: all that came, in order.
        release: the source "!wait" waits for it.
        cancelled: set once a stream's caller has gone.
    """

    def __init__(self) -> None:
        self.requests: list[
            pb.GenerateRequest
            | pb.GenerateStreamRequest
            | pb.GenerateChunkedRequest
            | pb.ScoreRequest
            | pb.GetModelRequest
        ] = []
        self.release = threading.Event()
        self.cancelled = threading.Event()
        self.aligned = True

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:  # noqa: N802
        self._take(request, context)
        return answer(request.source, request.attention, request.search.hypotheses or 1)

    def GenerateStream(  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        self.requests.append(request)
        context.add_callback(self.cancelled.set)
        whole = answer(request.source, request.attention, request.search.hypotheses or 1)
        yield pb.GenerateStreamResponse(
            start=pb.StreamStart(model=VERSION, source_tokens=whole.source_tokens, attention=whole.attention)
        )
        best = whole.hypotheses[0]
        for index, token in enumerate(best.tokens):
            if request.source.startswith("!") and index == 2:
                self._take(request, context)
            text = best.text[: token.end] if index == 0 else best.text[best.tokens[index - 1].end : token.end]
            rows = [row(attention, index) for attention in best.attention]
            yield pb.GenerateStreamResponse(token=pb.StreamToken(token=token, text=text, attention=rows))
        if request.source.startswith("?"):
            return
        del best.attention[:]
        yield pb.GenerateStreamResponse(end=pb.StreamEnd(hypotheses=whole.hypotheses))

    def GenerateChunked(  # noqa: N802
        self, request: pb.GenerateChunkedRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateChunkedResponse]:
        """Encoder attention alone, a byte in each chunk."""
        self.requests.append(request)
        context.add_callback(self.cancelled.set)
        whole = answer(request.source, request.attention, 1)
        values = b"".join(attention.values for attention in whole.attention)
        for attention in whole.attention:
            attention.ClearField("values")
        yield pb.GenerateChunkedResponse(answer=whole)
        for offset in range(len(values)):
            piece = values[offset : offset + 1]
            yield pb.GenerateChunkedResponse(
                chunk=pb.AttentionChunk(family=pb.ATTENTION_FAMILY_ENCODER, offset=offset, values=piece)
            )
        yield pb.GenerateChunkedResponse(end=pb.ChunkedEnd(chunks=len(values), size=len(values)))

    def Score(self, request: pb.ScoreRequest, context: grpc.ServicerContext) -> pb.ScoreResponse:  # noqa: N802
        self._take(request, context)
        whole = answer(request.source, request.attention, 1, tuple(request.target.split()))
        return pb.ScoreResponse(
            model=VERSION,
            source_tokens=whole.source_tokens,
            attention=whole.attention,
            hypothesis=whole.hypotheses[0],
        )

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:  # noqa: N802
        self._take(request, context)
        return pb.GetModelResponse(
            model=VERSION,
            task="g2p",
            architecture="Transformer",
            longest_source=64,
            longest_target=48,
            attention=[
                pb.FamilyShape(family=number, layers=LAYERS, heads=HEADS) for number in pb.AttentionFamily.values()[1:]
            ],
            alignment=ALIGNMENT if self.aligned else None,
            precision="fp32",
            provider="cpu",
            quality={"word_error_rate": 24.5},
            shortlist=16,
        )

    def GenerateMany(  # noqa: N802
        self, request_iterator: Iterator[pb.GenerateManyRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateManyResponse]:
        """The last one first; an empty source has its own error."""
        items = list(request_iterator)
        context.add_callback(self.cancelled.set)
        for item in reversed(items):
            if item.request.source.startswith("!"):
                self._take(item.request, context)
            if item.request.source == "":
                error = pb.ItemError(code=3, message="source: is empty", reason="INVALID_FIELD", field="source")
                yield pb.GenerateManyResponse(id=item.id, error=error)
            else:
                whole = answer(item.request.source, item.request.attention, item.request.search.hypotheses or 1)
                yield pb.GenerateManyResponse(id=item.id, answer=whole)

    def ListModels(self, request: pb.ListModelsRequest, context: grpc.ServicerContext) -> pb.ListModelsResponse:  # noqa: N802, ARG002
        summary = pb.ModelSummary(model=VERSION, task="g2p", precision="fp32", provider="cpu")
        return pb.ListModelsResponse(models=[summary])

    def _take(
        self,
        request: pb.GenerateRequest | pb.GenerateStreamRequest | pb.ScoreRequest | pb.GetModelRequest,
        context: grpc.ServicerContext,
    ) -> None:
        if request not in self.requests:
            self.requests.append(request)
        source = "" if isinstance(request, pb.GetModelRequest) else request.source
        if source == "!wait":
            self.release.wait(10)
        elif source.startswith("!"):
            context.abort(getattr(grpc.StatusCode, source[1:]), "source: says the server")


def answer(
    source: str, options: pb.AttentionOptions, hypotheses: int, output: tuple[str, ...] = OUTPUT
) -> pb.GenerateResponse:
    """What is answered: the output, then the same with ever more "Z" behind it."""
    source_tokens = tokens(tuple(source), "")
    encoder = cross_weights(len(source_tokens), len(source_tokens))
    return pb.GenerateResponse(
        model=VERSION,
        source_tokens=source_tokens,
        attention=[
            attention_message(family, encoder, options)
            for family in options.families
            if family == pb.ATTENTION_FAMILY_ENCODER
        ],
        hypotheses=[
            hypothesis((*output, *"Z" * index), len(source_tokens), options, index) for index in range(hypotheses)
        ],
    )


def hypothesis(output: tuple[str, ...], columns: int, options: pb.AttentionOptions, rank: int) -> pb.Hypothesis:
    output_tokens = tokens(output, " ")
    for index, token in enumerate(output_tokens):
        token.log_probability = -0.25 * (index + rank)
    total = sum(token.log_probability for token in output_tokens)
    size = len(output_tokens)
    weights = {
        pb.ATTENTION_FAMILY_DECODER: causal_weights(size),
        pb.ATTENTION_FAMILY_CROSS: cross_weights(size, columns),
    }
    return pb.Hypothesis(
        text=" ".join(output),
        tokens=output_tokens,
        score=total / size,
        log_probability=total,
        finish_reason=pb.FINISH_REASON_LENGTH if rank == 1 else pb.FINISH_REASON_STOP,
        attention=[
            attention_message(family, weights[family], options) for family in options.families if family in weights
        ],
    )


def tokens(words: tuple[str, ...], separator: str) -> list[pb.Token]:
    """Words as tokens with their spans, an end token last."""
    result, start = [], 0
    for index, word in enumerate(words):
        result.append(pb.Token(id=4 + index, text=word, start=start, end=start + len(word)))
        start += len(word) + len(separator)
    end = len(separator.join(words))
    return [*result, pb.Token(id=3, text="</s>", start=end, end=end)]


def row(attention: pb.Attention, index: int) -> pb.Attention:
    """One row of a family, the decoder's cut off after what had been read by then."""
    weights = np.frombuffer(attention.values, "<f2" if attention.float_type == pb.FLOAT_TYPE_FLOAT16 else "<f4")
    weights = weights.reshape(attention.shape)[..., index : index + 1, :]
    if attention.family == pb.ATTENTION_FAMILY_DECODER:
        weights = weights[..., : index + 1]
    one = pb.Attention()
    one.CopyFrom(attention)
    one.shape[:] = weights.shape
    one.values = weights.tobytes()
    return one


@contextmanager
def running(service: LimelightServiceServicer) -> Iterator[str]:
    """A server on a free port; gives its address."""
    server = grpc.server(ThreadPoolExecutor(4))
    add_LimelightServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
