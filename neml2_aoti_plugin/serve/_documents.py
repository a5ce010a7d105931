"""What the service shows of itself: the OpenAPI document, and the page at `/`, one file that calls it as clients do."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from .. import __version__
from ..model._operations import OPERATIONS
from ._requests import InputOptions, OutputOptions, Request, RequestOptions
from ._served import VERSION

# What anybody may ask for, with or without a token: whether the service is there, and the page, which holds nothing.
OPEN = frozenset({"/", "/v2/health/live", "/v2/health/ready"})

_SCHEMA = "#/components/schemas/{name}"

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


def document(models: Sequence[str], routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI document of a service of some models; the name of a route says what it gives."""
    known = {"model": models, "version": [VERSION]}
    parameters = {
        name: {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": values}}
        for name, values in known.items()
    }
    paths: dict[str, Any] = {}
    for route in routes:
        if isinstance(route, Route) and route.include_in_schema:
            method = "post" if "POST" in (route.methods or ()) else "get"
            paths[route.path] = {method: _infer() if route.path.endswith("/infer") else _told(route)}
            if own := [parameters[name] for name in route.param_convertors]:
                paths[route.path]["parameters"] = own
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "neml2-aoti",
            "version": __version__,
            "description": "Compiled NEML2 models behind the Open Inference Protocol, version 2.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _schemas() -> dict[str, Any]:
    """The forms of requests, those by which they are decoded, and of answers."""
    options = (RequestOptions, InputOptions, OutputOptions)
    _, found = msgspec.json.schema_components((Request, *options), ref_template=_SCHEMA)
    # Parameters may have any names; these are those that are read.
    for kind in ("Request", "Input", "Output"):
        found[kind]["properties"]["parameters"] = {"$ref": _SCHEMA.format(name=f"{kind}Options")}
    found["RequestOptions"]["properties"]["operation"]["enum"] = list(OPERATIONS)
    text, rows = {"type": "string"}, {"type": "array", "items": {"type": "integer"}, "description": "Rows that failed."}
    outputs = {"type": "array", "items": {"$ref": _SCHEMA.format(name="Input")}}
    told = {"model_name": text, "model_version": text, "id": text, "outputs": outputs}
    found["Answer"] = {"type": "object", "properties": told}
    found["Error"] = {"type": "object", "required": ["error"], "properties": {"error": text, "rows": rows}}
    return found


def _told(route: Route) -> dict[str, Any]:
    media = "text/plain" if route.path == "/metrics" else "application/json"
    responses = {"200": {"description": "Done.", "content": {media: {}}}}
    return {"summary": route.name, "responses": responses, **({"security": []} if route.path in OPEN else {})}


def _infer() -> dict[str, Any]:
    header = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "schema": {"type": "integer"},
        "description": "Length of the JSON part, where binary data of tensors follow it.",
    }

    def body(name: str) -> dict[str, Any]:
        return {
            "application/json": {"schema": {"$ref": _SCHEMA.format(name=name)}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        }

    error = {"application/json": {"schema": {"$ref": _SCHEMA.format(name="Error")}}}
    responses: dict[str, Any] = {"200": {"description": "The outputs.", "content": body("Answer")}}
    responses.update((status, {"description": text, "content": error}) for status, text in _STATUSES.items())
    return {
        "summary": "Evaluate a model.",
        "parameters": [header],
        "requestBody": {"required": True, "content": body("Request")},
        "responses": responses,
    }


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    """The page, and its headers: it may use its own script and style only, and call this service only."""
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    def digest(kind: str) -> str:
        found = re.search(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        assert found is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

    return text.encode(), {
        "content-security-policy": (
            f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def page() -> Response:
    """The answer at `/`."""
    content, headers = _page()
    return Response(content, media_type="text/html", headers=headers)
