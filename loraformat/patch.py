"""A file written as a copy of another with some byte ranges replaced: the rest is copied by the kernel.

Where every byte goes is known before the first is written, so that two threads can work at once: while one waits
for the disk the other computes, and nobody holds more than a tile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import BinaryIO

from loraformat import progress
from loraformat.blas import one_blas_thread
from loraformat.ranges import copy_range, start_writing, write_range

__all__ = ["Patch", "patched_size", "write_patched"]

_WORKERS = 2
_WRITEBACK = 32 << 20
_KEPT = 16 << 20  # bytes: more than the tiles of a thread


@dataclass(frozen=True, slots=True)
class Patch:
    """The bytes [start, stop) of the source become the ``length`` bytes that ``tiles`` gives, run after run."""

    start: int
    stop: int
    length: int
    tiles: Callable[[], Iterable[memoryview]]


def patched_size(size: int, patches: Iterable[Patch]) -> int:
    """Bytes of the result for a source of ``size`` bytes."""
    return size + sum(patch.length - (patch.stop - patch.start) for patch in patches)


def write_patched(target: BinaryIO, source: BinaryIO, patches: Sequence[Patch]) -> None:
    """Write ``source`` with its patches, which do not overlap, into the empty file ``target``.

    Raises:
        OSError: the source became shorter, or the target cannot be written.
        ValueError: patches overlap, or the tiles of one have not its length.
    """
    over = Event()
    pieces = list(_pieces(target, source, sorted(patches, key=lambda p: (p.start, p.stop)), over))
    _keep_freed_memory()
    pool = ThreadPoolExecutor(_WORKERS)
    try:
        with one_blas_thread():
            done, _ = wait([pool.submit(_or_stop, piece, over) for piece in pieces], return_when=FIRST_EXCEPTION)
        for piece in done:
            piece.result()
    finally:
        over.set()  # who presses Ctrl-C does not wait for gigabytes
        pool.shutdown(cancel_futures=True)


def _keep_freed_memory() -> None:
    """Let every tile have the memory of the one before, which else goes back to the kernel and comes again zeroed.

    glibc takes the largest block that was mapped and freed for the size of what a program uses again and again, up to
    32 MiB (malloc/malloc.c, M_MMAP_THRESHOLD). The block is not touched, so it costs nothing; elsewhere it does nothing.
    """
    bytearray(_KEPT)


def _pieces(target: BinaryIO, source: BinaryIO, patches: Sequence[Patch], over: Event) -> Iterator[Callable[[], None]]:
    """What is to be done, each at its own place in the target, until it is ``over``."""
    position = offset = 0
    for patch in patches:
        if patch.start < position:
            raise ValueError(f"two patches overlap at byte {patch.start}")
        yield partial(_copy, source, position, target, offset, patch.start - position, over)
        offset += patch.start - position
        yield partial(_replace, target, offset, patch, over)
        position, offset = patch.stop, offset + patch.length
    size = os.fstat(source.fileno()).st_size
    yield partial(_copy, source, position, target, offset, size - position, over)


def _or_stop(piece: Callable[[], None], over: Event) -> None:
    """Do it; where it fails, it is over for the others before another of them begins."""
    try:
        piece()
    except BaseException:
        over.set()
        raise


def _copy(source: BinaryIO, start: int, target: BinaryIO, offset: int, length: int, over: Event) -> None:
    for begin in range(0, length, _WRITEBACK):
        if over.is_set():
            return
        count = min(_WRITEBACK, length - begin)
        copy_range(source, start + begin, target, offset + begin, count)
        start_writing(target, offset + begin, count)
        progress.advance(count)


def _replace(target: BinaryIO, offset: int, patch: Patch, over: Event) -> None:
    written = asked = 0
    if over.is_set():
        return
    for tile in patch.tiles():
        if over.is_set():
            return
        write_range(target, tile, offset + written)
        written += len(tile)
        if written - asked >= _WRITEBACK:
            start_writing(target, offset + asked, written - asked)
            asked = written
    if written != patch.length:
        raise ValueError(f"a patch of {patch.length} bytes gave {written}")
    start_writing(target, offset + asked, written - asked)
