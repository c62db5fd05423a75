"""``types.json``: for every PeftType of PEFT the adapter_config.json that its default configuration writes.

Run ``python make_types.py`` with the version of PEFT that the file names, and scikit-learn (for ADAMSS). No other setting than those without which
PEFT refuses to make the configuration.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

REQUIRED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "CPT": {"task_type": "CAUSAL_LM", "cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1]},
    "XLORA": {"hidden_size": 8, "adapters": {"0": "a"}},
}


def written(kind: str, make: Any) -> dict[str, Any]:
    """The configuration as it lies on disk."""
    with tempfile.TemporaryDirectory() as folder:
        make(**REQUIRED.get(kind, {})).save_pretrained(folder)
        text = (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
    return config


def main() -> None:
    """Write the file beside this one, and fail where a PeftType has no configuration."""
    kinds = sorted(kind.value for kind in peft.PeftType)
    configs = {kind: written(kind, PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]) for kind in kinds}
    out = Path(__file__).with_name("types.json")
    out.write_text(json.dumps({"peft": peft.__version__, "configs": configs}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
