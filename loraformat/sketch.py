"""Sketches: 64 numbers that recognise a base weight though it was renamed, cast, quantised or stored the other way.

Normative. Let W be a base weight of two or more axes as the matrix [out, in] of its placement, batch axes in front of
out and flattened with it. In float64,

    S = P · W · Q        8 × 8,  P [8, out],  Q [in, 8],  all entries ±1

- P[k, j] is +1 where bit k (of value 2^k) of byte j of SHAKE-128("loraformat/1\\nsketch\\nout") is set, else −1;
  Q[j, k] is read in the same way from SHAKE-128("loraformat/1\\nsketch\\nin"). A weight of any size reads a prefix of
  the same two streams.
- The sketch is S itself, row-major, as 64 values of F32: it is linear, and c·W has c times the sketch of W.

Two sketches are compared by their cosine, never bit by bit: the order of the sums is free. The same weight gives 1,
cast to 16 bits or quantised to 4 bits more than 0.95; any other weight, the transpose of a square one too, less than
0.5 (measured on 247 trained matrices). A weight is recognised at a cosine of at least 0.90, with at least 0.3 between
it and the next other weight. A close fine-tune of the base looks the same: equality needs ``base_sha256``.

Then by the ratio of their norms. Casts and quantisations to 8 and 4 bits keep it within 0.89 and 1.20 (4148, of 248
trained matrices: ``bench/sketches.py``); a factor that a tool folds into a weight does not: 1/√d of an attention, 1/√2, 2. A sketch of norm 1 is of
the time when S was divided by it, and says nothing of the scale.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np

from loraformat.blas import one_blas_thread
from loraformat.errors import Problem

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.axes import Placement
    from loraformat.tiles import Tensor

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]
    F64 = npt.NDArray[np.float64]

__all__ = [
    "ACCEPT",
    "GAP",
    "SCALE",
    "SIZE",
    "Likeness",
    "Recognised",
    "compare",
    "cosine",
    "has_scale",
    "recognise",
    "sketch",
    "sketches",
    "telling",
    "unlike",
]

ACCEPT = 0.90
"""The least cosine at which a weight is recognised."""

GAP = 0.3
"""The least distance between its cosine and that of any other weight."""

SCALE = 6 / 5
"""How many times the norm of one sketch of a weight may be that of another: nearly the root of √2, the least factor that
tools fold; what is added to a weight at a cosine of 0.90 makes it 1/0.90 times as long."""

_UNIT = 1e-5
"""How near to 1 the norm of a sketch without a scale is: rounding 64 values to float32 moves it by less than 1e-7, a
division in float32 by less than 1e-5."""

_K = 8
SIZE = _K * _K
"""How many numbers a sketch has."""

_TILE = 1 << 18  # values: 2 MiB of float64

Name = TypeVar("Name")


@one_blas_thread()
def sketch(weight: Tensor, placement: Placement) -> F32 | None:
    """The sketch of a base weight: float32 [64].

    Args:
        weight: a tensor of ``placement.shape``, any float dtype; or what gives one where it is sliced: it is read in tiles.

    Returns:
        None for a weight of fewer than two axes, or with sums that are not finite in float32: it has no sketch.
    """
    if len(weight.shape) < 2:
        return None
    *batch, out, in_ = placement.matrix_shape
    left, right = _signs("out", math.prod(batch) * out), _signs("in", in_)
    grid = np.arange(len(left)).reshape(*batch, out)
    total = np.zeros((_K, _K))
    step = max(1, _TILE // max(1, math.prod(weight.shape[1:])))
    for start in range(0, weight.shape[0], step):
        run = placement.rows(start, min(start + step, weight.shape[0]))
        tile = weight[start : start + step].astype(np.float64)
        matrix = run.placement.to_matrix(tile).reshape(-1, run.placement.matrix_shape[-1])
        if run.group == "in":
            total += left.T @ (matrix @ right[run.index])
        else:
            axis = run.position if run.group == "batch" else -1
            rows = np.arange(grid.shape[axis])[run.index]
            total += left[grid.take(rows, axis).reshape(-1)].T @ (matrix @ right)
    return _stored(total)


@one_blas_thread()
def sketches(matrix: Array, rows: int, step: int) -> Mapping[int, F32]:
    """Start → sketch of every run of ``rows`` rows of a matrix [out, in] that starts at a multiple of ``step``.

    Each is the sketch of the weight [rows, in] that the run would be by itself.
    """
    out, in_ = matrix.shape
    left, right = _signs("out", rows), _signs("in", in_)
    tiles = max(1, _TILE // max(1, in_))
    summed = np.concatenate([matrix[i : i + tiles].astype(np.float64) @ right for i in range(0, out, tiles)])
    drawn = {start: _stored(left.T @ summed[start : start + rows]) for start in range(0, out - rows + 1, step)}
    return {start: found for start, found in drawn.items() if found is not None}


def telling(place: Placement) -> bool:
    """Whether a sketch of a matrix of this size is proof: that of a small one varies in too few directions.

    Of random matrices that vary in 4 directions, one in 50 is taken for a given other; in 32, one in 10^11.
    """
    *rows, columns = place.matrix_shape
    return min(_K, math.prod(rows)) * min(_K, columns) >= 32


@dataclass(frozen=True, slots=True)
class Recognised(Generic[Name]):
    """Which of several weights a sketch means.

    Attributes:
        names: none; the one that it means; or several that are too near to each other to be told apart.
        cosine: of the best.
        second: the highest cosine of a weight that is not among ``names``; 0 if there is none.
    """

    names: tuple[Name, ...]
    cosine: float
    second: float


def recognise(wanted: Array, known: Mapping[Name, Array]) -> Recognised[Name]:
    """Which of the known sketches the wanted one is.

    >>> one, other = np.eye(64, dtype=np.float32)[:2]
    >>> recognise(one, {"a": one, "b": other}).names, recognise(one + other, {"a": one, "b": other}).names
    (('a',), ())
    """
    cosines = {name: cosine(wanted, other) for name, other in known.items()}
    best = max(cosines.values(), default=0.0)
    names = tuple(name for name, value in cosines.items() if best >= ACCEPT and value > best - GAP)
    second = max((value for name, value in cosines.items() if name not in names), default=0.0)
    return Recognised(names, best, second)


def cosine(one: Array, other: Array) -> float:
    """The cosine of two sketches; 0 where one is all zeros, which resembles nothing."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 0.0


@dataclass(frozen=True, slots=True)
class Likeness:
    """How like the weights of two sketches are.

    Attributes:
        cosine: of the two.
        scale: how many times the norm of the first that of the second is; None where one of them tells no scale.
    """

    cosine: float
    scale: float | None

    @property
    def same_weight(self) -> bool:
        """Whether they are one weight, up to a factor."""
        return self.cosine >= ACCEPT

    @property
    def same_scale(self) -> bool:
        """Whether no factor between them is known."""
        return self.scale is None or 1 / SCALE <= self.scale <= SCALE


def compare(wanted: Array, found: Array) -> Likeness:
    """How like the weight of the first sketch that of the second is, and how many times as large.

    >>> one = np.arange(64, dtype=np.float32)
    >>> like = compare(one, one / 8)
    >>> like.same_weight, like.same_scale, like.scale
    (True, False, 0.125)
    """
    known = has_scale(wanted) and has_scale(found)
    return Likeness(cosine(wanted, found), _norm(found) / _norm(wanted) if known else None)


def unlike(key: str, wanted: Array, found: Array, called: str) -> Problem | None:
    """LF-607 where a weight is another than the target's, LF-616 where it is a multiple of that; None where it is the same.

    Args:
        wanted: the sketch of the target's weight.
        found: that of the weight that is ``called`` so.
    """
    like = compare(wanted, found)
    if not like.same_weight:
        what = f"{called} is not like the tensor that the adapter was bound to: their sketches have cosine {like.cosine:.2f}"
        fix = "another base, or a name that means another weight; --any-base takes it all the same"
        return Problem("LF-607", what, key, fix)
    if not like.same_scale:
        what = f"{called} is {like.scale:.3g} times {key}: a factor was folded into it, and W + ΔW is not what the module computes"
        fix = "take a model without it: export without folding, or merge into the checkpoint and export that"
        return Problem("LF-616", what, key, fix)
    return None


def has_scale(drawn: Array) -> bool:
    """Whether a sketch tells the scale of its weight: not one of zeros, and not one that was divided by its norm."""
    norm = _norm(drawn)
    return norm > 0 and abs(norm - 1) > _UNIT


def _norm(drawn: Array) -> float:
    return float(np.linalg.norm(drawn.astype(np.float64)))


@functools.lru_cache(maxsize=32)
def _signs(side: Literal["out", "in"], count: int) -> npt.NDArray[np.int8]:
    """±1 [count, 8] of one side; a byte each, because a vocabulary is long."""
    stream = hashlib.shake_128(f"loraformat/1\nsketch\n{side}".encode()).digest(count)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8)[:, None], axis=1, bitorder="little")
    return (2 * bits.astype(np.int8) - 1).astype(np.int8)


def _stored(total: F64) -> F32 | None:
    with np.errstate(over="ignore"):
        drawn = total.reshape(-1).astype(np.float32)
    return drawn if np.isfinite(drawn).all() else None
