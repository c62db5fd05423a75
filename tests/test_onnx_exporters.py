"""Graphs of exporters that keep no name of torch's: found by values, changed, and held against their own framework."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import session
from installed import needs
from safetensors.numpy import load_file

import loraformat as lf
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract
from loraformat.verbs.merge import attach, merge

GOLDEN = Path(__file__).parent / "golden" / "exporters"
CASES = ("jax2onnx", "keras-tensorflow", "keras-torch", "paddle2onnx", "tf2onnx")
VERBS = {"merge": merge, "attach": attach}

every_case = pytest.mark.parametrize("case", CASES)


def given(case, way):
    """(path, adapter, hints, truth): found by the sketches that it brings, or by the arrays of the framework."""
    folder = GOLDEN / case
    adapter, hints = lf.load(folder / "adapter.lora.safetensors"), lf.Hints()
    if way == "base":
        adapter = replace(adapter, targets={k: replace(u, sketch=None) for k, u in adapter.items()})
        hints = lf.Hints(base=open_base(folder / "weights.npz"))
    return folder / "model.onnx", adapter, hints, load_file(folder / "truth.safetensors")


def test_no_golden_is_missing():
    assert {json.loads(p.read_text())["case"] for p in GOLDEN.glob("*/golden.json")} == set(CASES)


@pytest.mark.parametrize("way", ["sketch", "base"])
@pytest.mark.parametrize("verb", VERBS)
@every_case
def test_a_graph_computes_what_its_framework_does_with_the_change(case, verb, way, tmp_path):
    if case == "jax2onnx":
        needs("opset 23")
    path, adapter, hints, truth = given(case, way)
    base, out = open_base(path), tmp_path / "out.onnx"
    found = base.resolve(adapter, hints).require().targets
    rungs = {"sketch": ("sketch:",), "base": ("fingerprint:", "sketch:")}[way]
    assert all(places[0].evidence[0].startswith(rungs) for places in found.values())
    VERBS[verb](adapter, base, out, hints)
    onnx.checker.check_model(out, full_check=True)
    feeds = {value.name: truth[value.name] for value in onnx.load(path).graph.input}
    (before,), (after,) = (session(name, optimise=False).run(None, feeds) for name in (path, out))
    assert relative_error(before, truth["base"]) <= 1e-5
    assert relative_error(after, truth["adapted"]) <= 1e-5
    assert relative_error(truth["base"], truth["adapted"]) > 0.05
    if verb == "attach":
        assert lf.digest(extract(open_base(out))) == lf.digest(adapter)
        detach(open_base(out), tmp_path / "again.onnx")
        assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@every_case
def test_without_values_nothing_is_guessed(case):
    path, adapter, _, _ = given(case, "base")
    found = open_base(path).resolve(adapter, lf.Hints())
    assert not found.targets
    assert {problem.rule for problem in found.unresolved} == {"LF-602"}


@every_case
def test_the_right_weight_and_no_other_is_found(case):
    """Every matrix of the framework is at the place where its own values are."""
    path, adapter, hints, _ = given(case, "sketch")
    base, arrays = open_base(path), np.load(GOLDEN / case / "weights.npz")
    for key, places in base.resolve(adapter, hints).require().targets.items():
        for match in places:
            value, place = base.values.read(match.handle)
            wanted = adapter[key].placement.to_matrix(arrays[key])
            np.testing.assert_allclose(place.to_matrix(value), wanted, rtol=1e-6)
