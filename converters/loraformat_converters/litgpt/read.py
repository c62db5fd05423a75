"""litgpt → Adapter, in litgpt's own names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.layout import Reading, ReadOptions
from loraformat.loose import Loose, by_module
from loraformat.parts import Lora
from loraformat.plain_yaml import scalars
from loraformat_converters.litgpt import NAMES
from loraformat_converters.litgpt.files import HYPER, MODEL, PARTS
from loraformat_converters.litgpt.fused import whole
from loraformat_converters.litgpt.heads import heads_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.source import Source

    Array = npt.NDArray[Any]

__all__ = ["read"]

_ENDINGS = {".lora_A": "lora_A", ".lora_B": "lora_B"}


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter.

    Raises:
        LoraFormatError: LF-303 … LF-314 the tensors; LF-504 what of a fused projection is adapted, or its sizes, are not
            known; LF-506 another tensor; LF-507, LF-509 the scale.
    """
    draft = Loose(options, "litgpt")
    texts = {name: text for name in (HYPER, MODEL) if (text := source.sidecar(name)) is not None}
    hyper, model = scalars(texts.get(HYPER)), scalars(texts.get(MODEL))
    if "lora_alpha" in hyper and "lora_r" in hyper:
        draft.alpha, draft.rank, draft.rule = hyper["lora_alpha"], hyper["lora_r"], "alpha/r"
    modules, rest = by_module(source.tensors, _ENDINGS)
    for module, roles in modules.items():
        if not draft.sound(module, roles, {"lora_A": 2, "lora_B": 2}):
            continue
        a, b = roles["lora_A"], roles["lora_B"]
        scale = draft.scale(module, b.shape[1])
        wide = (
            _fused(module, a, b, hyper, heads_of(model) or heads_of(options.config), draft)
            if module.endswith(".qkv")
            else b
        )
        if scale is None or wide is None:
            continue
        times = a.shape[0] // b.shape[1]
        alpha = scale[0] * times if scale[1] == "alpha/r" else scale[0]
        rule = scale[1]
        if times > 1 and rule == "alpha/sqrt(r)":
            alpha, rule = scale[0] / b.shape[1] ** 0.5, "factor"
        place = Placement((wide.shape[0], a.shape[1]), (0,), (1,))
        draft.add(f"{module}.weight", Lora(a, wide, alpha, rule), place)
    for name in rest:
        draft.say("LF-506", "no factor of litgpt", name)
    extensions = {"litgpt": json.dumps(texts, ensure_ascii=False)} if texts else {}
    return Reading(draft.finish(str(source.path), names=NAMES, extensions=extensions), draft.warnings)


def _fused(
    module: str, a: Array, b: Array, hyper: Mapping[str, Any], heads: tuple[int, int] | None, draft: Loose
) -> Array | None:
    """B with every zero in its place, [query + key + value, n·r]."""
    enabled = [bool(hyper.get(name)) for name in PARTS]
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
    return whole(b, sizes, enabled)
