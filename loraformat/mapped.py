"""Tensors that are views of mapped files: their pages, and where in which file they lie.

To write such a tensor on through the map costs a fault for every 64 kB (linux fault_around_bytes) and four times what the
kernel takes to copy the same bytes from file to file (measured, linux 6.18, page cache warm).
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["place", "read_ahead", "remember"]

_POPULATE_READ = 22  # linux 5.14 mman-common.h MADV_POPULATE_READ; an older kernel says EINVAL
_LEAST = 1 << 20  # bytes: below it a system call of its own gains nothing

_descriptors: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()


def remember(mapped: mmap.mmap, descriptor: int) -> None:
    """Keep a descriptor of a mapped file for as long as it is mapped."""
    own = os.dup(descriptor)
    _descriptors[mapped] = own
    weakref.finalize(mapped, os.close, own)


def place(tensor: npt.NDArray[Any]) -> tuple[int, int] | None:
    """(descriptor, offset) of the very bytes of a large tensor in its file; None where they lie in none so."""
    owner = _owner(tensor)
    if owner is None or (descriptor := _descriptors.get(owner)) is None:
        return None
    if tensor.nbytes < _LEAST or not tensor.flags.c_contiguous:
        return None
    return descriptor, _offset(tensor, owner)


def _owner(tensor: npt.NDArray[Any]) -> mmap.mmap | None:
    """The map that a tensor is a view of."""
    import numpy as np

    owner: Any = tensor
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner if isinstance(owner, mmap.mmap) else None


def _offset(tensor: npt.NDArray[Any], owner: mmap.mmap) -> int:
    import numpy as np

    first: int = np.frombuffer(owner, np.uint8, 1).__array_interface__["data"][0]
    return int(tensor.__array_interface__["data"][0]) - first


def read_ahead(tensor: npt.NDArray[Any]) -> None:
    """Make the values of a tensor that is a view of a mapped file ready to read; nothing of any other."""
    if tensor.nbytes < _LEAST or sys.platform != "linux":
        return
    owner = _owner(tensor)
    if owner is None:
        return
    offset = _offset(tensor, owner)
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    extent = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)) + tensor.itemsize
    with suppress(OSError, ValueError):
        owner.madvise(_POPULATE_READ, start, offset + extent - start)
