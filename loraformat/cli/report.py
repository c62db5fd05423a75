"""The verb that writes a page about an adapter, or about what is attached to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import click

from loraformat.cli.options import complete_layout, force, hints, json_flag, mapping
from loraformat.cli.printing import counted, echo_json, printable
from loraformat.cli.progress import progress_bar
from loraformat.errors import LoraFormatError, Problem, fault

if TYPE_CHECKING:
    from loraformat.base import Base, Graph
    from loraformat.pages import Facts
    from loraformat.resolve import Hints

__all__ = ["report"]


@click.command()
@click.argument("source", metavar="FILE|MODEL.onnx")
@click.option("-o", "--out", required=True, metavar="REPORT.html", help="The page to write.")
@click.option("--base", metavar="BASE", help="Look every target up in this base; show ‖ΔW‖ / ‖W‖ and what rounds away.")
@click.option(
    "--from", "layout", metavar="LAYOUT", shell_complete=complete_layout, help="Layout of FILE; else by its content."
)
@mapping
@force
@json_flag
def report(
    source: str,
    out: str,
    base: str | None,
    layout: str | None,
    names: str | None,
    axes: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Write one self-contained page: what an adapter is, where it changes the model and how much, ranks, problems.

    Of a model with adapters attached it is about these, each with the place of every target.
    """
    from loraformat import registry
    from loraformat.apart import check_apart
    from loraformat.atomic import write_file
    from loraformat.outputs import check_free
    from loraformat.pages import page

    check_free(Path(out), force)
    check_apart(out, source, names)
    stated = hints(names, axes)
    if base is None and (stated.names or stated.axes):
        raise fault("LF-705", "names and axes are stated for a base", fix="give --base")
    opened = registry.open_base(base) if base is not None else None
    check_apart(out, opened)
    if Path(out).suffix.lower() not in ("", ".html", ".htm"):
        raise fault("LF-705", f"a report is a page in HTML, which {out} does not promise", fix="call it NAME.html")
    with progress_bar("report", None, quiet=as_json):
        told = _facts(source, opened, layout, stated)
    text = page(told, Path(source).name).encode()

    def write(file: BinaryIO) -> None:
        file.write(text)

    write_file(Path(out), write, force=force)
    problems = [problem for facts in told for problem in facts.problems]
    if as_json:
        echo_json({"schema": 1, "out": out, "bytes": len(text), "problems": [p.as_json() for p in problems]})
        return
    targets = counted(sum(len(facts.adapter) for facts in told), "target")
    click.echo(
        f"{printable(out)}: {targets} · {counted(len(problems), 'problem')} · next: open it in a browser", err=True
    )


def _facts(source: str, opened: Base | None, layout: str | None, stated: Hints) -> list[Facts]:
    from loraformat import registry
    from loraformat.layout import ReadOptions
    from loraformat.pages import facts
    from loraformat.values import value_problems

    try:
        reading, found, evidence = registry.read(source, layout, ReadOptions(base=opened))
    except LoraFormatError as error:
        if layout or opened or not all(p.rule in ("LF-501", "LF-502", "LF-704") for p in error.problems):
            raise
        return _attached(source, error)
    problems = [*reading.warnings, *value_problems(reading.adapter)]
    return [facts(reading.adapter, Path(source).name, f"{found.name}, {evidence}", problems, opened, stated)]


def _attached(source: str, error: LoraFormatError) -> list[Facts]:
    """Of every adapter that is attached to a model."""
    from loraformat import registry
    from loraformat.pages import facts

    try:
        base = registry.open_base(source)
    except LoraFormatError as other:
        raise registry.neither(source, error, other) from None
    if "extract" not in base.verbs:
        fix = "loraformat info tells what a base is; a report is of an adapter: report ADAPTER --base BASE"
        raise LoraFormatError(Problem("LF-705", f"{source} is a base without anything attached", fix=fix))
    graph = cast("Graph", base)
    held, before = graph.extract(), graph.without()
    return [facts(adapter, name, f"attached to {Path(source).name}", (), before) for name, adapter in held]
