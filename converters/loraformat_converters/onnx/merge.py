"""Merge: a stored weight W becomes W + ΔW, in its own orientation and dtype, where it lies or in a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from loraformat.tiles import Norms, changed
from loraformat_converters.onnx.index import Index, Site
from loraformat_converters.onnx.model import External, array, external, overlapping
from loraformat_converters.onnx.scopes import tensors
from loraformat_converters.onnx.store import Addition, Patch

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Spot", "merge", "spots"]


@dataclass(frozen=True)
class Spot:
    """The weight of one target: its uses, its external bytes if it has any, and what else depends on it.

    A weight that something else depends on is copied first, so that only the target changes.
    """

    sites: tuple[Site, ...]
    place: External | None
    others: tuple[str, ...]

    @property
    def written_data(self) -> Patch | Addition | None:
        """What this spot will write outside the model, without the values yet."""
        if self.place is None:
            return None
        return Addition(onnx.TensorProto(), self.place.length, _nothing) if self.others else Patch(self.place, _nothing)


def spots(model: onnx.ModelProto, index: Index, found: Mapping[str, tuple[Site, ...]], folder: Path) -> dict[str, Spot]:
    """Target → spot."""
    overlaps = overlapping(tensors(model), folder)
    result = {}
    for key, sites in found.items():
        place = external(sites[0].root, folder)
        others = _other_readers(index, sites)
        if place is not None and (place.location, place.offset) in overlaps:
            others.append("a tensor stored in the same bytes")
        result[key] = Spot(sites, place, tuple(others))
    return result


def merge(index: Index, key: str, update: Update, spot: Spot, folder: Path, norms: Norms) -> Patch | Addition | None:
    """Change the weight of one target; what that writes outside the model, or None where the model holds the bytes."""
    root = spot.sites[0].root
    tiles = partial(_tiles, update.placed(spot.sites[0].placement), array(root, folder), norms)
    if not spot.others:
        if spot.place is not None:
            return Patch(spot.place, tiles)
        _set(root, b"".join(tiles()))
        return None
    copy = onnx.TensorProto(name=index.fresh(f"lora/{key}/weight"), dims=root.dims, data_type=root.data_type)
    if spot.place is None:
        copy.raw_data = b"".join(tiles())
    index.store(copy)
    for site in spot.sites:
        _lead(index, key, site, copy.name)
    return None if spot.place is None else Addition(index.graph.initializer[-1], spot.place.length, tiles)


def _other_readers(index: Index, sites: tuple[Site, ...]) -> list[str]:
    """What else reads the weight of these sites: nodes, graphs inside nodes, the model's outputs."""
    own = {id(site.node) for site in sites} | {id(node) for site in sites for node in site.chain}
    values = {sites[0].root_name} | {node.output[0] for site in sites for node in site.chain}
    others = [n.name or n.op_type for v in values for n in index.consumers.get(v, ()) if id(n) not in own]
    return others + sorted(values & index.outputs) + sorted(values & index.captured)


def _tiles(update: Update, base: Array, norms: Norms) -> Iterator[memoryview]:
    for tile in changed((update,), base, norms):
        yield np.ascontiguousarray(tile).reshape(-1).view(np.uint8).data


def _nothing() -> Iterator[memoryview]:
    return iter(())


def _set(tensor: onnx.TensorProto, data: bytes) -> None:
    for typed in ("float_data", "double_data", "int32_data"):  # int32_data holds 16-bit floats
        tensor.ClearField(typed)
    tensor.raw_data = data


def _lead(index: Index, key: str, site: Site, value: str) -> None:
    """Make a site read ``value``, behind copies of the nodes that led to the shared weight."""
    for node in site.chain:
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name = twin.output[0] = index.fresh(f"lora/{key}/{node.op_type}")
        twin.input[0] = value
        value = twin.output[0]
        index.graph.node.insert(_position(index, site.node), twin)
    site.node.input[site.position] = value


def _position(index: Index, node: onnx.NodeProto) -> int:
    return next(i for i, other in enumerate(index.graph.node) if other.output == node.output)
