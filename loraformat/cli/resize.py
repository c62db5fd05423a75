"""resize: an adapter with fewer ranks, and what that loses."""

from __future__ import annotations

from pathlib import Path

import click

from loraformat.cli.options import complete_layout, force, json_flag
from loraformat.cli.printing import command, counted, echo_json, lost, printable, table, warn
from loraformat.cli.progress import entries, progress_bar

__all__ = ["resize"]


@click.command()
@click.argument("file", metavar="ADAPTER")
@click.option("--rank", "-r", type=int, metavar="R", help="At most R in every target.")
@click.option("--energy", type=float, metavar="E", help="Keep this share of ‖ΔW‖², such as 0.99.")
@click.option("--residual", type=float, metavar="X", help="Lose at most this, ‖ΔW' − ΔW‖ / ‖ΔW‖, such as 0.05.")
@click.option("--per-target", is_flag=True, help="Energy or residual for every target, not for all together.")
@click.option("-o", "--out", required=True, metavar="OUT", help="The file (.safetensors) or folder (PEFT) to write.")
@click.option(
    "--to", "to_layout", metavar="LAYOUT", shell_complete=complete_layout, help="Layout of OUT; else by its name."
)
@force
@json_flag
def resize(
    file: str,
    rank: int | None,
    energy: float | None,
    residual: float | None,
    per_target: bool,
    out: str,
    to_layout: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER with fewer ranks: the nearest that there is; says what is lost, per target and in all."""
    from loraformat import registry
    from loraformat.identity import digest
    from loraformat.outputs import check_free
    from loraformat.verbs.convert import save, target_layout
    from loraformat.verbs.resize import resize as run

    layout, _ = target_layout(out, to_layout)
    check_free(Path(out), force)
    reading, _, _ = registry.read(file)
    with progress_bar("resize", entries((reading.adapter,)), quiet=as_json):
        done = run(reading.adapter, rank=rank, energy=energy, residual=residual, per_target=per_target)
    warnings = [*reading.warnings, *save(done.adapter, out, layout, force=force)]
    if as_json:
        ranks = {key: {"before": before, "after": after} for key, (before, after) in done.ranks.items()}
        said = {"schema": 1, "out": out, "digest": digest(done.adapter), "residual": done.residual, "ranks": ranks}
        more = {"residuals": dict(done.residuals), "untouched": list(done.untouched)}
        echo_json(said | more | {"warnings": [problem.as_json() for problem in warnings]})
        return
    warn(warnings)
    rows = [
        (printable(key), f"rank {before} → {after}", lost(done.residuals[key]))
        for key, (before, after) in done.ranks.items()
    ]
    for line in table(rows):
        click.echo(line)
    sums = [sum(pair[i] for pair in done.ranks.values()) for i in (0, 1)]
    held = (
        f"{counted(len(rows), 'target')}, {sums[0]} ranks → {sums[1]}, at most {max(r for _, r in done.ranks.values())}"
    )
    stayed = f" · {len(done.untouched)} without a rank stayed" if done.untouched else ""
    what = f"{held}{stayed} · {_whole(done.residual)} · digest {digest(done.adapter)[:12]}"
    click.echo(f"{out}: {what} · next: {command('info', out)}", err=True)


def _whole(residual: float) -> str:
    return f"{said} of ‖ΔW‖" if (said := lost(residual)) != "exact" else said
