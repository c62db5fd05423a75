"""Several adapters as one, by weights: the ranks beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraformat.adapter import Adapter
from loraformat.errors import LoraFormatError, Problem
from loraformat.parts import Lora
from loraformat.updates import Update
from loraformat_converters.onnx.attaching.pairs import folded, laid
from loraformat_converters.onnx.attaching.slots import Fed

__all__ = ["blend"]


def blend(adapters: Sequence[tuple[Fed, float]]) -> Fed:
    """Σ weight · adapter as one, exactly: the ranks beside each other, the weights in B. Plain pairs only (LF-508).

    A DoRA acts alone and as it is: ‖V‖ is of the sum that it was trained in, so that another strength, or another change
    of the same weight, gives another gain (peft 0.21.2 scales inside the norm, and rescales what came before).
    """
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        return adapters[0][0]
    fix = "use it alone with the weight 1; or Effective, which computes the weights of any blend"
    what = "a DoRA has no part in a blend: its norm is of its own sum alone"
    if doras := [Problem("LF-508", what, key, fix) for fed, _ in adapters for key in fed.gains]:
        raise LoraFormatError(doras)
    pairs: dict[str, list[tuple[Lora, float]]] = {}
    for fed, weight in adapters:
        for key, update in fed.pairs.items():
            laid(key, folded(update), "linear")  # LF-508 where it is no pair
            pairs.setdefault(key, []).append((update["lora"], weight))
    return Fed(Adapter({key: Update((_joined(several),)) for key, several in pairs.items()}))


def _joined(pairs: Sequence[tuple[Lora, float]]) -> Lora:
    """In float64: the slot rounds once, and LF-612 is what is beyond it."""
    a = np.concatenate([pair.lora_A.astype(np.float64) for pair, _ in pairs], -2)
    b = np.concatenate([pair.lora_B.astype(np.float64) * (pair.scale * weight) for pair, weight in pairs], -1)
    return Lora(a, b, 1.0, "factor")
