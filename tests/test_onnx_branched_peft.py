"""Models that PEFT's layers were exported with, un-merged: the adapter is taken out of the graph as PEFT saved it."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest

pytest.importorskip("torch", reason="needs torch: the peers extra")
pytest.importorskip("peft", reason="needs peft: the peers extra")

import optimised
import torch
from exports import EXPORTERS, RECIPES, Recipe, llama, made, unmerged
from peft import PeftModel

import loraformat as lf
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.graph import extract
from loraformat.verbs.merge import attach

pytestmark = pytest.mark.peer

PREFIXES = {"llama": "m.", "gpt2": "m.", "shared-2d": ""}
"""Model → what it has around the one that PEFT adapted."""


def same(found, wanted, prefix, limit=1e-6):
    """Every target of PEFT's, with its ΔW."""
    assert {key.removeprefix(prefix) for key in found} == set(wanted)
    for key, update in found.items():
        assert relative_error(update.matrix(), wanted[key.removeprefix(prefix)].matrix()) <= limit, key


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", PREFIXES)
def test_every_pair_is_found_with_its_scale(name, exporter, tmp_path):
    path, adapter = unmerged(name, exporter, tmp_path)
    same(extract(open_base(path)), lf.load(adapter), PREFIXES[name])


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_every_target_has_a_b_of_its_own_while_all_are_zero(exporter, tmp_path):
    path, adapter = unmerged("llama", exporter, tmp_path, fresh=True)
    found, wanted = extract(open_base(path)), lf.load(adapter)
    assert len(found) == len(wanted) == RECIPES["llama"].targets
    for key, update in found.items():
        theirs = wanted[key.removeprefix("m.")]
        np.testing.assert_array_equal(update["lora"].lora_A, theirs["lora"].lora_A)
        assert not update["lora"].lora_B.any()
        assert update["lora"].lora_B.shape == theirs["lora"].lora_B.shape


@pytest.mark.parametrize(("tool", "exporter"), [("onnxslim", "dynamo"), ("onnxsim", "torchscript")])
def test_what_a_simplifier_leaves_is_found(tool, exporter, tmp_path):
    simplifier = pytest.importorskip(tool, reason=f"needs {tool}: the peers extra")
    path, adapter = unmerged("bert", exporter, tmp_path)
    made = onnx.load(path)
    made = simplifier.slim(made) if tool == "onnxslim" else simplifier.simplify(made)[0]
    onnx.save(made, tmp_path / "simple.onnx")
    found, wanted = extract(open_base(tmp_path / "simple.onnx")), lf.load(adapter)
    assert len(found) == len(wanted)
    matrices = [update.matrix() for update in wanted.values()]
    for update in found.values():  # where names are gone, each is known by its values
        ours = update.matrix()
        near = [m for m in matrices if m.shape == ours.shape and relative_error(ours, m) <= 1e-6]
        assert len(near) == 1


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", ["dora-2d", "dora-3d"])
def test_a_dora_is_found_with_its_magnitude(name, exporter, tmp_path):
    path, adapter = unmerged(name, exporter, tmp_path)
    found, wanted = extract(open_base(path)), lf.load(adapter)
    same(found, wanted, "")
    for key, update in found.items():
        theirs = wanted[key]
        assert update.kind == theirs.kind == "dora"
        assert relative_error(update["magnitude"].magnitude, theirs["magnitude"].magnitude) <= 1e-6


WHOLE = {"kinds": "", "kinds-dora": "", "llama-task": "m.", "gpt2": "m."}
"""Recipe → what is around PEFT's model."""


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", WHOLE)
def test_a_model_that_peft_wrapped_gives_what_peft_saves(name, exporter, tmp_path):
    path, adapter = unmerged(name, exporter, tmp_path, whole=True)
    found, wanted = extract(open_base(path)), lf.load(adapter)
    assert len(wanted) == RECIPES[name].targets
    same(found, wanted, WHOLE[name])
    for key, update in found.items():
        theirs = wanted[key.removeprefix(WHOLE[name])]
        assert update.kind == theirs.kind
        if update.kind == "dora":
            assert relative_error(update["magnitude"].magnitude, theirs["magnitude"].magnitude) <= 1e-6
    inputs = {name: value.numpy() for name, value in RECIPES[name].inputs().items()}
    attach(found, open_base(tmp_path / "base.onnx"), tmp_path / "ours.onnx")
    ours, theirs, base = (outputs(tmp_path / file, inputs) for file in ("ours.onnx", path.name, "base.onnx"))
    assert relative_error(ours, theirs) <= 1e-5 < 1e-2 < relative_error(base, theirs)


def test_peft_loads_what_was_taken_out_of_its_own_model(tmp_path):
    path, adapter = unmerged("kinds-dora", "torchscript", tmp_path, whole=True)
    lf.save(extract(open_base(path)), tmp_path / "found.lora.safetensors")
    lf.convert(tmp_path / "found.lora.safetensors", tmp_path / "peft", to_layout="peft")
    torch.manual_seed(1)
    bare, inputs = RECIPES["kinds-dora"].build().eval(), RECIPES["kinds-dora"].inputs()
    with torch.no_grad():
        ours, theirs = (
            PeftModel.from_pretrained(copy.deepcopy(bare), folder)(**inputs) for folder in (tmp_path / "peft", adapter)
        )
        assert relative_error(ours.numpy(), theirs.numpy()) <= 1e-5
        assert relative_error(ours.numpy(), bare(**inputs).numpy()) > 1e-2


def outputs(path, inputs):
    """What ONNX Runtime computes."""
    (found,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)
    return found


@pytest.mark.slow
def test_what_genai_built_with_an_adapter_gives_it_back(tmp_path):
    pytest.importorskip("onnxruntime_genai", reason="needs the peer onnxruntime-genai")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    recipe = Recipe(
        lambda: llama(tied=False, head_dim=16), {"target_modules": modules, "r": 4, "lora_alpha": 5}, targets=14
    )
    given = made(recipe, "torchscript", tmp_path)
    optimised.build(given.checkpoint, "fp32", tmp_path / "built", given.adapter)
    # The builder multiplies the scale into B: one rounding of each value.
    same(extract(open_base(tmp_path / "built" / "model.onnx")), lf.load(given.adapter), "")
