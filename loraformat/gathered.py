"""An adapter in the making: parts by parameter, and everything that is wrong or worth saying. For authors of layouts.

A reader goes on after a fault, so that all of them are told at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError, Problem
from loraformat.names import key_fault
from loraformat.parts import ordered
from loraformat.shapes import shape_problems
from loraformat.updates import Update

if TYPE_CHECKING:
    from loraformat.axes import Placement
    from loraformat.parts import Part

__all__ = ["Gathered"]


class Gathered:
    """Collects parts and problems; ``checked`` gives the updates or raises all that was said."""

    def __init__(self) -> None:
        self.updates: dict[str, Update] = {}
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def say(self, rule: str, what: str, where: str, fix: str = "") -> None:
        """Note an error."""
        self.problems.append(Problem(rule, what, where, fix))

    def warn(self, rule: str, what: str, where: str, fix: str = "") -> None:
        """Note a warning."""
        self.warnings.append(Problem(rule, what, where, fix, "warning"))

    def add(
        self,
        key: str,
        part: Part,
        place: Placement | None = None,
        *,
        op: str | None = None,
        assumed: tuple[str, ...] = (),
    ) -> None:
        """One part of one parameter's update; ``assumed`` as in ``Update``.

        Notes LF-506 where the parameter has a part of this kind already.
        """
        old = self.updates.get(key, Update(()))
        if part.kind in old:
            self.say("LF-506", f"two different {part.kind} parts for one parameter: which is it?", key)
        parts = ordered((*old.parts, part))
        self.updates[key] = Update(parts, old.placement or place, old.op or op, assumed or old.assumed)

    def checked(self, where: str, fix: str = "") -> dict[str, Update]:
        """The updates, sorted by key.

        Args:
            where: the source.
            fix: what to do about a source without any tensor of an adapter.

        Raises:
            LoraFormatError: everything that was said; LF-301 a key that is no name; LF-304 nothing was gathered; LF-3xx
                parts that do not fit each other.
        """
        for key, update in self.updates.items():
            if why := key_fault(key):
                self.say("LF-301", why, repr(key))
            else:
                self.problems += shape_problems(key, update)
        if not self.updates and not self.problems:
            self.say("LF-304", "no adapter's tensor in the file: it would change nothing", where, fix)
        if self.problems:
            raise LoraFormatError(list(dict.fromkeys(self.problems)))
        return dict(sorted(self.updates.items()))
