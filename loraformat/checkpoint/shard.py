"""One file of weights: which tensors it holds, their values, and the same file with some of them changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from loraformat.checkpoint.change import Change
from loraformat.container import TensorInfo
from loraformat.dtypes import numpy_dtype
from loraformat.errors import Problem
from loraformat.ranges import read_range
from loraformat.tiles import Tensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Shard", "Stored"]


class Shard(Protocol):
    """An open file of weights."""

    path: Path
    size: int

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Tensor → dtype and shape."""

    def tensor(self, name: str) -> Tensor:
        """The values, read where they are sliced."""

    def whole(self, name: str) -> Array:
        """All values, as a view of the mapped file."""

    def obstacles(self, changes: Sequence[Change]) -> list[Problem]:
        """Why these changes, some of which may add tensors, cannot be written into a file of this form."""

    def size_with(self, changes: Sequence[Change]) -> int:
        """Bytes of the file with the changes."""

    def write(self, target: BinaryIO, changes: Sequence[Change]) -> None:
        """Write the file with the changes; every other byte as it is."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that lies row-major in an open file from ``start`` on.

    It is read, not mapped: pages of a mapped file stay in the resident set, and a model may be larger than the memory.
    """

    file: BinaryIO
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, file: BinaryIO, start: int, info: TensorInfo) -> Stored:
        """From a header entry."""
        return cls(file, start, info.shape, numpy_dtype(info.dtype))

    def __getitem__(self, rows: slice | EllipsisType) -> Array:
        import numpy as np

        shape, first = self.shape, 0
        if isinstance(rows, slice):
            first, last, _ = rows.indices(shape[0])
            shape = (max(0, last - first), *shape[1:])
        out = np.empty(shape, self.dtype)
        start = self.start + first * math.prod(shape[1:]) * self.dtype.itemsize
        read_range(self.file, out.reshape(-1).view(np.uint8).data, start)
        return out
