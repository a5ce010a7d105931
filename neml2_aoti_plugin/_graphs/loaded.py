"""Graphs that this process has loaded: each package once, however many models use it.

A library that torch has loaded is never unloaded, nor is it by torch's own loader: a process that loads a model again
and again would grow each time.

torch's threads do not come along in a fork, and a call that waits for them never ends: a process that was forked after
a graph had run may run graphs on one thread only. A graph that another thread was in the midst of is loaded anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._artifact.package import Package
from .._checks import first_line
from ..errors import AOTIError, ArtifactError
from .c_interface import Library, Unavailable
from .unpack import load_library, load_runner, obstacle

# How many copies of a package are remembered; any one of them will do.
_PLACES = 8


class Loaded:
    """A package that is loaded when it first runs, and the lock under which it runs."""

    def __init__(self, package: Package, device: torch.device) -> None:
        self.file = package.file
        self._device = device
        # Wherever these bytes were seen: one of these files may be gone by the time that they are needed.
        self._places = {package.file: package}
        # torch's runner waits for its turn with the interpreter locked, and a graph with an operator in Python needs
        # the interpreter to finish: calls must queue before they reach the runner. A signal handler or a finalizer may
        # make a call of its own in a thread that has the lock; it finds the runner free, for no Python runs inside.
        self.lock = threading.RLock()
        self.runner: Any = None
        # For calls without the interpreter; a text that says why there are none.
        self._library: Library | str | None = None
        self._calls_python = False
        # Whether the graph runs, and may call Python.
        self.inside = False

    def library(self) -> Library:
        """The library of the package, for calls by its C interface; loaded when it is first asked for."""
        with self.lock:
            if self._library is None:
                try:
                    self._library = load_library(self.file, self._read())
                except Unavailable as error:
                    self._library = str(error)
        if isinstance(self._library, str):
            raise Unavailable(self._library)
        return self._library

    def obstacle(self) -> str:
        """Why the graph cannot be called by its C interface, as far as its package tells; empty where it can be."""
        return obstacle(self.file, self._read())

    def run(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Run the graph."""
        if forked_after_use:
            require_one_thread(self.file)
        with self.lock:
            if self.runner is None:
                self.runner, self._calls_python = load_runner(self.file, self._read(), self._device)
            if self.inside:
                raise AOTIError(
                    f"{self.file}: called again from within itself: by an operator in Python that it calls, or by a "
                    "signal handler or a finalizer that ran meanwhile in the same thread. The call would wait for "
                    "itself for ever. Make such a call in another thread, or after the first one."
                )
            try:
                self.inside = self._calls_python
                outputs: list[Tensor] = self.runner.run(arguments)
            except RuntimeError as error:
                # A signal handler that raises right after the graph had returned leaves its frame in the traceback.
                if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                    raise
                # Of what an operator in Python raises, torch keeps nothing but the text.
                if self._calls_python and str(error).startswith("KeyboardInterrupt"):
                    raise KeyboardInterrupt from error
                raise AOTIError(f"{self.file}: the compiled graph failed: {first_line(error)}") from error
            finally:
                self.inside = False
        return outputs

    @property
    def in_use(self) -> bool:
        """Whether it has been loaded."""
        return self.runner is not None or isinstance(self._library, Library)

    def seen(self, package: Package) -> None:
        """Note another place where the same bytes are."""
        # The latest last, and only once.
        self._places.pop(package.file, None)
        self._places[package.file] = package
        for old in list(self._places)[:-_PLACES]:
            self._places.pop(old, None)

    def _read(self) -> bytes:
        """The bytes that were looked over, from wherever they still are."""
        failure: ArtifactError | None = None
        for package in reversed(list(self._places.values())):
            try:
                return package.read()
            except ArtifactError as error:
                failure = failure or error
        assert failure is not None
        raise failure


# Runners whose state is that of a thread which the fork left behind; to take them down would wait for it.
_abandoned: list[Any] = []
forked_after_use = False
_loaded: dict[tuple[str, torch.device], Loaded] = {}


def loaded(package: Package, device: torch.device) -> Loaded:
    """The one object of this process for a package, wherever it lies: what has the same bytes is the same."""
    key = (package.digest, device)
    found = _loaded.get(key)
    if found is None:
        # Of two threads that come first, one wins, and both get its object.
        found = _loaded.setdefault(key, Loaded(package, device))
    found.seen(package)
    return found


def require_one_thread(file: Path) -> None:
    """Refuse to run a graph where torch would wait for threads that the fork left behind."""
    if forked_after_use and torch.get_num_threads() != 1:
        raise AOTIError(
            f"{file}: this process was forked from one in which a compiled model had already run, and torch's "
            "threads do not come along: the call would never end. Start processes with "
            "multiprocessing.get_context('spawn'), or fork before the first call, or call torch.set_num_threads(1) in "
            "the new process first."
        )


def _in_child() -> None:
    global forked_after_use
    forked_after_use = forked_after_use or any(graph.in_use for graph in _loaded.values())
    for graph in list(_loaded.values()):
        # The lock is held by a thread that is gone, or by this one, which goes on with its call.
        if graph.lock.acquire(blocking=False):
            graph.lock.release()
            continue
        _abandoned.append(graph.runner)
        graph.runner, graph.inside = None, False
        graph.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
