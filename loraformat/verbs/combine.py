"""Several adapters as one, by a method that is defined on ΔW: exact sums, and what papers make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import numpy as np

from loraformat import progress
from loraformat.adapter import Adapter
from loraformat.algebra.factors import lowrank
from loraformat.algebra.lowrank import norm, total
from loraformat.algebra.svd import svd
from loraformat.algebra.truncated import truncated
from loraformat.blas import one_blas_thread
from loraformat.combining import notes, peft
from loraformat.combining.absolutes import kept
from loraformat.combining.agree import check_agree, placed_as
from loraformat.combining.beside import beside
from loraformat.combining.finite import check_values, finite
from loraformat.combining.methods import DENSE, LINEAR, PEFT
from loraformat.combining.settings import How, check_settings, settings
from loraformat.combining.terms import Term
from loraformat.combining.weights import Weight, by_pattern, weight_of
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.identity import digest
from loraformat.parts import ORDER, Delta, Lora, Part
from loraformat.updates import Update

if TYPE_CHECKING:
    from loraformat.algebra.lowrank import LowRank

__all__ = ["Combined", "combine"]


@dataclass(frozen=True, slots=True)
class Combined:
    """An adapter made of several.

    Attributes:
        residuals: key → ‖stored − defined‖ / ‖defined‖, of what the method defines; not of PEFT's own types on A and B.
        dropped: targets in which every weight is zero.
    """

    adapter: Adapter
    residuals: Mapping[str, float]
    dropped: Sequence[str] = ()


def combine(
    adapters: Sequence[tuple[Adapter, Weight]],
    method: str = "cat",
    *,
    rank: int | Literal["full"] | None = None,
    density: float | None = None,
    gamma: float = 0.01,
    epsilon: float = 0.1,
    seed: int = 0,
    any_base: bool = False,
) -> Combined:
    """One adapter of several, target by target.

    Sums (``cat``, ``linear``, ``svd``, ``slerp``) never leave the factors. Of the other methods the dense ΔW of two
    targets are held at a time, and the nearest of ``rank`` stored. The result is float32, but for what ``cat`` can keep.

    Args:
        adapters: each with its weight, which may be negative; see ``Weight``.
        method: one of ``loraformat.combining.methods.METHODS``.
        rank: of the result. ``svd`` and the methods on dense ΔW need it; ``full`` keeps a dense ``delta``.
        density: the share of entries that pruning keeps.
        gamma, epsilon: of ``breadcrumbs`` and ``della``.
        seed: of what is drawn; the same seed gives the same numbers on every machine.
        any_base: combine adapters that say they belong to different bases.

    Raises:
        LoraFormatError: LF-312 an adapter holds NaN; LF-507, LF-605, LF-606, LF-607 the adapters are not of one model;
            LF-612 what has no exact combination, or is beyond float32; LF-705 settings that the method does not have,
            or that are impossible.
    """
    how = How(method, rank, density, gamma, epsilon, seed)
    check_settings(how, len(adapters))
    weights = [by_pattern(weight, adapter) for adapter, weight in adapters]
    sources = [adapter for adapter, _ in adapters]
    check_agree(sources, any_base)
    check_values(sources)
    digests = [digest(adapter) for adapter in sources]
    made, residuals, dropped = _Making(how, sources, weights, digests).all()
    result = replace(sources[0], targets=made, base_model=notes.base_model(sources))
    result = replace(result, about=notes.about(sources), extensions=notes.extensions(sources))
    inputs = [{"digest": d, "weight": w} for d, w in zip(digests, weights, strict=True)]
    said = {"combined": settings(how) | {"inputs": inputs, "residuals": residuals}}
    return Combined(
        replace(result, provenance={"tool": f"loraformat {version('loraformat')}"} | said), residuals, dropped
    )


class _Making:
    """The targets, one after the other: everything is checked before the first is computed."""

    def __init__(
        self, how: How, adapters: Sequence[Adapter], weights: Sequence[dict[str, float]], digests: Sequence[str]
    ) -> None:
        # peft 0.21.2 _check_add_weighted_adapter: one adapter alone is only multiplied
        self.how = replace(how, method="peft_linear") if how.method in PEFT and len(adapters) == 1 else how
        self.adapters, self.weights, self.digests = adapters, weights, digests
        self.stream = peft.Stream(how.seed)
        self.rank = how.rank if isinstance(how.rank, int) else _largest(adapters)
        keys = sorted({key for adapter in adapters for key in adapter})
        self.terms = {key: self._terms(key) for key in keys}
        if not any(self.terms.values()):
            raise fault("LF-705", "every weight is zero: nothing is left")
        self.kept = self._kept()

    @one_blas_thread()
    def all(self) -> tuple[dict[str, Update], dict[str, float], list[str]]:
        keys = [key for key, terms in self.terms.items() if terms]
        with ThreadPoolExecutor(1 if self.how.method in peft.DRAWS else 2) as pool:  # numpy lets go of Python's lock
            done = dict(zip(keys, pool.map(self._made, keys), strict=True))
        residuals = {key: residual for key, (_, residual) in done.items() if residual is not None}
        made = {key: update for key, (update, _) in done.items()}
        return made, residuals, [key for key, terms in self.terms.items() if not terms]

    def _made(self, key: str) -> tuple[Update, float | None]:
        terms = self.terms[key]
        with finite(key) as check:
            parts, residual = self._parts(key, terms)
            check(parts)
        parts = sorted((*parts, *self.kept[key]), key=lambda part: ORDER.index(part.kind))
        progress.advance(sum(_entries(term.update) for term in terms))
        return replace(placed_as([term.update for term in terms]), parts=tuple(parts)), residual

    def _terms(self, key: str) -> list[Term]:
        """Those that take part: PEFT lets a weight of zero vote."""
        weighted = [
            Term(weight_of(key, weights), adapter[key], name)
            for adapter, weights, name in zip(self.adapters, self.weights, self.digests, strict=True)
            if key in adapter
        ]
        return [term for term in weighted if term.weight or self.how.method in PEFT]

    def _kept(self) -> dict[str, tuple[Part, ...]]:
        """What stays of each target as it is; every reason why a target cannot be combined."""
        found: dict[str, tuple[Part, ...]] = {}
        problems: list[Problem] = []
        for key, terms in self.terms.items():
            if self.how.method in PEFT:
                found[key] = ()
                problems += peft.problems(key, terms, self.how.method)
                continue
            try:
                found[key] = kept(key, terms, self.how.method in LINEAR)
            except LoraFormatError as error:
                problems += error.problems
        if problems:
            raise LoraFormatError(problems)
        return found

    def _parts(self, key: str, terms: Sequence[Term]) -> tuple[Sequence[Part], float | None]:
        adding = [term for term in terms if term.update.additive]
        if not adding:
            return (), None
        if self.how.method in PEFT:
            part, residual = peft.together(adding, self.how, self.rank, self.stream)
            return (part,), residual
        if self.how.method in DENSE:
            return self._dense(key, adding)
        return self._linear(key, adding)

    def _linear(self, key: str, terms: Sequence[Term]) -> tuple[Sequence[Part], float]:
        try:
            weights = LINEAR[self.how.method](terms, sum(weight_of(key, weights) for weights in self.weights))
        except LoraFormatError as error:
            raise LoraFormatError(replace(problem, where=key) for problem in error.problems) from None
        terms = [replace(term, weight=weight) for term, weight in zip(terms, weights, strict=True)]
        exact = total((term.weight, lowrank(term.update)) for term in terms)
        if self._stays(terms):
            parts: Sequence[Part] = beside(terms)
        else:
            found = svd(exact)
            rank = max(1, min(found.significant, self.rank if self.how.rank else found.significant))
            parts = (found.cut(rank).pair(),)
        return parts, _distance(exact, Update(tuple(parts)))

    def _stays(self, terms: Sequence[Term]) -> bool:
        """Whether what lies side by side is the result: it has the rank that it may have."""
        if self.how.method == "cat" or _vector(terms):
            return True
        ((first, *others), *more) = (term.update.additive for term in terms)
        if others or more or not isinstance(first, Lora) or first.mid is not None:
            return False
        return not self.how.rank or first.r <= self.rank

    def _dense(self, key: str, terms: Sequence[Term]) -> tuple[Sequence[Part], float]:
        shape = np.broadcast_shapes(*(term.change.matrix_shape() or () for term in terms))
        deltas = [term.delta(shape) for term in terms]
        draws = [partial(term.draw, key, self.how.seed, count=shape[-1]) for term in terms]
        matrix = DENSE[self.how.method](deltas, self.how, draws)
        if _vector(terms):
            return (Delta(matrix.reshape(-1)),), 0.0
        if self.how.rank == "full":
            return (Delta(matrix),), 0.0
        found, residual = truncated(matrix, self.rank)
        return (found.cut(self.rank).pair(),), residual


def _largest(adapters: Sequence[Adapter]) -> int:
    return max((u["lora"].r for adapter in adapters for u in adapter.values() if "lora" in u), default=1)


def _vector(terms: Sequence[Term]) -> bool:
    return all(isinstance(p, Delta) and p.delta.ndim == 1 for term in terms for p in term.update.additive)


def _distance(exact: LowRank, update: Update) -> float:
    whole = norm(exact)
    return norm(total([(1.0, exact), (-1.0, lowrank(update))])) / whole if whole else 0.0


def _entries(update: Update) -> int:
    return math.prod(update.matrix_shape() or (0,))
