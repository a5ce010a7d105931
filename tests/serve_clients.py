"""What clients of others get from a service: `python serve_clients.py http|aio|kserve HOST:PORT MODEL`, in JSON.

`http` and `aio` are those of tritonclient, `kserve` is kserve.InferenceRESTClient. The inputs are JSON on stdin.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from typing import Any

import numpy as np

Arrays = dict[str, Any]


async def done(found: Any) -> Any:
    """What a call gave, of a client that waits or one that is waited for."""
    return await found if inspect.isawaitable(found) else found


def filled(kind: Any, given: Arrays, binary: bool) -> list[Any]:
    """The inputs of a request, in the classes of a client."""
    inputs = [kind(name, list(array.shape), "FP64") for name, array in given.items()]
    for one, array in zip(inputs, given.values(), strict=True):
        one.set_data_from_numpy(array, binary_data=binary)
    return inputs


async def of_triton(kind: str, address: str, model: str, given: Arrays) -> dict[str, Any]:
    import tritonclient.http as triton
    from tritonclient.http import aio
    from tritonclient.utils import InferenceServerException

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
    for mode in ("json", "binary"):
        inputs = filled(triton.InferInput, given, mode == "binary")
        outputs = [triton.InferRequestedOutput("stress", binary_data=mode == "binary")]
        result = await done(client.infer(model, inputs, outputs=outputs, request_id="seven", priority=1, timeout=10**7))
        whole = await done(client.infer(model, inputs, parameters={"operation": "solve"}))
        names = [output["name"] for output in whole.get_response()["outputs"]]
        found[mode] = {
            "stress": result.as_numpy("stress").tolist(),
            "id": result.get_response()["id"],
            "all": {name: whole.as_numpy(name).tolist() for name in names},
        }
    try:
        await done(client.infer(model, inputs[:1]))
    except InferenceServerException as error:
        found["error"] = [error.status(), error.message()]
    await done(client.close())
    return found


async def of_kserve(address: str, model: str, given: Arrays) -> dict[str, Any]:
    import httpx
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
    from kserve.protocol.infer_type import RequestedOutput

    base, client = f"http://{address}", InferenceRESTClient(RESTConfig(protocol="v2"))
    found: dict[str, Any] = {
        "live": await client.is_server_live(base),
        "ready": await client.is_server_ready(base),
        "model_ready": [await client.is_model_ready(base, model)],
        "absent_ready": await client.is_model_ready(base, "absent"),
    }

    async def infer(inputs: list[Any], **options: Any) -> Any:
        return await client.infer(base, InferRequest(model, inputs, **options), model_name=model)

    for mode in ("json", "binary"):
        inputs = filled(InferInput, given, mode == "binary")
        wanted = RequestedOutput("stress", {"binary_data": mode == "binary"})
        result = await infer(inputs, request_id="seven", request_outputs=[wanted])
        whole = await infer(inputs, parameters={"operation": "solve"})
        found[mode] = {
            "stress": result.get_output_by_name("stress").as_numpy().tolist(),
            "id": result.id,
            "all": {output.name: output.as_numpy().tolist() for output in whole.outputs},
        }
    try:
        await infer(inputs[:1])
    except httpx.HTTPStatusError as error:
        found["error"] = [str(error.response.status_code), str(error)]
    await client.close()
    return found


if __name__ == "__main__":
    kind, address, model = sys.argv[1:]
    given = {name: np.array(value) for name, value in json.load(sys.stdin).items()}
    client = of_kserve(address, model, given) if kind == "kserve" else of_triton(kind, address, model, given)
    print(json.dumps(asyncio.run(client)))
