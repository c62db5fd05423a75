"""Parameters with an adapter beside them: called with an unchanged function, trained, and taken out again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from loraformat.errors import fault
from loraformat_converters.jax_live.factored import Factored, factors_of, pair_of
from loraformat_converters.jax_live.interpret import Formed, evaluate
from loraformat_converters.jax_live.merged import changed
from loraformat_converters.jax_live.places import placed
from loraformat_converters.jax_live.tree import named

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["Branched", "branch"]


@dataclass(frozen=True, eq=False)
class _Target:
    """Where a pair belongs, what its axes are, and the pair that it was."""

    key: str
    name: str
    at: int
    scale: float
    labels: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _About:
    """What does not change while the factors are trained. One object a ``branch``, compared by identity."""

    adapter: Adapter
    targets: tuple[_Target, ...]
    structure: Any
    graph: Any
    """Of an NNX module; None for a tree of parameters."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("leaves", "factors"), meta_fields=("about",))
@dataclass(frozen=True)
class Branched:
    """Parameters and factors, as one pytree. Call it: ``branched(function, *inputs)``.

    Attributes:
        leaves: the parameters; targets that are no plain pair are merged into them.
        factors: key → {lora_a [*in axes, r], lora_b [r, *out axes]}, what is trained: hand a gradient step's result to
            ``with_factors``.
    """

    leaves: list[Any]
    factors: dict[str, dict[str, Any]]
    about: _About

    def __call__(self, function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        """``function(params, *args, **settings)`` with every target W computing W·x + s·B·(A·x).

        Of an NNX module ``function`` gets the module; what it changes in itself (running means, random states) is lost.
        ``args`` are arrays or trees of them; ``settings``, and whatever is no array, are fixed while it is traced.
        """
        return self._run(function, args, settings, [])

    def formed(self, function: Callable[..., Any], *args: Any, **settings: Any) -> list[tuple[str, str]]:
        """(parameter, primitive) wherever this function needs a ΔW itself, which is formed then; empty at best."""
        seen: Formed = []
        jax.eval_shape(lambda leaves: replace(self, leaves=leaves)._run(function, args, settings, seen), self.leaves)
        return sorted(set(seen))

    def with_factors(self, factors: dict[str, dict[str, Any]]) -> Branched:
        """The same with other factors, such as an optimiser's."""
        return replace(self, factors=factors)

    def merged(self) -> Any:
        """The parameters with the factors merged, in the structure that they came in: a tree, or an NNX module."""
        leaves = [leaf.whole() if isinstance(leaf, Factored) else leaf for leaf in self._factored()]
        return self._rebuilt(leaves)

    def adapter(self) -> Adapter:
        """The adapter with the factors as they are now; everything else is as it was read."""
        targets = dict(self.about.adapter.targets)
        for target in self.about.targets:
            update = targets[target.key]
            part, pair = update["lora"], self.factors[target.key]
            assert update.placement is not None
            a, b = pair_of(pair["lora_a"], pair["lora_b"], part, update.placement)
            targets[target.key] = replace(update, parts=(replace(part, lora_A=a, lora_B=b),))
        return replace(self.about.adapter, targets=targets)

    def _factored(self) -> list[Any]:
        leaves = list(self.leaves)
        for target in self.about.targets:
            weight, pair = leaves[target.at], self.factors[target.key]
            labels = tuple(range(weight.ndim))
            leaves[target.at] = Factored(
                weight, pair["lora_a"], pair["lora_b"], target.scale, labels, *target.labels, target.name
            )
        return leaves

    def _rebuilt(self, leaves: list[Any]) -> Any:
        tree = jax.tree_util.tree_unflatten(self.about.structure, leaves)
        if self.about.graph is None:
            return tree
        from flax import nnx

        return nnx.merge(self.about.graph, tree)

    def _run(self, function: Callable[..., Any], args: Any, settings: Any, formed: Formed) -> Any:
        flat, structure = jax.tree_util.tree_flatten(args)
        moving = [i for i, leaf in enumerate(flat) if isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int))]
        moving = [i for i in moving if not isinstance(flat[i], bool)]

        def plain(leaves: list[Any], arrays: list[Any]) -> Any:
            given = list(flat)
            for i, array in zip(moving, arrays, strict=True):
                given[i] = array
            return function(self._rebuilt(leaves), *jax.tree_util.tree_unflatten(structure, given), **settings)

        arrays = [jnp.asarray(flat[i]) for i in moving]
        closed, shape = jax.make_jaxpr(plain, return_shape=True)(self.leaves, arrays)
        results = evaluate(closed.jaxpr, closed.consts, [*self._factored(), *arrays], formed)
        results = [value.whole() if isinstance(value, Factored) else value for value in results]
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(shape), results)


def branch(
    params: Any, adapter: Adapter, *, names: Mapping[str, str] | None = None, axes: Mapping[str, str] | None = None
) -> Branched:
    """Put an adapter beside parameters.

    Args:
        params: a tree of arrays (Linen's, with or without the collection ``params``), or an ``nnx.Module``.
        names: key → name of its leaf (a path joined by ``/``), where they differ.
        axes: key → how its matrix lies in the leaf, such as ``out,in``, where nothing tells.

    A target of any other kind than a plain pair is merged into the parameters, as ``apply`` does.

    Raises:
        LoraFormatError: LF-602 to LF-606 a target is not found, or how it lies is not known; everything at once.
    """
    graph = None
    if _is_module(params):
        from flax import nnx

        graph, params = nnx.split(params)
    positions, leaves, structure = named(params)
    found = placed(adapter, positions, leaves, names or {}, axes or {})
    called = {at: name for name, at in positions.items()}
    targets, factors, updates = [], {}, dict(adapter.targets)
    for at, (key, update) in found.items():
        if not jnp.issubdtype(leaves[at].dtype, jnp.floating):
            raise fault("LF-606", f"{called[at]} is {leaves[at].dtype}: no float weight", where=key)
        updates[key] = update
        if update.kind != "lora" or update["lora"].mid is not None:
            leaves[at] = changed(key, update, leaves[at])
            continue
        assert update.placement is not None
        part = update["lora"]
        a, b, *labels = factors_of(part, update.placement)
        factors[key] = {"lora_a": a, "lora_b": b}
        targets.append(_Target(key, called[at], at, part.scale, (labels[0], labels[1])))
    about = _About(replace(adapter, targets=updates), tuple(targets), structure, graph)
    return Branched(leaves, factors, about)


def _is_module(params: Any) -> bool:
    try:
        from flax import nnx
    except ImportError:
        return False
    return isinstance(params, nnx.Module)
