"""Recipes: what adapters were combined of, so that the same inputs give the same bytes again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat import canonical, registry
from loraformat.combining.settings import How
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.faults import is_number
from loraformat.identity import digest
from loraformat.verbs.combine import Combined, combine

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["Recipe", "follow", "read_recipe", "recipe_text"]

_SETTINGS = {"method": str, "rank": (int, str), "density": float, "gamma": float, "epsilon": float, "seed": int}
_FORM = {"recipe": int, "made_by": str, "any_base": bool, "inputs": list, "result": str, **_SETTINGS}
_INPUT = {"path": str, "digest": str, "weight": dict}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe as it was read.

    Attributes:
        inputs: (path beside the recipe, content digest, weight) of each adapter, in order.
        result: the content digest of what the recipe gives, where it promises one.
        made_by: the version of loraformat that wrote it.
    """

    how: How
    inputs: Sequence[tuple[str, str, Mapping[str, float]]]
    result: str | None
    made_by: str
    any_base: bool = False


def recipe_text(combined: Combined, paths: Sequence[str], folder: Path, any_base: bool = False) -> str:
    """The JSON of a recipe that lies in ``folder``; the inputs at ``paths`` are named from there."""
    said = dict(combined.adapter.provenance["combined"])
    del said["residuals"]
    named = [Path(os.path.relpath(path, folder)).as_posix() for path in paths]
    said["inputs"] = [{"path": path, **item} for path, item in zip(named, said["inputs"], strict=True)]
    head: dict[str, Any] = {"recipe": 1, "made_by": f"loraformat {version('loraformat')}"}
    head |= {"any_base": True} if any_base else {}
    return json.dumps(head | said | {"result": digest(combined.adapter)}, indent=2, ensure_ascii=False) + "\n"


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a file.

    Raises:
        LoraFormatError: LF-701 it cannot be read; LF-705 it is no recipe.
    """
    try:
        value = canonical.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise fault("LF-701", f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise fault("LF-705", f"{path} is no JSON: {error}") from None
    if problems := _faults(value):
        raise LoraFormatError([Problem("LF-705", f"not a recipe: {what}", str(path)) for what in problems])
    how = How(**{field.name: value[field.name] for field in fields(How) if field.name in value})
    inputs = [(item["path"], item["digest"], item["weight"]) for item in value["inputs"]]
    return Recipe(how, inputs, value.get("result"), value["made_by"], value.get("any_base", False))


def follow(path: str | os.PathLike[str], given: Sequence[str] = ()) -> Combined:
    """What a recipe gives.

    Args:
        given: where the inputs lie now; each is recognised by its digest. Default: where the recipe says.

    Raises:
        LoraFormatError: LF-614 an input is not the one that the recipe names, or the result is another.
    """
    recipe, folder = read_recipe(path), Path(path).parent
    adapters = _found(recipe, list(given) or [str(folder / name) for name, _, _ in recipe.inputs], bool(given))
    pairs = [(adapter, weight) for adapter, (_, _, weight) in zip(adapters, recipe.inputs, strict=True)]
    settings = {field.name: getattr(recipe.how, field.name) for field in fields(How)}
    done = combine(pairs, **settings, any_base=recipe.any_base)
    made = digest(done.adapter)
    if recipe.result is not None and made != recipe.result:
        what = f"the result has the digest {made[:12]}…, the recipe promises {recipe.result[:12]}…"
        fix = f"it was made by {recipe.made_by}, perhaps on a processor whose linear algebra rounds otherwise; "
        raise fault("LF-614", what, where=str(path), fix=f"{fix}a recipe without a result promises no digest")
    return done


def _found(recipe: Recipe, paths: Sequence[str], anywhere: bool) -> list[Adapter]:
    """The inputs in the order of the recipe, each checked by its digest."""
    read = [registry.load(path) for path in paths]
    digests = [digest(adapter) for adapter in read]
    problems, found = [], []
    for i, (name, wanted, _) in enumerate(recipe.inputs):
        at = digests.index(wanted) if wanted in digests and anywhere else i
        if at < len(digests) and digests[at] == wanted:
            found.append(read[at])
            continue
        seen = f"{paths[i]} has {digests[i][:12]}…" if not anywhere else "none of those given has it"
        what = f"the recipe's input {name} has the digest {wanted[:12]}…; {seen}"
        problems.append(Problem("LF-614", what, name, "give the adapter that the recipe was made with"))
    if anywhere and (
        spare := [p for p, d in zip(paths, digests, strict=True) if d not in {w for _, w, _ in recipe.inputs}]
    ):
        problems += [Problem("LF-614", "the recipe has no input of this digest", path) for path in spare]
    if problems:
        raise LoraFormatError(problems)
    return found


def _faults(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return ["it is no object"]
    faults = _members(value, _FORM, ("recipe", "made_by", "method", "inputs"), "")
    if value.get("recipe", 1) != 1:
        faults.append(f"its version is {value['recipe']!r}, this reader knows 1")
    if not faults and not value["inputs"]:
        faults.append("it has no inputs")
    for i, item in enumerate(value["inputs"] if not faults else ()):
        where = f"inputs[{i}]"
        if not isinstance(item, dict):
            faults.append(f"{where} is no object")
            continue
        faults += _members(item, _INPUT, tuple(_INPUT), f"{where}.")
        weight = item.get("weight")
        if isinstance(weight, dict) and not all(is_number(number) for number in weight.values()):
            faults.append(f"{where}.weight maps patterns to numbers")
    return faults


def _members(value: Mapping[str, Any], types: Mapping[str, Any], required: Sequence[str], where: str) -> list[str]:
    """What is unknown, missing or of the wrong type."""
    faults = [f"unknown field {where}{name}" for name in value if name not in types]
    faults += [f"{where}{name} is missing" for name in required if name not in value]
    for name, kind in types.items():
        if name in value and not (is_number(value[name]) if kind is float else _is(value[name], kind)):
            faults.append(f"{where}{name} must not be {value[name]!r}")
    return faults


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
