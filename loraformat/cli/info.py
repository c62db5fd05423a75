"""What is it? info, for adapters, bases and models with adapters attached."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from loraformat.cli.options import Choice, complete_layout, complete_loader, json_flag
from loraformat.cli.printing import counted, echo_json, lines_of, printable, table
from loraformat.errors import LoraFormatError, fault

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base
    from loraformat.layout import Reading

__all__ = ["info"]

_LANGUAGES = ("python", "cpp", "csharp", "js", "genai")


@click.command()
@click.argument("path")
@click.option(
    "--from", "layout", metavar="LAYOUT", shell_complete=complete_layout, help="Read as an adapter in this layout."
)
@click.option(
    "--for", "loader", metavar="LOADER", shell_complete=complete_loader, help="Say whether vllm, diffusers, … load it."
)
@click.option("--how", type=Choice(_LANGUAGES), help="Print code that runs this model, for its own inputs.")
@click.option("--deep", is_flag=True, help="Of an adapter: singular values, effective ranks, what is dead or double.")
@json_flag
def info(path: str, layout: str | None, loader: str | None, how: str | None, deep: bool, as_json: bool) -> None:
    """Say what PATH is.

    Of an adapter: layout, targets, ranks, scales, size. Of a checkpoint: architecture, dtypes, tied weights. Of an
    ONNX model: inputs and outputs, the weights that can be changed and those that cannot, and why, what is attached.

    With --for, whether a program that runs adapters loads this one as it is, and why not; exit code 1 if it does not.
    """
    from loraformat import registry

    if how:
        _show_how(path, how, as_json)
        return
    if loader:
        from loraformat.cli.loadable import show

        show(path, layout, loader, as_json)
        return
    try:
        reading, found, evidence = registry.read(path, layout)
    except LoraFormatError as error:
        if layout or not all(p.rule in ("LF-501", "LF-502", "LF-704") for p in error.problems):
            raise
        base = _base(path, error)
        if deep:
            fix = "of a model with an adapter attached: loraformat extract it first; of two models: loraformat diff"
            raise fault("LF-705", f"--deep looks into an adapter, and {path} is a base", fix=fix) from None
        _show_base(path, base, as_json)
        return
    if as_json:
        echo_json(_info_json(path, found.name, reading.adapter, deep))
        return
    click.echo(f"{printable(path)}: {found.name} ({printable(evidence)})")
    for line in _lines(reading.adapter, reading):
        click.echo(line)
    if deep:
        from loraformat.cli.deep import deep_lines
        from loraformat.verbs.anatomy import anatomy

        for line in ("", *deep_lines(anatomy(reading.adapter))):
            click.echo(line)


def _show_how(path: str, language: str, as_json: bool) -> None:
    from loraformat import registry
    from loraformat.base import Runnable

    fix = "--how is for one ONNX model, such as FOLDER/decoder_model.onnx; a checkpoint is run by its own framework"
    try:
        base = registry.open_base(path)
    except LoraFormatError as error:
        if error.problems[0].rule != "LF-601":
            raise
        raise fault("LF-705", f"{path} is no model", fix=f"{fix}; attach an adapter to a model first") from None
    if not isinstance(base, Runnable):
        raise fault("LF-705", f"{path} is nothing that a runtime runs as it is", fix=fix)
    code = base.how(language)
    if as_json:
        echo_json({"schema": 1, "path": path, "language": language, "code": code})
    else:
        click.echo(code, nl=False)


def _base(path: str, error: LoraFormatError) -> Base:
    """The base at ``path``, which is no adapter; ``error`` where it is no base either, or looks like an adapter."""
    from loraformat import registry

    try:
        base = registry.open_base(path)
    except LoraFormatError as other:
        if other.problems[0].rule == "LF-601":
            raise registry.neither(path, error, other) from None
        raise
    if "attach" not in base.verbs and any("lora" in name.lower() for name in base.parameters()):
        raise error  # an adapter in a layout that is not known; a checkpoint has no such names
    return base


def _show_base(path: str, base: Base, as_json: bool) -> None:
    from loraformat.cli.bases import base_lines

    description = dict(base.describe())
    if as_json:
        echo_json({"schema": 1, "path": path, **description})
        return
    for line in base_lines(path, description):
        click.echo(printable(line))


def _info_json(path: str, layout: str, adapter: Adapter, deep: bool) -> dict[str, Any]:
    from loraformat.dtypes import dtype_names
    from loraformat.identity import digest
    from loraformat.metadata import VERSION, part_json

    targets = {}
    for key, update in adapter.items():
        first = next(iter(update.additive), None)
        place = update.placement.as_json() if update.placement else {"shape": None, "axes": None}
        targets[key] = {
            "kind": update.kind,
            "rank": update.rank,
            "alpha": first.alpha if first else None,
            "scale_rule": first.scale_rule if first else None,
            "scale": update.scale,
            "shape": place["shape"],
            "axes": place["axes"],
            "dtype": dtype_names(update.tensors),
            "bytes": update.nbytes,
            "parts": [part_json(part) for part in update.parts],
        }
    more: dict[str, Any] = {}
    if deep:
        from loraformat.cli.deep import deep_json, organ_json
        from loraformat.verbs.anatomy import anatomy

        found = anatomy(adapter)
        more["deep"] = deep_json(found)
        for key, target in targets.items():
            target["deep"] = organ_json(found.organs[key]) if key in found.organs else None
    return {
        "schema": 1,
        "path": path,
        "layout": layout,
        "version": VERSION if layout == "native" else None,
        "digest": digest(adapter),
        "names": adapter.names,
        "base_model": dict(adapter.base_model),
        "targets": targets,
        **more,
    }


def _lines(adapter: Adapter, reading: Reading) -> list[str]:
    """The adapter for a person: one line for targets that differ only in their numbers."""
    from loraformat.dtypes import dtype_names
    from loraformat.plan import size

    groups: dict[tuple[str, ...], list[str]] = {}
    for key, update in adapter.items():
        placed = f"[{update.placement.spec}]" if update.placement else "unplaced"
        matrix = update.matrix_shape()
        row = (re.sub(r"\d+", "*", key), update.kind, _rank(update), _dims(matrix), dtype_names(update.tensors), placed)
        groups.setdefault(row, []).append(key)
    rows: list[tuple[str, ...]] = [("target", "kind", "rank, scale", "[out, in]", "dtype", "axes", "")]
    rows += [(*row, f"×{len(keys)}" if len(keys) > 1 else "") for row, keys in groups.items()]
    total = sum(update.nbytes for update in adapter.values())
    name = adapter.base_model.get("name")
    of = f" · base {printable(name)}" if isinstance(name, str) else ""
    bound = sum(update.base_sha256 is not None or update.sketch is not None for update in adapter.values())
    to = f" · {bound} bound to their weights" if bound else ""
    head = f"{counted(len(adapter), 'target')} · {size(total)} · names: {adapter.names}{of}{to}"
    return [head, "", *table(rows), *lines_of(reading.warnings)]


def _rank(update: Any) -> str:
    if not update.additive:
        return "–"
    part = update.additive[0]
    rule = (
        "" if part.scale_rule == "factor" else f" = {part.alpha:g}/{'√' if 'sqrt' in part.scale_rule else ''}{part.r}"
    )
    return f"{f'r {part.r}, ' if part.r else ''}{part.scale:.6g}{rule}"


def _dims(matrix: tuple[int, ...] | None) -> str:
    return "×".join(map(str, matrix)) if matrix else "–"
