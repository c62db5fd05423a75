"""What only the values show: NaN, infinity, what float32 cannot hold (LF-312), factors that are all zero (LF-313).

Reads every value once, in tiles. ``np.isfinite`` costs ten passes on 16-bit floats; the largest bit pattern
below the sign tells the same: bit patterns of one sign are ordered as their values, NaN and infinity last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.container import dtype_name
from loraformat.errors import Problem
from loraformat.parts import roles_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter

    Array = npt.NDArray[Any]

__all__ = ["largest_pattern", "value_problems"]

_TILE = 1 << 18  # values: a tile of 16-bit floats stays in the second-level cache
# dtype → (unsigned view, mask below the sign, the smallest pattern that is not finite)
_PATTERNS = {
    "F64": ("<u8", 2**63 - 1, 0x47EF_FFFF_E000_0001),  # beyond the largest float32, in which all is computed
    "F32": ("<u4", 2**31 - 1, 0x7F80_0000),
    "F16": ("<u2", 2**15 - 1, 0x7C00),
    "BF16": ("<u2", 2**15 - 1, 0x7F80),
    "F8_E5M2": ("u1", 127, 0x7C),
    "F8_E4M3": ("u1", 127, 0x7F),
}


def largest_pattern(tensor: Array) -> tuple[int, int]:
    """(largest bit pattern below the sign, the smallest one that is not finite in float32) of a float tensor."""
    view, mask, infinite = _PATTERNS[dtype_name(tensor.dtype)]
    flat = np.ascontiguousarray(tensor).reshape(-1).view(view)
    top = max((int((flat[i : i + _TILE] & flat.dtype.type(mask)).max()) for i in range(0, flat.size, _TILE)), default=0)
    return top, infinite


def value_problems(adapter: Adapter) -> Iterator[Problem]:
    """LF-312 for every tensor with a value that is not finite, LF-313 for every factor that is all zero."""
    for key, update in adapter.items():
        for part in update.parts:
            for role, tensor in roles_of(part):
                if dtype_name(tensor.dtype) not in _PATTERNS:
                    continue
                top, infinite = largest_pattern(tensor)
                where = f"{key}.{role}"
                if top >= infinite:
                    yield Problem(
                        "LF-312", "the tensor holds NaN or what is no finite float32", where, "the training diverged"
                    )
                elif top == 0 and part.kind in ("lora", "loha", "lokr", "delta"):
                    what = "every value is zero: the target does not change (fresh, or never trained)"
                    yield Problem("LF-313", what, where, severity="warning")
        if update.sketch is not None and not np.isfinite(update.sketch).all():
            yield Problem("LF-312", "the sketch holds NaN or an infinity", f"{key}.sketch", "bind the adapter again")
