"""The verbs that put an adapter into a base: everything is checked in ``prepare``, before the first byte is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.base import Base, Options
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.identity import tensor_sha256
from loraformat.plan import Job
from loraformat.resolve import Hints
from loraformat.sketch import ACCEPT, cosine, sketch

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from loraformat.adapter import Adapter
    from loraformat.plan import Outcome, Plan
    from loraformat.resolve import Match, Resolution
    from loraformat.updates import Update

__all__ = ["attach", "merge", "prepare"]


def prepare(
    verb: str,
    adapters: Sequence[tuple[str, Adapter]],
    base: Base,
    options: Options,
    hints: Hints | None = None,
    *,
    any_base: bool = False,
) -> Plan:
    """The plan of ``merge`` or ``attach``, every target resolved and every obstacle found.

    Args:
        adapters: (name, adapter), applied in this order.
        any_base: apply an adapter that was bound to other weights.

    Raises:
        LoraFormatError: LF-6xx; LF-703 the output would be the base itself.
    """
    if options.out.exists() and options.out.resolve() == base.path.resolve():
        raise fault(
            "LF-703", f"{options.out} is the base itself", fix="write to another name: the base is the way back"
        )
    jobs = [Job(adapter, base.resolve(adapter, hints or Hints()).require(), name) for name, adapter in adapters]
    if not any_base:
        for job in jobs:
            _check_identity(job.adapter, base, job.resolution)
    return base.plan(verb, jobs, options)


def merge(
    adapter: Adapter, base: Base, out: str | os.PathLike[str], hints: Hints | None = None, *, force: bool = False
) -> Outcome:
    """Write ``base`` with W + ΔW in the place of W, in W's own dtype and orientation."""
    return base.apply(prepare("merge", [("default", adapter)], base, Options(Path(out)), hints), force=force)


def attach(
    adapter: Adapter, base: Base, out: str | os.PathLike[str], hints: Hints | None = None, *, force: bool = False
) -> Outcome:
    """Write ``base`` with the branch s·B·A·x beside each target; the base's weights are not touched."""
    return base.apply(prepare("attach", [("default", adapter)], base, Options(Path(out)), hints), force=force)


def _check_identity(adapter: Adapter, base: Base, resolution: Resolution) -> None:
    """LF-607 where the adapter says which weights it was bound to, and these are others."""
    known = base.parameters()
    problems = []
    for key, places in resolution.targets.items():
        for match in places:
            name = next((n for n in (match.weight, f"{match.file}:{match.weight}") if n in known), None)
            if name is not None and (problem := _other(key, adapter[key], base, match, name)):
                problems.append(problem)
    if problems:
        raise LoraFormatError(problems)


def _other(key: str, update: Update, base: Base, match: Match, name: str) -> Problem | None:
    """By the digest, where the tensor lies as it lay then; else by the sketch, which survives casts and transposes."""
    if update.base_sha256 is not None and update.placement == match.placement:
        found = tensor_sha256(base.read(name))
        if found == update.base_sha256:
            return None
        what = f"the adapter was bound to a tensor {update.base_sha256[:12]}…, the base has {found[:12]}…"
        return Problem("LF-607", what, key, "take that base, or --any-base for a close relative")
    recognised = any(evidence.startswith(("fingerprint:", "sketch:")) for evidence in match.evidence)
    if update.sketch is None or recognised or not update.sketch.any():
        return None
    weight = base.read(name)
    drawn = sketch(weight, match.placement) if weight.shape == match.placement.shape else None
    like = 0.0 if drawn is None else cosine(update.sketch, drawn)
    if like >= ACCEPT:
        return None
    what = f"{match.weight} is not like the tensor that the adapter was bound to: their sketches have cosine {like:.2f}"
    return Problem(
        "LF-607", what, key, "another base, or a name that means another weight; --any-base takes it all the same"
    )
