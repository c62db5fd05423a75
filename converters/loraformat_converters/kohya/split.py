"""Fused query-key-value pairs: B is block-diagonal, and A the rows of all.

With ``split_qkv`` sd-scripts trains one pair for each of q, k and v (and the MLP) of a fused projection, and saves them
as one pair of three or four times the rank, *with the alpha of one* (48d368f networks/lora_flux.py state_dict): whoever
divides by the rows of ``lora_down``, which every reader does, applies a third or a fourth of what was trained. Its
converters fuse in the same way, but then state an alpha that is right (networks/convert_flux_lora.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.mapped import read_ahead
from loraformat.parts import Lora
from loraformat.pieced import bits
from loraformat_converters.kohya.header import trained_with

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update
    from loraformat_converters.kohya.draft import Draft

    Array = npt.NDArray[Any]

__all__ = ["blocks", "look"]

_MOST = 8  # q, k, v and an MLP are four; a larger number of blocks is no projection's


def blocks(b: Array) -> int:
    """Of how many diagonal blocks of equal width B [out, R] consists; 1 where it is dense or zero.

    >>> blocks(np.array([[1.0, 0], [2, 0], [0, 3]]))
    2
    """
    width = b.shape[1]
    read_ahead(b)
    return next((n for n in range(min(_MOST, width), 1, -1) if width % n == 0 and _diagonal(b, n)), 1)


def _diagonal(b: Array, n: int) -> bool:
    """Whether B consists of so many diagonal blocks: each row has values in one of them, and none comes back."""
    if _held(b[:1], n)[:, 1:].any():  # nearly every B is dense, and its first row says so
        return False
    held = _held(b, n)
    held = held[held.any(axis=1)]
    block = held.argmax(axis=1)
    alone = bool((held.sum(axis=1) == 1).all() and (np.diff(block) >= 0).all())
    return alone and len(set(block.tolist())) == n


def _held(b: Array, n: int) -> npt.NDArray[np.bool_]:
    """[rows, n]: whether a row has a value in each of n runs of columns that is not zero, of either sign."""
    return np.asarray(np.bitwise_or.reduce(bits(b).reshape(len(b), n, -1), axis=2) << 1, np.bool_)


def look(header: Mapping[str, str], draft: Draft) -> None:
    """Warns of fused pairs whose strength a reader loses; restores it where the user says how many there were."""
    fused = {key: n for key, update in draft.updates.items() if (n := _fused(update)) > 1}
    stated = draft.options.split_qkv
    if stated is not None:
        _restore(fused, stated, draft)
        return
    trained = trained_with(header, "split_qkv")
    weak = {key: n for key, n in fused.items() if trained or draft.updates[key].scale != 1.0}
    if weak:
        key, n = next(iter(weak.items()))
        so = "as ss_network_args says, it was" if trained else "if it was"
        what = (
            f"B of {len(weak)} targets is block-diagonal, fused from {n} pairs in the first: {so} trained with split_qkv, "
            f"and readers apply 1/{n} of its strength; so does this"
        )
        draft.warn("LF-507", what, key, f"--split-qkv {n} restores what was trained")


def _restore(fused: Mapping[str, int], stated: int, draft: Draft) -> None:
    if stated not in fused.values():
        found = f"the blocks of B are {sorted(set(fused.values()))}" if fused else "no B is block-diagonal"
        draft.say("LF-507", f"split_qkv is stated as {stated}, and {found}", "")
        return
    for key, n in fused.items():
        if n != stated:
            draft.warn("LF-507", f"B has {n} blocks where {stated} are stated: its strength is restored by {n}", key)
        update = draft.updates[key]
        parts = tuple(replace(p, alpha=p.alpha * n) if isinstance(p, Lora) else p for p in update.parts)
        draft.updates[key] = replace(update, parts=parts)


def _fused(update: Update) -> int:
    """How many pairs a target's was fused from, by the look of B."""
    part = next((p for p in update.parts if isinstance(p, Lora)), None)
    if part is None or part.mid is not None or (update.placement is not None and len(update.placement.shape) > 2):
        return 1
    return blocks(part.lora_B)
