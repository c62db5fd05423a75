"""The two doors: layouts and bases, found by entry points, so that the verbs know neither tools nor frameworks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import NATIVE, Layout, Reading, ReadOptions
from loraformat.names import nearest
from loraformat.source import Source, open_source

if TYPE_CHECKING:
    import os

    from loraformat.adapter import Adapter
    from loraformat.base import Base

__all__ = ["detect", "layout", "layouts", "load", "open_base", "read"]


@functools.cache
def _loaded(group: str) -> tuple[Mapping[str, Any], tuple[Problem, ...]]:
    """Entry point name → object; a plug-in that does not import is a warning, never a crash."""
    import importlib.metadata

    found, problems = {}, []
    for point in sorted(importlib.metadata.entry_points(group=group), key=lambda p: p.name):
        try:
            found[point.name] = point.load()
        except Exception as error:
            what = f"the plug-in {point.value} does not load: {error}"
            problems.append(Problem("LF-704", what, point.name, severity="warning"))
    return found, tuple(problems)


def layouts() -> dict[str, Layout]:
    """Every layout by name, the native one first."""
    return {NATIVE.name: NATIVE, **_loaded("loraformat.layouts")[0]}


def layout(name: str) -> Layout:
    """The layout of that name, or LF-705 with the nearest names."""
    known = layouts()
    if name not in known:
        hint = nearest(name, known)
        mean = f'  Did you mean "{hint[0]}"?' if hint else ""
        raise fault("LF-705", f'unknown layout "{name}".  Known: {", ".join(known)}.{mean}')
    return known[name]


def detect(source: Source) -> tuple[Layout, str]:
    """The only layout that claims the source, with its evidence; LF-501 none, LF-502 several."""
    if evidence := NATIVE.detect(source):
        return NATIVE, evidence
    claims = [(item, why) for item in layouts().values() if (why := item.detect(source))]
    if len(claims) == 1:
        return claims[0]
    if claims:
        said = "; ".join(f"{item.name} ({why})" for item, why in claims)
        raise fault("LF-502", f"{len(claims)} layouts claim {source.path}: {said}", fix="choose one with --from NAME")
    raise _unclaimed(source)


def _unclaimed(source: Source) -> LoraFormatError:
    some = list(source.tensors)[:3]
    what = f"no known layout claims {source.path}; its first tensors: {', '.join(some) or 'none'}"
    known = f"known layouts: {', '.join(layouts())}"
    return LoraFormatError([Problem("LF-501", what, fix=known), *_loaded("loraformat.layouts")[1]])


def read(
    path: str | os.PathLike[str], name: str | None = None, options: ReadOptions | None = None
) -> tuple[Reading, Layout, str]:
    """(adapter with warnings, its layout, the evidence) of a file or folder in any layout."""
    source = open_source(path)
    found, evidence = (layout(name), "as asked") if name else detect(source)
    return found.read(source, options or ReadOptions()), found, evidence


def load(path: str | os.PathLike[str], layout: str | None = None, base: Base | None = None) -> Adapter:
    """The adapter at ``path``, in any layout that is installed.

    Args:
        base: tells the shapes of its parameters where the source leaves open which of them a tensor belongs to.

    Raises:
        LoraFormatError: LF-5xx, or the file rules of a native file.
    """
    return read(path, layout, ReadOptions(base=base))[0].adapter


def open_base(path: str | os.PathLike[str]) -> Base:
    """The base at ``path``: the kind that recognises it; LF-601 otherwise."""
    found = Path(path)
    if not found.exists():
        raise fault("LF-701", f"no such file or folder: {found}")
    plugins, problems = _loaded("loraformat.bases")
    for kind in plugins.values():
        if kind.recognises(found):
            base: Base = kind.open(found)
            return base
    names = ", ".join(kind.describes for kind in plugins.values())
    raise LoraFormatError([Problem("LF-601", f"{found} is none of the known kinds of base: {names}"), *problems])
