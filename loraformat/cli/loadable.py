"""Does it load there? info --for LOADER."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from loraformat.cli.printing import echo_json, printable, warn

if TYPE_CHECKING:
    from loraformat.loaders import Reason, Verdict

__all__ = ["show"]

_ANSWERS = {"yes": "yes", "if": "yes, if", "no": "no"}
_WORDS = {"no": "no", "wrong": "wrong numbers", "if": "if"}


def show(path: str, layout: str | None, name: str, as_json: bool) -> None:
    """Print whether the program loads the adapter at ``path`` as it is, with every reason; exit code 1 if not."""
    from loraformat import registry
    from loraformat.loaders import judge

    loader = registry.loader(name)
    reading, found, _ = registry.read(path, layout)
    verdict = judge(reading.adapter, found.name, loader)
    if as_json:
        echo_json({"schema": 1, "path": path, "layout": found.name, **_json(verdict)})
    else:
        warn(reading.warnings)
        click.echo(f"{printable(path)}: {loader.name} {loader.version}: {_ANSWERS[verdict.answer]}")
        for reason in verdict.reasons:
            for line in _lines(reason):
                click.echo(line)
    sys.exit(0 if verdict.answer != "no" else 1)


def _lines(reason: Reason) -> list[str]:
    at = f"  @ {printable(reason.where)}" if reason.where else ""
    lines = [f"  {_WORDS[reason.verdict]}: {printable(reason.what)}{at}"]
    return lines + [f"      {text}" for text in (reason.fix, reason.source and f"({reason.source})") if text]


def _json(verdict: Verdict) -> dict[str, Any]:
    keys = ("verdict", "what", "where", "fix", "source")
    reasons = [{key: getattr(reason, key) for key in keys} for reason in verdict.reasons]
    return {
        "loader": verdict.loader.name,
        "version": verdict.loader.version,
        "answer": verdict.answer,
        "reasons": reasons,
    }
