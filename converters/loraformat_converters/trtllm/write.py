"""Adapter → the two arrays of TensorRT-LLM, as its ``hf_lora_convert.py`` lays them out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, BinaryIO

import ml_dtypes
import numpy as np

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Output
from loraformat_converters.trtllm import CONFIG, MODULES, NAMES, STACKED, WEIGHTS

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.parts import Lora
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["write"]

_KEY = re.compile(r"layers\.(\d+)\.(\w+)")
_DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def write(adapter: Adapter) -> Output:
    """``model.lora_weights.npy`` and ``model.lora_config.npy`` of three columns, which old and new versions read.

    Raises:
        LoraFormatError: LF-508 with everything that TensorRT-LLM has no place for, and the way out.
    """
    if adapter.names != NAMES or adapter.components:
        raise fault("LF-508", f"TensorRT-LLM numbers its modules; here {adapter.names!r}", fix=f"retarget --to {NAMES}")
    problems: list[Problem] = []
    rows: list[tuple[list[int], Array]] = []
    for key, update in adapter.items():
        why, fix = _refusal(key, update)
        if why:
            problems.append(Problem("LF-508", why, key, fix))
            continue
        layer, module = _KEY.fullmatch(key).groups()  # type: ignore[union-attr]
        part = update["lora"]
        flat = np.concatenate([factor.reshape(-1) for factor in _for_each(part)])
        rows.append(([MODULES.index(module), int(layer), part.r], flat))
    dtypes = {flat.dtype for _, flat in rows}
    if not problems and (len(dtypes) > 1 or not dtypes <= set(map(np.dtype, _DTYPES))):
        what = f"one array of float32, float16 or bfloat16 holds all; here {', '.join(sorted(map(str, dtypes)))}"
        problems.append(Problem("LF-508", what, fix="--dtype float16"))
    if problems:
        raise LoraFormatError(problems)
    weights = np.zeros((1, len(rows), max(len(flat) for _, flat in rows)), rows[0][1].dtype)
    for i, (_, flat) in enumerate(rows):
        weights[0, i, : len(flat)] = flat
    table = np.array([[entry for entry, _ in rows]], np.int32)
    if weights.dtype == ml_dtypes.bfloat16:
        weights = weights.view("V2")

    def write_weights(file: BinaryIO) -> None:
        np.lib.format.write_array(file, weights, allow_pickle=False)

    def write_table(file: BinaryIO) -> None:
        np.lib.format.write_array(file, table, allow_pickle=False)

    return Output({WEIGHTS: write_weights, CONFIG: write_table}, folder=True)


def _refusal(key: str, update: Update) -> tuple[str, str]:
    """(why the target is not written, the way out), or empty."""
    match, place = _KEY.fullmatch(key), update.placement
    if match is None or match[2] not in MODULES or int(match[1]) >= 2**31:
        return "no module of a layer that TensorRT-LLM has a number for", ""
    stack = match[2] in STACKED
    if update.kind != "lora" or update["lora"].mid is not None or update["lora"].lora_A.ndim != 2 + stack:
        held = "one pair of three axes, of all experts" if stack else "one pair of two axes"
        return f"a {update.kind} update: TensorRT-LLM holds {held}", ""
    wanted = ((0,), (1,), (2,)) if stack else ((), (0,), (1,))
    if place is not None and (place.batch, place.out, place.in_) != wanted:
        return f"TensorRT-LLM adapts a Linear [out, in], no {place.spec} of {list(place.shape)}", ""
    if update["lora"].scale != 1.0:
        return f"TensorRT-LLM stores no scale, and here it is {update['lora'].scale:g}", "--fold-scale"
    return "", ""


def _for_each(part: Lora) -> list[Array]:
    """A and B; of experts one for each, where all share one."""
    batch = np.broadcast_shapes(part.lora_A.shape[:-2], part.lora_B.shape[:-2])
    return [np.broadcast_to(factor, (*batch, *factor.shape[-2:])) for factor in (part.lora_A, part.lora_B)]
