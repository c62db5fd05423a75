"""What an invalid or a warned vector is made of: a sound file of one target, broken in one way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import rfc8785
from safetensors.numpy import save
from vector import Array, content_of, digest_of, einsum, lora, numbers

BROKEN: list[Broken] = []
"""Every invalid vector, in the order of the rules."""

KEY = "layer.weight"
LORA = {"kind": "lora", "r": 2, "alpha": 4, "scale_rule": "alpha/r"}
PLACED = {"shape": [3, 5], "axes": {"out": [0], "in": [1]}}
MISSING = object()


@dataclass(frozen=True)
class Broken:
    """One file that breaks a rule.

    Attributes:
        name: begins with the rule.
        title: what is wrong, in a sentence.
        where: text that the place named by a report contains.
        schema: whether the JSON Schema of the metadata refuses it too.
        tensors: of a warned file, which means what its pair means.
    """

    name: str
    title: str
    data: bytes
    where: str = ""
    schema: bool = False
    tensors: Mapping[str, Array] | None = None

    @property
    def path(self) -> str:
        """Of the file, below the folder of the vectors."""
        return f"{'warned' if self.tensors else 'invalid'}/{self.name}"

    def files(self) -> dict[str, bytes]:
        """The file, and beside a warned one what it must mean, by path."""
        files = {f"{self.path}.safetensors": self.data}
        if self.tensors:
            A, B = (self.tensors[f"{KEY}.{role}"] for role in ("lora_A", "lora_B"))
            matrix = 2 * einsum("or,ri->oi", B, A)
            files[f"{self.path}.expected.safetensors"] = save({f"matrix.{KEY}": matrix.astype(np.float32)})
        return files

    def as_json(self) -> dict[str, Any]:
        """The entry in the index."""
        entry: dict[str, Any] = {
            "path": f"{self.path}.safetensors",
            "verdict": "warning" if self.tensors else "error",
            "rules": [self.name[:6]],
            "title": self.title,
            "where": self.where,
            "schema": self.schema,
        }
        if self.tensors:
            A, B = (self.tensors[f"{KEY}.{role}"] for role in ("lora_A", "lora_B"))
            entry["expected"] = f"{self.path}.expected.safetensors"
            entry["digest"] = digest_of({KEY: [content_of(lora(A, B, 4))]})
            entry["canonical"] = self.name.startswith("LF-313")
        return entry


def broken(name: str, title: str, data: bytes, **more: Any) -> None:
    """Add a file of these bytes."""
    BROKEN.append(Broken(name, title, data, **more))


def value(target: Any = None, /, **changes: Any) -> dict[str, Any]:
    """The metadata value of the sound file, its target or fields changed; ``MISSING`` leaves a field out."""
    whole = {"version": "1.0", "names": "torch", "targets": {KEY: {"parts": [LORA]} if target is None else target}}
    return {name: member for name, member in (whole | changes).items() if member is not MISSING}


def pair(a: Any = (2, 5), b: Any = (3, 2), key: str = KEY, **others: Any) -> dict[str, Array]:
    """The tensors of the sound file, of other shapes or with others beside; None leaves one out."""
    roles = {"lora_A": a, "lora_B": b, **others}
    return {f"{key}.{role}": _tensor(role, tensor) for role, tensor in roles.items() if tensor is not None}


def _tensor(seed: str, tensor: Any) -> Array:
    return tensor if isinstance(tensor, np.ndarray) else numbers(seed, *tensor)


def meta(name: str, says: str, told: Mapping[str, Any] | str, tensors: Mapping[str, Array], **more: Any) -> None:
    """Add a file of this metadata value or text, laid out by the reference serializer."""
    text = told if isinstance(told, str) else rfc8785.dumps(dict(told)).decode()
    kept = {"tensors": tensors} if more.pop("warned", False) else {}
    broken(name, says, save(dict(tensors), metadata={"loraformat": text}), **kept, **more)


def parts(name: str, says: str, *entries: Any, tensors: Mapping[str, Array] | None = None, **more: Any) -> None:
    """Add a file whose target has these parts, and the fields in ``target``."""
    target = {"parts": list(entries), **more.pop("target", {})}
    meta(name, says, value(target), pair() if tensors is None else tensors, where=more.pop("where", KEY), **more)


def laid(header: Mapping[str, Any] | str | bytes, data: bytes = b"") -> bytes:
    """A container with this header, whatever it says."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def entries(**changed: Any) -> dict[str, Any]:
    """The header of the sound file; ``A`` and ``B`` change the entries of its two tensors, ``meta`` the metadata."""
    A = {"dtype": "F32", "shape": [2, 5], "data_offsets": [0, 40]} | changed.get("A", {})
    B = {"dtype": "F32", "shape": [3, 2], "data_offsets": [40, 64]} | changed.get("B", {})
    told = changed.get("meta", {"loraformat": rfc8785.dumps(value()).decode()})
    header = {"__metadata__": told, f"{KEY}.lora_A": A, f"{KEY}.lora_B": B}
    return {
        n: {k: v for k, v in e.items() if v is not MISSING} if isinstance(e, dict) else e for n, e in header.items()
    }


DATA = b"".join(tensor.tobytes() for tensor in pair().values())
SOUND = laid(entries(), DATA)
TEXT = rfc8785.dumps(value()).decode()
