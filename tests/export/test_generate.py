"""generate.onnx answers as `model.search` does over the network, ties included, and needs nothing but a runtime."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import AttributeProto, numpy_helper

from export.bundle import export_bundle
from export.generate import CARRIED
from export.manifest import Precision, read_manifest
from export.runtime import OnnxStepModel, _check_signature
from export.search_step import Beams, Candidates, _choose
from export.verify import VerificationError
from export.verify_generate import CROSS, generate, open_generate
from model.search import Hypothesis, SearchOptions, search
from model.steps import Array, Question, Step, StepModel
from model.torch_steps import TorchStepModel
from model.vocabulary import BEGIN, END, PAD
from tests.export.test_bundle import double_a_weight
from tests.export.toy import PAIRS, Toy, network, retrace
from tests.reversal import Reversal

TOLERANCES = {"log_probabilities": 1e-4, "score": 1e-4, "cross_attention": 1e-5}
"""Largest differences from PyTorch. Measured: 2e-6, 3e-6 and 1e-6."""

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")


def path(exported: Toy | Reversal, precision: Precision = "fp32") -> Path:
    return exported.bundle / precision / "generate.onnx"


def some_sources(exported: Toy | Reversal, count: int, seed: int = 0) -> list[list[int]]:
    """Random ones, of lengths from 1 to 12, the end token last."""
    random, vocabulary = np.random.default_rng(seed), len(network(exported).source)
    return [[*random.integers(END + 1, vocabulary, random.integers(0, 12)).tolist(), END] for _ in range(count)]


def assert_same(found: dict[str, Array], sources: Sequence[Sequence[int]], expected: Sequence[Hypothesis]) -> None:
    """Every value, and nothing in padding."""
    shape = found["target_ids"].shape
    assert shape == (len(sources), max(len(one.tokens) for one in expected))
    padded = {name: np.zeros_like(value) for name, value in found.items()}
    for index, (source, one) in enumerate(zip(sources, expected, strict=True)):
        count = len(one.tokens)
        padded["target_ids"][index, :count] = one.tokens
        padded["log_probabilities"][index, :count] = one.log_probabilities
        padded["score"][index] = one.score
        padded["cross_attention"][index, :, :, :count, : len(source)] = one.cross_attention
    np.testing.assert_array_equal(found["target_ids"], padded["target_ids"])
    for name, tolerance in TOLERANCES.items():
        np.testing.assert_allclose(found[name], padded[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("beam_size", [1, 2, 4, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 3.0])
def test_it_answers_as_the_search_does(exported: Toy | Reversal, beam_size: int, length_penalty: float) -> None:
    session, model = open_generate(path(exported)), TorchStepModel(network(exported).model)
    for longest, count in ((1, 2), (7, 1), (12, 5)):
        sources = some_sources(exported, count, seed=longest)
        options = SearchOptions(longest=longest, beam_size=beam_size, length_penalty=length_penalty)
        expected = [best for [best] in search(model, sources, [options] * count, CROSS)]
        assert_same(generate(session, sources, options), sources, expected)


def test_answers_end_by_themselves_and_at_the_limit(untied: Toy) -> None:
    options = SearchOptions(longest=5, beam_size=4)
    found = generate(open_generate(path(untied)), some_sources(untied, 32), options)
    ended = (found["target_ids"] == END).sum(1)
    assert set(ended.tolist()) == {0, 1}
    assert not np.isin(found["target_ids"][ended == 0], [PAD, BEGIN]).any()


def test_a_trained_one_reverses_and_looks_where_it_should(reversal: Reversal) -> None:
    checkpoint = network(reversal)
    [ids] = checkpoint.source.encode_ids(["abcdefgh"])
    found = generate(open_generate(path(reversal)), [ids], SearchOptions(longest=20, beam_size=4))
    assert checkpoint.target.decode(found["target_ids"][0].tolist()) == "hgfedcba"
    looked = found["cross_attention"][0].mean((0, 1)).argmax(-1)
    assert looked[:8].tolist() == list(range(7, -1, -1))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_answers_as_the_engine_of_its_precision_does(exported: Toy | Reversal, precision: Precision) -> None:
    model = OnnxStepModel(exported.bundle, exported.manifest, precision)
    sources, options = some_sources(exported, 24, seed=3), SearchOptions(longest=12, beam_size=4)
    found = generate(open_generate(path(exported, precision)), sources, options)
    expected = search(model, sources, [options] * len(sources), CROSS)
    equal = [
        found["target_ids"][index][: len(best.tokens)].tolist() == best.tokens for index, [best] in enumerate(expected)
    ]
    assert sum(equal) >= {"fp32": 24, "int8": 22}[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_answer_does_not_depend_on_its_batch(exported: Toy | Reversal, precision: Precision) -> None:
    session, sources = open_generate(path(exported, precision)), some_sources(exported, 6, seed=4)
    options = SearchOptions(longest=9, beam_size=3)
    together = generate(session, sources, options)
    for index, source in enumerate(sources):
        alone = generate(session, [source], options)
        count = alone["target_ids"].shape[1]
        np.testing.assert_array_equal(together["target_ids"][index, :count], alone["target_ids"][0])
        assert not together["target_ids"][index, count:].any()
        cross = together["cross_attention"][index, :, :, :count, : len(source)]
        np.testing.assert_allclose(cross, alone["cross_attention"][0], rtol=0, atol=1e-5)


def test_attention_sums_to_one_over_what_is_real(exported: Toy | Reversal) -> None:
    sources = some_sources(exported, 8, seed=5)
    found = generate(open_generate(path(exported)), sources, SearchOptions(longest=9, beam_size=2))
    real = (found["target_ids"] != PAD)[:, None, None]
    sums = found["cross_attention"].sum(-1)
    np.testing.assert_allclose(sums, np.broadcast_to(real, sums.shape), rtol=0, atol=1e-5)


class LowestFirst(TorchStepModel):
    """Of equal candidates, the one with the lower id comes first, as ONNX has it."""

    def step(self, question: Question) -> Step:
        step = super().step(replace(question, top=self.vocabulary))
        values = np.empty_like(step.top_log_probabilities)
        np.put_along_axis(values, step.top_ids, step.top_log_probabilities, -1)
        order = np.argsort(-values, -1, kind="stable")[..., : question.top]
        return replace(step, top_ids=order, top_log_probabilities=np.take_along_axis(values, order, -1))


def indifferent(toy: Toy) -> tuple[ort.InferenceSession, StepModel]:
    """A graph and a network that find every token as likely as any other."""
    model = network(toy).model
    weight = model.decoder.projection.weight.detach()
    graph = onnx.load(path(toy))
    for tensor in graph.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.shape in {weight.shape, weight.T.shape} and {*value.ravel()} == {*weight.numpy().ravel()}:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(value), tensor.name))
    with torch.no_grad():
        weight.zero_()
    return ort.InferenceSession(graph.SerializeToString()), LowestFirst(model)


@pytest.mark.parametrize("beam_size", [1, 2, 3, 16])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 4.0])
def test_ties_go_as_in_the_search(untied: Toy, beam_size: int, length_penalty: float) -> None:
    session, model = indifferent(untied)
    sources = some_sources(untied, 3)
    for longest in (1, 4):
        options = SearchOptions(longest=longest, beam_size=beam_size, length_penalty=length_penalty)
        expected = [best for [best] in search(model, sources, [options] * 3, CROSS)]
        assert_same(generate(session, sources, options), sources, expected)


def test_an_end_counts_only_among_the_best() -> None:
    totals = torch.tensor([[-1.0, -2, -3, -4], [-1, -2, -3, -torch.inf]], dtype=torch.float64)
    tokens = torch.tensor([[7, 8, END, 9], [END, END, 6, 5]])
    parents = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]])
    chosen, ended = _choose(Candidates(totals, totals.float(), tokens, parents))
    assert ended.tolist() == [0, 2]
    assert chosen.totals.tolist() == [[-torch.inf, -1, -2], [-1, -3, -torch.inf]]
    assert chosen.tokens.tolist() == [[BEGIN, 7, 8], [END, 6, BEGIN]]
    assert chosen.parents.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_what_is_carried_is_what_the_step_takes() -> None:
    assert (*CARRIED, "state") == Beams._fields


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from nodes(attribute.g)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_is_one_file_of_standard_operators(exported: Toy | Reversal, precision: Precision) -> None:
    model = onnx.load(path(exported, precision), load_external_data=False)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 18)]
    assert not model.functions
    assert {node.domain for node in nodes(model.graph)} == {""}
    assert [node.op_type for node in model.graph.node].count("Loop") == 1
    contents = [
        (one.data_type, tuple(one.dims), numpy_helper.to_array(one).tobytes()) for one in model.graph.initializer
    ]
    assert len(set(contents)) == len(contents)
    assert not any(one.external_data for one in model.graph.initializer)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_manifest_describes_it(exported: Toy | Reversal, precision: Precision) -> None:
    manifest, config = read_manifest(exported.bundle), network(exported).model.config
    spec = manifest.graphs[precision].generate
    assert spec is not None
    assert spec.file == f"{precision}/generate.onnx"
    assert spec.file in manifest.files
    _check_signature(spec, open_generate(exported.bundle / spec.file))
    assert {one.name: (one.dtype, one.axes) for one in (*spec.inputs, *spec.outputs)} == {
        "source_ids": ("int64", ("batch", "source")),
        "source_mask": ("bool", ("batch", "source")),
        "beam_size": ("int64", ()),
        "longest": ("int64", ()),
        "length_penalty": ("float32", ()),
        "target_ids": ("int64", ("batch", "target")),
        "log_probabilities": ("float32", ("batch", "target")),
        "score": ("float32", ("batch",)),
        "cross_attention": ("float32", ("batch", config.decoder_layers, config.heads, "target", "source")),
    }


PLAIN = """
import json, sys
import numpy as np, onnxruntime as ort
session = ort.InferenceSession("answers.onnx")
ids = np.array([json.loads(sys.argv[1])])
found = session.run(
    ["target_ids", "cross_attention"],
    {
        "source_ids": ids,
        "source_mask": ids != 0,
        "beam_size": np.array(4),
        "longest": np.array(20),
        "length_penalty": np.array(1, np.float32),
    },
)
assert not {"torch", "onnx", "tokenizers"} & set(sys.modules)
print(json.dumps([found[0].tolist(), found[1].shape]))
"""
"""What a caller in any language has to write."""


def test_a_runtime_alone_is_enough(reversal: Reversal, tmp_path: Path) -> None:
    shutil.copyfile(path(reversal), tmp_path / "answers.onnx")
    checkpoint = network(reversal)
    [ids] = checkpoint.source.encode_ids(["abca"])
    command = [sys.executable, "-I", "-c", PLAIN, json.dumps(ids)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    [tokens], shape = json.loads(run.stdout)
    assert checkpoint.target.decode(tokens) == "acba"
    assert shape == [1, 1, 2, len(tokens), len(ids)]


def test_one_that_answers_otherwise_is_not_written(
    untied: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrace(untied, monkeypatch, double_a_weight, only="SearchStep")
    with pytest.raises(VerificationError, match=r"^the export differs from the checkpoint: fp32 generate.onnx, beam"):
        export_bundle(untied.checkpoint, tmp_path / "new", PAIRS, generate=True)
    assert list(tmp_path.iterdir()) == []
