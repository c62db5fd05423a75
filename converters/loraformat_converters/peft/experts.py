"""Parameters that are adapted by name (``target_parameters``): stacked experts, routers.

PEFT wraps a module once for each of its parameters, the first defined innermost, and the parameter's name is not in
the key (peft 0.21.2 tuners/lora/layer.py ParamWrapper). So one parameter of a module is known by the configuration;
of several, only the shapes of the base can tell which pair belongs to which.

Of E experts A is [E·r, in], expert by expert, and B [out, r·E], its columns by rank and then by expert. The base has
[E, out, in], or [E, in, out] where the module says ``is_transposed``, which no file repeats: they are read unplaced.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.parts import Lora
from loraformat_converters.peft.draft import SHAPES_TELL, Draft

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]
    Shapes = Mapping[str, tuple[int, ...]]

__all__ = ["parameters", "read"]


def parameters(module: str, nested: Mapping[int, Roles], draft: Draft) -> list[str]:
    """The parameters of this module that ``target_parameters`` means; empty where it is a module of the usual kind.

    peft 0.21.2 tuners_utils _inject_parameters: a name means every parameter whose path is it or ends with it.
    """
    meant = draft.config.names("target_parameters") if draft.config else []
    names = {name.rpartition(".")[2] for name in meant if f".{module}.{name.rpartition('.')[2]}".endswith(f".{name}")}
    if draft.shapes:
        known = {name for name in names if f"{module}.{name}" in draft.shapes}
        if known or f"{module}.weight" in draft.shapes:
            return sorted(known)
    dotted = {name.rpartition(".")[2] for name in meant if "." in name} & names
    if dotted or len(nested) > 1 or max(nested):
        return sorted(names)
    return []


def read(module: str, names: Sequence[str], nested: Mapping[int, Roles], draft: Draft, shapes: Shapes) -> None:
    """A pair for each of the parameters, each by its own name. ``shapes``: of those that share their module."""
    pairs: list[tuple[Array, Array]] = []
    for roles in nested.values():
        if set(roles) != {"lora_A.weight", "lora_B.weight"}:
            what = f"{', '.join(sorted(roles))}: an adapted parameter has lora_A and lora_B, and nothing else"
            draft.say("LF-303", what, module)
            return
        a, b = roles["lora_A.weight"], roles["lora_B.weight"]
        if not draft.sound(module, {"lora_A": a, "lora_B": b}, (2,)):
            return
        pairs.append((a, b))
    if len(pairs) != len(names):
        what = f"{len(pairs)} pairs, and target_parameters means {', '.join(names)} of this module"
        draft.say("LF-507", what, module)
        return
    for name, (a, b) in _assigned(module, names, pairs, draft, shapes):
        _add(f"{module}.{name}", a, b, draft)


def _assigned(
    module: str, names: Sequence[str], pairs: Sequence[tuple[Array, Array]], draft: Draft, stored: Shapes
) -> Iterator[tuple[str, tuple[Array, Array]]]:
    """Which pair is whose: the only way in which all fit the shapes of the base."""
    if len(names) == 1:
        yield names[0], pairs[0]
        return
    shapes = [stored.get(f"{module}.{name}") for name in names]
    if None in shapes:
        what = f"{len(names)} parameters are adapted ({', '.join(names)}); the file does not say which pair is whose"
        draft.say("LF-504", what, module, SHAPES_TELL)
        return
    ranks = [draft.config.rank(f"{module}.{name}") if draft.config else None for name in names]
    ways = [way for way in itertools.permutations(pairs) if all(map(_fits, shapes, way, ranks))]
    if len({tuple(map(id, itertools.chain(*way))) for way in ways}) != 1:
        what = f"{len(ways) or 'no'} ways to give {len(pairs)} pairs to {', '.join(names)} fit the shapes of the base"
        draft.say("LF-504", what, module, "is this the base that the adapter was trained on?" if not ways else "")
        return
    yield from zip(names, ways[0], strict=True)


def _fits(shape: tuple[int, ...] | None, pair: tuple[Array, Array], rank: int | None) -> bool:
    a, b = pair
    if shape is None or len(shape) not in (2, 3):
        return False
    if len(shape) == 2:
        return shape == (b.shape[0], a.shape[1])
    held = a.shape[0] == shape[0] * rank if rank else a.shape[0] % shape[0] == 0
    return held and shape[1:] in ((b.shape[0], a.shape[1]), (a.shape[1], b.shape[0]))


def _add(key: str, a: Array, b: Array, draft: Draft) -> None:
    shape = draft.shapes.get(key)
    rank = draft.config.rank(key) if draft.config else None
    rows = a.shape[0]
    if rank is None or rows % rank or b.shape[1] != rows:
        what = f"lora_A {list(a.shape)} and lora_B {list(b.shape)} hold no whole number of experts of rank {rank}"
        draft.say("LF-309", what, key)
        return
    count = rows // rank
    if (scale := draft.scale(key, rank)) is None:
        return
    if count == 1 and (shape is None or len(shape) == 2):
        draft.add(key, Lora(a, b, *scale), Placement((b.shape[0], a.shape[1]), (0,), (1,)))
        return
    if count == 1:
        what = "one expert of three axes: peft 0.21.2 adds its two axes to the three"
        draft.say("LF-504", what, key)
        return
    stacked_a = a.reshape(count, rank, a.shape[1])
    stacked_b = b.reshape(b.shape[0], rank, count).transpose(2, 0, 1)
    draft.add(key, Lora(stacked_a, stacked_b, *scale))
