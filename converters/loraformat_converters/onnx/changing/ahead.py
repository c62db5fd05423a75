"""Products that were computed ahead: a call of a module on a constant is a stored tensor, which no change reaches.

torch's exporter folds them, and so does every optimiser: the learned queries of a decoder, the start of a cell, a token that
is looked up. The calls that are left are changed, this one is not: the model would be neither the old nor the new.

torch's dynamo exporter writes what it computed of what. Without that a stored tensor is a module's if its values are, or its
name; of what was computed further nothing tells, and it may be any module's whose calls are not all accounted for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx

from loraformat.errors import Problem
from loraformat_converters.onnx.changing.calls import Calls, kinds, numbered
from loraformat_converters.onnx.changing.reproduced import Answer, kind_of, module_of, sizes_of
from loraformat_converters.onnx.finding.names import modules_of, names_of, parameter_of, same_module
from loraformat_converters.onnx.graph.exported import folded_from
from loraformat_converters.onnx.graph.model import FLOATS, array
from loraformat_converters.onnx.graph.operators import WEIGHTS

if TYPE_CHECKING:
    from loraformat_converters.onnx.changing.reproduced import Array
    from loraformat_converters.onnx.changing.spots import Change
    from loraformat_converters.onnx.graph.index import Site
    from loraformat_converters.onnx.graph.values import Values

__all__ = ["computed_ahead"]

_TOOL = re.compile(r"/((?P<module>.+)/)?(?P<operator>[A-Za-z]\w*?)(_\d+)?_output_\d+")
"""How TorchScript (torch 2.13) calls a node's value; onnxslim, onnxsim and ONNX Runtime keep that for what they computed."""

_AT_EXPORT = re.compile(r"onnx::\w+_\d+")
"""How TorchScript calls what it computed itself: rows of a table, never a product (torch 2.13, onnx/constant_fold.cpp)."""

_OWN = re.compile(r"val_\d+|_v_\d+")
"""How onnxscript (0.7.2) and onnxsim (0.8) call a value in between; a turned weight too."""

_FIX = "export with that constant as an input, or merge into the checkpoint, then export"
_OR = (
    "attach to the model as it was exported, and run the tool that lost what tells afterwards; or, if that is none of this "
    'target\'s, name the node: --names map.json with {{"{}": "{}"}}'
)


def computed_ahead(
    values: Values, changes: Iterable[tuple[tuple[Site, ...], list[Change]]], named: Collection[str] = ()
) -> Iterator[Problem]:
    """LF-608 for every change of a weight or bias of which a product is stored too, or may be.

    Args:
        named: the targets whose nodes the user named: what only may be is not theirs.
    """
    stored = _Stored(values)
    for sites, (change, *_) in changes:
        answers = ((name, stored.answer(name, sites, change.key)) for name in stored.names)
        wanted = (Answer.PRODUCT,) if change.key in named else (Answer.PRODUCT, Answer.UNKNOWN)
        name, answer = next((found for found in answers if found[1] in wanted), ("", Answer.NO))
        if answer is Answer.PRODUCT:
            what = f"a product of it and a constant was computed when the model was exported or optimised, and is stored as {name}"
            yield Problem("LF-608", what, change.key, _FIX)
        elif answer is Answer.UNKNOWN:
            what = (
                f"a product of it and a constant may be what is stored as {name}: nothing shows what "
                "that was computed of"
            )
            yield Problem("LF-608", what, change.key, _OR.format(change.key, sites[0].node.name))
        elif _lacks_first(sites) and not stored.of_zeros(sites):
            what = f"{sites[0].node.name} is a later call of its module, and the first was computed ahead, or left out"
            yield Problem("LF-608", what, change.key, _FIX)


def _lacks_first(sites: tuple[Site, ...]) -> bool:
    """Whether nodes are named after later calls alone of the module that the tensor is named after."""
    module = sites[0].root_name.rpartition(".")[0]
    paths = {names_of(site, "node_name") for site in sites}
    return module not in paths and all(path is not None and same_module(module, path) for path in paths)


class _Stored:
    """The stored tensors that were computed of others, as far as their names tell."""

    def __init__(self, values: Values) -> None:
        self.values, self.index = values, values.index
        self.sources, self.calls = folded_from(values.index.graph), Calls(values.index)
        products = [s for s in self.index.sites if s.node.op_type in WEIGHTS and not s.vector]
        turned = {(s.root_name, p) for s in products if _is_weight(s) for p in (*modules_of(s), "")}
        real = [
            name
            for name, tensor in self.index.roots.items()
            if tensor.data_type in FLOATS and any(n > 1 for n in tensor.dims)
        ]
        called = [
            n
            for n in real
            if _is_value(n, self.index.roots[n]) and (n, "" if _of_weights(n) else _path(n)) not in turned
        ]
        self.names = [name for name in real if name in self.sources] if self.sources else called
        self._sizes = {site.placement.matrix_shape[-2] for site in products}
        self._answers: dict[tuple[str, int], Answer] = {}
        self._read: dict[str, Array] = {}

    def answer(self, name: str, sites: tuple[Site, ...], key: str) -> Answer:
        """Whether a change at these sites would have changed a stored tensor; UNKNOWN where nothing tells that it would not."""
        site = sites[0]
        if self.sources:
            return Answer.PRODUCT if self._made_of(name, sites) else Answer.NO
        path, called = _path(name), {module for site in sites for module in modules_of(site)}
        mine = path and any(same_module(*pair) for module in called for pair in ((module, path), (path, module)))
        if any(name == own.root_name for own in sites) or not self._fits(name, site, cut=bool(mine)):
            return Answer.NO
        if _AT_EXPORT.fullmatch(name) or self._looked_up(name):
            itself = site.looks_up and self._compared(name, site) is Answer.PRODUCT
            return Answer.PRODUCT if itself else Answer.NO
        accounted = self.calls.accounted(name, sites, key.rpartition(".")[0])
        direct = (numbered(name) or ("",))[0] in kinds(self.index, sites)
        if accounted and not (mine or direct):
            return Answer.NO
        own = self._compared(name, site)
        if own in (Answer.PRODUCT, Answer.BIAS):
            return Answer.PRODUCT if own is Answer.PRODUCT or site.vector else Answer.NO
        others = [other for other in self.index.sites if other not in sites]
        biases = (other for other in others if other.vector or other.bias)
        if any(self._compared(name, other) is Answer.BIAS for other in biases):
            return Answer.NO
        if not (mine or direct):
            return Answer.UNKNOWN if _may_be(name, site, key) else Answer.NO
        explained = any(self._compared(name, other) is Answer.PRODUCT for other in others)
        if mine:
            return Answer.NO if explained else Answer.PRODUCT
        return Answer.NO if accounted and (explained or own is Answer.NO) else Answer.UNKNOWN

    def _looked_up(self, name: str) -> bool:
        """Whether it is rows of a table, and depends on nothing else: torch's embedding, TorchScript's Gather that is all of a module."""
        called = _TOOL.fullmatch(name)
        if called is None:
            return (numbered(name) or ("",))[0] == "embedding"
        if called["operator"] != "Gather" or not called["module"] or len(self.index.roots[name].dims) < 3:
            return False  # x[:, 0] of any value has fewer axes
        within = f"/{called['module']}/"
        return not any("/" in other.removeprefix(within) for other in self.index.taken if other.startswith(within))

    def of_zeros(self, sites: tuple[Site, ...]) -> bool:
        """Whether the first call of the module that a weight is named after was one of zeros: it gave the bias, whatever W is."""
        module, site = sites[0].root_name.rpartition(".")[0], sites[0]
        return not site.vector and any(
            _path(name) == module and self._compared(name, site) is Answer.BIAS for name in self.names
        )

    def _made_of(self, name: str, sites: tuple[Site, ...]) -> bool:
        """By what the exporter wrote, whether a stored tensor was computed of the parameter of these sites and of others."""
        roots = {site.root_name for site in sites}
        own = roots | {source for site in sites for source in self._parameters(site)}
        if name in roots or own.isdisjoint(self.sources.get(name, ())):
            return False
        held, root = self._values(name), sites[0].root
        if not held.any() or (not sites[0].vector and self._compared(name, sites[0]) is Answer.BIAS):  # of zeros
            return False
        weight = array(root, self.values.folder).astype(np.float32) if math.prod(root.dims) == held.size else held[:0]
        return not np.array_equal(np.sort(held, None), np.sort(weight, None))  # W itself, turned once more

    def _parameters(self, site: Site) -> set[str]:
        """The names of the parameters that the weight of a site was computed of."""
        sources, named = self.sources.get(site.root_name, frozenset()), parameter_of(site, "name_scopes")
        if named in sources:
            return {named}
        return {s for s in sources if "." in s or not (_OWN.fullmatch(s) or numbered(s) or s.endswith("_default"))}

    def _fits(self, name: str, site: Site, *, cut: bool) -> bool:
        """Whether it is as wide as what some product gives, or, ``cut``, a part of this one, and no mask."""
        out = site.placement.matrix_shape[-2]
        sizes = self._sizes | {out // parts for parts in (1, 2, 3, 4) if cut or parts == 1}
        if sizes.isdisjoint(sizes_of(tuple(self.index.roots[name].dims))):
            return False
        held = self._values(name)
        return bool(((held != held.min()) & (held != held.max())).any())

    def _compared(self, name: str, site: Site) -> Answer:
        """By values, whether it is what the product of a site gave."""
        key = name, id(site.node)
        if key not in self._answers:
            module = module_of(self.values, site, frozenset(self.names))
            self._answers[key] = Answer.NO if module is None else module.gives(self._values(name))
        return self._answers[key]

    def _values(self, name: str) -> Array:
        if name not in self._read:
            self._read[name] = array(self.index.roots[name], self.values.folder).astype(np.float32)
        return self._read[name]


def _is_value(name: str, tensor: onnx.TensorProto) -> bool:
    """Whether a tensor goes by the name of what an operator gave; one of a single axis is a parameter that was renamed."""
    called = _TOOL.fullmatch(name)
    computed = called["operator"] != "Constant" if called else numbered(name) or _of_weights(name)
    return len(tensor.dims) > 1 and bool(computed)


def _of_weights(name: str) -> bool:
    return bool(_AT_EXPORT.fullmatch(name) or _OWN.fullmatch(name))


def _is_weight(site: Site) -> bool:
    """Whether a stored tensor is where the weight of a module's product is."""
    matrix = site.position == WEIGHTS[site.node.op_type][0] and len(site.operand.shape) == 2 and not site.looks_up
    return matrix or "Conv" in site.like


def _may_be(name: str, site: Site, key: str) -> bool:
    """Whether a stored tensor of which nothing else tells may be of a module's product: an image is seldom a constant, nor a token."""
    kind, called = kind_of(site), (numbered(name) or ("",))[0]
    if kind == "linear":
        return _reaches(next(iter(modules_of(site)), key.rpartition(".")[0]), _path(name))
    return called.startswith("conv" if kind == "convolution" else "embedding")


def _reaches(module: str, path: str | None) -> bool:
    """Whether what a module gave may have been computed further in a path: in what calls the module, or what that calls too.

    One of the two may begin at a wrapper of the other's root. What tells no path may be anybody's.
    """
    caller, scope = module.split(".")[:-1], path.split(".") if path else []
    if not caller or len(scope) < 2:
        return True
    pairs = [(caller, scope[n:]) for n in range(len(scope))] + [(caller[n:], scope) for n in range(len(caller))]
    return any(all(a == b for a, b in zip(one, other, strict=False)) for one, other in pairs)


def _path(name: str) -> str | None:
    """The call of a module that gave a value, where its name tells."""
    called = _TOOL.fullmatch(name)
    if called is None or not called["module"]:
        return None
    return called["module"].replace("/", ".")
