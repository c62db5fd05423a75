"""TensorRT-LLM → Adapter, in its own names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from loraformat.axes import Placement
from loraformat.errors import fault
from loraformat.layout import Reading, ReadOptions
from loraformat.loose import Loose
from loraformat.parts import Lora
from loraformat_converters.trtllm import CONFIG, MODULES, NAMES, WEIGHTS
from loraformat_converters.trtllm.sizes import sides

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.source import Source

    Array = npt.NDArray[Any]

__all__ = ["read"]


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter; its scale is 1, for it was multiplied into B.

    Raises:
        LoraFormatError: LF-309 a row does not hold a pair of these sizes; LF-504 a magnitude, a module without a number, or
            sizes that nothing states; LF-603 a module of a layer twice; LF-701 an array that cannot be read.
    """
    weights, table = _arrays(source.folder)
    draft = Loose(options, "TensorRT-LLM")
    draft.alpha, draft.rule = 1.0, "factor"
    known, seen = sides(options.config), set[str]()
    for row, entry in zip(weights, table.tolist(), strict=True):
        number, layer, r, *dora = entry
        where = f"module {number} of layer {layer}"
        if not 0 <= number < len(MODULES) or layer < 0 or r < 1:
            draft.say("LF-504", f"no module of TensorRT-LLM has this number, or the rank {r} is none", where)
            continue
        key = f"layers.{layer}.{MODULES[number]}"
        if any(dora):
            draft.say(
                "LF-504", "a magnitude that was divided by the norms of one base: no change of a weight says that", key
            )
        elif key in seen:
            draft.say("LF-603", "two rows for one module of one layer", key)
        else:
            _add(key, MODULES[number], row, r, known, draft)
        seen.add(key)
    return Reading(draft.finish(str(source.path), names=NAMES), draft.warnings)


def _add(key: str, module: str, row: Array, r: int, known: Mapping[str, tuple[int, ...]], draft: Loose) -> None:
    if module not in known:
        what = "no file says how wide the module is on either side"
        draft.say("LF-504", what, key, "give the model's sizes: --base DIR, or --base config.json")
        return
    *batch, out, in_ = known[module]
    cut, end = (r * math.prod((*batch, side)) for side in (in_, out + in_))
    if end > len(row) or row[end:].any():
        what = f"a row of {len(row)} values, of which the last that is not zero is {_last(row)}, is no pair of rank {r}"
        each = "".join(f", for each of {count} experts" for count in batch)
        draft.say(
            "LF-309", f"{what} between {in_} and {out}{each}", key, "is this the model that the adapter was made for?"
        )
        return
    if (scale := draft.scale(key, r)) is not None:
        a, b = row[:cut].reshape(*batch, r, in_), row[cut:end].reshape(*batch, out, r)
        stack = len(batch)
        place = Placement((*batch, out, in_), (stack,), (stack + 1,), tuple(range(stack)))
        draft.add(key, Lora(a, b, *scale), place)


def _last(row: Array) -> int:
    return int(np.flatnonzero(row)[-1]) if row.any() else -1


def _arrays(folder: Path) -> tuple[Array, Array]:
    """(weights [modules, longest], table [modules, 3 or 4]); LF-701 where they are no such arrays."""
    try:
        weights, table = (np.lib.format.open_memmap(folder / name, mode="r") for name in (WEIGHTS, CONFIG))
    except Exception as error:  # a damaged header ends in whatever Python's own tokenizer and parser raise (numpy 2.4)
        raise fault("LF-701", f"cannot read {folder}: {error}") from None
    if weights.dtype == np.dtype("V2"):  # numpy has no bfloat16, and TensorRT-LLM writes two bytes without a type
        weights = weights.view(ml_dtypes.bfloat16)
    floats = (np.float32, np.float16, ml_dtypes.bfloat16)
    shaped = weights.ndim == table.ndim == 3 and weights.shape[:2] == table.shape[:2] and weights.shape[0] == 1
    if not shaped or table.shape[2] not in (3, 4) or table.dtype != np.int32 or weights.dtype not in floats:
        what = f"{WEIGHTS} is {weights.dtype} {list(weights.shape)}, {CONFIG} {table.dtype} {list(table.shape)}"
        raise fault("LF-701", f"{what}; floats [1, modules, longest] and int32 [1, modules, 3 or 4] are expected")
    return np.asarray(weights[0]), np.asarray(table[0])
