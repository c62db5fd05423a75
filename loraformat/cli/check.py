"""The verbs that meet a base and write nothing: resolve, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from loraformat.cli.adapters import open_both
from loraformat.cli.options import hints, json_flag, mapping, origin, strength
from loraformat.cli.printing import alike, echo_json, lines_of, printable, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraformat.base import Base
    from loraformat.errors import Problem
    from loraformat.resolve import Match, Resolution
    from loraformat.verbs.verify import Verdict

__all__ = ["report", "resolve", "verdict_json", "verify"]


@click.command()
@click.argument("adapter")
@click.option(
    "--in", "base", required=True, metavar="BASE", help="The base: a checkpoint, an ONNX model, or a folder of them."
)
@click.option(
    "--names-stub",
    "stub",
    type=click.Path(),
    metavar="FILE",
    help="Write a file to fill in for --names: what was not found.",
)
@mapping
@origin
@json_flag
@click.pass_context
def resolve(
    ctx: click.Context,
    adapter: str,
    base: str,
    stub: str | None,
    names: str | None,
    axes: tuple[str, ...],
    origin: str | None,
    as_json: bool,
) -> None:
    """Say where every target lies in a base, and by which evidence. Changes nothing; exit 1 if one is not found."""
    stated = hints(names, axes, origin)
    opened, gathered = open_both((adapter,), base, origin=stated.base)
    resolution = opened.resolve(gathered.adapters[0][1], stated)
    if as_json:
        echo_json(resolution.as_json())
    else:
        warn(gathered.warnings)
        _print(resolution)
    failed = [*resolution.unresolved, *resolution.ambiguous]
    if stub is not None and failed:
        _write_stub(Path(stub), opened, failed)
    ctx.exit(1 if failed else 0)


def _print(resolution: Resolution) -> None:
    """Failures first; targets that differ only in their numbers as one."""
    failed = [*resolution.unresolved, *resolution.ambiguous]
    for line in lines_of(failed):
        click.echo(line)
    several = len({match.file for places in resolution.targets.values() for match in places}) > 1
    found = [(key, match) for key, places in resolution.targets.items() for match in places]
    for text in alike(_place(key, match, match.file if several else "") for key, match in found):
        click.echo(text)
    total = len(resolution.targets) + len({problem.where for problem in failed} - resolution.targets.keys())
    by = f" by {resolution.rungs}" if resolution.targets else ""
    click.echo(f"{len(resolution.targets)}/{total} targets{by}", err=True)


def _place(key: str, match: Match, file: str) -> str:
    """A target, where it lies, and what says so, a line each."""
    where = f"{match.node} ({match.weight})" if match.node else match.weight
    place = f"→ {f'{file}: ' if file else ''}{where} [{match.placement.spec}]"
    return "\n    ".join(map(printable, (key, place, f"by {'; '.join(match.evidence)}")))


def _write_stub(path: Path, base: Base, failed: Sequence[Problem]) -> None:
    """``--names`` to fill in: left as it is, it names nothing, so that no guess of ours is taken for the user's word."""
    import json

    from loraformat.atomic import write_file
    from loraformat.names import nearest
    from loraformat.resolve import Hints

    known = [*dict.fromkeys([*base.linears(Hints()), *base.parameters()])]
    missing = [p.where for p in failed if p.rule in ("LF-602", "LF-603", "LF-609")]
    stub = {key: f"CHOOSE: {', '.join(nearest(key, known)) or 'a weight or node'}" for key in dict.fromkeys(missing)}
    text = json.dumps(stub, indent=2, ensure_ascii=False) + "\n"

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_file(path, write)
    click.echo(f"{path}: {len(stub)} targets to fill in, then: --names {path}", err=True)


@click.command()
@click.option("--base", required=True, metavar="BASE", help="The base before the merge.")
@click.option("--adapter", "adapters", required=True, multiple=True, metavar="ADAPTER[:W]", help="As it was merged.")
@click.option("--merged", required=True, metavar="MERGED", help="The result to check.")
@strength
@mapping
@json_flag
@click.pass_context
def verify(
    ctx: click.Context,
    base: str,
    adapters: tuple[str, ...],
    merged: str,
    only: tuple[str, ...],
    scale: tuple[str, ...],
    names: str | None,
    axes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check that MERGED is BASE with the adapters: touched tensors are W + ΔW within rounding, the rest bit for bit."""
    from loraformat import registry
    from loraformat.verbs.verify import verify as run

    opened, gathered = open_both(adapters, base, only, scale)
    given = [(adapter, 1.0) for _, adapter in gathered.adapters]
    verdict = run(opened, given, registry.open_base(merged), hints(names, axes))
    if as_json:
        echo_json({"schema": 1, **verdict_json(verdict)})
    else:
        report(verdict, merged)
    ctx.exit(1 if verdict.problems else 0)


def report(verdict: Verdict, merged: str) -> None:
    """What differs, and what was compared."""
    for line in lines_of(verdict.problems):
        click.echo(line)
    worst = max(verdict.touched.values(), default=0.0)
    word = "differs" if verdict.problems else "equals base + adapter"
    touched = f"{len(verdict.touched)} touched, relative distance ≤ {f'{worst:.1e}' if worst else 0}"
    click.echo(f"{merged}: {word} · {touched} · {verdict.untouched} others bit-identical", err=True)


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """What ``verify --json`` prints, less the schema."""
    return {
        "valid": not verdict.problems,
        "touched": dict(verdict.touched),
        "untouched": verdict.untouched,
        "problems": [p.as_json() for p in verdict.problems],
    }
