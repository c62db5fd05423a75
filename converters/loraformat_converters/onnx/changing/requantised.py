"""A merge into codes: q' = round(W' / s) + z in the very steps in which W is kept, with s and z as they are.

What of ΔW survives is little where the steps are wide: 4 bits keep a change of 3 % of W hardly at all. So this is done on
request, the loss is measured value by value, and too great a loss is refused (``survival``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from loraformat import progress
from loraformat_converters.onnx.graph.index import Site
from loraformat_converters.onnx.graph.model import array
from loraformat_converters.onnx.graph.trace import CODES
from loraformat_converters.onnx.graph.unpack import Codes
from loraformat_converters.onnx.graph.values import Values

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.tiles import Norms
    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["Kept", "kept"]

_NEAR = 1e-3
"""Of a step: how far what the graph makes of the codes may be from (q − z) · s."""


@dataclass(frozen=True)
class Kept:
    """A weight as codes.

    Attributes:
        codes: laid like the operand.
        low, high: the codes that are in use: all of the type, but for one that its quantiser leaves free.
    """

    site: Site
    codes: Codes
    low: int
    high: int

    def changed(self, updates: Sequence[Update], norms: Norms) -> Array:
        """The stored tensor after the updates, which are placed like the operand.

        Adds to ``norms``, in which what saturates counts as lost.
        """
        old = self.codes.floats
        wanted = old
        for update in updates:
            wanted = update.apply(wanted)
        new = replace(self.codes, values=self._nearest(wanted))
        norms.base += float(np.sum(old**2, dtype=np.float64))
        norms.delta += float(np.sum((wanted - old) ** 2, dtype=np.float64))
        norms.lost += float(np.sum((new.floats - wanted) ** 2, dtype=np.float64))
        stored = self._stored(new.values)
        progress.advance(stored.nbytes)
        return stored

    def _nearest(self, wanted: F32) -> F32:
        """The codes next to W', those of what fills up a block as they are."""
        codes = self.codes
        scale, zero = (np.broadcast_to(np.float32(x), codes.values.shape) for x in (codes.scale, codes.zero))
        exact = np.divide(
            self._spread(wanted), scale, out=codes.values - zero, where=(scale != 0) & self._spread(np.True_)
        )
        return np.asarray(np.clip(np.rint(exact + zero), self.low, self.high), np.float32)

    def _spread(self, values: Any) -> Array:
        """What is laid like the operand, laid like the codes; zeros where these are filled up."""
        *rows, columns = self.codes.shape
        whole = np.zeros((*rows, self.codes.values.size // max(1, int(np.prod(rows)))), np.asarray(values).dtype)
        whole[..., :columns] = values
        return whole.reshape(self.codes.values.shape)

    def _stored(self, values: F32) -> Array:
        """Laid and packed like the root."""
        root, bits = self.site.root, self.codes.bits
        kind = onnx.helper.tensor_dtype_to_np_dtype(root.data_type)
        if bits < 8:
            per = values.astype(np.uint8).reshape(-1, 8 // bits)
            packed = np.bitwise_or.reduce(per << np.arange(0, 8, bits, dtype=np.uint8), axis=-1)
            return np.asarray(packed.astype(kind).reshape(root.dims))
        laid = self.site.as_stored(values) if values.shape == self.codes.shape else values  # in blocks, as it is read
        return np.ascontiguousarray(laid.reshape(root.dims).astype(kind))


def kept(site: Site, values: Values) -> Kept | None:
    """How the weight of a site is kept; None where it is no codes, or where their scheme is not known exactly."""
    span = _span(site)
    if span is None or not _upright(site):
        return None
    codes = values.codes(site) if site.dequantises else _computed(site, values, *span)
    if codes is None:
        return None
    low, high = (0, 2**codes.bits - 1) if codes.bits < 8 else span
    return Kept(site, codes, *_in_use(codes.values, low, high))


def _span(site: Site) -> tuple[int, int] | None:
    """The least and the largest code of the stored type; None of floats, 8-bit ones too."""
    named = re.fullmatch(r"(U?)INT(\d+)", onnx.TensorProto.DataType.Name(site.root.data_type))
    if site.root.data_type not in CODES or named is None:
        return None
    count = 2 ** int(named[2])
    return (0, count - 1) if named[1] else (-count // 2, count // 2 - 1)


def _in_use(values: F32, low: int, high: int) -> tuple[int, int]:
    """ONNX Runtime's quantiser (1.32) leaves −128 free in symmetric int8, and half of the codes with ``reduce_range``.

    So that the sums of 16 bits of older processors do not saturate.
    """
    if (low, high) == (-128, 127):
        if values.min() >= -64 and values.max() <= 64:
            return -64, 64
        return (-127, 127) if values.min() > low else (low, high)
    return (low, 127) if (low, high) == (0, 255) and values.max() <= 127 else (low, high)


def _upright(site: Site) -> bool:
    """Whether the axes of the root can be told behind its chain: a Reshape mixes those that were turned before it."""
    ops = [node.op_type for node in site.chain]
    if "Unsqueeze" in ops:
        return False
    return "Reshape" not in ops or "Transpose" not in ops[: len(ops) - ops[::-1].index("Reshape")]


def _computed(site: Site, values: Values, low: int, high: int) -> Codes | None:
    """Codes that nodes make floats of, each by a scale and a zero point of its own: what they make of two codes tells both."""
    root, name = site.root, site.node.input[site.position]
    kind = onnx.helper.tensor_dtype_to_np_dtype(root.data_type)
    now, *ends = [
        values.compute(name, instead)
        for instead in (None, *({site.root_name: np.full(tuple(root.dims), code, kind)} for code in (low, high)))
    ]
    if now is None or now.shape != site.operand.shape or any(end is None for end in ends):
        return None
    first, last = (np.asarray(end, np.float64) for end in ends)
    scale = (last - first) / (high - low)
    zero = np.divide(low * scale - first, scale, out=np.zeros_like(scale), where=scale != 0)
    stored = site.as_read(array(root, values.folder).astype(np.float32))
    found = Codes(stored, scale.astype(np.float32), zero.astype(np.float32), site.operand.shape)
    exact = bool((np.abs(found.floats - now.astype(np.float32)) <= _NEAR * np.abs(scale)).all())
    return found if exact else None
