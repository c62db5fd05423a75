"""The description of a base (``Base.describe``) for a person; a kind that is not known here is shown field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from loraformat.cli.printing import counted, table
from loraformat.plan import size

__all__ = ["base_lines"]


def base_lines(path: str, description: Mapping[str, Any]) -> Iterator[str]:
    """One line after the other, the path first."""
    match description["kind"]:
        case "checkpoint":
            yield from _checkpoint(path, description)
        case "onnx":
            yield from _onnx(path, description)
        case "pipeline":
            for component, model in description["models"].items():
                yield from (*_checkpoint(f"{path.rstrip('/')}/{component}", model), "")
        case "onnx-folder":
            for file, model in description["models"].items():
                yield from (*_onnx(f"{path.rstrip('/')}/{file}", model), "")
        case kind:
            yield f"{path}: {kind}"
            yield from (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in description.items())


def _checkpoint(path: str, found: Mapping[str, Any]) -> Iterator[str]:
    names = ", ".join(map(str, found["architectures"])) or found["model_type"] or "no config.json says of what model"
    yield f"{path}: checkpoint ({names})"
    yield f"{found['tensors']} tensors · {_count(found['parameters'])} parameters · {size(found['bytes'])}"
    yield ""
    rows = [("dtype", "tensors", "values", "")]
    rows += [(d, str(n["tensors"]), _count(n["values"]), size(n["bytes"])) for d, n in found["dtypes"].items()]
    yield from table(rows)
    if found["tied"] is not None:
        word = "tied" if found["tied"] else "not tied"
        head = f"; {found['stored_head']} is stored" if found["stored_head"] else ""
        yield f"input and output embeddings: {word}{head}"
    yield from (f"{name} is {stored}" for name, stored in found["ties"].items())
    if len(found["files"]) > 1:
        yield from (f"{entry['file']}  {size(entry['bytes'])}" for entry in found["files"])


def _onnx(path: str, found: Mapping[str, Any]) -> Iterator[str]:
    opsets = ", ".join(f"{domain} {version}" for domain, version in found["opsets"].items())
    by = f" · by {found['producer']}" if found["producer"] else ""
    yield f"{path}: ONNX model · {size(found['bytes'])} · opset {opsets} · IR {found['ir_version']}{by}"
    yield ""
    rows = [("input", "dtype", "shape", "")]
    rows += [(*_value(v), "optional: the model holds a value" if v["optional"] else "") for v in found["inputs"]]
    yield from table(rows)
    yield ""
    yield from table([("output", "dtype", "shape"), *(_value(v) for v in found["outputs"])])
    yield ""
    rows = [("uses", "weights of", "dtype", "")]
    for row in found["weights"]:
        said = f"can be changed, such as {row['examples'][0]}" if row["refused"] is None else f"not: {row['refused']}"
        if row["refused"] is None and row["attach_only"]:
            said = f"can be attached to, such as {row['examples'][0]}: {row['attach_only']}"
        rows.append((str(row["uses"]), row["operator"], "/".join(row["dtypes"]), said))
    yield from table(rows)
    for entry in found["external"]:
        yield f"data: {entry['file']}  " + (
            "missing, or not to be used" if entry["bytes"] is None else size(entry["bytes"])
        )
    for entry in found["attached"]:
        digest = f", digest {entry['digest'][:12]}" if entry["digest"] else ""
        yield f"attached: {entry['name']} ({entry['mode']}, {counted(len(entry['targets']), 'target')}{digest})"
    yield f"next: loraformat info {path} --how python"


def _value(value: Mapping[str, Any]) -> tuple[str, str, str]:
    sizes = "" if value["shape"] is None else f"[{', '.join('?' if n is None else str(n) for n in value['shape'])}]"
    return value["name"], value["dtype"], sizes


def _count(number: int) -> str:
    """``7.2 B``, ``22.7 M``, ``384``."""
    for unit, least in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= least:
            return f"{number / least:.1f} {unit}"
    return str(number)
