"""Whether adapters can be combined at all: one base, one name space, one shape and placement of every target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraformat.errors import LoraFormatError, Problem
from loraformat.likeness import has_scale

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.updates import Update

__all__ = ["check_agree", "placed_as"]


def check_agree(adapters: Sequence[Adapter], any_base: bool = False) -> None:
    """Every reason why these are not changes of one model, at once.

    Raises:
        LoraFormatError: LF-507 name spaces or components differ; LF-605 placements, LF-606 shapes of a target; LF-607
            the bases that the adapters name, or the tensors that they were bound to (not with ``any_base``).
    """
    problems = list(_heads(adapters))
    if not any_base:
        problems += _bases(adapters)
    if not problems:
        for key in sorted({key for adapter in adapters for key in adapter}):
            problems += _target(key, [adapter[key] for adapter in adapters if key in adapter], any_base)
    if problems:
        raise LoraFormatError(problems)


def placed_as(updates: Sequence[Update]) -> Update:
    """The update that knows most about where the target lies: a placed and bound one before others."""
    return max(updates, key=lambda u: (u.placement is not None, u.base_sha256 is not None, _told_by_sketch(u)))


def _told_by_sketch(update: Update) -> int:
    """What its sketch tells of the weight: nothing, which it is, or its scale too."""
    return 0 if update.sketch is None else 1 + has_scale(update.sketch)


def _heads(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    first = adapters[0]
    for i, other in enumerate(adapters[1:], 2):
        for what, one, two in (
            ("names are in the space", first.names, other.names),
            ("components are", ", ".join(first.components) or "none", ", ".join(other.components) or "none"),
            ("features required are", ", ".join(first.requires) or "none", ", ".join(other.requires) or "none"),
        ):
            if one != two:
                told = f"the first adapter's {what} {one}, those of adapter {i} {two}"
                yield Problem("LF-507", told, fix="bring both into one space first (loraformat retarget)")


def _bases(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    first = adapters[0]
    for i, other in enumerate(adapters[1:], 2):
        for where, one, two in _contradictions(first.base_model, other.base_model, "base_model"):
            what = f"the first adapter says {one!r}, adapter {i} {two!r}"
            yield Problem("LF-607", what, where, "--any-base where they are the same weights")


def _contradictions(one: Mapping[str, Any], other: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any, Any]]:
    """(where, what one says, what the other says); of a model of several components, for each."""
    for name in sorted(one.keys() & other.keys()):
        said = one[name], other[name]
        if all(isinstance(value, Mapping) for value in said):
            yield from _contradictions(*said, f"{where}.{name}")
        elif said[0] != said[1]:
            yield f"{where}.{name}", *said


def _target(key: str, updates: Sequence[Update], any_base: bool) -> Iterator[Problem]:
    shapes = [shape for update in updates if (shape := update.matrix_shape()) is not None]
    if other := next((shape for shape in shapes if not _alike(shapes[0], shape)), None):
        what = f"one adapter changes a matrix {list(shapes[0])}, another {list(other)}"
        yield Problem("LF-606", what, key, "are they of one base?")
    places = {update.placement for update in updates if update.placement is not None}
    if len(places) > 1:
        said = " and ".join(sorted(f"{p.spec} of {list(p.shape)}" for p in places))
        yield Problem("LF-605", f"the adapters place the target differently: {said}", key, "are they of one base?")
    digests = {update.base_sha256 for update in updates if update.base_sha256 is not None}
    if len(digests) > 1 and not any_base:
        said = " and ".join(sorted(f"{digest[:12]}…" for digest in digests))
        fix = "--any-base where one is a close relative of the other"
        yield Problem("LF-607", f"the adapters were bound to different tensors: {said}", key, fix)


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Equal, but for batch axes that one of them shares."""
    return (
        len(one) == len(other)
        and one[-2:] == other[-2:]
        and all(m == n or 1 in (m, n) for m, n in zip(one[:-2], other[:-2], strict=True))
    )
