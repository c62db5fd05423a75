"""The verbs that only a graph takes: giving back what was attached, writing functions out, proof by running."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from loraformat.apart import check_apart
from loraformat.errors import fault

if TYPE_CHECKING:
    import os

    from loraformat.adapter import Adapter
    from loraformat.base import Base, Graph
    from loraformat.plan import Outcome, Plan, Proof

__all__ = ["check_provable", "detach", "extract", "inlined", "prove"]


def detach(base: Base, out: str | os.PathLike[str], *, force: bool = False) -> Outcome:
    """Write an attached model as it was before ``attach``.

    Raises:
        LoraFormatError: LF-608 no graph; LF-613 nothing is attached, or the model was changed since; LF-703 the output.
    """
    graph = _graph(base, "detach")
    check_apart(out, base)
    return graph.detach(Path(out), force=force)


def extract(base: Base, *, name: str | None = None) -> Adapter:
    """The adapter that is attached to a model, bit for bit; the one called ``name``, where there are several.

    Raises:
        LoraFormatError: LF-608 no graph; LF-613 nothing is attached, or it was changed; LF-705 no such name.
    """
    found = dict(_graph(base, "extract").extract())
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        what = f"{base.path} has {len(found)} adapters attached" if name is None else f"no adapter is called {name}"
        raise fault("LF-705", what, fix=f"--name, one of {', '.join(found)}")
    return found[name]


def inlined(base: Base) -> Base:
    """A graph with its local functions written out."""
    return _graph(base, "inline").inlined()


def check_provable(base: Base, plan: Plan, inputs: str | os.PathLike[str] | None = None) -> None:
    """Refuse, before anything is written, what cannot be proved by running it.

    Raises:
        LoraFormatError: LF-608 a use of which nothing can be proved; LF-705 inputs that cannot be made up or read.
    """
    _graph(base, "prove").check_provable(plan, Path(inputs) if inputs else None)


def prove(base: Base, plan: Plan, inputs: str | os.PathLike[str] | None = None) -> Proof:
    """Run what a plan wrote against base and adapter put together in another way."""
    return _graph(base, "prove").prove(plan, Path(inputs) if inputs else None)


_OTHERWISE = {
    "prove": "loraformat verify compares checkpoints",
    "extract": "of two checkpoints, give the tuned one too: loraformat extract BASE TUNED",
    "detach": "a merge is not taken back: keep the base",
    "inline": "a checkpoint holds no functions: leave --inline out",
}


def _graph(base: Base, verb: str) -> Graph:
    if verb not in base.verbs:
        fix = f"give an ONNX model, or a folder of them; {_OTHERWISE[verb]}"
        raise fault("LF-608", f"{base.path} is no graph: there is nothing to {verb}", fix=fix)
    return cast("Graph", base)
