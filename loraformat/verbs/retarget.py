"""Retarget: the same change under the names, and in the tensors, of another framework or version of the same model.

It alone changes an adapter's name space. What the names are called there comes from the user (``--names``), from the
installed name spaces (``loraformat.spaces``), or from the values of two bases at hand (sketches). Whatever they leave
open is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loraformat import registry
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import components_of, join, name_space_fault
from loraformat.naming.links import Link, Seat
from loraformat.naming.recognised import recognised
from loraformat.naming.spaces import TORCH, Known, space_of
from loraformat.naming.translate import Translated, translate
from loraformat.resolve import Hints

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base

__all__ = ["base_names", "retarget"]


def retarget(
    adapter: Adapter,
    to: str | None = None,
    *,
    base: Base | None = None,
    names: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    origin: Base | None = None,
) -> Translated:
    """The adapter under the names of the space ``to``, or of ``base``.

    A tensor that is put together of others (q, k and v in one) is made where it is read: ``numpy.asarray`` gives all of it.

    Args:
        to: a name space: ``torch``, ``kohya``, …; default: that of ``base``.
        base: a model under the wanted names, or, where ``to`` is another space than its own, the model that they mean.
        names: key → key there; a trailing ``*`` on both sides maps a whole prefix. Stated names come before all others.
        config: the model's ``config.json``, where the base has none.
        origin: a base under the adapter's own names: targets are recognised by their values, of the same name space
            those that it does not know, of another one all.

    Raises:
        LoraFormatError: LF-602 a target without a name there; LF-603 one with several, or a name for two; LF-705
            nothing says where to, or no installed space leads there; LF-604, LF-606, LF-612 no exact form.
    """
    to = to or (space_of(base) if base is not None else None)
    if to is None:
        raise fault("LF-705", "where to?", fix="give --to SPACE or --base BASE")
    if why := name_space_fault(to):
        raise fault("LF-705", why, fix=f"known: {', '.join(sorted(_known()))}")
    way = _Way(to, base, config or (registry.model_config(base) if base is not None else {}), origin)
    if not names:
        return way.follow(adapter)
    hints = Hints(names)
    if unused := hints.unused(adapter):
        raise LoraFormatError(unused)
    stated = {key: name for key in adapter if (name := hints.mapped(key)) is not None}
    own = replace(adapter, targets={key: adapter[key] for key in stated})
    rest = replace(adapter, targets={key: update for key, update in adapter.items() if key not in stated})
    first = translate(own, [Link(Seat(key), Seat(name), "user: --names") for key, name in stated.items()], to)
    return _together(first, way.follow(rest)) if rest else first


def base_names(base: Base) -> dict[str, tuple[int, ...] | None]:
    """Every name by which a target may be found in ``base``, with its component → shape, None where the base is a graph.

    A graph knows its weights by their stored names and by its nodes' scopes; what it stores may lie otherwise.
    """
    files = {file: c for c, own in (base.describe().get("components") or {}).items() for file in own}
    graph = "attach" in base.verbs
    found: dict[str, tuple[int, ...] | None] = {}
    for name, parameter in base.parameters().items():
        file, colon, inner = name.partition(":")
        key = join(files[file] or None, inner) if colon and file in files else name
        found[key] = None if graph else parameter.shape
    if graph:
        found |= dict.fromkeys(base.linears(Hints()), None)
    return found


class _Way:
    """From an adapter's names to those of ``to``: through torch, where neither is."""

    def __init__(self, to: str, base: Base | None, config: Mapping[str, Any], origin: Base | None) -> None:
        self.to, self.base, self.config, self.origin = to, base, config, origin
        self.names = base_names(base) if base is not None else {}
        self.torch = base is None or space_of(base) == TORCH

    def follow(self, adapter: Adapter) -> Translated:
        """The whole way."""
        if adapter.names == self.to:
            return translate(adapter, self._same_space(adapter), self.to)
        if self.origin is not None and self.base is not None and space_of(self.base) == self.to:
            return self._by_values(adapter, self.base)
        return self._by_names(adapter)

    def _by_values(self, adapter: Adapter, base: Base) -> Translated:
        """By the values of both bases; by names what they do not tell, such as which of two tied tensors is meant."""
        links = list(recognised(adapter.targets, base, self.origin))
        times = Counter((link.here.name, link.here.index) for link in links)
        told = {name for name, _ in times} - {name for (name, _), count in times.items() if count > 1}
        links = [link for link in links if link.here.name in told]
        first = translate(replace(adapter, targets={k: u for k, u in adapter.items() if k in told}), links, self.to)
        rest = replace(adapter, targets={key: update for key, update in adapter.items() if key not in told})
        return _together(first, self._by_names(rest)) if rest else first

    def _by_names(self, adapter: Adapter) -> Translated:
        """By the installed name spaces."""
        done = Translated(adapter, {key: (key,) for key in adapter})
        if adapter.names != TORCH:
            done = _after(done, translate(adapter, self._links(adapter, adapter.names), TORCH))
        if self.to != TORCH:
            done = _after(done, translate(done.adapter, self._links(done.adapter, self.to), self.to))
        return done

    def _links(self, adapter: Adapter, space: str) -> Iterator[Link]:
        """Of every installed relation between ``space`` and torch, in the adapter's direction."""
        found = [item for item in registry.spaces().values() if item.name == space]
        if not found:
            what = f"no installed name space leads from {adapter.names} to {self.to}"
            raise fault("LF-705", what, fix=f"known: {', '.join(sorted(_known()))}; or --names MAP for every target")
        own = self.names if not self.torch and self.base is not None and space_of(self.base) == space else {}
        known = Known(adapter, self.names if self.torch else {}, self.config, own)
        there = self.names if adapter.names == TORCH and not self.torch else {}  # the base's own, in the space itself
        for item in found:
            for link in item.links(known):
                if not there or link.there.name in there:
                    yield link if adapter.names == TORCH else link.reversed()

    def _same_space(self, adapter: Adapter) -> Iterator[Link]:
        """Other names of the same space: the base's own, those of another version of the model, the same values."""
        if self.base is None:
            yield from (Link(Seat(key), Seat(key), "the same space") for key in adapter)
            return
        yield from (Link(Seat(key), Seat(key), "base: its names") for key in adapter if key in self.names)
        rest = {key: update for key, update in adapter.items() if key not in self.names}
        if rest and any(item.name == self.to for item in registry.spaces().values()):
            for link in list(self._links(replace(adapter, targets=rest), self.to)):
                for way in (link, link.reversed()):
                    if way.here.name in adapter and way.here.name not in self.names and way.there.name in self.names:
                        rest.pop(way.here.name, None)
                        yield way
        if rest:
            yield from recognised(rest, self.base, self.origin)


def _after(first: Translated, second: Translated) -> Translated:
    """Two steps as one."""
    matched = {key: tuple(n for mid in mids for n in second.matched[mid]) for key, mids in first.matched.items()}
    evidence = tuple(dict.fromkeys((*first.evidence, *second.evidence)))
    return Translated(second.adapter, {key: tuple(dict.fromkeys(n)) for key, n in matched.items()}, evidence)


def _together(one: Translated, other: Translated) -> Translated:
    """Two shares of one adapter, LF-603 where both claim a name."""
    if both := one.adapter.keys() & other.adapter.keys():
        what = "it is the place of a stated name and of another target"
        raise LoraFormatError([Problem("LF-603", what, name, "state both: --names MAP") for name in sorted(both)])
    targets = {**one.adapter.targets, **other.adapter.targets}
    targets = {name: targets[name] for name in sorted(targets)}
    adapter = replace(other.adapter, targets=targets, components=components_of(targets))
    return Translated(adapter, {**one.matched, **other.matched}, (*one.evidence, *other.evidence))


def _known() -> set[str]:
    return {TORCH, *(item.name for item in registry.spaces().values())}
