"""Writes ``transformers.json``: how transformers 5.23.0 turns the tensors of older files into those of its models.

    python converters/loraformat_converters/spaces/make.py

Kept are plain renamings, and the conversions that divide, join, stack, reorder or transpose. A target that needs another
one (the shards of an n-gram embedding, as many as the model's settings say) is refused for want of a name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import __version__, conversion_mapping
from transformers import core_model_loading as core
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

OUT = Path(__file__).with_name("transformers.json")


def patterns(rule: Any) -> list[list[str]] | None:
    """(pattern, replacement) pairs of a renaming; None of another change."""
    # A group renames only where it met the older one of two names that it gives: a base has the older ones or the newer.
    if type(rule) not in (WeightRenaming, core.GroupWeightRename, core.PrefixChange):
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
    """[kind, patterns, replacements, the order of rows where it changes]; None of what has no links."""
    if type(rule) is not WeightConverter:
        return None
    sources, targets = words(rule)
    kind, *order = said(rule, targets)
    if (kind in ("split", "divide", "transpose") and len(sources) > 1) or (
        kind in ("join", "transpose") and len(targets) > 1
    ):
        return None
    found = [pattern(source) for source in sources]
    if not kind or any("\\1" in target for target in targets):
        return None
    if any(re.compile(p).groups != (kind == "stack") for p in found):
        return None
    return [kind, found, targets, *order]


def said(rule: Any, targets: list[str]) -> tuple[Any, ...]:
    """What the operations do, and to the order of rows; nothing where it is no such thing.

    An axis is that of rows: 0, or behind the experts of a stack 1. Of ``Transpose(check_dims=True)``, which leaves what has
    the model's own shape, the shapes say whether it was done.
    """
    match [(type(op), op) for op in rule.operations]:
        case [(core.Chunk | core.Concatenate, op)] if op.num_shards_attribute is None and op.dim in (0, 1):
            return ("split" if isinstance(op, core.Chunk) else "join",)
        case [(core.Split, op)] if op.dim == 0:
            return ("divide",)
        case [(core.MergeModulelist, op)] if op.dim == 0:
            return ("stack",)
        case [(core.MergeModulelist, op), (core.Concatenate, then)] if (op.dim, then.dim) == (0, 1):
            return ("stack",)
        case [(core.ErnieFuseAndSplitTextVisionExperts, op)] if (op.stack_dim, op.concat_dim) == (0, 1):
            return ("stack",)
        case [(core.Interleave, op)] if not op.inverse:
            return ("split", ["interleaved"])
        case [(core.Interleave, op), (core.Chunk, then)] if not op.inverse and op.dim == then.dim:
            return ("split", ["interleaved"])
        case [*_, (core.PermuteForRope, op)] if not op.inverse and rotates(rule.operations[:-1]):
            names = op.permute_layer_names
            only = [i for i, target in enumerate(targets) if names is None or any(name in target for name in names)]
            return ("split", ["rotary", op.subconfig_key, only])
        case [(core.Transpose, op)] if not op.check_dims and (op.dim0, op.dim1) in ((0, 1), (1, 2)):
            return ("transpose",)
    return ("",)


def rotates(before: list[Any]) -> bool:
    """Whether what is done before a rotation's order is nothing, or a division of rows."""
    return not before or [(type(op), op.dim) for op in before] == [(core.Chunk, 0)]


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
    for kind, classes in MODEL_MAPPING_NAMES.items():  # a model inside another is known by its type alone
        for name in [classes] if isinstance(classes, str) else classes:
            if name in of:
                of.setdefault(kind, of[name])
    text = json.dumps({"transformers": __version__, "of": of, "rules": lists}, ensure_ascii=False)
    OUT.write_text(text.replace('}, {"rename"', '},\n{"rename"') + "\n", encoding="utf-8")
    counts = (sum(len(entry[kind]) for entry in lists) for kind in ("rename", "convert"))
    print(f"{OUT.name}: {len(of)} models, {next(counts)} + {next(counts)} rules, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
