"""The small files of a folder that say something else after a merge: its configuration, and the index of its shards."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from loraformat.checkpoint.merging import Merge
from loraformat.dtypes import DTYPES

__all__ = ["texts"]


def texts(merge: Merge, config: Mapping[str, Any]) -> dict[str, bytes]:
    """File → what it says then; ``config`` is what ``config.json`` said before."""
    found: dict[str, bytes] = {}
    if merge.config != config:
        found["config.json"] = _text(merge.config)
    index = _index(merge)
    if index is not None and merge.files.index is not None:
        found[merge.files.index[0]] = _text(index)
    return found


def _index(merge: Merge) -> dict[str, Any] | None:
    """The index with added tensors and new sums; None where it stays true as it is."""
    if merge.files.index is None:
        return None
    grown: dict[str, tuple[int, int]] = {}
    for name, change in merge.changes.items():
        nbytes, count = _before(merge, name)
        grown[name] = change.nbytes - nbytes, math.prod(change.shape) - count
    if not any(map(any, grown.values())):
        return None
    index = dict(merge.files.index[1])
    homes = {**index["weight_map"], **{name: merge.home(name) for name in merge.changes}}
    sums = index.get("metadata")
    sums = dict(sums) if isinstance(sums, dict) else {}
    for name, more in (("total_size", 0), ("total_parameters", 1)):
        if isinstance(sums.get(name), int):
            sums[name] += sum(pair[more] for pair in grown.values())
    return {**index, "metadata": sums, "weight_map": dict(sorted(homes.items()))}


def _before(merge: Merge, name: str) -> tuple[int, int]:
    """The bytes and the values of a tensor as it is stored; none of one that is added."""
    info = merge.files.shards[merge.home(name)].infos.get(name)
    if info is None:
        return 0, 0
    count = math.prod(info.shape)
    return DTYPES[info.dtype] * count, count


def _text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
