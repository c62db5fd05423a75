"""The layout of diffusers: files by the tool itself, with the ΔW that it computed (tests/golden/diffusers/make.py)."""

import json

import numpy as np
import pytest
from diffusers_goldens import CASES, FILE, GOLDEN, check_deltas
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import registry
from loraformat.layout import ReadOptions
from loraformat.testing import LayoutLaws, check_claimed_alone
from loraformat.verbs.convert import save
from loraformat_converters.diffusers import layout


@pytest.mark.parametrize("case", CASES)
def test_what_diffusers_saves_is_read_with_the_change_that_it_computes(case):
    check_deltas(lf.load(GOLDEN / case / FILE), case)


@pytest.mark.parametrize("case", CASES)
def test_it_is_told_by_its_content_alone(case, tmp_path):
    path = GOLDEN / case / FILE
    check_claimed_alone(layout, path)
    renamed = tmp_path / "style.safetensors"
    renamed.write_bytes(path.read_bytes())
    check_claimed_alone(layout, renamed)


class TestLaws(LayoutLaws):
    layout = layout
    kinds = ("lora", "conv")
    files = tuple(GOLDEN / case / FILE for case in CASES if case != "alphas")


@pytest.mark.parametrize("case", CASES)
def test_a_native_file_and_back_keep_names_numbers_and_header(case, tmp_path):
    path = GOLDEN / case / FILE
    adapter = lf.load(path)
    lf.save(adapter, tmp_path / "a.lora.safetensors")
    lf.convert(tmp_path / "a.lora.safetensors", tmp_path / FILE)
    before, after = (registry.open_source(p) for p in (path, tmp_path / FILE))
    assert {n for n in before.tensors if not n.endswith(".alpha")} == set(after.tensors)
    if case != "alphas":
        assert before.header == after.header
    assert lf.digest(lf.load(tmp_path / FILE)) == lf.digest(adapter)


# What the file leaves open.


def load(tensors, header=None, options=None):
    return lf.from_tensors(tensors, "diffusers", header=header, options=options)


def refused(rule, tensors, header=None, options=None):
    with pytest.raises(lf.LoraFormatError) as caught:
        load(tensors, header, options)
    assert {p.rule for p in caught.value.problems} == {rule}, caught.value
    return str(caught.value)


def pair(stem, spelling=("lora_A", "lora_B"), rank=2):
    rng = np.random.default_rng(len(stem))
    a, b = rng.standard_normal((rank, 5)), rng.standard_normal((7, rank))
    return {f"{stem}.{spelling[0]}.weight": a.astype("f4"), f"{stem}.{spelling[1]}.weight": b.astype("f4")}


LORA = ("lora.down", "lora.up")


def test_a_file_without_any_scale_is_scale_one_and_says_so():
    reading, _, _ = registry.read(GOLDEN / "sd-no-header" / FILE)
    assert {update.scale for update in reading.adapter.values()} == {1.0}
    assert [(p.rule, p.severity) for p in reading.warnings] == [("LF-509", "warning")] * 2


def test_a_stated_alpha_counts_where_the_file_has_none():
    adapter = load(pair("unet.a.to_q", LORA), options=ReadOptions(alpha=6.0, scale_rule="alpha/r"))
    assert adapter["unet:a.to_q.weight"].scale == 3.0


def test_a_stated_alpha_that_contradicts_the_header_is_refused():
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    refused("LF-507", pair("unet.a.to_q"), header, ReadOptions(alpha=6.0))


def test_an_alpha_and_a_header_that_differ_are_refused():
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    tensors = pair("unet.a.to_q") | {"unet.a.to_q.alpha": np.float32(3)}
    assert "its alpha is 3, and 4" in refused("LF-507", tensors, header)
    assert load(tensors | {"unet.a.to_q.alpha": np.float32(4)}, header)["unet:a.to_q.weight"].scale == 2.0


def test_alphas_of_some_modules_are_refused():
    tensors = pair("transformer.a.to_q") | pair("transformer.a.to_kk") | {"transformer.a.to_q.alpha": np.float32(3)}
    assert "transformer: a.to_kk" in refused("LF-509", tensors)


def test_a_header_that_says_nothing_of_a_component_is_refused():
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    tensors = pair("unet.a.to_q") | pair("text_encoder.a.q_proj", ("lora_linear_layer.down", "lora_linear_layer.up"))
    refused("LF-509", tensors, header)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"vae.r": 2}', '{"unet.r": NaN}', "[" * 100_000])
def test_a_damaged_header_is_refused(text):
    refused("LF-503", pair("unet.a.to_q"), {"lora_adapter_metadata": text})


def test_an_initialisation_that_moved_the_base_is_refused():
    header = {
        "lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.init_lora_weights": "pissa"})
    }
    refused("LF-504", pair("unet.a.to_q"), header)


def test_a_magnitude_that_diffusers_would_drop_is_refused():
    tensors = pair("unet.a.to_q", LORA) | {"unet.a.to_q.dora_scale": np.ones((7, 1), np.float32)}
    assert "drops" in refused("LF-504", tensors)


def test_a_tensor_outside_of_the_components_is_refused():
    refused("LF-506", pair("unet.a.to_q", LORA) | pair("b.to_k", LORA))


def test_two_spellings_of_one_factor_are_refused():
    refused("LF-506", pair("unet.a.to_q") | pair("unet.a.to_q", LORA))


@pytest.mark.parametrize("alpha", [np.zeros(0, np.float32), np.zeros(2, np.float32), np.float32("nan"), np.array(True)])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    refused("LF-306", pair("unet.a.to_q") | {"unet.a.to_q.alpha": alpha})


@pytest.mark.parametrize(
    ("rule", "factor"),
    [("LF-309", np.float32(1)), ("LF-309", np.ones(2, np.float32)), ("LF-311", np.ones((0, 5), np.float32)),
     ("LF-314", np.ones((2, 5), np.int32))],
)  # fmt: skip
def test_a_factor_that_is_no_matrix_is_refused(rule, factor):
    refused(rule, pair("unet.a.to_q", LORA) | {"unet.a.to_q.lora.down.weight": factor})


def test_a_lone_factor_is_refused():
    tensors = pair("unet.a.to_q", LORA)
    del tensors["unet.a.to_q.lora.up.weight"]
    refused("LF-303", tensors)


def test_two_spellings_in_one_model_are_read_whole_and_written_in_one_that_diffusers_loads_whole(tmp_path):
    save_file(pair("unet.a.proj_in") | pair("unet.a.to_q", LORA), tmp_path / "mixed.safetensors")
    reading, _, _ = registry.read(tmp_path / "mixed.safetensors")
    assert len(reading.adapter) == 2
    assert [(p.rule, p.where) for p in reading.warnings if p.rule == "LF-506"] == [("LF-506", "unet: a.to_q")]
    save(reading.adapter, tmp_path / FILE, layout)
    assert all("lora_" in name for name in load_file(tmp_path / FILE))


# What diffusers cannot hold.


def not_written(adapter, tmp_path):
    with pytest.raises(lf.LoraFormatError) as caught:
        save(adapter, tmp_path / FILE, layout)
    assert {p.rule for p in caught.value.problems} == {"LF-508"}, caught.value
    assert not list(tmp_path.iterdir())
    return str(caught.value)


def of(*parts, key="unet:a.to_q.weight", components=("unet",), **more):
    return lf.Adapter({key: lf.Update(parts, **more)}, components=components)


PAIR = lf.Lora(np.ones((2, 5), np.float32), np.ones((7, 2), np.float32), 3.0, "alpha/r")


def test_a_component_that_no_pipeline_has_is_not_written(tmp_path):
    assert "'vision'" in not_written(of(PAIR, key="vision:a.weight", components=("vision",)), tmp_path)


def test_an_embedding_and_a_named_parameter_are_not_written(tmp_path):
    place = lf.Placement((5, 7), (1,), (0,))
    not_written(of(PAIR, placement=place, op="embedding"), tmp_path)
    not_written(of(PAIR, key="unet:a.experts", placement=lf.Placement.of((7, 5), "out,in")), tmp_path)


def test_names_of_another_space_are_not_written(tmp_path):
    not_written(lf.Adapter({"a": lf.Update((PAIR,))}, "gguf"), tmp_path)


def test_a_scale_in_the_header_is_said(tmp_path):
    said = save(of(PAIR), tmp_path / FILE, layout)
    assert [(p.rule, p.severity) for p in said] == [("LF-509", "warning")]
    assert "--fold-scale" in said[0].fix


# Files by strangers.


def test_names_by_numbers_are_refused_by_what_they_are(tmp_path):
    save_file({"text_encoder:0:down": np.ones((1, 4), np.float32), "text_encoder:0:up": np.ones((4, 1), np.float32)},
              tmp_path / "a.safetensors", {"text_encoder:0:rank": "1"})  # fmt: skip
    with pytest.raises(lf.LoraFormatError, match="cloneofsimo") as caught:
        lf.load(tmp_path / "a.safetensors")
    assert {p.rule for p in caught.value.problems} == {"LF-504"}


@pytest.mark.parametrize("root", ["transformer.h.0.attn.c_attn", "transformer.blocks.0.attn.q"])
def test_a_language_model_that_is_called_transformer_is_not_taken_for_a_pipeline(root, tmp_path):
    save_file(pair(root), tmp_path / "a.safetensors")
    assert registry.detect(registry.open_source(tmp_path / "a.safetensors"))[0].name == "peft"
