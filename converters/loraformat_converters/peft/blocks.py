"""Factors whose product is block-diagonal, stored without their zeros: BD-LoRA, and the fused projections of old PEFT.

Both are exactly a LoRA with the zeros written out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat_converters.peft.settings import EMPTY

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.peft.draft import Draft

    Array = npt.NDArray[Any]

__all__ = ["unfolded"]


def unfolded(module: str, a: Array, b: Array, draft: Draft) -> tuple[Array, Array, int] | None:
    """(A, B, A's rows per rank of the configuration) with every zero in its place; None where they do not fit."""
    if (enabled := draft.setting("enable_lora")) not in EMPTY:
        return _fused(module, a, b, enabled, draft)
    if (setting := draft.setting("use_bdlora")) not in EMPTY:
        return _blocks(module, a, b, setting, draft)
    return a, b, 1


def _blocks(module: str, a: Array, b: Array, setting: Any, draft: Draft) -> tuple[Array, Array, int] | None:
    """BD-LoRA (peft 0.21.2 tuners/lora/variants.py): one factor is [r, in / n] or [out, r / n], n blocks of rows."""
    if not isinstance(setting, dict) or not isinstance(n := setting.get("nblocks", 1), int) or n < 1:
        draft.say("LF-503", "use_bdlora must be an object with a positive nblocks", module)
        return None
    said = [setting.get(f"target_modules_bd_{side}") or [] for side in "ab"]
    if not all(map(_is_names, said)):
        draft.say("LF-503", "target_modules_bd_a and target_modules_bd_b of use_bdlora must be lists of names", module)
        return None
    # The patterns are substrings of the module's path there, no components of it.
    in_a, in_b = (any(name in module for name in names) for names in said)
    factor = a if in_a else b
    if in_a and in_b:
        draft.say("LF-504", "use_bdlora means both factors of this module: PEFT refuses that too", module)
        return None
    if (in_a or in_b) and (a.ndim != 2 or b.ndim != 2 or factor.shape[0] % n):
        draft.say("LF-309", f"the factor {list(factor.shape)} has no {n} blocks of rows", module)
        return None
    return (_diagonal(a, n) if in_a else a), (_diagonal(b, n) if in_b else b), 1


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _fused(module: str, a: Array, b: Array, enabled: Any, draft: Draft) -> tuple[Array, Array, int] | None:
    """Adapted parts of a fused projection: A [2r, in], B [out · 2/n, r, 1] as a convolution of two groups.

    peft 0.2.0 tuners/lora.py MergedLinear: the forward pass has two groups whatever ``enable_lora`` says, merging as
    many as are enabled. Only where two are enabled do they agree; the rows of B are those of the enabled parts.
    """
    if not isinstance(enabled, list) or not all(isinstance(e, bool) for e in enabled) or sum(enabled) != 2:
        what = f"enable_lora={enabled}: its forward pass and its merge agree only where two parts are enabled"
        draft.say("LF-504", what, module)
        return None
    if a.ndim != 2 or b.ndim != 3 or b.shape[2] != 1 or a.shape[0] != 2 * b.shape[1] or b.shape[0] % 2:
        what = f"lora_A {list(a.shape)} and lora_B {list(b.shape)} must be [2r, in] and [2/{len(enabled)} · out, r, 1]"
        draft.say("LF-309", what, module)
        return None
    each = b.shape[0] // 2
    full = np.zeros((len(enabled), each, a.shape[0]), b.dtype)
    full[np.array(enabled)] = _diagonal(b[..., 0], 2).reshape(2, each, -1)
    return a, full.reshape(-1, a.shape[0]), 2


def _diagonal(factor: Array, n: int) -> Array:
    """n blocks of rows as a block-diagonal matrix (torch.block_diag of torch.chunk)."""
    rows, columns = factor.shape[0] // n, factor.shape[1]
    out = np.zeros((n, rows, n, columns), factor.dtype)
    for i in range(n):
        out[i, :, i] = factor[i * rows : (i + 1) * rows]
    return out.reshape(n * rows, n * columns)
