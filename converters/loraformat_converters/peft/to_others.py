"""Adapter → the tensors and settings of PEFT's LoHa, LoKr and trained tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loraformat.parts import Loha, Lokr, roles_of
from loraformat_converters.peft import config as configs
from loraformat_converters.peft.form import Form, replacements, torch_kernel
from loraformat_converters.peft.numbers import stated
from loraformat_converters.peft.to_lora import token_order

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["loha", "lokr", "tokens"]


def loha(adapter: Adapter, kept: configs.Config | None) -> Form:
    """LoHa, and whole parameters."""
    form = Form("LOHA")
    parts = {module: update["loha"] for module, update in _modules(adapter, "loha", form)}
    for module, part in parts.items():
        if part.hada_w2_b.shape[0] != part.r or (part.t1 is not None and part.t1.shape[:2] != (part.r, part.r)):
            form.refuse(f"{module}.weight", "PEFT's LoHa has one rank for both of its factors")
    cores = {module for module, part in parts.items() if part.t1 is not None}
    kernels = {m for m in parts if (p := adapter[f"{m}.weight"].placement) is not None and math.prod(p.shape[2:]) > 1}
    if cores and (flat := kernels - cores):
        form.refuse(f"{min(flat)}.weight", "use_effective_conv2d holds for every kernel, and this one is flattened")
    form.settings["use_effective_conv2d"] = bool(cores)
    if parts and not form.problems:
        form.settings |= stated(parts, "alpha")
    return form


def lokr(adapter: Adapter, kept: configs.Config | None) -> Form:
    """LoKr, and whole parameters; only beside the configuration that it came with."""
    form = Form("LOKR")
    _modules(adapter, "lokr", form)
    if kept is None or kept.method != "LOKR":
        fix = "PEFT takes the sizes of both factors from its own settings (r, decompose_factor, decompose_both)"
        form.refuse("", "LoKr is written to PEFT only beside the configuration that it was read with", fix)
    return form


def tokens(adapter: Adapter, kept: configs.Config | None) -> Form:
    """Token rows alone: the method TRAINABLE_TOKENS, which has one list of indices for all embeddings."""
    form = Form("TRAINABLE_TOKENS")
    for key, update in adapter.items():
        if update.kind != "rows" or not key.endswith(".weight") or update["rows"].axis:
            form.refuse(key, f"a {update.kind} update beside token rows without any factors")
            continue
        module = key.removesuffix(".weight")
        indices, form.tensors[f"{module}.trainable_tokens_delta"] = token_order(module, update, kept)
        form.modules.append(module)
        if form.settings.setdefault("token_indices", indices) != indices:
            form.refuse(key, "PEFT trains the same tokens of every embedding (token_indices)")
    return form


def _modules(adapter: Adapter, kind: str, form: Form) -> list[tuple[str, Update]]:
    found: list[tuple[str, Update]] = []
    for key, update in adapter.items():
        if update.kind == "replace":
            continue
        module = key.removesuffix(".weight")
        place = update.placement
        if update.kind != kind or not key.endswith(".weight"):
            form.refuse(key, f"a {update.kind} update of this parameter beside {kind}: PEFT has one method an adapter")
        elif place is not None and len(place.shape) == 2 and place.out != (0,):
            form.refuse(key, f"PEFT's {kind} adapts a torch Linear [out, in], and this weight is [in, out]")
        elif torch_kernel(key, update, form) is not None:
            form.tensors |= dict(_named(module, update[kind]))
            form.modules.append(module)
            found.append((module, update))
    replacements(adapter, form, {module: f"{module}.base_layer" for module in form.modules})
    return found


def _named(module: str, part: Loha | Lokr) -> Iterator[tuple[str, Array]]:
    """PEFT's names; the core of a Conv1d has a last axis of 1 there."""
    for role, tensor in roles_of(part):
        if role in ("t1", "t2"):
            core = tensor if tensor.ndim > 3 else tensor[..., None]
            yield f"{module}.{'hada' if part.kind == 'loha' else 'lokr'}_{role}", core
        else:
            yield f"{module}.{role}", tensor
