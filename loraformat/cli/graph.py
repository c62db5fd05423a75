"""The verb that takes an attached model apart: detach."""

from __future__ import annotations

import click

from loraformat.cli.options import force, json_flag
from loraformat.cli.printing import command, echo_json

__all__ = ["detach"]


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("-o", "--out", required=True, metavar="OUT", help="The file to write; of a folder of models, a folder.")
@force
@json_flag
def detach(model: str, out: str, force: bool, as_json: bool) -> None:
    """Write MODEL as it was before attach; refused where it was changed since."""
    from loraformat import registry
    from loraformat.plan import difference, size
    from loraformat.verbs.graph import detach as run

    outcome = run(registry.open_base(model), out, force=force)
    if as_json:
        echo_json({"schema": 1, "verb": "detach", "out": out, "written": outcome.written})
        return
    told = f"what {model} was before attach · {difference(outcome.grown)} ({size(outcome.written)})"
    click.echo(f"{out}: {told} · next: {command('info', out)}", err=True)
