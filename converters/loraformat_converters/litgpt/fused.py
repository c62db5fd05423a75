"""Query, key and value in one Linear: the pairs of the parts that are adapted, as one pair and back.

litgpt 0.5.13 LoRAQKVLinear: A [n·r, in] has the factors of the n adapted parts one under the other; of B [rows, r], the
rows of each part belong to its own A, and ``zero_pad`` puts them where they are in the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["adapted", "apart", "whole"]


def whole(b: Array, sizes: Sequence[int], enabled: Sequence[bool]) -> Array:
    """B [rows of the adapted parts, r] with every zero in its place, [all rows, n·r].

    Args:
        sizes: the rows of query, key and value; ``enabled``: which of them are adapted.

    >>> whole(np.array([[1], [2], [3]]), (2, 1, 1), (True, False, True)).tolist()
    [[1, 0], [2, 0], [0, 0], [0, 3]]
    """
    r, at = b.shape[1], 0
    full = np.zeros((sum(sizes), sum(enabled) * r), b.dtype)
    runs = [run for run, on in zip(_ranges(sizes), enabled, strict=True) if on]
    for block, (start, stop) in enumerate(runs):
        full[start:stop, block * r : (block + 1) * r] = b[at : at + stop - start]
        at += stop - start
    return full


def adapted(b: Array, sizes: Sequence[int]) -> list[bool]:
    """Which parts a whole B changes."""
    return [bool(b[start:stop].any()) for start, stop in _ranges(sizes)]


def apart(a: Array, b: Array, sizes: Sequence[int], enabled: Sequence[bool]) -> list[tuple[Array, Array]]:
    """(A [r, in], B [rows, r]) of each enabled part of a whole pair.

    Where ``whole`` made it, they are what it was made of, bit for bit; else each part takes those ranks that reach it.
    """
    count, ranges = sum(enabled), [run for run, on in zip(_ranges(sizes), enabled, strict=True) if on]
    r, rest = divmod(b.shape[1], count)
    own = [slice(i * r, (i + 1) * r) for i in range(count)]
    small = np.concatenate([b[slice(*run), columns] for run, columns in zip(ranges, own, strict=True)])
    if not rest and np.array_equal(whole(small, sizes, enabled), b):
        return [(a[columns], b[slice(*run), columns]) for run, columns in zip(ranges, own, strict=True)]
    used = [np.flatnonzero(b[slice(*run)].any(axis=0)) for run in ranges]
    return [(a[ranks], b[slice(*run)][:, ranks]) for run, ranks in zip(ranges, used, strict=True)]


def _ranges(sizes: Sequence[int]) -> list[tuple[int, int]]:
    stops = list(accumulate(sizes))
    return list(zip((0, *stops), stops, strict=False))
