"""The verbs that write adapters: init, convert, bind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from loraformat.cli.options import Choice, complete_layout, force, hints, json_flag, mapping
from loraformat.cli.printing import command, counted, echo_json, warn
from loraformat.cli.progress import progress_bar
from loraformat.spans import span

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loraformat.adapter import Adapter
    from loraformat.errors import Problem
    from loraformat.scale import ScaleRule
    from loraformat.verbs.adapt import Adapted

__all__ = ["bind", "convert", "init_"]

_RULES = Choice(["alpha/r", "alpha/sqrt(r)", "factor"])


@click.command("init")
@click.argument("base")
@click.option(
    "--targets", "-t", multiple=True, required=True, metavar="PATTERN", help="Modules, such as q_proj; may be repeated."
)
@click.option("--rank", "-r", type=int, required=True, metavar="R", help="Rank of every target.")
@click.option(
    "--alpha",
    "-a",
    type=float,
    required=True,
    metavar="A",
    help="The scale is alpha / rank, or as --scale-rule has it.",
)
@click.option("--scale-rule", type=_RULES, default="alpha/r", show_default=True, help="What multiplies B·A.")
@click.option("--sigma", type=float, metavar="S", help="Standard deviation of A; default 1/rank.")
@click.option(
    "--init", "method", type=Choice(["normal", "kaiming"]), default="normal", show_default=True, help="How A is drawn."
)
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option("-o", "--out", required=True, metavar="OUT", help="The file (.safetensors) or folder (PEFT) to write.")
@click.option(
    "--to", "to_layout", metavar="LAYOUT", shell_complete=complete_layout, help="Layout of OUT; else by its name."
)
@mapping
@force
@json_flag
def init_(
    base: str,
    targets: tuple[str, ...],
    rank: int,
    alpha: float,
    scale_rule: ScaleRule,
    sigma: float | None,
    method: Literal["normal", "kaiming"],
    seed: int,
    out: str,
    to_layout: str | None,
    names: str | None,
    axes: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Make a fresh adapter for BASE: A random, B zero, ΔW = 0; the same seed gives the same bytes everywhere."""
    from loraformat import registry
    from loraformat.apart import check_apart
    from loraformat.verbs.convert import save, target_layout
    from loraformat.verbs.init import init

    layout, _ = target_layout(out, to_layout)
    opened = registry.open_base(base)
    check_apart(out, opened, names)
    adapter = init(
        opened,
        targets,
        rank=rank,
        alpha=alpha,
        scale_rule=scale_rule,
        sigma=sigma,
        method=method,
        seed=seed,
        hints=hints(names, axes),
    )
    save(adapter, out, layout, force=force)
    _proof(adapter, out, f"ΔW = 0, seed {seed}", as_json, command("info", out))


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option(
    "--from",
    "from_layout",
    metavar="LAYOUT",
    shell_complete=complete_layout,
    help="Layout of SRC; else by its content.",
)
@click.option(
    "--to", "to_layout", metavar="LAYOUT", shell_complete=complete_layout, help="Layout of DST; else by its name."
)
@click.option("--base", metavar="BASE", help="Bind to this base: write how each matrix lies in its tensor.")
@click.option(
    "--for",
    "model",
    metavar="MODEL",
    help="The model with inputs for adapters that DST, or SRC, is for (.onnx_adapter).",
)
@click.option("--alpha", type=float, metavar="A", help="For a source that states no alpha.")
@click.option("--rank", type=int, metavar="R", help="The rank that the source must have.")
@click.option("--scale-rule", type=_RULES, help="For a source that states no rule.")
@click.option("--split-qkv", type=int, metavar="N", help="How many trained pairs a fused query-key-value pair holds.")
@click.option("--drop", multiple=True, metavar="KIND", help="Leave out parts of this kind; may be repeated.")
@click.option(
    "--to-lora", type=int, metavar="R", help="Other forms as the nearest pair of rank R; prints the residual."
)
@click.option("--dtype", type=Choice(["float32", "float16", "bfloat16"]), help="The dtype of all floats in DST.")
@click.option("--fold-scale", is_flag=True, help="Multiply the scale into B, for a layout that has none.")
@click.option("--pad-rank", is_flag=True, help="Zeros up to the largest rank, for a layout that has one for all.")
@mapping
@force
@json_flag
def convert(
    source: str,
    destination: str,
    from_layout: str | None,
    to_layout: str | None,
    base: str | None,
    model: str | None,
    alpha: float | None,
    rank: int | None,
    scale_rule: ScaleRule | None,
    split_qkv: int | None,
    drop: tuple[str, ...],
    to_lora: int | None,
    dtype: str | None,
    fold_scale: bool,
    pad_rank: bool,
    names: str | None,
    axes: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Write the adapter SRC as DST, in another layout; ΔW stays the same unless you ask for less."""
    from loraformat.apart import check_apart
    from loraformat.layout import ReadOptions
    from loraformat.verbs.adapt import adapt
    from loraformat.verbs.convert import convert as run
    from loraformat.verbs.convert import target_layout

    _, why = target_layout(destination, to_layout)
    check_apart(destination, names)
    done = run(
        source,
        destination,
        from_layout=from_layout,
        to_layout=to_layout,
        options=ReadOptions(alpha, rank, scale_rule, split_qkv=split_qkv),
        base=base,
        model=model,
        hints=hints(names, axes),
        adapt=lambda adapter: adapt(
            adapter, drop=drop, to_lora=to_lora, dtype=dtype, fold_scale=fold_scale, pad_rank=pad_rank
        ),
        force=force,
    )
    what = " · ".join([f"{done.source.name} → {done.destination.name} ({why})", *_changed(done.adapted)])
    more = {"residuals": dict(done.adapted.residuals), "dropped": list(done.adapted.dropped)}
    # What was written for one model is run with it, and a DoRA's file says nothing without it.
    written = model if model and done.destination.name == "onnx_adapter" else None
    told = command("info", written, "--how", "python") if written else command("info", destination)
    _proof(done.adapter, destination, what, as_json, told, done.warnings, more, done.digest)


def _changed(adapted: Adapted) -> Iterator[str]:
    """What became of ΔW, where it was altered as asked."""
    if adapted.residuals:
        worst = max(adapted.residuals, key=lambda key: adapted.residuals[key])
        yield f"ΔW moved by at most {adapted.residuals[worst]:.2g} ({worst})"
    if adapted.dropped:
        yield f"dropped {counted(len(adapted.dropped), 'part')} ({adapted.dropped[0]}{', …' * (len(adapted.dropped) > 1)})"


@click.command()
@click.argument("file", metavar="FILE")
@click.option("--base", required=True, metavar="BASE", help="The checkpoint that the adapter belongs to.")
@click.option("-o", "--out", metavar="OUT", help="Write here; default: FILE itself, which needs --force.")
@click.option("--no-sketch", is_flag=True, help="Leave out the sketches that recognise a weight without its name.")
@mapping
@force
@json_flag
def bind(
    file: str,
    base: str,
    out: str | None,
    no_sketch: bool,
    names: str | None,
    axes: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Write into FILE what its base says: placement, SHA-256 and sketch of every target. The digest stays the same."""
    from loraformat import registry
    from loraformat.apart import check_apart
    from loraformat.layout import ReadOptions
    from loraformat.verbs.bind import bind as run
    from loraformat.verbs.convert import save, target_layout

    destination, opened = out or file, registry.open_base(base)
    check_apart(destination, opened, names)
    reading, _, _ = registry.read(file, options=ReadOptions(base=opened))
    with progress_bar("bind", None, quiet=as_json):
        bound = run(reading.adapter, opened, hints(names, axes), sketches=not no_sketch)
    save(bound, destination, target_layout(destination, "native")[0], force=force)
    following = command("merge", destination, "--into", base, "-o", "OUT")
    _proof(bound, destination, f"bound to {base}", as_json, following, reading.warnings)


def _proof(
    adapter: Adapter,
    out: str,
    what: str,
    as_json: bool,
    following: str,
    warnings: Sequence[Problem] = (),
    more: Mapping[str, Any] | None = None,
    known: str | None = None,
) -> None:
    """The last line of a success: what was written, in numbers, and what comes next; before it, what the reader warns of."""
    from loraformat.identity import digest

    known = known or digest(adapter)
    placed = sum(update.placement is not None for update in adapter.values())
    if as_json:
        said = {"schema": 1, "out": out, "digest": known, "targets": len(adapter), "placed": placed}
        echo_json({**said, **(more or {}), "warnings": [problem.as_json() for problem in warnings]})
        return
    warn(warnings)
    scales = span((update.scale for update in adapter.values() if update.scale is not None), "{:.4g}".format)
    held = f"{counted(len(adapter), 'target')}, {placed} placed · scale {scales} · digest {known[:12]}"
    click.echo(f"{out}: {what} · {held} · next: {following}", err=True)
