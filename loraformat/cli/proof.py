"""What a person sees of a plan before it is carried out, and the line of proof after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loraformat.cli.check import verdict_json
from loraformat.cli.options import echo_json
from loraformat.plan import size

if TYPE_CHECKING:
    from loraformat.plan import Outcome, Plan, Proof
    from loraformat.verbs.verify import Verdict

__all__ = ["show_plan", "show_proof"]


def show_plan(plan: Plan, as_json: bool) -> None:
    """What would be read and written."""
    if as_json:
        echo_json(plan.as_json())
        return
    for line in (*plan.steps, *(f"note: {note}" for note in plan.notes)):
        click.echo(line)
    click.echo(f"reads {size(plan.reads)}, writes {size(plan.writes)} to {plan.options.out}, memory {size(plan.peak)}")


def show_proof(
    plan: Plan,
    outcome: Outcome,
    verdict: Verdict | None,
    proof: Proof | None,
    words: tuple[str, ...],
    base: str,
    as_json: bool,
) -> None:
    """``15/15 targets by node_name · ‖ΔW‖/‖W‖ 0.4–2.1 % · +0.7 MB · next: …``."""
    if as_json:
        echo_json(_json(plan, outcome, verdict, proof))
        return
    out = str(plan.options.out)
    if plan.verb == "merge":
        adapters = " ".join(f"--adapter {word}" for word in words)
        following = f"loraformat verify --base {base} {adapters} --merged {out}"
    else:
        following = f'onnxruntime.InferenceSession("{out}")'
    total = len({key for job in plan.jobs for key in job.adapter})
    found = f"{len(outcome.norms)}/{total} targets by {plan.rungs}"
    change = _change(plan, outcome) + (f" · {proof}" if proof else "")
    grown = f"{outcome.grown / 1e6:+.1f} MB ({size(outcome.written)})"
    click.echo(f"{out}: {found} · {change} · {grown} · next: {following}", err=True)


def _change(plan: Plan, outcome: Outcome) -> str:
    norms = outcome.norms.values()
    if plan.verb != "merge":
        sizes = sorted(n.delta**0.5 for n in norms)
        return f"‖ΔW‖ {sizes[0]:.3g}–{sizes[-1]:.3g}"
    ratios = sorted(n.change * 100 for n in norms if n.change is not None)
    said = [f"‖ΔW‖/‖W‖ {ratios[0]:.2g}–{ratios[-1]:.2g} %"] if ratios else []
    new, zero = sum(n.new for n in norms), sum(n.change is None and not n.new for n in norms)
    said += [f"added or resized: {new}"] if new else []
    said += [f"zero before: {zero}"] if zero else []
    lost = max(n.loss for n in norms)
    return " · ".join(said) + (f" · rounding ≤ {lost * 100:.2g} % of ΔW" if lost else "")


def _json(plan: Plan, outcome: Outcome, verdict: Verdict | None, proof: Proof | None) -> dict[str, object]:
    targets = {
        key: {"delta_norm": n.delta**0.5, "base_norm": n.base**0.5 or None, "rounding_loss": n.loss}
        for key, n in outcome.norms.items()
    }
    said: dict[str, object] = {"schema": 1, "verb": plan.verb, "out": str(plan.options.out)}
    said |= {"written": outcome.written, "targets": targets}
    if verdict is not None:
        said["verified"] = verdict_json(verdict)
    if proof is not None:
        said["proof"] = {"error": proof.error, "limit": proof.limit, "moved": proof.moved}
    return said
