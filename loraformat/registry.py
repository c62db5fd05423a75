"""The doors: layouts, bases and name spaces, found by entry points, so that the verbs know no tools nor frameworks."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loraformat.container import mistaken_for
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import NATIVE, Layout, Reading, ReadOptions
from loraformat.names import nearest
from loraformat.source import Source, existing, open_source
from loraformat.walk import adapters_under

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base
    from loraformat.loaders import Loader
    from loraformat.naming.spaces import Space

T = TypeVar("T")

__all__ = [
    "detect", "from_tensors", "layout", "layouts", "load", "loader", "loaders", "markers", "model_config", "neither",
    "open_base", "read", "read_source", "spaces",
]  # fmt: skip

CONFIG = "adapter_config.json"
"""What PEFT and MLX call the configuration beside the tensors."""

_LOOKED_AT = 100
"""Files under a folder: enough to find a download's adapter, few enough not to be waited for."""


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
    return _named(name, layouts(), "layout")


def loaders() -> Mapping[str, Loader]:
    """Every program whose rules are known, by name."""
    return {item.name: item for item in _loaded("loraformat.loaders")[0].values()}


def loader(name: str) -> Loader:
    """The loader of that name, or LF-705 with the nearest names."""
    return _named(name, loaders(), "loader")


def _named(name: str, known: Mapping[str, T], what: str) -> T:
    if name not in known:
        hint = nearest(name, known)
        mean = f'  Did you mean "{hint[0]}"?' if hint else ""
        raise fault("LF-705", f'unknown {what} "{name}".  Known: {", ".join(known)}.{mean}')
    return known[name]


def spaces() -> dict[str, Space]:
    """Every relation between name spaces that is installed, by the name of its entry point."""
    return dict(_loaded("loraformat.spaces")[0])


def markers() -> frozenset[str]:
    """File names that make a folder one adapter, in any layout."""
    return frozenset().union(*(item.markers for item in layouts().values()))


def detect(source: Source) -> tuple[Layout, str]:
    """The only layout that claims the source, with its evidence; LF-501 none, LF-502 several."""
    claims = _claims(source)
    if len(claims) == 1:
        return claims[0]
    if claims:
        said = "; ".join(f"{item.name} ({why})" for item, why in claims)
        raise fault("LF-502", f"{len(claims)} layouts claim {source.path}: {said}", fix="choose one with --from NAME")
    raise (_inside(source.path) if source.file is None else None) or _unclaimed(source)


def _inside(folder: Path) -> LoraFormatError | None:
    """LF-501 with up to three adapters that lie in a folder, as in a downloaded repository's snapshots; None without any."""
    looked = itertools.islice(adapters_under(folder, markers()), _LOOKED_AT)
    near = list(itertools.islice((str(path) for path in looked if path != folder and _claimed(path)), 3))
    return (
        fault("LF-501", f"{folder} itself is no adapter; in it lies {', '.join(near)}", fix="name one")
        if near
        else None
    )


def neither(path: str, adapter: LoraFormatError, base: LoraFormatError) -> LoraFormatError:
    """Why a path is no adapter and no base; of a folder with an adapter in it only where that lies."""
    near = _inside(Path(path)) if Path(path).is_dir() else None
    return near or LoraFormatError([*adapter.problems, *base.problems])


def _claimed(path: Path) -> bool:
    try:
        return len(_claims(open_source(path))) == 1
    except (LoraFormatError, OSError):
        return False


def _claims(source: Source) -> list[tuple[Layout, str]]:
    """The layouts that claim a source, with their evidence; a file of our own is nobody else's."""
    if evidence := NATIVE.detect(source):
        return [(NATIVE, evidence)]
    return [(item, why) for item in layouts().values() if (why := item.detect(source))]


def _unclaimed(source: Source) -> LoraFormatError:
    what, fix = f"no known layout claims {source.path}", f"known layouts: {', '.join(layouts())}"
    if source.distributed:
        fix = "export the adapter to PEFT with the framework that wrote it: NeMo's or ms-swift's export"
    if (
        source.file is None or source.torch or source.distributed or source.file.suffix == ".safetensors"
    ):  # else no tensors are no wonder
        what += f"; its first tensors: {', '.join(list(source.tensors)[:3]) or 'none'}"
    else:
        bases = [kind.describes for kind in _loaded("loraformat.bases")[0].values() if kind.recognises(source.path)]
        fix = f"it looks like a base, not an adapter: {bases[0]}" if bases else mistaken_for(source.head) or fix
        fix = fix if source.head else "the file is empty"
    return LoraFormatError([Problem("LF-501", what, fix=fix), *_loaded("loraformat.layouts")[1]])


def read(
    path: str | os.PathLike[str], name: str | None = None, options: ReadOptions | None = None
) -> tuple[Reading, Layout, str]:
    """(adapter with warnings, its layout, the evidence) of a file or folder in any layout."""
    return read_source(open_source(path), name, options)


def read_source(
    source: Source, name: str | None = None, options: ReadOptions | None = None
) -> tuple[Reading, Layout, str]:
    """As ``read``, of a source that is open."""
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


def from_tensors(
    tensors: Mapping[str, Any],
    config: Mapping[str, Any] | str,
    *,
    header: Mapping[str, str] | None = None,
    options: ReadOptions | None = None,
) -> Adapter:
    """The adapter that arrays in memory are, read as if they lay in a file.

    Args:
        tensors: name → array, with the names of some layout.
        config: what its ``adapter_config.json`` would say (PEFT and MLX call it so); or a layout's name, for a layout
            that needs none or with ``options`` in its place.
        header: the file's own metadata strings; of the native layout ``{"loraformat": text}``.
        options: what the tensors do not say, such as alpha.

    Raises:
        LoraFormatError: as ``load``; LF-314 a value is no array.
    """
    import json

    from loraformat.memory import MemorySource

    if isinstance(config, str):
        return read_source(MemorySource(tensors, header), config, options)[0].adapter
    try:  # in the order given: of PEFT's patterns the first that fits counts
        text = json.dumps(dict(config), default=_listed, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise fault("LF-503", f"the configuration is no JSON: {error}") from None
    return read_source(MemorySource(tensors, header, {CONFIG: text}), None, options)[0].adapter


def _listed(value: Any) -> list[Any]:
    """A set, which is what PEFT's own configuration holds ``target_modules`` in, as JSON can spell it."""
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__}")


def model_config(base: Base) -> Mapping[str, Any]:
    """What the ``config.json`` of a base model says, where the base knows one."""
    known: Mapping[str, Any] = getattr(base, "config", {})
    return known


def open_base(path: str | os.PathLike[str]) -> Base:
    """The base at ``path``: the kind that recognises it; LF-601 otherwise, LF-701 where nothing is."""
    found = existing(path)
    plugins, problems = _loaded("loraformat.bases")
    for kind in plugins.values():
        if kind.recognises(found):
            base: Base = kind.open(found)
            return base
    names = ", ".join(kind.describes for kind in plugins.values())
    inside = next((inner for inner in sorted(found.glob("snapshots/*")) if inner.is_dir()), None)
    fix = f"a download of huggingface_hub keeps it in {inside}" if inside else ""
    what = f"{found} is none of the known kinds of base: {names}"
    raise LoraFormatError([Problem("LF-601", what, fix=fix), *problems])
