"""What a run that writes a folder has finished, so that after a kill the next one need not do it again.

A file is entered when it is on the disk, with a checksum; whoever goes on reads it again and compares. A CRC tells a file
that the kill or the disk damaged, at a third of the time that a SHA-256 takes: nobody else writes there. A run of a few
seconds is begun again and keeps no journal. That of one task is of no use to another: its first line says what is being
made of what.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from loraformat import canonical

__all__ = ["NAME", "Journal"]

NAME = ".loraformat.journal"
"""What it is called in the folder that is being written."""

PATIENCE = 5.0
"""Seconds that a run lasts before its files are entered, the first ones then too."""

_CHUNK = 8 << 20


class Journal:
    """The journal in ``folder``, of the task ``identity``, which is asked for where there is a journal to read or to write."""

    def __init__(self, folder: Path, identity: Callable[[], str]) -> None:
        self.path, self.identity = folder / NAME, identity
        self.done: dict[str, Mapping[str, Any]] = _entries(self.path, identity)
        self.begun = bool(self.done)

    @staticmethod
    def fits(folder: Path, identity: Callable[[], str]) -> bool:
        """Whether a run that was killed left this task there, with something finished."""
        return bool(_entries(folder / NAME, identity))

    def finished(self, name: str) -> Mapping[str, Any] | None:
        """What was noted with a file, if it is there as it was entered."""
        entry, path = self.done.get(name), self.path.parent / name
        with suppress(OSError):
            if entry and path.stat().st_size == entry["size"] and _crc(path) == entry["crc32"]:
                note: Mapping[str, Any] = entry["note"]
                return note
        return None

    def begin(self) -> None:
        """The first line, unless it is there."""
        if not self.begun:
            self.path.write_text(json.dumps({"identity": self.identity()}) + "\n", encoding="utf-8")
            self.begun = True

    @contextmanager
    def writing(self) -> Iterator[_Clerk]:
        """Enters files in a thread of its own: while one is flushed and read again, the next is written."""
        clerk = _Clerk(self, ThreadPoolExecutor(1), Event())
        try:
            yield clerk
        finally:
            clerk.over.set()  # what is not entered by now need not be
            clerk.pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Clerk:
    journal: Journal
    pool: ThreadPoolExecutor
    over: Event
    begun: float = field(default_factory=time.monotonic)
    waiting: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def enter(self, name: str, note: Mapping[str, Any]) -> None:
        """The file is written; what is noted with it is given back to whoever goes on."""
        self.waiting.append((name, note))
        if time.monotonic() - self.begun >= PATIENCE:
            self.journal.begin()
            for entry in self.waiting:
                self.pool.submit(self._enter, *entry)
            self.waiting.clear()

    def _enter(self, name: str, note: Mapping[str, Any]) -> None:
        path = self.journal.path.parent / name
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        found = _crc(path, self.over)
        if found is None:
            return
        entry = {"file": name, "size": path.stat().st_size, "crc32": found, "note": note}
        with open(self.journal.path, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


def _entries(path: Path, identity: Callable[[], str]) -> dict[str, Mapping[str, Any]]:
    """The whole lines of a journal of this task; a line that the kill cut off is none."""
    try:
        first, *lines = path.read_text(encoding="utf-8").split("\n")
        if canonical.loads(first) != {"identity": identity()}:
            return {}
    except (OSError, ValueError):
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            entry = canonical.loads(line)
            found[entry["file"]] = {name: entry[name] for name in ("size", "crc32", "note")}
    return found


def _crc(path: Path, over: Event | None = None) -> int | None:
    """CRC-32 of a file; None where it was ``over`` before the end."""
    total = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            if over is not None and over.is_set():
                return None
            total = zlib.crc32(chunk, total)
    return total
