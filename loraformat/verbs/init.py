"""A fresh adapter for a base: A random, B zero, so that ΔW = 0 and training starts at the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from loraformat.adapter import Adapter
from loraformat.errors import LoraFormatError, fault
from loraformat.names import components_of
from loraformat.naming.spaces import space_of
from loraformat.normal import normal, uniform
from loraformat.parts import Lora
from loraformat.placing import unplaced
from loraformat.resolve import Hints, matches, unmeant
from loraformat.scale import ScaleRule
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base

__all__ = ["init"]


def init(
    base: Base,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    scale_rule: ScaleRule = "alpha/r",
    sigma: float | None = None,
    method: Literal["normal", "kaiming"] = "normal",
    seed: int = 0,
    hints: Hints | None = None,
) -> Adapter:
    """An adapter for every weight that a pattern means: ``lora_A`` [rank, in] float32, ``lora_B`` [out, rank] zero.

    Args:
        targets: patterns over module paths (``q_proj``, ``layers.*.mlp.*``).
        sigma: standard deviation of A under ``normal``; default 1/rank, as peft 0.21.2's ``gaussian``.
        method: ``kaiming``: A uniform in ±1/√in, torch's ``kaiming_uniform_(a=√5)``, PEFT's default.
        seed: the same seed gives the same bytes everywhere (``loraformat.normal``).

    Raises:
        LoraFormatError: LF-602 a pattern means nothing; LF-604 a weight's orientation is unknown; LF-705 a bad number.
    """
    if rank < 1 or not math.isfinite(alpha) or (sigma is not None and not (math.isfinite(sigma) and sigma > 0)):
        raise fault(
            "LF-705", f"rank {rank} must be at least 1, alpha {alpha} finite, sigma {sigma} finite and positive"
        )
    if method == "kaiming" and sigma is not None:
        raise fault("LF-705", "kaiming has no sigma: its width is 1/√in", fix="give --sigma or --init kaiming")
    known = base.linears(hints or Hints())
    problems = [replace(p, rule="LF-602") for p in unmeant(targets, known, "weight of the base")]
    chosen = {key: place for key, place in known.items() if matches(key, targets)}
    problems += [unplaced(key) for key, place in chosen.items() if place is None]
    if problems:
        raise LoraFormatError(problems)
    keep = "attach" not in base.verbs  # a graph's own orientation is not that of the named parameter
    updates = {}
    for key, place in chosen.items():
        assert place is not None
        out, in_ = place.matrix_shape
        a = _draw(key, rank, in_, sigma or 1.0 / rank, method, seed)
        b = np.zeros((out, rank), np.float32)
        updates[key] = Update((Lora(a, b, alpha, scale_rule),), place if keep else None)
    components = components_of(updates)
    return Adapter(updates, space_of(base), components=components, about={"training": {"init": method, "seed": seed}})


def _draw(key: str, rank: int, in_: int, sigma: float, method: str, seed: int) -> npt.NDArray[np.float32]:
    if method == "normal":
        values = normal(seed, key, rank * in_) * sigma
    else:
        values = (2.0 * uniform(seed, key, rank * in_) - 1.0) / math.sqrt(in_)
    return values.astype(np.float32).reshape(rank, in_)
