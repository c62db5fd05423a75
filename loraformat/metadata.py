"""Adapter → the ``loraformat`` metadata value, and the tables of its fields (§5–§7 of the specification)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from loraformat import canonical

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.parts import Part
    from loraformat.updates import Update

__all__ = ["FEATURES", "PART_FIELDS", "TARGET_FIELDS", "TOP_FIELDS", "VERSION", "part_json", "render"]

VERSION = "1.0"
FEATURES: frozenset[str] = frozenset()
"""Features that ``requires`` may name and this reader understands: none yet."""

# Field → type; [str] is a list of strings, [int] a list of integers, object anything (it has a rule of its own).
TOP_FIELDS: Mapping[str, Any] = {
    "version": str,
    "requires": [str],
    "names": str,
    "components": [str],
    "targets": dict,
    "base_model": dict,
    "about": dict,
    "provenance": dict,
    "extensions": dict,
}
TARGET_FIELDS: Mapping[str, Any] = {
    "shape": [int],
    "axes": dict,
    "op": str,
    "assumed": [str],
    "parts": [object],
    "base_sha256": str,
}
_SCALED = {"kind": str, "alpha": object, "scale_rule": str, "r": int}
PART_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "replace": {"kind": str, "allows": [str]},
    "lora": _SCALED,
    "loha": _SCALED,
    "lokr": _SCALED,
    "delta": _SCALED,
    "magnitude": {"kind": str, "magnitude_axes": [int], "eps": (int, float)},
    "rows": {"kind": str, "axis": int},
}


def render(adapter: Adapter) -> str:
    """The canonical text of the ``loraformat`` value; absent and empty fields are left out.

    Raises:
        ValueError: a field has no canonical JSON form.
    """
    out: dict[str, Any] = {"version": VERSION, "names": adapter.names}
    out["targets"] = {key: _target_json(update) for key, update in adapter.items()}
    for name in ("requires", "components", "base_model", "about", "provenance", "extensions"):
        if value := getattr(adapter, name):
            out[name] = list(value) if isinstance(value, tuple) else dict(value)
    return canonical.dumps(out)


def part_json(part: Part) -> dict[str, Any]:
    """A part as the file states it: its kind and fields, without its tensors and without defaults."""
    out: dict[str, Any] = {"kind": part.kind}
    for name in PART_FIELDS[part.kind]:
        value = getattr(part, name)
        default = next((f.default for f in fields(part) if f.name == name), MISSING)
        if name in ("alpha", "scale_rule") or (value is not None and value != default):
            out[name] = list(value) if isinstance(value, tuple) else value
    return out


def _target_json(update: Update) -> dict[str, Any]:
    out: dict[str, Any] = {"parts": [part_json(part) for part in update.parts]}
    if update.placement is not None:
        out |= update.placement.as_json()
    for name in ("op", "base_sha256"):
        if (value := getattr(update, name)) is not None:
            out[name] = value
    return out | ({"assumed": list(update.assumed)} if update.assumed else {})
