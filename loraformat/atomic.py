"""Writing so that a reader never sees half a file: a temporary name in the same folder, fsync, rename.

Killed at any moment, the old output is still there and whole. A folder cannot be replaced in one step: the old one
steps aside as ``.NAME.old``, and if the run dies right there the next one puts it back. A signal that asks the run to end
waits until that is over.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from loraformat.errors import fault
from loraformat.journal import Journal
from loraformat.locks import locked
from loraformat.outputs import check_file, check_free
from loraformat.stopping import unbroken
from loraformat.temporaries import held, new_name, remove

__all__ = ["Task", "Writer", "write_file", "write_folder", "write_together"]


class Writer(Protocol):
    """Writes one file's bytes."""

    def __call__(self, file: BinaryIO, /) -> None:
        """Write everything; raise to leave no output."""


def write_file(path: Path, writer: Writer, *, force: bool = False, beside: Mapping[Path, Writer] | None = None) -> None:
    """Create ``path`` from what ``writer`` writes, and the files ``beside`` it, or leave everything as it was."""
    writers = {path: writer, **(beside or {})}
    for each in writers:
        check_file(each, force)
    write_together(writers)


def write_together(writers: Mapping[Path, Writer]) -> None:
    """Files of one folder that belong together: all are written, then each is renamed right after the other; or none is.

    What exists is replaced. Each file is locked until all are in their places.
    """
    with ExitStack() as stack:
        temporaries = _written(writers, stack)
        with unbroken():
            _rename(temporaries)
            for folder in {path.parent for path in writers}:
                _sync(folder)


def _written(writers: Mapping[Path, Writer], stack: ExitStack) -> dict[Path, Path]:
    """Path → the temporary in which its bytes are on the disk, for as long as the stack is."""
    temporaries = {path: stack.enter_context(held(path, folder=False)) for path in writers}
    for path, writer in writers.items():
        with open(temporaries[path], "r+b") as file:
            writer(file)
            _flush(file)
    return temporaries


def _rename(temporaries: Mapping[Path, Path]) -> None:
    """Each to its place; where one cannot, those before it become what they were."""
    asides = {path: _second_name(path) for path in list(temporaries)[:-1] if os.path.lexists(path)}
    done = []
    try:
        for path, temporary in temporaries.items():
            new = not os.path.lexists(path)
            os.replace(temporary, path)
            done.append((path, new))
    except BaseException:
        for path, new in done:
            with suppress(OSError):  # of a file system without links there is nothing to go back to
                path.unlink() if new else os.replace(asides[path], path)
        raise
    finally:
        for aside in asides.values():
            with suppress(OSError):
                aside.unlink()


def _second_name(path: Path) -> Path:
    """Another name of a file that is about to be replaced, if the file system has such."""
    aside = new_name(path)
    with suppress(OSError, NotImplementedError):
        os.link(path, aside, follow_symlinks=False)
    return aside


class Task(Protocol):
    """What a folder is written for: a run that was killed is gone on with by the next one of the same identity."""

    def identity(self) -> str:
        """Of what is made of what; asked for where there is a journal to compare with, or to begin."""

    def note(self, name: str) -> Mapping[str, Any]:
        """What the next run must know of a file that it need not write again, as JSON has it."""

    def resume(self, name: str, note: Mapping[str, Any]) -> None:
        """The file was finished by a run that was killed."""

    def check(self) -> None:
        """Every file is written: raise to leave no output."""


def write_folder(
    path: Path,
    writers: Mapping[str, Writer],
    *,
    force: bool = False,
    task: Task | None = None,
    beside: Mapping[Path, Writer] | None = None,
) -> None:
    """Create the folder ``path`` with one file for each writer, and the files ``beside`` it, or leave everything as it was.

    Args:
        writers: by the file's name in the folder; ``/`` makes folders inside it.
        task: keeps a journal, so that files of a run that was killed are taken over.
    """
    check_free(path, force=True)
    old = path.with_name(f".{path.name}.old")
    with locked(path.parent):
        _recover(path, old)
    check_free(path, force)
    _check_nothing_else(path, writers)
    for each in beside or {}:
        check_file(each, force)
    with ExitStack() as stack:
        temporary = stack.enter_context(held(path, folder=True, identity=task.identity if task else None))
        if task is None:
            for name, writer in writers.items():
                _write(temporary / name, writer)
        else:
            _write_or_resume(temporary, writers, task)
            task.check()
        for name in writers:  # at the end, when the disk has long begun with the first
            with open(temporary / name, "r+b") as file:
                _flush(file)
        for folder in {(temporary / name).parent for name in writers} | {temporary}:
            _sync(folder)
        others = _written(beside or {}, stack)
        with locked(path.parent), unbroken():
            _swap(temporary, path, old, others)
            for folder in {path.parent, *(other.parent for other in others)}:
                _sync(folder)
            _discard(path, old)


def _write(path: Path, writer: Writer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "x+b") as file:
        writer(file)


def _write_or_resume(temporary: Path, writers: Mapping[str, Writer], task: Task) -> None:
    """Every file, but for those that a run that was killed has left whole."""
    journal = Journal(temporary, task.identity)
    with journal.writing() as clerk:
        for name, writer in writers.items():
            if (note := journal.finished(name)) is not None:
                task.resume(name, note)
                continue
            (temporary / name).unlink(missing_ok=True)
            _write(temporary / name, writer)
            clerk.enter(name, task.note(name))
    journal.path.unlink(missing_ok=True)


def _swap(temporary: Path, path: Path, old: Path, others: Mapping[Path, Path]) -> None:
    if os.path.lexists(path):
        os.rename(path, old)
    try:
        os.rename(temporary, path)
        _rename(others)
    except BaseException:
        if os.path.lexists(path):
            os.rename(path, temporary)
        if os.path.lexists(old):
            os.rename(old, path)
        raise


def _recover(path: Path, old: Path) -> None:
    """What a run that died between two renames, or before it had deleted the old folder, left to do."""
    if not os.path.lexists(old):
        return
    if os.path.lexists(path):
        _discard(path, old)
    else:
        os.rename(old, path)


def _discard(path: Path, old: Path) -> None:
    """Delete the old folder; under another name first, so that ``.NAME.old`` is always whole."""
    if os.path.lexists(old):
        doomed = new_name(path)
        with suppress(OSError):  # what cannot be deleted now is a leftover for the next run
            os.rename(old, doomed)
            remove(doomed)


def _check_nothing_else(path: Path, names: Mapping[str, Writer]) -> None:
    """A folder is replaced as a whole, so it must hold nothing but what is written anew."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise fault("LF-703", f"{path} is not a plain folder; the output is one")
    kept = {str(p) for name in names for p in (PurePosixPath(name), *PurePosixPath(name).parents)}
    others = sorted(name for p in path.rglob("*") if (name := p.relative_to(path).as_posix()) not in kept)
    if others:
        some = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise fault("LF-703", f"{path} also holds {some}, which would be lost", fix="write to another name")


def _sync(folder: Path) -> None:
    """A rename is on the disk when its folder is; where a folder cannot be opened or flushed, the system decides."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
