"""What a site is called, by each witness: the exporter's metadata, the stored tensor, the node's own name."""

from __future__ import annotations

import ast
import re

import onnx

from loraformat_converters.onnx.index import Site

__all__ = ["RUNGS", "names_of", "same_module"]

RUNGS = ("name_scopes", "initializer", "node_name")
"""In the order in which they are reported; where two speak, they must agree."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_OPERATOR = re.compile(r"_\d+$")


def names_of(site: Site, rung: str) -> str | None:
    """The module path (``initializer``: the parameter's name) that one witness gives, or None if it is silent."""
    if rung == "name_scopes":
        return _scope(site.node)
    if rung == "initializer":
        return site.root_name
    return _node_path(site.node)


def _scope(node: onnx.NodeProto) -> str | None:
    """torch.onnx (2.13, dynamo): a Python list of the scopes around the operator, itself last."""
    text = next((p.value for p in node.metadata_props if p.key == _SCOPES), None)
    if text is None:
        return None
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(scopes, list) or len(scopes) < 2 or not isinstance(scopes[-2], str):
        return None
    return scopes[-2] or None


def _node_path(node: onnx.NodeProto) -> str | None:
    """torch.onnx (TorchScript): ``/encoder/layer.0/query/MatMul`` is the operator in module ``encoder.layer.0.query``."""
    if not node.name.startswith("/"):
        return None
    *modules, operator = node.name[1:].split("/")
    if not modules or _OPERATOR.sub("", operator) != node.op_type:
        return None
    return ".".join(modules)


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
