"""The identity of a graph: a SHA-256 of all that it says, and not of the files in which its values lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import onnx

from loraformat_converters.onnx.graph.scopes import tensors

__all__ = ["base_sha256"]


def base_sha256(model: onnx.ModelProto) -> str:
    """SHA-256 of a model, whatever its external data files are called."""
    places = [e for t in tensors(model) for e in t.external_data if e.key == "location"]
    names = [place.value for place in places]
    for place in places:
        place.value = ""
    sha256 = hashlib.sha256()
    for piece in _pieces(model):
        sha256.update(len(piece).to_bytes(8, "little"))
        sha256.update(piece)
    for place, name in zip(places, names, strict=True):
        place.value = name
    return sha256.hexdigest()


def _pieces(model: onnx.ModelProto) -> Iterator[bytes]:
    """The model's bytes, field by field: a whole may be over 2 GiB."""
    for message in (model, model.graph):
        for field, value in message.ListFields():
            yield field.name.encode()
            if field.name == "graph":
                continue
            if field.type != field.TYPE_MESSAGE:
                yield repr(value).encode()
            elif hasattr(value, "SerializeToString"):
                yield value.SerializeToString(deterministic=True)
            else:
                yield from (item.SerializeToString(deterministic=True) for item in value)
