"""Keep Python's signal handlers from running inside a graph, where torch would lose what they raise.

A graph may call an operator that is written in Python. If Ctrl-C arrives there, the KeyboardInterrupt passes through
torch's C interface, which turns it into an error without a cause.
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


def undisturbed(run: Callable[[Sequence[Tensor]], list[Tensor]], arguments: Sequence[Tensor]) -> list[Tensor]:
    """Run a graph; signals that arrive meanwhile are handled right afterwards.

    Args:
        run: the graph.
        arguments: of it.

    Returns:
        Its outputs.
    """
    # Only the main thread runs handlers, and only it may exchange them.
    if threading.get_ident() != threading.main_thread().ident:
        return run(arguments)
    came: list[int] = []
    handlers: list[tuple[int, Any]] = []
    try:
        # `signal` would make enumerations of numbers and handlers, which takes ten times as long as the rest.
        for number in SIGNALS:
            handler = _signal.getsignal(number)
            if callable(handler):
                handlers.append((number, handler))
                _signal.signal(number, lambda n, _: came.append(n))
        return run(arguments)
    finally:
        for number, handler in handlers:
            _signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
