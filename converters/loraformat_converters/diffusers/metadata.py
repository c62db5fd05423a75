"""The header's ``lora_adapter_metadata``: PEFT's LoraConfig as JSON, of each component behind its name.

diffusers 0.42.1 loaders/lora_base.py: ``{"unet.r": 4, "unet.lora_alpha": 6, …}``; of a single model without the prefix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from loraformat import canonical
from loraformat.errors import Problem, fault
from loraformat_converters.diffusers.spelling import KEY
from loraformat_converters.peft import config as configs

__all__ = ["KEY", "of_tensors", "parse", "text"]


def parse(said: str, components: Iterable[str | None]) -> tuple[dict[str | None, configs.Config], list[Problem]]:
    """The configuration of each component that has one, and what its reader warns of.

    Raises:
        LoraFormatError: LF-503 it cannot be read, or speaks of no component; LF-504 see ``peft.config``.
    """
    try:
        value = json.loads(said, parse_constant=canonical.no_constant)
    except (ValueError, RecursionError) as error:
        raise fault("LF-503", f"not valid JSON: {error or 'nested too deeply'}", where=KEY) from None
    if not isinstance(value, dict):
        raise fault("LF-503", "not a JSON object", where=KEY)
    found: dict[str | None, configs.Config] = {}
    warnings: list[Problem] = []
    used: set[str] = set()
    for component in components:
        prefix = f"{component}." if component else ""
        own = {key.removeprefix(prefix): item for key, item in value.items() if key.startswith(prefix)}
        used |= {f"{prefix}{key}" for key in own}
        if own:
            told = json.dumps({"peft_type": "LORA", **own})
            found[component], more = configs.parse(told, f"{KEY} of {component}" if component else KEY)
            warnings += more
    if value and not found:
        raise fault("LF-503", f"speaks of none of the file's components: {', '.join(list(value)[:3])}", where=KEY)
    idle = sorted({key.partition(".")[0] for key in value.keys() - used})
    warnings += [Problem("LF-505", f"{KEY} speaks of {k}, which has no tensors", k, severity="warning") for k in idle]
    return found, warnings


def of_tensors(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, dora: bool = False, biased: bool = False
) -> configs.Config:
    """The configuration that the tensors alone are: alphas as stored, or, without any, what diffusers takes: the rank."""
    patterns = {f"^{re.escape(module)}": module for module in ranks}
    value: dict[str, Any] = {
        "peft_type": "LORA",
        "r": next(iter(ranks.values())),
        "lora_alpha": next(iter((alphas or ranks).values())),
        "rank_pattern": {pattern: ranks[module] for pattern, module in patterns.items()},
        "alpha_pattern": {pattern: (alphas or ranks)[module] for pattern, module in patterns.items()},
        "use_dora": dora,
        "lora_bias": biased,
    }
    return configs.parse(json.dumps(value))[0]


def text(settings: Mapping[str | None, Mapping[str, Any]]) -> str:
    """What the header says of these components, spelt as diffusers does."""
    flat = {f"{c}.{key}" if c else key: item for c, own in settings.items() for key, item in own.items()}
    return json.dumps(flat, indent=2, sort_keys=True)
