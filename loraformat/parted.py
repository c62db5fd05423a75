"""A base of several bases, as a folder of models is: the plans of the parts that change, as one plan of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import split
from loraformat.plan import Job, Plan
from loraformat.resolve import Match, Resolution

if TYPE_CHECKING:
    from loraformat.base import Base, Options
    from loraformat.tiles import Norms
    from loraformat.updates import Update

__all__ = ["check_outside", "norms_by_key", "plans_of", "share", "whole_plan"]


def check_outside(folder: Path, out: Path) -> None:
    """LF-703 where the output would lie in the base's own folder."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise fault("LF-703", f"{out} lies in the base's own folder", fix="write beside it")


def share(job: Job, part: str) -> Job:
    """What of a job lies in one part, by the keys that the part's own resolution has."""
    components = job.adapter.components
    targets: dict[str, tuple[Match, ...]] = {}
    updates: dict[str, Update] = {}
    for key, places in job.resolution.targets.items():
        if here := tuple(match for match in places if match.file == part):
            name = split(key, components)[1]
            targets[name], updates[name] = here, job.adapter[key]
    adapter = replace(job.adapter, targets=updates, components=())
    return replace(job, adapter=adapter, resolution=Resolution(targets), components=components)


def plans_of(
    verb: str, jobs: Sequence[Job], options: Options, parts: Mapping[str, Base], share: Callable[[Job, str], Job]
) -> dict[str, Plan]:
    """Part → its plan, of those in which ``share`` of a job leaves a target; every refusal at once, with the part's name."""
    plans: dict[str, Plan] = {}
    problems: list[Problem] = []
    for name, base in parts.items():
        own = [part for job in jobs if (part := share(job, name)).adapter.targets]
        try:
            if own:
                plans[name] = base.plan(verb, own, replace(options, out=options.out / name))
        except LoraFormatError as error:
            problems += [replace(p, what=f"{name}: {p.what}") for p in error.problems]
    if problems:
        raise LoraFormatError(problems)
    return plans


def whole_plan(
    verb: str, jobs: Sequence[Job], options: Options, plans: Mapping[str, Plan], rest: Sequence[Path], note: str
) -> Plan:
    """One plan of them, whose state they are; ``rest``: the files that are taken along as they are."""
    steps = tuple(f"{name}: {step}" for name, plan in plans.items() for step in plan.steps)
    notes = tuple(f"{name}: {said}" for name, plan in plans.items() for said in plan.notes)
    copied = sum(path.stat().st_size for path in rest)
    reads, writes = (copied + sum(getattr(plan, field) for plan in plans.values()) for field in ("reads", "writes"))
    peak = max((plan.peak for plan in plans.values()), default=0)
    copies = (*rest, *(path for plan in plans.values() for path in plan.copies))
    return Plan(verb, tuple(jobs), options, steps, reads, writes, peak, (*notes, note), plans, copies=copies)


def norms_by_key(plan: Plan, found: Mapping[str, Mapping[str, Norms]]) -> dict[str, Norms]:
    """Target → its norms, from the first of the parts that have it; ``found``: part → the part's own key → norms."""
    return {
        key: found[places[0].file][split(key, job.adapter.components)[1]]
        for job in plan.jobs
        for key, places in job.resolution.targets.items()
    }
