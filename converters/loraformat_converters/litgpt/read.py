"""litgpt → Adapter, in litgpt's own names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.axes import Placement
from loraformat.layout import Reading, ReadOptions
from loraformat.loose import Loose, by_module
from loraformat.parts import Lora
from loraformat_converters.litgpt import NAMES
from loraformat_converters.litgpt.heads import heads_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.source import Source

    Array = npt.NDArray[Any]

__all__ = ["read"]

_ENDINGS = {".lora_A": "lora_A", ".lora_B": "lora_B"}
_PARTS = ("lora_query", "lora_key", "lora_value")
# A scalar at the beginning of a line: all that is asked for of either file.
_SCALAR = re.compile(r"^(\w+): *(?:(true|false)|(-?\d+)|(-?\d+\.\d*(?:e[+-]?\d+)?)) *$", re.MULTILINE)


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter.

    Raises:
        LoraFormatError: LF-303 … LF-314 the tensors; LF-504 what of a fused projection is adapted, or its sizes, are not
            known; LF-506 another tensor; LF-507, LF-509 the scale.
    """
    draft = Loose(options, "litgpt")
    hyper = _scalars(source.sidecar("hyperparameters.yaml"))
    model = _scalars(source.sidecar("model_config.yaml"))
    if "lora_alpha" in hyper and "lora_r" in hyper:
        draft.alpha, draft.rank, draft.rule = hyper["lora_alpha"], hyper["lora_r"], "alpha/r"
    modules, rest = by_module(source.tensors, _ENDINGS)
    for module, roles in modules.items():
        if not draft.sound(module, roles, {"lora_A": 2, "lora_B": 2}):
            continue
        a, b = roles["lora_A"], roles["lora_B"]
        scale = draft.scale(module, b.shape[1])
        whole = (
            _fused(module, a, b, hyper, heads_of(model) or heads_of(options.config), draft)
            if module.endswith(".qkv")
            else b
        )
        if scale is None or whole is None:
            continue
        times = a.shape[0] // b.shape[1]
        alpha = scale[0] * times if scale[1] == "alpha/r" else scale[0]
        rule = scale[1]
        if times > 1 and rule == "alpha/sqrt(r)":
            alpha, rule = scale[0] / b.shape[1] ** 0.5, "factor"
        place = Placement((whole.shape[0], a.shape[1]), (0,), (1,))
        draft.add(f"{module}.weight", Lora(a, whole, alpha, rule), place)
    for name in rest:
        draft.say("LF-506", "no factor of litgpt", name)
    return Reading(draft.finish(str(source.path), names=NAMES), draft.warnings)


def _scalars(text: str | None) -> dict[str, Any]:
    """Name → value of the plain members of a YAML mapping."""
    found: dict[str, Any] = {}
    for name, boolean, integer, number in _SCALAR.findall(text or ""):
        found[name] = boolean == "true" if boolean else int(integer) if integer else float(number)
    return found


def _fused(
    module: str, a: Array, b: Array, hyper: Mapping[str, Any], heads: tuple[int, int] | None, draft: Loose
) -> Array | None:
    """B with every zero in its place, [query + key + value, n·r] (litgpt 0.5.13 LoRAQKVLinear.zero_pad)."""
    enabled = [bool(hyper.get(name)) for name in _PARTS]
    if heads is None or not any(enabled):
        what = "query, key and value are one; what of them is adapted, and how many rows each has, is not known"
        fix = "keep hyperparameters.yaml and model_config.yaml beside the file; the heads also by --base config.json"
        draft.say("LF-504", what, module, fix)
        return None
    sizes = (heads[0], heads[1], heads[1])
    kept = [size for size, on in zip(sizes, enabled, strict=True) if on]
    r = b.shape[1]
    if a.shape[0] != len(kept) * r or b.shape[0] != sum(kept):
        what = f"lora_A {list(a.shape)} and lora_B {list(b.shape)} are not {len(kept)} parts of {kept} rows"
        draft.say("LF-507", what, module, "are the files beside it those that it was trained with?")
        return None
    whole = np.zeros((sum(sizes), a.shape[0]), b.dtype)
    starts = [start for start, on in zip(accumulate((0, *sizes[:2])), enabled, strict=True) if on]
    for i, (start, size, at) in enumerate(zip(starts, kept, accumulate((0, *kept[:-1])), strict=True)):
        whole[start : start + size, i * r : (i + 1) * r] = b[at : at + size]
    return whole
