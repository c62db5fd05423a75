"""Adapter → litgpt: the factors of every module that litgpt adapts under its switches, by ``torch.save``.

litgpt's GPT makes pairs by switches: ``lora_query`` is the query of every layer, ``lora_mlp`` all of an MLP, and loads a
file only if it has each of them. What the adapter leaves out there is a pair of zeros, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Output, WriteOptions, text_file
from loraformat.pickled.write import write as write_torch
from loraformat.plain_yaml import scalars
from loraformat.scale import alpha_for
from loraformat_converters.litgpt import NAMES, is_adapted
from loraformat_converters.litgpt.complete import completed, joined
from loraformat_converters.litgpt.files import HYPER, MODEL, PARTS, hyperparameters, kept
from loraformat_converters.litgpt.fused import adapted, apart
from loraformat_converters.litgpt.heads import heads_of

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.parts import Lora
    from loraformat.updates import Update
    from loraformat_converters.litgpt.complete import Pairs

__all__ = ["TENSORS", "write"]

TENSORS = "lit_model.pth.lora"
_FIX = "give the model's config.json: --base config.json"


def write(adapter: Adapter, options: WriteOptions) -> Output:
    """``lit_model.pth.lora`` and ``hyperparameters.yaml``; ``model_config.yaml`` where the source had one.

    Raises:
        LoraFormatError: LF-508 with everything that litgpt has no place for.
    """
    if adapter.names != NAMES or adapter.components:
        fix = f"retarget --to {NAMES} --base config.json"
        raise fault("LF-508", f"litgpt has names of its own; here {adapter.names!r}", fix=fix)
    if problems := [p for key, update in adapter.items() if (p := _misfit(key, update)) is not None]:
        raise LoraFormatError(problems)
    texts = kept(adapter.extensions.get("litgpt"))
    source, model = scalars(texts.get(HYPER)), scalars(texts.get(MODEL)) or options.config
    parts = {key.removesuffix(".weight"): update["lora"] for key, update in adapter.items()}
    enabled = _enabled(parts, source, model)
    pairs = {module: _pairs(module, part, enabled, model) for module, part in parts.items()}
    warnings: list[Problem] = []
    pairs = completed(pairs, model, warnings)
    rank = max(a.shape[0] for blocks in pairs.values() for a, _ in blocks)
    numbers = _numbers(parts, pairs, enabled, rank)
    base = str(adapter.base_model.get("name") or source.get("checkpoint_dir") or "base")
    text = hyperparameters(numbers, texts.get(HYPER), base)
    tensors = joined(pairs, rank, warnings)
    if MODEL not in texts:
        what = "litgpt merges in a folder that has the base's model_config.yaml and tokenizer too: copy them into it"
        warnings.append(Problem("LF-508", what, severity="warning"))

    files = {name: text_file(kept) for name, kept in {**texts, HYPER: text}.items()}
    return Output({TENSORS: partial(write_torch, tensors=tensors, under="model"), **files}, True, warnings)


def _misfit(key: str, update: Update) -> Problem | None:
    """Why litgpt has no pair for this update."""
    place = update.placement
    if not key.endswith(".weight") or not is_adapted(key.removesuffix(".weight")):
        return Problem("LF-508", "litgpt adapts no such module", key)
    if update.kind != "lora" or update["lora"].mid is not None or update["lora"].lora_A.ndim != 2:
        return Problem("LF-508", f"a {update.kind} update: litgpt adapts a Linear by one pair of two axes", key)
    if place is not None and (place.out, place.in_) != ((0,), (1,)):
        return Problem("LF-508", f"the placement {place.spec}: litgpt's weights are [out, in]", key)
    return None


def _enabled(parts: Mapping[str, Lora], source: Mapping[str, Any], model: Mapping[str, Any]) -> list[bool]:
    """Which of query, key and value are adapted: by the source where it says enough, else those that change."""
    fused = {module: part for module, part in parts.items() if module.endswith(".qkv")}
    if not fused:
        return [False] * 3
    changed = [adapted(part.lora_B, _sizes(module, part, model)) for module, part in fused.items()]
    needed = [any(of) for of in zip(*changed, strict=True)]
    stated = [bool(source.get(name)) for name in PARTS]
    if any(stated) and all(on or not need for on, need in zip(stated, needed, strict=True)):
        return stated
    return needed if any(needed) else [True] * 3


def _sizes(module: str, part: Lora, model: Mapping[str, Any]) -> tuple[int, int, int]:
    """Rows of query, key and value."""
    heads, rows = heads_of(model), part.lora_B.shape[0]
    if heads is None:
        what = "query, key and value are one in litgpt, and how many rows each has is not known"
        raise fault("LF-508", what, where=module, fix=_FIX)
    if heads[0] + 2 * heads[1] != rows:
        raise fault("LF-508", f"{rows} rows are not those of {heads[0]} and twice {heads[1]}", where=module, fix=_FIX)
    return heads[0], heads[1], heads[1]


def _pairs(module: str, part: Lora, enabled: list[bool], model: Mapping[str, Any]) -> list[Any]:
    """The pair of a module, or of each part of a fused one."""
    if not module.endswith(".qkv"):
        return [(part.lora_A, part.lora_B)]
    return apart(part.lora_A, part.lora_B, _sizes(module, part, model), enabled)


def _numbers(parts: Mapping[str, Lora], pairs: Pairs, enabled: list[bool], rank: int) -> dict[str, Any]:
    """litgpt's switches, its one rank and its one alpha; LF-508 where the scales differ."""
    scales = sorted({part.scale for part in parts.values()})
    if len(scales) > 1:
        what = f"litgpt has one lora_alpha for all; here the scales are {scales[0]:g} to {scales[-1]:g}"
        raise fault("LF-508", what, fix="--fold-scale")
    alpha = alpha_for(scales[0], rank)
    return {
        "lora_r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        **dict(zip(PARTS, enabled, strict=True)),
        "lora_projection": any(module.endswith(".attn.proj") for module in pairs),
        "lora_mlp": any(".mlp." in module for module in pairs),
        "lora_head": "lm_head" in pairs,
    }
