"""Writing so that a reader never sees half a file: a temporary name in the same folder, fsync, rename.

Killed at any moment, the old output is still there and whole; what is left over is a hidden temporary file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from loraformat.errors import fault

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Writer", "check_free", "write_file", "write_folder"]


class Writer(Protocol):
    """Writes one file's bytes."""

    def __call__(self, file: BinaryIO, /) -> None:
        """Write everything; raise to leave no output."""


def check_free(path: Path, force: bool) -> None:
    """Refuse before any work is done: LF-702 the output exists, LF-703 its folder does not."""
    if os.path.lexists(path) and not force:
        raise fault("LF-702", f"{path} exists", fix="give --force to replace it, or another name")
    if not path.parent.is_dir():
        raise fault("LF-703", f"the folder {path.parent} does not exist", fix=f"mkdir -p {path.parent}")


def write_file(path: Path, writer: Writer, *, force: bool = False) -> None:
    """Create ``path`` from what ``writer`` writes, or leave everything as it was."""
    check_free(path, force)
    if path.is_dir():
        raise fault("LF-703", f"{path} is a folder; the output is a file")
    with _temporary(path) as temporary:
        with open(temporary, "xb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_folder(path: Path, writers: Mapping[str, Writer], *, force: bool = False) -> None:
    """Create the folder ``path`` with one file for each writer, or leave everything as it was.

    An existing folder steps aside as ``.NAME.old`` until the new one has its name; a run that was killed between
    the two renames is undone by the next.
    """
    old = path.with_name(f".{path.name}.old")
    if old.exists():
        _remove(old) if path.exists() else os.rename(old, path)
    check_free(path, force)
    _check_nothing_else(path, writers)
    with _temporary(path) as temporary:
        temporary.mkdir()
        for name, writer in writers.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            with open(temporary / name, "xb") as file:
                writer(file)
                file.flush()
                os.fsync(file.fileno())
        if os.path.lexists(path):
            os.rename(path, old)
        os.rename(temporary, path)
        _remove(old)


def _check_nothing_else(path: Path, names: Iterable[str]) -> None:
    """A folder is replaced as a whole, so it must hold nothing but what is written anew."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise fault("LF-703", f"{path} is not a plain folder; the output is one")
    files = (entry for entry in path.rglob("*") if entry.is_symlink() or not entry.is_dir())
    others = sorted(name for entry in files if (name := entry.relative_to(path).as_posix()) not in set(names))
    if others:
        some = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise fault("LF-703", f"{path} also holds {some}, which would be lost", fix="write to another name")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
    except OSError as error:
        raise fault("LF-703", f"cannot write {path}: {error.strerror or error}") from None
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    remove: Callable[[Path], None] = shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink
    if os.path.lexists(path):
        remove(path)
