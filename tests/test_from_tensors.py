"""Adapters from arrays that a program holds: read by the layouts' own readers, as if they lay in a file."""

import json

import ml_dtypes
import numpy as np
import pytest
from peft_goldens import adapter_of
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import file, testing
from loraformat.layout import ReadOptions


@pytest.mark.parametrize("golden", ["linear", "gpt2", "rslora_patterns", "conv", "embedding"])
def test_peft_tensors_and_their_configuration_are_the_adapter_of_the_folder(golden):
    folder = adapter_of(golden)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    made, read = lf.from_tensors(tensors, config), lf.load(folder)
    assert lf.digest(made) == lf.digest(read)
    assert made.base_model == read.base_model
    assert {k: u.placement for k, u in made.items()} == {k: u.placement for k, u in read.items()}


def test_the_order_of_patterns_is_kept():
    tensors = {
        "base_model.model.x.q_proj.lora_A.weight": np.ones((2, 3), np.float32),
        "base_model.model.x.q_proj.lora_B.weight": np.ones((5, 2), np.float32),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "alpha_pattern": {"q_proj": 7, "x.q_proj": 9}}
    assert lf.from_tensors(tensors, config)["x.q_proj.weight"]["lora"].alpha == 7
    config["alpha_pattern"] = dict(reversed(config["alpha_pattern"].items()))
    assert lf.from_tensors(tensors, config)["x.q_proj.weight"]["lora"].alpha == 9


def test_a_configuration_as_peft_holds_it_has_sets():
    tensors = load_file(adapter_of("linear") / "adapter_model.safetensors")
    config = json.loads((adapter_of("linear") / "adapter_config.json").read_text())
    config["target_modules"] = set(config["target_modules"])
    assert len(lf.from_tensors(tensors, config)) == 4


def test_a_layout_is_named_where_there_is_no_configuration_and_the_scale_is_stated():
    tensors = load_file(adapter_of("linear") / "adapter_model.safetensors")
    with pytest.raises(lf.LoraFormatError, match="LF-509"):
        lf.from_tensors(tensors, "peft")
    made = lf.from_tensors(tensors, "peft", options=ReadOptions(alpha=3.0, scale_rule="alpha/r"))
    assert {update["lora"].alpha for update in made.values()} == {3.0}


def test_native_tensors_come_with_their_metadata():
    adapter = testing.random_adapter(kinds=["lora", "dora", "rows"])
    text, tensors = file.check(adapter)
    assert lf.digest(lf.from_tensors(tensors, "native", header={"loraformat": text})) == lf.digest(adapter)
    with pytest.raises(lf.LoraFormatError, match="LF-201"):
        lf.from_tensors(tensors, "native")


def test_bfloat16_stays_bfloat16():
    tensors = {
        "m.lora_A.weight": np.ones((2, 3), ml_dtypes.bfloat16),
        "m.lora_B.weight": np.ones((5, 2), ml_dtypes.bfloat16),
    }
    made = lf.from_tensors(tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 1})
    assert made["m.weight"]["lora"].lora_A.dtype == ml_dtypes.bfloat16


def test_what_is_no_array_is_named_all_at_once():
    with pytest.raises(lf.LoraFormatError) as caught:
        lf.from_tensors({"a": object(), "b": ["x"], "c": np.ones(2)}, "peft")
    assert [(p.rule, p.where) for p in caught.value.problems] == [("LF-314", "a"), ("LF-314", "b")]


@pytest.mark.parametrize("config", [{"r": object()}, {"lora_alpha": float("nan")}])
def test_a_configuration_that_is_no_json_is_refused(config):
    with pytest.raises(lf.LoraFormatError, match="LF-503"):
        lf.from_tensors({"a": np.ones(2)}, {"peft_type": "LORA", **config})


def test_an_unknown_layout_is_refused_with_the_nearest():
    with pytest.raises(lf.LoraFormatError, match='Did you mean "peft"'):
        lf.from_tensors({}, "pef")
