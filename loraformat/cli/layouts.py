"""layouts: the table of what can be read and written, and where each keeps the scale."""

from __future__ import annotations

import click

from loraformat.cli.options import json_flag
from loraformat.cli.printing import echo_json, table

__all__ = ["layouts"]


@click.command()
@json_flag
def layouts(as_json: bool) -> None:
    """List the layouts of adapters: read, written, the kinds of update that each carries, where its scale is."""
    from loraformat import registry

    known = registry.layouts()
    if as_json:
        entries = {
            name: {"describes": x.describes, "writes": x.writes, "carries": sorted(x.carries), "scale": x.scale}
            for name, x in known.items()
        }
        echo_json({"schema": 1, "layouts": entries})
        return
    rows = [("layout", "read", "write", "carries", "where the scale is", "what it is")]
    for name, item in known.items():
        carries = ", ".join(sorted(item.carries))
        rows.append((name, "yes", "yes" if item.writes else "no", carries, item.scale, item.describes))
    for line in table(rows):
        click.echo(line)
