"""What MaxText does to the query and the key of a checkpoint: a scale, and another order of rows.

MaxText (e591f30) folds 1 / √head_dim into the query of Llama, Mistral and Gemma 2, and turns neighbouring rows of q and
k against each other in Llama 3.1, where transformers turns a head's halves (checkpoint_conversion/utils/param_mapping.py
scale_query_layer, adjust_rope; standalone_scripts/llama_or_mistral_ckpt.py). An adapter's ΔW has to follow its W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import fault
from loraformat.naming.decoders import FIX, text_config
from loraformat_converters.flax.sizes import Sizes

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["of", "pairs_of_halves"]

_SCALED = {"llama": True, "mistral": True, "gemma2": True, "qwen2": False, "qwen3": False, "gemma3": False}
_SCALED |= {"gemma3_text": False}


def of(projection: str, config: Mapping[str, Any], key: str) -> tuple[npt.NDArray[np.intp] | None, float, str]:
    """(the row here of each row of torch's, what torch's ΔW is multiplied by, what says so), of ``q`` or ``k``.

    Raises:
        LoraFormatError: LF-604 the model is not known, or its heads.
    """
    own = text_config(config)
    model, sizes = own.get("model_type"), Sizes(config)
    if model not in _SCALED:
        what = f"MaxText scales and permutes q and k of some models, and model_type is {model!r}"
        raise fault("LF-604", what, where=key, fix=f"{FIX}; known are {', '.join(sorted(_SCALED))}")
    heads, size = sizes.one("heads" if projection == "q" else "kv"), sizes.one("head")
    paired = model == "llama" and _rope(own) == "llama3"
    if (_SCALED[model] or paired) and (heads is None or size is None or size % 2):
        raise fault("LF-604", f"config.json states {heads!r} heads of {size!r}", where=key, fix=FIX)
    rows = pairs_of_halves(heads, size) if paired and heads and size else None
    scale = 1 / math.sqrt(size) if _SCALED[model] and projection == "q" and size else 1.0
    return rows, scale, f"config: {model}"


def pairs_of_halves(heads: int, size: int) -> npt.NDArray[np.intp]:
    """For each row of torch's q or k the row of MaxText's: a head's halves are neighbours there.

    >>> pairs_of_halves(1, 6).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return np.arange(heads * size).reshape(heads, size // 2, 2).transpose(0, 2, 1).reshape(-1)


def _rope(config: Mapping[str, Any]) -> Any:
    """The kind of rotary embedding: transformers 5 has rope_parameters, 4 rope_scaling."""
    said = config.get("rope_parameters") or config.get("rope_scaling")
    return said.get("rope_type", said.get("type")) if isinstance(said, Mapping) else None
