"""Pages of mapped files: brought into a process's tables many at a time, not at each first touch of one.

A fault for every 64 kB (linux fault_around_bytes) costs as much as the copy itself when a large tensor is written on.
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["read_ahead"]

_POPULATE_READ = 22  # linux 5.14 mman-common.h MADV_POPULATE_READ; an older kernel says EINVAL
_LEAST = 1 << 20  # bytes: below it a system call of its own gains nothing


def read_ahead(tensor: npt.NDArray[Any]) -> None:
    """Make the values of a tensor that is a view of a mapped file ready to read; nothing of any other."""
    if tensor.nbytes < _LEAST or sys.platform != "linux":
        return
    import numpy as np

    owner: Any = tensor
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if not isinstance(owner, mmap.mmap):
        return
    first = np.frombuffer(owner, np.uint8, 1).__array_interface__["data"][0]
    offset = tensor.__array_interface__["data"][0] - first
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    extent = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)) + tensor.itemsize
    with suppress(OSError, ValueError):
        owner.madvise(_POPULATE_READ, start, offset + extent - start)
