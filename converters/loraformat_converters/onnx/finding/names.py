"""What a site is called, by each witness: the exporter's metadata, the stored tensor, the node's own name."""

from __future__ import annotations

import re

import onnx

from loraformat_converters.onnx.graph import exported
from loraformat_converters.onnx.graph.index import Site

__all__ = [
    "MODULES",
    "RUNGS",
    "modules_of",
    "names_of",
    "of_one_module",
    "own_copy",
    "parameter_of",
    "same_module",
    "second_reading",
]

RUNGS = ("name_scopes", "initializer", "node_name")
"""In the order in which they are reported; where two speak, they must agree."""

MODULES = ("name_scopes", "node_name")
"""The rungs that name the module, not the tensor."""

_NUMBER = re.compile(r"_\d+$")
_QUANTISED = re.compile(r"_(quant|(matmul_)?Q\d+(G\d+)?)$")
_CODES = re.compile(r"_(quantized|(DQ_)?Q\d+(G\d+)?)$")
"""What ONNX Runtime's quantisers (1.32) put behind the name of a tensor whose codes they store."""

_BUILT = re.compile(r"(.+)\.MatMul\.weight")
"""How the builder of onnxruntime-genai (0.18) names the weight of a module that it makes a MatMul of."""

_OWN_COPY = re.compile(r"lora/(.+)/weight(_\d+)?")


def names_of(site: Site, rung: str) -> str | None:
    """The module path (``initializer``: the parameter's name) that one witness gives, or None if it is silent."""
    if rung == "initializer":
        stored = _CODES.sub("", site.root_name) if site.sealed else site.root_name
        built = _BUILT.fullmatch(stored)
        return own_copy(site.root_name) or (f"{_of_builder(built[1])}.weight" if built else stored)
    if not (site.known_operator or site.vector):
        return None
    path = exported.module(site.node) if rung == "name_scopes" else _node_path(site.node)
    return _of_builder(path) if path and _BUILT.match(site.root_name) else path


def parameter_of(site: Site, rung: str) -> str | None:
    """The full name of the site's parameter, as one witness gives it: a module's operators use its parameters."""
    name = names_of(site, rung)
    return name if name is None or rung not in MODULES else f"{name}.{site.parameter}"


def second_reading(site: Site, rung: str) -> str | None:
    """What else the node's own name may call the parameter; None where it can be read in one way only.

    TorchScript (torch 2.13) calls child 0 of a Sequential ``ff`` ``/ff/ff.0/``, and so it calls that of a ModuleList ``ff`` in
    a module ``ff``.
    """
    first = names_of(site, rung) if rung == "node_name" else None
    modules = site.node.name[1:].split("/")[:-1] if first else []
    once = [m for m, child in zip(modules, [*modules[1:], "."], strict=False) if not child.startswith(f"{m}.")]
    return f"{'.'.join(once)}.{site.parameter}" if len(once) < len(modules) else None


def modules_of(site: Site) -> set[str]:
    """What the site's module is called, by every witness."""
    return {name for rung in MODULES if (name := names_of(site, rung))}


def of_one_module(site: Site, other: Site) -> bool:
    """Whether two uses of one weight are calls of one module, as far as names tell: metadata names a module, not its call."""
    first, second = (names_of(use, "name_scopes") for use in (site, other))
    if first and second:
        return first == second
    return any(same_module(name, called) for name in modules_of(site) for called in modules_of(other))


def _of_builder(module: str) -> str:
    """The module in Transformers: the builder says ``attn`` wherever these say ``self_attn``."""
    return module.replace(".attn.", ".self_attn.")


def own_copy(root_name: str) -> str | None:
    """The target for which an earlier merge made this tensor (``merge`` names it so), or None."""
    match = _OWN_COPY.fullmatch(root_name)
    return match[1] if match else None


def _node_path(node: onnx.NodeProto) -> str | None:
    """torch.onnx (TorchScript): ``/encoder/layer.0/query/MatMul`` is the operator in module ``encoder.layer.0.query``.

    A second operator of a kind is ``MatMul_1``. Quantisers keep the name and change the operator (ONNX Runtime 1.32:
    ``MatMul_quant``, ``MatMul_Q4``).
    """
    if not node.name.startswith("/"):
        return None
    *modules, operator = node.name[1:].split("/")
    spelled_so = _NUMBER.sub("", operator) == node.op_type or _QUANTISED.search(operator)
    return ".".join(modules) if modules and spelled_so else None


def same_module(name: str, other: str) -> bool:
    """Whether two paths are two calls of one module: TorchScript numbers the second ``q_proj_1``.

    Says so only of paths that differ by such a suffix on a component; that both use one weight is for the caller to see.

    >>> same_module("m.q_proj", "m.q_proj_1"), same_module("m.0.q", "m.1.q")
    (True, False)
    """
    first, second = name.split("."), other.split(".")
    if len(first) != len(second):
        return False
    return all(a == b or re.fullmatch(rf"{re.escape(a)}_\d+", b) for a, b in zip(first, second, strict=True))
