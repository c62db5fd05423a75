"""What the methods do to the entries of ΔW: which are kept, and which of several changes an entry goes with.

Everything is float32, contiguous, and works on whole matrices [*batch, out, in] in place; rows are those of the last axis. Of equal
magnitudes at a threshold all are kept, so that no order of entries matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]
    F64 = npt.NDArray[np.float64]

__all__ = ["Draw", "drop", "drop_small", "elect", "erase_minority", "most_varied", "trim", "trim_both"]

Draw = Callable[[int], "F64"]
"""The uniform numbers of a row, by its number."""

_TILE = 1 << 16  # entries: what is computed with them stays in the cache


def trim(delta: F32, density: float) -> None:
    """Keep the ``density`` of the entries that are largest."""
    _keep_between(delta, _largest(np.abs(delta), int(density * delta.size)), np.float32(np.inf))


def trim_both(delta: F32, density: float, gamma: float) -> None:
    """Leave out the ``gamma`` of the entries that are largest; keep the ``density`` of all that come next."""
    count, outliers = int(density * delta.size), int(gamma * delta.size)
    size = np.abs(delta)
    above = _largest(size, outliers)
    _keep_between(delta, _largest(size, min(count + outliers, delta.size)), above)


def drop(delta: F32, density: float, draw: Draw) -> None:
    """Keep each entry with probability ``density``, and divide what is kept by it: the mean stays."""
    for row, values in enumerate(_rows(delta)):
        values *= draw(row) < density
        values /= np.float32(density)


def drop_small(delta: F32, density: float, epsilon: float, draw: Draw) -> None:
    """As ``drop``, with a probability that grows with the rank of an entry's magnitude in its row.

    From density − ε/2 for the smallest to density + ε/2 for the largest.
    """
    for row, values in enumerate(_rows(delta)):
        ranks = np.empty(len(values))
        ranks[np.argsort(np.abs(values), kind="stable")] = np.linspace(-0.5, 0.5, len(values))
        kept = np.clip(density + epsilon * ranks, 0.0, 1.0)
        values *= draw(row) < kept
        np.divide(values, kept, out=values, where=kept > 0, casting="same_kind")


def elect(deltas: Sequence[F32], weights: Sequence[float] | None = None) -> F32:
    """For each entry the sign that has the greater sum, and the mean of the entries that have it.

    Args:
        weights: of the entries in the mean; not of the signs.
    """
    factors = None if weights is None else [np.float32(weight) for weight in weights]

    def tile(parts: Sequence[F32]) -> F32:
        sign, total, count = _majority(parts), np.zeros_like(parts[0]), np.zeros_like(parts[0])
        for i, part in enumerate(parts):
            agrees = part * sign > 0
            total += np.multiply(part if factors is None else part * factors[i], agrees)
            count += agrees
        return np.divide(total, np.maximum(count, 1, out=count), out=total)

    return _tiled(tile, deltas)


def erase_minority(deltas: Sequence[F32], weights: Sequence[float]) -> F32:
    """The mean, weighted, of the entries that have the sign with the greater sum."""

    def tile(parts: Sequence[F32]) -> F32:
        sign, total, share = _majority(parts), np.zeros_like(parts[0]), np.zeros_like(parts[0])
        for part, weight in zip(parts, map(np.float32, weights), strict=True):
            agrees = part * sign > 0
            total += part * agrees * weight
            share += agrees * weight
        return np.divide(total, np.where(share > 0, share, 1), out=total)

    return _tiled(tile, deltas)


def most_varied(deltas: Sequence[F32], density: float) -> None:
    """Keep the ``density`` of the places where the changes vary most, of those where they vary at all."""
    variance = _tiled(lambda parts: np.var(np.stack(parts), axis=0), deltas)
    least = _largest(variance.copy(), int(density * np.count_nonzero(variance)))
    for delta in deltas:
        delta *= variance >= least


def _largest(size: F32, count: int) -> np.float32:
    """The smallest of the ``count`` largest, infinity of none; the order of ``size`` is lost."""
    if count < 1:
        return np.float32(np.inf)
    flat = size.reshape(-1)
    flat.partition(flat.size - count)
    return np.float32(flat[flat.size - count])


def _keep_between(delta: F32, least: np.float32, above: np.float32) -> None:
    """Zero what is smaller than ``least``, and what is not smaller than ``above``."""
    flat = delta.reshape(-1)
    for start in range(0, flat.size, _TILE):
        run = flat[start : start + _TILE]
        size = np.abs(run)
        run *= size >= least  # ten times as fast as an assignment under a mask
        if np.isfinite(above):
            run *= size < above


def _majority(parts: Sequence[F32]) -> F32:
    """1 or −1; a sum of zero counts as positive, as in peft 0.21.2 ``calculate_majority_sign_mask``."""
    total = sum(parts[1:], start=parts[0])
    return (total >= 0) * np.float32(2) - np.float32(1)


def _rows(delta: F32) -> F32:
    return delta.reshape(-1, delta.shape[-1])


def _tiled(function: Callable[[Sequence[F32]], F32], deltas: Sequence[F32]) -> F32:
    """The function of all, run by run."""
    out = np.empty_like(deltas[0])
    flat, flats = out.reshape(-1), [delta.reshape(-1) for delta in deltas]
    for start in range(0, flat.size, _TILE):
        flat[start : start + _TILE] = function([f[start : start + _TILE] for f in flats])
    return out
