"""Options that several verbs share, and the user's words as values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from loraformat import canonical
from loraformat.errors import Problem, fault
from loraformat.resolve import Hints

__all__ = ["echo_json", "force", "hints", "json_flag", "mapping", "origin", "shown", "strength", "warn"]

_SPEC = re.compile(r"\s*(out|in|batch)\d*\s*(,\s*(out|in|batch)\d*\s*)*")
F = TypeVar("F", bound=Callable[..., Any])

json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
force = click.option("--force", is_flag=True, help="Replace the output if it exists.")


def mapping(function: F) -> F:
    """``--names`` and ``--axes``: what the user knows of the base."""
    names = click.option("--names", type=click.Path(), help="JSON file: target → name in the base; * maps prefixes.")
    axes = click.option("--axes", multiple=True, metavar="PATTERN=SPEC", help="Axes of targets: out,in or in,out.")
    return names(axes(function))


def origin(function: F) -> F:
    """``--base``: the weights by which a graph's are recognised."""
    text = "The checkpoint that the adapter was trained on: finds weights of a graph by their values."
    return click.option("--base", "origin", type=click.Path(), help=text)(function)


def strength(function: F) -> F:
    """``--only`` and ``--scale``: which targets, and how much of each."""
    only = click.option("--only", multiple=True, metavar="PATTERN", help="Apply these targets only.")
    scale = click.option("--scale", multiple=True, metavar="PATTERN=S", help="Multiply ΔW of these targets by S.")
    return only(scale(function))


def hints(names: str | None, axes: tuple[str, ...], origin: str | None = None) -> Hints:
    """The stated names, axes and ``--base``; LF-705 where they cannot be read."""
    from loraformat import registry

    stated = {}
    for item in axes:
        pattern, equals, spec = item.rpartition("=")
        if not equals or not pattern or not _SPEC.fullmatch(spec):
            fix = "SPEC has a word an axis: out, in or batch, such as '*c_proj=in,out'"
            raise fault("LF-705", f"--axes {item!r} is not PATTERN=SPEC", fix=fix)
        stated[pattern] = spec
    return Hints(_names(Path(names)) if names else {}, stated, registry.open_base(origin) if origin else None)


def _names(path: Path) -> dict[str, str]:
    try:
        value = canonical.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise fault("LF-705", f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise fault("LF-705", f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise fault("LF-705", f"{path} must map target names to names of the base")
    return value


def echo_json(value: Any) -> None:
    """JSON on stdout, for people and programs: two spaces, keys as given."""
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def shown(problem: Problem) -> str:
    """A problem for a terminal: control characters in a stranger's names are shown, not obeyed."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(problem))


def warn(problems: Iterable[Problem]) -> None:
    """Warnings on stderr."""
    for problem in problems:
        click.echo(shown(problem), err=True)
