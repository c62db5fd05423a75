"""The order of the rows of q and k: transformers' halves against ggml's pairs.

transformers turns the first half of a head against the second, ggml (of these architectures) neighbouring rows. So the
converter of llama.cpp interleaves the halves of each head (conversion/llama.py LlamaModel.permute), and an adapter's B
has to follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["interleaved"]


def interleaved(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Which row of a torch weight each row in GGUF is.

    Args:
        rows: of the weight; ``heads`` heads of an even number each.

    >>> interleaved(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"{rows} rows are not {heads} heads of an even number of rows")
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
