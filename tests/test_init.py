"""init: fresh adapters, the same for a seed on every machine, that change nothing until they are trained."""

import json

import numpy as np
import pytest
from graphs import model, save
from peft_goldens import base_of
from safetensors.numpy import save_file

import loraformat as lf

BASE = str(base_of("gpt2"))


def test_init_gives_the_same_bytes_for_the_same_seed_everywhere(run, tmp_path):
    words = ["init", BASE, "-t", "c_fc", "-t", "attn.c_proj", "-r", "4", "-a", "8"]
    for name in ("one", "two"):
        assert run(*words, "--seed", "7", "-o", f"{name}.safetensors").code == 0
    assert run(*words, "--seed", "8", "-o", "other.safetensors").code == 0
    one, two, other = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("one", "two", "other"))
    assert one == two != other
    assert lf.digest(lf.load(tmp_path / "one.safetensors")) == DIGEST


DIGEST = "b407723b82857db747dd71d28bdf8cf6abfde873ebbe807c6f5675f68105c909"


def test_init_makes_an_adapter_that_changes_nothing_yet(run, tmp_path):
    run("init", BASE, "-t", "h.*.mlp.c_fc", "-r", "4", "-a", "8", "-o", "i.safetensors")
    adapter = lf.load(tmp_path / "i.safetensors")
    assert sorted(adapter) == [f"transformer.h.{i}.mlp.c_fc.weight" for i in (0, 1)]
    update = adapter["transformer.h.0.mlp.c_fc.weight"]
    assert (update.rank, update.scale) == (4, 2.0)
    assert (update["lora"].lora_A.shape, update["lora"].lora_B.shape) == ((4, 24), (40, 4))
    assert not update.delta().any()
    assert update["lora"].lora_A.all()


def wide(tmp_path):
    """A base whose single weight is wide enough for statistics."""
    save_file({"model.wide.weight": np.zeros((3, 40_000), np.float32)}, tmp_path / "wide.safetensors")
    return [
        "init",
        "wide.safetensors",
        "-t",
        "wide",
        "-r",
        "4",
        "-a",
        "8",
        "--axes",
        "wide=out,in",
        "-o",
        "i.safetensors",
    ]


def test_init_draws_a_with_the_sigma_that_was_asked_for(run, tmp_path):
    run(*wide(tmp_path), "--sigma", "0.02")
    a = lf.load(tmp_path / "i.safetensors")["model.wide.weight"]["lora"].lora_A.astype(np.float64)
    assert abs(a.mean()) < 5 * 0.02 / 400
    assert a.std() == pytest.approx(0.02, rel=5 / (2 * 160_000) ** 0.5)
    assert np.mean(np.abs(a) > 0.04) == pytest.approx(0.0455, abs=0.003)


def test_init_draws_a_with_one_over_the_rank_by_default(run, tmp_path):
    run(*wide(tmp_path))
    assert lf.load(tmp_path / "i.safetensors")["model.wide.weight"]["lora"].lora_A.std() == pytest.approx(
        0.25, rel=0.01
    )


def test_init_kaiming_is_uniform_within_one_over_the_root_of_in(run, tmp_path):
    run(*wide(tmp_path), "--init", "kaiming")
    a = lf.load(tmp_path / "i.safetensors")["model.wide.weight"]["lora"].lora_A.astype(np.float64)
    bound = 1 / 200
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.9999 * bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.01)


def test_init_refuses_a_weight_that_nothing_places_and_takes_the_users_word(run, tmp_path):
    words = [*wide(tmp_path)[:8], "-o", "i.safetensors"]
    told = run(*words)
    assert told.code == 1
    assert "LF-604" in told.err
    assert "--axes" in told.err


def test_init_writes_a_peft_folder_too(run, tmp_path):
    assert run("init", BASE, "-t", "c_fc", "-r", "4", "-a", "8", "-o", "fresh").code == 0
    assert sorted(p.name for p in (tmp_path / "fresh").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "fresh" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_a_name_with_a_colon_as_tensorflow_has_it_names_no_component(tmp_path):
    made = model("g (float[N, 7] x) => (float[N, 5] y) <float[7, 5] w> { y = MatMul (x, w) }")
    made.graph.initializer[0].name = made.graph.node[0].input[1] = "dense/kernel:0"
    base = lf.open_base(save(made, tmp_path / "model.onnx"))
    fresh = lf.init(base, ["dense/kernel:0"], rank=2, alpha=4)
    assert (list(fresh), fresh.components) == (["dense/kernel:0"], ())
    lf.save(fresh, tmp_path / "fresh.lora.safetensors")
    assert lf.validate(tmp_path / "fresh.lora.safetensors").valid
