"""Writes ``transformers.json``: how transformers 5.23.0 turns the tensors of older files into those of its models.

    python converters/loraformat_converters/spaces/make.py

Kept are plain renamings, and of its conversions those that only divide, join or stack rows. What it also transposes,
permutes or interleaves has no such link here, and a target that needs one is refused for want of a name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import __version__, conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, WeightConverter, WeightRenaming

OUT = Path(__file__).with_name("transformers.json")


def patterns(rule: Any) -> list[list[str]] | None:
    """(pattern, replacement) pairs of a renaming; None of another change."""
    if type(rule) is not WeightRenaming:  # its kinds rename some tensors only where they met others
        return None
    sources, targets = words(rule)
    if len(targets) == 1:
        targets *= len(sources)
    return [list(pair) for pair in zip(sources, targets, strict=True)]


def words(rule: Any) -> tuple[list[str], list[str]]:
    """Its patterns and its replacements."""
    sources, targets = ([w] if isinstance(w, str) else list(w) for w in (rule.source_patterns, rule.target_patterns))
    return sources, targets


def conversion(rule: Any) -> list[Any] | None:
    """[kind, patterns, replacements]: rows of one tensor in several, of several in one, matrices of a list in a stack."""
    if type(rule) is not WeightConverter:
        return None
    said = [(type(op), getattr(op, "dim", None), getattr(op, "num_shards_attribute", None)) for op in rule.operations]
    sources, targets = words(rule)
    if said == [(Chunk, 0, None)] and len(sources) == 1:
        kind = "split"
    elif said == [(Concatenate, 0, None)] and len(targets) == 1:
        kind = "join"
    elif said in ([(MergeModulelist, 0, None)], [(MergeModulelist, 0, None), (Concatenate, 1, None)]):
        kind = "stack"
    else:
        return None
    found = [pattern(source) for source in sources]
    if any("\\1" in target for target in targets) or any(re.compile(p).groups != (kind == "stack") for p in found):
        return None
    return [kind, found, targets]


def pattern(source: str) -> str:
    """As transformers compiles it: a star is a number, and the end is that of a word (WeightTransform.__init__)."""
    found = source.replace("*", r"(\d+)")
    return found + r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", source) else found


def main() -> None:
    """For every model type or class the renamings, each a list of alternatives, and the conversions; each list once."""
    tables: Any = conversion_mapping
    lists: list[dict[str, list[Any]]] = []
    of: dict[str, int] = {}
    for name, rules in sorted(tables._build_checkpoint_conversion_mapping().items()):
        renamed = [pairs for rule in rules if (pairs := patterns(rule))]
        converted = [found for rule in rules if (found := conversion(rule))]
        entry = {"rename": renamed, "convert": converted}
        if renamed or converted:
            if entry not in lists:
                lists.append(entry)
            of[name] = lists.index(entry)
    text = json.dumps({"transformers": __version__, "of": of, "rules": lists}, ensure_ascii=False)
    OUT.write_text(text.replace('}, {"rename"', '},\n{"rename"') + "\n", encoding="utf-8")
    counts = (sum(len(entry[kind]) for entry in lists) for kind in ("rename", "convert"))
    print(f"{OUT.name}: {len(of)} models, {next(counts)} + {next(counts)} rules, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
