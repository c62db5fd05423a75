"""What torch exported, with every name taken away: the checkpoint tells which weight is which, and the outputs are PEFT's."""

from __future__ import annotations

import onnx
import pytest
from graphs import session

import loraformat as lf
from loraformat.registry import load, open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import attach, merge

pytestmark = pytest.mark.peer

EXPORTERS = ("torchscript", "dynamo")
every_export = pytest.mark.parametrize("exporter", EXPORTERS)
every_model = pytest.mark.parametrize("name", ["bert", "llama", "llama-tied", "gpt2"])
by_both = pytest.mark.parametrize("by", ["fingerprint", "sketch"])


def nameless(path, out):
    """The model with numbers for the names of nodes, values and stored tensors, and without metadata."""
    made = onnx.load(path)
    called = {}
    for tensor in made.graph.initializer:
        tensor.name = called.setdefault(tensor.name, f"t{len(called)}")
    for i, node in enumerate(made.graph.node):
        node.name = f"n{i}"
        del node.metadata_props[:]
        for names in (node.input, node.output):
            names[:] = [called.get(n, n) for n in names]
    onnx.save(made, out)
    return out


def hints_for(by, adapter, checkpoint):
    """(adapter, hints) that make one rung speak."""
    base = open_base(checkpoint)
    return (adapter, lf.Hints(base=base)) if by == "fingerprint" else (lf.bind(adapter, base), lf.Hints())


@every_model
@every_export
@by_both
def test_a_nameless_export_is_found_by_its_checkpoint(name, exporter, by, export, tmp_path):
    given = export(name, exporter)
    adapter, hints = hints_for(by, load(given.adapter), given.checkpoint)
    base = open_base(nameless(given.model, tmp_path / "base.onnx"))
    found = base.resolve(adapter, hints).require()
    assert (len(found.targets), found.rungs) == (given.targets, by)
    for verb in (merge, attach):
        out = tmp_path / f"{verb.__name__}.onnx"
        verb(adapter, base, out, hints)
        outputs = session(out).run(["out"], dict(given.feeds))[0]
        assert relative_error(outputs, given.truth) <= 1e-5


@every_export
@by_both
def test_names_and_values_agree_on_every_export(exporter, by, export):
    given = export("bert", exporter)
    adapter, hints = hints_for(by, load(given.adapter), given.checkpoint)
    found = open_base(given.model).resolve(adapter, hints).require().targets
    for places in found.values():
        assert [said.partition(":")[0] for said in places[0].evidence][1] == by


@every_export
def test_a_shared_weight_without_names_is_not_guessed(exporter, export, tmp_path):
    given = export("shared-2d", exporter)
    adapter, hints = hints_for("fingerprint", load(given.adapter), given.checkpoint)
    found = open_base(nameless(given.model, tmp_path / "base.onnx")).resolve(adapter, hints)
    assert {p.rule for p in found.ambiguous} == {"LF-609"}
    assert {p.where for p in found.ambiguous} == {"a.weight", "called_twice.weight"}
