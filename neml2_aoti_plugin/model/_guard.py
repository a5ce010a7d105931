"""Where a model cannot be called: as the interpreter ends, inside what torch compiles, under what records calls."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from functools import wraps
from threading import Event, get_ident, main_thread
from time import monotonic, sleep
from typing import ParamSpec, TypeVar

import torch
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..errors import AOTIError

P = ParamSpec("P")
R = TypeVar("R")

# The threads beside the main one that are in a call, and whether the interpreter is about to end.
_MAIN, _inside, _ending = main_thread().ident, set[int](), Event()
# How long the end of the interpreter may wait for calls in daemon threads, in seconds.
_PATIENCE = 10.0


def _let_threads_out() -> None:
    """Wait until no daemon thread is in a call, and let none begin another one."""
    _ending.set()
    end = monotonic() + _PATIENCE
    while _inside and monotonic() < end:
        sleep(1e-3)


atexit.register(_let_threads_out)
if hasattr(os, "register_at_fork"):
    # The other threads are not in the new process.
    os.register_at_fork(after_in_child=_inside.clear)


def public(call: Callable[P, R]) -> Callable[P, R]:
    """A call that users make, guarded against where it cannot be made.

    `torch.compile` does not look into it: it breaks its graph there and runs the call as it is. That is what
    `torch.compiler.disable` does, but it is asked for only where torch compiles, since it imports the whole compiler.

    While the interpreter ends, the call is refused: torch aborts the process if the last name of a tensor goes while a
    view of it is left, as happens in most calls. Daemon threads are let out of their calls before it ends: one that
    comes back from torch's code later aborts the process, too.
    """
    ends, me = sys.is_finalizing, get_ident

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_dynamo_compiling():
            found: R = torch.compiler.disable(call)(*args, **kwargs)
            return found
        if ends():
            raise AOTIError(
                "a compiled model was called while the interpreter ends, as from a finalizer (__del__) of what is left "
                "over. torch cannot be used then. Call it before: in a with block, or by atexit.register."
            )
        thread = me()
        if thread == _MAIN or thread in _inside:
            return call(*args, **kwargs)
        if _ending.is_set():
            # A daemon thread, as a rule: the interpreter ends meanwhile.
            sleep(_PATIENCE)
        _inside.add(thread)
        try:
            return call(*args, **kwargs)
        finally:
            _inside.discard(thread)

    # torch compiles a code object a few times, and then looks into what it calls: each call has its own.
    run.__code__ = run.__code__.replace(co_name=call.__name__)
    return wraps(call)(run)


def require_unrecorded(where: str) -> None:
    """Refuse a call that a tracer or a mode of torch takes over, since it would see nothing of what a graph does."""
    if torch._C._get_tracing_state() is not None:
        by = "torch.jit.trace (or an export that is based on it) records it"
    elif torch._C._len_torch_dispatch_stack():
        modes = ", ".join(type(mode).__name__ for mode in _get_current_dispatch_mode_stack())
        by = (
            f"the dispatch mode {modes} is active (torch.export, make_fx, fake tensors and the like work by such modes)"
        )
    else:
        return
    raise AOTIError(
        f"a call of {where} cannot be recorded or taken over: {by}, and would keep the numbers of this one call in the "
        "place of the model. Call the model outside of it, or in the form of an operator that torch knows: "
        "neml2_aoti_plugin.model.CustomOp. torch.compile may hold a model as it is, and breaks its graph there."
    )
