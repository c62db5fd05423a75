"""Weights in 4 bits as bitsandbytes stores them, NF4 and FP4: W = table[q] · absmax, one absmax for each block.

The weight lies row-major in blocks of ``blocksize`` values, which may run over the end of a row. Two numbers share a byte,
the first in its upper half. With double quantisation absmax itself is an 8-bit number: a second table times a second
absmax, plus an offset. bitsandbytes 0.50, functional.py: QuantState.as_dict, dequantize_4bit, dequantize_blockwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat import canonical
from loraformat.errors import LoraFormatError, fault
from loraformat.rounding import quotient

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.tiles import Tensor

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["FourBits", "four_bits", "state_name"]

_STATES = {"nf4": "bitsandbytes NF4", "fp4": "bitsandbytes FP4"}


def state_name(weight: str, names: Collection[str]) -> str | None:
    """The tensor that describes a weight in 4 bits; None where there is none."""
    return next((n for kind in _STATES if (n := f"{weight}.quant_state.bitsandbytes__{kind}") in names), None)


@dataclass(frozen=True, slots=True)
class _Nested:
    """An absmax that is quantised itself."""

    table: F32
    absmax: Tensor
    blocksize: int
    offset: np.float32

    def values(self, numbers: Array, first: int) -> F32:
        """Of the numbers from the block ``first`` on."""
        start, stop = first // self.blocksize, -(-(first + len(numbers)) // self.blocksize)
        scale = np.repeat(_floats(self.absmax[start:stop]), self.blocksize)
        with np.errstate(over="ignore", invalid="ignore"):
            return self.table[numbers] * scale[first - start * self.blocksize :][: len(numbers)] + self.offset


@dataclass(frozen=True, slots=True)
class FourBits:
    """A ``Grid`` of such a weight."""

    name: str
    shape: tuple[int, ...]
    tensor: Tensor
    table: F32
    absmax: Tensor
    blocksize: int
    nested: _Nested | None

    @property
    def step(self) -> int:
        """Rows of an odd length share a byte with the next."""
        return 1 + self.shape[1] % 2

    @property
    def nbytes(self) -> int:
        """Two numbers a byte."""
        return self.tensor.shape[0]

    def run(self, start: int, stop: int) -> _Run:
        """The rows [start, stop), ``start`` a multiple of ``step``."""
        columns = self.shape[1]
        begin, end = start * columns, stop * columns
        first, last = begin // self.blocksize, -(-end // self.blocksize)
        numbers = self.absmax[first:last]
        absmax = self.nested.values(numbers, first) if self.nested else _floats(numbers)
        scale = np.repeat(absmax, self.blocksize)[begin - first * self.blocksize :][: end - begin]
        stored = self.tensor[begin // 2 : -(-end // 2)]
        return _Run(stored, self.table, scale.reshape(stop - start, columns))


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of rows: the bytes [n / 2, 1], and the absmax of every value."""

    stored: Array
    table: F32
    scale: F32

    def means(self, stored: Array) -> F32:
        return self.table[self._numbers(stored)].reshape(self.scale.shape) * self.scale

    def nearest(self, wanted: F32) -> Array:
        order = np.argsort(self.table, kind="stable")
        sorted_table = self.table[order]
        between = (sorted_table[1:] + sorted_table[:-1]) / 2
        values = quotient(wanted, self.scale).reshape(-1)
        old, new = self._numbers(self.stored), order[np.searchsorted(between, values)].astype(np.uint8)
        # FP4 has two zeros, and a block of zeros may hold any number.
        same = (self.table[new] == self.table[old]) | (self.scale.reshape(-1) == 0)
        packed = self.stored.copy()
        halves = np.empty(2 * packed.size, np.uint8)
        halves[-1] = packed.reshape(-1)[-1] & 15  # of an odd count, the last half is nobody's
        halves[: new.size] = np.where(same, old, new)
        return ((halves[::2] << 4) | halves[1::2]).reshape(packed.shape)

    def _numbers(self, stored: Array) -> Array:
        flat = stored.reshape(-1)
        return np.stack([flat >> 4, flat & 15], axis=1).reshape(-1)[: self.scale.size]


def four_bits(weight: str, state: str, read: Callable[[str], Tensor | None]) -> FourBits | None:
    """The grid of ``weight`` by the tensor that describes it; None where its numbers lie in other things than bytes.

    Args:
        read: a tensor by its name; None where there is none.

    Raises:
        LoraFormatError: LF-610 the description and the tensors do not fit each other.
    """
    numbers = read(weight)
    if numbers is None or numbers.dtype != np.uint8:
        return None  # bnb_4bit_quant_storage
    told = _description(state, read(state))
    shape, blocksize, kind = told.get("shape"), told.get("blocksize"), told.get("quant_type")
    sizes = shape if isinstance(shape, list) else []
    if not isinstance(blocksize, int) or not _counts([*sizes, blocksize]) or [len(sizes), kind] != [2, state[-3:]]:
        raise _unsound(state, f"quant_type {kind!r}, shape {shape!r} and blocksize {blocksize!r} describe no matrix")
    count = math.prod(sizes)
    blocks = -(-count // blocksize)
    nested = _nested(weight, state, told, blocks, read) if "nested_blocksize" in told else None
    tensor = _sized(weight, numbers, -(-count // 2), np.uint8)
    absmax = _sized(f"{weight}.absmax", read(f"{weight}.absmax"), blocks, np.uint8 if nested else np.float32)
    table = _floats(_sized(f"{weight}.quant_map", read(f"{weight}.quant_map"), 16, np.float32)[0:16])
    return FourBits(_STATES[str(kind)], tuple(sizes), tensor, table, absmax, blocksize, nested)


def _nested(
    weight: str, state: str, told: dict[str, Any], blocks: int, read: Callable[[str], Tensor | None]
) -> _Nested:
    blocksize, offset = told["nested_blocksize"], told.get("nested_offset")
    if not _counts([blocksize]) or not isinstance(offset, (int, float)):
        raise _unsound(state, f"nested_blocksize {blocksize!r} and nested_offset {offset!r} describe no absmax")
    names = (f"{weight}.nested_quant_map", f"{weight}.nested_absmax")
    table = _sized(names[0], read(names[0]), 256, np.float32)
    absmax = _sized(names[1], read(names[1]), -(-blocks // blocksize), np.float32)
    return _Nested(_floats(table[0:256]), absmax, blocksize, np.float32(offset))


def _description(state: str, tensor: Tensor | None) -> dict[str, Any]:
    told = None
    if tensor is not None and len(tensor.shape) == 1 and tensor.dtype == np.uint8:
        with suppress(ValueError):
            told = canonical.loads(tensor[0 : tensor.shape[0]].tobytes().decode())
    if not isinstance(told, dict):
        raise _unsound(state, "the description is no JSON object")
    return told


def _counts(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)


def _sized(name: str, tensor: Tensor | None, count: int, dtype: Any) -> Tensor:
    if tensor is None or math.prod(tensor.shape) != count or tensor.shape[:1] != (count,) or tensor.dtype != dtype:
        found = "is not there" if tensor is None else f"is {tensor.dtype} {list(tensor.shape)}"
        raise _unsound(name, f"the tensor {found}, and would be {np.dtype(dtype)} with {count:,} values")
    return tensor


def _floats(values: Array) -> F32:
    return np.asarray(values, np.float32).reshape(-1)


def _unsound(name: str, what: str) -> LoraFormatError:
    return fault("LF-610", what, where=name, fix="is the checkpoint whole? download or quantise it again")
