"""Adapters to try a layout on: a target for each kind, sizes pairwise different, values normal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.parts import Delta, Loha, Lokr, Lora, Magnitude, Part, Replace, Rows
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["KINDS", "random_adapter"]

KINDS = ("lora", "conv", "embedding", "experts", "dora", "loha", "lokr", "delta", "replace", "rows")
"""What ``random_adapter`` can make."""


def random_adapter(seed: int = 0, kinds: Iterable[str] = ("lora",), dtype: Any = np.float32) -> Adapter:
    """An adapter with one target for each kind, of pairwise different sizes and normal values.

    Args:
        kinds: of ``KINDS``.
    """
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return draw.standard_normal(shape).astype(dtype)

    makers: Mapping[str, tuple[str, Any]] = {
        "lora": ("blocks.0.attn.weight", lambda: Update((Lora(normal(3, 7), normal(11, 3), 4.5, "alpha/r"),))),
        "conv": ("blocks.1.conv.weight", lambda: _conv(normal)),
        "embedding": ("embed.weight", lambda: _embedding(normal)),
        "experts": ("moe.experts.gate", lambda: _experts(normal)),
        "dora": ("blocks.2.dora.weight", lambda: _dora(normal)),
        "loha": ("blocks.3.loha.weight", lambda: _loha(normal)),
        "lokr": ("blocks.4.lokr.weight", lambda: Update((Lokr(0.5, "factor", normal(2, 5), lokr_w2=normal(3, 7)),))),
        "delta": ("norm.bias", lambda: Update((Delta(normal(13), 0.75),), Placement((13,), (0,), ()))),
        "replace": ("head.weight", lambda: Update((Replace(normal(6, 9), ("add",)),))),
        "rows": ("tokens.weight", lambda: _rows(normal)),
    }
    return Adapter({makers[kind][0]: makers[kind][1]() for kind in kinds})


def _conv(normal: Any) -> Update:
    parts: tuple[Part, ...] = (Lora(normal(2, 5 * 3 * 4), normal(7, 2), 3, "alpha/sqrt(r)"),)
    return Update(parts, Placement((7, 5, 3, 4), (0,), (1, 2, 3)))


def _embedding(normal: Any) -> Update:
    place = Placement((17, 6), out=(1,), in_=(0,))
    return Update((Lora(normal(4, 17), normal(6, 4), -2.5, "alpha/r"),), place, op="embedding")


def _experts(normal: Any) -> Update:
    return Update((Lora(normal(3, 2, 8), normal(3, 5, 2), 1, "alpha/r"),), Placement((3, 5, 8), (1,), (2,), (0,)))


def _dora(normal: Any) -> Update:
    parts = (Lora(normal(2, 9), normal(5, 2), 8, "alpha/r"), Magnitude(abs(normal(5)) + 1))
    return Update(parts, Placement((5, 9), (0,), (1,)))


def _loha(normal: Any) -> Update:
    return Update((Loha(normal(10, 3), normal(3, 8), normal(10, 3), normal(3, 8), 5, "alpha/r"),))


def _rows(normal: Any) -> Update:
    return Update((Rows(normal(3, 4), np.array([1, 5, 8])),), Placement((12, 4), (0,), (1,)))
