"""Weights stored in 8 bits beside a scale: W = q · s, of fp8 and of LLM.int8."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.dtypes import dtype_name
from loraformat.rounding import quotient

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.tiles import Tensor

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["EIGHT_BITS", "EightBits", "Scaling", "scale_name"]

# The tensor that holds the scale of a module's weight, for what it is multiplied by, and the dtypes it goes with:
# bitsandbytes 0.50 functional.py int8_vectorwise_dequant; transformers 5.23 finegrained_fp8.py, which multiplies by its
# "inverse" scale; compressed-tensors 0.11; ComfyUI's scaled fp8.
_SCALES: Mapping[str, tuple[float, tuple[str, ...]]] = {
    "SCB": (1 / 127, ("I8",)),
    "weight_scale_inv": (1.0, ("F8_E4M3", "F8_E5M2")),
    "weight_scale": (1.0, ("F8_E4M3", "F8_E5M2")),
    "scale_weight": (1.0, ("F8_E4M3", "F8_E5M2")),
}
_MOST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
"""dtypes of such numbers."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """What the stored values are multiplied by.

    Attributes:
        values: float32 [rows, columns]: one for each block of the weight; (1, 1) is one for all, [out, 1] one a row.
        block: rows and columns of a block.
    """

    values: F32
    block: tuple[int, int]

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Scaling:
        """Of values that are stored as they are."""
        return cls(np.ones((1, 1), np.float32), (shape[0], math.prod(shape[1:])))

    @classmethod
    def of(cls, stored: Array, factor: float, shape: tuple[int, ...]) -> Scaling | None:
        """From the scale tensor beside a weight of ``shape``; None where its blocks are not plain.

        A last block may be cut off, so a block is the power of two, as all tools have it, that gives so many.
        """
        if len(shape) != 2:
            return None
        grid = np.asarray(stored, np.float32) * np.float32(factor)
        if grid.size == 1:
            return cls(grid.reshape(1, 1), shape)
        if grid.ndim == 1 and len(grid) == shape[0]:
            grid = grid[:, None]
        if grid.ndim != 2:
            return None
        block = [_block(size, count) for size, count in zip(shape, grid.shape, strict=True)]
        return None if None in block else cls(grid, (block[0] or 0, block[1] or 0))

    def rows(self, start: int, stop: int, columns: int) -> F32:
        """The factor of every value of a run of rows, as it is broadcast."""
        lines = self.values[np.arange(start, stop) // self.block[0]]
        if lines.shape[1] == 1:
            return lines
        return lines[:, np.arange(columns) // self.block[1]]


def _block(size: int, count: int) -> int | None:
    if count in (1, size):
        return size // count
    return next((b for b in (16, 32, 64, 128, 256, 512) if -(-size // b) == count), None)


def scale_name(weight: str, dtype: str, names: Collection[str]) -> tuple[str, float] | None:
    """(tensor, factor) of the scale of an 8-bit weight; None where none that is known stands beside it."""
    module = weight.rpartition(".")[0]
    for end, (factor, dtypes) in _SCALES.items():
        if dtype in dtypes and f"{module}.{end}" in names:
            return f"{module}.{end}", factor
    return None


@dataclass(frozen=True, slots=True)
class EightBits:
    """A ``Grid`` of such a weight."""

    tensor: Tensor
    scaling: Scaling
    step = 1

    @property
    def name(self) -> str:
        """The dtype of the numbers."""
        return dtype_name(self.tensor.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight and of the tensor alike."""
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        """A byte a number."""
        return math.prod(self.shape)

    def run(self, start: int, stop: int) -> _Run:
        """The rows [start, stop)."""
        return _Run(self.tensor[start:stop], self.scaling.rows(start, stop, self.shape[1]))


@dataclass(frozen=True, slots=True)
class _Run:
    stored: Array
    scale: F32

    def means(self, stored: Array) -> F32:
        return stored.astype(np.float32) * self.scale

    def nearest(self, wanted: F32) -> Array:
        """The largest for what lies beyond: neither dtype has an infinity to spare."""
        values = quotient(wanted, self.scale)
        if self.stored.dtype == np.int8:
            return np.clip(np.rint(values), -127, 127).astype(np.int8)
        most = _MOST[dtype_name(self.stored.dtype)]
        return np.clip(values, -most, most).astype(self.stored.dtype)
