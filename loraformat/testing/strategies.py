"""Hypothesis strategies for what an adapter is made of: pools of meaningful values, not of any. Needs hypothesis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.names import key_fault
from loraformat.scale import SCALE_RULES, ScaleRule
from loraformat.testing.adapters import KINDS, random_adapter

__all__ = ["adapters", "alphas", "keys", "placements", "scale_rules"]


def adapters(kinds: Sequence[str] = KINDS) -> st.SearchStrategy[Adapter]:
    """Adapters of some of ``kinds``, a target each, of pairwise different sizes and normal values."""
    some = st.sets(st.sampled_from(kinds), min_size=1).map(sorted)
    return st.builds(random_adapter, st.integers(0, 2**32 - 1), some, st.sampled_from([np.float32, np.float16]))


def alphas() -> st.SearchStrategy[float]:
    """Numbers that an alpha may be: common ones, zero, negative, tiny, and any that single precision holds."""
    return st.sampled_from([16, 8.0, 0, -4.5, 1e-7, 0.1]) | st.floats(width=32, allow_nan=False, allow_infinity=False)


def scale_rules() -> st.SearchStrategy[ScaleRule]:
    """Every scale rule."""
    return st.sampled_from(SCALE_RULES)


def keys() -> st.SearchStrategy[str]:
    """Legal keys: those of real models, those that look like something else, and any text that is legal."""
    real = ["model.layers.0.self_attn.q_proj.weight", "decoder/layers_0/query/kernel", "lora_unet_down_blocks_0"]
    odd = ["a.lora_A", "weight.", "..", "unet:conv.weight", " ", "__metadata__", "層.重み", "\U0001f600.weight"]
    return st.sampled_from(real + odd) | st.text(min_size=1, max_size=12).filter(lambda key: key_fault(key) is None)


@st.composite
def placements(draw: st.DrawFn, axes: int = 4, size: int = 5) -> Placement:
    """Placements of up to ``axes`` axes of up to ``size``, in any order and with any split into batch, out and in."""
    shape = draw(st.lists(st.integers(1, size), min_size=1, max_size=axes))
    order = draw(st.permutations(range(len(shape))))
    out = draw(st.integers(1, len(shape)))
    batch = draw(st.integers(0, len(shape) - out))
    return Placement(tuple(shape), tuple(order[:out]), tuple(order[out + batch :]), tuple(order[out : out + batch]))
