"""Keep Python's signal handlers from running inside a graph, where torch would lose what they raise.

A graph may call an operator that is written in Python. If Ctrl-C arrives there, the KeyboardInterrupt passes through
torch's C interface, which turns it into an error without a cause. Handlers are exchanged for ones that take a note, and
what came is handled as soon as the graph has returned.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

# Those whose handlers commonly raise: Ctrl-C, a wish to end, a time limit.
SIGNALS = [int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGBREAK") if hasattr(signal, name)]


class _State:
    """What the main thread has put aside: only it runs handlers, and only it may exchange them.

    Args:
        within: whether a call is on.
        aside: the true handlers, while others are in their place.
        came: signals to be handled.
    """

    def __init__(self) -> None:
        self.within = False
        self.aside: list[tuple[int, Any]] | None = None
        self.came: list[int] = []

    def exchange(self) -> None:
        """Put a note in the place of each handler."""
        self.aside = []
        # `signal` would make enumerations of numbers and handlers, which takes ten times as long as the rest.
        for number in SIGNALS:
            handler = _signal.getsignal(number)
            if callable(handler):
                self.aside.append((number, handler))
                _signal.signal(number, lambda n, _: self.came.append(n))

    def restore(self) -> None:
        """Put the handlers back, and handle what came."""
        aside, self.aside = self.aside, None
        for number, handler in aside or ():
            _signal.signal(number, handler)
        came, self.came = self.came, []
        for number in came:
            signal.raise_signal(number)


_main = _State()


def _on_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


class one_call:
    """Exchange handlers once for all graphs of a call instead of once for each; between graphs they have their turn."""

    def __enter__(self) -> None:
        self._outermost = _on_main_thread() and not _main.within
        if self._outermost:
            _main.within = True

    def __exit__(self, *_: object) -> None:
        if self._outermost:
            _main.within = False
            if _main.aside is not None:
                _main.restore()


def undisturbed(run: Callable[[Sequence[Tensor]], list[Tensor]], arguments: Sequence[Tensor]) -> list[Tensor]:
    """Run a graph; signals that arrive meanwhile are handled right afterwards.

    Args:
        run: the graph.
        arguments: of it.

    Returns:
        Its outputs.
    """
    if not _on_main_thread():
        return run(arguments)
    if not _main.within:
        _main.exchange()
        try:
            return run(arguments)
        finally:
            _main.restore()
    if _main.aside is None:
        _main.exchange()
    outputs = run(arguments)
    if _main.came:
        _main.restore()
    return outputs
