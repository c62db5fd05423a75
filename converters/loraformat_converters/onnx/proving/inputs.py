"""Inputs for a model that nobody gave any: sizes for its symbols, small integers for its tables, normal floats."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from loraformat.errors import fault
from loraformat_converters.onnx.graph.index import Index

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["generated", "stated"]

_PASSING = frozenset({"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Flatten", "Concat", "Slice"})
"""Operators that hand an index on as it is."""


def generated(model: onnx.ModelProto, index: Index, folder: Path) -> dict[str, Array]:
    """Values for every input that has no default; the same symbol has one size, different symbols different sizes.

    Args:
        folder: where the model lies; what onnxruntime-genai builds says there how large its symbols are.

    Raises:
        LoraFormatError: LF-705 an input of a type or rank that cannot be made up.
    """
    bounds = _bounds(index)
    stored = {tensor.name for tensor in model.graph.initializer}
    draw, sizes = np.random.default_rng(0), _genai(folder)
    return {v.name: _value(v, bounds, sizes, draw) for v in model.graph.input if v.name not in stored}


def stated(path: str | os.PathLike[str]) -> dict[str, Array]:
    """The arrays of an ``.npz`` file, by the inputs' names."""
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise fault(
            "LF-705", f"cannot read inputs from {path}: {error}", fix="numpy.savez(FILE, name=array, …)"
        ) from None


def _genai(folder: Path) -> dict[str, int]:
    """Of a model that onnxruntime-genai (0.18) built, the sizes of a prompt with nothing before it; of another one, none."""
    try:
        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        head = int(settings["model"]["decoder"]["head_size"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {"sequence_length": 3, "total_sequence_length": 3, "past_sequence_length": 0, "kv_cache_dim": head}


def _value(value: onnx.ValueInfoProto, bounds: Mapping[str, int], sizes: dict[str, int], draw: Any) -> Array:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise fault(
            "LF-705", "an input of this type, or without a shape, cannot be made up", where=value.name, fix=_FIX
        )
    shape: list[int] = []
    for d in kind.shape.dim:
        usual = _PIXELS if len(kind.shape.dim) > 3 and len(shape) > 1 else 2 + len(sizes)
        symbol = d.dim_param or f"{value.name}.{len(shape)}"  # PaddlePaddle writes -1 for a size that is not known
        shape.append(d.dim_value if d.dim_value > 0 else sizes.setdefault(symbol, usual))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if dtype == np.bool_:
        return np.ones(shape, dtype)
    if np.issubdtype(dtype, np.integer):
        bound = bounds.get(value.name)  # one that indexes no table is a mask or a count: 1 is safe for both
        return np.asarray(np.ones(shape, dtype) if bound is None else draw.integers(0, bound, shape).astype(dtype))
    if dtype == np.object_:
        raise fault("LF-705", "an input of strings cannot be made up", where=value.name, fix=_FIX)
    return np.asarray(draw.standard_normal(shape).astype(dtype))


_PIXELS = 32
"""Height and width of what looks like a picture: [batch, channels, height, width]."""

_FIX = "give values: --inputs FILE.npz"


def _bounds(index: Index) -> dict[str, int]:
    """Input → the rows of the smallest table that it indexes, directly or through what only moves it."""
    bounds: dict[str, int] = {}
    for site in index.sites:
        if not site.looks_up or site.position != 0:
            continue
        queue = [site.node.input[1]]
        seen: set[str] = set()
        while queue:
            name = queue.pop()
            if name in seen:
                continue
            seen.add(name)
            bounds[name] = min(site.operand.shape[0], bounds.get(name, site.operand.shape[0]))
            producer = next((s.producers[name] for s in index.scopes if name in s.producers), None)
            if producer is not None and producer.op_type in _PASSING:
                queue += producer.input
    return bounds
