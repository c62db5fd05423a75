"""Where what runs beside an operator meets its output: behind the bias, where the operator feeds nothing but its Add.

The old producer gives up its name to the sum, so that every reader of y, the model's outputs too, sees the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
from onnx import helper

from loraformat_converters.onnx.graph.index import Index, Site, Value
from loraformat_converters.onnx.graph.nodes import Editor, Nodes

__all__ = ["Ends"]


@dataclass
class _End:
    """The node whose output the next change is added to, and the bias that is in it."""

    final: onnx.NodeProto
    bias: str = ""
    anchor: str = ""


class Ends:
    """The ends of all sites of one graph.

    Attributes:
        values: a value of ours → the value of the base in whose place it stands.
    """

    def __init__(self, index: Index, editor: Editor) -> None:
        self.index, self.editor = index, editor
        self.values: dict[str, str] = {}
        self._ends: dict[int, _End] = {}

    def output(self, site: Site) -> str:
        """The value that the next change of this site is added to."""
        return str(self._of(site).final.output[0])

    def add(
        self,
        site: Site,
        run: Nodes,
        change: Callable[[Nodes], str],
        rescaled: Callable[[Nodes, str, str], str] | None = None,
    ) -> None:
        """y + change in the place of y.

        Args:
            change: lays the nodes that compute it.
            rescaled: lays what of y (its value, and the bias in it or "") is kept; None: all.
        """
        end = self._of(site)
        changed = change(run)
        y, base = end.final.output[0], self.index.fresh(f"{run.stem}/base")
        kept = rescaled(run, base, end.bias) if rescaled else base
        total = helper.make_node("Add", [kept, changed], [y], self.index.fresh(f"{run.stem}/add"))
        end.final.output[0] = base
        end.anchor = end.anchor or base
        self.editor.lay(site.scope, end.anchor, [*run.list, total])
        self.values[base] = y
        end.final = total

    def _of(self, site: Site) -> _End:
        return self._ends.get(site.number) or self._ends.setdefault(site.number, self._end(site))

    def _end(self, site: Site) -> _End:
        own = site.bias or ""
        y = Value(site.scope, site.end.output[0])
        readers = self.index.readers(y)
        if own or len(readers) != 1 or readers[0].node.op_type != "Add" or y.name in site.scope.outputs:
            return _End(site.end, own)
        add = readers[0].node
        bias = add.input[1 - readers[0].position]
        before = self.values.get(bias, bias)
        home = site.scope.home(before, "roots")
        if home is None or len(home.roots[before].dims) != 1 or add.output[0] not in site.scope.producers:
            return _End(site.end)
        return _End(add, bias)
