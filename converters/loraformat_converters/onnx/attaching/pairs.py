"""How a pair A, B lies in the two tensors that are fed to a graph. The scale is in B.

linear   A [*batch, in, r]   B [*batch, r, out]     MatMul and Gemm; Gather, whose in is the vocabulary
conv     A [r, in, *kernel]  B [out, r, 1, …]       Conv and ConvTranspose
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loraformat.errors import fault
from loraformat.parts import Lora

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Form", "folded", "laid", "pair_of"]

Form = Literal["linear", "conv"]


def folded(update: Update, by: float = 1.0) -> Update:
    """The update with its scale in B, in float64: whoever feeds it rounds it once, to the type of the slot.

    Args:
        by: what the product is multiplied by all the same: B is divided by it.
    """
    if "lora" not in update or update.scale == by == 1.0:
        return update
    part: Lora = update["lora"]
    b = part.lora_B.astype(np.float64) * (part.scale / by)
    plain = Lora(part.lora_A, b, 1.0, "factor", part.mid)
    return replace(update, parts=tuple(plain if p is part else p for p in update.parts))


def laid(key: str, update: Update, form: Form, kernel: Iterable[int | None] = ()) -> tuple[Array, Array]:
    """A and B of a plain pair whose scale is 1 as they lie in slots of ``form``; LF-508 of anything else."""
    if update.kind != "lora" or update["lora"].mid is not None:
        what = f"a {update.kind} update is no pair A, B that can be fed"
        ways = (
            "--to-lora R, whose residual is printed, or --mode branch"
            if update.linear
            else "--mode branch, or merge it"
        )
        raise fault("LF-508", what, where=key, fix=ways)
    part: Lora = update["lora"]
    a, b = part.lora_A, part.lora_B
    if form == "linear":
        return a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    sizes = [n for n in kernel if n is not None]
    return a.reshape(part.r, -1, *sizes), b.reshape(*b.shape, *(1 for _ in sizes))


def pair_of(key: str, a: Array, b: Array) -> Lora:
    """The pair that lies in two tensors, whose form their shapes must tell; LF-506 where they tell none, or two."""
    fits = []
    if a.ndim == b.ndim >= 2 and a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]:
        fits.append(Lora(a.swapaxes(-1, -2), b.swapaxes(-1, -2), 1.0, "factor"))
    if a.ndim == b.ndim > 2 and a.shape[0] == b.shape[1] and all(n == 1 for n in b.shape[2:]):
        fits.append(Lora(a.reshape(len(a), -1), b.reshape(b.shape[:2]), 1.0, "factor"))
    if len(fits) != 1:
        what = f"A {list(a.shape)} and B {list(b.shape)} are {'two kinds of pair at once' if fits else 'no pair'}"
        raise fault("LF-506", what, where=key, fix="A [in, r] and B [r, out], or the kernels of two convolutions")
    return fits[0]
