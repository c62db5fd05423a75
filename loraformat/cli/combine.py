"""combine: one adapter of several, and recipes that make it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from loraformat.cli.options import complete_layout, force, json_flag
from loraformat.cli.printing import command, counted, echo_json, lost, printable, table, warn
from loraformat.cli.progress import entries, progress_bar
from loraformat.errors import fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from loraformat.adapter import Adapter
    from loraformat.atomic import Writer
    from loraformat.cli.adapters import Given
    from loraformat.errors import Problem
    from loraformat.layout import Reading
    from loraformat.verbs.combine import Combined

__all__ = ["combine"]

_SETTINGS = ("method", "rank", "density", "gamma", "epsilon", "seed", "weight", "any_base")


def _complete_method(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from loraformat.combining.methods import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def _rank_of(ctx: click.Context, param: click.Parameter, value: str | None) -> int | Literal["full"] | None:
    """A number, or ``full``."""
    if value is None:
        return None
    if value == "full":
        return "full"
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor full", ctx, param) from None


@click.command()
@click.argument("adapters", nargs=-1, metavar="[NAME=]ADAPTER[:WEIGHT]...")
@click.option(
    "--method",
    "-m",
    default="cat",
    show_default=True,
    metavar="METHOD",
    shell_complete=_complete_method,
    help="cat, linear, svd, slerp, ties, dare_linear, dare_ties, magnitude_prune, della, breadcrumbs, sce, peft_….",
)
@click.option("--rank", "-r", callback=_rank_of, metavar="R|full", help="Rank of the result; full: a dense delta.")
@click.option("--density", type=float, metavar="D", help="The share of entries that pruning keeps.")
@click.option(
    "--gamma", type=float, default=0.01, show_default=True, metavar="G", help="breadcrumbs: share of outliers."
)
@click.option(
    "--epsilon", type=float, default=0.1, show_default=True, metavar="E", help="della: spread of probabilities."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of what dare and della draw.")
@click.option(
    "--weight", multiple=True, metavar="[NAME:]PATTERN=W", help="Multiply the weight of these targets; may be repeated."
)
@click.option("--any-base", is_flag=True, help="Combine adapters that name different bases.")
@click.option("--recipe", type=click.Path(), metavar="FILE", help="Make again what this recipe made, byte for byte.")
@click.option("--save-recipe", type=click.Path(), metavar="FILE", help="Write the recipe of the result.")
@click.option("-o", "--out", required=True, metavar="OUT", help="The file (.safetensors) or folder (PEFT) to write.")
@click.option(
    "--to", "to_layout", metavar="LAYOUT", shell_complete=complete_layout, help="Layout of OUT; else by its name."
)
@force
@json_flag
@click.pass_context
def combine(
    ctx: click.Context,
    /,
    adapters: tuple[str, ...],
    recipe: str | None,
    save_recipe: str | None,
    out: str,
    to_layout: str | None,
    weight: tuple[str, ...],
    any_base: bool,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make one adapter of several, each with a weight; exact unless the method or --rank asks for less."""
    from loraformat.apart import check_apart
    from loraformat.cli.adapters import parse
    from loraformat.outputs import check_free
    from loraformat.verbs.combine import combine as run
    from loraformat.verbs.convert import save, target_layout
    from loraformat.verbs.recipe import follow, recipe_text

    layout, _ = target_layout(out, to_layout)
    for path in filter(None, (out, save_recipe)):
        check_free(Path(path), force)
    if save_recipe:
        check_apart(save_recipe, out, *(parse(word).path for word in adapters))
    warnings: list[Problem] = []
    if recipe:
        _check_recipe_alone(ctx, adapters)
        with progress_bar("combine", None, quiet=as_json):
            done = follow(recipe, adapters)
    else:
        given = _read(adapters)
        warnings = [problem for _, reading in given for problem in reading.warnings]
        pairs = [(reading.adapter, w) for (_, reading), w in zip(given, _weights(given, weight), strict=True)]
        with progress_bar("combine", entries(a for a, _ in pairs), quiet=as_json):
            done = run(pairs, **settings, any_base=any_base)
    beside: dict[Path, Writer] = {}
    if save_recipe:
        paths = [item.path for item, _ in given] if not recipe else _paths(recipe, adapters)
        text = recipe_text(done, paths, Path(save_recipe).parent, any_base).encode()
        beside[Path(save_recipe)] = lambda file: file.write(text) and None
    warnings += save(done.adapter, out, layout, force=force, beside=beside)
    _told(done, out, as_json, warnings)


def _read(words: Sequence[str]) -> list[tuple[Given, Reading]]:
    from loraformat import registry
    from loraformat.cli.adapters import parse

    return [(item, registry.read(item.path)[0]) for item in map(parse, words)]


def _weights(given: Sequence[tuple[Given, Reading]], words: Iterable[str]) -> list[dict[str, float]]:
    """Pattern → number for each adapter; a pattern of all adapters counts where it means a target."""
    from loraformat.cli.adapters import scales
    from loraformat.resolve import matches

    found = [{"*": item.weight} for item, _ in given]
    names = [item.name for item, _ in given]
    for pattern, number in scales(words, "--weight").items():
        name, colon, rest = pattern.partition(":")
        if colon and names.count(name) == 1 and name != "default":
            found[names.index(name)][rest] = number
            continue
        meant = [i for i, (_, r) in enumerate(given) if any(matches(key, (pattern,)) for key in r.adapter)]
        if not meant:
            raise fault("LF-705", "no target of any adapter is meant by this pattern", where=pattern)
        for i in meant:
            found[i][pattern] = number
    return found


def _check_recipe_alone(ctx: click.Context, adapters: Sequence[str]) -> None:
    """LF-705 where the command line says what the recipe says already."""
    from loraformat.cli.adapters import parse

    said = [n for n in _SETTINGS if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE]
    if said:
        flags = ", ".join("--" + name.replace("_", "-") for name in said)
        raise fault("LF-705", f"the recipe states its settings; {flags} would contradict it", fix="change the recipe")
    if weighted := [word for word in adapters if parse(word).path != word]:
        raise fault("LF-705", f"the recipe states names and weights: {', '.join(weighted)}", fix="give paths alone")


def _paths(recipe: str, given: Sequence[str]) -> list[str]:
    """Where the inputs of a recipe lie, in its order."""
    from loraformat import registry
    from loraformat.identity import digest
    from loraformat.verbs.recipe import read_recipe

    at = {digest(registry.load(path)): path for path in given}
    return [at.get(wanted, str(Path(recipe).parent / name)) for name, wanted, _ in read_recipe(recipe).inputs]


def _told(done: Combined, out: str, as_json: bool, warnings: Sequence[Problem]) -> None:
    from loraformat.identity import digest

    adapter, said = done.adapter, done.adapter.provenance["combined"]
    if as_json:
        about = {"schema": 1, "out": out, "digest": digest(adapter), "targets": len(adapter)}
        more = {"combined": said, "dropped": list(done.dropped)}
        echo_json(about | more | {"warnings": [problem.as_json() for problem in warnings]})
        return
    warn(warnings)
    for line in table([(printable(key), _rank(adapter, key), _lost(done.residuals, key)) for key in adapter]):
        click.echo(line)
    settings = ", ".join(f"{k} {json.dumps(v)}" for k, v in said.items() if k not in ("method", "inputs", "residuals"))
    made = f"{said['method']} of {counted(len(said['inputs']), 'adapter')}{f' ({settings})' if settings else ''}"
    gone = f" · {counted(len(done.dropped), 'target')} of weight 0 left out" if done.dropped else ""
    worst = max(done.residuals.values(), default=None)
    moved = "" if worst is None else f" · {lost(worst).replace('lost', 'lost at most')}"
    held = f"{counted(len(adapter), 'target')}{gone}{moved} · digest {digest(adapter)[:12]}"
    click.echo(f"{out}: {made} · {held} · next: {command('info', out)}", err=True)


def _rank(adapter: Adapter, key: str) -> str:
    rank = adapter[key].rank
    return f"{adapter[key].kind}, rank {rank}" if rank is not None else adapter[key].kind


def _lost(residuals: Mapping[str, float], key: str) -> str:
    return lost(residuals[key]) if key in residuals else ""
