"""Compiled models behind a service: the Open Inference Protocol, with requests gathered as they come."""

from __future__ import annotations

try:
    from ._app import app as app
    from ._limits import Limits as Limits
except ModuleNotFoundError as error:
    cure = "pip install 'neml2-aoti-plugin[serve]'"
    raise ModuleNotFoundError(
        f"the service needs {error.name}, which is not installed: {cure}", name=error.name
    ) from None

__all__ = ["Limits", "app"]
