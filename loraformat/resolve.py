"""Where each target lies in a base, by which evidence: the result of every base's ``resolve``."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import join, nearest
from loraformat.packed import permuted, spread
from loraformat.turned import turned

if TYPE_CHECKING:
    from loraformat.base import Base
    from loraformat.updates import Update

__all__ = ["Hints", "Match", "Resolution", "in_component", "matches", "unmeant"]


@dataclass(frozen=True, slots=True)
class Match:
    """One place where a target's weight is used.

    Attributes:
        file: of the base, relative to it.
        node: the operator that uses the weight, where the base is a graph.
        weight: the stored tensor.
        placement: how the update's matrix lies in the stored tensor.
        evidence: what says so, strongest first, as ``rung: detail``.
        confidence: 1.0 for names and exact evidence; a cosine for sketches.
        parameter: how it lies in the parameter that the adapter names, where the stored tensor has other axes and an
            update speaks of them; None where only the matrix matters.
        handle: what the base itself needs to find the place again; opaque to everyone else.
        parts: the kinds of parts that act here, where it is not all: of a tied module's change some do.
        rows: which rows [start, stop) of the matrix are the target's, where the stored tensor holds several parameters.
        permute: of as many blocks of the target's rows, which stands first there, which second, …: gates in another order.
    """

    file: str
    node: str | None
    weight: str
    placement: Placement
    evidence: tuple[str, ...]
    confidence: float = 1.0
    parameter: Placement | None = None
    handle: Any = field(default=None, compare=False, repr=False)
    parts: tuple[str, ...] | None = None
    rows: tuple[int, int] | None = None
    permute: tuple[int, ...] | None = None

    def turned(self, update: Update) -> Update:
        """What of the update acts here, in the stored tensor's own axes."""
        if self.parts is not None:
            update = replace(update, parts=tuple(part for part in update.parts if part.kind in self.parts))
        if self.permute is not None:
            update = permuted(update, self.permute)
        if self.rows is not None:
            update = spread(update, self.rows, self.placement.matrix_shape[-2])
        return turned(update, self.parameter or self.placement, self.placement)

    def as_json(self) -> dict[str, Any]:
        """The fields of ``resolve --json``; slices and permutations are null where the whole tensor is meant."""
        return {
            "file": self.file,
            "node": self.node,
            "weight": self.weight,
            "slice": list(self.rows) if self.rows else None,
            "target_slice": None,
            "permute": list(self.permute) if self.permute else None,
            "axes": self.placement.spec,
            "evidence": list(self.evidence),
            "confidence": self.confidence,
        }

    def name_in(self, parameters: Container[str]) -> str | None:
        """What the base calls the stored tensor: ``FILE:NAME`` in one of several files; None for one that it lacks."""
        return next((name for name in (self.weight, f"{self.file}:{self.weight}") if name in parameters), None)

    def called(self, parameters: Collection[str]) -> str:
        """The same also of a tensor that is no parameter, being quantised: spelled as the base spells the others."""
        apart = any(name.startswith(f"{self.file}:") for name in parameters)
        return self.name_in(parameters) or (f"{self.file}:{self.weight}" if apart else self.weight)


@dataclass(frozen=True, slots=True)
class Resolution:
    """Target → its places; and the targets that have none, or too many, each with a Problem."""

    targets: Mapping[str, tuple[Match, ...]]
    unresolved: tuple[Problem, ...] = ()
    ambiguous: tuple[Problem, ...] = ()

    def require(self) -> Resolution:
        """Itself, if every target is resolved; LoraFormatError with all that are not."""
        problems = [*self.unresolved, *self.ambiguous]
        if not problems:
            return self
        if len(problems) > 1 and not self.targets and all(p.rule == "LF-602" for p in problems):
            what = f"none of the adapter's {len(problems)} targets is found: is this the base that it was trained on?"
            problems.insert(0, Problem("LF-602", what))
        raise LoraFormatError(problems)

    @property
    def rungs(self) -> str:
        """How many targets each rung found: ``name_scopes`` or ``15 node_names, 3 user``."""
        found = Counter(places[0].evidence[0].partition(":")[0] for places in self.targets.values() if places)
        if len(found) == 1:
            return next(iter(found))
        return ", ".join(f"{n} {rung}" for rung, n in found.most_common())

    def as_json(self) -> dict[str, Any]:
        """The object that ``resolve --json`` prints."""
        return {
            "schema": 1,
            "targets": {key: [m.as_json() for m in places] for key, places in self.targets.items()},
            "unresolved": [p.as_json() for p in self.unresolved],
            "ambiguous": [p.as_json() for p in self.ambiguous],
        }


@dataclass(frozen=True, slots=True)
class Hints:
    """What the user states of the base, and what he gives to recognise its weights by.

    Attributes:
        names: target → weight or node of the base. A trailing ``*`` on both sides maps a whole prefix:
            ``{"encoder.*": "bert.encoder.*"}``.
        axes: pattern → spec.
        base: the weights that the adapter was trained on: a graph's weight that equals one of them is that one.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)
    base: Base | None = None

    def mapped(self, key: str) -> str | None:
        """The base's name for a target, where the user gave one; the longest pattern wins."""
        if key in self.names:
            return self.names[key]
        fits = [p for p in self.names if p.endswith("*") and key.startswith(p[:-1])]
        if not fits:
            return None
        pattern = max(fits, key=len)
        return self.names[pattern].removesuffix("*") + key[len(pattern) - 1 :]

    def spec(self, key: str) -> str | None:
        """The axes that the user stated for a target; two patterns that disagree are an error (LF-605)."""
        specs = {spec for pattern, spec in self.axes.items() if matches(key, (pattern,))}
        if len(specs) > 1:
            raise fault("LF-605", f"--axes states {' and '.join(sorted(specs))} for one target", where=key)
        return next(iter(specs), None)

    def claims(self, key: str, update: Update) -> list[tuple[str, str]]:
        """(axes, evidence) of a target in ``base``, as far as they are known there."""
        if self.base is None:
            return []
        places = self.base.resolve(Adapter({key: update}), Hints()).targets.get(key, ())
        return [(match.placement.spec, f"base: as in {self.base.path.name}") for match in places[:1]]

    def unused(self, keys: Iterable[str]) -> list[Problem]:
        """One LF-705 for each hint that no target asked for: a typing error would otherwise pass in silence."""
        known = list(keys)
        names = [p for p in self.names if not any(k == p or (p.endswith("*") and k.startswith(p[:-1])) for k in known)]
        return [_unmeant(pattern, known) for pattern in names] + unmeant(self.axes, known)


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern means this parameter: the whole key, a module's path, or its last components; * and ? allowed.

    >>> matches("model.layers.0.self_attn.q_proj.weight", ["q_proj"]), matches("h.0.c_proj.weight", ["proj"])
    (True, False)
    """
    module = key.rpartition(".")[0]
    for pattern in patterns:
        for name in (key, module):
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}"):
                return True
    return False


def in_component(problem: Problem, component: str | None) -> Problem:
    """The same of a key that has its component in front, also in what it gives to type for ``--names``."""
    where = join(component, problem.where)
    return replace(problem, where=where, fix=problem.fix.replace(f'{{"{problem.where}":', f'{{"{where}":'))


def unmeant(patterns: Iterable[str], keys: Iterable[str], what: str = "target of the adapter") -> list[Problem]:
    """One LF-705 for each pattern that means none of these parameters: a typing error would otherwise pass in silence."""
    known = list(keys)
    return [_unmeant(p, known, what) for p in patterns if not any(matches(key, (p,)) for key in known)]


def _unmeant(pattern: str, known: Sequence[str], what: str = "target of the adapter") -> Problem:
    leaves = sorted({key.rpartition(".")[0].rpartition(".")[2] for key in known})
    close = nearest(pattern.strip("*."), leaves) or leaves[:6]
    return Problem("LF-705", f"no {what} is meant by this pattern; modules: {', '.join(close)}", pattern)
