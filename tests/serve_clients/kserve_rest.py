"""What kserve.InferenceRESTClient gets from a service, as JSON; see triton.py."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


async def main(address: str, model: str) -> dict[str, Any]:
    given = {name: np.array(value) for name, value in json.load(sys.stdin).items()}
    base = f"http://{address}"
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    found: dict[str, Any] = {
        "live": await client.is_server_live(base),
        "ready": await client.is_server_ready(base),
        "model_ready": [await client.is_model_ready(base, model)],
        "absent_ready": await client.is_model_ready(base, "absent"),
    }
    for mode in (False, True):
        inputs = []
        for name, array in given.items():
            inputs.append(InferInput(name, list(array.shape), "FP64"))
            inputs[-1].set_data_from_numpy(array, binary_data=mode)
        wanted = RequestedOutput("stress", {"binary_data": mode})
        request = InferRequest(model, inputs, request_id="seven", request_outputs=[wanted])
        result = await client.infer(base, request, model_name=model)
        whole = await client.infer(
            base, InferRequest(model, inputs, parameters={"operation": "solve"}), model_name=model
        )
        found["binary" if mode else "json"] = {
            "stress": result.get_output_by_name("stress").as_numpy().tolist(),
            "id": result.id,
            "all": {output.name: output.as_numpy().tolist() for output in whole.outputs},
        }
    try:
        await client.infer(base, InferRequest(model, inputs[:1]), model_name=model)
    except httpx.HTTPStatusError as error:
        found["error"] = [str(error.response.status_code), str(error)]
    await client.close()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
