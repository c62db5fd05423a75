"""A merge as a task: what it is made of, so that the next run knows it again, and what it must know of a finished file."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

from loraformat import progress
from loraformat.checkpoint.merging import Merge
from loraformat.checkpoint.survival import too_little
from loraformat.errors import LoraFormatError
from loraformat.identity import digest

if TYPE_CHECKING:
    from pathlib import Path

    from loraformat.checkpoint.folder import Files
    from loraformat.plan import Plan

__all__ = ["Merging", "identity", "seen"]


def identity(plan: Plan, files: Files) -> Callable[[], str]:
    """SHA-256 of what is made of what: adapters, places, and the files of the base as they lie on the disk now.

    The adapters are read when it is asked for the first time: a merge of a moment never asks.
    """
    stats = seen([*(shard.path for shard in files.shards.values()), *files.others.values()])
    how = [importlib.metadata.version("loraformat"), plan.options.requantize]

    @functools.cache
    def found() -> str:
        with progress.listening(lambda _: None):  # what is read here is no part of what is written
            jobs = [[digest(job.adapter), job.resolution.as_json()["targets"]] for job in plan.jobs]
        return hashlib.sha256(json.dumps([how, jobs, stats], sort_keys=True).encode()).hexdigest()

    return found


def seen(paths: Iterable[Path]) -> list[list[str | int]]:
    """The files as they lie on the disk now: path, size, time of the last change, inode."""
    return [[str(path), found.st_size, found.st_mtime_ns, found.st_ino] for path in paths for found in [path.stat()]]


@dataclass(slots=True)
class Merging:
    """A merge as a task, which goes on after a kill.

    Attributes:
        names: the files that were finished already.
    """

    identity: Callable[[], str]
    merge: Merge
    survival: float
    names: list[str] = field(default_factory=list)

    def check(self) -> None:
        """LF-615 where too little of the change survives in what was written, before it gets its name."""
        if problem := too_little(list(self.merge.changes.values()), self.survival):
            raise LoraFormatError(problem)

    def note(self, name: str) -> Mapping[str, Any]:
        """The norms of the tensors in the file."""
        found = self.merge.of_shard(name) if name in self.merge.files.shards else []
        return {change.name: astuple(change.norms) for change in found}

    def resume(self, name: str, note: Mapping[str, Any]) -> None:
        """Takes the norms over."""
        self.names.append(name)
        for tensor, norms in note.items():
            change = self.merge.changes[tensor].norms
            change.base, change.delta, change.lost, change.new = norms
