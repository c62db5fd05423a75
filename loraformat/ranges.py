"""Byte ranges of open files, read, written and copied by several threads at once: no thread moves another's position."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import BinaryIO

__all__ = ["append", "append_copy", "clones", "copy_range", "read_range", "start_writing", "write_range"]

_CHUNK = 8 << 20
_RUN = 1 << 17  # bytes of one write: of more, for which it looks for large folios, linux 6.18 takes three times as long
_WRITEBACK = 32 << 20
_FICLONE = 0x40049409  # linux/fs.h
_lock = threading.Lock()  # Windows has no positioned reads and writes: there, one thread at a time seeks


def read_range(file: BinaryIO, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` from ``offset`` on; OSError where the file ends before that."""
    while buffer:
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [buffer], offset)
        else:
            with _lock:
                file.seek(offset)
                count = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"the file became shorter while it was read: nothing at byte {offset:,}")
        buffer, offset = buffer[count:], offset + count


def write_range(file: BinaryIO, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(file.fileno(), data[:_RUN], offset)
        else:
            with _lock:
                file.seek(offset)
                count = file.write(data)
        data, offset = data[count:], offset + count


def append(file: BinaryIO, data: memoryview) -> None:
    """Write all of ``data`` where the file stands, and have the kernel begin to store it."""
    begin = file.tell()
    for start in range(0, len(data), _RUN):
        file.write(data[start : start + _RUN])
    _store(file, begin, begin + len(data))


def append_copy(file: BinaryIO, source: BinaryIO, start: int, length: int) -> None:
    """The same of ``length`` bytes of another file."""
    file.flush()
    begin = file.tell()
    copy_range(source, start, file, begin, length)
    file.seek(begin + length)
    _store(file, begin, begin + length)


def _store(file: BinaryIO, begin: int, end: int) -> None:
    """Have those runs stored that were filled between the two."""
    first, last = (at // _WRITEBACK * _WRITEBACK for at in (begin, end))
    if last > first and isinstance(file, (io.BufferedRandom, io.BufferedWriter)):
        file.flush()
        start_writing(file, first, last - first)


def copy_range(source: BinaryIO, start: int, target: BinaryIO, offset: int, length: int) -> None:
    """Copy ``length`` bytes: by the kernel (a reference instead of a copy where the file system has it), or by hand."""
    while length:
        count = _kernel_copy(source, start, target, offset, length)
        if not count:
            buffer = memoryview(bytearray(min(length, _CHUNK)))
            read_range(source, buffer, start)
            write_range(target, buffer, offset)
            count = len(buffer)
        start, offset, length = start + count, offset + count, length - count


def _kernel_copy(source: BinaryIO, start: int, target: BinaryIO, offset: int, length: int) -> int:
    """Bytes copied; 0 where the kernel or the file systems cannot."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), length, start, offset)
    except OSError:  # EXDEV, EINVAL, EOPNOTSUPP; a full disk is met again, and told, by the copy by hand
        return 0


def clones(source: Path, folder: Path) -> bool:
    """Whether a copy of the file in that folder takes no room: both on one file system, which has references to bytes."""
    try:
        import fcntl
        import tempfile

        with open(source, "rb") as file, tempfile.TemporaryFile(dir=folder) as copy:
            fcntl.ioctl(copy, _FICLONE, file.fileno())
    except (ImportError, OSError):
        return False
    return True


def start_writing(file: BinaryIO, offset: int, length: int) -> None:
    """Ask the kernel to begin to store these bytes, so that the last ``fsync`` has little left to do."""
    # linux mm/fadvise.c: POSIX_FADV_DONTNEED starts write-back of the range's dirty pages and waits for none of it.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)
