"""The bytes of a GGUF file, read forward: no step leaves the file, and no length in it is believed before it is checked."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from loraformat.errors import LoraFormatError, fault

__all__ = ["SCALARS", "Cursor", "Value", "unsound"]

SCALARS = {
    0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"), 5: ("i32", "i"),
    6: ("f32", "f"), 7: ("bool", "B"), 10: ("u64", "Q"), 11: ("i64", "q"), 12: ("f64", "d"),
}  # fmt: skip
"""GGUF's number of a scalar type → its name here and that of ``struct`` (gguf 0.19.0 constants.py GGUFValueType)."""

STRING, ARRAY = 8, 9

_LONGEST_KEY = 2**16 - 1  # the GGUF specification's own
_LONGEST_STRING = 16 * 2**20
_KEPT = 4096  # longer arrays, such as a vocabulary, are passed over
_MOST_STRINGS = 2**22


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value.

    Attributes:
        type: ``u32``, ``str``, ``[f32]``, …
        value: a Python value; of an array a list, or None where it is too long to be kept.
    """

    type: str
    value: Any


def unsound(what: str, where: str = "") -> LoraFormatError:
    """LF-511."""
    return fault("LF-511", what, where=where, fix="is the file whole? download or convert it again")


class Cursor:
    """A place in the bytes of a file of ``size`` bytes, little-endian."""

    def __init__(self, data: Any, size: int) -> None:
        self.data, self.size, self.at = data, size, 0

    def skip(self, count: int, what: str) -> int:
        """Go on by ``count`` bytes, which the file must have; where they began."""
        start = self.at
        if count > self.size - start:
            raise unsound(f"{what} needs {count:,} bytes at byte {start:,}, and the file ends at {self.size:,}")
        self.at += count
        return start

    def scalar(self, kind: int, what: str) -> Any:
        """One value of a scalar type."""
        name, code = SCALARS[kind]
        (value,) = struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(code), what))
        if name != "bool":
            return value
        if value > 1:
            raise unsound(f"{what} is a bool of {value}")
        return bool(value)

    def string(self, what: str, most: int = _LONGEST_STRING) -> str:
        """A length of 8 bytes and as many bytes of UTF-8."""
        length = self.scalar(10, f"the length of {what}")
        if length > most:
            raise unsound(f"{what} is a string of {length:,} bytes; the most is {most:,}")
        start = self.skip(length, what)
        try:
            return bytes(self.data[start : start + length]).decode()
        except UnicodeDecodeError as error:
            raise unsound(f"{what} is no UTF-8: {error.reason}") from None

    def key(self, what: str) -> str:
        """The name of a value."""
        found = self.string(what, _LONGEST_KEY)
        if not found:
            raise unsound(f"{what} is empty")
        return found

    def value(self, key: str) -> Value:
        """A type and a value of it. Arrays of arrays, which llama.cpp does not read either, are refused."""
        kind, what = self.scalar(4, f"the type of {key}"), f"the value of {key}"
        if kind in SCALARS:
            return Value(SCALARS[kind][0], self.scalar(kind, what))
        if kind == STRING:
            return Value("str", self.string(what))
        if kind != ARRAY:
            raise unsound(f"{kind} is no type of a value", key)
        item, count = self.scalar(4, f"the type of {key}"), self.scalar(10, f"the length of {key}")
        if item == STRING:
            return Value("[str]", self._strings(count, what))
        if item not in SCALARS:
            raise unsound(f"an array of type {item}", key)
        return Value(f"[{SCALARS[item][0]}]", self._scalars(item, count, what))

    def _scalars(self, kind: int, count: int, what: str) -> list[Any] | None:
        if count <= _KEPT:
            return [self.scalar(kind, what) for _ in range(count)]
        self.skip(count * struct.calcsize(SCALARS[kind][1]), what)
        return None

    def _strings(self, count: int, what: str) -> list[str] | None:
        if count <= _KEPT:
            return [self.string(what) for _ in range(count)]
        if count > _MOST_STRINGS:
            raise unsound(f"{what} is an array of {count:,} strings; the most is {_MOST_STRINGS:,}")
        unpack, at = struct.Struct("<Q").unpack_from, self.at
        for _ in range(count):  # a vocabulary has a quarter of a million: no call for each
            at += 8 + unpack(self.data, at)[0] if at + 8 <= self.size else 8
            if at > self.size:
                raise unsound(f"{what} ends beyond the file, at byte {at:,} of {self.size:,}")
        self.at = at
        return None
