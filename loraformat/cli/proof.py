"""What a person sees of a plan before it is carried out, and the line of proof after it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from loraformat.cli.check import verdict_json
from loraformat.cli.printing import alike, echo_json, printable
from loraformat.plan import difference, size
from loraformat.spans import span

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from loraformat.errors import Problem
    from loraformat.plan import Outcome, Plan, Proof
    from loraformat.tiles import Norms
    from loraformat.verbs.verify import Verdict

__all__ = ["json_of", "show_plan", "show_proof"]

_LINES = 20


def show_plan(plan: Plan, as_json: bool) -> None:
    """What would be read and written."""
    losses = plan.estimate() if plan.estimate is not None else {}
    survival = {name: max(0.0, 1.0 - loss) for name, loss in losses.items()}
    if as_json:
        echo_json({**plan.as_json(), "survival": survival})
        return
    for line in (*plan.steps, *(f"note: {note}" for note in alike(plan.notes))):
        click.echo(line)
    if any(losses.values()):
        least = min(survival, key=survival.__getitem__)
        survives = span((100 * value for value in survival.values()), _short)
        click.echo(f"of ΔW survives about {survives} %, by a run of rows of each weight; the least: {printable(least)}")
    click.echo(f"reads {size(plan.reads)}, writes {size(plan.writes)} to {plan.options.out}, memory {size(plan.peak)}")


def show_proof(plan: Plan, outcome: Outcome, proof: Proof | None, following: str) -> None:
    """``15/15 targets by node_name · ‖ΔW‖/‖W‖ 0.4–2.1 % · +0.7 MB · next: …``."""
    total = len({key for job in plan.jobs for key in job.adapter})
    for line in _survivals(outcome.norms):
        click.echo(line, err=True)
    found = f"{len(outcome.norms)}/{total} targets by {plan.rungs}"
    change = _change(plan, outcome) + (f" · {proof}" if proof else "")
    grown = f"{difference(outcome.grown)} ({size(outcome.written)})"
    if outcome.resumed:
        grown += f" · {len(outcome.resumed)} files were finished by a run that was killed"
    after = f" · next: {following}" if following else ""
    click.echo(f"{plan.options.out}: {found} · {change} · {grown}{after}", err=True)


def _survivals(norms: Mapping[str, Norms]) -> list[str]:
    """A line for each target that lost more than a tenth of its ΔW, the worst first."""
    kept = sorted((max(0.0, 1.0 - n.loss), key) for key, n in norms.items() if not n.new and n.loss > 0.1)
    lines = [f"{printable(key)}: {_short(100 * share)} % of ΔW survives" for share, key in kept[:_LINES]]
    return lines + ([f"… and {len(kept) - _LINES} more: --json has all"] if len(kept) > _LINES else [])


def _change(plan: Plan, outcome: Outcome) -> str:
    norms = outcome.norms.values()
    if plan.verb != "merge":
        return f"‖ΔW‖ {span(n.delta**0.5 for n in norms)}"
    ratios = span((n.change * 100 for n in norms if n.change is not None), _short)
    said = [f"‖ΔW‖/‖W‖ {ratios} %"] if ratios else []
    new, zero = sum(n.new for n in norms), sum(n.change is None and not n.new for n in norms)
    said += [f"added or resized: {new}"] if new else []
    said += [f"zero before: {zero}"] if zero else []
    lost = max(n.loss for n in norms)
    return " · ".join(
        [*said, *([f"rounding ≤ {_short(lost * 100)} % of ΔW, {_short(_loss(norms) * 100)} % of all"] if lost else [])]
    )


def _loss(norms: Iterable[Norms]) -> float:
    """What rounding lost of all changes together."""
    known = [n for n in norms if not n.new]
    moved = math.fsum(n.delta for n in known)
    return math.sqrt(math.fsum(n.lost for n in known) / moved) if moved else 0.0


def _short(number: float) -> str:
    """Two digits, and no exponent where a person does not need one: ``0.42``, ``310``."""
    return f"{number:.2g}" if number < 100 else f"{number:.0f}"


def json_of(
    plan: Plan, outcome: Outcome, verdict: Verdict | None, proof: Proof | None, warnings: Sequence[Problem]
) -> dict[str, object]:
    """What ``merge --json`` and ``attach --json`` print."""
    targets = {
        key: {
            "delta_norm": n.delta**0.5,
            "base_norm": n.base**0.5 or None,
            "rounding_loss": n.loss,
            "survival": max(0.0, 1.0 - n.loss),
        }
        for key, n in outcome.norms.items()
    }
    said: dict[str, object] = {"schema": 1, "verb": plan.verb, "out": str(plan.options.out)}
    said |= {"written": outcome.written, "targets": targets, "resumed": list(outcome.resumed)}
    said |= {"notes": list(plan.notes), "warnings": [problem.as_json() for problem in warnings]}
    if verdict is not None:
        said["verified"] = verdict_json(verdict)
    if proof is not None:
        lost = {name: list(counts) for name, counts in proof.unfused.items()}
        said["proof"] = {"error": proof.error, "limit": proof.limit, "moved": proof.moved, "unfused": lost}
    return said
