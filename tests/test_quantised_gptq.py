"""GPTQ: what gptqmodel packs, what it means, and the nearest numbers to W + ΔW."""

import numpy as np
import pytest
from quantised_goldens import change, golden, stored, write
from refused import refusal

import loraformat as lf
from loraformat.checkpoint.grids import grid_of
from loraformat.checkpoint.requantised import Values

CASES = {"gptq_4": (64, 96), "gptq_8": (32, 64), "gptq_2_act_order": (32, 96)}
BITS = {"gptq_4": 4, "gptq_8": 8, "gptq_2_act_order": 2}


def config(form="gptq", **more):
    told = {"quant_method": "gptq", "checkpoint_format": form, **more}
    return {"model_type": "llama", "quantization_config": told}


def opened(case, tmp_path):
    _, held, means = golden(case, tmp_path)
    write(tmp_path / "base", held, config())
    return lf.open_base(tmp_path / "base"), held, means


def values(base):
    return Values(grid_of("q.qweight", base.files, base.config))[...]


@pytest.mark.parametrize("case", CASES)
def test_packed_numbers_mean_what_gptqmodel_says(case, tmp_path):
    base, _, means = opened(case, tmp_path)
    assert means.shape == CASES[case][::-1]
    assert np.allclose(values(base), means, rtol=2e-3, atol=1e-4)  # it computes in float16
    assert np.linalg.norm(means) > 5
    grid = Values(grid_of("q.qweight", base.files, base.config))
    assert np.array_equal(grid[3:21], values(base)[3:21])


@pytest.mark.parametrize("case", CASES)
def test_a_merge_stores_the_nearest_numbers_and_nothing_else_changes(case, tmp_path):
    base, held, _ = opened(case, tmp_path)
    out, in_ = CASES[case]
    adapter = change(out, in_, 0.2)
    outcome = lf.merge(adapter, base, tmp_path / "out", requantize=True)
    after = stored(tmp_path / "out")
    assert {key for key in held if not np.array_equal(held[key], after[key])} == {"q.qweight"}
    merged = lf.open_base(tmp_path / "out")
    old, found, delta = values(base), values(merged), adapter["q.weight"].matrix().T
    run = grid_of("q.qweight", base.files, base.config).run(0, in_)
    steps = np.arange(2 ** BITS[case], dtype=np.float32)
    known = (steps - run.zero[..., None]) * run.scale[..., None]
    away = np.abs(found - (old + delta))
    assert np.all(away <= np.abs(known - (old + delta)[..., None]).min(axis=-1) + 1e-5)
    norms = outcome.norms["q.weight"]
    assert norms.loss == pytest.approx(np.linalg.norm(found - old - delta) / np.linalg.norm(delta), rel=1e-5)
    assert 0.01 < norms.loss < 0.9
    assert lf.verify(base, adapter, merged).problems == []
    placed = lf.Adapter({"q.weight": adapter["q.weight"].placed(lf.Placement.of((out, in_), "out,in"))})
    assert lf.verify(base, placed, merged).problems == []
    assert [p.rule for p in lf.verify(base, adapter, base).problems] == ["LF-611"]


@pytest.mark.parametrize("case", CASES)
def test_where_nothing_changes_no_byte_does(case, tmp_path):
    base, _, _ = opened(case, tmp_path)
    lf.merge(change(*CASES[case], 0.0), base, tmp_path / "out", requantize=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()


def test_integers_are_not_rounded_to_unasked_nor_swallow_a_change(tmp_path):
    base, _, _ = opened("gptq_4", tmp_path)
    found, said = refusal(lf.merge, change(64, 96, 0.2), base, tmp_path / "out")
    assert (found, "GPTQ" in said, "--requantize" in said) == ({"LF-608"}, True, True)
    found, said = refusal(lf.merge, change(64, 96, 1e-3), base, tmp_path / "out", requantize=True)
    assert (found, "of ΔW survives in GPTQ" in said) == ({"LF-615"}, True)


UNKNOWN = {
    "no configuration": ({"model_type": "llama"}, {}),
    "another form": (config("marlin"), {}),
    "a zero that ran over": (config(), {"q.qzeros": np.full((3, 8), -1, np.int32)}),
    "groups that are not there": (config(), {"q.g_idx": np.full(96, 7, np.int32)}),
    "no index of groups": (config(), {"q.g_idx": None}),
    "three bits": (config(), {"q.qweight": np.zeros((9, 64), np.int32)}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_refused_by_its_name(name, tmp_path):
    told, more = UNKNOWN[name]
    _, held, _ = golden("gptq_4", tmp_path)
    write(tmp_path / "base", {key: value for key, value in {**held, **more}.items() if value is not None}, told)
    base = lf.open_base(tmp_path / "base")
    found, said = refusal(lf.merge, change(64, 96, 0.2), base, tmp_path / "out", requantize=True)
    assert (found, "q.weight is stored as GPTQ" in said) == ({"LF-608"}, True)


def test_the_second_form_stores_zeros_as_they_are(tmp_path):
    base, held, _ = opened("gptq_4", tmp_path)
    zeros = (held["q.qzeros"].view(np.uint32) + np.uint32(0x11111111)).view(np.int32)
    write(tmp_path / "v2", {**held, "q.qzeros": zeros}, config("gptq_v2"))
    assert np.array_equal(values(lf.open_base(tmp_path / "v2")), values(base))


def test_an_adapter_between_two_packed_models_is_that_of_their_values(tmp_path):
    base, _, _ = opened("gptq_4", tmp_path)
    lf.merge(change(64, 96, 0.3), base, tmp_path / "out", requantize=True)
    found = lf.extract(base, lf.open_base(tmp_path / "out"), rank=64)
    assert (set(found.adapter), found.left_out) == ({"q.weight"}, [])
    moved = (values(lf.open_base(tmp_path / "out")) - values(base)).T
    assert np.allclose(found.adapter["q.weight"].matrix(), moved, atol=1e-4)
    assert found.adapter["q.weight"].placement.shape == (64, 96)


def test_awq_is_refused_for_what_it_did_to_the_weight(tmp_path):
    held = {"q.qweight": np.zeros((8, 1), np.int32), "q.qzeros": np.zeros((1, 1), np.int32)}
    write(tmp_path / "base", {**held, "q.scales": np.ones((1, 8), np.float16)})
    found, said = refusal(
        lf.merge, change(8, 8, 1.0), lf.open_base(tmp_path / "base"), tmp_path / "out", requantize=True
    )
    assert found == {"LF-608"}
    assert "AWQ moved scales from its inputs into it" in said
    assert "quantise the result" in said
