"""How a weight of a merged base differs from what it should be; of one in few bits by the numbers that are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.base import Recognising, Requantising
from loraformat.rounding import widened
from loraformat.verbs.cause import NOT_APPLIED, cause_in_few_bits

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Compared", "bits", "compare_numbers", "square_of"]


@dataclass(frozen=True, slots=True)
class Compared:
    """The relative distance of one weight, what is wrong, and which mistake it was, as far as they are known."""

    distance: float
    wrong: str = ""
    mistake: str = ""


def compare_numbers(base: Base, before: str, merged: Base, after: str, updates: Sequence[Update]) -> Compared | None:
    """Of a weight in few bits, the stored numbers with those that a merge stores; None of any other.

    Args:
        before, after: the name of its tensor in the base, and in the result.
    """
    # What replaces a checkpoint's tensor is stored as it comes; a graph rounds it to the codes that its operator takes.
    as_it_comes = all(update.replaces for update in updates) and not isinstance(base, Recognising)
    if not isinstance(base, Requantising) or as_it_comes:
        return None
    tiles = base.requantised(before, updates)
    if tiles is None:
        return None
    wrong, count, square, whole, untouched = 0, 0, 0.0, 0.0, True
    for rows, wanted in tiles:
        got = merged.read(after, rows)
        count += wanted.size
        if got.dtype != wanted.dtype or got.shape != wanted.shape:
            return Compared(math.inf, f"the tensor is {got.dtype.name} {list(got.shape)}")
        wrong += int(np.count_nonzero(bits(got) != bits(wanted)))
        square += square_of(widened(got) - widened(wanted))
        whole += square_of(widened(wanted))
        untouched = untouched and np.array_equal(bits(got), bits(base.read(before, rows)))
    relative = math.sqrt(square / whole) if whole else math.sqrt(square)
    if not wrong:
        return Compared(relative)
    told = f"{wrong} of {count} values are not W + ΔW rounded to the steps of their scale"
    mistake = NOT_APPLIED if untouched else cause_in_few_bits(base, before, merged, after, updates)
    return Compared(relative, told, mistake)


def square_of(values: Array) -> float:
    """Σ values²."""
    flat = np.ascontiguousarray(values, np.float32 if values.dtype == np.float32 else np.float64).reshape(-1)
    return float(np.dot(flat, flat))


def bits(values: Array) -> Array:
    """The values as unsigned integers of their own size."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(f"u{flat.itemsize}" if flat.itemsize <= 8 else np.uint8)
