"""What a report tells, as data: an adapter, its anatomy, and, with a base, where every target lies and how far it moves."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraformat.base import FewBits
from loraformat.errors import LoraFormatError, Problem
from loraformat.resolve import Hints, Resolution
from loraformat.tiles import Lazy, Norms, changed
from loraformat.verbs.anatomy import Anatomy, anatomy

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base
    from loraformat.resolve import Match
    from loraformat.updates import Update

__all__ = ["Facts", "facts", "weigh"]


@dataclass(frozen=True, slots=True)
class Facts:
    """One adapter and what is known of it.

    Attributes:
        name: what it is called: of a file its name, of what is attached that.
        layout: of the source, with the evidence for it.
        found: where its targets lie; None without a base.
        norms: target → ‖W‖, ‖ΔW‖ and what the base's dtype loses of it, of those that lie in a float tensor or in few bits.
        base: what the base is called.
    """

    name: str
    layout: str
    adapter: Adapter
    anatomy: Anatomy
    problems: Sequence[Problem] = ()
    found: Resolution | None = None
    norms: Mapping[str, Norms] = field(default_factory=dict)
    base: str = ""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(update.nbytes for update in self.adapter.values())


def facts(
    adapter: Adapter,
    name: str,
    layout: str = "",
    problems: Sequence[Problem] = (),
    base: Base | None = None,
    hints: Hints | None = None,
) -> Facts:
    """Everything a report tells of one adapter; targets that are not found in ``base`` are problems of it.

    Raises:
        LoraFormatError: LF-312 a value that is not finite.
    """
    inner = anatomy(adapter)
    if base is None:
        return Facts(name, layout, adapter, inner, problems)
    found = base.resolve(adapter, hints or Hints())
    norms, wrong = weigh(adapter, base, found)
    everything = (*problems, *found.unresolved, *found.ambiguous, *wrong)
    return Facts(name, layout, adapter, inner, everything, found, norms, base.path.name)


def weigh(adapter: Adapter, base: Base, found: Resolution) -> tuple[dict[str, Norms], list[Problem]]:
    """‖W‖, ‖ΔW‖ and what rounding W + ΔW loses, of every target that lies in a float tensor of the base, or in few bits; what fails."""
    known = base.parameters()
    norms: dict[str, Norms] = {}
    problems: list[Problem] = []
    for key, places in found.targets.items():
        name = places[0].name_in(known) if places else None
        few = name is not None and "replace" not in adapter[key] and _in_few_bits(base, name)
        if name is None or not (few or known[name].dtype in ("F64", "F32", "F16", "BF16")):
            continue
        try:
            norms[key] = _norms(adapter[key], base, places[0], name)
        except LoraFormatError as error:
            problems += [Problem(p.rule, p.what, key, p.fix, p.severity) for p in error.problems]
    return norms, problems


def _in_few_bits(base: Base, name: str) -> bool:
    return isinstance(base, FewBits) and base.requantised(name, ()) is not None


def _norms(update: Update, base: Base, match: Match, name: str) -> Norms:
    weight, norms = Lazy(base, base.parameters()[name]), Norms()
    turned = match.turned(update)
    if isinstance(base, FewBits) and "replace" not in turned and (tiles := base.requantised(name, [turned], norms)):
        deque(tiles, maxlen=0)
        return norms
    if "replace" in turned and turned["replace"].replace.shape != weight.shape:
        norms.new = True
        return norms
    for _ in changed([turned], weight, norms):
        pass
    return norms
