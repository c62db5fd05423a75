"""What a run writes before it is an output: beside it, under names that say whose they are, locked for as long as the run lives.

Temporaries that a killed run left are those that nobody holds a lock on; the next run to the same output removes them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loraformat.errors import fault
from loraformat.journal import Journal
from loraformat.locks import hold, take
from loraformat.stopping import unbroken

__all__ = ["held", "new_name", "remove", "scratch"]


@contextmanager
def held(path: Path, *, folder: bool, identity: Callable[[], str] | None = None) -> Iterator[Path]:
    """A locked temporary of ``path``, new or left by a killed run of the same task; gone at the end unless renamed."""
    temporary, lock = _left_by(path, identity) if identity else (new_name(path), None)
    _remove_leftovers(path)
    try:
        while lock is None:  # another run may take it for a leftover before it is locked
            temporary = new_name(path)
            temporary.mkdir() if folder else temporary.open("xb").close()
            lock = hold(temporary)
        yield temporary
    except OSError as error:
        raise fault("LF-703", f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with unbroken():
            with suppress(OSError):  # a disk that became read-only: what went wrong before says so
                _remove_all(temporary)
            if lock is not None:
                os.close(lock)


@contextmanager
def scratch(path: Path, ending: str) -> Iterator[Path]:
    """A name beside the output for what a run makes for itself: with all names that it is in, it is gone at the end.

    A run that was killed leaves them to the next one to that output.
    """
    with held(path, folder=True) as own:
        yield own.with_name(f"{own.name}{ending}")


def new_name(path: Path) -> Path:
    """Of a temporary of an output, beside it."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")


def _left_by(path: Path, identity: Callable[[], str]) -> tuple[Path, int | None]:
    """A temporary that a killed run of this task left, with its lock; else a new name."""
    for entry in _leftovers(path):
        with suppress(OSError):
            if entry.is_dir() and Journal.fits(entry, identity) and (lock := take(entry)) is not None:
                return entry, lock
    return new_name(path), None


def _leftovers(path: Path) -> Iterator[Path]:
    """What runs to this output call their temporaries."""
    start, end = f".{path.name}.", ".tmp"
    for entry in path.parent.iterdir():
        middle = entry.name.removeprefix(start).removesuffix(end)
        if entry.name == f"{start}{middle}{end}" and len(middle) == 8 and not entry.is_symlink():
            yield entry


def _remove_leftovers(path: Path) -> None:
    """Temporaries of this output that no living run holds."""
    for entry in _leftovers(path):
        with suppress(OSError):
            if (lock := take(entry)) is not None:
                _remove_all(entry)
                os.close(lock)


def _remove_all(temporary: Path) -> None:
    """A temporary, and before it what a run made under names that its own is in."""
    for entry in temporary.parent.iterdir():
        if f"{temporary.name}." in entry.name:
            remove(entry)
    remove(temporary)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
