"""The verb that takes an adapter out of models: the one that was attached, or the one that lies between two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loraformat.cli.options import Choice, force, hints, json_flag, mapping
from loraformat.cli.printing import command, counted, echo_json, printable, table
from loraformat.cli.progress import progress_bar
from loraformat.errors import fault
from loraformat.spans import span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraformat.adapter import Adapter
    from loraformat.extracting.others import Form, Other
    from loraformat.verbs.extract import Extracted

__all__ = ["extract"]

_SHOWN = 8  # tensors that are left out, of one kind


@click.command()
@click.argument("base", metavar="MODEL")
@click.argument("tuned", metavar="[TUNED]", required=False)
@click.option(
    "-o", "--out", required=True, metavar="OUT", help="The adapter to write: a file (.safetensors) or a folder (PEFT)."
)
@click.option("--rank", "-r", type=int, metavar="R", help="Of two models: the rank of every pair.")
@click.option("--energy", type=float, metavar="E", help="In its place: the share of ‖ΔW‖² that every pair holds.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Look at these tensors alone; may be repeated.")
@click.option(
    "--with",
    "take",
    multiple=True,
    metavar="KIND",
    help="Take along norms, biases, embeddings, others, new, or several with commas.",
)
@click.option(
    "--form",
    type=Choice(["replace", "delta"]),
    default="replace",
    show_default=True,
    help="How --with stores them: new values, or differences that can be weighed.",
)
@click.option("--name", metavar="NAME", help="Of one model: which adapter, where several are attached.")
@click.option("--to", "to_layout", metavar="LAYOUT", help="Layout of OUT; else by its name.")
@mapping
@force
@json_flag
def extract(
    base: str,
    tuned: str | None,
    out: str,
    rank: int | None,
    energy: float | None,
    only: tuple[str, ...],
    take: tuple[str, ...],
    form: Form,
    name: str | None,
    to_layout: str | None,
    names: str | None,
    axes: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Write the adapter that is in MODEL; or the one that makes TUNED of MODEL.

    What attach put there comes back bit for bit; what another tool did is found by what the graph computes, s·B·A·x
    beside a weight (PEFT exported un-merged, Olive, ONNX Runtime GenAI). Of two models each linear that differs becomes the nearest pair of a rank, and what that loses is printed:

    \b
    loraformat extract base/ tuned/ --rank 16 -o tuned.lora.safetensors
    loraformat extract base/ tuned/ --energy 0.95 --with norms,embeddings -o tuned.lora.safetensors
    """
    if tuned is None:
        given = {"--rank": rank, "--energy": energy, "--only": only, "--with": take, "--names": names, "--axes": axes}
        if said := [flag for flag, value in given.items() if value not in (None, ())]:
            raise fault("LF-705", f"{', '.join(said)}: for two models", fix="loraformat extract BASE TUNED …")
        _attached(base, out, name, to_layout, force, as_json)
        return
    if name is not None:
        raise fault("LF-705", "--name chooses of what is attached to one model; here are two")
    kinds = [kind for word in take for kind in word.split(",") if kind]
    asked = {"rank": rank, "energy": energy, "only": only, "take": kinds, "form": form, "hints": hints(names, axes)}
    _between(base, tuned, out, asked, to_layout, force, as_json)


def _attached(model: str, out: str, name: str | None, to_layout: str | None, force: bool, as_json: bool) -> None:
    from loraformat import registry
    from loraformat.apart import check_apart
    from loraformat.verbs.convert import save, target_layout
    from loraformat.verbs.graph import extract as run

    layout, _ = target_layout(out, to_layout)
    base = registry.open_base(model)
    check_apart(out, base)
    adapter = run(base, name=name)
    save(adapter, out, layout, force=force)
    if as_json:
        echo_json(_json(out, adapter))
        return
    how = "as they were attached" if getattr(base, "attached", ()) else "as the graph computes them beside its weights"
    click.echo(f"{out}: {_told(adapter)} {how} · {_following(out)}", err=True)


def _between(
    base: str, tuned: str, out: str, asked: dict[str, Any], to_layout: str | None, force: bool, as_json: bool
) -> None:
    from pathlib import Path

    from loraformat import registry
    from loraformat.apart import check_apart
    from loraformat.outputs import check_free
    from loraformat.verbs.convert import save, target_layout
    from loraformat.verbs.extract import between

    layout, _ = target_layout(out, to_layout)
    check_free(Path(out), force)
    two = registry.open_base(base), registry.open_base(tuned)
    check_apart(out, *two)
    with progress_bar("extract", None, quiet=as_json):
        found = between(*two, **asked)
    said = save(found.adapter, out, layout, force=force)
    if as_json:
        left = [_left_json(other) for other in found.left_out]
        more = {"residual": found.whole, "residuals": dict(found.residuals), "left_out": left, "equal": found.equal}
        echo_json({**_json(out, found.adapter), **more, "warnings": [problem.as_json() for problem in said]})
        return
    for line in _left_lines(found.left_out):
        click.echo(line, err=True)
    click.echo(f"{out}: {_told(found.adapter)} · {_loss(found)} · {_following(out)}", err=True)


def _json(out: str, adapter: Adapter) -> dict[str, Any]:
    from loraformat.identity import digest

    return {"schema": 1, "verb": "extract", "out": out, "digest": digest(adapter), "targets": len(adapter)}


def _told(adapter: Adapter) -> str:
    from loraformat.identity import digest

    return f"{counted(len(adapter), 'target')}, digest {digest(adapter)[:12]}"


def _following(out: str) -> str:
    return f"next: {command('info', out)}"


def _loss(found: Extracted) -> str:
    """``r 16 · residual 31 % of ΔW (2.1–48 %) · 12 tensors equal``."""
    ranks = span((update.rank for update in found.adapter.values() if update.rank is not None), str)
    pairs = f"rank {ranks} · " if ranks else ""
    ends = span((100 * end for end in found.residuals.values()), "{:.2g}".format)
    lost = f"residual {100 * found.whole:.2g} % of ΔW ({ends} %) · " if ends else ""
    return f"{pairs}{lost}{counted(found.equal, 'tensor')} equal"


def _left_json(other: Other) -> dict[str, Any]:
    parameter = other.after or other.before
    assert parameter is not None
    return {
        "name": other.name,
        "kind": other.kind,
        "dtype": parameter.dtype,
        "shape": list(parameter.shape),
        "bytes": other.nbytes,
        "change": other.change,
    }


def _left_lines(left: Any) -> Iterator[str]:
    """What differs and is not in the adapter, kind by kind, with its size."""
    from loraformat.plan import size

    kinds: dict[str, list[Other]] = {}
    for other in left:
        kinds.setdefault(other.kind, []).append(other)
    for kind, group in kinds.items():
        way = "no adapter can take a tensor away" if kind == "missing" else f"--with {kind} takes them"
        yield f"left out: {counted(len(group), 'tensor')}, {kind} ({size(sum(o.nbytes for o in group))}): {way}"
        rows = [_row(other) for other in group[:_SHOWN]]
        yield from (f"  {line}" for line in table(rows))
        if len(group) > _SHOWN:
            yield f"  … and {len(group) - _SHOWN} more (--json lists all)"


def _row(other: Other) -> tuple[str, ...]:
    parameter = other.after or other.before
    assert parameter is not None
    change = "" if other.change is None else f"‖ΔW‖/‖W‖ {100 * other.change:.2g} %"
    sizes = str(list(parameter.shape))
    if other.before and other.after and other.before.shape != other.after.shape:
        sizes = f"{list(other.before.shape)} → {list(other.after.shape)}"
    return printable(other.name), parameter.dtype, sizes, change
