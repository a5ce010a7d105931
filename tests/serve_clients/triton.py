"""What tritonclient.http gets from a service, as JSON: `python triton.py HOST:PORT MODEL`, inputs as JSON on stdin."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException


def main(address: str, model: str) -> dict[str, Any]:
    given = {name: np.array(value) for name, value in json.load(sys.stdin).items()}
    client = triton.InferenceServerClient(address)
    found: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": [client.is_model_ready(model), client.is_model_ready(model, "1")],
        "absent_ready": client.is_model_ready("absent"),
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata(model),
        "config": client.get_model_config(model),
        "statistics": client.get_inference_statistics(model),
        "index": client.get_model_repository_index(),
    }
    for mode in (False, True):
        inputs = []
        for name, array in given.items():
            inputs.append(triton.InferInput(name, list(array.shape), "FP64"))
            inputs[-1].set_data_from_numpy(array, binary_data=mode)
        outputs = [triton.InferRequestedOutput("stress", binary_data=mode)]
        result = client.infer(model, inputs, outputs=outputs, request_id="seven", priority=1, timeout=10**7)
        whole = client.infer(model, inputs, parameters={"operation": "solve"})
        found["binary" if mode else "json"] = {
            "stress": result.as_numpy("stress").tolist(),
            "id": result.get_response()["id"],
            "all": {o["name"]: whole.as_numpy(o["name"]).tolist() for o in whole.get_response()["outputs"]},
        }
    try:
        client.infer(model, inputs[:1])
    except InferenceServerException as error:
        found["error"] = [error.status(), error.message()]
    client.close()
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
