"""Weights as GPTQ stores them: W = (q − zero) · scale, one zero and one scale for each group of inputs and each output.

The numbers lie [in, out], those of 32 / bits inputs in one int32, the first in its lowest bits; zeros likewise along the
outputs. ``g_idx`` tells the group of an input. The first form of the file stores zero − 1. gptqmodel 7.7,
nn_modules/qlinear/torch.py; auto-gptq 0.7, qlinear_cuda_old.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.rounding import quotient

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.tiles import Tensor

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["Gptq", "gptq"]

_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` → what is added to a stored zero."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """A ``Grid`` of such a weight, [in, out]."""

    tensor: Tensor
    bits: int
    groups: Array
    scales: Tensor
    zeros: Tensor
    offset: int
    name = "GPTQ"
    spec = "in,out"

    @property
    def shape(self) -> tuple[int, ...]:
        """[in, out]."""
        return (len(self.groups), self.tensor.shape[1])

    @property
    def step(self) -> int:
        """So many inputs share an integer."""
        return 32 // self.bits

    @property
    def nbytes(self) -> int:
        """Four a packed integer."""
        return 4 * math.prod(self.tensor.shape)

    def run(self, start: int, stop: int) -> _Run:
        """The inputs [start, stop), both multiples of ``step``."""
        groups = self.groups[start:stop]
        first, last = int(groups.min()), int(groups.max()) + 1
        zeros = _unpacked(self.zeros[first:last], self.bits, 1).astype(np.float32) + np.float32(self.offset)
        scales = self.scales[first:last].astype(np.float32)
        stored = self.tensor[start // self.step : stop // self.step]
        return _Run(stored, self.bits, scales[groups - first], zeros[groups - first])


@dataclass(frozen=True, slots=True)
class _Run:
    stored: Array
    bits: int
    scale: F32
    zero: F32

    def means(self, stored: Array) -> F32:
        return (_unpacked(stored, self.bits, 0).astype(np.float32) - self.zero) * self.scale

    def nearest(self, wanted: F32) -> Array:
        old = _unpacked(self.stored, self.bits, 0)
        steps = quotient(wanted, self.scale)
        new = np.clip(np.rint(steps + self.zero), 0, 2**self.bits - 1).astype(np.uint32)
        return _packed(np.where(self.scale != 0, new, old), self.bits)


def _unpacked(packed: Array, bits: int, axis: int) -> Array:
    """The numbers as uint32, 32 / bits times as many along ``axis``."""
    places = np.arange(0, 32, bits, dtype=np.uint32)
    values = np.ascontiguousarray(packed).view(np.uint32)
    wide = (np.expand_dims(values, axis + 1) >> np.expand_dims(places, 1 - axis)) & np.uint32(2**bits - 1)
    return wide.reshape([n * len(places) if i == axis else n for i, n in enumerate(packed.shape)])


def _packed(numbers: Array, bits: int) -> Array:
    """Along axis 0."""
    places = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    wide: Array = np.bitwise_or.reduce(numbers.reshape(-1, len(places), numbers.shape[1]) << places, axis=1)
    return wide.view(np.int32)


def gptq(module: str, config: Mapping[str, Any], read: Callable[[str], Tensor | None]) -> Gptq | None:
    """The grid of a module's weight; None where it is packed in another way than in this one.

    Args:
        config: the checkpoint's ``config.json``, which tells the form of the zeros.
        read: a tensor by its name; None where there is none.
    """
    told = config.get("quantization_config")
    if not isinstance(told, dict) or told.get("quant_method") != "gptq":
        return None
    offset = _OFFSETS.get(told.get("checkpoint_format") or "gptq")
    numbers, zeros, scales, index = (read(f"{module}.{end}") for end in ("qweight", "qzeros", "scales", "g_idx"))
    if offset is None or numbers is None or zeros is None or scales is None or index is None:
        return None
    bits, groups = _bits(numbers, zeros, scales, index), index[0 : index.shape[0]].astype(np.int64)
    if bits is None or groups.min() < 0 or groups.max() >= scales.shape[0]:
        return None
    stored = _unpacked(zeros[0 : zeros.shape[0]], bits, 1)
    if offset and (stored == 2**bits - 1).any():
        return None  # a zero of 0: less 1 it ran over into its neighbours, and tools read that differently
    return Gptq(numbers, bits, groups, scales, zeros, offset)


def _bits(numbers: Tensor, zeros: Tensor, scales: Tensor, index: Tensor) -> int | None:
    """2, 4 or 8 by the sizes of the four tensors, where these fit each other; None of 3 bits, which lie across integers."""
    if [len(t.shape) for t in (numbers, zeros, scales, index)] != [2, 2, 2, 1] or 0 in numbers.shape:
        return None
    kinds = (numbers.dtype == np.int32, zeros.dtype == np.int32, scales.dtype.kind == "f", index.dtype.kind == "i")
    fits = numbers.shape[1] == scales.shape[1] and zeros.shape[0] == scales.shape[0]
    bits = next((b for b in (2, 4, 8) if numbers.shape[0] * 32 == index.shape[0] * b), None)
    if bits is None or not all(kinds) or not fits or zeros.shape[1] * 32 != scales.shape[1] * bits:
        return None
    return bits
