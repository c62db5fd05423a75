"""Merge: a stored weight W becomes W + ΔW, in its own orientation and dtype, where it lies or in a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from loraformat.tiles import Norms, changed
from loraformat_converters.onnx.changing.requantised import Kept
from loraformat_converters.onnx.changing.spots import Spot
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.model import Rows, array
from loraformat_converters.onnx.graph.store import Addition, Patch

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["merge", "updates_in", "written_data"]


def merge(index: Index, spot: Spot, folder: Path, norms: Norms, kept: Kept | None = None) -> Patch | Addition | None:
    """Change one weight; what that writes outside the model, or None where the model holds the bytes.

    Args:
        kept: of a quantised one, its codes, to be rounded to again.
    """
    root = spot.sites[0].root
    if kept is not None:
        tiles = partial(_codes, kept, updates_in(kept, spot), norms)
    else:
        values: Any = array(root, folder)
        if spot.place is not None and root.dims:
            values = Rows(spot.place, root)
        tiles = partial(_tiles, spot.updates, values, norms)
    if not spot.others:
        if spot.place is not None:
            return Patch(spot.place, tiles)
        _set(root, b"".join(tiles()))
        return None
    copy = onnx.TensorProto(name=index.fresh(f"lora/{spot.key}/weight"), dims=root.dims, data_type=root.data_type)
    if spot.place is None:
        copy.raw_data = b"".join(tiles())
    index.store(copy)
    for site in spot.sites:
        _lead(index, spot.key, site, copy.name)
    return None if spot.place is None else Addition(index.graph.initializer[-1], spot.place.length, tiles)


def written_data(spot: Spot) -> Patch | Addition | None:
    """What ``merge`` will write outside the model, without the values yet."""
    if spot.place is None:
        return None
    return Addition(onnx.TensorProto(), spot.place.length, _nothing) if spot.others else Patch(spot.place, _nothing)


def _tiles(updates: Sequence[Update], base: Array, norms: Norms) -> Iterator[memoryview]:
    for tile in changed(updates, base, norms):
        yield np.ascontiguousarray(tile).reshape(-1).view(np.uint8).data


def updates_in(kept: Kept, spot: Spot) -> list[Update]:
    """What happens to a quantised weight, in the axes in which its operator takes it."""
    return [change.turned(kept.site.operand) for change in spot.changes]


def _codes(kept: Kept, updates: Sequence[Update], norms: Norms) -> Iterator[memoryview]:
    yield memoryview(bytes(numpy_helper.from_array(kept.changed(updates, norms)).raw_data))


def _nothing() -> Iterator[memoryview]:
    return iter(())


def _set(tensor: onnx.TensorProto, data: bytes) -> None:
    for typed in ("float_data", "double_data", "int32_data"):  # int32_data holds 16-bit floats
        tensor.ClearField(typed)
    tensor.raw_data = data


def _lead(index: Index, key: str, site: Site, value: str) -> None:
    """Make a site read ``value``, behind copies of the nodes that led to the shared weight."""
    graph = site.scope.graph
    assert graph is not None
    for node, position in site.steps:
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name = twin.output[0] = index.fresh(f"lora/{key}/{node.op_type}")
        twin.input[position] = value
        value = twin.output[0]
        place = next(i for i, other in enumerate(graph.node) if other.output == site.node.output)
        graph.node.insert(place, twin)
    site.node.input[site.position] = value
