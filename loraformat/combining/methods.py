"""The methods: each says what becomes of the changes ΔW₁, ΔW₂, … of one target. Weights are in them already.

What is linear stays in the factors: such a method only says what each ΔW is multiplied by. The others work entry by
entry on the dense ΔW of one target. Where a paper prunes the whole of a model at once, here each target is pruned by
itself. An adapter that lacks a target, or has weight 0 there, takes no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from loraformat.algebra.factors import lowrank
from loraformat.algebra.lowrank import cosine
from loraformat.combining.entries import (
    Draw,
    drop,
    drop_small,
    elect,
    erase_minority,
    most_varied,
    trim,
    trim_both,
)
from loraformat.errors import fault

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.combining.settings import How
    from loraformat.combining.terms import Term

    F32 = npt.NDArray[np.float32]

__all__ = ["DENSE", "DRAWS", "LINEAR", "METHODS", "PEFT", "PRUNES"]


def given(terms: Sequence[Term], whole: float) -> list[float]:
    """Σ wᵢ ΔWᵢ, task arithmetic (Ilharco et al. 2023, arXiv:2212.04089)."""
    return [term.weight for term in terms]


def slerp(terms: Sequence[Term], whole: float) -> list[float]:
    """The point at t = w₂ / (w₁ + w₂) on the arc from ΔW₁ to ΔW₂ (Shoemake 1985, SIGGRAPH '85).

    sin((1−t)θ)/sin θ · ΔW₁ + sin(tθ)/sin θ · ΔW₂, θ the angle between the two as vectors. Where only one has the target
    the other is zero, which has no direction: the way to it is straight.

    Raises:
        LoraFormatError: LF-612 between opposites there is no shortest arc; LF-705 a weight below zero lies beyond it.
    """
    if whole <= 0 or any(term.weight < 0 for term in terms):
        raise fault("LF-705", "the weights of an arc's ends are not negative, and not both zero")
    shares = [term.weight / whole for term in terms]
    if len(terms) == 1:
        return shares
    angle = math.acos(cosine(*(lowrank(term.change) for term in terms)))
    if math.sin(angle) < 1e-6:
        if angle > 1:
            raise fault("LF-612", "the two changes are opposites: there is no shortest arc between them")
        return shares
    return [math.sin(share * angle) / math.sin(angle) for share in shares]


def ties(deltas: Sequence[F32], how: How, draws: Sequence[Draw]) -> F32:
    """Trim, elect sign, disjoint mean (Yadav et al. 2023, arXiv:2306.01708); its λ is the weights.

    Signs are elected among the changes with their weights: what is subtracted votes as what it is.
    """
    for delta in deltas:
        trim(delta, how.kept)
    return elect(deltas)


def dare_linear(deltas: Sequence[F32], how: How, draws: Sequence[Draw]) -> F32:
    """Drop entries at random, rescale the others, add (DARE; Yu et al. 2024, arXiv:2311.03099)."""
    for delta, draw in zip(deltas, draws, strict=True):
        drop(delta, how.kept, draw)
    return _sum(deltas)


def dare_ties(deltas: Sequence[F32], how: How, draws: Sequence[Draw]) -> F32:
    """Drop and rescale as DARE (arXiv:2311.03099), then elect signs and take the disjoint mean of TIES (2306.01708)."""
    for delta, draw in zip(deltas, draws, strict=True):
        drop(delta, how.kept, draw)
    return elect(deltas)


def magnitude_prune(deltas: Sequence[F32], how: How, draws: Sequence[Draw]) -> F32:
    """Keep the largest entries of each (Han et al. 2015, arXiv:1506.02626), add."""
    for delta in deltas:
        trim(delta, how.kept)
    return _sum(deltas)


def della(deltas: Sequence[F32], how: How, draws: Sequence[Draw]) -> F32:
    """MagPrune, elect, fuse (DELLA; Deep et al. 2024, arXiv:2406.11617).

    An entry is kept with a probability between density − ε/2 and density + ε/2 by the rank of its magnitude in its
    row, and divided by it; then signs are elected and those that agree averaged, as in TIES.
    """
    for delta, draw in zip(deltas, draws, strict=True):
        drop_small(delta, how.kept, how.epsilon, draw)
    return elect(deltas)


def breadcrumbs(deltas: Sequence[F32], how: How, draws: Sequence[Draw]) -> F32:
    """Leave out the γ largest entries of each and the smallest, add (Davari and Belilovsky 2024, arXiv:2312.06795)."""
    for delta in deltas:
        trim_both(delta, how.kept, how.gamma)
    return _sum(deltas)


def sce(deltas: Sequence[F32], how: How, draws: Sequence[Draw]) -> F32:
    """Select, calculate, erase (FuseChat; Wan et al. 2024, arXiv:2408.07990).

    Selects the entries whose variance among the changes is largest, weighs each change by its share of the squares
    that are left, erases entries against the sign of the sum, and takes the weighted mean of the others. One change
    alone has no variance and stays.
    """
    if len(deltas) == 1:
        return deltas[0]
    most_varied(deltas, how.kept)
    squares = [float(np.sum(np.square(delta), dtype=np.float64)) for delta in deltas]
    whole = sum(squares)
    return erase_minority(deltas, [s / whole if whole else 1.0 for s in squares])


def _sum(deltas: Sequence[F32]) -> F32:
    for delta in deltas[1:]:
        deltas[0].__iadd__(delta)
    return deltas[0]


LINEAR: Mapping[str, Callable[[Sequence[Term], float], list[float]]] = {
    "cat": given,
    "linear": given,
    "svd": given,
    "slerp": slerp,
}
"""Method → what each ΔW is multiplied by, given the sum of all weights.

``cat`` puts the stored factors side by side: exact, ranks add up. ``linear`` brings the same sum to the rank that it
truly has. ``svd`` is the nearest to it of ``rank`` (Eckart–Young), computed in the factors.
"""

DENSE: Mapping[str, Callable[[Sequence[F32], How, Sequence[Draw]], F32]] = {
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
    "della": della,
    "breadcrumbs": breadcrumbs,
    "sce": sce,
}
"""Method → what it makes of the dense changes, which it may overwrite."""

PEFT = (
    *("peft_linear", "peft_cat", "peft_svd", "peft_ties", "peft_ties_svd", "peft_dare_linear", "peft_dare_ties"),
    *("peft_dare_linear_svd", "peft_dare_ties_svd", "peft_magnitude_prune", "peft_magnitude_prune_svd"),
)
"""The combination types of PEFT's ``add_weighted_adapter``: see ``loraformat.combining.peft``."""

METHODS = (*LINEAR, *DENSE, *PEFT)
PRUNES = frozenset({*DENSE, *(name for name in PEFT if any(word in name for word in ("ties", "dare", "prune")))})
"""Methods that need a density."""
DRAWS = frozenset(name for name in METHODS if "dare" in name or name == "della")
"""Methods whose result depends on the seed."""
