"""Signals that ask a run to end: each ends it as Ctrl-C does, by an exception that cleans up, but not between two steps
that belong together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["ended_by_exception", "unbroken"]

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def ended_by_exception() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP raise ``KeyboardInterrupt`` as SIGINT does; what is ignored (``nohup``) stays so.

    Yields:
        What is filled with the number of the signal that came.
    """
    came: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    usual = (signal.SIG_DFL, signal.default_int_handler)
    ours = {n: handler for n in _ENDING if (handler := signal.getsignal(n)) in usual} if _in_main_thread() else {}
    for number in ours:
        signal.signal(number, end)
    try:
        yield came
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextmanager
def unbroken() -> Iterator[None]:
    """What is done here is done to its end; a signal that came meanwhile is handled then.

    Only the main thread handles signals: in another one nothing has to be kept away.
    """
    came: list[int] = []
    ours = {n: handler for n in _ENDING if callable(handler := signal.getsignal(n))} if _in_main_thread() else {}
    for number in ours:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
