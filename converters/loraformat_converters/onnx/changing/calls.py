"""Which calls of a module a graph still has, by the numbers that exporters give them: a call that is there was not computed ahead.

torch.fx numbers the operators of a whole model in their order, ``linear``, ``linear_1``, …, which torch's dynamo exporter
(2.13) keeps as the names of values and nodes; TorchScript numbers the calls of a module, ``/q/MatMul``, ``/q_1/MatMul``. Whatever
runs behind a stored tensor runs after that was computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraformat_converters.onnx.graph.trace import Value

if TYPE_CHECKING:
    import onnx

    from loraformat_converters.onnx.graph.index import Index, Site
    from loraformat_converters.onnx.graph.scopes import Scope

__all__ = ["Calls", "kinds", "numbered"]

_PRODUCT = r"addmm|bmm|conv(?:olution|\dd|_transpose\dd)|einsum|embedding|linear|matmul|mm"
_OTHER = (
    r"adaptive_avg_pool\dd|add|alias|amax|arange|avg_pool\dd|cat|chunk|clamp|clone|constant_pad_nd|contiguous|copy|cos|cumsum"
    r"|detach|div|dropout|elu|erf|exp|expand|flatten|flip|full|gather|gelu|getitem|glu|group_norm|hardsigmoid|hardswish"
    r"|index|index_select|instance_norm|layer_norm|leaky_relu|log|log_softmax|masked_fill|max|maximum|max_pool\dd|mean"
    r"|min|minimum|mish|movedim|mul|narrow|native_(?:batch|group|layer)_norm|neg|norm|ones|pad|permute|pow|prelu"
    r"|reciprocal|relu|relu6|repeat|repeat_interleave|reshape|rms_norm|roll|rsqrt|rsub|scaled_dot_product_attention"
    r"|select|selu|sigmoid|silu|sin|slice|softmax|softplus|split(?:_split|_with_sizes)?|sqrt|squeeze|stack|sub|sum|t|tanh"
    r"|to_copy|transpose|unbind|unflatten|unsafe_view|unsqueeze|upsample_[a-z0-9_]+?|view|where|zeros|zeros_like"
)
_NUMBERED = re.compile(rf"(?:node_)?_?(?P<kind>(?P<product>{_PRODUCT})|{_OTHER})(?:_(?P<number>\d+))?(?:_quant|_Q\d+)?")


_IN_MODULE = re.compile(r"/(?P<path>.+?)/[A-Z]\w*(/MatMulAddFusion)?")
"""A node or value of TorchScript, also as onnxslim (0.1.98) and ONNX Runtime (1.32) name what they make of it."""

_BEHIND = frozenset({"Add", "Reshape"})
"""What is named after a product that it was a part of: its bias, or where a tool made two axes of three for a Gemm."""


def numbered(name: str) -> tuple[str, int] | None:
    """The operator in torch and its number, where a value or a node is called so.

    >>> numbered("linear"), numbered("node_conv2d_3"), numbered("q.weight"), numbered("conv4_expand_weights")
    (('linear', 0), ('conv2d', 3), None, None)
    """
    found = _NUMBERED.fullmatch(name)
    return (found["kind"], int(found["number"] or 0)) if found else None


def kinds(index: Index, sites: tuple[Site, ...]) -> set[str]:
    """What torch calls the operators of these sites: by their nodes, what they give, and the sum of a product and its bias."""
    called = ((site, _NUMBERED.fullmatch(name)) for site in sites for name in _names(index, site))
    return {name["kind"] for site, name in called if name and (site.vector or name["product"])}


def _names(index: Index, site: Site) -> Iterator[str]:
    """What the nodes of a call are named, and what they give."""
    home = site.scope.home(site.end.output[0], "defined") or site.scope
    readers = index.readers(Value(home, site.end.output[0])) if not site.vector else []
    behind = (use.node for use in readers if use.node.op_type in _BEHIND)
    for node in (site.node, site.end, *behind):
        yield from (node.name, *node.output)


class Calls:
    """The numbered calls of one graph."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._scope_of = {id(node): scope for scope in index.scopes for node in scope.nodes}
        self._there: dict[str, set[int]] = {}
        for kind, number in filter(None, map(numbered, index.taken)):
            self._there.setdefault(kind, set()).add(number)
        self._behind: dict[str, list[onnx.NodeProto]] = {}

    def accounted(self, stored: str, sites: tuple[Site, ...], module: str) -> bool:
        """Whether no call of the module of these sites can be in what a stored tensor was computed of."""
        behind = {id(node) for node in self.behind(stored)}
        later = [site for site in sites if id(site.node) in behind]
        if any(_first(name, module) for site in later for name in _names(self.index, site)):
            return True
        return any(self._none_lacks(stored, kind) for kind in kinds(self.index, sites))

    def _none_lacks(self, stored: str, kind: str) -> bool:
        """Whether every call of a kind is there that came before a stored tensor."""
        own = numbered(stored)
        after = [own[1]] if own and own[0] == kind else []
        for node in self.behind(stored) if not after else ():
            after += [n for k, n in filter(None, map(numbered, (node.name, *node.output))) if k == kind]
        return bool(after) and set(range(min(after))) <= self._there[kind]

    def behind(self, stored: str) -> list[onnx.NodeProto]:
        """The nodes that compute with a tensor of the main graph, and with what those give."""
        if stored not in self._behind:
            found: dict[int, onnx.NodeProto] = {}
            waiting: list[tuple[Scope, str]] = [(self.index.scopes[0], stored)]
            while waiting:
                for use in self.index.readers(Value(*waiting.pop())):
                    if id(use.node) not in found:
                        found[id(use.node)] = use.node
                        waiting += [(self._scope_of[id(use.node)], name) for name in use.node.output]
            self._behind[stored] = list(found.values())
        return self._behind[stored]


def _first(name: str, module: str) -> bool:
    """Whether TorchScript named an operator after a module's own path, and not after a later call: one may lack its beginning."""
    found = _IN_MODULE.fullmatch(name)
    if found is None:
        return False
    called, meant = found["path"].replace("/", ".").split("."), module.split(".")
    count = min(len(called), len(meant))
    return called[-count:] == meant[-count:]
