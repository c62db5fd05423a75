"""MergedLinear: pairs of the enabled parts of a fused projection, block by block, as one pair and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["blocks", "whole"]


def whole(b: Array, enabled: Sequence[bool]) -> Array:
    """B [n·each, r] with every zero in its place: [parts·each, n·r].

    loralib 0.1.2 MergedLinear.merge_AB: a convolution of n groups, scattered into the enabled parts.

    >>> whole(np.array([[1], [2], [3], [4]]), [True, False, True]).tolist()
    [[1, 0], [2, 0], [0, 0], [0, 0], [0, 3], [0, 4]]
    """
    count, r = sum(enabled), b.shape[1]
    each = b.shape[0] // count
    full = np.zeros((len(enabled), each, count, r), b.dtype)
    for block, part in enumerate(np.flatnonzero(enabled)):
        full[part, :, block] = b[block * each : (block + 1) * each]
    return full.reshape(len(enabled) * each, count * r)


def blocks(b: Array, enabled: Sequence[bool]) -> Array | None:
    """What ``whole`` made a B of, bit for bit; None where it is no such B."""
    count = sum(enabled)
    if not count or b.shape[0] % len(enabled) or b.shape[1] % count:
        return None
    each, r = b.shape[0] // len(enabled), b.shape[1] // count
    parts = np.flatnonzero(enabled)
    small = np.concatenate([b.reshape(len(enabled), each, count, r)[part, :, i] for i, part in enumerate(parts)])
    again: Array = whole(small, enabled)
    return small if again.tobytes() == np.ascontiguousarray(b).tobytes() else None
