"""The Open Inference Protocol: text in, text and attention out, the same that `limelight.v1` answers."""

import dataclasses
from typing import Any

import grpc
import numpy as np
import pytest

from serve.bundle import ServedModel
from serve.inference import INFERENCE
from serve.pb.inference import grpc_service_pb2 as pb
from serve.pb.limelight.v1 import limelight_pb2 as ours
from serve.tensors import MOST_TEXTS, OUTPUTS
from tests.reversal import parts
from tests.serve.inferring import infer, refused, request, stream, stub, tensors
from tests.serve.running import PATIENCE, Running, array, serving
from tests.serve.steps import Gated

TEXTS = parts()["test"][:5]
OK = grpc.StatusCode.OK


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("shape", [[5], [5, 1]])
def test_texts_are_answered_in_their_order(running: Running, typed: bool, shape: list[int]) -> None:
    found = infer(running, request(TEXTS, typed=typed, shape=shape))
    assert list(found) == ["TEXT", "SCORE"]
    assert found["TEXT"].tolist() == [[text[::-1]] for text in TEXTS]
    assert found["SCORE"].shape == (5, 1)


def test_a_response_says_who_answered_what(running: Running) -> None:
    response = stub(running).ModelInfer(request(), timeout=PATIENCE)
    assert (response.model_name, response.model_version, response.id) == ("reversal", "1", "seven")
    assert [(one.name, one.datatype) for one in response.outputs] == [("TEXT", "BYTES"), ("SCORE", "FP32")]


def answer(running: Running, text: str) -> ours.GenerateResponse:
    """The same in `limelight.v1`."""
    return running.stub.Generate(
        ours.GenerateRequest(
            source=text,
            search=ours.SearchOptions(beam_size=3, hypotheses=2, length_penalty=0.5),
            attention=ours.AttentionOptions(families=[1, 2, 3]),  # type: ignore[list-item]
        ),
        timeout=PATIENCE,
    )


def test_every_output_is_what_our_own_protocol_answers(running: Running) -> None:
    found = infer(running, request(TEXTS, list(OUTPUTS), beam_size=3, hypotheses=2, length_penalty=0.5))
    assert list(found) == list(OUTPUTS)
    for index, text in enumerate(TEXTS):
        expected = answer(running, text)
        source = len(expected.source_tokens)
        assert found["SOURCE_LENGTH"][index].tolist() == [source]
        assert found["SOURCE_TOKENS"][index].tolist()[:source] == [token.text for token in expected.source_tokens]
        np.testing.assert_allclose(
            found["ENCODER_ATTENTION"][index][:, :, :source, :source], array(expected.attention[0]), atol=1e-5
        )
        for number, hypothesis in enumerate(expected.hypotheses):
            one = {name: values[index][number] for name, values in found.items() if "hypothesis" in OUTPUTS[name].axes}
            compare(one, hypothesis, source)


def compare(found: dict[str, Any], expected: ours.Hypothesis, source: int) -> None:
    """One hypothesis in both protocols; what is filled up is empty."""
    target = len(expected.tokens)
    assert (found["TEXT"], found["TARGET_LENGTH"], found["FINISH_REASON"]) == (expected.text, target, "stop")
    assert found["TOKENS"].tolist()[:target] == [token.text for token in expected.tokens]
    assert set(found["TOKENS"][target:]) <= {""}
    np.testing.assert_allclose(found["SCORE"], expected.score, atol=1e-5)
    np.testing.assert_allclose(found["LOG_PROBABILITY"], expected.log_probability, atol=1e-5)
    for name, values, columns in zip(
        ("DECODER_ATTENTION", "CROSS_ATTENTION"), map(array, expected.attention), (target, source), strict=True
    ):
        np.testing.assert_allclose(found[name][:, :, :target, :columns], values, atol=1e-5)
        assert not found[name][:, :, target:].any()
        assert not found[name][:, :, :, columns:].any()


def test_the_cross_attention_is_the_anti_diagonal(running: Running) -> None:
    text = TEXTS[0]
    weights = infer(running, request([text], ["CROSS_ATTENTION"], reduction="mean"))["CROSS_ATTENTION"]
    assert weights.shape == (1, 1, len(text) + 1, len(text) + 1)
    assert weights[0, 0, :-1, :-1].argmax(-1).tolist() == list(range(len(text)))[::-1]


def test_layers_and_heads_are_chosen(running: Running) -> None:
    asked = ["ENCODER_ATTENTION", "SOURCE_LENGTH"]
    everything = infer(running, request(TEXTS, asked))["ENCODER_ATTENTION"]
    chosen = infer(running, request(TEXTS, asked, layers="[1]", heads="[1, 0]"))["ENCODER_ATTENTION"]
    assert everything.shape[1:3] == (2, 2)
    np.testing.assert_allclose(chosen, everything[:, [1]][:, :, [1, 0]], atol=1e-5)


@pytest.mark.parametrize("output", ["CROSS_ATTENTION", "DECODER_ATTENTION", "ENCODER_ATTENTION"])
def test_only_attention_that_is_asked_for_is_computed(gated: Running, gate: Gated, output: str) -> None:
    gate.open()
    infer(gated, request())
    assert set().union(*gate.families) == set()
    infer(gated, request(outputs=[output]))
    assert set().union(*gate.families) == {OUTPUTS[output].family}


def test_texts_of_a_request_are_decoded_together(gated: Running, gate: Gated) -> None:
    call = stub(gated).ModelInfer.future(request(["ab", "cd"]), timeout=PATIENCE)
    gate.open()
    assert tensors(call.result())["TEXT"].shape == (2, 1)
    assert gate.batches == [2]


def test_an_empty_batch_has_empty_answers(running: Running) -> None:
    found = infer(running, request([], list(OUTPUTS), shape=[0, 1], beam_size=3, hypotheses=2))
    assert {name: values.shape for name, values in found.items()} == {
        "TEXT": (0, 2),
        "SCORE": (0, 2),
        "LOG_PROBABILITY": (0, 2),
        "FINISH_REASON": (0, 2),
        "TOKENS": (0, 2, 0),
        "TARGET_LENGTH": (0, 2),
        "SOURCE_TOKENS": (0, 0),
        "SOURCE_LENGTH": (0, 1),
        "CROSS_ATTENTION": (0, 2, 1, 2, 0, 0),
        "DECODER_ATTENTION": (0, 2, 1, 2, 0, 0),
        "ENCODER_ATTENTION": (0, 2, 2, 0, 0),
    }


def test_search_options_are_parameters(running: Running) -> None:
    short = infer(running, request(["abcdef"], ["TARGET_LENGTH", "FINISH_REASON"], longest=2))
    assert (short["TARGET_LENGTH"].tolist(), short["FINISH_REASON"].tolist()) == ([[2]], [["length"]])
    begun = infer(running, request(["abcdef"], ["TEXT"], prefix="ab"))
    assert begun["TEXT"][0, 0].startswith("ab")
    without = infer(running, request(["abcdef"], ["TOKENS"], suppressed='["a", "f"]'))
    assert not {"a", "f"} & set(without["TOKENS"].ravel())


def test_sampling_options_are_parameters(running: Running) -> None:
    hot = request(["abcdef"], ["TEXT"], temperature=20.0, top_k=5, seed=3)
    first, second = (infer(running, hot)["TEXT"][0, 0] for _ in range(2))
    assert first == second != "fedcba"


def test_a_fraction_may_come_as_a_string_or_an_integer(running: Running) -> None:
    asked = ["SCORE", "LOG_PROBABILITY"]
    for zero in ("0.0", 0, 0.0):
        found = infer(running, request(outputs=asked, length_penalty=zero))
        np.testing.assert_allclose(found["SCORE"], found["LOG_PROBABILITY"])


def test_what_kserves_clients_add_for_http_changes_nothing(running: Running) -> None:
    asked = request(outputs=["TEXT"], binary_data_output=True)
    asked.inputs[0].parameters["binary_data_size"].int64_param = 8
    asked.outputs[0].parameters["binary_data"].bool_param = True
    assert infer(running, asked)["TEXT"].item() == "dcba"


def test_a_stream_answers_in_order_and_goes_on_after_an_error(running: Running) -> None:
    asked = [request([text]) for text in TEXTS]
    asked.insert(2, request(["ab"], model="x"))
    answers = stream(running, asked)
    assert [one.error_message for one in answers] == ["", "", "model 'x' is not served here", "", "", ""]
    assert answers[2].infer_response.id == "seven"
    found = [tensors(one.infer_response)["TEXT"].item() for one in answers if not one.error_message]
    assert found == [text[::-1] for text in TEXTS]


def test_a_stream_marks_every_response_as_the_last_to_its_request(running: Running) -> None:
    for one in stream(running, [request(triton_enable_empty_final_response=True), request()]):
        assert one.infer_response.parameters["triton_final_response"].bool_param
    assert not stub(running).ModelInfer(request(), timeout=PATIENCE).parameters


def test_a_stream_of_a_server_that_stops_ends(gated: Running, gate: Gated) -> None:
    answers = stub(gated).ModelStreamInfer(iter([request()]), timeout=PATIENCE)
    gate.wait()
    stopped = gated.stop()
    gate.open()
    assert [tensors(one.infer_response)["TEXT"].shape for one in answers] == [(1, 1)]
    assert stopped.result(PATIENCE)


def test_a_request_that_is_given_up_leaves_its_rows(gated: Running, gate: Gated) -> None:
    call = stub(gated).ModelInfer.future(request(["abcd", "efgh"]), timeout=PATIENCE)
    gate.wait()
    call.cancel()
    gated.until_idle()
    gate.open()
    assert infer(gated, request(["abcd"]))["TEXT"].item() == "dcba"
    assert gate.rows[-1] == 1


def test_a_timeout_is_a_deadline(gated: Running, gate: Gated) -> None:
    code, _ = refused(gated, "ModelInfer", request(timeout=1))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert gate.passes == []


@pytest.mark.parametrize("place", [0, 1])
def test_a_text_that_finds_no_place_gives_all_of_its_request_up(gated: Running, gate: Gated, place: int) -> None:
    """The engine has two places in its queue, and one text under way."""
    first = stub(gated).ModelInfer.future(request(), timeout=PATIENCE)
    gate.wait()
    code, _ = refused(gated, "ModelInfer", request(["ab"] * (3 + place)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    gate.open()
    assert tensors(first.result(PATIENCE))["TEXT"].item() == "dcba"
    assert gate.batches == [1]


def test_the_server_is_live_and_ready(running: Running) -> None:
    assert stub(running).ServerLive(pb.ServerLiveRequest(), timeout=PATIENCE).live
    assert stub(running).ServerReady(pb.ServerReadyRequest(), timeout=PATIENCE).ready
    about = stub(running).ServerMetadata(pb.ServerMetadataRequest(), timeout=PATIENCE)
    assert about.name == "limelight"
    assert "model_repository" in about.extensions


def test_a_server_that_stops_is_live_but_not_ready(gated: Running, gate: Gated) -> None:
    call = stub(gated).ModelInfer.future(request(), timeout=PATIENCE)
    gate.wait()
    stopped = gated.stop()
    while stub(gated).ServerReady(pb.ServerReadyRequest(), timeout=PATIENCE).ready:
        pass
    assert stub(gated).ServerLive(pb.ServerLiveRequest(), timeout=PATIENCE).live
    code, _ = refused(gated, "ModelInfer", request())
    assert code == grpc.StatusCode.UNAVAILABLE
    gate.open()
    assert tensors(call.result(PATIENCE))["TEXT"].item() == "dcba"
    assert stopped.result(PATIENCE)


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [("reversal", "", True), ("reversal", "1", True), ("reversal", "2", False), ("x", "", False)],
)
def test_a_model_is_ready(running: Running, name: str, version: str, ready: bool) -> None:
    response = stub(running).ModelReady(pb.ModelReadyRequest(name=name, version=version), timeout=PATIENCE)
    assert response.ready == ready


def test_metadata_and_configuration_name_the_same_tensors(running: Running) -> None:
    metadata = stub(running).ModelMetadata(pb.ModelMetadataRequest(name="reversal"), timeout=PATIENCE)
    config = stub(running).ModelConfig(pb.ModelConfigRequest(name="reversal"), timeout=PATIENCE).config
    assert (metadata.name, list(metadata.versions), config.name) == ("reversal", ["1"], "reversal")
    assert [(one.name, list(one.shape)) for one in metadata.inputs] == [("SOURCE", [-1, 1])]
    assert [(one.name, list(one.dims)) for one in config.input] == [("SOURCE", [1])]
    outputs = [(one.name, one.datatype, list(one.shape)[1:]) for one in metadata.outputs]
    types = {pb.TYPE_STRING: "BYTES", pb.TYPE_FP32: "FP32", pb.TYPE_INT64: "INT64"}
    assert outputs == [(one.name, types[one.data_type], list(one.dims)) for one in config.output]
    assert [name for name, _, _ in outputs] == list(OUTPUTS)
    assert config.max_batch_size == MOST_TEXTS
    assert config.parameters["longest_source"].string_value == "24"


def test_answers_have_the_types_and_ranks_that_metadata_says(running: Running) -> None:
    metadata = stub(running).ModelMetadata(pb.ModelMetadataRequest(name="reversal"), timeout=PATIENCE)
    response = stub(running).ModelInfer(request(TEXTS, list(OUTPUTS)), timeout=PATIENCE)
    said = {one.name: (one.datatype, list(one.shape)) for one in metadata.outputs}
    for output in response.outputs:
        datatype, shape = said[output.name]
        assert output.datatype == datatype
        assert [size if at == -1 else at for size, at in zip(output.shape, shape, strict=True)] == list(output.shape)


def test_a_model_without_a_family_has_no_such_output(served: ServedModel) -> None:
    manifest = served.manifest
    cross = {"cross": manifest.attention["cross"]}
    with serving(dataclasses.replace(served, manifest=manifest.model_copy(update={"attention": cross}))) as running:
        metadata = stub(running).ModelMetadata(pb.ModelMetadataRequest(name="reversal"), timeout=PATIENCE)
        assert {one.name for one in metadata.outputs if "ATTENTION" in one.name} == {"CROSS_ATTENTION"}
        code, text = refused(running, "ModelInfer", request(outputs=["ENCODER_ATTENTION"]))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert text.startswith("outputs: model 'reversal' has no output 'ENCODER_ATTENTION', only TEXT, ")


def statistics(running: Running, **which: str) -> pb.ModelStatistics:
    (found,) = stub(running).ModelStatistics(pb.ModelStatisticsRequest(**which), timeout=PATIENCE).model_stats
    return found


def test_statistics_count_what_was_answered(served: ServedModel) -> None:
    with serving(served) as running:
        assert statistics(running) == pb.ModelStatistics(name="reversal", version="1")
        for texts in (["ab"], ["abc", "def"]):
            infer(running, request(texts))
        refused(running, "ModelInfer", request([""]))
        found = statistics(running, name="reversal", version="1")
    stats = found.inference_stats
    assert (found.inference_count, found.execution_count) == (3, 2)
    assert (stats.success.count, stats.fail.count) == (2, 1)
    parts_of_it = [stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output]
    assert [one.count for one in parts_of_it] == [2, 2, 2, 2]
    assert 0 < sum(one.ns for one in parts_of_it) <= stats.success.ns
    assert found.last_inference > 0


NOT_OFFERED = [
    *(f"{kind}SharedMemory{what}" for kind in ("System", "Cuda") for what in ("Status", "Register", "Unregister")),
    "TraceSetting",
    "LogSettings",
]


@pytest.mark.parametrize("call", NOT_OFFERED)
def test_calls_that_are_not_offered_say_why(running: Running, call: str) -> None:
    code, text = refused(running, call, getattr(pb, f"{call}Request")())
    assert code == grpc.StatusCode.UNIMPLEMENTED
    assert "this server" in text


def test_every_call_of_the_service_is_answered_or_refused_on_purpose() -> None:
    service = pb.DESCRIPTOR.services_by_name[INFERENCE.rpartition(".")[2]]
    answered = {
        "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelStreamInfer",
        "ModelConfig", "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
    }  # fmt: skip
    assert {method.name for method in service.methods} == answered | set(NOT_OFFERED)
