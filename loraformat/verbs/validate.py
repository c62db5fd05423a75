"""Validate: everything that is wrong with an adapter, as data; nothing that it meets gets out as an exception."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat import registry
from loraformat.container import HEADER_CAP
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import ReadOptions
from loraformat.resolve import Hints
from loraformat.source import Source, open_source
from loraformat.values import value_problems
from loraformat.walk import adapters_under

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base

__all__ = ["Limits", "Validation", "validate", "validate_all"]

_TENSORS = 16
"""More than a target has in any layout: two for each of its parts, a core, a magnitude, alphas, a bias."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an adapter may be at most; None for no limit. ``bytes`` is looked at before anything is read."""

    bytes: int | None = None
    rank: int | None = None
    targets: int | None = None


@dataclass(frozen=True, slots=True)
class Validation:
    """What validating one adapter found.

    Attributes:
        path: as it was given or found.
        layout: its name; None where the layout could not be told or not be read.
        evidence: what tells the layout.
        targets: how many there are; None where they could not be read.
        problems: errors and warnings.
        strict: whether a warning makes it invalid too.
    """

    path: str
    layout: str | None = None
    evidence: str = ""
    targets: int | None = None
    problems: tuple[Problem, ...] = ()
    strict: bool = False

    @property
    def valid(self) -> bool:
        """No error; with ``strict``, no problem at all."""
        return not any(self.strict or p.severity == "error" for p in self.problems)

    def as_json(self) -> dict[str, Any]:
        """An entry of ``validate --json``, and a line of ``--jsonl``."""
        return {
            "path": self.path,
            "valid": self.valid,
            "layout": self.layout,
            "targets": self.targets,
            "problems": [problem.as_json() for problem in self.problems],
        }


def validate(
    path: str | os.PathLike[str] | Source,
    *,
    layout: str | None = None,
    base: Base | None = None,
    limits: Limits | None = None,
    strict: bool = False,
) -> Validation:
    """Check one adapter: its container, its metadata, every shape, scale and value.

    Args:
        path: a file, an adapter's folder, or an open source.
        layout: read as this layout; else by its content.
        base: find every target in it too.

    Returns:
        All that was found, LF-1xx … LF-7xx. No input raises: what nobody foresaw is LF-713.
    """
    name = str(path.path) if isinstance(path, Source) else os.fspath(path)
    found = _Found()
    try:
        found.read(path, layout, base, limits or Limits())
    except LoraFormatError as error:
        found.problems += error.problems
    except OSError as error:
        found.problems.append(Problem("LF-701", f"cannot read {error.filename or name}: {error.strerror or error}"))
    except Exception as error:  # one file of many must not end the run, whatever is in it
        what = f"reading fails with {type(error).__name__}: {error}"
        found.problems.append(Problem("LF-713", what, fix="a fault of this program: please report it with the file"))
    return Validation(name, found.layout, found.evidence, found.targets, tuple(found.problems), strict)


def validate_all(path: str | os.PathLike[str], **options: Any) -> Iterator[Validation]:
    """``validate`` for every adapter under a folder, one after the other; see ``loraformat.walk``."""
    if not os.path.isdir(path):
        yield validate(path, **options)
        return
    for found in adapters_under(Path(path), registry.markers()):
        yield validate(found, **options)


class _Found:
    """What is known so far: it stays when the next step fails."""

    def __init__(self) -> None:
        self.layout: str | None = None
        self.evidence = ""
        self.targets: int | None = None
        self.problems: list[Problem] = []

    def read(
        self, path: str | os.PathLike[str] | Source, layout: str | None, base: Base | None, limits: Limits
    ) -> None:
        source = path if isinstance(path, Source) else open_source(path)
        _check_size(source, limits)
        _check_header(source, limits)
        reading, found, self.evidence = registry.read_source(source, layout, ReadOptions(base=base))
        adapter = reading.adapter
        self.layout, self.targets = found.name, len(adapter)
        self.problems += [*reading.warnings, *_excesses(adapter, limits), *value_problems(adapter)]
        if base is not None:
            resolution = base.resolve(adapter, Hints())
            self.problems += [*resolution.unresolved, *resolution.ambiguous]


def _check_size(source: Source, limits: Limits) -> None:
    if limits.bytes is not None and _size(source) > limits.bytes:
        raise fault("LF-710", f"{source.path} is larger than the {limits.bytes:,} bytes that are allowed")


def _check_header(source: Source, limits: Limits) -> None:
    """LF-712 before millions of entries are taken apart, which takes a minute and gigabytes."""
    if limits.targets is None or source.file is None or source.torch:
        return
    with open(source.file, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found = file.read(length).count(b'"data_offsets"') if length <= HEADER_CAP else 0
    if found > _TENSORS * limits.targets:
        what = (
            f"the header lists {found:,} tensors; {limits.targets:,} targets are allowed, of {_TENSORS} tensors at most"
        )
        raise fault("LF-712", what)


def _size(source: Source) -> int:
    """Bytes of the tensor file; of everything in a folder whose tensors lie in no one file: Orbax, distributed."""
    if source.file is not None and not source.distributed:
        return source.file.stat().st_size
    return sum(path.stat().st_size for path in source.folder.rglob("*") if path.is_file())


def _excesses(adapter: Adapter, limits: Limits) -> Iterator[Problem]:
    """What is over a limit; the bytes once more, since a compressed file holds more than its size."""
    if limits.bytes is not None:
        held = sum(update.nbytes for update in adapter.values())
        if held > limits.bytes:
            yield Problem("LF-710", f"the tensors have {held:,} bytes; at most {limits.bytes:,} are allowed")
    if limits.targets is not None and len(adapter) > limits.targets:
        yield Problem("LF-712", f"the adapter has {len(adapter):,} targets; at most {limits.targets:,} are allowed")
    if limits.rank is None:
        return
    over = {key: r for key, update in adapter.items() if (r := update.rank or 0) > limits.rank}
    if over:
        worst = max(over, key=over.__getitem__)
        more = f", and {len(over) - 1} other targets are over it" if len(over) > 1 else ""
        what = f"the rank is {over[worst]}; at most {limits.rank} is allowed{more}"
        yield Problem("LF-711", what, worst, "train with a lower rank")
