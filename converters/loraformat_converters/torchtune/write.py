"""Adapter → torchtune: the tensors that its checkpointers load, and a configuration that states the scale."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Output, WriteOptions, tensors_file, text_file
from loraformat.scale import alpha_for
from loraformat_converters.torchtune import NAMES
from loraformat_converters.torchtune.read import CONFIG

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["write"]


def write(adapter: Adapter, options: WriteOptions) -> Output:
    """``adapter_model.safetensors`` and ``adapter_config.json``.

    A recipe builds all layers with one ``lora_rank`` and one ``lora_alpha``, so that an adapter has one of each.

    Raises:
        LoraFormatError: LF-508 with everything that torchtune has no place for.
    """
    if adapter.names != NAMES or adapter.components:
        what = f"torchtune has names of its own, and rows of q and k in its own order; here {adapter.names!r}"
        raise fault("LF-508", what, fix=f"retarget --to {NAMES}")
    tensors: dict[str, Array] = {}
    problems = [problem for key, update in adapter.items() if (problem := _put(key, update, tensors)) is not None]
    doras = {"magnitude" in update for update in adapter.values()}
    if not problems and len(doras) > 1:
        problems.append(Problem("LF-508", "use_dora holds for every module, and some have no magnitude"))
    if problems:
        raise LoraFormatError(problems)
    rank, alpha = _numbers(adapter)
    modules = sorted({key.split(".")[-2] for key in adapter})
    config = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
    kept = adapter.extensions.get("torchtune")
    text = kept if kept is not None and _says(kept, rank, alpha) else json.dumps(config)

    files = {"adapter_model.safetensors": tensors_file(tensors, {"format": "pt"}), CONFIG: text_file(text)}
    return Output(files, folder=True)


def _put(key: str, update: Update, tensors: dict[str, Array]) -> Problem | None:
    module, place = key.removesuffix(".weight"), update.placement
    if not key.endswith(".weight") or update.kind not in ("lora", "dora"):
        return Problem("LF-508", f"a {update.kind} update of this parameter: torchtune adapts Linears by pairs", key)
    part = update["lora"]
    if part.mid is not None or part.lora_A.ndim != 2 or (place is not None and (place.out, place.in_) != ((0,), (1,))):
        return Problem("LF-508", "torchtune adapts a Linear [out, in] by one pair of two axes", key)
    tensors[f"{module}.lora_a.weight"], tensors[f"{module}.lora_b.weight"] = part.lora_A, part.lora_B
    if "magnitude" in update:
        magnitude = update["magnitude"]
        if magnitude.eps or magnitude.magnitude_axes not in (None, (0,)):
            return Problem("LF-508", "torchtune's magnitude keeps the out axis and has no eps", key)
        tensors[f"{module}.magnitude"] = magnitude.magnitude
    return None


def _numbers(adapter: Adapter) -> tuple[int, float]:
    """The one rank and the one alpha under alpha/r; LF-508 where there are several."""
    parts = [update["lora"] for update in adapter.values()]
    ranks, scales = sorted({part.r for part in parts}), sorted({part.scale for part in parts})
    problems = []
    if len(ranks) > 1:
        what = f"torchtune builds all layers with one lora_rank; here {', '.join(map(str, ranks))}"
        problems.append(Problem("LF-508", what, fix="--pad-rank"))
    if len(scales) > 1:
        what = f"torchtune builds all layers with one lora_alpha; here the scales are {scales[0]:g} to {scales[-1]:g}"
        problems.append(Problem("LF-508", what, fix="--fold-scale"))
    if problems:
        raise LoraFormatError(problems)
    stated = {part.alpha for part in parts if part.scale_rule == "alpha/r"}
    alpha = stated.pop() if len(stated) == 1 else alpha_for(scales[0], ranks[0])
    return ranks[0], int(alpha) if float(alpha).is_integer() else alpha


def _says(text: str, rank: int, alpha: float) -> bool:
    """Whether a kept configuration, which has no peft_type, states these numbers."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and (value.get("r"), value.get("lora_alpha")) == (rank, alpha)
        and "peft_type" not in value
    )
