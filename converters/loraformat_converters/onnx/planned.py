"""What a verb is going to change in a graph, and every refusal that the graph gives reason for, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError
from loraformat.plan import Job, Plan, size
from loraformat_converters.onnx.attaching.modes import jobs_of
from loraformat_converters.onnx.attaching.modes import notes as notes_of_mode
from loraformat_converters.onnx.attaching.modes import obstacles as obstacles_of_mode
from loraformat_converters.onnx.changing.ahead import computed_ahead
from loraformat_converters.onnx.changing.copied import copied
from loraformat_converters.onnx.changing.merge import written_data
from loraformat_converters.onnx.changing.refuse import obstacles
from loraformat_converters.onnx.changing.requantised import kept
from loraformat_converters.onnx.changing.rewriting import tag
from loraformat_converters.onnx.changing.spots import Spot, by_tensor, every_change, gathered, spots
from loraformat_converters.onnx.changing.told import notes, prefixes, step, ties
from loraformat_converters.onnx.graph.store import Storage, check_size

if TYPE_CHECKING:
    from loraformat.base import Options
    from loraformat_converters.onnx.base import OnnxBase

__all__ = ["planned"]


def planned(base: OnnxBase, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
    """The plan; all refusals at once."""
    attaches, rounds = verb == "attach", verb == "merge" and options.requantize
    if attaches:
        jobs = jobs_of(base, jobs, options)
    places = _places(base, verb, jobs, options)
    data = [] if attaches else [data for spot in places if (data := written_data(spot))]
    storage = Storage(base.model, base.path, options.out, data, tag(jobs))
    graph, copies = base.path.stat().st_size, storage.data_bytes
    added = sum(change.update.nbytes for change in every_change(places))
    check_size(graph + (added if attaches and options.mode != "swap" else 0))
    writes, peak = graph + copies + (added if attaches else 0), 3 * graph + (32 << 20)
    steps = tuple(step(verb, spot) for spot in places)
    estimate = partial(base.rewriting.estimate, places) if rounds else None
    said = tuple(_notes(verb, places, jobs, options, storage))
    return Plan(verb, tuple(jobs), options, steps, graph, writes, peak, said, places, estimate, tuple(storage.copies))


def _places(base: OnnxBase, verb: str, jobs: Sequence[Job], options: Options) -> list[Spot]:
    """Where the jobs change the graph; LF-6xx where they cannot."""
    changes = gathered(jobs)
    rounds = (lambda site: kept(site, base.values) is not None) if verb == "merge" and options.requantize else None
    problems = list(obstacles(verb, changes, base.index.opset, rounds))
    problems += [*computed_ahead(base.values, changes.items(), _named(jobs)), *copied(base.values, changes)]
    if problems:
        raise LoraFormatError(problems)
    changed = by_tensor(changes) if verb == "merge" else changes
    places = spots(base.model, base.index, changed, base.path.parent)
    if verb == "attach" and (problems := list(obstacles_of_mode(base.model, base.index, places, jobs, options))):
        raise LoraFormatError(problems)
    return places


def _named(jobs: Sequence[Job]) -> set[str]:
    """The targets whose node the user named, and not their weight, which others may use."""
    targets = (item for job in jobs for item in job.resolution.targets.items())
    return {key for key, places in targets if any(f"user: {match.node}" in match.evidence for match in places)}


def _notes(verb: str, places: Sequence[Spot], jobs: Sequence[Job], options: Options, storage: Storage) -> Iterator[str]:
    """What a person should know before."""
    yield from (*prefixes(jobs), *ties(jobs), *notes(verb, places))
    if verb == "attach":
        yield from notes_of_mode(places, jobs, options)
    if storage.copied:
        yield f"copies {', '.join(storage.copied)} ({size(storage.data_bytes)}) beside the output"
