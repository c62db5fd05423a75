"""The gate: validate, for one file by hand and for thousands in one run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from loraformat.cli.options import complete_layout, json_flag
from loraformat.cli.printing import counted, echo_json, echo_line, lines_of, printable
from loraformat.cli.progress import progress_bar

if TYPE_CHECKING:
    from loraformat.verbs.validate import Validation

__all__ = ["validate"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_CHUNK = 1 << 20


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """``1000``, ``200MB``, ``2G`` as bytes."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)\s*([kmgt]?)b?", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is no size: such as 500000, 200MB or 2GB", ctx, param)
    return int(match[1]) * _UNITS[match[2]]


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH…")
@click.option("--base", "base_path", metavar="BASE", help="Also find every target in this base.")
@click.option("--strict", is_flag=True, help="Warnings make an adapter invalid too.")
@click.option(
    "--from", "layout", metavar="LAYOUT", shell_complete=complete_layout, help="Read as this layout; else by content."
)
@click.option("--max-bytes", callback=_size, metavar="N", help="Refuse larger files unread, such as 200MB.")
@click.option("--max-rank", type=click.IntRange(min=1), metavar="N", help="Refuse a rank above N.")
@click.option("--max-targets", type=click.IntRange(min=1), metavar="N", help="Refuse more than N targets.")
@click.option("--jsonl", "as_lines", is_flag=True, help="Print one JSON object a line, each as soon as it is known.")
@json_flag
@click.pass_context
def validate(
    ctx: click.Context,
    paths: tuple[str, ...],
    base_path: str | None,
    strict: bool,
    layout: str | None,
    max_bytes: int | None,
    max_rank: int | None,
    max_targets: int | None,
    as_lines: bool,
    as_json: bool,
) -> None:
    """Check adapters in any layout: every shape, scale and value.

    A PATH is a file, a folder, in which every adapter is found, or - for a file on stdin. One bad file never
    stops the rest. Exit code 0: all are valid; 1: one is not.
    """
    from loraformat import registry
    from loraformat.verbs.validate import Limits

    if as_lines and as_json:
        raise click.UsageError("--json prints one document, --jsonl a line for each adapter: choose one.")
    if layout is not None:
        registry.layout(layout)
    base = registry.open_base(base_path) if base_path else None
    options = {"layout": layout, "base": base, "limits": Limits(max_bytes, max_rank, max_targets), "strict": strict}
    entries, count, valid = [], 0, 0
    for result in _results(paths, options, as_lines or as_json):
        count, valid = count + 1, valid + result.valid
        if as_lines:
            echo_line({"schema": 1, **result.as_json()})
        elif as_json:
            entries.append(result.as_json())
        else:
            _print(result)
    if as_json:
        echo_json({"schema": 1, "files": entries})
    if count > 1 and not (as_lines or as_json):
        click.echo(f"{valid} of {count} adapters are valid", err=True)
    ctx.exit(0 if valid == count else 1)


def _results(paths: tuple[str, ...], options: dict[str, Any], quiet: bool) -> Iterator[Validation]:
    from loraformat.verbs.validate import validate_all

    for path in paths:
        if path == "-":
            yield _stdin(options)
            continue
        found = validate_all(path, **options)
        while True:
            with progress_bar(f"validate {printable(path)}", None, quiet=quiet):
                result = next(found, None)
            if result is None:
                break
            yield result


def _stdin(options: dict[str, Any]) -> Validation:
    """What comes on stdin, kept in a temporary file: a tensor file is read in any order."""
    import tempfile  # slow to import, and needed for stdin only

    from loraformat.errors import Problem
    from loraformat.source import Source
    from loraformat.verbs.validate import Validation, validate

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stdin.safetensors"
        try:
            with open(path, "wb") as file:
                _copy(sys.stdin.buffer, file, options["limits"].bytes)
        except OSError as error:
            what = f"stdin cannot be kept in {tempfile.gettempdir()}: {error.strerror or error}"
            return Validation("-", None, "", None, (Problem("LF-701", what, fix="TMPDIR=FOLDER names another place"),))
        source = Source(path)
        source.path = Path("-")
        return validate(source, **options)


def _copy(source: BinaryIO, file: BinaryIO, limit: int | None) -> None:
    """Everything; with a limit, one byte more than it at most, which is enough to refuse it."""
    left = sys.maxsize if limit is None else limit + 1
    while left and (chunk := source.read(min(_CHUNK, left))):
        left -= file.write(chunk)


def _print(result: Validation) -> None:
    said = f"  {result.layout} ({result.evidence}), {counted(result.targets, 'target')}" if result.targets else ""
    verdict = click.style("valid", fg="green") if result.valid else click.style("INVALID", fg="red", bold=True)
    click.echo(f"{verdict}  {printable(result.path)}{printable(said)}")
    for line in lines_of(result.problems):
        click.echo("  " + line.replace("\n", "\n  "))
