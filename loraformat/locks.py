"""Locks on files and folders that end with the process that holds them, however it ends.

Where the platform or the file system has none, nobody can tell a living run's temporary from a dead one's: it stays.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["hold", "locked", "take"]

if sys.platform == "win32":

    def take(path: Path) -> int | None:
        """Never: see above."""
        return None

    def hold(path: Path) -> int | None:
        """No lock is needed where nobody takes one; a descriptor that can be closed."""
        return os.open(os.devnull, os.O_RDONLY)

    @contextmanager
    def locked(folder: Path) -> Iterator[None]:
        """Nothing to hold."""
        yield

else:
    import fcntl

    def take(path: Path) -> int | None:
        """A descriptor that holds the lock; None where another process has it, or the path is gone meanwhile.

        Raises:
            OSError: the file system has no locks.
        """
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.lstat(path)):
                return handle
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:
            os.close(handle)
            raise
        os.close(handle)
        return None

    def hold(path: Path) -> int | None:
        """Like ``take`` for a path of one's own; without a lock where the file system has none."""
        try:
            return take(path)
        except OSError:
            return os.open(path, os.O_RDONLY)

    @contextmanager
    def locked(folder: Path) -> Iterator[None]:
        """One process at a time; the others wait."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
