"""What torch's exporter (2.13, dynamo) writes: a node's module and the parameter that it takes, what a value was computed of."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

import onnx

__all__ = ["folded_from", "module", "parameter"]

_SCOPES = "pkg.torch.onnx.name_scopes"
_FX = "pkg.torch.onnx.fx_node"
_FOLDED = "pkg.onnxscript.optimizer.folded_from"
_FIRST = re.compile(r"args = \(%p_(\w+),")
"""How torch.fx spells a parameter as the first argument: its path, with underscores for dots."""

_FACTOR = re.compile(r"\.(?:linear|matmul|mm|bmm)\.default\]\(args = \(%\w+, %p_(\w+)[,)]")
"""The same of what a product multiplies by."""


def module(node: onnx.NodeProto) -> str | None:
    """The path of the module, from a Python list of the scopes around the operator, itself last."""
    text = _written(node, _SCOPES)
    if text is None:
        return None
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(scopes, list) or len(scopes) < 2 or not isinstance(scopes[-2], str):
        return None
    return scopes[-2] or None


def parameter(node: onnx.NodeProto, *, factor: bool) -> str | None:
    """The module's own name of the parameter that comes first, or that is the ``factor``; None where it is not one of that module."""
    path, found = module(node), (_FACTOR if factor else _FIRST).search(_written(node, _FX) or "")
    own = f"{path.replace('.', '_')}_" if path else ""
    return found[1].removeprefix(own) if found and own and found[1].startswith(own) else None


def _written(node: onnx.NodeProto, key: str) -> str | None:
    return next((p.value for p in node.metadata_props if p.key == key), None)


def folded_from(graph: onnx.GraphProto) -> Mapping[str, frozenset[str]]:
    """Stored tensor → every constant that it was computed of, the parameters by their own names too; empty where nothing says.

    What folds in torch's dynamo exporter writes it beside the value (onnxscript 0.7.2, optimizer/_constant_folding.py). onnxsim,
    onnxslim and ONNX Runtime drop it, of every value: where it is written at all, what has none was not computed.
    """
    texts = {v.name: p.value for v in graph.value_info for p in v.metadata_props if p.key == _FOLDED}
    return {name: frozenset(re.findall(r"'([^']+)'", text)) for name, text in texts.items()}
