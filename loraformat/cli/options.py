"""Options that several verbs share, and the user's words as values."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from loraformat import canonical
from loraformat.errors import fault
from loraformat.resolve import Hints

__all__ = [
    "Choice",
    "complete_layout",
    "complete_loader",
    "force",
    "hints",
    "json_flag",
    "mapping",
    "names_of",
    "origin",
    "strength",
]

_SPEC = re.compile(r"\s*(out|in|batch)\d*\s*(,\s*(out|in|batch)\d*\s*)*")
F = TypeVar("F", bound=Callable[..., Any])


class Choice(click.Choice[str]):
    """A choice that says which value is nearest to a wrong one."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None = None) -> str:
        """What ``--help`` lists, and the nearest of it."""
        from loraformat.names import nearest

        close = nearest(str(value), map(str, self.choices), 1)
        mean = f" Did you mean {close[0]!r}?" if close else ""
        return f"{str(value)!r} is not one of {', '.join(map(repr, map(str, self.choices)))}.{mean}"


json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
force = click.option("--force", is_flag=True, help="Replace the output if it exists.")


def complete_layout(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For a shell: the names of layouts that begin so."""
    from loraformat import registry

    return [name for name in registry.layouts() if name.startswith(incomplete)]


def complete_loader(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For a shell: the names of loaders that begin so."""
    from loraformat import registry

    return [name for name in registry.loaders() if name.startswith(incomplete)]


def mapping(function: F) -> F:
    """``--names`` and ``--axes``: what the user knows of the base."""
    names = click.option(
        "--names", type=click.Path(), metavar="MAP", help="JSON file: target → name in the base; * maps prefixes."
    )
    axes = click.option(
        "--axes", multiple=True, metavar="PATTERN=SPEC", help="How targets lie in the base, such as '*c_proj=in,out'."
    )
    return names(axes(function))


def origin(function: F) -> F:
    """``--base``: the weights by which a graph's are recognised."""
    text = "The checkpoint that the adapter was trained on: finds weights of a graph by their values."
    return click.option("--base", "origin", type=click.Path(), metavar="BASE", help=text)(function)


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
    return Hints(names_of(Path(names)) if names else {}, stated, registry.open_base(origin) if origin else None)


def names_of(path: Path) -> dict[str, str]:
    """The names that a user states in a JSON file; LF-705 where it is none."""
    try:
        value = canonical.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise fault("LF-705", f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise fault("LF-705", f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise fault("LF-705", f"{path} must map target names to names of the base")
    return value
