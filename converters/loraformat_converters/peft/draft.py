"""An adapter in the making: parts by parameter, and everything that is wrong, gathered from all readers."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from loraformat import registry
from loraformat.adapter import Adapter
from loraformat.dtypes import dtype_name
from loraformat.gathered import Gathered
from loraformat.naming.made import stacks
from loraformat.scale import ScaleRule
from loraformat.shapes import FLOATS
from loraformat_converters.peft import config as configs

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.layout import ReadOptions

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["SHAPES_TELL", "Draft"]

SHAPES_TELL = (
    "give the base, whose shapes tell: --base, or lf.load(…, base=…); "
    "where a command has no --base: convert ADAPTER my.lora.safetensors --base BASE first"
)
"""The way out where the tensors of a file do not say what they belong to."""

_GATHER = "was the adapter saved before its parameters were gathered (ZeRO-3, FSDP)?"


class Draft(Gathered):
    """What the readers of PEFT's kinds share; ``finish`` makes the adapter or raises all that was said.

    Attributes:
        config: the configuration, or None beside a bare file.
        options: what the user states.
    """

    def __init__(self, config: configs.Config | None, options: ReadOptions) -> None:
        super().__init__()
        self.config = config
        self.options = options

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every parameter of the base; empty without one."""
        base = self.options.base
        return {name: p.shape for name, p in base.parameters().items()} if base is not None else {}

    def stacks(self, wanted: Collection[str]) -> Mapping[str, tuple[int, ...]]:
        """Shapes of parameters of the model, those too that it stacks of what the base stores one by one."""
        base, found = self.options.base, {name: self.shapes[name] for name in wanted if name in self.shapes}
        if base is None or len(found) == len(wanted):
            return found
        config = self.options.config or registry.model_config(base)
        return stacks(wanted, self.shapes, config, registry.spaces().values()) | found

    def setting(self, name: str) -> Any:
        """A key of the configuration, or None."""
        return self.config.value.get(name) if self.config else None

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
        targets = self.checked(where, _GATHER)
        extensions = {"peft": self.config.text} if self.config else {}
        return Adapter(targets, "torch", base_model=self._base_model(), extensions=extensions)

    def _base_model(self) -> dict[str, str]:
        pairs = (("name", self.setting("base_model_name_or_path")), ("revision", self.setting("revision")))
        return {name: value for name, value in pairs if isinstance(value, str) and value}
