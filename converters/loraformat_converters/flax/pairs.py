"""What every reader of a tree does: two leaves a target, nothing left over, every fault at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.adapter import Adapter
from loraformat.dtypes import dtype_name
from loraformat.errors import Problem
from loraformat.gathered import Gathered
from loraformat.names import key_fault
from loraformat.parts import Lora
from loraformat.shapes import FLOATS, shape_problems
from loraformat.updates import Update
from loraformat_converters.flax.tree import output

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.axes import Placement
    from loraformat.layout import Output, ReadOptions, WriteOptions
    from loraformat.scale import ScaleRule
    from loraformat_converters.flax.tree import Tree

    Array = npt.NDArray[Any]

__all__ = ["Draft", "OfTrees", "form_of", "grouped", "kept_form", "one_scale", "scale_stated", "unscaled"]


class OfTrees:
    """What the layouts have in common whose pairs are leaves of a tree, in any container: see ``loraformat.layout``."""

    carries = frozenset({"lora"})
    writes = True
    markers = frozenset({"_METADATA"})
    endings: tuple[str, ...] = ()
    names = frozenset({"flax"})
    name: str

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """The leaves, in the container that the output's name asks for."""
        form = kept_form(adapter, self.name)
        return output(self.leaves(adapter), options.ending, value=form["value"], root=form["root"])

    def leaves(self, adapter: Adapter) -> dict[str, Array]:
        """Path → array; LF-508 for what is no pair of this layout."""
        raise NotImplementedError


def grouped(
    tree: Mapping[str, Array], split: Callable[[str], tuple[str, str] | None]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(stem → role → path, the paths that are no role's), by a function that divides a path into stem and role."""
    stems: dict[str, dict[str, str]] = {}
    others = []
    for path in tree:
        if (found := split(path)) is None:
            others.append(path)
        else:
            stems.setdefault(found[0], {})[found[1]] = path
    return stems, others


class Draft(Gathered):
    """Pairs of a tree's leaves in the making, and everything that is wrong with them."""

    def __init__(self, tree: Mapping[str, Array]) -> None:
        super().__init__()
        self.tree = tree

    def pairs(
        self, stems: Mapping[str, Mapping[str, str]], roles: tuple[str, str]
    ) -> Iterator[tuple[str, Array, Array]]:
        """(stem, the array of the first role, that of the second), where both are there and hold floats."""
        for stem, own in stems.items():
            if missing := [role for role in roles if role not in own]:
                self.say("LF-303", f"{missing[0]} is missing beside {', '.join(own)}", stem)
                continue
            a, b = (self.tree[own[role]] for role in roles)
            bad = [dtype_name(t.dtype) for t in (a, b) if dtype_name(t.dtype) not in FLOATS]
            if bad:
                self.say("LF-314", f"a factor of {bad[0]}", stem)
            elif a.ndim < 2 or b.ndim < 2:
                self.say(
                    "LF-309", f"{roles[0]} {list(a.shape)} and {roles[1]} {list(b.shape)} have two axes at least", stem
                )
            else:
                yield stem, a, b

    def target(self, key: str, part: Lora, place: Placement | None, assumed: tuple[str, ...] = ()) -> None:
        """One target, if its factors fit each other and what is known of its base."""
        update = Update((part,), place, assumed=assumed)
        if why := key_fault(key):
            self.say("LF-301", why, key)
        elif key in self.updates:
            self.say("LF-502", "two pairs of one parameter", key)
        elif why := part.fault():
            self.say("LF-309", why, key)
        elif found := list(shape_problems(key, update)):
            self.problems += found
        else:
            self.updates[key] = update

    def strays(self, paths: list[str], fix: str) -> None:
        """LF-506 for leaves that are no factors."""
        for path in paths:
            self.say("LF-506", "the leaf is no factor", path, fix)

    def finish(self, names: str, extensions: Mapping[str, str], where: str) -> Adapter:
        """The adapter, or every fault; LF-304 where it has no target."""
        return Adapter(self.checked(where), names=names, extensions=extensions)


def form_of(tree: Tree | None) -> dict[str, Any]:
    """What a layout keeps of how the leaves were stored, so that they are stored so again."""
    return {"root": tree.root, "value": tree.value} if tree is not None else {"root": "", "value": False}


def kept_form(adapter: Adapter, layout: str) -> dict[str, Any]:
    """What ``form_of`` said, and the layout added, of an adapter that this layout read; else what a fresh one has."""
    fresh: dict[str, Any] = {"root": "", "value": False}
    try:
        form = json.loads(adapter.extensions.get(layout, "null"))
    except ValueError:
        return fresh
    if not isinstance(form, dict):
        return fresh
    form = fresh | form
    known = (
        isinstance(form["root"], str) and not form["root"].replace("params/", "") and isinstance(form["value"], bool)
    )
    return form if known else fresh


def unscaled(key: str, part: Lora, layout: str) -> Iterator[Problem]:
    """LF-508 where a layout without a scale is to hold one."""
    if part.scale != 1.0:
        yield Problem("LF-508", f"{layout} has no scale, here it is {part.scale:g}", key, "--fold-scale")


def one_scale(adapter: Adapter) -> Iterator[Problem]:
    """LF-508 where a layout whose scale is in the program, once for all, is to hold several."""
    scales = {update["lora"].scale for update in adapter.values()}
    if len(scales) > 1:
        what = f"the program has one scale for all, here they are {min(scales):g} to {max(scales):g}"
        yield Problem("LF-508", what, "", "--fold-scale")


def scale_stated(options: ReadOptions, draft: Draft, where: str) -> tuple[float, ScaleRule] | None:
    """(alpha, rule) that the user states, for trees that hold none; LF-509 where he does not."""
    if options.alpha is None:
        fix = "give what the training had: --alpha A (and --scale-rule, default alpha/r)"
        draft.say("LF-509", "the tree states no alpha: it is in the program that trained it", where, fix)
        return None
    return options.alpha, options.scale_rule or "alpha/r"
