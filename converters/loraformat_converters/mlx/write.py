"""Adapter → MLX: tensors as mlx-lm's loader wants them, and a configuration under which it puts them in their place."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.algebra.refactored import under_scale
from loraformat.dtypes import dtype_name
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Output, ReadOptions, tensors_file, text_file
from loraformat.parts import Lora
from loraformat_converters.mlx import TENSORS
from loraformat_converters.mlx import config as configs
from loraformat_converters.mlx.read import read_tensors

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["write"]

_DTYPES = ("F32", "F16", "BF16")  # mlx has no float64 but on the CPU, and no float8 in these layers


@dataclass
class _Form:
    """What is about to be written, and what stands in the way."""

    type: str
    tensors: dict[str, Array] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def refuse(self, key: str, what: str, fix: str = "") -> None:
        self.problems.append(Problem("LF-508", what, key, fix))


def write(adapter: Adapter) -> Output:
    """``adapter_config.json`` and ``adapters.safetensors``.

    Scales that differ become one, and ranks that differ the largest: the ratio is multiplied into lora_b, the rest is
    zeros. Each target that this changes is a warning.

    Raises:
        LoraFormatError: LF-508 with everything that mlx-lm cannot hold.
    """
    if adapter.names != "mlx" or adapter.components:
        what = f"names are in the space {adapter.names!r}" if adapter.names != "mlx" else "the model has components"
        raise fault(
            "LF-508",
            f"mlx-lm names the modules of one MLX model; here {what}",
            fix="--to mlx by convert translates names",
        )
    form = _full(adapter) if all(update.replaces for update in adapter.values()) else _pairs(adapter)
    for name, tensor in form.tensors.items():
        if (dtype := dtype_name(tensor.dtype)) not in _DTYPES and form.type != "full":
            form.refuse(name, f"mlx-lm's layers hold {', '.join(_DTYPES)}, not {dtype}", "--dtype float32")
    if form.problems:
        raise LoraFormatError(form.problems)
    files = {TENSORS: tensors_file(form.tensors, {}), configs.FILE: text_file(_text(adapter, form))}
    return Output(files, True, form.warnings)


def _full(adapter: Adapter) -> _Form:
    """A fine-tune of whole parameters."""
    form = _Form("full")
    for key, update in adapter.items():
        if allows := update["replace"].allows:
            form.refuse(
                key, f"mlx-lm loads a parameter of the same shape that the model has; this may {', '.join(allows)}"
            )
        form.tensors[key] = update["replace"].replace
    return form


def _pairs(adapter: Adapter) -> _Form:
    """Pairs under one scale and of one rank."""
    dora = sum("magnitude" in update for update in adapter.values())
    form = _Form("dora" if dora else "lora")
    for key, update in adapter.items():
        if why := _misfit(key, update, mixed=0 < dora < len(adapter)):
            form.refuse(key, *why)
    if form.problems:
        return form
    parts: dict[str, Lora] = {key: update["lora"] for key, update in adapter.items()}
    scale = Counter(part.scale for part in parts.values()).most_common(1)[0][0]
    if scale == 0 and any(part.scale for part in parts.values()):
        scale = 1.0
    rank = max(part.r for part in parts.values())
    for key, part in parts.items():
        _one(key.removesuffix(".weight"), part, scale, rank, form)
        if dora:
            form.tensors[f"{key.removesuffix('.weight')}.m"] = adapter[key]["magnitude"].magnitude
    form.parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    return form


def _one(module: str, part: Lora, scale: float, rank: int, form: _Form) -> None:
    """The two tensors of a module."""
    try:
        b, residual = under_scale(part, scale)
    except LoraFormatError as error:
        form.refuse(module, error.problems[0].what)
        return
    a, more = part.lora_A, rank - part.r
    if part.scale != scale:
        what = f"the scale {part.scale:g} is folded into lora_b: mlx-lm has one, {scale:g}, for all"
        _warn(form, f"{what}; {'exact' if residual == 0 else f'residual {residual:.1e}'}", module)
    if more:
        none = [(0, 0)] * (a.ndim - 2)
        a, b = np.pad(a, [*none, (0, more), (0, 0)]), np.pad(b, [*none, (0, 0), (0, more)])
        _warn(form, f"the rank {part.r} is padded with zeros: mlx-lm has one, {rank}, for all; exact", module)
    if a.ndim == 3:
        count = max(a.shape[0], b.shape[0])  # of a shared factor, which mlx-lm has not, each expert gets its copy
        a, b = np.broadcast_to(a, (count, *a.shape[1:])), np.broadcast_to(b, (count, *b.shape[1:]))
    else:
        a, b = a.T, b.T
    form.tensors[f"{module}.lora_a"], form.tensors[f"{module}.lora_b"] = a, b


def _warn(form: _Form, what: str, where: str) -> None:
    form.warnings.append(Problem("LF-508", what, where, severity="warning"))


def _misfit(key: str, update: Update, *, mixed: bool) -> tuple[str, str] | None:
    """Why mlx-lm has no layer for this update, and the way out; None where it has."""
    if {part.kind for part in update.parts} not in ({"lora"}, {"lora", "magnitude"}):
        return f"a {update.kind} update beside others: mlx-lm loads pairs, or a fine-tune of whole parameters", ""
    part: Lora = update["lora"]
    if not key.endswith(".weight"):
        return "mlx-lm adapts the .weight of a module", ""
    if part.mid is not None:
        return "a pair around a core is no layer of mlx-lm", "--to-lora R, whose residual is printed"
    if part.lora_A.ndim > 3:
        return f"{part.lora_A.ndim - 2} batch axes: mlx-lm stacks experts along one", ""
    place = update.placement
    if place is not None and len(place.out) + len(place.in_) > 2:
        return f"the placement {place.spec} of {list(place.shape)}: mlx-lm adapts no convolution", ""
    if "magnitude" not in update:
        return ("a plain pair beside DoRA: mlx-lm makes all of them DoRA", "--drop magnitude") if mixed else None
    if part.lora_A.ndim == 3:
        return "mlx-lm has no DoRA for experts", "--drop magnitude"
    return _magnitude(update)


def _magnitude(update: Update) -> tuple[str, str] | None:
    """mlx-lm has a magnitude for each row of the weight: for each output of a Linear, for each token of an Embedding."""
    axes, place = update["magnitude"].magnitude_axes, update.placement
    if update["magnitude"].eps:
        return "mlx-lm adds no eps to the norm", "--drop magnitude"
    if place is None:
        return None if axes is None else ("a magnitude whose axes no placement explains", "")
    kept = place.out if axes is None else axes
    if kept == (0,):
        return None
    embedding = ", of an Embedding for each token" if update.op == "embedding" else ""
    return f"a magnitude for each of axis {list(kept)}; mlx-lm has one for each row{embedding}", "--drop magnitude"


def _text(adapter: Adapter, form: _Form) -> str:
    """The source's own configuration where it still holds, else one of the adapter's numbers."""
    text = adapter.extensions.get("mlx")
    if text is not None and _holds(text, form, adapter):
        return text
    value: dict[str, Any] = {"fine_tune_type": form.type, "model": adapter.base_model.get("name"), "num_layers": -1}
    if form.type != "full":
        # Listed by their whole paths, which the loader looks up in the model itself: exactly these modules.
        keys = sorted({name.rpartition(".")[0] for name in form.tensors})
        value["lora_parameters"] = form.parameters | {"keys": keys}
    return json.dumps(value, indent=4, sort_keys=True)


def _holds(text: str, form: _Form, adapter: Adapter) -> bool:
    """Whether mlx-lm would read this very adapter out of the tensors under the source's own configuration."""
    try:
        config, _ = configs.parse(text)
        if config.type != form.type or not _covers(config, form):
            return False
        again = read_tensors(form.tensors, config, ReadOptions(), "")
    except LoraFormatError:
        return False
    return again.keys() == adapter.keys() and all(again[key].scale == adapter[key].scale for key in adapter)


def _covers(config: configs.Config, form: _Form) -> bool:
    """Whether the loader would make a layer for each pair, as far as the names tell."""
    if form.type == "full":
        return True
    keys, count = config.parameters.get("keys"), config.value.get("num_layers", config.value.get("lora_layers"))
    paths = {name.rpartition(".")[0] for name in form.tensors}
    blocks = {path: _block(path) for path in paths}
    numbers = [block[0] for path, block in blocks.items() if block and path not in (keys or ())]
    if numbers and isinstance(count, int) and 0 < count <= max(numbers) - min(numbers):
        return False
    return all(
        path in (keys or ()) or (block is not None and (keys is None or block[1] in keys))
        for path, block in blocks.items()
    )


def _block(path: str) -> tuple[int, str] | None:
    """(number of the block, path in it) of a module in one of the model's blocks, or None.

    >>> _block("model.layers.3.self_attn.q_proj")
    (3, 'self_attn.q_proj')
    """
    match = re.search(r"\.(\d{1,9})\.(.+)", path)
    return (int(match[1]), match[2]) if match else None
