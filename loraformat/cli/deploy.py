"""The verbs that put adapters into a base: merge, attach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loraformat.cli.adapters import open_both
from loraformat.cli.options import Choice, echo_json, force, hints, json_flag, mapping, origin, strength, warn
from loraformat.cli.progress import progress_bar

if TYPE_CHECKING:
    from loraformat.plan import Outcome, Plan, Proof

__all__ = ["attach", "merge"]

F = TypeVar("F", bound=Callable[..., Any])

_plan_flag = click.option(
    "--plan", "plan_only", is_flag=True, help="Print what would be read and written; write nothing."
)
_any_base = click.option("--any-base", is_flag=True, help="Apply an adapter that was bound to other weights.")


def _graph(function: F) -> F:
    """``--verify``, ``--inputs`` and ``--inline``: what is asked of a graph only."""
    verify = click.option("--verify", is_flag=True, help="Run the written ONNX model against base and adapter.")
    inputs = click.option("--inputs", type=click.Path(), help="With --verify: values for the model's inputs, .npz.")
    inline = click.option("--inline", is_flag=True, help="Write the model's local functions into its graph first.")
    return verify(inputs(inline(function)))


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]…")
@click.option(
    "--into", "base", required=True, metavar="BASE", help="The base: a .safetensors checkpoint or an ONNX model."
)
@click.option("-o", "--out", required=True, metavar="OUT", help="The file to write.")
@strength
@mapping
@origin
@_graph
@_plan_flag
@_any_base
@force
@json_flag
def merge(adapters: tuple[str, ...], base: str, out: str, **options: Any) -> None:
    """Write BASE with W + ΔW in the place of W: fp32 arithmetic, one rounding, everything else bit for bit.

    Several adapters are applied one after the other; a number after the last colon weighs one.
    """
    _carry_out("merge", adapters, base, out, **options)


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="[NAME=]ADAPTER[:W]…")
@click.option("--to", "base", required=True, metavar="MODEL", help="The ONNX model.")
@click.option("-o", "--out", required=True, metavar="OUT", help="The file to write.")
@click.option("--mode", type=Choice(["branch"]), default="branch", show_default=True, help="How the adapter is put in.")
@click.option("--prefold", is_flag=True, help="Store what a runtime would fold, for one that does not optimise.")
@strength
@mapping
@origin
@_graph
@_plan_flag
@_any_base
@force
@json_flag
def attach(adapters: tuple[str, ...], base: str, out: str, **options: Any) -> None:
    """Write an ONNX model that runs the branch s·B·A·x beside each target; its own weights are not touched."""
    _carry_out("attach", adapters, base, out, **options)


def _carry_out(
    verb: str,
    words: tuple[str, ...],
    base_path: str,
    out: str,
    *,
    only: tuple[str, ...],
    scale: tuple[str, ...],
    names: str | None,
    axes: tuple[str, ...],
    origin: str | None,
    plan_only: bool,
    any_base: bool,
    force: bool,
    as_json: bool,
    verify: bool,
    inputs: str | None,
    inline: bool,
    mode: str = "branch",
    prefold: bool = False,
) -> None:
    from loraformat.atomic import check_free
    from loraformat.base import Options
    from loraformat.verbs.graph import inlined, prove
    from loraformat.verbs.merge import prepare

    if not plan_only:
        check_free(Path(out), force)
    base, gathered = open_both(words, base_path, only, scale)
    base = inlined(base) if inline else base
    stated, how = hints(names, axes, origin), Options(Path(out), mode, prefold)
    plan = prepare(verb, gathered.adapters, base, how, stated, any_base=any_base)
    if plan_only:
        _show_plan(plan, as_json)
        return
    if not as_json:
        warn(gathered.warnings)
        for note in plan.notes:
            click.echo(f"note: {note}", err=True)
    with progress_bar(verb, plan.writes, quiet=as_json):
        outcome = base.apply(plan, force=force)
    proof = prove(base, plan, inputs) if verify else None
    _proof(plan, outcome, proof, words, base_path, as_json)
    if proof and not proof.holds:
        click.get_current_context().exit(1)


def _show_plan(plan: Plan, as_json: bool) -> None:
    from loraformat.plan import size

    if as_json:
        echo_json(plan.as_json())
        return
    for line in (*plan.steps, *(f"note: {note}" for note in plan.notes)):
        click.echo(line)
    click.echo(f"reads {size(plan.reads)}, writes {size(plan.writes)} to {plan.options.out}, memory {size(plan.peak)}")


def _proof(plan: Plan, outcome: Outcome, proof: Proof | None, words: tuple[str, ...], base: str, as_json: bool) -> None:
    """``15/15 targets by node_name · ‖ΔW‖/‖W‖ 0.4–2.1 % · +0.7 MB · next: …``."""
    from loraformat.plan import size

    norms = list(outcome.norms.values())
    out = str(plan.options.out)
    if as_json:
        targets = {
            key: {"delta_norm": n.delta**0.5, "base_norm": n.base**0.5 or None, "rounding_loss": n.loss}
            for key, n in outcome.norms.items()
        }
        told = {"error": proof.error, "limit": proof.limit, "moved": proof.moved} if proof else None
        report = {"schema": 1, "verb": plan.verb, "out": out, "written": outcome.written, "targets": targets}
        echo_json(report | ({"proof": told} if told else {}))
        return
    if plan.verb == "merge":
        ratios = sorted(n.change * 100 for n in norms)
        lost = max(n.loss for n in norms)
        change = f"‖ΔW‖/‖W‖ {ratios[0]:.2g}–{ratios[-1]:.2g} %" + (
            f" · rounding ≤ {lost * 100:.2g} % of ΔW" if lost else ""
        )
        following = f"loraformat verify --base {base} --adapter {words[0]} --merged {out}"
    else:
        sizes = sorted(n.delta**0.5 for n in norms)
        change = f"‖ΔW‖ {sizes[0]:.3g}–{sizes[-1]:.3g}"
        following = f'onnxruntime.InferenceSession("{out}")'
    if proof:
        change += f" · {proof}"
    total = len({key for job in plan.jobs for key in job.adapter})
    found = f"{len(norms)}/{total} targets by {plan.rungs}"
    click.echo(
        f"{out}: {found} · {change} · {outcome.grown / 1e6:+.1f} MB ({size(outcome.written)}) · next: {following}",
        err=True,
    )
