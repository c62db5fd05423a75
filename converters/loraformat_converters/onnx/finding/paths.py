"""The whole path of a module whose node's name tells a part of it, or nothing: its own tensors are stored under the whole one.

TorchScript (torch 2.13) names a node by the modules that were called. What holds others without being called is left out, and
of two that are called alike the second gets a number: ``/q_1/MatMul`` is in ``b.q`` where ``b.q.bias`` is added to it. Of the
two that PEFT puts around a model, ``base_model.model``, it calls the first only where it knows the task (0.21.2).

What makes one node of several (onnxsim 0.8: Gemm of MatMul and Add) or puts another in its place (ONNX Runtime's quantisers,
of a graph by dynamo) takes the node's name and metadata away, and leaves the bias.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from loraformat_converters.onnx.finding.names import MODULES, names_of, same_module, second_reading
from loraformat_converters.onnx.graph.index import Index, Site, Value

__all__ = ["PRODUCTS", "stored_paths", "told_by_biases", "unwrapped", "wrapper"]

_IN_PROJ = "in_proj_"
"""What torch puts before weight and bias of the q, k and v of a MultiheadAttention, which it multiplies by itself."""

PRODUCTS = ("MatMul", "Gemm", "com.microsoft.FusedMatMul")

_WRAPPED = re.compile(r"(^|.*?\.)base_model\.model\.")


def stored_paths(index: Index) -> Mapping[int, str]:
    """A site's number → its parameter, where the weight, or the bias that is added to its product, is stored under a whole name."""
    callers: dict[str, set[str | None]] = {}
    for site in index.sites:
        if site.known_operator:
            callers.setdefault(site.root_name, set()).add(names_of(site, "node_name"))
    added = _added(index)
    found: dict[int, str] = {}
    for site in index.sites:
        called, again = names_of(site, "node_name"), second_reading(site, "node_name")
        readings = [r for r in (called, again and again.removesuffix(f".{site.parameter}")) if r]
        for own in (site, *added(site)) if called else ():
            module, _, parameter = own.root_name.rpartition(".")
            alone, stem = _alone(callers[own.root_name], called), parameter.removesuffix(own.parameter)
            if alone and stem in ("", _IN_PROJ) and any(_within(reading, module) for reading in readings):
                found.setdefault(site.number, f"{module}.{stem}{site.parameter}")
    return found


def told_by_biases(index: Index) -> Mapping[int, str]:
    """A site's number → its weight, where no node's name tells it: of a product to which one module's bias is added, and no other's."""
    added, found = _added(index), dict[int, str]()
    for site in index.sites:
        if site.like not in PRODUCTS or site.vector or any(names_of(site, rung) for rung in MODULES):
            continue
        sums = [other for other in added(site) if other.node is site.node or other.node.op_type == "Add"]
        biases = [bias for bias in sums if bias.parameter == "bias" and len(index.uses(bias.root_name)) == 1]
        module, _, parameter = biases[0].root_name.rpartition(".") if len(biases) == 1 else ("", "", "")
        stem = parameter.removesuffix("bias")
        if module and parameter.endswith("bias") and stem in ("", _IN_PROJ):
            found[site.number] = f"{module}.{stem}weight"
    return found


def _added(index: Index) -> Callable[[Site], list[Site]]:
    """Site → the vectors that its own node, or what reads its product, adds or multiplies by."""
    by_node: dict[int, list[Site]] = {}
    for site in index.sites:
        if site.vector:
            by_node.setdefault(id(site.node), []).append(site)

    def added(site: Site) -> list[Site]:
        given = (Value(site.scope, name) for name in site.end.output[:1])
        nodes = [site.node, *(use.node for value in given for use in index.readers(value))]
        return [other for node in nodes for other in by_node.get(id(node), ())]

    return added


def _alone(callers: set[str | None], called: str | None) -> bool:
    """Whether nodes of one name alone use a tensor: equal ones of two modules are stored as one."""
    return callers == {called}


def _within(called: str, module: str) -> bool:
    """Whether a path is another one with components left out, but not the last; TorchScript numbers those that are called alike."""
    *rest, last = module.split(".")
    *parts, own = called.split(".")
    held = iter(rest)
    return same_module(last, own) and all(any(same_module(other, part) for other in held) for part in parts)


def wrapper(names: Iterable[str]) -> str | None:
    """What stands in front of ``base_model.model.`` in the names of a model that PEFT wrapped; None of any other model."""
    return next((found[1] for name in names if (found := _WRAPPED.match(name))), None)


def unwrapped(module: str, outside: str | None) -> str:
    """A module's path in the model that PEFT wrapped.

    >>> unwrapped("base_model.model.lm_head", ""), unwrapped("model.lm_head", ""), unwrapped("model.lm_head", None)
    ('lm_head', 'lm_head', 'model.lm_head')
    """
    if outside is None or not module.startswith(outside):
        return module
    inner = module.removeprefix(outside)
    around = next((w for w in ("base_model.model.", "model.") if inner.startswith(w)), "")
    return outside + inner.removeprefix(around)
