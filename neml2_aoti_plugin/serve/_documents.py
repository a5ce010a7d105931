"""What the service shows of itself: the OpenAPI document, and the page at `/`, one file that calls it as clients do."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.responses import Response

from .. import __version__
from ..model._operations import OPERATIONS
from ._served import Served

_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {
            "type": "array",
            "items": {"type": "integer"},
            "description": "The first extent is that of the rows.",
        },
        "datatype": {"type": "string", "enum": ["FP64", "FP32", "INT64", "BOOL"]},
        "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer"}}},
        "data": {"type": "array", "items": {}, "description": "Flat, or nested like the shape."},
    },
}
_REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {
            "type": "object",
            "properties": {
                "operation": {
                    "type": "string",
                    "enum": list(OPERATIONS),
                    "default": "forward",
                },
                "parameter_overrides": {"type": "object", "description": "Values of promoted parameters by name."},
                "binary_data_output": {"type": "boolean", "default": False},
            },
            "description": "Custom parameters, such as a priority, are passed over.",
        },
        "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/tensor"}},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string"},
                    "parameters": {"type": "object", "properties": {"binary_data": {"type": "boolean"}}},
                },
            },
        },
    },
}
_ANSWER = {
    "type": "object",
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/tensor"}},
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {"type": "string"},
        "rows": {"type": "array", "items": {"type": "integer"}, "description": "Rows that failed."},
    },
}
# What each status means, beside 200.
_STATUSES = {
    "400": "Something about the request is wrong; the message names it.",
    "401": "The token is absent or wrong.",
    "404": "There is no such model, version or address.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large, or has too many rows.",
    "415": "The body is compressed.",
    "422": "Rows failed.",
    "429": "The queue of the model is full.",
    "503": "Models are being loaded, the service stops, or it has no room.",
    "504": "Not answered in time.",
}


def document(models: Sequence[Served]) -> dict[str, Any]:
    """The OpenAPI document of a service of some models."""
    name = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "enum": [served.name for served in models]},
    }
    version = {"name": "version", "in": "path", "required": True, "schema": {"type": "string", "enum": ["1"]}}
    paths: dict[str, Any] = {
        "/v2": {"get": _get("Name, version and extensions of the service.")},
        "/v2/health/live": {"get": _get("Whether the service is there.", open_=True)},
        "/v2/health/ready": {"get": _get("Whether it takes requests.", open_=True)},
        "/v2/models": {"get": _get("Names of the models.")},
        "/v2/models/stats": {"get": _get("Statistics of all models.")},
        "/v2/repository/index": {"post": _get("Names, versions and states of the models.")},
        "/metrics": {"get": _get("Metrics for Prometheus.", media="text/plain")},
        "/openapi.json": {"get": _get("This document.")},
    }
    for path, parameters in (
        ("/v2/models/{model}", [name]),
        ("/v2/models/{model}/versions/{version}", [name, version]),
    ):
        paths[path] = {"parameters": parameters, "get": _get("Inputs, outputs and operations of a model.")}
        paths[path + "/ready"] = {"parameters": parameters, "get": _get("Whether a model takes requests.")}
        paths[path + "/config"] = {"parameters": parameters, "get": _get("Configuration of a model.")}
        paths[path + "/stats"] = {"parameters": parameters, "get": _get("Statistics of a model.")}
        paths[path + "/infer"] = {"parameters": parameters, "post": _infer()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "neml2-aoti",
            "version": __version__,
            "description": "Compiled NEML2 models behind the Open Inference Protocol, version 2.",
        },
        "paths": paths,
        "components": {
            "schemas": {"tensor": _TENSOR, "request": _REQUEST, "answer": _ANSWER, "error": _ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _get(summary: str, *, open_: bool = False, media: str = "application/json") -> dict[str, Any]:
    found: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "Done.", "content": {media: {}}}}}
    if open_:
        found["security"] = []
    return found


def _infer() -> dict[str, Any]:
    header = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "schema": {"type": "integer"},
        "description": "Length of the JSON part, where binary data of tensors follow it.",
    }

    def body(name: str) -> dict[str, Any]:
        return {
            "application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        }

    error = {"application/json": {"schema": {"$ref": "#/components/schemas/error"}}}
    responses: dict[str, Any] = {"200": {"description": "The outputs.", "content": body("answer")}}
    responses.update((status, {"description": text, "content": error}) for status, text in _STATUSES.items())
    return {
        "summary": "Evaluate a model.",
        "parameters": [header],
        "requestBody": {"required": True, "content": body("request")},
        "responses": responses,
    }


@cache
def _page() -> tuple[bytes, str]:
    """The page, and its content security policy: only its own script and style, and only this service."""
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    script, style = (_digest(kind, text) for kind in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def _digest(kind: str, text: str) -> str:
    found = re.search(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
    assert found is not None
    digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    return f"'sha256-{digest}'"


def page() -> Response:
    """The answer at `/`."""
    content, policy = _page()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(content, media_type="text/html", headers=headers)
