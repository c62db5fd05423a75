"""The order of rows in which rotary heads lie: halves side by side (Hugging Face), or pairs side by side (Meta).

Hugging Face turns row j of a head with row j + size/2; Meta's code, torchtune and llama.cpp turn 2j with 2j + 1. The
same model in the other order has its rows of q and k permuted, head by head: of W, so of B and of a magnitude; A stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["pairs_of_halves"]


def pairs_of_halves(heads: int, size: int) -> npt.NDArray[np.intp]:
    """For each row of Hugging Face's tensor [heads · size, …] the row of Meta's that holds the same numbers.

    >>> pairs_of_halves(1, 6).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    rows = np.arange(heads * size).reshape(heads, size // 2, 2)
    return rows.transpose(0, 2, 1).reshape(-1)
