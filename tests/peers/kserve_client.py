"""KServe's own client against a server: run in an environment that has kserve, prints what it found as JSON.

python kserve_client.py ADDRESS
"""

import asyncio
import json
import sys
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest

MODEL = "reversal"


async def infer(client: Any, *, raw: bool) -> list[Any]:
    """Two texts, in raw or in typed contents."""
    source = InferInput("SOURCE", [2, 1], "BYTES")
    source.set_data_from_numpy(np.array([["abcd"], ["efgh"]], object), binary_data=raw)
    answer = await client.infer(InferRequest(model_name=MODEL, infer_inputs=[source], parameters={"longest": 12}))
    (text,) = [output.as_numpy() for output in answer.outputs if output.name == "TEXT"]
    return [[element.decode() for element in row] for row in text]


async def everything(address: str) -> dict[str, Any]:
    """All that it can ask."""
    client = InferenceGRPCClient(address)
    return {
        "live": await client.is_server_live(),
        "ready": await client.is_server_ready(),
        "model ready": await client.is_model_ready(MODEL),
        "raw": await infer(client, raw=True),
        "typed": await infer(client, raw=False),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(everything(sys.argv[1]))))
