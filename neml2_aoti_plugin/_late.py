"""Put the plugin in place where neml2 was imported before it."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from neml2_aoti_plugin import _autoload

if TYPE_CHECKING:
    from neml2_aoti_plugin._autoload import Finder


def activate(finder: Finder) -> None:
    """Replace what neml2 has by ours, or leave neml2 as it is where ours cannot be imported.

    Args:
        finder: The finder that is in place; it is told what happened.
    """
    finder.route = "late"
    try:
        _autoload.load_stand_ins()
        _replace_aoti()
        _replace_log_store()
    except Exception as error:
        finder.failure = error
        _autoload.warn(
            f"neml2-aoti-plugin was imported after neml2 and cannot take the place of its binding "
            f"({type(error).__name__}: {error}); neml2 stays as it was."
        )


def _replace_aoti() -> None:
    for name in _autoload.STAND_INS:
        sys.modules.pop(name, None)
    aoti = sys.modules.get("neml2.aoti")
    if aoti is None:
        # The native binding did not import, so neml2 gave its subpackage up; with ours it comes up.
        neml2 = sys.modules["neml2"]
        vars(neml2)["_aoti_module"] = import_module("neml2.aoti")
        return
    for name in _autoload.STAND_INS:
        import_module(name)
    vars(aoti).update(
        Model=sys.modules["neml2_aoti_plugin._host.binding"].Model,
        AOTIModel=sys.modules[_autoload.HIT_MODULE].AOTIModel,
    )


def _replace_log_store() -> None:
    """Let `neml2.log` steer our store, with the levels that its old one had."""
    log: ModuleType | None = sys.modules.get("neml2.log")
    if log is None:
        return
    ours = sys.modules["neml2_aoti_plugin._host.binding"].log
    old = log._store
    ours.apply_env()
    for channel in log.CHANNELS:
        level = old.effective_level(channel)
        if ours.effective_level(channel) != level:
            ours.set_default_level(channel, level)
    ours.set_sink(log._forward)
    vars(log).update(_backend=ours, _store=ours)
