"""NVIDIA's own client against a server: run in an environment that has tritonclient, prints what it found as JSON.

python stock_client.py ADDRESS
"""

import asyncio
import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as client
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

MODEL, PATIENCE = "reversal", 60.0


def inputs(module: Any, *texts: str) -> list[Any]:
    """Texts as the input."""
    tensor = module.InferInput("SOURCE", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()] for text in texts], object))
    return [tensor]


def texts_of(result: Any) -> list[list[str]]:
    """Texts of an answer."""
    return [[text.decode() for text in row] for row in result.as_numpy("TEXT")]


def asked() -> list[Any]:
    """Two texts."""
    return inputs(client, "abcd", "efgh")


def infer_async(server: Any) -> Any:
    """By a callback."""
    done: queue.Queue[Any] = queue.Queue()
    server.async_infer(MODEL, asked(), callback=lambda result, error: done.put(error or result))
    return done.get(timeout=PATIENCE)


def infer_stream(server: Any) -> tuple[Any, Any]:
    """Over a stream, a mistake after it."""
    done: queue.Queue[Any] = queue.Queue()
    server.start_stream(callback=lambda result, error: done.put(error or result))
    server.async_stream_infer(MODEL, asked(), request_id="1", enable_empty_final_response=True)
    server.async_stream_infer(MODEL, inputs(client, ""), request_id="2")
    found = done.get(timeout=PATIENCE), done.get(timeout=PATIENCE)
    server.stop_stream()
    return found


async def infer_aio(address: str) -> Any:
    """On an event loop."""
    async with aio.InferenceServerClient(address) as server:
        return await server.infer(MODEL, inputs(aio, "abcd", "efgh"))


def everything(server: Any) -> Any:
    """Several outputs, parameters of every type."""
    names = ("TEXT", "SCORE", "CROSS_ATTENTION", "DECODER_ATTENTION", "ENCODER_ATTENTION", "TARGET_LENGTH")
    return server.infer(
        MODEL,
        asked(),
        model_version="1",
        outputs=[client.InferRequestedOutput(name) for name in names],
        parameters={"beam_size": 4, "hypotheses": 2, "length_penalty": "0.5", "longest": 5, "shortest": 5},
    )


def main() -> None:
    """Ask for everything, and print it."""
    (address,) = sys.argv[1:]
    server = client.InferenceServerClient(address)
    streamed, stream_error = infer_stream(server)
    found = everything(server)
    outputs = {output["name"]: found.as_numpy(output["name"]) for output in found.get_response(as_json=True)["outputs"]}
    try:
        server.infer(MODEL, inputs(client, ""))
        error = None
    except InferenceServerException as raised:
        error = [raised.status(), raised.message()]
    index = server.get_model_repository_index().models
    statistics = server.get_inference_statistics(MODEL).model_stats[0]
    print(
        json.dumps(
            {
                "sync": texts_of(server.infer(MODEL, asked())),
                "async": texts_of(infer_async(server)),
                "stream": texts_of(streamed),
                "aio": texts_of(asyncio.run(infer_aio(address))),
                "shapes": {name: values.shape for name, values in outputs.items()},
                "dtypes": sorted({str(values.dtype) for values in outputs.values()}),
                "error": error,
                "stream error": stream_error.message(),
                "live": server.is_server_live(),
                "ready": server.is_server_ready(),
                "model ready": server.is_model_ready(MODEL),
                "server": server.get_server_metadata().name,
                "metadata": server.get_model_metadata(MODEL).name,
                "config": server.get_model_config(MODEL).config.name,
                "index": [[one.name, one.version, one.state] for one in index],
                "statistics": {"inference_count": statistics.inference_count},
            }
        )
    )


if __name__ == "__main__":
    main()
