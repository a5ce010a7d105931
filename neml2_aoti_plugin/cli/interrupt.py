"""Ctrl-C that is heeded also where Python loses it.

Python raises `KeyboardInterrupt` wherever the program is. In a callback of a weak reference, of which imports make
many, or in a bare `except` of some package, the exception is dropped and the program goes on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def heeded() -> Iterator[Callable[[], None]]:
    """Give a function to call now and then, which raises `KeyboardInterrupt` again where Ctrl-C came and was dropped.

    Nothing changes where somebody else handles Ctrl-C, or where the program was started to ignore it.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(number, frame)

    def heed() -> None:
        if came:
            raise KeyboardInterrupt

    # Only the main thread may set handlers.
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield heed
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield heed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
