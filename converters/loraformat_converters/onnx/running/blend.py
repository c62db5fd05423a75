"""Several adapters as one, by weights: the ranks beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraformat.adapter import Adapter
from loraformat.parts import Lora
from loraformat.updates import Update
from loraformat_converters.onnx.attaching.pairs import folded, laid

__all__ = ["blend"]


def blend(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Σ weight · adapter as one, exactly: the ranks beside each other, the weights in B. Plain pairs only (LF-508)."""
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        return adapters[0][0]
    pairs: dict[str, list[tuple[Lora, float]]] = {}
    for adapter, weight in adapters:
        for key, update in adapter.items():
            laid(key, folded(update), "linear")  # LF-508 where it is no pair
            pairs.setdefault(key, []).append((update["lora"], weight))
    return Adapter({key: Update((_joined(several),)) for key, several in pairs.items()})


def _joined(pairs: Sequence[tuple[Lora, float]]) -> Lora:
    a = np.concatenate([pair.lora_A.astype(np.float32) for pair, _ in pairs], -2)
    b = np.concatenate(
        [(pair.lora_B.astype(np.float64) * (pair.scale * weight)).astype(np.float32) for pair, weight in pairs], -1
    )
    return Lora(a, b, 1.0, "factor")
