"""The ``loraformat`` metadata value ↔ an Adapter. Field by field as in §5–§7 of the specification.

Parsing collects every fault before it raises; each line that reports one names its rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from loraformat import canonical
from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem
from loraformat.names import ROLES, component_fault, key_fault, name_space_fault, nearest, split_role
from loraformat.parts import KINDS, ORDER, Part
from loraformat.scale import SCALE_RULES
from loraformat.shapes import shape_problems
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["FEATURES", "VERSION", "parse", "part_json", "render"]

VERSION = "1.0"
FEATURES: frozenset[str] = frozenset()
"""Features that ``requires`` may name and this reader understands: none yet."""

_TOP = {
    "version": str, "requires": list, "names": str, "components": list, "targets": dict, "base_model": dict,
    "about": dict, "provenance": dict, "extensions": dict,
}  # fmt: skip
_REQUIRED = ("version", "names", "targets")
_TARGET = {"shape": list, "axes": dict, "op": str, "assumed": list, "parts": list, "base_sha256": str}
_SCALED = {"kind": str, "alpha": object, "scale_rule": str, "r": int}  # alpha has a rule of its own: LF-306
_PART: dict[str, Mapping[str, Any]] = {
    "replace": {"kind": str, "allows": list},
    "lora": _SCALED, "loha": _SCALED, "lokr": _SCALED, "delta": _SCALED,
    "magnitude": {"kind": str, "magnitude_axes": list, "eps": (int, float)},
    "rows": {"kind": str, "axis": int},
}  # fmt: skip
_SHA256 = re.compile(r"[0-9a-f]{64}")


def render(adapter: Adapter) -> str:
    """The canonical text of the ``loraformat`` value; absent and empty fields are left out."""
    out: dict[str, Any] = {"version": VERSION, "names": adapter.names}
    out["targets"] = {key: _target_json(update) for key, update in adapter.items()}
    for name in ("requires", "components", "base_model", "about", "provenance", "extensions"):
        if value := getattr(adapter, name):
            out[name] = list(value) if isinstance(value, tuple) else dict(value)
    return canonical.dumps(out)


def _target_json(update: Update) -> dict[str, Any]:
    out: dict[str, Any] = {"parts": [part_json(part) for part in update.parts]}
    if update.placement is not None:
        out |= update.placement.as_json()
    for name in ("op", "base_sha256"):
        if (value := getattr(update, name)) is not None:
            out[name] = value
    return out | ({"assumed": list(update.assumed)} if update.assumed else {})


def part_json(part: Part) -> dict[str, Any]:
    """A part as the file states it: its kind and fields, without its tensors and without defaults."""
    out: dict[str, Any] = {"kind": part.kind}
    for name in _PART[part.kind]:
        value = getattr(part, name)
        default = next((f.default for f in fields(part) if f.name == name), MISSING)
        if name in ("alpha", "scale_rule") or (value is not None and value != default):
            out[name] = list(value) if isinstance(value, tuple) else value
    return out


def parse(text: str, tensors: Mapping[str, Array]) -> tuple[Adapter, list[Problem]]:
    """The adapter that ``text`` and ``tensors`` (by ``<key>.<role>``) describe, and the warnings.

    Raises:
        LoraFormatError: LF-202 … LF-311, LF-314, LF-401 … LF-408: all of them at once.
    """
    return _Parser(tensors).run(text)


class _Parser:
    """One pass over the value; ``say`` notes a fault and goes on."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self.tensors = tensors
        self.problems: list[Problem] = []
        self.roles: dict[str, dict[str, Array]] = {}

    def say(self, rule: str, what: str, where: str, fix: str = "") -> None:
        self.problems.append(Problem(rule, what, where, fix))

    def warn(self, rule: str, what: str, where: str) -> None:
        self.problems.append(Problem(rule, what, where, severity="warning"))

    def run(self, text: str) -> tuple[Adapter, list[Problem]]:
        try:
            value = canonical.loads(text)
            canonical_text = canonical.dumps(value)
        except (ValueError, RecursionError) as error:
            raise LoraFormatError(Problem("LF-202", f"not I-JSON: {error}", "loraformat")) from None
        if not isinstance(value, dict):
            raise LoraFormatError(Problem("LF-202", "the value is not a JSON object", "loraformat"))
        if canonical_text != text:
            self.warn("LF-207", "the value is not canonical JSON (RFC 8785): equal adapters would differ", "loraformat")
        self.version(value)  # an unknown version or feature is refused before anything else is read into it
        top = self.fields(value, _TOP, "loraformat", required=_REQUIRED)
        components = self.head(top)
        self.collect_roles()
        targets = self.targets(top.get("targets", {}), components)
        if [p for p in self.problems if p.severity == "error"]:
            raise LoraFormatError(self.problems)
        extra = {n: top[n] for n in ("base_model", "about", "provenance", "extensions") if n in top}
        requires = tuple(top.get("requires", ()))
        return Adapter(targets, top["names"], components, requires=requires, **extra), self.problems

    def version(self, value: Mapping[str, Any]) -> None:
        version, requires = value.get("version"), value.get("requires", [])
        if isinstance(version, str) and version.partition(".")[0] != VERSION.partition(".")[0]:
            what = f"version {version} is not one that this reader ({VERSION}) knows"
            self.say("LF-205", what, "loraformat.version", "use a newer loraformat")
        unknown = [f for f in requires if f not in FEATURES] if isinstance(requires, list) else []
        if unknown:
            fix = "use a loraformat that knows it; ignoring it would give wrong numbers"
            self.say("LF-206", f"the file requires {unknown}, unknown to this reader", "loraformat.requires", fix)
        if self.problems and self.problems[-1].rule in ("LF-205", "LF-206"):
            raise LoraFormatError(self.problems)

    def fields(
        self, value: Any, types: Mapping[str, Any], where: str, required: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """The members of known name and right type."""
        if not isinstance(value, dict):
            self.say("LF-203", f"expected an object, got {value!r}", where)
            return {}
        out: dict[str, Any] = {}
        for name, member in value.items():
            if name not in types:
                hint = nearest(name, types)
                known = f"; did you mean {hint[0]!r}?" if hint else ""
                self.warn("LF-204", f"unknown field {name!r}, ignored{known}", where)
            elif not isinstance(member, types[name]) or (isinstance(member, bool) and types[name] is not object):
                self.say("LF-203", f"{name} must not be {_brief(member)}", f"{where}.{name}")
            else:
                out[name] = member
        for name in required:
            if name not in value:
                self.say("LF-203", f"required field {name!r} is missing", where)
        return out

    def head(self, top: Mapping[str, Any]) -> tuple[str, ...]:
        if "names" in top and (why := name_space_fault(top["names"])):
            self.say("LF-208", why, "loraformat.names")
        for name in ("requires", "components"):
            if not all(isinstance(item, str) for item in top.get(name, ())):
                self.say("LF-203", f"{name} must be a list of strings", f"loraformat.{name}")
                return ()
        for name, text in top.get("extensions", {}).items():
            if not isinstance(text, str):
                self.say("LF-203", "an extension is text", f"loraformat.extensions.{name}")
        components = tuple(top.get("components", ()))
        for component in components:
            if why := component_fault(component):
                self.say("LF-209", why, "loraformat.components")
        return components

    def collect_roles(self) -> None:
        for name in self.tensors:
            key, role = split_role(name)
            if role in ROLES:
                self.roles.setdefault(key, {})[role] = self.tensors[name]
            else:
                what = f"{role!r} is no role: a tensor is <key>.<role>, role one of {', '.join(sorted(ROLES))}"
                self.say("LF-302", what, name)

    def targets(self, value: Mapping[str, Any], components: tuple[str, ...]) -> dict[str, Update]:
        if not value and not any(p.rule == "LF-203" for p in self.problems):
            self.say("LF-304", "the file has no target: it would change nothing", "loraformat.targets")
        out = {}
        for key in sorted(value):
            if why := key_fault(key):
                self.say("LF-301", why, repr(key))
            if components and key.partition(":")[0] not in components:
                what = f"the key begins with none of the components {', '.join(components)}"
                self.say("LF-209", what, key)
            if (update := self.target(key, value[key])) is not None:
                out[key] = update
        for key, roles in self.roles.items():
            for role in roles:
                what = "no part of the target stores this tensor" if key in value else "no such target is listed"
                self.say("LF-302", what, f"{key}.{role}")
        return out

    def target(self, key: str, value: Any) -> Update | None:
        where = f'targets["{key}"]'
        before = len(self.problems)
        entry = self.fields(value, _TARGET, where, required=("parts",))
        placement = self.placement(entry, where)
        sha256 = entry.get("base_sha256")
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            self.say("LF-407", f"{sha256!r} is not 64 lower-case hexadecimal digits", where)
        if not all(isinstance(word, str) for word in entry.get("assumed", ())):
            self.say("LF-203", "assumed must be a list of strings", where)
        roles = self.roles.pop(key, {})
        sketch = roles.pop("sketch", None)
        parts = self.parts(entry.get("parts"), roles, where)
        self.roles |= {key: roles} if roles else {}
        if any(p.severity == "error" for p in self.problems[before:]):
            return None
        update = Update(parts, placement, entry.get("op"), tuple(entry.get("assumed", ())), sha256, sketch)
        self.problems += shape_problems(key, update)
        return update

    def placement(self, entry: Mapping[str, Any], where: str) -> Placement | None:
        if ("shape" in entry) != ("axes" in entry):
            self.say("LF-401", "shape and axes must be both present (placed) or both absent (unplaced)", where)
        if "shape" not in entry or "axes" not in entry:
            return None
        axes = self.fields(entry["axes"], {"out": list, "in": list, "batch": list}, f"{where}.axes", ("out", "in"))
        lists = [entry["shape"], *(axes.get(g, []) for g in ("out", "in", "batch"))]
        if not all(type(n) is int and n >= 0 for numbers in lists for n in numbers):
            self.say("LF-203", "shape and axes hold non-negative integers", where)
            return None
        place = Placement(*(tuple(numbers) for numbers in lists))
        if why := place.fault():
            self.say("LF-402", why, where)
            return None
        return place

    def parts(self, value: Any, roles: dict[str, Array], where: str) -> tuple[Part, ...]:
        if not isinstance(value, list):
            return ()
        kinds = [p.get("kind") if isinstance(p, dict) else None for p in value]
        unknown = [kind for kind in kinds if kind not in ORDER]
        if unknown or not kinds:
            what = f"unknown kinds {unknown}; known: {', '.join(ORDER)}" if unknown else "the list of parts is empty"
            self.say("LF-305", what, f"{where}.parts")
            return ()
        if kinds != sorted(set(kinds), key=ORDER.index):
            self.say("LF-305", f"parts {kinds} must be distinct and in the order {', '.join(ORDER)}", f"{where}.parts")
            return ()
        built = (self.part(entry, roles, f"{where}.parts[{i}]") for i, entry in enumerate(value))
        return tuple(part for part in built if part is not None)

    def part(self, value: dict[str, Any], roles: dict[str, Array], where: str) -> Part | None:
        cls = KINDS[value["kind"]]
        scaled = "alpha" in _PART[value["kind"]]
        entry = self.fields(value, _PART[value["kind"]], where, ("alpha", "scale_rule") if scaled else ())
        arguments: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in ROLES:
                if field.name in roles:
                    arguments[field.name] = roles.pop(field.name)
                elif field.default is MISSING:
                    self.say("LF-303", f"a {value['kind']} part needs the tensor {field.name!r}", where)
                    return None
            elif field.name in entry:
                member = entry[field.name]
                arguments[field.name] = tuple(member) if isinstance(member, list) else member
        if not self.scale(entry, scaled, where):
            return None
        part: Part = cls(**arguments)
        if isinstance(value.get("r"), int) and value["r"] != part.r:  # type: ignore[union-attr]
            self.say("LF-308", f"r is stated as {value['r']}, the tensors have rank {part.r}", where)  # type: ignore[union-attr]
        if scaled and part.r is None and entry["scale_rule"] != "factor":  # type: ignore[union-attr]
            self.say("LF-307", f"rule {entry['scale_rule']} divides by r, which is absent", where)
        return part

    def scale(self, entry: Mapping[str, Any], scaled: bool, where: str) -> bool:
        if not scaled:
            return True
        if "alpha" not in entry or "scale_rule" not in entry:
            return False
        alpha = entry["alpha"]
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            self.say("LF-306", f"alpha is {_brief(alpha)}; it must be a finite number", where)
            return False
        if entry["scale_rule"] not in SCALE_RULES:
            known = ", ".join(SCALE_RULES)
            self.say("LF-307", f"scale_rule {entry['scale_rule']!r} is not one of {known}", where)
            return False
        if entry.get("r", 1) < 1:
            self.say("LF-307", f"r is {entry['r']}: a rank is at least 1", where)
            return False
        return True


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
