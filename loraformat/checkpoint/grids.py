"""Which weights of a checkpoint are stored in few bits in a form that is known, and what the others are told."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.checkpoint.eight_bits import EIGHT_BITS, EightBits, Scaling, scale_name
from loraformat.checkpoint.four_bits import four_bits, state_name
from loraformat.checkpoint.gptq import gptq
from loraformat.checkpoint.requantised import Grid, requantised
from loraformat.errors import LoraFormatError, fault
from loraformat.quantised import form_of
from loraformat.tiles import Norms, Tensor

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.checkpoint.folder import Files
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["carrier", "grid_of", "laid", "meant", "packed", "refusal", "requantised_rows"]


def carrier(weight: str, names: Collection[str]) -> str:
    """The tensor that holds the numbers of a weight: itself, but for forms that pack them under another name."""
    other = f"{weight.rpartition('.')[0]}.qweight"
    return other if weight not in names and other in names else weight


def meant(stored: str) -> str:
    """The weight whose numbers a tensor holds."""
    module, _, leaf = stored.rpartition(".")
    return f"{module}.weight" if leaf == "qweight" else stored


def grid_of(stored: str, files: Files, config: Mapping[str, Any]) -> Grid | None:
    """The values that a stored tensor can have; None of one that is not in few bits, or in a form that is not known.

    Raises:
        LoraFormatError: LF-610 a damaged description of such a form.
    """
    if stored not in files.homes:
        return None

    def read(name: str) -> Tensor | None:
        return files.shards[files.homes[name]].tensor(name) if name in files.homes else None

    module, _, leaf = stored.rpartition(".")
    if leaf == "qweight":
        return gptq(module, config, read)
    if state := state_name(stored, files.homes):
        return four_bits(stored, state, read)
    scaling = _scaling(stored, files, config)
    return EightBits(files.shards[files.homes[stored]].tensor(stored), scaling) if scaling else None


def laid(stored: str, files: Files) -> tuple[str, str] | None:
    """(axes, evidence) where the form itself says how a matrix lies, whatever its module; None where it does not.

    transformers 5.23 integrations/bitsandbytes.py turns the weight of a Conv1D before it is quantised.
    """
    module, _, leaf = stored.rpartition(".")
    if leaf == "qweight":
        return "in,out", "GPTQ stores [in, out]"
    if state_name(stored, files.homes) or f"{module}.SCB" in files.homes:
        return "out,in", "bitsandbytes stores [out, in]"
    return None


def _scaling(weight: str, files: Files, config: Mapping[str, Any]) -> Scaling | None:
    """What the numbers of a weight in 8 bits are multiplied by; None of any other, or where that is not known."""
    info = files.shards[files.homes[weight]].infos[weight]
    if info.dtype not in EIGHT_BITS or len(info.shape) != 2:
        return None
    beside = scale_name(weight, info.dtype, files.homes)
    if beside is None:
        form = form_of(weight, files.homes, config, info.dtype)
        return Scaling.none(info.shape) if form is not None and form.plain else None
    # bitsandbytes 0.50 stores how int8 lies: 0 is row by row; the others are orders of a GPU's own.
    order = f"{weight.rpartition('.')[0]}.weight_format"
    if order in files.homes and np.any(_whole(order, files) != 0):
        return None
    return Scaling.of(_whole(beside[0], files), beside[1], info.shape)


def _whole(name: str, files: Files) -> Array:
    tensor = files.shards[files.homes[name]].tensor(name)
    return tensor[0 : tensor.shape[0]] if tensor.shape else tensor[...]


def requantised_rows(
    stored: str, updates: Sequence[Update], files: Files, config: Mapping[str, Any], norms: Norms | None = None
) -> Iterator[tuple[tuple[int, int], Array]] | None:
    """(rows of the stored tensor, what a merge stores in them), in order; None of one that ``grid_of`` does not know."""
    grid = grid_of(stored, files, config)
    return _numbered(requantised(updates, grid, norms or Norms())) if grid is not None else None


def _numbered(tiles: Iterator[Array]) -> Iterator[tuple[tuple[int, int], Array]]:
    start = 0
    for tile in tiles:
        yield (start, start + len(tile)), tile
        start += len(tile)


def packed(key: str, weight: str, files: Files, config: Mapping[str, Any]) -> LoraFormatError | None:
    """LF-608 where the weight is stored in other tensors, or packed; None where it is not quantised."""
    home = files.homes.get(weight)
    form = form_of(weight, files.homes, config, files.shards[home].infos[weight].dtype if home else None)
    if form is None:
        return None
    what = f"{weight} is stored as {form.name} ({form.evidence}): {form.why}"
    return fault("LF-608", what, where=key, fix=form.fix)


def refusal(stored: str, files: Files, config: Mapping[str, Any], *, requantize: bool) -> tuple[str, str, str]:
    """(rule, what, fix) of a weight that a merge cannot round to."""
    weight = meant(stored)
    dtype = files.shards[files.homes[stored]].infos[stored].dtype
    form = form_of(weight, files.homes, config, dtype if weight == stored else None)
    named = f"{form.name} ({form.evidence})" if form else dtype
    what = f"{weight} is stored as {named}: {form.why if form else 'a merge would round the change away'}"
    fix = form.fix if form else "merge into the unquantised checkpoint, or attach the adapter at run time"
    ways = not requantize and grid_of(stored, files, config) is not None
    return "LF-608", what, f"--requantize rounds to it and says what survives; {fix}" if ways else fix
