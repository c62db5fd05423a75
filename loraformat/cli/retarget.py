"""retarget: an adapter under the names of another framework or version of the same model."""

from __future__ import annotations

from pathlib import Path

import click

from loraformat.cli.options import complete_layout, force, json_flag, names_of
from loraformat.cli.printing import command, counted, echo_json, warn

__all__ = ["retarget"]


@click.command()
@click.argument("file", metavar="FILE")
@click.option("--to", "space", metavar="SPACE", help="The name space to translate to: torch, kohya, …")
@click.option("--base", metavar="BASE", help="The model under the wanted names; for another SPACE, the model itself.")
@click.option(
    "--origin", metavar="BASE", help="The model under FILE's own names: weights are recognised by their values."
)
@click.option("--names", type=click.Path(), metavar="MAP", help="JSON file: target → its name there; * maps prefixes.")
@click.option("-o", "--out", required=True, metavar="OUT", help="The file or folder to write.")
@click.option(
    "--as", "layout", metavar="LAYOUT", shell_complete=complete_layout, help="Layout of OUT; else by its name."
)
@force
@json_flag
def retarget(
    file: str,
    space: str | None,
    base: str | None,
    origin: str | None,
    names: str | None,
    out: str,
    layout: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write FILE under other names: those of SPACE, or of BASE. ΔW stays the same, in the tensors that are there."""
    from loraformat import registry
    from loraformat.apart import check_apart
    from loraformat.identity import digest
    from loraformat.layout import ReadOptions
    from loraformat.naming.spaces import TORCH, space_of
    from loraformat.verbs.convert import save, target_layout
    from loraformat.verbs.retarget import retarget as run

    opened, own = (registry.open_base(path) if path else None for path in (base, origin))
    check_apart(out, opened, own, names)
    meant = own or (opened if opened is not None and space_of(opened) == TORCH else None)
    reading, _, _ = registry.read(file, options=ReadOptions(base=meant))
    stated = names_of(Path(names)) if names else None
    done = run(reading.adapter, space, base=opened, names=stated, origin=own)
    said = save(done.adapter, out, target_layout(out, layout)[0], force=force)
    if as_json:
        warnings = [problem.as_json() for problem in (*reading.warnings, *said)]
        matched = {key: list(new) for key, new in done.matched.items()}
        told = {"out": out, "names": done.adapter.names, "digest": digest(done.adapter), "matched": matched}
        echo_json({"schema": 1, **told, "evidence": list(done.evidence), "warnings": warnings})
        return
    warn([*reading.warnings, *said])
    held = f"{counted(len(done.matched), 'target')} → {counted(len(done.adapter), 'target')}"
    what = f"{reading.adapter.names} → {done.adapter.names} · {held} by {'; '.join(done.evidence[:3])}"
    click.echo(f"{out}: {what} · digest {digest(done.adapter)[:12]} · next: {command('info', out)}", err=True)
