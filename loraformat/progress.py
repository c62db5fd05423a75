"""How far a long verb has come: verbs say how many bytes are done, and whoever listens shows it.

    with progress.listening(lambda count: print(count)):
        lf.merge(adapter, base, "merged.safetensors")

Without a listener, saying so costs next to nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Listener", "advance", "listening"]

Listener = Callable[[int], object]
"""Is called with the number of bytes done since its last call, by one thread at a time."""

# Of the process, not of a context: a verb's own worker threads must be heard too, and they inherit no context.
_listeners: list[Listener] = []
_lock = threading.Lock()


def advance(count: int) -> None:
    """``count`` more bytes are read, computed or written."""
    if _listeners:
        with _lock:
            for listener in _listeners[-1:]:
                listener(count)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Everything done inside, by any thread, is reported to ``listener``; the one before listens again afterwards."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
