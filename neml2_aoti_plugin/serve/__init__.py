"""Compiled models behind a service: the Open Inference Protocol, with requests gathered as they come."""

from __future__ import annotations

from ._app import app as app
from ._limits import Limits as Limits

__all__ = ["Limits", "app"]
