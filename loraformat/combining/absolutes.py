"""What is no sum: tensors and rows that are set, and magnitudes. They are combined where that is exact, else refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np

from loraformat.errors import LoraFormatError, Problem
from loraformat.parts import Magnitude, Part, Replace, Rows

if TYPE_CHECKING:
    from loraformat.combining.terms import Term

__all__ = ["kept"]


def kept(key: str, terms: Sequence[Term], resizes: bool) -> tuple[Part, ...]:
    """The parts of the target that stay as they are.

    Args:
        resizes: whether the method changes ΔW as a whole matrix: a magnitude over it then still means what it meant.

    Raises:
        LoraFormatError: LF-612 with every part that has no exact combination.
    """
    problems: list[Problem] = []
    parts: list[Part] = []
    for kind, check in (("replace", _replace), ("magnitude", _magnitude), ("rows", _rows)):
        having = [term for term in terms if kind in term.update]
        if not having:
            continue
        if why := check(terms, having, resizes):
            problems.append(Problem("LF-612", why, key, "drop it from the others (convert --drop), or combine fewer"))
        parts.append(having[0].update[kind])
    if problems:
        raise LoraFormatError(problems)
    return tuple(parts)


def _replace(terms: Sequence[Term], having: Sequence[Term], resizes: bool) -> str | None:
    """What replaces comes first and sums are added to it: one, or the same in all that have it."""
    if not _equal([term.update["replace"] for term in having]):
        return f"{len(having)} adapters replace the tensor, each by another"
    return _weight(having, "replace")


def _rows(terms: Sequence[Term], having: Sequence[Term], resizes: bool) -> str | None:
    """Rows are set last: a change that another adapter makes to them would be lost."""
    if len(having) < len(terms):
        return "one adapter sets rows of the tensor, another changes it as a whole"
    if not _equal([term.update["rows"] for term in having]):
        return f"{len(having)} adapters set rows of the tensor, not the same or not to the same values"
    return _weight(having, "rows")


def _magnitude(terms: Sequence[Term], having: Sequence[Term], resizes: bool) -> str | None:
    if len(terms) > 1:
        return "a magnitude (DoRA) scales the sum of the base and one change: with another change it means nothing"
    return None if resizes else "this method prunes entries of ΔW, on which a magnitude (DoRA) was trained"


def _weight(having: Sequence[Term], kind: str) -> str | None:
    """Absolute values have no half: W + Σ wᵢ (R − W) is R only where the weights are 1 together, or R is one."""
    weights = [term.weight for term in having]
    if abs(sum(weights) - 1.0) < 1e-12 or all(weight == 1.0 for weight in weights):
        return None
    return f"a {kind} part sets absolute values: a weight of {' and '.join(f'{w:g}' for w in weights)} means nothing"


def _equal(parts: Sequence[Replace | Magnitude | Rows]) -> bool:
    first, *others = parts
    return all(_same(getattr(first, f.name), getattr(other, f.name)) for other in others for f in fields(first))


def _same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other
