"""What an ONNX model is, as data: its ends, its weights by what can be done with them, its files, what is attached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from loraformat import canonical
from loraformat.errors import LoraFormatError
from loraformat_converters.onnx.changing.record import ATTACHED
from loraformat_converters.onnx.graph.index import Index
from loraformat_converters.onnx.graph.model import FLOATS, external
from loraformat_converters.onnx.graph.scopes import tensors

__all__ = ["describe", "values_of"]

_OPERATORS_SHOWN = 3


def describe(model: onnx.ModelProto, index: Index, path: Path) -> dict[str, Any]:
    """kind, bytes, ir_version, opsets, producer, inputs, outputs, weights, external, attached."""
    stored = {t.name for t in model.graph.initializer}
    records = list(_records(model))
    return {
        "kind": "onnx",
        "bytes": path.stat().st_size,
        "ir_version": model.ir_version,
        "opsets": {o.domain or "ai.onnx": o.version for o in model.opset_import},
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))) or None,
        "inputs": [{**v, "optional": v["name"] in stored} for v in values_of(model.graph.input)],
        "outputs": list(values_of(model.graph.output)),
        "weights": _weights(index, records),
        "external": _external(model, path.parent),
        "attached": [_entry(record) for record in records],
    }


def values_of(values: Any) -> Iterator[dict[str, Any]]:
    """name, dtype, shape of graph inputs or outputs; a size is a number, a name, or null where nothing is said.

    ``dtype`` is numpy's word for tensors; for anything else (sequence, map, optional) its kind, and no shape.
    """
    for value in values:
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            yield {"name": value.name, "dtype": (kind or "unknown").removesuffix("_type"), "shape": None}
            continue
        tensor = value.type.tensor_type
        shape = [_size(d) for d in tensor.shape.dim] if tensor.HasField("shape") else None
        yield {"name": value.name, "dtype": _dtype(tensor.elem_type), "shape": shape}


def _size(dimension: Any) -> int | str | None:
    which = dimension.WhichOneof("value")
    return getattr(dimension, which) if which else None


def _dtype(kind: int) -> str:
    if kind == onnx.TensorProto.STRING:
        return "string"
    try:
        return str(onnx.helper.tensor_dtype_to_np_dtype(kind).name)
    except KeyError:
        return f"type {kind}"


def _weights(index: Index, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Uses of the base's weights, one row for an operator and its reasons.

    ``refused`` is null where a weight can be changed, ``attach_only`` says why a change can only be put beside it.
    """
    rows: dict[tuple[str | None, ...], dict[str, Any]] = {}
    stems = tuple(f"{stem}/" for record in records for stem in _targets(record).values() if isinstance(stem, str))
    for site in index.sites:
        if site.node.name.startswith(stems):
            continue  # of an attached adapter
        if not site.known_operator and site.root.data_type not in FLOATS:
            continue  # a constant of shapes or indices, not a weight
        domain = f"{site.node.domain}." if site.node.domain not in ("", "ai.onnx") else ""
        operator = domain + site.node.op_type
        why = {"operator": operator, "refused": site.refusal, "attach_only": site.sealed}
        row = rows.setdefault(tuple(why.values()), {**why, "uses": 0, "dtypes": [], "examples": []})
        row["uses"] += 1
        dtype = _dtype(site.root.data_type)
        if dtype not in row["dtypes"]:
            row["dtypes"].append(dtype)
        if len(row["examples"]) < _OPERATORS_SHOWN:
            row["examples"].append(site.node.name or site.root_name)
    return sorted(rows.values(), key=lambda row: (row["refused"] is not None, -row["uses"]))


def _external(model: onnx.ModelProto, folder: Path) -> list[dict[str, Any]]:
    """The data files; ``bytes`` is null where one is not there, or where ONNX Runtime would refuse its path."""
    files: dict[str, int | None] = {}
    for tensor in tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        if location not in files:
            files[location] = _size_of(tensor, folder)
    return [{"file": name, "bytes": size} for name, size in sorted(files.items())]


def _size_of(tensor: onnx.TensorProto, folder: Path) -> int | None:
    try:
        place = external(tensor, folder)
    except LoraFormatError:
        return None
    return place.path.stat().st_size if place else None


def _records(model: onnx.ModelProto) -> Iterator[dict[str, Any]]:
    """What ``attach`` wrote, an entry an adapter. A stranger may have edited it: what is not of its type is not said."""
    for prop in model.metadata_props:
        if prop.key != ATTACHED:
            continue
        try:
            record = canonical.loads(prop.value)
        except ValueError:
            record = None
        for entry in record if isinstance(record, list) else [record]:
            yield entry if isinstance(entry, dict) else {}


def _entry(record: Mapping[str, Any]) -> dict[str, Any]:
    """name, mode, digest and targets of what was attached."""
    words = {name: record[name] if isinstance(record.get(name), str) else None for name in ("name", "mode", "digest")}
    return {**words, "targets": sorted(_targets(record))}


def _targets(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Target → below what name its nodes and tensors lie."""
    targets = record.get("targets")
    return targets if isinstance(targets, dict) else {}
