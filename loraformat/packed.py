"""A change of some rows of a matrix that holds several parameters, one below the other: q, k and v in one product.

The rows of the others do not change: B has zeros there, and no magnitude rescales them. And one whose rows lie in another order
there: the gates of an LSTM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import fault
from loraformat.parts import Delta, Magnitude

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["permuted", "spread", "spreads"]


def spreads(update: Update) -> bool:
    """Whether it is defined of some rows of a matrix: a sum, which a magnitude of the out axes may rescale."""
    rest = [part for part in update.parts if part not in update.additive]
    return bool(update.additive) and all(isinstance(p, Magnitude) and p.magnitude_axes is None for p in rest)


def spread(update: Update, rows: tuple[int, int], out: int) -> Update:
    """``update``, whose matrix is the ``rows`` [start, stop) of one of ``out`` rows, as an update of that one.

    Raises:
        LoraFormatError: LF-606 its matrix has another number of rows; LF-612 it is no sum, nor a rescaled one.

    >>> from loraformat import Lora, Update
    >>> pair = Lora(np.ones((1, 2)), np.ones((3, 1)), 1.0, "factor")
    >>> spread(Update((pair,)), (1, 4), 5).matrix().tolist()
    [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    """
    if not spreads(update):
        raise fault("LF-612", f"{update.kind} is no sum: of some rows of a matrix it is not defined")
    start, stop = rows
    shape = update.matrix_shape() or ()
    if shape[-2] != stop - start:
        raise fault("LF-606", f"the update gives {shape[-2]} rows, and its place has {stop - start}")
    if update.kind in ("lora", "dora") and update["lora"].mid is None:
        pair = update["lora"]
        parts: tuple[Any, ...] = (replace(pair, lora_B=_between(pair.lora_B, start, out - stop)),)
    else:
        parts = (Delta(_between(update.matrix(), start, out - stop)),)
    if "magnitude" in update:
        part = update["magnitude"]
        ones = [(0, 0)] * (part.magnitude.ndim - 1) + [(start, out - stop)]
        parts += (replace(part, magnitude=np.pad(part.magnitude, ones, constant_values=1), span=rows),)
    return replace(update, parts=parts, placement=None, base_sha256=None, sketch=None)


def permuted(update: Update, blocks: Sequence[int]) -> Update:
    """``update`` for a matrix in which the rows, in as many equal blocks, stand in another order: block ``blocks[i]`` is i-th.

    Raises:
        LoraFormatError: LF-606 the rows are no such blocks; LF-612 it is no sum.

    >>> from loraformat import Lora, Update
    >>> pair = Lora(np.ones((1, 1)), np.array([[1.0], [2.0], [3.0], [4.0]]), 1.0, "factor")
    >>> permuted(Update((pair,)), (1, 0)).matrix().ravel().tolist()
    [3.0, 4.0, 1.0, 2.0]
    """
    if not update.linear:
        raise fault("LF-612", f"{update.kind} is no sum: of rows in another order it is not defined")
    *_, out, _ = update.matrix_shape() or (0, 0)
    if out % len(blocks):
        raise fault("LF-606", f"{out} rows are no {len(blocks)} gates")
    rows = np.arange(out).reshape(len(blocks), -1)[list(blocks)].reshape(-1)
    if update.kind == "lora" and update["lora"].mid is None:
        pair = update["lora"]
        parts: tuple[Any, ...] = (replace(pair, lora_B=np.take(pair.lora_B, rows, axis=-2)),)
    else:
        parts = (Delta(np.take(update.matrix(), rows, axis=-2)),)
    return replace(update, parts=parts, placement=None, base_sha256=None, sketch=None)


def _between(matrix: Array, before: int, after: int) -> Array:
    """Zero rows before and after."""
    return np.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(before, after), (0, 0)])
