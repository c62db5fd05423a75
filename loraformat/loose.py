"""Sources of loose tensors: a name ends with a role, and no configuration says the scale. For authors of layouts.

``Loose`` is ``Gathered`` with what such sources have in common; ``finish`` gives the adapter, or all problems at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from loraformat import canonical
from loraformat.adapter import Adapter
from loraformat.dtypes import dtype_name
from loraformat.errors import fault
from loraformat.faults import brief, is_number, is_rank
from loraformat.gathered import Gathered
from loraformat.shapes import FLOATS

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.layout import ReadOptions
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


class Loose(Gathered):
    """An adapter in the making.

    Attributes:
        options: what the user states.
        alpha, rank, rule: what the source itself states for all of it, where it does.
        tool: who computes the scale, for the error that asks for it.
    """

    def __init__(self, options: ReadOptions, tool: str) -> None:
        super().__init__()
        self.options = options
        self.tool = tool
        self.alpha: float | None = None
        self.rank: int | None = None
        self.rule: ScaleRule | None = None

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

    def configure(self, text: str | None, file: str) -> Mapping[str, Any]:
        """Take r and lora_alpha from a configuration that lies beside, for a tool that knows alpha/r alone; all that it says.

        Raises:
            LoraFormatError: LF-503 it is not JSON, or has no rank and no number there.
        """
        if text is None:
            return {}
        try:
            value = canonical.loads(text)
        except ValueError as error:
            raise fault("LF-503", f"not valid JSON: {error}", where=file) from None
        known: Mapping[str, Any] = value if isinstance(value, dict) else {}
        rank, alpha = known.get("r"), known.get("lora_alpha")
        if not (is_rank(rank) and is_number(alpha)):
            what = f"r and lora_alpha are {brief(rank)} and {brief(alpha)}, not a rank and a number"
            raise fault("LF-503", what, where=file)
        self.alpha, self.rank, self.rule = alpha, rank, "alpha/r"
        return known

    def finish(self, where: str, **fields: Any) -> Adapter:
        """The adapter, sorted by key, or every problem at once; ``fields`` are those of ``Adapter``."""
        return Adapter(self.checked(where), **fields)
