"""An adapter in the making: parts by parameter, and everything that is wrong, gathered from all readers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraformat.adapter import Adapter
from loraformat.container import dtype_name
from loraformat.errors import LoraFormatError, Problem
from loraformat.names import key_fault
from loraformat.parts import ORDER
from loraformat.scale import ScaleRule
from loraformat.shapes import FLOATS, shape_problems
from loraformat.updates import Update
from loraformat_converters.peft import config as configs

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.axes import Placement
    from loraformat.layout import ReadOptions
    from loraformat.parts import Part

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["Draft"]

_GATHER = "was the adapter saved before its parameters were gathered (ZeRO-3, FSDP)?"


class Draft:
    """Collects parts and problems; ``finish`` makes the adapter of them or raises all that was said.

    Attributes:
        config: the configuration, or None beside a bare file.
        options: what the user states.
    """

    def __init__(self, config: configs.Config | None, options: ReadOptions) -> None:
        self.config = config
        self.options = options
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self._updates: dict[str, Update] = {}

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every parameter of the base; empty without one."""
        base = self.options.base
        return {name: p.shape for name, p in base.parameters().items()} if base is not None else {}

    def setting(self, name: str) -> Any:
        """A key of the configuration, or None."""
        return self.config.value.get(name) if self.config else None

    def say(self, rule: str, what: str, where: str, fix: str = "") -> None:
        """Note an error."""
        self.problems.append(Problem(rule, what, where, fix))

    def warn(self, rule: str, what: str, where: str, fix: str = "") -> None:
        """Note a warning."""
        self.warnings.append(Problem(rule, what, where, fix, "warning"))

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

    def sound(self, module: str, roles: Roles, axes: tuple[int, ...] | None = None) -> bool:
        """Whether the tensors are floats, not empty and of one of these numbers of axes (None: two or more)."""
        good = True
        for role, tensor in roles.items():
            dtype, sizes = dtype_name(tensor.dtype), list(tensor.shape)
            if dtype not in FLOATS:
                self.say("LF-314", f"{role} is {dtype}; factors are floats", module)
            elif (len(sizes) < 2) if axes is None else (len(sizes) not in axes):
                wanted = "two axes or more" if axes is None else " or ".join(map(str, axes)) + " axes"
                self.say("LF-309", f"{role} is {sizes}; it has {wanted}", module)
            elif 0 in sizes:
                self.say("LF-311", f"{role} is empty: {sizes}", module, _GATHER)
            else:
                continue
            good = False
        return good

    def scale(self, module: str, r: int) -> tuple[float, ScaleRule] | None:
        """(alpha, rule) by the configuration, else by the user's word; both where they agree.

        Notes LF-507 where two statements disagree, LF-509 where there is none.
        """
        alpha = self.config.alpha(module) if self.config else None
        rule: ScaleRule | None = self.config.rule if self.config and alpha is not None else None
        said: list[tuple[str, Any, Any]] = [
            ("rank", self.config.rank(module) if self.config else None, r),
            ("rank", self.options.rank, r),
            ("alpha", self.options.alpha, alpha),
            ("scale rule", self.options.scale_rule, rule),
        ]
        for what, stated, found in said:
            if stated is not None and found is not None and stated != found:
                told = f"the {what} is stated as {stated}, and is {found} by the tensors or {configs.FILE}"
                self.say("LF-507", told, module)
                return None
        alpha = self.options.alpha if alpha is None else alpha
        rule = rule or self.options.scale_rule
        if alpha is None or rule is None:
            fix = "state it: --alpha A --scale-rule alpha/r (or alpha/sqrt(r) for rsLoRA)"
            self.say("LF-509", f"no {configs.FILE} with an alpha: the scale is unknown", module, fix)
            return None
        if self.config and len(alphas := self.config.alphas(module)) > 1:
            # peft 0.21.2 writes the configuration with sorted keys: which pattern came first in training is lost.
            told = (
                f"alpha_pattern gives {' and '.join(map(str, alphas))}: PEFT takes the first in the file, {alphas[0]}"
            )
            self.warn("LF-507", told, module, "training may have used another: state it in a pattern of its own")
        return alpha, rule

    def finish(self, where: str) -> Adapter:
        """The adapter, sorted by key, or every problem at once."""
        for key, update in self._updates.items():
            if why := key_fault(key):
                self.say("LF-301", why, repr(key))
            else:
                self.problems += shape_problems(key, update)
        if not self._updates and not self.problems:
            self.say("LF-304", "no adapter's tensor in the file: it would change nothing", where, _GATHER)
        if self.problems:
            raise LoraFormatError(self.problems)
        extensions = {"peft": self.config.text} if self.config else {}
        targets = {key: self._updates[key] for key in sorted(self._updates)}
        return Adapter(targets, "torch", base_model=self._base_model(), extensions=extensions)

    def _base_model(self) -> dict[str, str]:
        pairs = (("name", self.setting("base_model_name_or_path")), ("revision", self.setting("revision")))
        return {name: value for name, value in pairs if isinstance(value, str) and value}
