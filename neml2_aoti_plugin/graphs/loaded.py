"""Graphs that this process has loaded: each package once, however many models use it.

A library that torch has loaded is never unloaded, nor is it by torch's own loader: a process that loads a model again
and again would grow each time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact.files import Fingerprint, read_unchanged
from ..errors import AOTIError
from . import forks
from .interrupts import undisturbed
from .unpack import load_runner


class Loaded:
    """A package that is loaded when it first runs, and the lock under which it runs.

    Args:
        file: the package.
        device: that it runs on.
        as_it_was: its fingerprint when it was looked over.
    """

    def __init__(self, file: Path, device: torch.device, as_it_was: Fingerprint) -> None:
        self.file = file
        self._device = device
        self._as_it_was = as_it_was
        # torch's runner waits for its turn with the interpreter locked, and a graph with a custom operator needs the
        # interpreter to finish: calls must queue before they reach the runner.
        self.lock = threading.Lock()
        self.runner: Any = None
        self._calls_python = False
        forks.watch(self)

    def load(self) -> None:
        """Load the package, if it is not loaded yet."""
        with self.lock:
            self._load()

    def run(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Run the graph.

        Args:
            arguments: as it takes them.

        Returns:
            Its outputs.

        Raises:
            ArtifactError: the package cannot be loaded, or is not what it was.
            AOTIError: the graph failed, there is no room to unpack it, or the process was forked.
        """
        if forks.forked_after_use:
            forks.require_one_thread(self.file)
        with self.lock:
            if self.runner is None:
                self._load()
            run = self.runner.run
            try:
                outputs: list[Tensor] = undisturbed(run, arguments) if self._calls_python else run(arguments)
            except AOTIError:
                raise
            except RuntimeError as error:
                raise AOTIError(f"{self.file}: the compiled graph failed: {_first_line(error)}") from error
        return outputs

    def _load(self) -> None:
        if self.runner is None:
            data = read_unchanged(self.file, self._as_it_was)
            self.runner, self._calls_python = load_runner(self.file, data, self._device)
            forks.note_use()


_loaded: dict[tuple[str, Fingerprint, torch.device], Loaded] = {}


def loaded(file: Path, device: torch.device, as_it_was: Fingerprint) -> Loaded:
    """The one object of this process for a package.

    Args:
        file: the package.
        device: that it runs on.
        as_it_was: its fingerprint; a file that has changed is another package.

    Returns:
        What runs it.
    """
    key = (os.path.abspath(file), as_it_was, device)
    found = _loaded.get(key)
    # Of two threads that come first, one wins, and both get its object.
    return _loaded.setdefault(key, Loaded(file, device, as_it_was)) if found is None else found


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
