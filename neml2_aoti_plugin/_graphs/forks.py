"""What a forked process may do with graphs that its parent has loaded.

torch's threads do not come along in a fork, and a call that waits for them never ends: a process that was forked after
a graph had run may run graphs on one thread only. A graph that another thread was in the midst of is loaded anew.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from ..errors import AOTIError

if TYPE_CHECKING:
    from .loaded import Loaded

_graphs: WeakSet[Loaded] = WeakSet()
# Runners whose state is that of a thread which the fork left behind; to take them down would wait for it.
_abandoned: list[Any] = []
_ran = False
forked_after_use = False


def watch(graph: Loaded) -> None:
    """Have a graph put in order in forked processes."""
    _graphs.add(graph)


def note_use() -> None:
    """Note that this process has run a graph."""
    global _ran
    _ran = True


def require_one_thread(file: Path) -> None:
    """Refuse to run a graph where torch would wait for threads that the fork left behind."""
    if torch.get_num_threads() != 1:
        raise AOTIError(
            f"{file}: this process was forked from one in which a compiled model had already run, and torch's "
            "threads do not come along: the call would never end. Start processes with "
            "multiprocessing.get_context('spawn'), or fork before the first call, or call torch.set_num_threads(1) in "
            "the new process first."
        )


def _in_child() -> None:
    global forked_after_use
    forked_after_use = _ran
    for graph in list(_graphs):
        # The lock is held by a thread that is gone, or by this one, which goes on with its call.
        if graph.lock.acquire(blocking=False):
            graph.lock.release()
            continue
        _abandoned.append(graph.runner)
        graph.runner, graph.inside = None, False
        graph.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
