"""Merge: a stored weight W becomes W + ΔW, in its own orientation and dtype, where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from loraformat.tiles import Norms, changed
from loraformat_converters.onnx.index import Index, Site
from loraformat_converters.onnx.model import array, external
from loraformat_converters.onnx.store import Patch

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["merge", "shared_with"]


def merge(index: Index, key: str, update: Update, sites: tuple[Site, ...], folder: Path, norms: Norms) -> Patch | None:
    """Change the weight of ``sites``; the patch to its external data, or None where the model holds the bytes.

    A weight that other operators use as well is copied first, so that only the target changes.
    """
    root = sites[0].root
    base = array(root, folder)
    placed = update.placed(sites[0].placement)
    place = external(root, folder)
    if shared_with(index, sites):
        _untie(index, key, sites, b"".join(_tiles(placed, base, norms)))
        return None
    if place is not None:
        return Patch(place, partial(_tiles, placed, base, norms))
    _set(root, b"".join(_tiles(placed, base, norms)))
    return None


def shared_with(index: Index, sites: tuple[Site, ...]) -> list[str]:
    """What else reads the weight of these sites: nodes, graphs inside nodes, the model's outputs."""
    own = {id(site.node) for site in sites} | {id(node) for site in sites for node in site.chain}
    values = {sites[0].root_name} | {node.output[0] for site in sites for node in site.chain}
    others = [n.name or n.op_type for v in values for n in index.consumers.get(v, ()) if id(n) not in own]
    return others + sorted(values & index.outputs) + sorted(values & index.captured)


def _tiles(update: Update, base: Array, norms: Norms) -> Iterator[memoryview]:
    for tile in changed(update, base, norms):
        yield np.ascontiguousarray(tile).reshape(-1).view(np.uint8).data


def _set(tensor: onnx.TensorProto, data: bytes) -> None:
    for typed in ("float_data", "double_data", "int32_data"):  # int32_data holds 16-bit floats
        tensor.ClearField(typed)
    tensor.raw_data = data


def _untie(index: Index, key: str, sites: tuple[Site, ...], data: bytes) -> None:
    """Give the sites a weight of their own, behind copies of the nodes that led to the shared one."""
    root = sites[0].root
    copy = onnx.TensorProto(
        name=index.fresh(f"lora/{key}/weight"), dims=root.dims, data_type=root.data_type, raw_data=data
    )
    index.graph.initializer.append(copy)
    for site in sites:
        value, position = (
            copy.name,
            list(site.node.input).index(site.chain[-1].output[0] if site.chain else site.root_name),
        )
        for node in site.chain:
            twin = onnx.NodeProto()
            twin.CopyFrom(node)
            twin.name, twin.input[0], twin.output[0] = (
                index.fresh(f"lora/{key}/{node.op_type}"),
                value,
                index.fresh(f"lora/{key}/{node.op_type}_out"),
            )
            value = twin.output[0]
            index.graph.node.insert(_position(index, site.node), twin)
        site.node.input[position] = value


def _position(index: Index, node: onnx.NodeProto) -> int:
    return next(i for i, other in enumerate(index.graph.node) if other is node or other.output == node.output)
