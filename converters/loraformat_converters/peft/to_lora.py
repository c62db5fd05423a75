"""Adapter → the tensors and settings of PEFT's LoRA, with all that may stand beside factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.parts import Lora
from loraformat_converters.peft import config as configs
from loraformat_converters.peft.attention import OUT_PROJ_TWICE
from loraformat_converters.peft.form import Form, replacements, torch_kernel
from loraformat_converters.peft.numbers import stated
from loraformat_converters.peft.trained import indices_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["lora", "token_order"]


def lora(adapter: Adapter, kept: configs.Config | None) -> Form:
    """Factors, magnitudes, biases, whole parameters and token rows.

    Every reason why PEFT cannot hold the adapter is in the form's ``problems``.
    """
    form = Form("LORA")
    loras: dict[str, Lora] = {}
    wrapped: dict[str, str] = {}
    stacked = Counter(k.rpartition(".")[0] for k, u in adapter.items() if "lora" in u and not k.endswith(".weight"))
    for key, update in adapter.items():
        module, _, leaf = key.rpartition(".")
        if "lora" not in update:
            continue
        if update["lora"].mid is not None:
            form.refuse(key, "PEFT's LoRA has no core (mid)")
        elif "rows" in update:
            form.refuse(key, "PEFT trains token rows of an embedding or its factors, not both")
        elif f"{module}.in_proj_weight" in adapter or f"{module.removesuffix('.out_proj')}.in_proj_weight" in adapter:
            _attention(key, module, leaf, adapter, form, loras, wrapped)
        elif leaf == "weight":
            _module(key, module, update, form)
            loras[module], wrapped[module] = update["lora"], f"{module}.base_layer"
            form.modules.append(module)
        elif stacked[module] > 1:
            what = f"{stacked[module]} parameters of one module: PEFT nests them in the order of their definition"
            form.refuse(key, what, "no file states that order")
        else:
            _parameter(key, module, update, form)
            loras[key], wrapped[module] = update["lora"], f"{module}.base_layer"
    if not loras and not form.problems:
        form.refuse("", "PEFT's LoRA needs a module that is adapted by factors")
    _biases(adapter, form)
    _magnitudes(adapter, loras, form)
    _tokens(adapter, form, kept)
    tokens = {key.removesuffix(".weight") for key, update in adapter.items() if "rows" in update}
    replacements(adapter, form, wrapped | {module: f"{module}.token_adapter.base_layer" for module in tokens})
    if not form.problems:
        form.settings |= stated(loras)
    return form


def _module(key: str, module: str, update: Update, form: Form) -> None:
    a, b = update["lora"].lora_A, update["lora"].lora_B
    if a.ndim != 2:
        form.refuse(key, f"factors {list(a.shape)} of a .weight: PEFT stacks matrices of other parameters only")
    elif update.op == "embedding":
        form.tensors |= {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    elif (inner := torch_kernel(key, update, form)) is not None:
        if inner:
            a, b = a.reshape(a.shape[0], *inner), b.reshape(*b.shape, *[1] * (len(inner) - 1))
        form.tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def _parameter(key: str, module: str, update: Update, form: Form) -> None:
    """Stacked experts [E, r, in] · [E, out, r], or one matrix [out, in]: see ``experts``."""
    part, place = update["lora"], update.placement
    if update.kind != "lora" or part.lora_A.ndim not in (2, 3) or not module:
        form.refuse(key, f"a {update.kind} update of a parameter that is no .weight")
    elif part.lora_A.ndim == 2 and (place is None or place.out != (0,)):
        form.refuse(key, "PEFT takes this parameter for [out, in], and nothing says that it is", "bind it to its base")
    elif part.lora_A.ndim == 2:
        form.tensors |= {f"{module}.lora_A.weight": part.lora_A, f"{module}.lora_B.weight": part.lora_B}
        form.settings.setdefault("target_parameters", []).append(key)
    elif (count := part.matrix_shape()[0]) < 2:
        form.refuse(key, "a stack of one matrix: PEFT adds its two axes to the three")
    else:
        a = np.broadcast_to(part.lora_A, (count, *part.lora_A.shape[1:]))
        b = np.broadcast_to(part.lora_B, (count, *part.lora_B.shape[1:]))
        form.tensors[f"{module}.lora_A.weight"] = a.reshape(-1, a.shape[2])
        form.tensors[f"{module}.lora_B.weight"] = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        form.settings.setdefault("target_parameters", []).append(key)


def _attention(
    key: str, module: str, leaf: str, adapter: Adapter, form: Form, loras: dict[str, Lora], wrapped: dict[str, str]
) -> None:
    """nn.MultiheadAttention: PEFT adapts both projections, with one rank and one alpha, and adds out_proj's twice."""
    above = module if leaf == "in_proj_weight" else module.removesuffix(".out_proj")
    both = [adapter.get(f"{above}.in_proj_weight"), adapter.get(f"{above}.out_proj.weight")]
    if any(update is None or update.kind != "lora" or update["lora"].lora_A.ndim != 2 for update in both):
        form.refuse(key, "of an nn.MultiheadAttention PEFT adapts in_proj_weight and out_proj, both by plain factors")
        return
    inner, outer = (update["lora"] for update in both if update is not None)
    if inner.r != outer.r or inner.scale * OUT_PROJ_TWICE != outer.scale:
        what = f"PEFT gives both projections one rank, and out_proj {OUT_PROJ_TWICE:g} times the scale"
        form.refuse(key, f"{what}; here {inner.r} at {inner.scale:g} and {outer.r} at {outer.scale:g}")
        return
    stem = above if leaf == "in_proj_weight" else f"{above}.base_layer.out_proj"
    part = adapter[key]["lora"]
    form.tensors |= {f"{stem}.lora_A.weight": part.lora_A, f"{stem}.lora_B.weight": part.lora_B}
    wrapped[module] = f"{stem}.base_layer"
    if leaf == "in_proj_weight":
        loras[above] = inner
        form.modules.append(above)


def _biases(adapter: Adapter, form: Form) -> None:
    """lora_bias holds for all modules: B's bias times the scale is added to the module's."""
    deltas = {key: update["delta"] for key, update in adapter.items() if "delta" in update}
    for key, part in deltas.items():
        module = key.removesuffix(".bias")
        owner = adapter.get(f"{module}.weight")
        if not key.endswith(".bias") or part.delta.ndim != 1 or owner is None or "lora" not in owner:
            form.refuse(key, "PEFT adds to a bias only beside the factors of its module's weight (lora_bias)")
        elif part.scale != owner["lora"].scale:
            form.refuse(
                key, f"PEFT has one scale for both; here {part.scale:g}, and {owner['lora'].scale:g} of the weight"
            )
        else:
            form.tensors[f"{module}.lora_B.bias"] = part.delta
    if deltas and not form.problems:
        for key in form.settings.get("target_parameters", []):
            form.refuse(key, "PEFT adapts no parameter by name beside lora_bias")
        for module in form.modules:
            if f"{module}.bias" not in deltas:
                form.refuse(f"{module}.weight", "lora_bias holds for every module, and this one has none")
        form.settings["lora_bias"] = True


def _magnitudes(adapter: Adapter, loras: Mapping[str, Lora], form: Form) -> None:
    """use_dora holds for all modules; a convolution's magnitude has the axes of its output."""
    if not any("magnitude" in update for update in adapter.values()):
        return
    form.settings["use_dora"] = True
    for module in loras:
        key = f"{module}.weight"
        update = adapter.get(key)
        if update is None or "magnitude" not in update:
            form.refuse(key if update is not None else module, "use_dora holds for every module, and this one has none")
    for key, update in adapter.items():
        if "magnitude" not in update:
            continue
        part, place = update["magnitude"], update.placement
        if "lora" not in update or part.eps or (part.magnitude_axes and place and part.magnitude_axes != place.out):
            form.refuse(key, "PEFT's magnitude stands beside factors, keeps the out axes and has no eps")
            continue
        axes = len(place.shape) if place is not None else 2
        sizes = (1, -1, *[1] * (axes - 2)) if axes > 2 else (-1,)
        form.tensors[f"{key.removesuffix('.weight')}.lora_magnitude_vector"] = part.magnitude.reshape(sizes)


def _tokens(adapter: Adapter, form: Form, kept: configs.Config | None) -> None:
    indices: dict[str, list[int]] = {}
    for key, update in adapter.items():
        if "rows" not in update or "lora" in update:
            continue
        if not key.endswith(".weight") or update["rows"].axis or update["rows"].values.ndim != 2:
            form.refuse(key, "PEFT trains the rows of an embedding's .weight")
            continue
        module = key.removesuffix(".weight")
        indices[module], values = token_order(module, update, kept)
        form.tensors[f"{module}.token_adapter.trainable_tokens_delta"] = values
    if indices:
        form.settings["trainable_token_indices"] = indices


def token_order(module: str, update: Update, kept: configs.Config | None) -> tuple[list[int], Array]:
    """(indices, rows) in the order of the kept configuration where it lists the same tokens, else ascending."""
    ascending = update["rows"].indices.tolist()
    stated = indices_of(module, kept.value) if kept else None
    if stated is None or sorted(map(str, stated)) != sorted(map(str, ascending)):
        return ascending, update["rows"].values
    return stated, update["rows"].values[np.searchsorted(update["rows"].indices, stated)]
