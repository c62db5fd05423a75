"""Adapter → Tinker: a folder that tinker-cookbook merges into a base, or exports to PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Output, tensors_file, text_file
from loraformat.scale import alpha_for
from loraformat_converters.tinker import NAMES, is_stack
from loraformat_converters.tinker.read import CONFIG, PREFIX

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.parts import Lora
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["write"]


def write(adapter: Adapter) -> Output:
    """``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        LoraFormatError: LF-508 with everything that Tinker has no place for.
    """
    if adapter.names != NAMES or adapter.components:
        fix = f"retarget --to {NAMES} --base config.json"
        raise fault("LF-508", f"Tinker has names of its own; here {adapter.names!r}", fix=fix)
    if problems := [p for key, update in adapter.items() if (p := _misfit(key, update)) is not None]:
        raise LoraFormatError(problems)
    parts: dict[str, Lora] = {key.removesuffix(".weight"): update["lora"] for key, update in adapter.items()}
    text = _config(parts, adapter)
    tensors: dict[str, Array] = {}
    for module, part in parts.items():
        a, b = part.lora_A, _for_each(part, adapter[f"{module}.weight"])
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}

    files = {"adapter_model.safetensors": tensors_file(tensors, {"format": "pt"}), CONFIG: text_file(text)}
    return Output(files, folder=True)


def _misfit(key: str, update: Update) -> Problem | None:
    """Why Tinker has no pair for this update."""
    if update.kind != "lora" or update["lora"].mid is not None or not key.endswith(".weight"):
        return Problem("LF-508", f"a {update.kind} update of this parameter: Tinker adapts Linears by pairs", key)
    axes, stack = update["lora"].lora_A.ndim, is_stack(key.removesuffix(".weight"))
    if axes != (3 if stack else 2):
        return Problem(
            "LF-508", f"factors of {axes} axes: Tinker stacks experts, under w1, w2, w3, and they alone", key
        )
    place = update.placement
    if place is not None and (place.batch, place.out, place.in_) != (((0,), (1,), (2,)) if stack else ((), (0,), (1,))):
        return Problem("LF-508", f"the placement {place.spec}: Tinker's are {'batch,' * stack}out,in", key)
    return None


def _for_each(part: Lora, update: Update) -> Array:
    """B; where both factors are shared by all experts, once for each, or no tensor would say how many there are."""
    place = update.placement
    if part.lora_A.ndim == 2 or max(part.lora_A.shape[0], part.lora_B.shape[0]) > 1 or place is None:
        return part.lora_B
    return np.broadcast_to(part.lora_B, (place.shape[0], *part.lora_B.shape[1:]))


def _config(parts: Mapping[str, Lora], adapter: Adapter) -> str:
    """The source's own text where it says the same; LF-508 where ranks or scales differ: Tinker has one of each."""
    ranks, scales = sorted({p.r for p in parts.values()}), sorted({p.scale for p in parts.values()})
    problems = []
    if len(ranks) > 1:
        problems.append(
            Problem("LF-508", f"Tinker has one r for all; here {', '.join(map(str, ranks))}", fix="--pad-rank")
        )
    if len(scales) > 1:
        what = f"Tinker has one lora_alpha for all; here the scales are {scales[0]:g} to {scales[-1]:g}"
        problems.append(Problem("LF-508", what, fix="--fold-scale"))
    if problems:
        raise LoraFormatError(problems)
    alpha = alpha_for(scales[0], ranks[0])
    config = {
        "base_model_name_or_path": adapter.base_model.get("name"),
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "peft_type": "LORA",
        "r": ranks[0],
        "target_modules": "all-linear",
    }
    kept = adapter.extensions.get("tinker")
    return kept if kept is not None and _says(kept, config) else json.dumps(config, indent=2)


def _says(text: str, config: Mapping[str, Any]) -> bool:
    """Whether a kept configuration states these numbers."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and all(value.get(name) == config[name] for name in ("r", "lora_alpha"))
