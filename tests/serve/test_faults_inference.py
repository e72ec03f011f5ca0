"""Faults of requests in the Open Inference Protocol: refused before anything is computed, naming what was expected."""

import math
import re
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from serve.pb.inference import grpc_service_pb2 as pb
from serve.tensors import MOST_TEXTS, pack_bytes
from tests.serve.inferring import infer, parameter, refused, request, stub
from tests.serve.running import PATIENCE, Running
from tests.serve.steps import Gated

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND

CALLS = ("ModelInfer", "ModelStreamInfer")

OURS = re.compile(r"Traceback|site-packages|\.py\b|onnx|(^|\s)/\w", re.IGNORECASE)
"""Of a file, a traceback or the runtime: not for clients."""

AB = pack_bytes([b"ab"])


def source(shape: Any = (1, 1), datatype: str = "BYTES", name: str = "SOURCE", **contents: Any) -> Any:
    typed = pb.InferTensorContents(**contents) if contents else None
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, contents=typed)


def asked(*inputs: Any, raw: Any = (AB,), outputs: Any = ()) -> pb.ModelInferRequest:
    """A request as it stands, right or wrong."""
    named = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs]
    return pb.ModelInferRequest(model_name="reversal", inputs=inputs, raw_input_contents=raw, outputs=named)


@pytest.fixture
def untouched(gated: Running, gate: Gated) -> Iterator[Running]:
    """A server that computes nothing, and must be none the worse for it."""
    yield gated
    assert gate.passes == []
    gated.until_idle()
    engine, calls = gated.engine, gated.server._calls
    assert (calls.in_flight, engine.waiting, engine.waiting_tokens, engine.waiting_bytes, engine.rows) == (0,) * 5
    gate.open()
    assert infer(gated, request())["TEXT"].item() == "dcba"


def check(running: Running, call: str, wrong: pb.ModelInferRequest, text: str, code: Any = INVALID) -> None:
    """A call refuses a request with a status, in a stream with an error, and says why."""
    found, said = refused(running, call, wrong)
    assert found == (grpc.StatusCode.OK if call == "ModelStreamInfer" else code)
    assert said == text
    assert not OURS.search(said)


INPUTS: dict[str, tuple[pb.ModelInferRequest, str]] = {
    "none": (asked(raw=[]), "inputs: model 'reversal' takes the input 'SOURCE' once, got it 0 times"),
    "unknown": (asked(source(name="X")), "inputs: model 'reversal' has no input 'X', only 'SOURCE'"),
    "extra": (
        asked(source(), source(name="X"), raw=[AB, AB]),
        "inputs: model 'reversal' has no input 'X', only 'SOURCE'",
    ),
    "twice": (
        asked(source(), source(), raw=[AB, AB]),
        "inputs: model 'reversal' takes the input 'SOURCE' once, got it 2 times",
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", INPUTS)
def test_fault_09_no_unknown_extra_or_duplicate_input(untouched: Running, call: str, name: str) -> None:
    check(untouched, call, *INPUTS[name])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("datatype", ["FP32", "INT64", "STRING", "bytes", "", "\0"])
def test_fault_10_a_wrong_or_bogus_data_type(untouched: Running, call: str, datatype: str) -> None:
    text = f"inputs: 'SOURCE' of model 'reversal' has the data type BYTES, got {datatype!r}"
    check(untouched, call, asked(source(datatype=datatype)), text)


SHAPES = [[], [1, 1, 1], [1, 2], [-1, 1], [-1], [1, -1], [-1, -1], [2**32, 2**32], [2**62, 4, 1], [-(2**63), 1]]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fault_10_a_wrong_rank_and_fault_11_sizes(untouched: Running, call: str, shape: list[int]) -> None:
    text = f"inputs: 'SOURCE' of model 'reversal' has the shape [texts] or [texts, 1], got {shape}"
    check(untouched, call, asked(source(shape)), text)


@pytest.mark.parametrize("count", [MOST_TEXTS + 1, 2**32, 2**62, 2**63 - 1])
def test_fault_11_more_texts_than_a_request_may_have(untouched: Running, count: int) -> None:
    text = f"inputs: 'SOURCE' of model 'reversal' takes at most {MOST_TEXTS} texts in a request, got {count}"
    check(untouched, "ModelInfer", asked(source([count, 1])), text)


CONTENTS: dict[str, tuple[pb.ModelInferRequest, str]] = {
    "too few elements": (
        asked(source([2, 1])),
        "raw_input_contents: element 1 of 2 ends at byte 10, got 6 bytes",
    ),
    "too many elements": (
        asked(source(), raw=[AB + AB]),
        "raw_input_contents: 1 elements end at byte 6, got 12 bytes",
    ),
    "an element beyond the end": (
        asked(source(), raw=[b"\x09\0\0\0ab"]),
        "raw_input_contents: element 0 of 1 ends at byte 13, got 6 bytes",
    ),
    "a length of 2 ^ 32 - 1": (
        asked(source(), raw=[b"\xff\xff\xff\xffab"]),
        "raw_input_contents: element 0 of 1 ends at byte 4294967299, got 6 bytes",
    ),
    "half a length": (
        asked(source(), raw=[b"\x01\0"]),
        "raw_input_contents: element 0 of 1 ends at byte 5, got 2 bytes",
    ),
    "no bytes": (
        asked(source(), raw=[b""]),
        "raw_input_contents: element 0 of 1 ends at byte 4, got 0 bytes",
    ),
    "raw and typed": (
        asked(source(bytes_contents=[b"ab"])),
        "inputs: 'SOURCE' of model 'reversal' has both raw and typed contents: send one",
    ),
    "neither": (asked(source(), raw=[]), "inputs: 'SOURCE' of model 'reversal' has 1 texts by its shape, got 0"),
    "two raw contents": (
        asked(source(), raw=[AB, AB]),
        "raw_input_contents: model 'reversal' takes one input, got contents of 2",
    ),
    "typed of another type": (
        asked(source(fp32_contents=[math.nan]), raw=[]),
        "inputs: 'SOURCE' of model 'reversal' is in bytes_contents, got fp32_contents",
    ),
    "too many typed": (
        asked(source(bytes_contents=[b"ab", b"cd"]), raw=[]),
        "inputs: 'SOURCE' of model 'reversal' has 1 texts by its shape, got 2",
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", CONTENTS)
def test_fault_11_shape_and_contents_differ(untouched: Running, call: str, name: str) -> None:
    check(untouched, call, *CONTENTS[name])


@pytest.mark.parametrize("shape", [[0], [0, 1]])
@pytest.mark.parametrize("raw", [[b""], []])
def test_fault_12_an_empty_batch_is_answered(untouched: Running, shape: list[int], raw: list[bytes]) -> None:
    assert infer(untouched, asked(source(shape), raw=raw))["TEXT"].shape == (0, 1)


@pytest.mark.parametrize("shape", [[1, 0], [0, 0], [0, 2]])
def test_fault_12_rows_without_a_text_are_refused(untouched: Running, shape: list[int]) -> None:
    text = f"inputs: 'SOURCE' of model 'reversal' has the shape [texts] or [texts, 1], got {shape}"
    check(untouched, "ModelInfer", asked(source(shape), raw=[b""]), text)


TEXTS: dict[str, tuple[bytes, str]] = {
    "no UTF-8": (b"a\xff", "inputs.SOURCE[1]: is not UTF-8: invalid start byte"),
    "half a character": (b"a\xc3", "inputs.SOURCE[1]: is not UTF-8: unexpected end of data"),
    "a lone surrogate": (b"\xed\xa0\x80", "inputs.SOURCE[1]: is not UTF-8: invalid continuation byte"),
    "nothing": (b"", "inputs.SOURCE[1]: is empty"),
    "too many tokens": (
        b"a" * 24,
        "inputs.SOURCE[1]: 25 tokens, the end token among them, are over the limit of 24; split the text",
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", TEXTS)
def test_fault_13_a_text_that_makes_no_tokens(untouched: Running, call: str, name: str) -> None:
    """Clients send texts, never ids: what would be an id out of the vocabulary is a text that cannot be tokenised."""
    element, text = TEXTS[name]
    check(untouched, call, asked(source([2, 1]), raw=[pack_bytes([b"ab", element])]), text)


@pytest.mark.parametrize("name", ["length_penalty", "coverage_penalty", "temperature", "top_p"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "-inf"])
def test_fault_14_numbers_that_are_none(untouched: Running, name: str, value: float | str) -> None:
    wrong = request()
    wrong.parameters[name].CopyFrom(parameter(value))
    code, text = refused(untouched, "ModelInfer", wrong)
    assert code == INVALID
    assert re.fullmatch(rf"parameters.{name}: (nan|-?inf) is not from [0-9.e-]+ to [0-9.]+", text), text


PARAMETERS: dict[str, tuple[Any, str]] = {
    "beam_size": (17, "parameters.beam_size: 17 is not from 1 to 16"),
    "hypotheses": (2, "parameters.hypotheses: 2 is not from 1 to 1 (beam_size)"),
    "longest": (2**40, "parameters.longest: 1099511627776 is no number that it takes"),
    "shortest": (1.0, "parameters.shortest: is of the type int, got 1.0 (float)"),
    "shortlist": ("yes", "parameters.shortlist: is of the type bool, got 'yes' (str)"),
    "length_penalty": ("much", "parameters.length_penalty: 'much' is no number that it takes"),
    "suppressed": ("a", "parameters.suppressed: is a JSON list of str in a string, got 'a'"),
    "layers": ("[0.5]", "parameters.layers: is a JSON list of int in a string, got '[0.5]'"),
    "heads": ("[2]", "parameters.families: layers or heads are chosen, but no family of attention"),
    "reduction": ("sum", "parameters.reduction: 'sum' is not one of none, mean, max"),
    "timeout": (0, "parameters.timeout: 0 is no number of microseconds above 0"),
    "prefix": ("x", "parameters.prefix: 'x' is not in the target vocabulary"),
    "seed": (-1, "parameters.seed: -1 is not from 0 to 9223372036854775807"),
}


@pytest.mark.parametrize("name", ["suppressed", "layers"])
def test_fault_11_lists_within_lists_deeper_than_anybody_reads(untouched: Running, name: str) -> None:
    wrong = request()
    wrong.parameters[name].CopyFrom(parameter("[" * 100_000))
    code, text = refused(untouched, "ModelInfer", wrong)
    assert code == INVALID
    assert text.startswith(f"parameters.{name}: is a JSON list of")


@pytest.mark.parametrize("name", [*PARAMETERS, "binary_data_output"])
def test_fault_10_a_parameter_without_a_value(untouched: Running, name: str) -> None:
    wrong = request()
    wrong.parameters[name].SetInParent()
    code, text = refused(untouched, "ModelInfer", wrong)
    assert code == INVALID
    assert re.match(rf"parameters\.{name}: .*None", text), text


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_out_of_range_or_of_another_type(untouched: Running, call: str, name: str) -> None:
    value, text = PARAMETERS[name]
    check(untouched, call, request(**{name: value}), text)


def test_an_unknown_parameter_is_not_ignored(untouched: Running) -> None:
    code, text = refused(untouched, "ModelInfer", request(beam=4))
    assert code == INVALID
    assert text.startswith("parameters: 'beam' is not known; known: beam_size, hypotheses, ")


MODELS: dict[tuple[str, str], tuple[Any, str]] = {
    ("x", ""): (NOT_FOUND, "model 'x' is not served here"),
    ("", ""): (NOT_FOUND, "model '' is not served here"),
    ("reversal", "7"): (NOT_FOUND, "model 'reversal' has no version '7' here, only 1"),
    ("reversal", "x"): (INVALID, "'x' is no version of model 'reversal' here, nor a number"),
    ("reversal", "-1"): (INVALID, "'-1' is no version of model 'reversal' here, nor a number"),
    ("reversal", "١"): (INVALID, "'١' is no version of model 'reversal' here, nor a number"),  # noqa: RUF001
}


@pytest.mark.parametrize("which", MODELS)
def test_fault_15_an_unknown_model_or_version(untouched: Running, which: tuple[str, str]) -> None:
    (name, version), (code, text) = which, MODELS[which]
    for call in CALLS:
        field = "model_version: " if code is INVALID else ""
        check(untouched, call, request(model=name, version=version), field + text, code)
    field = "version: " if code is INVALID else ""
    for call in ("ModelMetadata", "ModelConfig"):
        asked_of = getattr(pb, f"{call}Request")(name=name, version=version)
        assert refused(untouched, call, asked_of) == (code, field + text)
    if name:  # without one, all models are meant
        asked_of = pb.ModelStatisticsRequest(name=name, version=version)
        assert refused(untouched, "ModelStatistics", asked_of) == (INVALID, (field or "name: ") + text)


@pytest.mark.parametrize("which", [("x", ""), ("", ""), ("reversal", "7")])
def test_fault_15_what_is_not_there_is_not_ready(untouched: Running, which: tuple[str, str]) -> None:
    response = stub(untouched).ModelReady(pb.ModelReadyRequest(name=which[0], version=which[1]), timeout=PATIENCE)
    assert not response.ready


@pytest.mark.parametrize("call", CALLS)
def test_fault_16_an_unknown_output(untouched: Running, call: str) -> None:
    text = (
        "outputs: model 'reversal' has no output 'ATTENTION', only TEXT, SCORE, LOG_PROBABILITY, FINISH_REASON, "
        "TOKENS, TARGET_LENGTH, SOURCE_TOKENS, SOURCE_LENGTH, CROSS_ATTENTION, DECODER_ATTENTION, ENCODER_ATTENTION"
    )
    check(untouched, call, asked(source(), outputs=["TEXT", "ATTENTION"]), text)


@pytest.mark.parametrize("call", CALLS)
def test_fault_16_an_output_twice(untouched: Running, call: str) -> None:
    text = "outputs: model 'reversal' is asked for one twice: CROSS_ATTENTION, CROSS_ATTENTION"
    check(untouched, call, asked(source(), outputs=["CROSS_ATTENTION"] * 2), text)


@pytest.mark.parametrize("place", ["inputs", "outputs"])
def test_tensors_in_shared_memory_are_refused(untouched: Running, place: str) -> None:
    wrong = asked(source(), outputs=["TEXT"])
    tensor = getattr(wrong, place)[0]
    tensor.parameters["shared_memory_region"].string_param = "x"
    text = f"{place}: '{tensor.name}' has the parameter 'shared_memory_region', but tensors travel in messages here"
    check(untouched, "ModelInfer", wrong, text)


@pytest.mark.parametrize("call", CALLS)
def test_fault_17_attention_that_might_not_fit(untouched: Running, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Of two texts, each of one layer and two heads: 20 target tokens at most, 5 source tokens."""
    size = 4 * 2 * 2 * 20 * 5
    monkeypatch.setattr("serve.infer.LARGEST_ANSWER", size - 1)
    text = (
        f"outputs: their attention can come to {size} bytes, over the limit of {size - 1} for one answer; ask for "
        "fewer texts, hypotheses, families, layers or heads, reduce them, or set longest"
    )
    check(untouched, call, request(["abcd", "abc"], ["CROSS_ATTENTION"]), text)


@pytest.mark.parametrize("fewer", [{"longest": 10}, {"heads": "[0]"}, {"reduction": "max"}])
def test_fault_17_the_way_out_is_one(running: Running, monkeypatch: pytest.MonkeyPatch, fewer: dict[str, Any]) -> None:
    monkeypatch.setattr("serve.infer.LARGEST_ANSWER", 4 * 2 * 20 * 5)
    found = infer(running, request(["abcd"], ["CROSS_ATTENTION"], **fewer))["CROSS_ATTENTION"]
    assert found.dtype == np.float32
    assert found.shape[-2:] == (5, 5)
