"""The same change in fewer ranks: the nearest of a rank, or the fewest ranks that keep what is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loraformat import progress
from loraformat.algebra.factors import lowrank
from loraformat.algebra.lowrank import norm, total
from loraformat.algebra.svd import svd
from loraformat.blas import one_blas_thread
from loraformat.combining.finite import check_values, finite
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.identity import digest
from loraformat.parts import Delta, Lora, Part, ordered
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter

    F64 = npt.NDArray[np.float64]

__all__ = ["Resized", "resize"]


@dataclass(frozen=True, slots=True)
class Resized:
    """An adapter in fewer ranks.

    Attributes:
        ranks: key → (rank before, rank after), of every target that has pairs.
        residuals: key → ‖ΔW' − ΔW‖ / ‖ΔW‖ as stored; 0.0 where the target stayed as it was.
        residual: the same of all these targets together.
        untouched: targets that have no pairs: dense, absolute.
    """

    adapter: Adapter
    ranks: Mapping[str, tuple[int, int]]
    residuals: Mapping[str, float]
    residual: float
    untouched: Sequence[str] = ()


@one_blas_thread()
def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    residual: float | None = None,
    per_target: bool = False,
) -> Resized:
    """Every target in the rank that is asked for, which is the nearest there is (Eckart–Young 1936), in float32.

    Exactly one of ``rank``, ``energy`` and ``residual`` is given. The last two keep, of the ranks of all targets
    together, the strongest: the fewest that leave so much. Every target keeps one rank at least. LoRA, with a Tucker core
    too, LoHa and LoKr become a pair with scale rule ``factor``; dense and absolute parts stay, as does a magnitude, and
    as does a pair that has no more than its rank already. A factor shared by a batch stays shared.

    Args:
        rank: at most this in every target.
        energy: the share of ‖ΔW‖² to keep, above 0 and at most 1.
        residual: ‖ΔW' − ΔW‖ / ‖ΔW‖ at most, at least 0 and below 1.
        per_target: keep that in every target by itself.

    Raises:
        LoraFormatError: LF-705 not one of the three, or out of its range; LF-312 the adapter holds NaN;
            LF-612 no target has a rank, or what is stored is beyond float32.
    """
    lost = _allowed(rank, energy, residual, per_target)
    keys = [key for key, update in adapter.items() if _ranked(update)]
    if not keys:
        raise fault("LF-612", "no target of the adapter has a rank: it holds dense or absolute parts alone")
    check_values((adapter,))
    wanted = None if lost is None or per_target else _fewest({key: _squares(adapter[key]) for key in keys}, lost)
    targets, ranks, left = dict(adapter.targets), {}, {}

    def resized(key: str) -> tuple[Update, tuple[int, int], tuple[float, float]]:
        pairs = _Pairs(adapter[key], rank or (wanted[key] if wanted else None))
        with finite(key) as check:
            made = pairs.cut(pairs.vectors or _beyond(pairs.squares, lost or 0.0))
            check(made.parts)
        progress.advance(math.prod(pairs.exact.shape))
        return made, (pairs.rank, made["lora"].r), pairs.lost(made)

    with ThreadPoolExecutor(2) as pool:  # decompositions let go of Python's lock
        for key, done in zip(keys, pool.map(resized, keys), strict=True):
            targets[key], ranks[key], left[key] = done
    residuals = {key: gone / whole if whole else 0.0 for key, (gone, whole) in left.items()}
    away, all_ = (math.hypot(*(pair[i] for pair in left.values())) for i in (0, 1))
    asked = {"rank": rank, "energy": energy, "residual": residual, "per_target": per_target or None}
    said = {name: value for name, value in asked.items() if value is not None}
    provenance = {**adapter.provenance, "resized": said | {"from": digest(adapter), "residuals": residuals}}
    made = replace(adapter, targets=targets, provenance=provenance)
    untouched = [key for key in adapter if key not in ranks]
    return Resized(made, ranks, residuals, away / all_ if all_ else 0.0, untouched)


class _Pairs:
    """The parts of one target that have a rank, decomposed together."""

    def __init__(self, update: Update, vectors: int | None) -> None:
        self.update, self.vectors = update, vectors
        self.old = tuple(part for part in update.additive if not isinstance(part, Delta))
        self.exact = lowrank(replace(update, parts=self.old))
        self.found = svd(self.exact, vectors)
        own = math.prod(self.exact.shape[:-2])
        self.times = math.prod(update.placement.batch_sizes) // own if update.placement else 1
        """How many matrices of the base one of these changes."""

    @property
    def rank(self) -> int:
        """What a loader sees as the rank."""
        return max(part.r or self.exact.rank for part in self.old)

    @property
    def squares(self) -> F64:
        """What each rank holds of ‖ΔW‖², over the batch and the matrices that share it."""
        axes = tuple(range(self.found.s.ndim - 1))
        held: F64 = self.times * np.sum(self.found.s[..., : max(1, self.found.significant)] ** 2, axis=axes)
        return held

    def cut(self, rank: int) -> Update:
        """The update with these parts as one pair of that rank; itself where it has no more."""
        rank = min(rank, max(1, self.found.significant))
        first = self.old[0]
        if len(self.old) == 1 and isinstance(first, Lora) and first.mid is None and first.r <= rank:
            return self.update
        parts: list[Part] = [part for part in self.update.parts if all(part is not other for other in self.old)]
        parts.append(self.found.cut(rank).pair())
        return replace(self.update, parts=ordered(parts))

    def lost(self, made: Update) -> tuple[float, float]:
        """(‖ΔW' − ΔW‖ as stored, ‖ΔW‖), over all matrices that share them."""
        root, whole = math.sqrt(self.times), float(np.linalg.norm(self.found.s))
        if made is self.update:
            return 0.0, root * whole
        gone = self.found.residual(made["lora"].r)
        if gone > _ROUNDING:  # what is cut off is orthogonal to what stays, and hides its rounding
            return root * gone * whole, root * whole
        stored = lowrank(replace(made, parts=(made["lora"],)))
        return root * norm(total([(1.0, self.exact), (-1.0, stored)])), root * whole


def _allowed(rank: int | None, energy: float | None, residual: float | None, per_target: bool) -> float | None:
    """The share of ‖ΔW‖² that may be lost; None where a rank is asked for."""
    if sum(value is not None for value in (rank, energy, residual)) != 1:
        raise fault("LF-705", "how much is to be kept?", fix="give one of --rank R, --energy E, --residual X")
    problems = []
    if rank is not None and rank < 1:
        problems.append(f"a rank of {rank}: it is at least 1")
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"an energy of {energy:g}: it is a share, above 0 and at most 1")
    if residual is not None and not 0 <= residual < 1:
        problems.append(f"a residual of {residual:g}: it is a share, at least 0 and below 1")
    if rank is not None and per_target:
        problems.append("a rank is one for every target: --per-target is for --energy and --residual")
    if problems:
        raise LoraFormatError([Problem("LF-705", what) for what in problems])
    return None if rank is not None else 1.0 - energy if energy is not None else (residual or 0.0) ** 2


def _ranked(update: Update) -> bool:
    return any(not isinstance(part, Delta) for part in update.additive)


def _squares(update: Update) -> F64:
    return _Pairs(update, 1).squares


def _fewest(held: Mapping[str, F64], lost: float) -> dict[str, int]:
    """The ranks to keep: over all targets the weakest are left out while what they hold may be lost."""
    places = [(key, i) for key, squares in held.items() for i in range(1, len(squares))]
    kept = dict.fromkeys(held, 1)
    weak = np.array([held[key][i] for key, i in places])
    whole = float(sum(squares.sum() for squares in held.values()))
    order = np.argsort(weak, kind="stable")
    for i in order[np.cumsum(weak[order]) > lost * whole * _ROUND]:
        kept[places[i][0]] += 1
    return kept


_ROUNDING = 1e-4  # of ‖ΔW‖: beside it the rounding of float32 changes a residual by less than 1e-6 of it
_ROUND = 1 + 1e-12  # a share that was asked for to the last digit is not missed by rounding


def _beyond(squares: F64, lost: float) -> int:
    """How many ranks of one target cannot be left out, together with all weaker ones."""
    tails = np.cumsum(squares[::-1])[::-1]
    return 1 + int(np.count_nonzero(tails[1:] > lost * tails[0] * _ROUND))
