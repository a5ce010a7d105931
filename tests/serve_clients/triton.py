"""What tritonclient gets from a service: `python triton.py http|aio HOST:PORT MODEL`, JSON on stdin and stdout."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException


async def done(found: Any) -> Any:
    """What a call gave, of either client."""
    return await found if inspect.isawaitable(found) else found


async def main(kind: str, address: str, model: str) -> dict[str, Any]:
    given = {name: np.array(value) for name, value in json.load(sys.stdin).items()}
    client = aio.InferenceServerClient(address) if kind == "aio" else triton.InferenceServerClient(address)
    found: dict[str, Any] = {
        "live": await done(client.is_server_live()),
        "ready": await done(client.is_server_ready()),
        "model_ready": [await done(client.is_model_ready(*of)) for of in ((model,), (model, "1"))],
        "absent_ready": await done(client.is_model_ready("absent")),
        "server": await done(client.get_server_metadata()),
        "model": await done(client.get_model_metadata(model)),
        "config": await done(client.get_model_config(model)),
        "statistics": await done(client.get_inference_statistics(model)),
        "index": await done(client.get_model_repository_index()),
    }
    for mode in (False, True):
        inputs = []
        for name, array in given.items():
            inputs.append(triton.InferInput(name, list(array.shape), "FP64"))
            inputs[-1].set_data_from_numpy(array, binary_data=mode)
        outputs = [triton.InferRequestedOutput("stress", binary_data=mode)]
        result = await done(client.infer(model, inputs, outputs=outputs, request_id="seven", priority=1, timeout=10**7))
        whole = await done(client.infer(model, inputs, parameters={"operation": "solve"}))
        found["binary" if mode else "json"] = {
            "stress": result.as_numpy("stress").tolist(),
            "id": result.get_response()["id"],
            "all": {o["name"]: whole.as_numpy(o["name"]).tolist() for o in whole.get_response()["outputs"]},
        }
    try:
        await done(client.infer(model, inputs[:1]))
    except InferenceServerException as error:
        found["error"] = [error.status(), error.message()]
    await done(client.close())
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
