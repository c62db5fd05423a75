"""What of an adapter lies in one of several files, and the adapter that these shares are of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.errors import fault
from loraformat.names import join
from loraformat.plan import Job
from loraformat.resolve import Match, Resolution
from loraformat_converters.onnx.base import OnnxBase

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["share", "whole"]


def share(job: Job, file: str) -> Job:
    """What of a job lies in one file, by the keys that the file's own resolution has."""
    found = {k: here for k, places in job.resolution.targets.items() if (here := _in_file(places, file))}
    components = job.adapter.components
    plain = {key: key.partition(":")[2] if components else key for key in found}
    updates = {plain[key]: job.adapter[key] for key in found}
    adapter = replace(job.adapter, targets=updates, components=())
    resolution = Resolution({plain[k]: here for k, here in found.items()})
    return replace(job, adapter=adapter, resolution=resolution, components=components)


def _in_file(places: Iterable[Match], file: str) -> tuple[Match, ...]:
    return tuple(match for match in places if match.file == file)


def whole(held: Iterable[tuple[str | None, OnnxBase]]) -> list[tuple[str, Adapter]]:
    """(name, adapter) of what is attached to the models of these components.

    Raises:
        LoraFormatError: LF-613 a record cannot be read, or a part of an adapter is gone.
    """
    found: dict[str, Adapter] = {}
    for component, base in held:
        assert base.record is not None
        for entry, (name, own) in zip(base.record.attached, base.extract(), strict=True):
            components = tuple(map(str, entry.get("components", ())))
            first = found.setdefault(name, replace(own, targets={}, components=components))
            if first.components != components:
                raise fault("LF-613", "two files hold parts of two adapters of one name", where=name)
            prefix = component if components else None
            targets = {join(prefix, key): update for key, update in own.items()}
            found[name] = replace(first, targets={**targets, **first.targets})
    return list(found.items())
