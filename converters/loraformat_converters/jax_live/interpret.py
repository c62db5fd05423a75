"""Evaluate a traced function in which weights with factors stand.

Equations without such a weight are bound as they are. Of the others, those of ``RULES`` know what to do; calls, loops
and branches are entered; whatever is left gets W + ΔW, formed on the spot: right, though dear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from loraformat_converters.jax_live.factored import Factored
from loraformat_converters.jax_live.operations import RULES

__all__ = ["Formed", "evaluate"]

Formed = list[tuple[str, str]]
"""(parameter, primitive) for every ΔW that was formed."""


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], formed: Formed) -> list[Any]:
    """The outputs of ``jaxpr`` (jax.extend.core.Jaxpr) for arguments of which some are ``Factored``."""
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else env[var]

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        if any(isinstance(value, Factored) for value in inputs):
            results = _changed(eqn, inputs, formed)
        else:
            results = _bound(eqn, inputs)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _bound(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair before jax 0.10
    results = eqn.primitive.bind(*functions, *inputs, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _changed(eqn: Any, inputs: list[Any], formed: Formed) -> list[Any]:
    name = eqn.primitive.name
    if name in _CALLS:
        return _CALLS[name](eqn.params, inputs, formed)
    if name in RULES and (result := RULES[name](eqn.params, inputs)) is not None:
        return [result]
    return _bound(eqn, [_whole(value, name, formed) for value in inputs])


def _whole(value: Any, primitive: str, formed: Formed) -> Any:
    if not isinstance(value, Factored):
        return value
    formed.append((value.name, primitive))
    return value.whole()


# Calls, loops and branches: entered with the weights as they are.


def _inlined(params: Any, inputs: list[Any], formed: Formed) -> list[Any]:
    closed = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    if isinstance(closed, core.ClosedJaxpr):
        return evaluate(closed.jaxpr, closed.consts, inputs, formed)
    return evaluate(closed, (), inputs, formed)


def _checkpointed(params: Any, inputs: list[Any], formed: Formed) -> list[Any]:
    """``jax.checkpoint``: what is recomputed in the backward pass stays so."""

    def run(*args: Any) -> list[Any]:
        return evaluate(params["jaxpr"], (), args, formed)

    kept = {"prevent_cse": params["prevent_cse"], "policy": params["policy"]}
    return list(jax.checkpoint(run, **kept)(*inputs))


def _scanned(params: Any, inputs: list[Any], formed: Formed) -> list[Any]:
    """A loop over stacked weights takes the factors of each turn; what is carried around is formed first."""
    n, m = params["num_consts"], params["num_carry"]
    consts, carried, rows = inputs[:n], inputs[n : n + m], inputs[n + m :]
    carried = [_whole(value, "scan", formed) for value in carried]
    rows = [_stacked(value, formed) for value in rows]
    body = params["jaxpr"]

    def turn(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        seen = [value.inner() if isinstance(value, Factored) else value for value in row]
        results = evaluate(body.jaxpr, body.consts, [*consts, *carry, *seen], formed)
        return results[:m], results[m:]

    carry, stacked = lax.scan(
        turn, carried, rows, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *stacked]


def _stacked(value: Any, formed: Formed) -> Any:
    if not isinstance(value, Factored):
        return value
    moved = value.stacked()
    return _whole(value, "scan", formed) if moved is None else moved


def _chosen(params: Any, inputs: list[Any], formed: Formed) -> list[Any]:
    index, operands = inputs[0], inputs[1:]

    def way(closed: Any) -> Callable[..., list[Any]]:
        return lambda *args: evaluate(closed.jaxpr, closed.consts, args, formed)

    return list(lax.switch(index, [way(closed) for closed in params["branches"]], *operands))


def _repeated(params: Any, inputs: list[Any], formed: Formed) -> list[Any]:
    n, m = params["cond_nconsts"], params["body_nconsts"]
    tests, consts, carried = inputs[:n], inputs[n : n + m], inputs[n + m :]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    carried = [_whole(value, "while", formed) for value in carried]
    return list(
        lax.while_loop(
            lambda carry: evaluate(test.jaxpr, test.consts, [*tests, *carry], formed)[0],
            lambda carry: evaluate(body.jaxpr, body.consts, [*consts, *carry], formed),
            carried,
        )
    )


_CALLS: dict[str, Callable[[Any, list[Any], Formed], list[Any]]] = {
    "jit": _inlined,
    "pjit": _inlined,
    "closed_call": _inlined,
    "core_call": _inlined,
    "checkpoint": _checkpointed,
    "remat2": _checkpointed,
    "scan": _scanned,
    "cond": _chosen,
    "while": _repeated,
}
