"""What a base is, as data for ``info``: the fields that every kind of base gives, and those of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.dtypes import DTYPES

if TYPE_CHECKING:
    from loraformat.base import Parameter

__all__ = ["describe_checkpoint", "dtype_table"]

# What a head's weight goes by where it is stored at all (transformers 5.23, _tied_weights_keys of the text models).
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


def describe_checkpoint(
    stored: Mapping[str, Parameter],
    config: Mapping[str, Any],
    files: Sequence[Path],
    ties: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """kind, architectures, model_type, tensors, parameters, bytes, dtypes, tied, stored_head, ties, files.

    ``tied`` is what the configuration says of input and output embeddings, and null where it says nothing; a head that
    is stored although it says so is named in ``stored_head``. ``ties``: a name that is not stored → what it means.
    """
    tied = config.get("tie_word_embeddings")
    architectures = config.get("architectures")
    return {
        "kind": "checkpoint",
        "architectures": architectures if isinstance(architectures, list) else [],
        "model_type": config.get("model_type"),
        "tensors": len(stored),
        "parameters": sum(math.prod(p.shape) for p in stored.values()),
        "bytes": sum(_nbytes(p) for p in stored.values()),
        "dtypes": dtype_table(stored.values()),
        "tied": tied if isinstance(tied, bool) else None,
        "stored_head": next((name for name in _HEADS if name in stored), None),
        "ties": dict(ties or {}),
        "files": [{"file": path.name, "bytes": path.stat().st_size} for path in files],
    }


def dtype_table(parameters: Iterable[Parameter]) -> dict[str, dict[str, int]]:
    """dtype → how many tensors, values and bytes, the most bytes first."""
    table: dict[str, dict[str, int]] = {}
    for parameter in parameters:
        row = table.setdefault(parameter.dtype, {"tensors": 0, "values": 0, "bytes": 0})
        row["tensors"] += 1
        row["values"] += math.prod(parameter.shape)
        row["bytes"] += _nbytes(parameter)
    return dict(sorted(table.items(), key=lambda item: -item[1]["bytes"]))


def _nbytes(parameter: Parameter) -> int:
    return math.prod(parameter.shape) * DTYPES.get(parameter.dtype, 0)
