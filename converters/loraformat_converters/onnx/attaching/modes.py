"""The ways in which ``attach`` puts adapters into a graph, told apart in one place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from loraformat.errors import Problem
from loraformat_converters.onnx.attaching import apart, stackable, swap, swappable
from loraformat_converters.onnx.attaching.attach import Attachment
from loraformat_converters.onnx.attaching.choice import chosen
from loraformat_converters.onnx.attaching.slot_names import file_of
from loraformat_converters.onnx.attaching.stack import Stack
from loraformat_converters.onnx.attaching.swap import Swap
from loraformat_converters.onnx.attaching.topology import place_of, topology_of
from loraformat_converters.onnx.changing.record import Record
from loraformat_converters.onnx.graph.values import Values
from loraformat_converters.onnx.tort import read

if TYPE_CHECKING:
    from loraformat.atomic import Writer
    from loraformat.base import Base, Options
    from loraformat.plan import Job, Plan
    from loraformat_converters.onnx.changing.spots import Spot
    from loraformat_converters.onnx.graph.index import Index

__all__ = ["Way", "beside", "cases", "jobs_of", "notes", "obstacles", "way"]

Way = Attachment | Swap | Stack


def way(
    model: onnx.ModelProto, index: Index, options: Options, folder: Path, base_sha256: str, jobs: Sequence[Job]
) -> Way:
    """What changes a graph as the options have it."""
    if options.mode == "swap":
        bound = any(update.sketch is not None for job in jobs for update in job.adapter.values())
        return Swap(index, options, folder, base_sha256, Values(index, folder) if bound else None)
    if options.mode == "stack":
        return Stack(index, options, jobs, model, folder)
    live = [job.name for job in jobs] if options.live_scale else ()
    return Attachment(index, folder, prefold=options.prefold, live=live, topology=topology_of(options))


def jobs_of(base: Base, jobs: Sequence[Job], options: Options) -> list[Job]:
    """The jobs, and one more for slots that no adapter asked for."""
    more = [swap.wanted(base, options.targets)] if options.mode == "swap" and options.targets else []
    return [*jobs, *more]


def obstacles(
    model: onnx.ModelProto, index: Index, spots: Sequence[Spot], jobs: Sequence[Job], options: Options
) -> Iterator[Problem]:
    """What a mode cannot do, or cannot be asked."""
    if apart.wanted(options):
        yield from apart.obstacles(spots, model)
        spots = apart.products(spots)
    if index.ir_version < 4 and (options.live_scale or (options.mode == "swap" and options.slots == "optional")):
        what = f"until IR version 4 no input has a default that a feed replaces, and this model's is {index.ir_version}"
        fix = "raise the model's ir_version first" + ("; or --slots required" if options.mode == "swap" else "")
        yield Problem("LF-608", what, fix=fix)
    if options.mode == "swap":
        for job in jobs:
            if job.name and not re.fullmatch(r"[^./\\\0][^/\\\0]*", job.name):
                yield Problem(
                    "LF-705",
                    f"{job.name!r} names a file beside the model",
                    fix="a name without / that begins with no dot",
                )
        yield from swappable.obstacles(spots, options, index)
    if options.mode == "stack":
        yield from stackable.obstacles(spots, options, index, model)
    if options.prefold and topology_of(options) != "separate":
        what = f"--topology {options.topology} changes W when a runtime loads it, and --prefold is for one that folds nothing"
        yield Problem("LF-705", what, fix="merge, or attach without one of the two")
    if options.live_scale:
        yield from _unscaled(spots, options)


def _unscaled(spots: Sequence[Spot], options: Options) -> Iterator[Problem]:
    """A strength is multiplied into a branch s·B·A·x; of what is in the weight it has no place."""
    if options.mode != "branch" or options.prefold or options.topology == "folded":
        yield Problem(
            "LF-705",
            "--live-scale is for --mode branch without --prefold, in a topology that is not folded",
            fix="a swap is fed scaled factors, a stack weights",
        )
    for spot in spots:
        for change in spot.changes:
            if change.update.kind != "lora" or place_of(spot, topology_of(options)) == "weight":
                what = f"a {change.update.kind} update has no strength that a graph could multiply: it is not linear, or in the weight"
                yield Problem("LF-608", what, change.key, "leave it out with --only, or attach without --live-scale")


def notes(spots: Sequence[Spot], jobs: Sequence[Job], options: Options) -> Iterator[str]:
    """What a person should know of a mode."""
    if apart.wanted(options):
        if said := apart.told(spots):
            yield said
        spots = apart.products(spots)
    if options.mode == "swap":
        files = ", ".join(file_of(options.out.name, job.name) for job in jobs if job.name)
        parts = [part for spot in spots for part in spot.parts()]
        doras = sum(any("magnitude" in change.update for change in part.changes) for part in parts)
        yield f"{2 * len(parts) + doras} inputs for {len(parts)} targets" + (
            f"; writes {files} beside the model" if files else ""
        )
        if said := swap.rounded(spots):
            yield said
    if options.mode == "branch" and (topology := topology_of(options)) != "separate":
        beside = [spot for spot in spots if place_of(spot, topology) == "beside"]
        if beside:
            yield f"{len(beside)} of {len(spots)} targets have a branch of their own: {beside[0].key} takes no other"


Feeds = Mapping[str, Any]


def cases(plan: Plan) -> Iterator[tuple[Callable[[Feeds], Feeds], Sequence[Job]]]:
    """(what is fed besides the model's own inputs, the jobs that then act): all that a proof runs."""
    options, named = plan.options, [job for job in plan.jobs if job.name]
    if plan.verb == "attach" and options.mode == "swap":
        slots = Record.of_file(options.out).slots
        assert slots is not None
        none = slots.off()
        yield (lambda feeds: none if slots.required else {}), []
        for job in named:
            path = options.out.parent / file_of(options.out.name, job.name)
            yield partial(_tensors, path), [job]
    elif plan.verb == "attach" and options.mode == "stack":
        for number in range(len(named) + 1):
            yield partial(chosen, options, len(named), number), named[number - 1 : number] if number else []
    else:
        yield (lambda feeds: {}), plan.jobs


def _tensors(path: Path, feeds: Feeds) -> Feeds:
    return read(path).tensors


def beside(made: Way, jobs: Sequence[Job]) -> Mapping[str, Writer]:
    """What is written beside the model."""
    return made.files(jobs) if isinstance(made, Swap) else {}
