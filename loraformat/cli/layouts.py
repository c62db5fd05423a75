"""layouts: what can be read and written, and where each keeps the scale."""

from __future__ import annotations

import click

from loraformat.cli.options import json_flag
from loraformat.cli.printing import echo_json

__all__ = ["layouts"]


@click.command()
@json_flag
def layouts(as_json: bool) -> None:
    """List the layouts of adapters: read, written, the kinds of update that each carries, where its scale is."""
    from loraformat import registry
    from loraformat.parts import ORDER

    known = registry.layouts()
    if as_json:
        entries = {
            name: {"describes": x.describes, "writes": x.writes, "carries": sorted(x.carries), "scale": x.scale}
            for name, x in known.items()
        }
        echo_json({"schema": 1, "layouts": entries})
        return
    for name, item in known.items():
        carries = ", ".join(kind for kind in ORDER if kind in item.carries)
        told = (carries, "" if item.writes else "read only", f"scale: {item.scale}")
        click.echo(f"{name:13} {item.describes}")
        click.echo(f"{'':13} {' · '.join(filter(None, told))}")
