"""The two YAML files beside litgpt's factors: what is asked of them, and the one that is written.

litgpt 0.5.13 scripts/merge_lora.py: ``hyperparameters.yaml`` has the arguments of the training run, of which a merge takes
``lora_…`` and ``checkpoint_dir``; ``model_config.yaml`` is the model's and lies beside its weights too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loraformat import canonical
from loraformat.errors import fault
from loraformat.plain_yaml import scalars

__all__ = ["HYPER", "MODEL", "PARTS", "hyperparameters", "kept"]

HYPER, MODEL = "hyperparameters.yaml", "model_config.yaml"
PARTS = ("lora_query", "lora_key", "lora_value")


def kept(text: str | None) -> dict[str, str]:
    """The texts that a reader kept, by the names of their files; LF-508 where a stranger changed them."""
    try:
        value = canonical.loads(text) if text is not None else {}
    except ValueError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(held, str) for held in value.values()):
        raise fault("LF-508", "the kept files of litgpt are damaged", where="extensions: litgpt")
    return {name: value[name] for name in (HYPER, MODEL) if name in value}


def hyperparameters(numbers: Mapping[str, Any], source: str | None, base: str) -> str:
    """The text that states these ``lora_…``: the source's own where it does, else a new one, for the model at ``base``."""
    told = scalars(source)
    if source is not None and all(told.get(name, False) == value for name, value in numbers.items()):
        return source
    dropout = told.get("lora_dropout", 0.0)
    lines = {"checkpoint_dir": base, "lora_dropout": dropout, **numbers}
    return "".join(f"{name}: {json.dumps(lines[name])}\n" for name in sorted(lines))
