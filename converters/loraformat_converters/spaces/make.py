"""Writes ``transformers.json``: the renamings by which transformers 5.23.0 loads files of older names.

    python converters/loraformat_converters/spaces/make.py

Only plain renamings are kept: what transformers also fuses, splits or transposes has other tensors, not other names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import __version__, conversion_mapping
from transformers.core_model_loading import WeightRenaming

OUT = Path(__file__).with_name("transformers.json")


def patterns(rule: Any) -> list[list[str]] | None:
    """(pattern, replacement) pairs of a renaming; None of another change."""
    if type(rule) is not WeightRenaming:  # its kinds rename some tensors only where they met others
        return None
    sources, targets = (
        [words] if isinstance(words, str) else list(words) for words in (rule.source_patterns, rule.target_patterns)
    )
    if len(targets) == 1:
        targets *= len(sources)
    return [list(pair) for pair in zip(sources, targets, strict=True)]


def main() -> None:
    """For every model type or class a list of rules, each a list of alternatives; each list stands there once."""
    tables: Any = conversion_mapping
    lists: list[list[list[list[str]]]] = []
    of: dict[str, int] = {}
    for name, rules in sorted(tables._build_checkpoint_conversion_mapping().items()):
        kept = [pairs for rule in rules if (pairs := patterns(rule))]
        if kept:
            if kept not in lists:
                lists.append(kept)
            of[name] = lists.index(kept)
    text = json.dumps({"transformers": __version__, "of": of, "rules": lists}, ensure_ascii=False)
    OUT.write_text(text.replace("]]], [[[", "]]],\n[[[") + "\n", encoding="utf-8")
    print(f"{OUT.name}: {len(of)} models, {sum(map(len, lists))} rules, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
