"""What a plan tells a person: each step, and what there is to know of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loraformat_converters.onnx.changing.rounding import balance
from loraformat_converters.onnx.changing.spots import Spot
from loraformat_converters.onnx.finding.ladder import PREFIX

if TYPE_CHECKING:
    from loraformat.plan import Job

__all__ = ["notes", "prefixes", "step", "ties"]


def step(verb: str, spot: Spot) -> str:
    """One target, for ``--plan``."""
    nodes = ", ".join(site.node.name or site.operator for site in spot.sites)
    keys = ", ".join(dict.fromkeys(change.key for change in spot.changes))
    return f"{verb} {keys} at {nodes} ({spot.sites[0].root_name} {list(spot.sites[0].root.dims)})"


def prefixes(jobs: Sequence[Job]) -> list[str]:
    """What the targets' names and the graph's differ by."""
    evidence = (e for job in jobs for places in job.resolution.targets.values() for m in places for e in m.evidence)
    return [said for said in dict.fromkeys(evidence) if said.startswith(PREFIX)]


def ties(jobs: Sequence[Job]) -> Iterator[str]:
    """Which heads change with a table whose tokens were trained. Of a model that is not transformers' PEFT ties none (0.21.2)."""
    for job in jobs:
        for key, places in job.resolution.targets.items():
            for match in places:
                if match.evidence[0].startswith("tied: "):
                    yield f"{key}: {match.node or match.weight} has the same values and changes too, as in transformers' models"


def notes(verb: str, places: Sequence[Spot]) -> Iterator[str]:
    """Shared weights, copies, rounding."""
    for spot in places:
        if spot.others and verb == "merge":
            others = ", ".join(spot.others[:3])
            yield f"{spot.sites[0].root_name} is used by {others} too: {spot.key} gets a copy of its own"
        if len(spot.sites) > 1:
            yield f"{spot.key} is used {len(spot.sites)} times: the change acts at every use"
    if verb == "attach":
        yield from _roundings(places)


def _roundings(places: Sequence[Spot]) -> Iterator[str]:
    """What 16-bit weights leave of the factors."""
    pairs = [
        (spot.key, *balance(change.update["lora"], spot.sites[0].factor, spot.sites[0].dtype))
        for spot in places
        for change in spot.changes
        if "lora" in change.update
    ]
    moved = [k for _, k, _ in pairs if k]
    if pairs and (worst := max(pairs, key=lambda pair: pair[2]))[2]:
        yield f"16-bit weights: rounding changes the factors by up to {worst[2]:.1e} of their size ({worst[0]})"
    if moved:
        yield f"{len(moved)} pairs are balanced by powers of two (2^{min(moved)} … 2^{max(moved)}), which is exact"
