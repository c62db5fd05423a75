"""An adapter in the making: parts by parameter, and everything that is wrong or worth saying, gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.container import dtype_name
from loraformat.errors import LoraFormatError, Problem
from loraformat.names import key_fault
from loraformat.parts import ORDER
from loraformat.shapes import FLOATS, shape_problems
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.layout import ReadOptions
    from loraformat.parts import Part

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["Draft", "torch_placement"]


def torch_placement(shape: tuple[int, ...]) -> Placement:
    """Of a tensor as torch's Linear and convolutions have it, [out, in, *kernel]; of a vector, [out]."""
    return Placement(tuple(shape), (0,), tuple(range(1, len(shape))))


class Draft:
    """Collects parts and problems; ``finish`` gives the updates or raises all that was said.

    Attributes:
        options: what the user states.
        without_alpha: the modules whose scale the file does not state.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.without_alpha: list[str] = []
        self.updates: dict[str, Update] = {}

    def say(self, rule: str, what: str, where: str, fix: str = "") -> None:
        """Note an error."""
        self.problems.append(Problem(rule, what, where, fix))

    def warn(self, rule: str, what: str, where: str, fix: str = "") -> None:
        """Note a warning."""
        self.warnings.append(Problem(rule, what, where, fix, "warning"))

    def add(self, key: str, part: Part, place: Placement | None, assumed: tuple[str, ...] = ()) -> None:
        """One part of one parameter's update."""
        old = self.updates.get(key, Update(()))
        if part.kind in old:
            self.say("LF-506", f"two {part.kind} parts for one parameter: which is it?", key)
        parts = tuple(sorted((*old.parts, part), key=lambda p: ORDER.index(p.kind)))
        self.updates[key] = Update(parts, place or old.placement, assumed=assumed or old.assumed)

    def sound(self, module: str, roles: Roles) -> bool:
        """Whether the tensors are floats and not empty; an alpha is looked at where it is used."""
        good = True
        for role, tensor in roles.items():
            if role == "alpha":
                continue
            dtype, sizes = dtype_name(tensor.dtype), list(tensor.shape)
            if dtype not in FLOATS:
                self.say("LF-314", f"{role} is {dtype}; factors are floats", module)
            elif 0 in sizes or not sizes:
                self.say("LF-311", f"{role} holds no values: {sizes}", module)
            else:
                continue
            good = False
        return good

    def finish(self, where: str) -> dict[str, Update]:
        """The updates, sorted by key, or every problem at once."""
        for key, update in self.updates.items():
            if why := key_fault(key):
                self.say("LF-301", why, repr(key))
            else:
                self.problems += shape_problems(key, update)
        if not self.updates and not self.problems:
            self.say("LF-304", "no adapter's tensor in the file: it would change nothing", where)
        if self.problems:
            raise LoraFormatError(self.problems)
        return {key: self.updates[key] for key in sorted(self.updates)}
