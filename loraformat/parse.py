"""The ``loraformat`` metadata value and the file's tensors → Adapter. Every fault is noted; each names its rule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from loraformat import canonical
from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem
from loraformat.faults import Faults, brief
from loraformat.metadata import FEATURES, PART_FIELDS, TARGET_FIELDS, TOP_FIELDS, VERSION
from loraformat.names import ROLES, component_fault, key_fault, name_space_fault, split_role
from loraformat.parts import KINDS, ORDER, Part
from loraformat.scale import LARGEST, SCALE_RULES
from loraformat.shapes import shape_problems
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["parse"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)")


def parse(text: str, tensors: Mapping[str, Array]) -> tuple[Adapter, list[Problem]]:
    """The adapter that ``text`` and ``tensors`` (by ``<key>.<role>``) describe, and the warnings.

    Raises:
        LoraFormatError: LF-202 … LF-314, LF-401 … LF-408: all of them at once.
    """
    faults = Faults()
    value = _value(text, faults)
    _check_version(value, faults)  # an unknown version or feature is refused before anything else is read into it
    top = faults.members(value, TOP_FIELDS, "loraformat", required=("version", "names", "targets"))
    components = _head(top, faults)
    targets = _targets(top.get("targets"), components, _by_key(tensors, faults), faults)
    faults.stop_if_any()
    extra = {name: top[name] for name in ("base_model", "about", "provenance", "extensions") if name in top}
    adapter = Adapter(targets, top["names"], components, requires=tuple(top.get("requires", ())), **extra)
    return adapter, faults.problems


def _value(text: str, faults: Faults) -> dict[str, Any]:
    try:
        value = canonical.loads(text)
        spelled = canonical.dumps(value)
    except (ValueError, RecursionError) as error:
        raise LoraFormatError(Problem("LF-202", f"not I-JSON: {error}", "loraformat")) from None
    if not isinstance(value, dict):
        raise LoraFormatError(Problem("LF-202", "the value is not a JSON object", "loraformat"))
    if spelled != text:
        what = "the value is not canonical JSON (RFC 8785): equal adapters would differ"
        faults.warn("LF-207", what, "loraformat")
    return value


def _check_version(value: Mapping[str, Any], faults: Faults) -> None:
    version, requires = value.get("version"), value.get("requires", [])
    if isinstance(version, str):
        match = _VERSION.fullmatch(version)
        if match is None or match[1] != VERSION.partition(".")[0]:
            what = f"version {version!r} is not one that this reader ({VERSION}) knows"
            faults.say("LF-205", what, "loraformat.version", "use a newer loraformat")
    if isinstance(requires, list) and all(isinstance(f, str) for f in requires) and (new := set(requires) - FEATURES):
        what = f"the file requires {', '.join(sorted(new))}, unknown to this reader"
        fix = "use a loraformat that knows it; ignoring it would give wrong numbers"
        faults.say("LF-206", what, "loraformat.requires", fix)
    faults.stop_if_any()


def _head(top: Mapping[str, Any], faults: Faults) -> tuple[str, ...]:
    """Checks everything beside the targets; the components."""
    if "names" in top and (why := name_space_fault(top["names"])):
        faults.say("LF-208", why, "loraformat.names")
    for name, text in top.get("extensions", {}).items():
        if not isinstance(text, str):
            faults.say("LF-203", "an extension is text", f"loraformat.extensions.{name}")
    components = tuple(top.get("components", ()))
    for component in components:
        if why := component_fault(component):
            faults.say("LF-209", why, "loraformat.components")
    if len(set(components)) != len(components):
        faults.say("LF-209", "a component is listed twice", "loraformat.components")
    return components


def _by_key(tensors: Mapping[str, Array], faults: Faults) -> dict[str, dict[str, Array]]:
    """Key → role → tensor."""
    found: dict[str, dict[str, Array]] = {}
    for name in tensors:
        key, role = split_role(name)
        if role in ROLES:
            found.setdefault(key, {})[role] = tensors[name]
        else:
            what = f"{role!r} is no role: a tensor is <key>.<role>, role one of {', '.join(sorted(ROLES))}"
            faults.say("LF-302", what, name)
    return found


def _targets(
    value: Any, components: tuple[str, ...], tensors: dict[str, dict[str, Array]], faults: Faults
) -> dict[str, Update]:
    if not isinstance(value, dict):
        return {}
    if not value:
        faults.say("LF-304", "the file has no target: it would change nothing", "loraformat.targets")
    out = {}
    for key in sorted(value):
        if why := key_fault(key):
            faults.say("LF-301", why, repr(key))
        component, colon, name = key.partition(":")
        if components and not (component in components and colon and name):
            what = f"the key is not <component>:<name> with one of the components {', '.join(components)}"
            faults.say("LF-209", what, key)
        roles, before = tensors.pop(key, {}), faults.errors
        update = _target(key, value[key], roles, faults)
        if update is not None:
            out[key] = update
        if faults.errors == before:  # else the tensors left over are a consequence, not a fault of their own
            for role in roles:
                faults.say("LF-302", "no part of the target stores this tensor", f"{key}.{role}")
    for key, roles in tensors.items():
        for role in roles:
            faults.say("LF-302", "no such target is listed", f"{key}.{role}")
    return out


def _target(key: str, value: Any, roles: dict[str, Array], faults: Faults) -> Update | None:
    """The update; takes the tensors that its parts store out of ``roles``."""
    where, before = f'targets["{key}"]', faults.errors
    entry = faults.members(value, TARGET_FIELDS, where, required=("parts",))
    placement = _placement(value, entry, where, faults)
    sha256 = entry.get("base_sha256")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        faults.say("LF-407", f"{brief(sha256)} is not 64 lower-case hexadecimal digits", where)
    sketch = roles.pop("sketch", None)
    parts = _parts(entry.get("parts"), roles, where, faults)
    if faults.errors > before:
        return None
    update = Update(parts, placement, entry.get("op"), tuple(entry.get("assumed", ())), sha256, sketch)
    faults.problems += shape_problems(key, update)
    return update


def _placement(value: Any, entry: Mapping[str, Any], where: str, faults: Faults) -> Placement | None:
    if isinstance(value, dict) and ("shape" in value) != ("axes" in value):
        faults.say("LF-401", "shape and axes must be both present (placed) or both absent (unplaced)", where)
    if "shape" not in entry or "axes" not in entry:
        return None
    before = faults.errors
    types = {"out": [int], "in": [int], "batch": [int]}
    axes = faults.members(entry["axes"], types, f"{where}.axes", required=("out", "in"))
    if any(n < 0 for numbers in (entry["shape"], *axes.values()) for n in numbers):
        faults.say("LF-203", "shape and axes hold non-negative integers", where)
    if faults.errors > before:
        return None
    lists = (entry["shape"], axes["out"], axes["in"], axes.get("batch", ()))
    place = Placement(*(tuple(numbers) for numbers in lists))
    if why := place.fault():
        faults.say("LF-402", why, where)
        return None
    return place


def _parts(value: Any, roles: dict[str, Array], where: str, faults: Faults) -> tuple[Part, ...]:
    if not isinstance(value, list):
        return ()
    kinds = [p.get("kind") if isinstance(p, dict) else None for p in value]
    unknown = [kind for kind in kinds if kind not in ORDER]
    if unknown or not kinds:
        what = f"unknown kinds {brief(unknown)}; known: {', '.join(ORDER)}" if unknown else "the list of parts is empty"
        faults.say("LF-305", what, f"{where}.parts")
        return ()
    if kinds != sorted(set(kinds), key=ORDER.index):
        what = f"parts {kinds} must be distinct and in the order {', '.join(ORDER)}"
        faults.say("LF-305", what, f"{where}.parts")
        return ()
    built = (_part(entry, roles, f"{where}.parts[{i}]", faults) for i, entry in enumerate(value))
    return tuple(part for part in built if part is not None)


def _part(value: dict[str, Any], roles: dict[str, Array], where: str, faults: Faults) -> Part | None:
    kind, before = value["kind"], faults.errors
    scaled = "alpha" in PART_FIELDS[kind]
    entry = faults.members(value, PART_FIELDS[kind], where, ("alpha", "scale_rule") if scaled else ())
    arguments: dict[str, Any] = {}
    for field in fields(KINDS[kind]):
        if field.name in roles and field.name in ROLES:
            arguments[field.name] = roles.pop(field.name)
        elif field.name in ROLES and field.default is MISSING:
            faults.say("LF-303", f"a {kind} part needs the tensor {field.name!r}", where)
        elif field.name in entry:
            member = entry[field.name]
            arguments[field.name] = tuple(member) if isinstance(member, list) else member
    if scaled:
        _check_scale(entry, where, faults)
    if faults.errors > before:
        return None
    part: Part = KINDS[kind](**arguments)
    if scaled:
        _check_rank(part, entry, where, faults)
    return part


def _check_scale(entry: Mapping[str, Any], where: str, faults: Faults) -> None:
    alpha, rule = entry.get("alpha", 0), entry.get("scale_rule", "factor")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= LARGEST:
        faults.say("LF-306", f"alpha is {brief(alpha)}; it must be a number that is finite in float32", where)
    if rule not in SCALE_RULES:
        faults.say("LF-307", f"scale_rule {brief(rule)} is not one of {', '.join(SCALE_RULES)}", where)
    if entry.get("r", 1) < 1:
        faults.say("LF-307", f"r is {entry['r']}: a rank is at least 1", where)


def _check_rank(part: Any, entry: Mapping[str, Any], where: str, faults: Faults) -> None:
    if why := part.fault():
        faults.say("LF-309", why, where)
    elif "r" in entry and entry["r"] != part.r:
        faults.say("LF-308", f"r is stated as {entry['r']}, the tensors have rank {part.r}", where)
    elif part.r is None and entry["scale_rule"] != "factor":
        faults.say("LF-307", f"rule {entry['scale_rule']} divides by r, which is absent", where)
