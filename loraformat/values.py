"""What only the values show: NaN, infinity, what float32 cannot hold (LF-312), factors that are all zero (LF-313).

``np.isfinite`` makes ten passes over 16-bit floats; the bit patterns tell the same in less time than ``cat`` needs to
copy them. OR-ing all of them is one pass at the speed of memory: while the exponent's highest bit is in none, no value
reaches 2. Where one does, the largest pattern below the sign decides: bit patterns of one sign are ordered as their
values, NaN and infinity last.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat import progress
from loraformat.dtypes import dtype_name
from loraformat.errors import Problem
from loraformat.parts import ADDITIVE, roles_of
from loraformat.scale import LARGEST

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter

    Array = npt.NDArray[Any]
    _Float = tuple[str, str, Array]  # kind of part, where, tensor

__all__ = ["finite_and_zero", "value_problems"]

_TILE = 1 << 20  # bytes: stays in the second-level cache while it is read twice
_LARGE = 32 << 20  # bytes: beyond it a second thread is worth its start
# dtype → (width in bytes, the smallest pattern below the sign that is not finite)
_PATTERNS = {
    "F64": (8, 0x47EF_FFFF_E000_0001),  # beyond the largest float32, in which all is computed
    "F32": (4, 0x7F80_0000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),  # its all-ones exponent holds numbers too: only the very last pattern is NaN
}


def finite_and_zero(tensor: Array) -> tuple[bool, bool]:
    """(every value is finite, in float32 too; every value is zero) of a float tensor."""
    width, infinite = _PATTERNS[dtype_name(tensor.dtype)]
    flat = np.ascontiguousarray(tensor.T if tensor.flags.f_contiguous else tensor).reshape(-1)  # in any order
    flat = flat.astype(flat.dtype.newbyteorder("="), copy=False)
    unsigned, signed = flat.view(f"u{width}"), flat.view(f"i{width}")
    below_sign, step = (1 << (8 * width - 1)) - 1, _TILE // width
    bits = int(np.bitwise_or.reduce(unsigned)) & below_sign
    if bits < 1 << (8 * width - 2):
        return True, bits == 0
    for start in range(0, flat.size, step):
        # As unsigned the largest is a negative value's, if there is one; as signed, a positive one's.
        run = slice(start, start + step)
        if max(int(unsigned[run].max()) & below_sign, int(signed[run].max())) >= infinite:
            return False, False
    return True, False


def value_problems(adapter: Adapter) -> Iterator[Problem]:
    """LF-312 for every tensor with a value that is not finite, LF-313 for every factor that is all zero; LF-306 an alpha."""
    for (kind, where, tensor), (finite, zero) in _seen(list(_floats(adapter))):
        progress.advance(tensor.nbytes)
        if not finite:
            yield Problem("LF-312", "the tensor holds NaN or what is no finite float32", where, "the training diverged")
        elif zero and kind in ADDITIVE:
            what = "every value is zero: this part changes nothing (fresh, or never trained)"
            yield Problem("LF-313", what, where, severity="warning")
    for key, update in adapter.items():
        for part in update.additive:
            if abs(part.alpha) > LARGEST:
                yield Problem("LF-306", f"alpha is {part.alpha:g}; it must be a number that is finite in float32", key)
        if update.sketch is not None and not np.isfinite(update.sketch).all():
            yield Problem("LF-312", "the sketch holds NaN or an infinity", f"{key}.sketch", "bind the adapter again")


def _floats(adapter: Adapter) -> Iterator[_Float]:
    """Every float tensor of every part."""
    for key, update in adapter.items():
        for part in update.parts:
            for role, tensor in roles_of(part):
                if dtype_name(tensor.dtype) in _PATTERNS:
                    yield part.kind, f"{key}.{role}", tensor


def _seen(tensors: list[_Float]) -> Iterator[tuple[_Float, tuple[bool, bool]]]:
    """Each with what ``finite_and_zero`` says, in order; two threads read at more of memory's speed than one."""
    runs = list(_runs(tensors))
    if len(runs) < 2:
        yield from ((item, finite_and_zero(item[2])) for item in tensors)
        return
    from concurrent.futures import ThreadPoolExecutor  # takes 10 ms to import

    with ThreadPoolExecutor(2) as pool:
        said = pool.map(lambda run: [finite_and_zero(tensor) for _, _, tensor in run], runs)
        yield from zip(tensors, chain.from_iterable(said), strict=True)


def _runs(tensors: list[_Float]) -> Iterator[list[_Float]]:
    """The list cut where so many bytes are together that handing them to a thread costs nothing beside them."""
    run: list[_Float] = []
    held = 0
    for item in tensors:
        run.append(item)
        held += item[2].nbytes
        if held >= _LARGE:
            yield run
            run, held = [], 0
    if run:
        yield run
