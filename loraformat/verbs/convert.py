"""From any layout to any other: through the model, so that N layouts need N files."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loraformat import canonical, registry
from loraformat.apart import check_apart
from loraformat.atomic import write_file, write_folder
from loraformat.errors import Problem, fault
from loraformat.identity import digesting
from loraformat.layout import Layout, Output, ReadOptions, WriteOptions
from loraformat.naming.spaces import TORCH, space_of
from loraformat.resolve import Hints
from loraformat.verbs.adapt import Adapted
from loraformat.verbs.bind import bind
from loraformat.verbs.retarget import retarget

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.atomic import Writer
    from loraformat.base import Base

__all__ = ["Converted", "convert", "save", "target_layout"]


class Converted(NamedTuple):
    """What was converted: the adapter as written, what reader and writer warn of, and the layouts.

    ``adapted``: what became of ΔW where another form was asked for; ``digest``: of what was written.
    """

    adapter: Adapter
    warnings: list[Problem]
    source: Layout
    destination: Layout
    adapted: Adapted
    digest: str


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    from_layout: str | None = None,
    to_layout: str | None = None,
    options: ReadOptions | None = None,
    base: str | os.PathLike[str] | None = None,
    hints: Hints | None = None,
    adapt: Callable[[Adapter], Adapted] = Adapted,
    model: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Converted:
    """Read ``source``, bind it to ``base`` if given, write ``destination``. ΔW stays the same unless ``adapt`` changes it.

    Where the target layout has names of its own, or the base has others than the source, ``retarget`` finds them.

    Args:
        from_layout, to_layout: by their names; else the source's is told by its content, the destination's by its name.
        options: what the source does not say, such as alpha.
        base: a path; it also tells the reader shapes that the source leaves open. Of a ``config.json`` alone, what the
            layouts take from that: nothing is bound.
        hints: what is known of the base.
        model: a path, of a model with inputs for adapters: by its names and in its dtypes is written, and what was written so is
            read by its weights.
        adapt: another form of the same change, see ``loraformat.verbs.adapt``.

    Raises:
        LoraFormatError: LF-5xx the source, LF-508 what the target cannot carry, LF-7xx the output.
    """
    to, _ = target_layout(destination, to_layout)
    options = options or ReadOptions()
    opened = None
    if base is not None and Path(base).suffix == ".json":
        options = replace(options, config=_config(Path(base)))
    elif base is not None:
        opened = registry.open_base(base)
        options = replace(options, base=opened, config=registry.model_config(opened))
    runs = registry.open_base(model) if model is not None else None
    check_apart(destination, opened or base, runs)
    reading, layout, _ = registry.read(source, from_layout, replace(options, model=runs))
    adapter = reading.adapter
    if opened is not None:
        adapter = bind(_named(adapter, {space_of(opened)}, opened, options.config), opened, hints)
    elif hints and (hints.names or hints.axes):
        raise fault("LF-705", "names and axes are stated for a base", fix="give --base")
    adapted = adapt(adapter)
    adapted = replace(adapted, adapter=_named(adapted.adapter, to.names, opened, options.config))
    told = WriteOptions(opened, options.config, model=runs)
    output = _output(adapted.adapter, destination, to, told)
    with digesting(adapted.adapter) as digest:
        _put(output, Path(destination), force=force)
        warnings = [*reading.warnings, *output.warnings]
        return Converted(adapted.adapter, warnings, layout, to, adapted, digest())


def _named(adapter: Adapter, spaces: Collection[str], base: Base | None, config: Mapping[str, Any]) -> Adapter:
    """The adapter under the names of one of these spaces; as it is where none is asked for."""
    if not spaces or adapter.names in spaces:
        return adapter
    to = TORCH if TORCH in spaces else sorted(spaces)[0]
    return retarget(adapter, to, base=base, config=config).adapter


def _config(path: Path) -> dict[str, Any]:
    """A model's ``config.json``."""
    try:
        value = canonical.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise fault("LF-701", f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise fault("LF-601", f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise fault("LF-601", f"{path} is no object of a model's settings")
    return value


def save(
    adapter: Adapter,
    destination: str | os.PathLike[str],
    layout: Layout,
    options: WriteOptions | None = None,
    *,
    force: bool = False,
    beside: Mapping[Path, Writer] | None = None,
) -> list[Problem]:
    """Write an adapter in a layout, atomically; what the writer warns of.

    Args:
        beside: files that are there with the output, or not at all.

    Raises:
        LoraFormatError: LF-508 what the layout cannot carry; LF-7xx the output.
    """
    output = _output(adapter, destination, layout, options or WriteOptions())
    _put(output, Path(destination), force=force, beside=beside)
    return output.warnings


def _output(adapter: Adapter, destination: str | os.PathLike[str], layout: Layout, options: WriteOptions) -> Output:
    """What is to be written, everything checked."""
    _check_kinds(adapter, layout)
    return layout.write(adapter, replace(options, ending=Path(destination).suffix))


def _put(output: Output, path: Path, *, force: bool, beside: Mapping[Path, Writer] | None = None) -> None:
    if output.folder:
        write_folder(path, output.files, force=force, beside=beside)
    else:
        (writer,) = output.files.values()
        write_file(path, writer, force=force, beside=beside)


def _check_kinds(adapter: Adapter, layout: Layout) -> None:
    """LF-508 for kinds of parts that the layout has no place for, and the ways out that exist."""
    missing = {part.kind for update in adapter.values() for part in update.parts} - layout.carries
    if not missing:
        return
    ways = [f"--drop {kind}" for kind in sorted(missing)]
    if "lora" in layout.carries and missing <= {"loha", "lokr", "delta"}:
        ways.insert(0, "--to-lora R, whose residual is printed")
    what = f"the layout {layout.name} cannot carry {', '.join(sorted(missing))} parts"
    raise fault("LF-508", what, fix=f"keep the native file, which can; or {', or '.join(ways)}")


def target_layout(destination: str | os.PathLike[str], name: str | None) -> tuple[Layout, str]:
    """The layout to write and why: as named, else by the ending of the name, else PEFT for a folder."""
    if name is not None:
        return registry.layout(name), "as asked"
    path = Path(destination)
    ends = [(ending, item) for item in registry.layouts().values() for ending in item.endings]
    if found := [(ending, item) for ending, item in ends if path.name.endswith(ending)]:
        ending, item = max(found, key=lambda pair: len(pair[0]))
        return item, f"the name ends with {ending}"
    if not path.suffix or path.is_dir():
        return registry.layout("peft"), "the name is a folder's"
    written = ", ".join(name for name, item in registry.layouts().items() if item.writes)
    raise fault("LF-705", f"which layout is {path.name}?", fix=f"give --to, one of {written}")
