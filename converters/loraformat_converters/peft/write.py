"""Adapter → PEFT: tensors under PEFT's names, and the configuration under which PEFT computes the same ΔW."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from loraformat import container
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Output
from loraformat.parts import Lora
from loraformat.scale import ScaleRule, scale_of
from loraformat_converters.peft import config as configs
from loraformat_converters.peft.read import PREFIX

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["write"]

# What of a source's configuration still holds when its numbers or targets do not: notes, and no choice of modules or
# of an initialisation, by which PEFT would skip a target or fill it at random.
_NOTES = (
    *("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode"),
    *("lora_dropout", "revision", "task_type"),
)


def write(adapter: Adapter) -> Output:
    """``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        LoraFormatError: LF-508 with every target that PEFT cannot hold.
    """
    problems = [p for key, update in adapter.items() if (p := _obstacle(key, update))]
    if adapter.names != "torch" or adapter.components:
        what = f"names are in the space {adapter.names!r}" if adapter.names != "torch" else "the model has components"
        problems.insert(0, Problem("LF-508", f"PEFT names torch modules of one model; here {what}"))
    if problems:
        raise LoraFormatError(problems)
    tensors: dict[str, Array] = {}
    for key, update in adapter.items():
        tensors |= _tensors(key.removesuffix(".weight"), update)
    text = json.dumps(_config(adapter), indent=2, sort_keys=True).encode()

    def write_tensors(file: BinaryIO) -> None:
        container.write(file, tensors, {"format": "pt"})

    def write_config(file: BinaryIO) -> None:
        file.write(text)

    return Output({"adapter_model.safetensors": write_tensors, configs.FILE: write_config}, folder=True)


def _obstacle(key: str, update: Update) -> Problem | None:
    """Why PEFT cannot hold this target, or None."""
    if not key.endswith(".weight"):
        return Problem("LF-508", "PEFT adapts modules with a .weight", key)
    if update.kind != "lora" or update["lora"].mid is not None or update["lora"].lora_A.ndim != 2:
        return Problem("LF-508", f"a {update.kind} update with these tensors is not written to PEFT yet", key)
    place = update.placement
    if place is None or len(place.shape) == 2:
        return None
    if place.out != (0,) or place.in_ != tuple(range(1, len(place.shape))):
        fix = "PEFT adapts torch convolutions [out, in, *kernel]"
        return Problem("LF-508", f"the placement {place.spec} of {list(place.shape)} is no torch module's", key, fix)
    return None


def _tensors(module: str, update: Update) -> dict[str, Array]:
    a, b = update["lora"].lora_A, update["lora"].lora_B
    stem = f"{PREFIX}{module}"
    if update.op == "embedding":
        return {f"{stem}.lora_embedding_A": a, f"{stem}.lora_embedding_B": b}
    if update.placement is not None and len(update.placement.shape) > 2:
        kernel = update.placement.shape[1:]
        a, b = a.reshape(a.shape[0], *kernel), b.reshape(*b.shape, *[1] * (len(kernel) - 1))
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}


def _config(adapter: Adapter) -> dict[str, Any]:
    """The source's own configuration where it still states the model's ranks and alphas; else those of the model."""
    modules = {key.removesuffix(".weight"): update["lora"] for key, update in adapter.items()}
    kept = _kept(adapter.extensions.get("peft"))
    if kept is not None and _states(kept, modules):
        return dict(kept.value)
    rules: set[ScaleRule] = {lora.scale_rule for lora in modules.values()}
    rule: ScaleRule = "alpha/sqrt(r)" if rules == {"alpha/sqrt(r)"} else "alpha/r"
    ranks = {module: lora.r for module, lora in modules.items()}
    alphas = {module: _alpha(lora, rule) for module, lora in modules.items()}
    if endless := [module for module, alpha in alphas.items() if not math.isfinite(alpha)]:
        what = f"a scale of {modules[endless[0]].scale} needs an alpha beyond float64"
        raise fault("LF-508", what, where=f"{endless[0]}.weight")
    r, rank_pattern = _usual(ranks)
    alpha, alpha_pattern = _usual(alphas)
    notes = {name: kept.value[name] for name in _NOTES if name in kept.value} if kept else {}
    return {
        "base_model_name_or_path": adapter.base_model.get("name"),
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
        **notes,
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": rule == "alpha/sqrt(r)",
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": _targets(sorted(modules)),
    }


def _targets(modules: list[str]) -> list[str] | str:
    """The list of paths, as PEFT writes it; a regular expression where a path has one component only.

    PEFT takes a listed ``proj`` for every ``….proj`` of the base, and says nothing of those that it adds.
    """
    if all("." in module for module in modules):
        return modules
    return "|".join(map(re.escape, modules))


def _kept(text: str | None) -> configs.Config | None:
    if text is None:
        return None
    try:
        return configs.parse(text)[0]
    except LoraFormatError as error:
        raise fault("LF-508", f"the kept PEFT configuration is damaged: {error.problems[0].what}") from None


def _states(config: configs.Config, modules: Mapping[str, Lora]) -> bool:
    """Whether PEFT would read the model's own numbers out of this configuration."""
    return all(
        config.rank(module) == lora.r
        and config.alpha(module) == lora.alpha
        and config.rule == lora.scale_rule
        and configs.targets_match(config.value.get("target_modules"), module)
        for module, lora in modules.items()
    )


def _alpha(lora: Lora, rule: ScaleRule) -> float:
    """The alpha that gives ``lora.scale`` under ``rule``, to the last bit where a double can."""
    if lora.scale_rule == rule:
        return lora.alpha
    alpha = lora.scale * (lora.r if rule == "alpha/r" else math.sqrt(lora.r))
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in near if scale_of(a, rule, lora.r) == lora.scale), alpha)


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the commonest value, a pattern for every other module that means this module alone)."""
    usual = Counter(values.values()).most_common(1)[0][0]
    rest = {f"^{re.escape(module)}": value for module, value in values.items() if value != usual}
    return _plain(usual), {pattern: _plain(value) for pattern, value in rest.items()}


def _plain(value: Any) -> Any:
    """An integral alpha as the integer that PEFT's dataclass declares."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
