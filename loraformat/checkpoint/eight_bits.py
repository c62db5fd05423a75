"""Which weights of a checkpoint are stored in 8 bits with a scale that is known, and what the others are told."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraformat.checkpoint.requantised import EIGHT_BITS, Scaling, requantised, scale_name
from loraformat.errors import LoraFormatError, fault
from loraformat.quantised import form_of
from loraformat.tiles import Norms

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.checkpoint.folder import Files
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["packed", "refusal", "requantised_rows", "scaling_of"]


def scaling_of(weight: str, files: Files, config: Mapping[str, Any]) -> Scaling | None:
    """What the stored values are multiplied by; None of a weight that is not in 8 bits, or whose scale is not known."""
    info = files.shards[files.homes[weight]].infos[weight]
    if info.dtype not in EIGHT_BITS or len(info.shape) != 2:
        return None
    beside = scale_name(weight, info.dtype, files.homes)
    if beside is None:
        form = form_of(weight, files.homes, config, info.dtype)
        return Scaling.none(info.shape) if form is not None and form.plain else None
    # bitsandbytes 0.50 stores how int8 lies: 0 is row by row; the others are orders of a GPU's own.
    order = f"{weight.rpartition('.')[0]}.weight_format"
    if order in files.homes and int(_read(order, files)) != 0:
        return None
    return Scaling.of(_read(beside[0], files), beside[1], info.shape)


def _read(name: str, files: Files) -> Array:
    tensor = files.shards[files.homes[name]].tensor(name)
    return tensor[0 : tensor.shape[0]] if tensor.shape else tensor[...]


def requantised_rows(
    weight: str, updates: Sequence[Update], files: Files, config: Mapping[str, Any]
) -> Iterator[tuple[tuple[int, int], Array]] | None:
    """(rows, what a merge stores in them), in order; None of a weight that ``scaling_of`` does not know."""
    scaling = scaling_of(weight, files, config) if weight in files.homes else None
    if scaling is None:
        return None
    tensor = files.shards[files.homes[weight]].tensor(weight)
    return _numbered(requantised(updates, tensor, scaling, Norms()))


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
    what = f"{weight} is stored as {form.name} ({form.evidence}): a merge would round the change away"
    return fault("LF-608", what, where=key, fix=form.fix)


def refusal(
    weight: str, dtype: str, names: Collection[str], config: Mapping[str, Any], requantize: bool
) -> tuple[str, str, str]:
    """(rule, what, fix) of a weight that a merge cannot round to."""
    form = form_of(weight, names, config, dtype)
    named = f"{form.name} ({form.evidence})" if form else dtype
    what = f"{weight} is stored as {named}: a merge would round the change away"
    fix = form.fix if form else "merge into the unquantised checkpoint, or attach the adapter at run time"
    ways = dtype in EIGHT_BITS and not requantize
    return "LF-608", what, f"--requantize rounds to it and says what survives; {fix}" if ways else fix
