"""Ctrl-C that is heeded also where Python loses it, and SIGTERM that leaves nothing half-written.

Python raises `KeyboardInterrupt` wherever the program is. In a callback of a weak reference, of which imports make
many, or in a bare `except` of some package, the exception is dropped and the program goes on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def heeded() -> Iterator[Callable[[], None]]:
    """Clean up where Ctrl-C or SIGTERM ends the block.

    Gives a function to call now and then, which raises again where the signal came and its exception was dropped:
    `KeyboardInterrupt`, or `SystemExit` with the status of a program that SIGTERM ends. Nothing changes where somebody
    else handles a signal, or where the program was started to ignore it.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        heed()

    def heed() -> None:
        if came:
            raise KeyboardInterrupt if came[-1] == signal.SIGINT else SystemExit(128 + came[-1])

    ours: dict[int, Any] = {}
    # Only the main thread may set handlers.
    if threading.current_thread() is threading.main_thread():
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        ours = {number: handler for number, handler in usual.items() if signal.getsignal(number) is handler}
    for number in ours:
        signal.signal(number, note)
    try:
        yield heed
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
