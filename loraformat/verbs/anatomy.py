"""Anatomy: what an adapter is made of, by its singular values: how much of its rank it uses, what is dead, odd or double."""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loraformat import progress
from loraformat.algebra.factors import lowrank
from loraformat.algebra.svd import svd
from loraformat.canonical import dumps
from loraformat.errors import LoraFormatError
from loraformat.identity import tensor_sha256
from loraformat.metadata import part_json
from loraformat.parts import roles_of
from loraformat.values import value_problems

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    F64 = npt.NDArray[np.float64]

__all__ = ["Anatomy", "Organ", "anatomy", "kind_of", "spectra_of"]

_FAR = 4.0  # a target whose ΔW is so many times larger or smaller than is usual among its like is an outlier
_FEW = 4  # of fewer alike none is usual


@dataclass(frozen=True, slots=True)
class Organ:
    """One target's ΔW.

    Attributes:
        shape: (*batch, out, in) of ΔW.
        sigma: [matrices, k] float64: the singular values of each matrix, descending.
    """

    shape: tuple[int, ...]
    sigma: F64

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius)."""
        return float(np.linalg.norm(self.sigma))

    @property
    def rms(self) -> float:
        """The size of a typical entry: comparable between targets of other shapes."""
        return self.norm / math.sqrt(math.prod(self.shape))

    @property
    def dead(self) -> bool:
        """Whether ΔW is zero."""
        return not self.sigma.any()

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values (Roy and Vetterli 2007), the mean over the matrices; 0 where dead."""
        alive = self.sigma[self.sigma.any(axis=1)]
        if not alive.size:
            return 0.0
        shares = alive / alive.sum(axis=1, keepdims=True)
        logs = np.log(np.where(shares > 0, shares, 1.0))
        return float(np.mean(np.exp(-np.sum(shares * logs, axis=1))))

    def rank_for(self, energy: float) -> int:
        """The rank of the nearest matrix that holds this share of ‖ΔW‖², the largest over the matrices."""
        squares = np.cumsum(self.sigma**2, axis=1)
        whole = squares[:, -1:]
        ranks = 1 + np.sum(squares < energy * whole * (1 - 1e-12), axis=1)
        return int(np.max(np.where(whole[:, 0] > 0, ranks, 0), initial=0))


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What an adapter is made of.

    Attributes:
        organs: target → its ΔW; without those that add nothing, whose values are absolute.
        dead: targets whose ΔW is zero.
        outliers: target → how many times larger its entries are than is usual among its like (``kind_of``).
        duplicates: groups of targets with the same parts, bit for bit.
    """

    organs: Mapping[str, Organ]
    dead: tuple[str, ...]
    outliers: Mapping[str, float]
    duplicates: tuple[tuple[str, ...], ...]


def anatomy(adapter: Adapter) -> Anatomy:
    """By the singular values of every target, in the factors.

    Raises:
        LoraFormatError: LF-312 a value that is not finite.
    """
    if problems := [problem for problem in value_problems(adapter) if problem.severity == "error"]:
        raise LoraFormatError(problems)
    organs = {key: _organ(update) for key, update in adapter.items() if update.additive}
    dead = tuple(key for key, organ in organs.items() if organ.dead)
    return Anatomy(organs, dead, dict(_outliers(organs)), tuple(_duplicates(adapter, dead)))


def spectra_of(organs: Iterable[Organ]) -> F64:
    """[matrices, k]: the singular values of all that are not dead, each a share of its largest; zeros beyond the last."""
    lines = [row / row[0] for organ in organs for row in organ.sigma if row[0] > 0]
    length = max(map(len, lines), default=0)
    return np.array([np.pad(line, (0, length - len(line))) for line in lines]).reshape(-1, length)


def kind_of(key: str) -> str:
    """What the layers of a model have in common: a key with its numbers as ``*``.

    >>> kind_of("model.layers.11.self_attn.q_proj.weight")
    'model.layers.*.self_attn.q_proj.weight'
    """
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "*", key)


def _organ(update: Update) -> Organ:
    factors = lowrank(update)
    progress.advance(update.nbytes)
    sigma = svd(factors).s
    return Organ(factors.shape, sigma.reshape(-1, sigma.shape[-1]))


def _outliers(organs: Mapping[str, Organ]) -> Iterator[tuple[str, float]]:
    """Against the median of those alike that are not dead; a kind that is itself spread so wide has none."""
    kinds: dict[str, dict[str, float]] = {}
    for key, organ in organs.items():
        if not organ.dead:
            kinds.setdefault(kind_of(key), {})[key] = math.log(organ.rms)
    for group in kinds.values():
        if len(group) < _FEW:
            continue
        middle = statistics.median(group.values())
        spread = statistics.median(abs(size - middle) for size in group.values())
        for key, size in group.items():
            if abs(size - middle) > max(math.log(_FAR), 6 * spread):
                yield key, math.exp(size - middle)


def _duplicates(adapter: Adapter, dead: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for key, update in adapter.items():
        if key in dead:
            continue
        parts = [[part_json(part), {role: tensor_sha256(t) for role, t in roles_of(part)}] for part in update.parts]
        groups.setdefault(hashlib.sha256(dumps(parts).encode()).hexdigest(), []).append(key)
    yield from (tuple(group) for group in groups.values() if len(group) > 1)
