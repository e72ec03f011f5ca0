import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from model.errors import InvalidRequestError, LimelightError
from serve.answers import FamilyName, FloatName, ReductionName
from serve.client import Alignment, Client, End, FamilyShape, Piece, ServerError, Start, Token
from serve.from_proto import read_answer, read_stream
from serve.pb.limelight.v1 import limelight_pb2 as pb
from tests.serve.answers import assert_same
from tests.serve.fake_server import FakeService, answer, causal_weights, cross_weights, running

ALL: tuple[FamilyName, ...] = ("encoder", "decoder", "cross")


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def client(service: FakeService) -> Iterator[Client]:
    with running(service) as address, Client(address) as client:
        yield client


def test_an_answer_is_plain_python(client: Client) -> None:
    answered = client.generate("phone", hypotheses=2)
    assert (answered.model, answered.version) == ("g2p", "3")
    assert answered.source_tokens[0] == Token(id=4, text="p", start=0, end=1)
    assert answered.source_tokens[-1] == Token(id=3, text="</s>", start=5, end=5)
    best, second = answered.hypotheses
    assert answered.best is best
    assert best.text == "F OW1 N"
    assert best.tokens[1] == Token(id=5, text="OW1", start=2, end=5, log_probability=-0.25)
    assert (best.score, best.log_probability, best.finish_reason) == (-0.375, -1.5, "stop")
    assert (second.text, second.finish_reason) == ("F OW1 N Z", "length")
    assert not answered.attention
    assert not best.attention


def test_a_log_probability_of_zero_is_not_none(client: Client) -> None:
    assert client.generate("phone").best.tokens[0].log_probability == 0.0


def test_options_that_are_not_given_are_left_to_the_server(client: Client, service: FakeService) -> None:
    client.generate("phone")
    client.generate("phone", beam_size=4, hypotheses=2, length_penalty=0.0, longest=7, model="g2p")
    plain, full = service.requests
    assert isinstance(plain, pb.GenerateRequest)
    assert isinstance(full, pb.GenerateRequest)
    assert plain.search == pb.SearchOptions()
    assert full.search == pb.SearchOptions(beam_size=4, hypotheses=2, length_penalty=0.0, longest=7)
    assert full.search.HasField("length_penalty")
    assert full.model == "g2p"


@pytest.mark.parametrize("float_type", ["float32", "float16"])
def test_attention_comes_with_every_layer_and_head(client: Client, float_type: FloatName) -> None:
    answered = client.generate("phone", families=ALL, float_type=float_type)
    assert set(answered.attention) == {"encoder"}
    assert set(answered.best.attention) == {"decoder", "cross"}
    cross = answered.best.attention["cross"]
    assert (cross.family, cross.layers, cross.heads, cross.reduction) == ("cross", (0, 1), (0, 1, 2), "none")
    assert cross.weights.dtype == np.dtype(float_type)
    assert cross.weights.dtype.isnative
    assert not cross.weights.flags.writeable
    np.testing.assert_array_equal(cross.weights, cross_weights(4, 6).astype(float_type))
    np.testing.assert_array_equal(answered.best.attention["decoder"].weights, causal_weights(4).astype(float_type))
    np.testing.assert_array_equal(answered.attention["encoder"].weights, cross_weights(6, 6).astype(float_type))


def test_layers_and_heads_are_chosen(client: Client) -> None:
    cross = client.generate("phone", families=["cross"], layers=[1], heads=[2, 0]).best.attention["cross"]
    assert (cross.layers, cross.heads) == ((1,), (2, 0))
    np.testing.assert_array_equal(cross.weights, cross_weights(4, 6)[[1]][:, [2, 0]])


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_attention_comes_reduced(client: Client, reduction: ReductionName) -> None:
    cross = client.generate("phone", families=["cross"], reduction=reduction).best.attention["cross"]
    whole = cross_weights(4, 6)
    assert (cross.layers, cross.heads, cross.reduction) == ((0, 1), (0, 1, 2), reduction)
    expected = whole.mean((0, 1)) if reduction == "mean" else whole.max((0, 1))
    # A mean's last digit depends on the order of its summands in memory.
    np.testing.assert_allclose(cross.weights, expected, rtol=0, atol=1e-6 if reduction == "mean" else 0)


def test_an_answer_may_be_larger_than_grpc_allows_by_default(client: Client) -> None:
    weights = client.generate("x" * 500, families=["encoder"]).attention["encoder"].weights
    assert weights.shape == (2, 3, 501, 501)
    assert weights.nbytes > 4 * 1024 * 1024


@pytest.mark.parametrize(
    ("family", "rows", "columns"),
    [
        ("encoder", (*"phone", "</s>"), (*"phone", "</s>")),
        ("decoder", ("F", "OW1", "N", "Z", "</s>"), ("<s>", "F", "OW1", "N", "Z")),
        ("cross", ("F", "OW1", "N", "Z", "</s>"), (*"phone", "</s>")),
    ],
)
def test_a_picture_is_labelled(
    client: Client, family: FamilyName, rows: tuple[str, ...], columns: tuple[str, ...]
) -> None:
    picture = client.generate("phone", hypotheses=2, families=ALL).picture(family, hypothesis=1)
    assert (picture.family, picture.rows, picture.columns) == (family, rows, columns)
    assert (picture.layers, picture.heads) == ((0, 1), (0, 1, 2))


def test_a_picture_of_merged_attention_keeps_the_number_of_what_was_single(client: Client) -> None:
    picture = client.generate("phone", families=["cross"], layers=[1], reduction="mean").picture()
    assert (picture.layers, picture.heads, picture.weights.shape) == ((1,), (), (1, 1, 4, 6))


def test_a_picture_needs_its_attention(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=r"families: decoder is not in this answer, which holds cross: ask"):
        client.generate("phone", families=["cross"]).picture("decoder")


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("float_type", ["float32", "float16"])
def test_a_stream_ends_with_the_answer_that_generate_gives(
    client: Client, reduction: ReductionName, float_type: FloatName
) -> None:
    start, *pieces, end = client.stream("phone", hypotheses=2, families=ALL, reduction=reduction, float_type=float_type)
    unary = client.generate("phone", hypotheses=2, families=ALL, reduction=reduction, float_type=float_type)
    assert isinstance(start, Start)
    assert isinstance(end, End)
    assert (start.model, start.source_tokens) == ("g2p", unary.source_tokens)
    assert_same(end.answer, unary)
    texts = []
    for index, piece in enumerate(pieces):
        assert isinstance(piece, Piece)
        assert piece.token == unary.best.tokens[index]
        rows = unary.best.attention["cross"].weights[..., index : index + 1, :]
        np.testing.assert_array_equal(piece.attention["cross"].weights, rows, strict=True)
        texts.append(piece.text)
    assert "".join(texts) == unary.best.text


@pytest.mark.parametrize("float_type", ["float32", "float16"])
def test_chunks_amount_to_the_answer_that_generate_gives(
    client: Client, service: FakeService, float_type: FloatName
) -> None:
    chunked = client.generate_chunked("phone", families=["encoder"], float_type=float_type, longest=7, model="g2p")
    assert_same(chunked, client.generate("phone", families=["encoder"], float_type=float_type))
    asked = service.requests[0]
    assert isinstance(asked, pb.GenerateChunkedRequest)
    assert (asked.model, asked.search) == ("g2p", pb.SearchOptions(longest=7))


def test_a_stream_without_attention_has_none(client: Client) -> None:
    *_, end = client.stream("phone")
    assert isinstance(end, End)
    assert not end.answer.best.attention


def test_a_stream_that_is_left_is_cancelled(client: Client, service: FakeService) -> None:
    events = client.stream("!wait")
    assert isinstance(next(events), Start)
    assert isinstance(next(events), Piece)
    events.close()
    assert service.cancelled.wait(10)
    service.release.set()


def test_a_stream_can_fail_after_some_tokens(client: Client) -> None:
    events = client.stream("!NOT_FOUND")
    assert [type(next(events)) for _ in range(3)] == [Start, Piece, Piece]
    with pytest.raises(ServerError, match="source: says the server") as caught:
        next(events)
    assert caught.value.code == grpc.StatusCode.NOT_FOUND


def test_a_stream_that_stops_without_its_end_is_an_error(client: Client) -> None:
    with pytest.raises(ServerError, match="a stream that stopped after 4 tokens, without its end"):
        list(client.stream("?"))


def test_scores_a_pair(client: Client, service: FakeService) -> None:
    scored = client.score("phone", "F OW2 N", length_penalty=0.5, families=["cross"], heads=[2])
    assert service.requests[0] == pb.ScoreRequest(
        source="phone",
        target="F OW2 N",
        length_penalty=0.5,
        attention=pb.AttentionOptions(
            families=[pb.ATTENTION_FAMILY_CROSS],
            heads=[2],
            reduction=pb.REDUCTION_NONE,
            float_type=pb.FLOAT_TYPE_FLOAT32,
        ),
    )
    assert [hypothesis.text for hypothesis in scored.hypotheses] == ["F OW2 N"]
    assert scored.best.attention["cross"].weights.shape == (2, 1, 4, 6)
    assert scored.picture().rows == ("F", "OW2", "N", "</s>")


def test_describes_the_model(client: Client, service: FakeService) -> None:
    info = client.describe()
    assert (info.name, info.version, info.task, info.architecture) == ("g2p", "3", "g2p", "Transformer")
    assert (info.longest_source, info.longest_target, info.precision, info.provider) == (64, 48, "fp32", "cpu")
    assert info.attention == dict.fromkeys(ALL, FamilyShape(layers=2, heads=3))
    assert info.alignment == Alignment(layers=(1,), heads=(2,))
    assert info.quality == {"word_error_rate": 24.5}
    assert info.shortlist == 16
    service.aligned = False
    assert client.describe().alignment is None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "^source: says the server$"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "^source: says the server$"),
        (grpc.StatusCode.UNAVAILABLE, r"^127.0.0.1:\d+: source: says the server$"),
        (grpc.StatusCode.INTERNAL, r"^127.0.0.1:\d+: the server failed: source: says the server$"),
    ],
)
def test_a_refusal_has_the_servers_code_and_words(client: Client, code: grpc.StatusCode, message: str) -> None:
    with pytest.raises(ServerError, match=message) as caught:
        client.generate(f"!{code.name}")
    assert caught.value.code == code
    assert isinstance(caught.value, LimelightError)


def test_a_server_of_something_else_is_named() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as client, pytest.raises(ServerError, match=f"{port}: no server of limelight.v1"):
        client.describe()
    server.stop(None).wait()


def test_where_nobody_listens_it_says_how_to_start_a_server() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound, so that nobody else takes the port, but never listening
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Client(address) as client, pytest.raises(ServerError) as caught:
            client.generate("phone")
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE
    assert str(caught.value).startswith(
        f"{address}: no Limelight server answers there: start one with `limelight serve"
    )


def test_a_slow_answer_is_given_up(service: FakeService) -> None:
    with running(service) as address, Client(address, timeout=0.2) as client:
        with pytest.raises(ServerError, match=f"{address}: no answer within 0.2 s: allow more time") as unary:
            client.generate("!wait")
        with pytest.raises(ServerError) as stream:
            list(client.stream("!wait"))
        service.release.set()
    assert unary.value.code == stream.value.code == grpc.StatusCode.DEADLINE_EXCEEDED


def test_an_answer_that_is_too_large_says_what_to_do(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.client.CHANNEL_OPTIONS", (("grpc.max_receive_message_length", 1000),))
    with (
        running(service) as address,
        Client(address) as client,
        pytest.raises(
            ServerError, match=r"larger than max.*: ask for fewer layers and heads, a reduction, float16 or chunks"
        ),
    ):
        client.generate("phone" * 10, families=["encoder"])


@pytest.mark.parametrize(
    ("source", "beam_size", "message"),
    [("\udcff", 1, "request: cannot be sent: .*surrogates"), ("phone", 2**31, "request: cannot be sent: Value out of")],
)
def test_what_protobuf_cannot_hold_is_not_sent(client: Client, source: str, beam_size: int, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        client.generate(source, beam_size=beam_size)
    with pytest.raises(InvalidRequestError, match=message):
        client.stream(source, beam_size=beam_size)


def test_a_string_is_no_list_of_its_letters(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=r"attention.families: is the one string 'cross', where a list of"):
        client.generate("phone", families="cross")  # type: ignore[arg-type]  # the mistake that is tested
    with pytest.raises(
        InvalidRequestError, match=r"suppressed: is the one string 'AH', where a list of strings is need"
    ):
        client.stream("phone", suppressed="AH")


def test_an_unknown_name_is_refused_with_the_known_ones(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=r"attention.families: 'c' is unknown: choose from encoder, decoder,"):
        client.generate("phone", families=["c"])  # type: ignore[list-item]  # the mistake that is tested
    with pytest.raises(
        InvalidRequestError, match=r"attention.reduction: 'sum' is unknown: choose from none, mean, max"
    ):
        client.generate("phone", reduction="sum")  # type: ignore[arg-type]


def test_an_answer_that_contradicts_itself_is_refused() -> None:
    options = pb.AttentionOptions(families=[pb.ATTENTION_FAMILY_CROSS], reduction=pb.REDUCTION_NONE)
    message = answer("phone", options, 1)
    cross = message.hypotheses[0].attention[0]
    cross.values = cross.values[:-1]
    with pytest.raises(ServerError, match=r"attention of shape \(2, 3, 4, 6\), reduction none, in 575 bytes"):
        read_answer(message)
    del cross.shape[:2]
    with pytest.raises(ServerError, match=r"attention of shape \(4, 6\)"):
        read_answer(message)
    with pytest.raises(ServerError, match="an answer without hypotheses"):
        read_answer(pb.GenerateResponse())


def test_a_value_from_the_future_is_refused() -> None:
    message = answer("phone", pb.AttentionOptions(), 1)
    message.hypotheses[0].ClearField("finish_reason")
    with pytest.raises(
        ServerError, match="sent the value 0 where stop, length are known: client and server may differ"
    ):
        read_answer(message)


def test_what_is_not_set_means_float32_kept_apart() -> None:
    message = answer("phone", pb.AttentionOptions(families=[pb.ATTENTION_FAMILY_CROSS]), 1)
    assert message.hypotheses[0].attention[0].float_type == pb.FLOAT_TYPE_UNSPECIFIED
    cross = read_answer(message).best.attention["cross"]
    assert cross.reduction == "none"
    assert cross.weights.dtype == np.float32


def test_a_stream_must_start_and_send_every_token() -> None:
    hypotheses = answer("phone", pb.AttentionOptions(), 1).hypotheses
    end = pb.GenerateStreamResponse(end=pb.StreamEnd(hypotheses=hypotheses))
    with pytest.raises(ServerError, match="a stream with the event end after 0 tokens"):
        list(read_stream([end]))
    with pytest.raises(ServerError, match="a stream of 0 tokens for an answer of 4"):
        list(read_stream([pb.GenerateStreamResponse(start=pb.StreamStart()), end]))


def test_a_stream_is_read_to_its_status() -> None:
    best = answer("phone", pb.AttentionOptions(), 1).hypotheses[0]
    tokens = [pb.GenerateStreamResponse(token=pb.StreamToken(token=token)) for token in best.tokens]
    start = pb.GenerateStreamResponse(start=pb.StreamStart())
    end = pb.GenerateStreamResponse(end=pb.StreamEnd(hypotheses=[best]))

    def failing() -> Iterator[pb.GenerateStreamResponse]:
        yield from (start, *tokens, end)
        raise OSError("the status")

    events = read_stream(failing())
    assert [type(next(events)) for _ in range(6)] == [Start, Piece, Piece, Piece, Piece, End]
    with pytest.raises(OSError, match="the status"):
        next(events)
    with pytest.raises(ServerError, match="a stream with the event token after its end"):
        list(read_stream([start, *tokens, end, tokens[0]]))


def test_needs_no_torch_and_no_engine() -> None:
    check = (
        "import sys; sys.modules['torch'] = None; import serve.ask, serve.client; "
        "print([name for name in ('onnxruntime', 'tokenizers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
