"""From any layout to any other: through the model, so that N layouts need N files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loraformat import registry
from loraformat.atomic import write_file, write_folder
from loraformat.errors import Problem, fault
from loraformat.layout import Layout, ReadOptions
from loraformat.resolve import Hints
from loraformat.verbs.bind import bind

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["Converted", "convert", "save", "target_layout"]


class Converted(NamedTuple):
    """What was converted: the adapter, what its reader warns of, the layout that it had and the one that it has now."""

    adapter: Adapter
    warnings: list[Problem]
    source: Layout
    destination: Layout


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    from_layout: str | None = None,
    to_layout: str | None = None,
    options: ReadOptions | None = None,
    base: str | os.PathLike[str] | None = None,
    hints: Hints | None = None,
    force: bool = False,
) -> Converted:
    """Read ``source``, bind it to ``base`` if given, write ``destination``. ΔW stays the same.

    Args:
        from_layout, to_layout: by their names; else the source's is told by its content, the destination's by its name.
        options: what the source does not say, such as alpha.
        base: a path; it also tells the reader shapes that the source leaves open.
        hints: what is known of the base.

    Raises:
        LoraFormatError: LF-5xx the source, LF-508 what the target cannot carry, LF-7xx the output.
    """
    to, _ = target_layout(destination, to_layout)
    opened = registry.open_base(base) if base is not None else None
    if opened is not None:
        options = replace(options or ReadOptions(), base=opened)
    reading, layout, _ = registry.read(source, from_layout, options)
    adapter = reading.adapter
    if opened is not None:
        adapter = bind(adapter, opened, hints)
    elif hints and (hints.names or hints.axes):
        raise fault("LF-705", "names and axes are stated for a base", fix="give --base")
    save(adapter, destination, to, force=force)
    return Converted(adapter, reading.warnings, layout, to)


def save(adapter: Adapter, destination: str | os.PathLike[str], layout: Layout, *, force: bool = False) -> None:
    """Write an adapter in a layout, atomically."""
    missing = {part.kind for update in adapter.values() for part in update.parts} - layout.carries
    if missing:
        what = f"the layout {layout.name} cannot carry {', '.join(sorted(missing))} parts"
        raise fault("LF-508", what, fix="keep the native file, which can")
    output = layout.write(adapter)
    path = Path(destination)
    if output.folder:
        write_folder(path, output.files, force=force)
    else:
        (writer,) = output.files.values()
        write_file(path, writer, force=force)


def target_layout(destination: str | os.PathLike[str], name: str | None) -> tuple[Layout, str]:
    """The layout to write and why: as named, else native for ``.safetensors`` and PEFT for a folder."""
    if name is not None:
        return registry.layout(name), "as asked"
    path = Path(destination)
    if path.suffix == ".safetensors":
        return registry.layout("native"), "the name ends with .safetensors"
    if not path.suffix or path.is_dir():
        return registry.layout("peft"), "the name is a folder's"
    raise fault("LF-705", f"which layout is {path.name}?", fix=f"give --to, one of {', '.join(registry.layouts())}")
