"""The codes that a quantised operator takes, one a value, and how floats are made of them: laid like ``Site.operand``.

What the standard operators compute (DequantizeLinear, Cast, Sub, Mul) is computed by onnx's own reference instead, see
``values``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat_converters.onnx.graph.mixtures import STACKS, expert_bits
from loraformat_converters.onnx.graph.operators import attribute

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.onnx.graph.index import Site

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["Codes", "readable", "unpacked"]

Read = Callable[[str], "Array | None"]
"""A constant of the graph; None where it is no constant."""


@dataclass(frozen=True)
class Codes:
    """W = (values − zero) · scale.

    Attributes:
        values: whole numbers as float32, laid like the operand; filled up along the last axis where that is kept in blocks,
            which are an axis of their own then.
        scale, zero: as they are spread over ``values``.
        shape: of the operand.
        bits: how many a code has, lowest first in its byte; 8 for whole bytes.
    """

    values: F32
    scale: Any
    zero: Any
    shape: tuple[int, ...]
    bits: int = 8

    @property
    def floats(self) -> F32:
        """W."""
        return self.operand(np.asarray((self.values - self.zero) * self.scale, np.float32))

    def operand(self, spread: Array) -> Array:
        """What is laid like ``values``, laid like the operand."""
        return spread.reshape(*self.shape[:-1], -1)[..., : self.shape[-1]]


def unpacked(site: Site, read: Read) -> Codes | None:
    """The weight of a site whose operator takes codes; None where how they are packed is not known."""
    return _RULES.get(site.operator, _affine)(site, read) if readable(site) else None


def readable(site: Site) -> bool:
    """Whether the floats that the codes stand for are known."""
    if not site.dequantises or site.operator in _RULES:
        return True
    return site.operator not in _UNKNOWN and site.product is not None and bool(site.product.scale)


def _affine(site: Site, read: Read) -> Codes | None:
    """Scale and zero point each for all or one for every out (ONNX: per tensor, per column)."""
    assert site.product is not None
    codes = _read(site, site.position, read)
    scale = read(site.product.scale) if site.product.scale else None
    zero = read(site.product.zero) if site.product.zero else np.zeros((), np.int8)
    if codes is None or scale is None or zero is None:
        return None
    scale, zero = (_along_out(site, values) for values in (scale, zero))
    if scale is None or zero is None:
        return None
    return Codes(codes.astype(np.float32), scale, zero, site.operand.shape)


def _along_out(site: Site, values: Array) -> Array | None:
    """A number for all, or for every out, spread over the axes of the weight."""
    values = values.astype(np.float32).reshape(-1)
    if values.size == 1:
        return values.reshape(())
    (axis,) = site.operand.out
    shape = [1] * len(site.operand.shape)
    shape[axis] = site.operand.shape[axis]
    return values.reshape(shape) if values.size == shape[axis] else None


def _blocks(site: Site, read: Read) -> Codes | None:
    """MatMulNBits: [N, blocks, bytes], the lowest bits first; K is filled up to whole blocks (onnxruntime 1.32)."""
    node = site.node
    bits, block = int(attribute(node, "bits", 4)), int(attribute(node, "block_size", 0))
    codes, scales = _read(site, 1, read), _read(site, 2, read)
    moved = _read(site, 4, read)  # rows in another order, of GPTQ
    if codes is None or scales is None or bits not in (2, 4, 8) or attribute(node, "weight_prepacked", 0):
        return None
    n, k = site.operand.shape
    count = -(-k // block) if block > 0 else 0
    if (moved is not None and moved.size) or codes.size * 8 != n * count * block * bits or scales.size != n * count:
        return None
    zeros: Any = _zeros(node, read, bits, n, count)
    if zeros is None:
        return None
    values = _fields(codes.reshape(n, count, -1), bits)
    return Codes(values, scales.astype(np.float32).reshape(n, count, 1), zeros, (n, k), bits)


def _zeros(node: Any, read: Read, bits: int, n: int, count: int) -> Any:
    """[N, blocks, 1]: packed like the codes, or floats, or the middle of the range."""
    if len(node.input) < 4 or not node.input[3]:
        return np.float32(2 ** (bits - 1))
    zeros = read(node.input[3])
    if zeros is None:
        return None
    if zeros.dtype == np.uint8:
        zeros = _fields(zeros.reshape(n, -1), bits)[:, :count]
    return zeros.astype(np.float32).reshape(n, count, 1) if zeros.size == n * count else None


def _experts(site: Site, read: Read) -> Codes | None:
    """QMoE: [experts, N, bytes], lowest bits first; a scale and a zero point for every N, or for every block of its K.

    (onnxruntime 1.32, contrib_ops/cpu/moe/moe_quantization_cpu.cc, DequantizeBlockWithMlas.)
    """
    assert site.product is not None
    node, (experts, n, k), bits = site.node, site.operand.shape, expert_bits(site.node, site.position)
    codes, scales = _read(site, site.position, read), read(site.product.scale) if site.product.scale else None
    block = int(attribute(node, "block_size", 0)) or k
    if codes is None or scales is None or codes.dtype != np.uint8 or block < 1 or k % block:
        return None
    if not _unturned(site, read):
        return None
    count = k // block
    whole = (experts, n, count)
    if scales.shape not in (whole, whole[:2]) or scales.size != experts * n * count:
        return None
    zeros: Any = np.float32(2 ** (bits - 1))
    if site.product.zero:
        zeros = _expert_zeros(read(site.product.zero), bits, whole)
        if zeros is None:
            return None
    values = _fields(codes, bits).reshape(*whole, block)
    return Codes(values, scales.astype(np.float32).reshape(*whole, 1), zeros, site.operand.shape, bits)


def _expert_zeros(packed: Array | None, bits: int, whole: tuple[int, int, int]) -> Any:
    """[experts, N, blocks, 1], of bytes that are packed along the last axis that a scale has: N, or blocks."""
    *rows, last = whole[:2] if whole[2] == 1 else whole
    if packed is None or packed.dtype != np.uint8 or packed.size != math.prod(rows) * -(-last * bits // 8):
        return None
    return _fields(packed.reshape(*rows, -1), bits)[..., :last].reshape(*whole, 1)


def _unturned(site: Site, read: Read) -> bool:
    """Whether the bytes lie as they are documented: without ``weights_prepacked`` the same graph may be one for CUDA.

    There the default means [experts, K, bytes of N], which is told by the rows that have scales, but for K = N.
    """
    if attribute(site.node, "weights_prepacked", -1) == 0 or site.operand.shape[1] != site.operand.shape[2]:
        return True
    stacks = ((at, _read(site, at, read), _read(site, at + 1, read)) for at in STACKS["QMoE"])
    told = [
        codes.shape[1] == scales.shape[1]
        for at, codes, scales in stacks
        if codes is not None
        and scales is not None
        and codes.ndim == 3
        and scales.ndim > 1
        and codes.shape[1] * expert_bits(site.node, at) != codes.shape[2] * 8
    ]
    return bool(told) and all(told)


def _table(site: Site, read: Read) -> Codes | None:
    """GatherBlockQuantized: a scale for every run of ``block_size`` along one axis (onnxruntime 1.32)."""
    node = site.node
    bits, axis = int(attribute(node, "bits", 4)), int(attribute(node, "quantize_axis", 1)) % 2
    block = min(int(attribute(node, "block_size", 128)) or site.operand.shape[axis], site.operand.shape[axis])
    codes, scales = _read(site, 0, read), _read(site, 2, read)
    if codes is None or scales is None:
        return None
    zeros = _read(site, 3, read)
    middle: Any = np.float32(0)
    if packed := codes.dtype == np.uint8:
        codes, middle = _fields(codes, bits), np.float32(2 ** (bits - 1))
        zeros = _fields(zeros, bits) if zeros is not None and axis == 1 else zeros
    spread = [np.repeat(each.astype(np.float32), block, axis) for each in (scales, zeros) if each is not None]
    rows, columns = site.operand.shape
    if any(each.shape[axis] < (rows, columns)[axis] for each in spread):
        return None
    scale, *zero = (each[:rows, :columns] for each in spread)
    values = codes.astype(np.float32)
    return Codes(values, scale, zero[0] if zero else middle, (rows, columns), bits if packed else 8)


_RULES: Mapping[str, Callable[[Site, Read], Codes | None]] = {
    "com.microsoft.MatMulNBits": _blocks,
    "com.microsoft.GatherBlockQuantized": _table,
    "com.microsoft.QMoE": _experts,
}

_UNKNOWN = frozenset({"com.microsoft.MatMulBnb4"})
"""Operators whose codes are an index into a table of their own: changed by name, never recognised by values."""


def _fields(values: Array, bits: int) -> F32:
    """The fields of ``bits`` bits of each byte along the last axis, the lowest first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    found = (values[..., None] >> shifts) & np.uint8(2**bits - 1)
    return found.reshape(*values.shape[:-1], -1).astype(np.float32)


def _read(site: Site, at: int, read: Read) -> Array | None:
    name = site.node.input[at] if at < len(site.node.input) else ""
    return read(name) if name else None
