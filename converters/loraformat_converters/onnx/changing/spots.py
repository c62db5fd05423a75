"""Spots: the weights that change, each with its uses, with what changes it, and with what else depends on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from loraformat.packed import permuted, spread
from loraformat.turned import turned
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.model import External, external, overlapping
from loraformat_converters.onnx.graph.scopes import tensors

if TYPE_CHECKING:
    from loraformat.axes import Placement
    from loraformat.plan import Job
    from loraformat.resolve import Match
    from loraformat.updates import Update

__all__ = ["Change", "Spot", "by_tensor", "every_change", "gathered", "spots"]


@dataclass(frozen=True)
class Change:
    """What one adapter does to one weight.

    Attributes:
        job: which adapter, by its place in the plan.
        key: the target.
        parameter: how the parameter lies that the adapter names; None where only the matrix matters.
        rows: which rows of the matrix it changes; None for all.
        permute: of as many blocks of the update's rows, which stands first there, which second, …
    """

    job: int
    key: str
    update: Update
    parameter: Placement | None = None
    rows: tuple[int, int] | None = None
    permute: tuple[int, ...] | None = None

    def turned(self, place: Placement) -> Update:
        """The update in the axes of a tensor laid like ``place``."""
        update = self.update if self.permute is None else permuted(self.update, self.permute)
        update = update if self.rows is None else spread(update, self.rows, place.matrix_shape[-2])
        return turned(update, self.parameter or place, place)


@dataclass(frozen=True)
class Spot:
    """The weight of one target: its uses, its external bytes if it has any, and what else depends on it.

    A weight that something else depends on is copied first, so that only the target changes.
    """

    sites: tuple[Site, ...]
    changes: tuple[Change, ...]
    place: External | None = None
    others: tuple[str, ...] = field(default=())

    @property
    def key(self) -> str:
        """What the first adapter calls it."""
        return self.changes[0].key

    def parts(self) -> list[Spot]:
        """The same for each parameter that the weight holds: itself, where it holds one."""
        by_rows: dict[tuple[int, int] | None, list[Change]] = {}
        for change in self.changes:
            by_rows.setdefault(change.rows, []).append(change)
        return [replace(self, changes=tuple(own)) for own in by_rows.values()]

    @property
    def rounds(self) -> bool:
        """Whether what its operators multiply is rounded on the way, to 8 bits."""
        return any(site.product is not None and site.product.rounds for site in self.sites)

    @property
    def updates(self) -> tuple[Update, ...]:
        """What happens to the stored tensor, in its own axes, one after the other."""
        return tuple(change.turned(self.sites[0].placement) for change in self.changes)


def gathered(jobs: Sequence[Job]) -> dict[tuple[Site, ...], list[Change]]:
    """Sites → what happens to their weight, in the order of the jobs."""
    changes: dict[tuple[Site, ...], list[Change]] = {}
    for number, job in enumerate(jobs):
        for key, places in job.resolution.require().targets.items():
            for alike in _alike(places):
                first = alike[0]
                change = Change(number, key, job.adapter[key], first.parameter, first.rows, first.permute)
                changes.setdefault(tuple(match.handle for match in alike), []).append(change)
    return changes


def _alike(places: Sequence[Match]) -> list[list[Match]]:
    """The places that are changed together: a table and the head that is tied to it are read in two ways, copies are apart."""
    groups: dict[object, list[Match]] = {}
    for match in places:
        groups.setdefault((match.parameter, match.handle.root_name), []).append(match)
    return list(groups.values())


def by_tensor(changes: Mapping[tuple[Site, ...], Sequence[Change]]) -> dict[tuple[Site, ...], Sequence[Change]]:
    """The same with one entry where a target's uses read one tensor in two ways: a merge writes it once."""
    found: dict[object, tuple[tuple[Site, ...], Sequence[Change]]] = {}
    for sites, wanted in changes.items():
        token = (sites[0].root_name, *((change.job, change.key) for change in wanted))
        own, first = found.get(token, ((), wanted))
        found[token] = ((*own, *sites), first)
    return dict(found.values())


def every_change(places: Iterable[Spot]) -> Iterator[Change]:
    """The changes of all spots."""
    return (change for spot in places for change in spot.changes)


def spots(
    model: onnx.ModelProto, index: Index, changes: Mapping[tuple[Site, ...], Sequence[Change]], folder: Path
) -> list[Spot]:
    """A spot for each set of sites that changes."""
    overlaps = overlapping(tensors(model), folder)
    found = []
    for sites, wanted in changes.items():
        place = external(sites[0].root, folder)
        others = list(_others(index, sites))
        if place is not None and (place.location, place.offset) in overlaps:
            others.append("a tensor stored in the same bytes")
        found.append(Spot(sites, tuple(wanted), place, tuple(dict.fromkeys(others))))
    return found


def _others(index: Index, sites: tuple[Site, ...]) -> Iterable[str]:
    """What else reads the weight of these sites: nodes, in inner graphs too, and the outputs of graphs."""
    own = {(id(site.node), site.position) for site in sites} | {(id(n), at) for s in sites for n, at in s.steps}
    for value in dict.fromkeys(value for site in sites for value in site.values):
        for use in index.readers(value):
            if (id(use.node), use.position) not in own:
                yield use.node.name or use.node.op_type
        if value.name in value.scope.outputs:
            yield value.name
