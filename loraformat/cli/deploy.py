"""The verbs that meet a base: resolve, merge, attach, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraformat.cli.options import echo_json, force, hints, json_flag, mapping, shown, warn

if TYPE_CHECKING:
    from loraformat.layout import Reading
    from loraformat.plan import Outcome, Plan
    from loraformat.resolve import Resolution

__all__ = ["attach", "merge", "resolve", "verify"]

_plan_flag = click.option(
    "--plan", "plan_only", is_flag=True, help="Print what would be read and written; write nothing."
)
_any_base = click.option("--any-base", is_flag=True, help="Apply an adapter that was bound to other weights.")


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
    from loraformat import registry

    reading = _read(adapter, base)
    resolution = registry.open_base(base).resolve(reading.adapter, hints(names, axes))
    if as_json:
        echo_json(resolution.as_json())
    else:
        warn(reading.warnings)
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
@click.argument("adapter")
@click.option("--into", "base", required=True, help="The base: a .safetensors checkpoint or an ONNX model.")
@click.option("-o", "--out", required=True, help="The file to write.")
@mapping
@_plan_flag
@_any_base
@force
@json_flag
def merge(adapter: str, base: str, out: str, **options: Any) -> None:
    """Write BASE with W + ΔW in the place of W: fp32 arithmetic, one rounding, everything else bit for bit."""
    _carry_out("merge", adapter, base, out, **options)


@click.command()
@click.argument("adapter", metavar="[NAME=]ADAPTER")
@click.option("--to", "base", required=True, help="The ONNX model.")
@click.option("-o", "--out", required=True, help="The file to write.")
@click.option("--mode", type=click.Choice(["branch"]), default="branch", show_default=True)
@mapping
@_plan_flag
@_any_base
@force
@json_flag
def attach(adapter: str, base: str, out: str, **options: Any) -> None:
    """Write an ONNX model that runs the branch s·B·A·x beside each target; its own weights are not touched."""
    name, equals, path = adapter.partition("=")
    if not equals or Path(adapter).exists():
        name, path = "default", adapter
    _carry_out("attach", path, base, out, name=name, **options)


def _carry_out(
    verb: str,
    path: str,
    base_path: str,
    out: str,
    *,
    names: str | None,
    axes: tuple[str, ...],
    plan_only: bool,
    any_base: bool,
    force: bool,
    as_json: bool,
    mode: str = "branch",
    name: str = "default",
) -> None:
    from loraformat import registry
    from loraformat.atomic import check_free
    from loraformat.base import Options
    from loraformat.values import value_problems
    from loraformat.verbs.merge import prepare

    if not plan_only:
        check_free(Path(out), force)
    reading = _read(path, base_path)
    base = registry.open_base(base_path)
    _refuse_bad_values(reading, value_problems(reading.adapter))
    plan = prepare(verb, reading.adapter, base, Options(Path(out), mode, name), hints(names, axes), any_base=any_base)
    if plan_only:
        _show_plan(plan, as_json)
        return
    if not as_json:
        warn(reading.warnings)
        for note in plan.notes:
            click.echo(f"note: {note}", err=True)
    outcome = base.apply(plan, force=force)
    _proof(plan, outcome, path, base_path, as_json)


def _read(path: str, base: str) -> Reading:
    """The adapter at ``path``; where it is none and ``base`` is one, the error says that they are swapped."""
    from loraformat import registry
    from loraformat.errors import LoraFormatError, Problem
    from loraformat.source import open_source

    try:
        return registry.read(path)[0]
    except LoraFormatError as error:
        try:
            _, evidence = registry.detect(open_source(base))
        except (LoraFormatError, OSError):
            raise error from None
        swapped = Problem("LF-501", f"{base} is an adapter ({evidence})", fix="are adapter and base swapped?")
        raise LoraFormatError([*error.problems, swapped]) from None


def _refuse_bad_values(reading: Reading, problems: Any) -> None:
    """NaN would spread through the model; an all-zero factor is only worth a word."""
    from loraformat.errors import LoraFormatError

    found = list(problems)
    if errors := [p for p in found if p.severity == "error"]:
        raise LoraFormatError(errors)
    zero = len({p.where.rpartition(".")[0] for p in found})
    if zero:
        text = f"note: {zero} of {len(reading.adapter)} targets have a factor that is all zero: they change nothing"
        click.echo(text, err=True)


def _show_plan(plan: Plan, as_json: bool) -> None:
    from loraformat.plan import size

    if as_json:
        echo_json(plan.as_json())
        return
    for line in (*plan.steps, *(f"note: {note}" for note in plan.notes)):
        click.echo(line)
    click.echo(f"reads {size(plan.reads)}, writes {size(plan.writes)} to {plan.options.out}, memory {size(plan.peak)}")


def _proof(plan: Plan, outcome: Outcome, path: str, base: str, as_json: bool) -> None:
    """``15/15 targets by node_name · ‖ΔW‖/‖W‖ 0.4–2.1 % · +0.7 MB · next: …``."""
    from loraformat.plan import size

    norms = list(outcome.norms.values())
    out = str(plan.options.out)
    if as_json:
        targets = {
            key: {"delta_norm": n.delta**0.5, "base_norm": n.base**0.5 or None, "rounding_loss": n.loss}
            for key, n in outcome.norms.items()
        }
        echo_json({"schema": 1, "verb": plan.verb, "out": out, "written": outcome.written, "targets": targets})
        return
    if plan.verb == "merge":
        ratios = sorted(n.change * 100 for n in norms)
        lost = max(n.loss for n in norms)
        change = f"‖ΔW‖/‖W‖ {ratios[0]:.2g}–{ratios[-1]:.2g} %" + (
            f" · rounding ≤ {lost * 100:.2g} % of ΔW" if lost else ""
        )
        following = f"loraformat verify --base {base} --adapter {path} --merged {out}"
    else:
        sizes = sorted(n.delta**0.5 for n in norms)
        change = f"‖ΔW‖ {sizes[0]:.3g}–{sizes[-1]:.3g}"
        following = f'onnxruntime.InferenceSession("{out}")'
    found = f"{len(norms)}/{len(plan.adapter)} targets by {plan.resolution.rungs}"
    click.echo(
        f"{out}: {found} · {change} · {outcome.grown / 1e6:+.1f} MB ({size(outcome.written)}) · next: {following}",
        err=True,
    )


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

    reading = _read(adapter, base)
    verdict = run(registry.open_base(base), reading.adapter, registry.open_base(merged), hints(names, axes))
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
