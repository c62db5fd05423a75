"""What loaders ask of an adapter: kinds that they lack, ranks, scales, shapes. Each gives a reason or none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from loraformat.loaders import Reason

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.updates import Update

__all__ = ["beyond", "convolutions", "lacking", "pairs_alone", "peft_config", "scale_of_all", "stacks"]

NAMES = {
    "magnitude": "DoRA (a magnitude)",
    "rows": "trained tokens",
    "replace": "whole parameters (modules_to_save, biases)",
    "delta": "dense changes",
    "loha": "LoHa",
    "lokr": "LoKr",
}
MERGE = "merge it into the base, or attach it to an ONNX model: both carry every kind"


def lacking(
    adapter: Adapter,
    kinds: Mapping[str, str],
    verdict: Literal["no", "wrong"] = "no",
    but: Callable[[str, Update], bool] = lambda key, update: False,
) -> Iterator[Reason]:
    """A reason a kind of part that the loader lacks.

    Args:
        kinds: kind → where the loader's source says so.
        but: targets that are an exception.
    """
    for kind, source in kinds.items():
        keys = [key for key, update in adapter.items() if kind in update and not but(key, update)]
        if keys:
            fate = "not loaded" if verdict == "no" else "left out without an error"
            what = f"{fate}: {NAMES[kind]}, {_targets(keys)}"
            yield Reason(verdict, what, keys[0], MERGE, source)


def pairs_alone(adapter: Adapter, source: str, verdict: Literal["no", "wrong"] = "no") -> Iterator[Reason]:
    """A reason a kind of part, of a loader that knows pairs and nothing else."""
    yield from lacking(adapter, dict.fromkeys(NAMES, source), verdict)


def convolutions(adapter: Adapter, source: str) -> Iterator[Reason]:
    """A reason where a target is a convolution."""
    keys = [key for key, u in adapter.items() if u.placement and len(u.placement.in_) > 1 and "lora" in u]
    if keys:
        yield Reason("no", f"not adapted: convolutions, {_targets(keys)}", keys[0], MERGE, source)


def stacks(adapter: Adapter, source: str) -> Iterator[Reason]:
    """A reason where matrices are stacked, as those of experts are."""
    keys = [key for key, u in adapter.items() if (shape := u.matrix_shape()) is not None and len(shape) > 2]
    if keys:
        yield Reason("no", f"not loaded: stacked matrices (experts), {_targets(keys)}", keys[0], MERGE, source)


def scale_of_all(adapter: Adapter, source: str, one: float | None) -> Iterator[Reason]:
    """A reason where the loader computes the scale ``one`` for every target and a target's is another."""
    if one is None:
        return
    scales = {key: update["lora"].scale for key, update in adapter.items() if "lora" in update}
    off = [key for key, scale in scales.items() if not math.isclose(scale, one, rel_tol=1e-6)]
    if off:
        ratio = one / scales[off[0]] if scales[off[0]] else math.inf
        what = (
            f"it computes the scale {one:.6g} for every target, which is {ratio:.3g} × that of this; so {_targets(off)}"
        )
        fix = "loraformat convert … --fold-scale: then every scale is 1, and stated so"
        yield Reason("wrong", what, off[0], fix, source)


def beyond(adapter: Adapter, most: int) -> tuple[str, int] | None:
    """(the target of the largest rank, that rank) where it is above ``most``."""
    ranks = {key: update["lora"].r for key, update in adapter.items() if "lora" in update}
    key = max(ranks, key=lambda k: ranks[k], default=None)
    return None if key is None or ranks[key] <= most else (key, ranks[key])


def peft_config(adapter: Adapter) -> Mapping[str, Any]:
    """The adapter_config.json that came with it; empty where there is none."""
    try:
        value = json.loads(adapter.extensions.get("peft", "{}"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _targets(keys: list[str]) -> str:
    return f"{len(keys)} {'targets' if len(keys) > 1 else 'target'}"
