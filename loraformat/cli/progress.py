"""A progress bar on stderr for what takes longer than a second, if a person is looking."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loraformat import progress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from loraformat.adapter import Adapter

__all__ = ["entries", "progress_bar"]

_PATIENCE = 1.0  # seconds before a bar appears: a flicker is worse than none
_REFRESH = 0.1


def entries(adapters: Iterable[Adapter]) -> int:
    """How many entries ΔW has in all targets: what a verb on adapters reports as done."""
    return sum(math.prod(update.matrix_shape() or (0,)) for adapter in adapters for update in adapter.values())


@contextmanager
def progress_bar(what: str, total: int | None, *, quiet: bool = False) -> Iterator[None]:
    """Show how many of ``total`` bytes the verb inside has done; None where that is not known.

    Nothing is shown, and rich is not imported, when stderr is no terminal or ``quiet`` (``--json``).
    """
    if quiet or not sys.stderr.isatty():
        yield
        return
    bar = _Bar(what, total)
    with progress.listening(bar):
        try:
            yield
        finally:
            bar.close()


class _Bar:
    """A listener that brings rich in only when its patience ends."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.next = time.monotonic() + _PATIENCE
        self.shown: tuple[Progress, TaskID] | None = None

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + _REFRESH
        if self.shown is None:
            self.shown = self._start()
        bar, task = self.shown
        bar.update(task, completed=self.done, refresh=True)

    def close(self) -> None:
        """Take the bar away: what a person reads afterwards is the last line of the verb."""
        if self.shown is not None:
            self.shown[0].stop()

    def _start(self) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
        bar.start()
        return bar, bar.add_task(self.what, total=self.total)
