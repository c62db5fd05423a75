"""The verbs that meet a base and write nothing: resolve, verify."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loraformat.cli.adapters import open_both
from loraformat.cli.options import echo_json, hints, json_flag, mapping, shown, warn

if TYPE_CHECKING:
    from loraformat.resolve import Resolution

__all__ = ["resolve", "verify"]


@click.command()
@click.argument("adapter")
@click.option("--in", "base", required=True, help="The base: a checkpoint or an ONNX model.")
@mapping
@json_flag
@click.pass_context
def resolve(
    ctx: click.Context, adapter: str, base: str, names: str | None, axes: tuple[str, ...], as_json: bool
) -> None:
    """Say where every target lies in a base, and by which evidence. Writes nothing; exit 1 if one is not found."""
    opened, gathered = open_both((adapter,), base)
    resolution = opened.resolve(gathered.adapters[0][1], hints(names, axes))
    if as_json:
        echo_json(resolution.as_json())
    else:
        warn(gathered.warnings)
        _print(resolution)
    ctx.exit(1 if resolution.unresolved or resolution.ambiguous else 0)


def _print(resolution: Resolution) -> None:
    """Failures first."""
    for problem in [*resolution.unresolved, *resolution.ambiguous]:
        click.echo(shown(problem))
    for key, places in resolution.targets.items():
        for match in places:
            where = f"{match.node} ({match.weight})" if match.node else match.weight
            click.echo(f"{key} → {where} [{match.placement.spec}]  by {'; '.join(match.evidence)}")
    failed = len({p.where for p in [*resolution.unresolved, *resolution.ambiguous]})
    click.echo(f"{len(resolution.targets)} resolved by {resolution.rungs or 'nothing'}, {failed} not", err=True)


@click.command()
@click.option("--base", required=True, help="The base before the merge.")
@click.option("--adapter", required=True)
@click.option("--merged", required=True, help="The result to check.")
@mapping
@json_flag
@click.pass_context
def verify(
    ctx: click.Context, base: str, adapter: str, merged: str, names: str | None, axes: tuple[str, ...], as_json: bool
) -> None:
    """Check that MERGED is BASE with the adapter: touched tensors are W + ΔW within rounding, the rest bit for bit."""
    from loraformat import registry
    from loraformat.verbs.verify import verify as run

    opened, gathered = open_both((adapter,), base)
    verdict = run(opened, gathered.adapters[0][1], registry.open_base(merged), hints(names, axes))
    if as_json:
        value = {
            "schema": 1,
            "valid": not verdict.problems,
            "touched": dict(verdict.touched),
            "untouched": verdict.untouched,
            "problems": [p.as_json() for p in verdict.problems],
        }
        echo_json(value)
    else:
        for problem in verdict.problems:
            click.echo(shown(problem))
        worst = max(verdict.touched.values(), default=0.0)
        word = "differs" if verdict.problems else "equals base + adapter"
        click.echo(
            f"{merged}: {word} · {len(verdict.touched)} touched, relative distance ≤ {worst:.1e} · "
            f"{verdict.untouched} others bit-identical",
            err=True,
        )
    ctx.exit(1 if verdict.problems else 0)
