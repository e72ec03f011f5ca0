"""On a CUDA device: the answers of the CPU, in float32 and float16, with the state on the host and on the device."""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from export.manifest import Precision
from export.resident import ResidentStepModel, has_cuda
from export.runtime import CPU, CUDA, OnnxStepModel, RuntimeOptions
from export.verify import TOLERANCES, compare_values
from model.search import SearchOptions, search
from model.steps import ALL_FAMILIES, Question, Step
from model.torch_steps import TorchStepModel
from model.vocabulary import END
from tests.export.test_generate import some_sources
from tests.export.test_resident import Arrival, decode
from tests.export.toy import Toy, network
from tests.model.searching import assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device and onnxruntime-gpu in place of onnxruntime"),
]

ON_CUDA = RuntimeOptions(providers=(CUDA, CPU))
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


@pytest.fixture
def graphs(halved: Toy, precision: Precision) -> OnnxStepModel:
    model = OnnxStepModel(halved.bundle, halved.manifest, precision, ON_CUDA)
    assert model.providers[0] == CUDA
    return model


def test_values_are_within_the_tolerances(halved: Toy, precision: Precision, graphs: OnnxStepModel) -> None:
    checkpoint = network(halved)
    found = compare_values(TorchStepModel(checkpoint.model), graphs, checkpoint)
    for output, limit in TOLERANCES[precision].items():
        assert found[output] <= limit, found


@pytest.mark.parametrize("beam_size", [1, 4])
def test_float32_answers_as_on_a_cpu(halved: Toy, beam_size: int) -> None:
    sources, options = some_sources(halved, 12), SearchOptions(longest=12, beam_size=beam_size)
    cpu = OnnxStepModel(halved.bundle, halved.manifest, "fp32")
    cuda = ResidentStepModel(OnnxStepModel(halved.bundle, halved.manifest, "fp32", ON_CUDA))
    for expected, found in zip(*(search(one, sources, [options] * 12) for one in (cpu, cuda)), strict=True):
        assert found[0].tokens == expected[0].tokens
        np.testing.assert_allclose(found[0].log_probabilities, expected[0].log_probabilities, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found[0].cross_attention, expected[0].cross_attention, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[0].decoder_attention, expected[0].decoder_attention, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3])
def test_answers_are_the_same_wherever_the_state_is(graphs: OnnxStepModel, width: int) -> None:
    draw = np.random.default_rng(width)
    arrivals = [
        Arrival(int(draw.integers(0, 10)), [*draw.integers(4, 12, length).tolist(), END], 12, patience)
        for length, patience in ((5, 99), (1, 99), (12, 3), (0, 99), (9, 99))
    ]
    models = (graphs, ResidentStepModel(graphs))
    for expected, found in zip(*(decode(one, arrivals, width, ALL_FAMILIES) for one in models), strict=True):
        assert_same(found, expected)


def test_what_stays_is_on_the_device(graphs: OnnxStepModel) -> None:
    model = ResidentStepModel(graphs)
    seen = list[Any]()

    class Watched:
        memory, state, dtype, vocabulary = model.memory, model.state, model.dtype, model.vocabulary
        encode, new_store = model.encode, model.new_store

        def step(self, question: Question) -> Step:
            step = model.step(question)
            seen.extend((*question.memory.tensors, *question.state, *step.state))
            return step

    decode(Watched(), [Arrival(0, [5, 6, END], 6, 9), Arrival(2, [7] * 9 + [END], 6, 3)], 2, ALL_FAMILIES)
    assert seen
    assert all(isinstance(one, ort.OrtValue) and one.device_name() == "cuda" for one in seen)


def test_ids_that_no_table_has_never_reach_the_device(graphs: OnnxStepModel) -> None:
    with pytest.raises(ValueError, match="source_ids: 100000 is no id"):
        graphs.encode(np.array([[100_000]]), np.ones((1, 1), bool))
