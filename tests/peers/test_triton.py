"""The Open Inference Protocol case by case: a real tritonserver and ours are asked the same, and answer the same."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest

from serve.bundle import ServedModel
from serve.pb.inference import grpc_service_pb2 as pb
from serve.pb.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from tests.peers.triton import KSERVE, MISSING, PYTHON, triton_server
from tests.peers.triton_cases import CASES
from tests.serve.running import PATIENCE, Running, serving

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=MISSING)

PERF_ANALYZER = shutil.which("perf_analyzer")


@pytest.fixture(scope="module")
def running(served: ServedModel) -> Iterator[Running]:
    with serving(served) as server:
        yield server


@pytest.fixture(scope="module")
def triton(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    with triton_server(tmp_path_factory.mktemp("triton"), running.server.models.find("")) as channel:
        yield channel


class Outcome(NamedTuple):
    """The end of a call, as far as both servers are to agree."""

    code: str
    """Name of the status; of a stream's request that fails, "error"."""
    told: tuple[Any, ...]
    """Tensors with their types and shapes; or whether it is ready; or which models there are."""


def ask(channel: grpc.Channel, call: str, request: Any) -> Outcome:
    """What a server makes of a request."""
    method = getattr(GRPCInferenceServiceStub(channel), call)
    try:
        if call != "ModelStreamInfer":
            return Outcome("OK", told(method(request, timeout=PATIENCE)))
        (response,) = method(iter([request]), timeout=PATIENCE)
    except grpc.RpcError as error:
        failed: Any = error
        return Outcome(failed.code().name, ())
    return Outcome("error", ()) if response.error_message else Outcome("OK", told(response.infer_response))


def told(response: Any) -> tuple[Any, ...]:
    """What of a response does not depend on who gives it."""
    return TOLD.get(type(response), lambda _: ())(response)


def answer(response: pb.ModelInferResponse) -> tuple[Any, ...]:
    about = (response.model_name, response.model_version, response.id, *sorted(response.parameters))
    return (
        *about,
        *sorted((one.name, one.datatype, tuple(one.shape)) for one in response.outputs),
    )  # Triton has no order


def metadata(response: pb.ModelMetadataResponse) -> tuple[Any, ...]:
    tensors = [(one.name, one.datatype, tuple(one.shape)) for one in (*response.inputs, *response.outputs)]
    return (response.name, tuple(response.versions), *tensors)


def configuration(response: pb.ModelConfigResponse) -> tuple[Any, ...]:
    config = response.config
    inputs = [(one.name, one.data_type, tuple(one.dims)) for one in config.input]
    outputs = [(one.name, one.data_type, tuple(one.dims)) for one in config.output]
    return (config.name, config.max_batch_size, config.WhichOneof("scheduling_choice"), *inputs, *outputs)


TOLD: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    pb.ModelInferResponse: answer,
    pb.ModelReadyResponse: lambda response: (response.ready,),
    pb.ServerReadyResponse: lambda response: (response.ready,),
    pb.ServerLiveResponse: lambda response: (response.live,),
    pb.ModelMetadataResponse: metadata,
    pb.ModelConfigResponse: configuration,
    pb.ModelStatisticsResponse: lambda response: tuple((one.name, one.version) for one in response.model_stats),
    pb.RepositoryIndexResponse: lambda response: tuple((one.name, one.version, one.state) for one in response.models),
}
"""The same, by the type of the response."""


OF_BATCHES = {
    "no outputs named": "Triton sends all of them: ours computes attention only where it is asked for by name",
    "one axis": "[texts] is taken besides [texts, 1]",
    "an empty batch": "Triton expects an element in none; a zero-size dimension is legal",
    "contents of two inputs": "Triton takes the first and drops the rest unseen",
    "an output twice": "Triton sends it once",
    "an unknown parameter": "Triton ignores it: here no option is without effect",
}
"""Batches that the servers do not agree on, and why not, in one call or over a stream."""

DIFFERENT = {
    **{f"{call}: {name}": why for call in ("ModelInfer", "ModelStreamInfer") for name, why in OF_BATCHES.items()},
    "ModelInfer: a size of 2 ^ 62": "Triton's count of bytes overflows to 0, and its model fails with a traceback",
}
"""Cases that the servers do not agree on."""


@pytest.mark.parametrize("name", CASES)
def test_a_case(running: Running, triton: grpc.Channel, name: str) -> None:
    call, request = CASES[name]
    theirs, ours = ask(triton, call, request), ask(running.channel, call, request)
    if name in DIFFERENT:
        assert theirs != ours, f"no difference any more: {DIFFERENT[name]}"
    else:
        assert ours == theirs


def test_every_difference_is_a_case() -> None:
    assert DIFFERENT.keys() <= CASES.keys()


def found_by(python: Path, script: str, address: str) -> dict[str, Any]:
    """What a client that is not ours, in an environment of its own, finds on a server."""
    command = [str(python), str(Path(__file__).with_name(script)), address]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def stock(running: Running) -> dict[str, Any]:
    """What NVIDIA's own client, unmodified, finds."""
    return found_by(PYTHON, "stock_client.py", running.address)


@pytest.mark.parametrize("way", ["sync", "async", "stream", "aio"])
def test_the_stock_client_is_answered(stock: dict[str, Any], way: str) -> None:
    assert stock[way] == [["dcba"], ["hgfe"]]


def test_the_stock_client_reads_every_output(stock: dict[str, Any]) -> None:
    assert stock["shapes"] == {
        "TEXT": [2, 2],
        "SCORE": [2, 2],
        "CROSS_ATTENTION": [2, 2, 1, 2, 5, 5],
        "DECODER_ATTENTION": [2, 2, 1, 2, 5, 5],
        "ENCODER_ATTENTION": [2, 2, 2, 5, 5],
        "TARGET_LENGTH": [2, 2],
    }
    assert stock["dtypes"] == ["float32", "int64", "object"]


def test_the_stock_client_reads_errors(stock: dict[str, Any]) -> None:
    assert stock["error"] == ["StatusCode.INVALID_ARGUMENT", "inputs.SOURCE[0]: is empty"]
    assert stock["stream error"] == "inputs.SOURCE[0]: is empty"


def test_the_stock_client_reads_what_is_said_of_server_and_models(stock: dict[str, Any]) -> None:
    assert [stock["live"], stock["ready"], stock["model ready"]] == [True, True, True]
    assert (stock["server"], stock["metadata"], stock["config"]) == ("limelight", "reversal", "reversal")
    assert stock["index"] == [["reversal", "1", "READY"]]
    assert stock["statistics"]["inference_count"] >= 2


@pytest.mark.skipif(not KSERVE.exists(), reason=f"{KSERVE} is not there: make build/load/kserve-environment/.ready")
def test_kserves_client_is_answered(running: Running) -> None:
    found = found_by(KSERVE, "kserve_client.py", running.address)
    texts = [["dcba"], ["hgfe"]]
    assert found == {"live": True, "ready": True, "model ready": True, "raw": texts, "typed": texts}


@pytest.mark.skipif(PERF_ANALYZER is None, reason="perf_analyzer is not on the PATH: tritonclient 2.49.0 carries one")
@pytest.mark.parametrize("way", [[], ["--streaming"], ["-a", "-b", "2"]])
def test_perf_analyzer_measures_us(running: Running, tmp_path: Path, way: list[str]) -> None:
    data = tmp_path / "texts.json"
    data.write_text(json.dumps({"data": [{"SOURCE": ["abcd"]}, {"SOURCE": ["hgfedcba"]}]}), encoding="utf-8")
    options = ["-m", "reversal", "-i", "grpc", "-u", running.address, "--input-data", str(data)]
    measured = ["--measurement-mode", "count_windows", "--measurement-request-count", "20", "-r", "3", "-s", "999"]
    command = [str(PERF_ANALYZER), *options, *measured, "--request-parameter", "beam_size:2:int", *way]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Successful request count: " in done.stdout
