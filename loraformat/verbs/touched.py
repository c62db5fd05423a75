"""Which weights of a base and of a result belong together, and what is applied to each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loraformat.base import Requantising
from loraformat.resolve import Resolution

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base
    from loraformat.resolve import Hints, Match
    from loraformat.updates import Update

__all__ = ["Touched", "gather"]


@dataclass(slots=True)
class Touched:
    """A weight that changes: its name in the base and in the result, and what is applied, in order.

    ``tie``: what says that it is another module's tensor too, where that is why it changes.
    """

    before: str
    after: str
    keys: list[str] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    tie: str = ""


def gather(base: Base, adapter: Adapter, merged: Base, hints: Hints, weights: dict[str, Touched]) -> None:
    """Add to ``weights``, by the names in the result, what one adapter changes.

    Raises:
        LoraFormatError: LF-602 … LF-609 a target that is not found in the base, or not in the result.
    """
    before = base.resolve(adapter, hints).require()
    after = _in_result(base, adapter, merged, hints, before.targets)
    old, new = base.parameters(), merged.parameters()
    for key, places in before.targets.items():
        results = list(dict.fromkeys(m.called(new.keys()) for m in after[key]))
        sources = {m.called(old.keys()): m for m in reversed(places)}
        for i, (source, match) in enumerate(reversed(sources.items())):
            # Of a tie that the merge ended, the other end goes by its own name.
            result = results[i] if i < len(results) else source
            weight = weights.setdefault(
                result, Touched(source, result)
            )  # of one tensor each target may have got a copy
            weight.keys.append(key)
            weight.updates.append(match.turned(adapter[key]))
            weight.tie = weight.tie or next((e for e in match.evidence[:1] if e.startswith("tied: ")), "").removeprefix(
                "tied: "
            )


def _in_result(
    base: Base, adapter: Adapter, merged: Base, hints: Hints, before: Mapping[str, tuple[Match, ...]]
) -> Mapping[str, tuple[Match, ...]]:
    """Where every target lies in the result.

    Found anew: another tool may have given its tensors other names. What went by its values alone may have none of them
    left; then it is the tensor of the same name and shape.
    """
    # Rows of a packed weight, gates in another order, and what a checkpoint stores the other way round, are found in the result
    # as they were in the base: by the update as it is.
    placed = {
        key: adapter[key] if _as_it_is(first) else first.turned(adapter[key]) for key, (first, *_) in before.items()
    }
    found = merged.resolve(replace(adapter, targets=placed), hints)
    old, new = base.parameters(), merged.parameters()

    def kept(place: Match) -> bool:
        name = place.name_in(old.keys())
        if name is None:
            return all(_in_few_bits(one, place.called(known)) for one, known in ((base, old), (merged, new)))
        return name in new and old[name].shape == new[name].shape

    left = {key: places for key, places in before.items() if key not in found.targets and all(map(kept, places))}
    problems = ([p for p in some if p.where not in left] for some in (found.unresolved, found.ambiguous))
    return Resolution({**left, **found.targets}, *map(tuple, problems)).require().targets


def _in_few_bits(base: Base, name: str) -> bool:
    """Whether the base has a weight there that is merged into by its codes, which is no parameter."""
    return isinstance(base, Requantising) and base.requantised(name, []) is not None


def _as_it_is(place: Match) -> bool:
    return bool(place.rows or place.permute or (place.parameter and place.node is None))
