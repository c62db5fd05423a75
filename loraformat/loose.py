"""Sources of loose tensors: a name ends with a role, and no configuration says the scale. For authors of layouts.

``Loose`` gathers parts and everything that is wrong; ``finish`` gives the adapter, or all problems at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from loraformat.adapter import Adapter
from loraformat.container import dtype_name
from loraformat.errors import LoraFormatError, Problem
from loraformat.names import key_fault
from loraformat.parts import ORDER
from loraformat.shapes import FLOATS, shape_problems
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.axes import Placement
    from loraformat.layout import ReadOptions
    from loraformat.parts import Part
    from loraformat.scale import ScaleRule

    Array = npt.NDArray[Any]

__all__ = ["Loose", "by_module"]

T = TypeVar("T")


def by_module(tensors: Mapping[str, T], endings: Mapping[str, str]) -> tuple[dict[str, dict[str, T]], dict[str, T]]:
    """(module → role → tensor, the rest by name), of names that are ``<module><ending>``.

    >>> by_module({"a.q.lora_A": 1, "a.bias": 2}, {".lora_A": "lora_A"})
    ({'a.q': {'lora_A': 1}}, {'a.bias': 2})
    """
    modules: dict[str, dict[str, T]] = {}
    rest: dict[str, T] = {}
    for name in tensors:
        ending = next((end for end in endings if name.endswith(end) and len(name) > len(end)), None)
        if ending is None:
            rest[name] = tensors[name]
        else:
            modules.setdefault(name.removesuffix(ending), {})[endings[ending]] = tensors[name]
    return modules, rest


class Loose:
    """An adapter in the making.

    Attributes:
        options: what the user states.
        alpha, rank, rule: what the source itself states for all of it, where it does.
        tool: who computes the scale, for the error that asks for it.
    """

    def __init__(self, options: ReadOptions, tool: str) -> None:
        self.options = options
        self.tool = tool
        self.alpha: float | None = None
        self.rank: int | None = None
        self.rule: ScaleRule | None = None
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self._updates: dict[str, Update] = {}

    def say(self, rule: str, what: str, where: str, fix: str = "") -> None:
        """Note an error."""
        self.problems.append(Problem(rule, what, where, fix))

    def warn(self, rule: str, what: str, where: str, fix: str = "") -> None:
        """Note a warning."""
        self.warnings.append(Problem(rule, what, where, fix, "warning"))

    def sound(self, module: str, roles: Mapping[str, Array], wanted: Mapping[str, int]) -> bool:
        """Whether exactly the ``wanted`` roles are there, floats, not empty, each of so many axes.

        Notes LF-303, LF-309, LF-311, LF-314.
        """
        if missing := sorted(wanted.keys() - roles.keys()):
            self.say(
                "LF-303",
                f"{' and '.join(missing)} is missing: a lone factor says nothing",
                module,
                "an incomplete file?",
            )
            return False
        before = len(self.problems)
        for role, axes in wanted.items():
            dtype, sizes = dtype_name(roles[role].dtype), list(roles[role].shape)
            if dtype not in FLOATS:
                self.say("LF-314", f"{role} is {dtype}; factors are floats", module)
            elif len(sizes) != axes:
                self.say("LF-309", f"{role} is {sizes}; it has {axes} axes", module)
            elif 0 in sizes:
                self.say("LF-311", f"{role} is empty: {sizes}", module, "was it saved before it was gathered?")
        return len(self.problems) == before

    def scale(self, module: str, r: int) -> tuple[float, ScaleRule] | None:
        """(alpha, rule) of a pair that was trained with rank ``r``, as the source or the user states them.

        Notes LF-507 where two statements disagree, LF-509 where there is none.
        """
        said: tuple[tuple[str, Any, Any], ...] = (
            ("rank", self.rank, r),
            ("rank", self.options.rank, r),
            ("alpha", self.options.alpha, self.alpha),
            ("scale rule", self.options.scale_rule, self.rule),
        )
        for what, stated, found in said:
            if stated is not None and found is not None and stated != found:
                self.say("LF-507", f"the {what} is stated as {stated}, and is {found} by the source", module)
                return None
        alpha = self.options.alpha if self.alpha is None else self.alpha
        rule = self.rule or self.options.scale_rule
        if alpha is None or rule is None:
            fix = f"state it as the training code had it: --alpha A --scale-rule alpha/r (what {self.tool} computes)"
            self.say("LF-509", f"{self.tool} stores no alpha: the scale is unknown", module, fix)
            return None
        return alpha, rule

    def add(
        self, key: str, part: Part, place: Placement | None = None, *, op: str | None = None, assumed: bool = False
    ) -> None:
        """One part of one parameter's update; ``assumed`` where the parameter's name is that of the usual module."""
        old = self._updates.get(key, Update(()))
        if part.kind in old:
            self.say("LF-506", f"two different {part.kind} parts for one parameter: which is it?", key)
        parts = sorted((*old.parts, part), key=lambda p: ORDER.index(p.kind))
        names = ("name",) if assumed or old.assumed else ()
        self._updates[key] = Update(tuple(parts), old.placement or place, old.op or op, names)

    def finish(self, where: str, **fields: Any) -> Adapter:
        """The adapter, sorted by key, or every problem at once; ``fields`` are those of ``Adapter``."""
        for key, update in self._updates.items():
            if why := key_fault(key):
                self.say("LF-301", why, repr(key))
            else:
                self.problems += shape_problems(key, update)
        if not self._updates and not self.problems:
            self.say("LF-304", "no adapter's tensor in the file: it would change nothing", where)
        if self.problems:
            raise LoraFormatError(self.problems)
        return Adapter({key: self._updates[key] for key in sorted(self._updates)}, **fields)
