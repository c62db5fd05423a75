"""Whether two sketches are of one weight, and how many times as large the second is. Normative.

Two sketches are compared by their cosine, never bit by bit: the order of the sums is free. The same weight gives 1,
cast to 16 bits or quantised to 4 bits more than 0.95; any other weight, the transpose of a square one too, less than
0.5 (measured on 247 trained matrices). A weight is recognised at a cosine of at least 0.90, with at least 0.3 between
it and the next other weight. A close fine-tune of the base looks the same: equality needs ``base_sha256``.

Then by the ratio of their norms. Casts and quantisations to 8 and 4 bits keep it within 0.89 and 1.20 (4148, of 248
trained matrices: ``bench/sketches.py``); a factor that a tool folds into a weight does not: 1/√d of an attention, 1/√2, 2. A sketch of norm 1 is of
the time when S was divided by it, and says nothing of the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from loraformat.errors import Problem

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = [
    "ACCEPT",
    "GAP",
    "SCALE",
    "Likeness",
    "Recognised",
    "compare",
    "cosine",
    "has_scale",
    "recognise",
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

Name = TypeVar("Name")


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
