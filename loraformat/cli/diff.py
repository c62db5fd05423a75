"""The verb that says how two adapters, or two models, differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from loraformat.cli.options import Choice, json_flag
from loraformat.cli.printing import counted, echo_json, printable, table
from loraformat.cli.progress import progress_bar
from loraformat.errors import LoraFormatError, fault

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraformat.adapter import Adapter
    from loraformat.base import Base
    from loraformat.verbs.compare import Weights
    from loraformat.verbs.diff import Differences, Target

__all__ = ["diff"]

_SHOWN = 20  # rows of a table; --json has them all


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--tolerance",
    type=float,
    metavar="SHARE",
    default=1e-6,
    show_default=True,
    help="‖ΔA−ΔB‖ up to this share of ‖Δ‖ is rounding.",
)
@click.option(
    "--ignore",
    multiple=True,
    type=Choice(["form", "metadata"]),
    help="Differences that do not count: how the same change is stored; what is said beside it.",
)
@click.option("--names", type=click.Path(), metavar="MAP", help="JSON file: name in A → name in B; * maps prefixes.")
@json_flag
@click.pass_context
def diff(
    ctx: click.Context,
    a: str,
    b: str,
    tolerance: float,
    ignore: tuple[str, ...],
    names: str | None,
    as_json: bool,
) -> None:
    """Say how two adapters differ: targets, ‖ΔA−ΔB‖, cosine, overlap of what they write and read, form, metadata.

    Of two models: which tensors are equal, which changed and by how much. Exit code 1: a difference was found.
    """
    from loraformat.cli.options import hints
    from loraformat.verbs.diff import diff as compared

    run: Any = compared  # of two adapters or of two models: which, only the files tell
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise fault("LF-705", f"a tolerance of {tolerance}")
    one, other = _opened(a), _opened(b)
    with progress_bar("diff", None, quiet=as_json):
        found: Any = run(one, other, hints(names, ()))
    kind = "adapters" if hasattr(found, "targets") else "models"
    counts = _differs(found, tolerance, ignore) if kind == "adapters" else bool(found)
    if as_json:
        said = _adapters_json(found) if kind == "adapters" else _models_json(found)
        echo_json({"schema": 1, "kind": kind, "different": counts, **said})
    else:
        for line in _adapter_lines(found, tolerance) if kind == "adapters" else _model_lines(found):
            click.echo(printable(line))
        click.echo(f"{a} and {b} {'differ' if counts else 'are the same'}: {_sum(found, tolerance)}", err=True)
    ctx.exit(1 if counts else 0)


def _opened(path: str) -> Adapter | Base:
    from loraformat import registry

    try:
        return registry.load(path)
    except LoraFormatError as error:
        if not all(problem.rule in ("LF-501", "LF-502", "LF-704") for problem in error.problems):
            raise
        try:
            return registry.open_base(path)
        except LoraFormatError as other:
            raise LoraFormatError([*error.problems, *other.problems]) from None


def _differs(found: Differences, tolerance: float, ignore: Sequence[str]) -> bool:
    form = bool(found.forms) and "form" not in ignore
    return bool(any(found.only) or found.moved(tolerance) or form or (found.metadata and "metadata" not in ignore))


def _sum(found: Any, tolerance: float) -> str:
    """The last line."""
    if not hasattr(found, "targets"):
        told = [f"{counted(len(found.equal), 'tensor')} equal", f"{len(found.changed)} changed"]
        told += [f"{len(found.resized)} of another shape"] if found.resized else []
        return " · ".join(told + _only(found.only))
    moved = found.moved(tolerance)
    alike = f"{len(found.targets) - len(moved)} of {counted(len(found.targets), 'shared target')} do the same"
    cosine = "" if found.cosine is None else f" · cosine {found.cosine:.4g}"
    return " · ".join([alike + (f" · ‖ΔA−ΔB‖ {found.distance:.3g}{cosine}" if moved else ""), *_only(found.only)])


def _only(only: tuple[Sequence[str], Sequence[str]]) -> list[str]:
    return [f"{len(names)} only in {side}" for side, names in zip("AB", only, strict=True) if names]


# Adapters.


def _adapter_lines(found: Differences, tolerance: float) -> Iterator[str]:
    yield from _only_lines(found.only)
    moved = sorted(found.moved(tolerance).items(), key=lambda item: -item[1].relative)
    if moved:
        rows: list[tuple[str, ...]] = [("target", "‖ΔA‖", "‖ΔB‖", "‖ΔA−ΔB‖", "cosine", "overlap out, in", "")]
        rows += [_row(key, target) for key, target in moved[:_SHOWN]]
        yield from table(rows)
        yield from _more(len(moved))
    for text, keys in _grouped(found.forms).items():
        some = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        yield f"form: {text}  @ {some}"
    yield from (f"metadata: {name}: {_short(a)} | {_short(b)}" for name, (a, b) in found.metadata.items())


def _row(key: str, target: Target) -> tuple[str, ...]:
    distance = "–" if target.distance is None else f"{target.distance:.3g}"
    cosine = "–" if target.cosine is None else f"{target.cosine:.4f}"
    overlap = "–" if target.overlap is None else f"{target.overlap[0]:.2f}, {target.overlap[1]:.2f}"
    parts = ", ".join(
        f"{kind} {f'{far:.2g}' if math.isfinite(far) else 'another'}" for kind, far in target.parts.items()
    )
    return key, f"{target.norms[0]:.3g}", f"{target.norms[1]:.3g}", distance, cosine, overlap, parts


def _grouped(forms: Mapping[str, Target]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, target in forms.items():
        text = ", ".join(f"{name} {_short(a)} | {_short(b)}" for name, (a, b) in target.form.items())
        groups.setdefault(text, []).append(key)
    return groups


def _adapters_json(found: Differences) -> dict[str, Any]:
    targets = {
        key: {
            "norms": list(target.norms),
            "distance": target.distance,
            "cosine": target.cosine,
            "overlap": None if target.overlap is None else {"out": target.overlap[0], "in": target.overlap[1]},
            "parts": {kind: far if math.isfinite(far) else None for kind, far in target.parts.items()},
            "form": {name: list(pair) for name, pair in target.form.items()},
        }
        for key, target in found.targets.items()
    }
    metadata = {name: list(pair) for name, pair in found.metadata.items()}
    said = {"only": {"a": list(found.only[0]), "b": list(found.only[1])}, "targets": targets, "metadata": metadata}
    return {**said, "distance": found.distance, "cosine": found.cosine}


# Models.


def _model_lines(found: Weights) -> Iterator[str]:
    yield from _only_lines(found.only)
    for name, (a, b) in list(found.resized.items())[:_SHOWN]:
        yield f"{name}: {a.dtype} {list(a.shape)} | {b.dtype} {list(b.shape)}"
    changed = sorted(found.changed.items(), key=lambda item: -(item[1].change or math.inf))
    if changed:
        rows = [("tensor", "‖B−A‖", "‖B−A‖/‖A‖")]
        for name, far in changed[:_SHOWN]:
            share = "–" if far.change is None else f"{100 * far.change:.3g} %"
            rows.append((name, f"{far.norm:.3g}" if far.norm else "0: the dtype alone", share))
        yield from table(rows)
        yield from _more(len(changed))
    yield from (f"config: {name}: {_short(a)} | {_short(b)}" for name, (a, b) in found.config.items())


def _models_json(found: Weights) -> dict[str, Any]:
    return {
        "equal": list(found.equal),
        "changed": {
            n: {"norm": _finite(far.norm), "base_norm": _finite(far.base), "change": _finite(far.change)}
            for n, far in found.changed.items()
        },
        "resized": {n: [[p.dtype, list(p.shape)] for p in pair] for n, pair in found.resized.items()},
        "only": {"a": list(found.only[0]), "b": list(found.only[1])},
        "config": {name: list(pair) for name, pair in found.config.items()},
    }


# Both.


def _only_lines(only: tuple[Sequence[str], Sequence[str]]) -> Iterator[str]:
    for side, names in zip("AB", only, strict=True):
        yield from (f"only in {side}: {name}" for name in names[:_SHOWN])
        yield from _more(len(names))


def _more(count: int) -> Iterator[str]:
    if count > _SHOWN:
        yield f"… and {count - _SHOWN} more (--json lists all)"


def _finite(number: float | None) -> float | None:
    """JSON has no NaN; a tensor with one is as far from any other as can be."""
    return number if number is not None and math.isfinite(number) else None


def _short(value: Any) -> str:
    """A value on one line, cut where it is long."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
