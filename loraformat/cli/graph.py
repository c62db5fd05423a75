"""The verbs that take an attached model apart: detach, extract."""

from __future__ import annotations

import click

from loraformat.cli.options import force, json_flag
from loraformat.cli.printing import command, counted, echo_json

__all__ = ["detach", "extract"]


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("-o", "--out", required=True, metavar="OUT", help="The file to write; of a folder of models, a folder.")
@force
@json_flag
def detach(model: str, out: str, force: bool, as_json: bool) -> None:
    """Write MODEL as it was before attach; refused where it was changed since."""
    from loraformat import registry
    from loraformat.plan import size
    from loraformat.verbs.graph import detach as run

    outcome = run(registry.open_base(model), out, force=force)
    if as_json:
        echo_json({"schema": 1, "verb": "detach", "out": out, "written": outcome.written})
        return
    told = f"what {model} was before attach · {outcome.grown / 1e6:+.1f} MB ({size(outcome.written)})"
    click.echo(f"{out}: {told} · next: {command('info', out)}", err=True)


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "-o", "--out", required=True, metavar="OUT", help="The adapter to write: a file (.safetensors) or a folder (PEFT)."
)
@click.option("--name", metavar="NAME", help="Which, where several are attached.")
@click.option("--to", "to_layout", metavar="LAYOUT", help="Layout of OUT; else by its name.")
@force
@json_flag
def extract(model: str, out: str, name: str | None, to_layout: str | None, force: bool, as_json: bool) -> None:
    """Write the adapter that attach put into MODEL, bit for bit."""
    from loraformat import registry
    from loraformat.identity import digest
    from loraformat.verbs.convert import save, target_layout
    from loraformat.verbs.graph import extract as run

    layout, _ = target_layout(out, to_layout)
    adapter = run(registry.open_base(model), name=name)
    save(adapter, out, layout, force=force)
    if as_json:
        echo_json({"schema": 1, "verb": "extract", "out": out, "digest": digest(adapter), "targets": len(adapter)})
        return
    told = f"{counted(len(adapter), 'target')} as they were attached · digest {digest(adapter)[:12]}"
    click.echo(f"{out}: {told} · next: {command('info', out)}", err=True)
