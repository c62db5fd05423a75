"""The nearest matrix of a small rank to a dense one, without its other singular vectors.

A block Krylov space (Musco and Musco 2015, arXiv:1504.05477) grows until another step adds next to nothing to what its
best matrix of the rank holds. That costs a few products with a thin block where a full decomposition costs hundreds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.algebra.svd import SVD
from loraformat.normal import normal

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]
    F64 = npt.NDArray[np.float64]

__all__ = ["truncated"]

_MORE = 8  # columns of the block beyond the rank
_GAIN = 1e-8  # of ‖M‖²: a step that adds less is the last
_CLOSE = 1e-3  # a residual below which the rounding of float32 products would show in it
_SMALL = 128  # a side up to which a full decomposition costs as little


def truncated(matrix: Array, rank: int) -> tuple[SVD, float]:
    """The leading ``rank`` singular values and vectors of M, and ‖M − nearest‖ / ‖M‖.

    The products are float32, and float64 where little is lost. The residual is within 1e-6 of the optimum, also where singular values decay slowly; the
    same matrix always gives the same result.

    Args:
        matrix: [*batch, out, in]; each matrix of a batch by itself.
    """
    if matrix.ndim > 2:
        return _batch([truncated(m, rank) for m in matrix], matrix)
    whole = _norm(matrix)
    if whole == 0.0:
        return _zero(matrix, rank), 0.0
    unit = np.asarray(matrix * (1.0 / whole), np.float32)
    wide = unit.shape[0] < unit.shape[1]  # the space is one of the shorter side
    u, s, vt = _leading(unit.T if wide else unit, rank)
    found = SVD(vt.T, s, u.T) if wide else SVD(u, s, vt)
    residual = _residual(unit, found)
    if residual < _CLOSE:
        found = _polished(unit.astype(np.float64), found)
        residual = _residual(unit, found)
    return found._replace(s=found.s * whole), residual


def _leading(m: F32, rank: int) -> SVD:
    """Of a matrix [long, short] of norm 1."""
    short = m.shape[1]
    block = rank + _MORE
    if short <= max(_SMALL, 4 * block):
        return _exact(m, rank)
    steps, held = [_orthonormal(_start(short, block))], 0.0
    image = m @ steps[0]
    images = [image.astype(np.float64)]
    squares = images[0].T @ images[0]
    while len(steps) * block <= short // 2:
        steps.append(_beyond(steps, m.T @ image))
        image = m @ steps[-1]
        images.append(image.astype(np.float64))
        squares = _bordered(squares, images)
        values, vectors = np.linalg.eigh(squares)
        energy = float(np.sum(values[-rank:]))
        if energy - held <= _GAIN:
            return _ritz(steps, images, vectors[:, ::-1][:, :rank])
        held = energy
    return _exact(m, rank)


def _bordered(squares: F64, images: list[F64]) -> F64:
    """(M·K)ᵀ(M·K) for a space that is a block larger."""
    new = np.concatenate([image.T @ images[-1] for image in images])
    return np.block([[squares, new[: len(squares)]], [new.T]])


def _ritz(steps: list[F32], images: list[F64], v: F64) -> SVD:
    """The best that the space K holds: M·K turned to its singular vectors."""
    left = np.concatenate(images, axis=1) @ v
    s = np.linalg.norm(left, axis=0)
    return SVD(left / np.where(s > 0, s, 1), s, (np.concatenate(steps, axis=1, dtype=np.float64) @ v).T)


def _polished(m: F64, found: SVD) -> SVD:
    """One step of subspace iteration in float64."""
    q = np.linalg.qr(m @ found.Vt.T)[0]
    u, s, vt = np.linalg.svd(q.T @ m, full_matrices=False)
    return SVD(q @ u, s, vt)


def _exact(m: F32, rank: int) -> SVD:
    u, s, vt = np.linalg.svd(m.astype(np.float64), full_matrices=False)
    return SVD(u[:, :rank], s[:rank], vt[:rank])


def _start(rows: int, columns: int) -> F32:
    return normal(0, f"krylov {rows} {columns}", rows * columns).reshape(rows, columns).astype(np.float32)


def _beyond(steps: list[F32], new: F32) -> F32:
    """An orthonormal block for what ``new`` has beyond the steps before.

    Twice: where next to nothing is left, the first time leaves rounding, which is not orthogonal to anything.
    """
    for _ in range(2):
        for q in steps:
            new = new - q @ (q.T @ new)
        new = _orthonormal(new)
    return new


def _orthonormal(tall: F32) -> F32:
    return np.asarray(np.linalg.qr(tall)[0], np.float32)


def _norm(matrix: Array) -> float:
    return float(np.linalg.norm(np.asarray(matrix, np.float64)))


def _residual(unit: F32, found: SVD) -> float:
    """√(1 − Σ s²), of a matrix of norm 1; where that cancels, the norm of the difference itself."""
    lost = 1.0 - float(np.sum(found.s**2))
    return float(np.sqrt(lost)) if lost > 0.01 else _norm(unit - found.cut(found.s.shape[-1]).matrix())


def _zero(matrix: Array, rank: int) -> SVD:
    (out, in_), r = matrix.shape, min(rank, *matrix.shape)
    return SVD(np.eye(out, r), np.zeros(r), np.eye(r, in_))


def _batch(found: list[tuple[SVD, float]], matrix: Array) -> tuple[SVD, float]:
    """Those of a batch together; their losses add up as squares."""
    whole = np.array([_norm(m) for m in matrix])
    lost = np.array([residual for _, residual in found]) * whole
    stacked = SVD(*(np.stack(parts) for parts in zip(*(svd for svd, _ in found), strict=True)))
    return stacked, float(np.linalg.norm(lost) / np.linalg.norm(whole)) if whole.any() else 0.0
