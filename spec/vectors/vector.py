"""What a test vector is made of: numbers, a metadata value, tensors, and what they must mean.

Written from ``spec/loraformat.md`` and not from the package that the vectors test: canonical JSON is rfc8785's,
bytes are the reference serializer's, every expected number is an ``einsum`` over the axes of the base tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16 and float8)
import numpy as np
import rfc8785
from safetensors.numpy import save

Array = np.ndarray[Any, np.dtype[Any]]
Part = dict[str, Any]
Case = Callable[["Vector"], None]

VALID: list[tuple[Case, tuple[str, ...]]] = []
"""Every valid case with the rules at whose edge it stands, in the order of the files that define them."""

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "uint64": "U64", "int32": "I32", "uint32": "U32", "int16": "I16",
    "uint16": "U16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def valid(*rules: str) -> Callable[[Case], Case]:
    """Register a case: its name is the file's, its docstring the title; it keeps ``rules`` narrowly or in a new way."""

    def register(case: Case) -> Case:
        VALID.append((case, rules))
        return case

    return register


def numbers(seed: str, *shape: int, dtype: str = "float32") -> Array:
    """Multiples of 2^-10 in [-1, 1) drawn from SHAKE-256: the same on every machine.

    Eleven bits each: float64 sums of their products are exact, so no order of summation shows in the files.
    """
    count = math.prod(shape)
    drawn = np.frombuffer(hashlib.shake_256(seed.encode()).digest(2 * count), "<u2") >> 5
    return ((drawn.astype(np.float64) - 1024) / 1024).reshape(shape).astype(dtype)


def einsum(spec: str, *tensors: Array) -> Array:
    """``np.einsum`` in float64."""
    return np.einsum(spec, *(tensor.astype(np.float64) for tensor in tensors))


def place(shape: list[int], *, out: list[int], in_: list[int], batch: list[int] | None = None) -> dict[str, Any]:
    """The fields ``shape`` and ``axes`` of a target."""
    return {"shape": shape, "axes": {"out": out, "in": in_} | ({"batch": batch} if batch else {})}


def lora(A: Array, B: Array, alpha: float, scale_rule: str = "alpha/r", mid: Array | None = None) -> Part:
    """A lora part."""
    part = {"kind": "lora", "r": A.shape[-2], "alpha": alpha, "scale_rule": scale_rule, "lora_A": A, "lora_B": B}
    return part if mid is None else part | {"mid": mid}


def dense(tensor: Array, alpha: float, scale_rule: str = "factor", **more: int) -> Part:
    """A delta part."""
    return {"kind": "delta", "alpha": alpha, "scale_rule": scale_rule, "delta": tensor, **more}


def replaced(tensor: Array, *allows: str) -> Part:
    """A replace part."""
    return {"kind": "replace", "replace": tensor} | ({"allows": list(allows)} if allows else {})


def magnitude(sizes: Array, **fields: object) -> Part:
    """A magnitude part."""
    return {"kind": "magnitude", "magnitude": sizes, **fields}


def rows_of(values: Array, indices: list[int], **fields: int) -> Part:
    """A rows part."""
    return {"kind": "rows", "values": values, "indices": np.array(indices, np.int64), **fields}


def fields_of(part: Part) -> dict[str, Any]:
    """What of a part goes into the JSON."""
    return {name: value for name, value in part.items() if not isinstance(value, np.ndarray)}


def roles_of(part: Part) -> dict[str, Array]:
    """What of a part goes into tensors."""
    return {name: value for name, value in part.items() if isinstance(value, np.ndarray)}


@dataclass
class Vector:
    """One valid file in the making.

    Attributes:
        name: of the file.
        title: what it shows.
        rules: at whose edge it stands.
        seed: of its numbers; two vectors of one seed hold the same factors.
        top: the metadata value.
        content: what the digest covers.
        text: the metadata text, where it is not the canonical one.
        data: the file's bytes, where they are not the reference serializer's.
    """

    name: str
    title: str
    rules: tuple[str, ...] = ()
    seed: str = ""
    top: dict[str, Any] = field(default_factory=lambda: {"version": "1.0", "names": "torch", "targets": {}})
    tensors: dict[str, Array] = field(default_factory=dict)
    expected: dict[str, Array] = field(default_factory=dict)
    content: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    canonical: bool = True
    data: bytes | None = None
    _drawn: int = 0

    def numbers(self, *shape: int, dtype: str = "float32") -> Array:
        """The next numbers of this vector."""
        self._drawn += 1
        return numbers(f"{self.seed or self.name}/{self._drawn}", *shape, dtype=dtype)

    def sizes(self, *shape: int) -> Array:
        """The next numbers, all positive: magnitudes."""
        return np.asarray(np.abs(self.numbers(*shape)) + np.float32(0.5))

    def target(self, key: str, *parts: Part, **fields: Any) -> None:
        """List a target."""
        self.top["targets"][key] = {"parts": [fields_of(part) for part in parts], **fields}
        for part in parts:
            self.tensors |= {f"{key}.{role}": tensor for role, tensor in roles_of(part).items()}
        self.content[key] = [content_of(part) for part in parts]

    def expect(self, key: str, **arrays: Array) -> None:
        """State the float32 ``matrix``, ``base``, ``delta`` and ``result`` of a target."""
        self.expected |= {f"{what}.{key}": np.asarray(array, np.float32, order="C") for what, array in arrays.items()}

    def adds(self, key: str, matrix: Array, delta: Array) -> None:
        """State a target whose change does not depend on the base: W' = W + delta."""
        base = self.numbers(*delta.shape)
        self.expect(key, matrix=matrix, base=base, delta=delta, result=base + delta)

    def becomes(self, key: str, base: Array, result: Array, **arrays: Array) -> None:
        """State a target whose change depends on the base."""
        self.expect(key, base=base, result=result, delta=result - base.astype(np.float64), **arrays)

    @property
    def digest(self) -> str:
        """The content digest: SHA-256 over the canonical JSON of key → parts with their roles."""
        return digest_of(self.content)

    @property
    def text(self) -> str:
        """The canonical metadata text."""
        return rfc8785.dumps(self.top).decode()

    @property
    def path(self) -> str:
        """Of the file, below the folder of the vectors."""
        return f"valid/{self.name}.safetensors"

    def files(self) -> dict[str, bytes]:
        """The file, and beside it what it must mean, by path."""
        return {
            self.path: self.data or save(self.tensors, metadata={"loraformat": self.text}),
            f"valid/{self.name}.expected.safetensors": save(self.expected),
        }

    def as_json(self) -> dict[str, Any]:
        """The entry in the index."""
        return {
            "path": self.path,
            "verdict": "valid",
            "rules": list(self.rules),
            "title": self.title,
            "expected": f"valid/{self.name}.expected.safetensors",
            "digest": self.digest,
            "canonical": self.canonical,
        }


def digest_of(content: dict[str, list[dict[str, Any]]]) -> str:
    """SHA-256 over the canonical JSON of key → parts with their roles."""
    return hashlib.sha256(rfc8785.dumps(content)).hexdigest()


def content_of(part: Part) -> dict[str, Any]:
    """What of a part the digest covers."""
    return fields_of(part) | {"roles": {role: _role(tensor) for role, tensor in roles_of(part).items()}}


def _role(tensor: Array) -> dict[str, Any]:
    # Every machine that runs this is little-endian; tobytes gives row-major order.
    sha256 = hashlib.sha256(tensor.tobytes()).hexdigest()
    return {"dtype": _DTYPES[tensor.dtype.name], "shape": list(tensor.shape), "sha256": sha256}
