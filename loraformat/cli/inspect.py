"""The verbs that only look: validate, info, layouts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from loraformat.cli.options import echo_json, json_flag, shown
from loraformat.errors import LoraFormatError, Problem

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.base import Base
    from loraformat.layout import Reading

__all__ = ["info", "layouts", "validate"]


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH…")
@click.option("--base", "base_path", type=click.Path(), help="Also resolve every target in this base.")
@click.option("--strict", is_flag=True, help="Warnings make an input invalid too.")
@click.option("--from", "layout", metavar="LAYOUT", help="Read as this layout.")
@json_flag
@click.pass_context
def validate(
    ctx: click.Context, paths: tuple[str, ...], base_path: str | None, strict: bool, layout: str | None, as_json: bool
) -> None:
    """Check adapters, in any layout, value by value. Exit 1 if one is invalid."""
    from loraformat import registry

    base = registry.open_base(base_path) if base_path else None
    results = [(path, *_check(path, layout, base)) for path in paths]
    bad = [any(p.severity == "error" or strict for p in problems) for _, _, problems in results]
    if as_json:
        files = [
            {"path": path, "valid": not wrong, "problems": [p.as_json() for p in problems]}
            for (path, _, problems), wrong in zip(results, bad, strict=True)
        ]
        echo_json({"schema": 1, "files": files})
    else:
        for (path, said, problems), wrong in zip(results, bad, strict=True):
            click.echo(f"{'INVALID' if wrong else 'valid'}  {path}{f'  {said}' if said else ''}")
            for problem in problems:
                click.echo("  " + shown(problem).replace("\n", "\n  "))
    ctx.exit(1 if any(bad) else 0)


def _check(path: str, layout: str | None, base: Base | None) -> tuple[str, list[Problem]]:
    """(what it is, every problem)."""
    from loraformat import registry
    from loraformat.resolve import Hints
    from loraformat.values import value_problems

    try:
        reading, found, evidence = registry.read(path, layout)
        problems = [*reading.warnings, *value_problems(reading.adapter)]
        if base is not None:
            resolution = base.resolve(reading.adapter, Hints())
            problems += [*resolution.unresolved, *resolution.ambiguous]
    except LoraFormatError as error:
        return "", list(error.problems)
    return f"{found.name} ({evidence}), {_count(len(reading.adapter))}", problems


@click.command()
@click.argument("path")
@click.option("--from", "layout", metavar="LAYOUT", help="Read as this layout.")
@json_flag
def info(path: str, layout: str | None, as_json: bool) -> None:
    """Say what an adapter is: layout, targets, ranks, scales, size."""
    from loraformat import registry

    reading, found, evidence = registry.read(path, layout)
    adapter = reading.adapter
    if as_json:
        echo_json(_info_json(path, found.name, adapter))
        return
    click.echo(f"{path}: {found.name} ({evidence})")
    for line in _lines(adapter, reading):
        click.echo(line)


def _info_json(path: str, layout: str, adapter: Adapter) -> dict[str, Any]:
    from loraformat.container import dtype_name
    from loraformat.identity import digest
    from loraformat.metadata import VERSION, part_json
    from loraformat.parts import roles_of

    targets = {}
    for key, update in adapter.items():
        tensors = [tensor for part in update.parts for _, tensor in roles_of(part)]
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
            "dtype": "/".join(sorted({dtype_name(t.dtype) for t in tensors})),
            "bytes": sum(t.nbytes for t in tensors),
            "parts": [part_json(part) for part in update.parts],
        }
    return {
        "schema": 1,
        "path": path,
        "layout": layout,
        "version": VERSION if layout == "native" else None,
        "digest": digest(adapter),
        "names": adapter.names,
        "base_model": dict(adapter.base_model),
        "targets": targets,
    }


def _lines(adapter: Adapter, reading: Reading) -> list[str]:
    """The adapter for a person: one line for targets that differ only in their numbers."""
    from loraformat.container import dtype_name
    from loraformat.parts import roles_of
    from loraformat.plan import size

    groups: dict[tuple[str, ...], list[str]] = {}
    total = 0
    for key, update in adapter.items():
        tensors = [tensor for part in update.parts for _, tensor in roles_of(part)]
        total += sum(t.nbytes for t in tensors)
        dtypes = "/".join(sorted({dtype_name(t.dtype) for t in tensors}))
        placed = f"[{update.placement.spec}]" if update.placement else "unplaced"
        matrix = update.matrix_shape()
        row = (re.sub(r"\d+", "*", key), update.kind, _rank(update), _dims(matrix), dtypes, placed)
        groups.setdefault(row, []).append(key)
    table: list[tuple[str, ...]] = [("target", "kind", "rank, scale", "[out, in]", "dtype", "axes", "")]
    table += [(*row, f"×{len(keys)}" if len(keys) > 1 else "") for row, keys in groups.items()]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    name = adapter.base_model.get("name")
    of = f" · base {name}" if isinstance(name, str) else ""
    head = f"{_count(len(adapter))} · {size(total)} · names: {adapter.names}{of}"
    return [head, "", *lines, *map(shown, reading.warnings)]


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


def _count(number: int) -> str:
    return f"{number} target{'' if number == 1 else 's'}"


@click.command()
@json_flag
def layouts(as_json: bool) -> None:
    """List the layouts that can be read and written, with the kinds of update that each carries."""
    from loraformat import registry

    known = registry.layouts()
    if as_json:
        echo_json({"schema": 1, "layouts": {name: {"carries": sorted(item.carries)} for name, item in known.items()}})
        return
    for name, item in known.items():
        said = (type(item).__doc__ or "").strip().splitlines()[0]
        click.echo(f"{name:8} carries {', '.join(sorted(item.carries)):60} {said}")
