"""Bases in fewer bits: what their values mean by the tools' own word, what of a change survives in them, what is refused."""

import numpy as np
import pytest
from quantised_goldens import BF16, F8, LLAMA, change, golden, stored, write
from refused import refusal
from safetensors.numpy import load_file, save_file
from updates import normal

import loraformat as lf
from loraformat.checkpoint.eight_bits import Scaling
from loraformat.checkpoint.grids import grid_of


def scaled(base, name="q.weight"):
    """The factor of every value."""
    grid = grid_of(name, base.files, base.config)
    return np.broadcast_to(grid.scaling.rows(0, *grid.shape), grid.shape)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_stored_values_mean_what_the_tool_that_wrote_them_says(name, tmp_path):
    base, held, means = golden(name, tmp_path)
    assert np.allclose(held["q.weight"].astype(np.float32) * scaled(base), means, rtol=1e-6, atol=1e-7)
    assert np.linalg.norm(means) > 10


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_merge_stores_the_nearest_values_of_the_same_scale_and_nothing_else_changes(name, tmp_path):
    base, held, means = golden(name, tmp_path)
    adapter = change(150, 260, 0.1)
    outcome = lf.merge(adapter, base, tmp_path / "out", requantize=True)
    after = stored(tmp_path / "out")
    assert {key for key in held if not np.array_equal(held[key].view(np.uint8), after[key].view(np.uint8))} == {
        "q.weight"
    }
    factor, wanted = scaled(base), means + adapter["q.weight"].matrix()
    found = after["q.weight"].astype(np.float32) * factor
    most = {"int8": 127, "fp8": 448}[name]
    inside = np.abs(wanted / factor) < most
    q = np.abs(wanted / factor)
    half = factor * (
        0.5 if name == "int8" else np.maximum(2.0 ** np.floor(np.log2(np.maximum(q, 2.0**-6))) / 16, 2.0**-10)
    )
    assert np.all((np.abs(found - wanted) <= half * 1.001)[inside])
    assert 0.9 < inside.mean() < 1
    assert np.allclose(found[~inside], np.sign(wanted[~inside]) * most * factor[~inside])
    norms = outcome.norms["q.weight"]
    delta = adapter["q.weight"].matrix()
    assert norms.loss == pytest.approx(np.linalg.norm(found - means - delta) / np.linalg.norm(delta), rel=1e-3)
    assert lf.verify(base, adapter, lf.open_base(tmp_path / "out")).problems == []
    broken = after["q.weight"].view(np.uint8).copy()
    broken[3, 4] ^= 1
    write(tmp_path / "broken", {**after, "q.weight": broken.view(after["q.weight"].dtype)})
    (problem,) = lf.verify(base, adapter, lf.open_base(tmp_path / "broken")).problems
    assert problem.what == "1 of 39000 values are not W + ΔW rounded to the steps of their scale"


def test_values_without_a_scale_are_rounded_as_they_are(tmp_path):
    weight = (normal(9, 7) * 100).astype(F8)
    write(tmp_path / "base", {"q.weight": weight})
    adapter = change(9, 7, 150.0)
    lf.merge(adapter, lf.open_base(tmp_path / "base"), tmp_path / "out", requantize=True)
    wanted = np.clip(weight.astype(np.float32) + adapter["q.weight"].matrix(), -448, 448).astype(F8)
    assert np.array_equal(stored(tmp_path / "out")["q.weight"].view(np.uint8), wanted.view(np.uint8))
    assert np.any(np.abs(wanted.astype(np.float32)) == 448)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_eight_bits_are_not_rounded_to_unasked(name, tmp_path):
    base, _, _ = golden(name, tmp_path)
    found, said = refusal(lf.merge, change(150, 260, 0.1), base, tmp_path / "out")
    assert found == {"LF-608"}
    assert {"int8": "bitsandbytes LLM.int8", "fp8": "FP8 in blocks"}[name] in said
    assert "--requantize rounds to it and says what survives" in said
    assert not (tmp_path / "out").exists()


def test_a_change_that_eight_bits_swallow_is_refused_and_nothing_is_written(tmp_path):
    base, _, _ = golden("fp8", tmp_path)
    tiny = change(150, 260, 1e-5)
    found, said = refusal(lf.merge, tiny, base, tmp_path / "out", requantize=True)
    assert found == {"LF-615"}
    assert "of ΔW survives in F8_E4M3, the least allowed is 10 %: q.weight " in said
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]
    assert lf.merge(tiny, base, tmp_path / "out", requantize=True, survival=0.0).norms["q.weight"].loss > 0.9


def test_a_change_that_16_bits_swallow_is_refused_too(tmp_path):
    write(tmp_path / "base", {"q.weight": normal(9, 7).astype(BF16), "k.weight": normal(9, 7, seed=5).astype(BF16)})
    base = lf.open_base(tmp_path / "base")
    both = lf.Adapter({**change(9, 7, 1e-5), **change(9, 7, 1e-5, "k.weight")})
    assert refusal(lf.merge, both, base, tmp_path / "out")[0] == {"LF-615"}
    mixed = lf.Adapter({**change(9, 7, 1e-5), **change(9, 7, 1.0, "k.weight")})
    assert lf.merge(mixed, base, tmp_path / "out").norms["q.weight"].loss > 0.9


def test_a_file_is_refused_as_a_folder_is(tmp_path):
    save_file({"q.weight": np.asarray(normal(9, 7), np.float16)}, tmp_path / "base.safetensors")
    adapter = lf.Adapter(
        {key: update.placed(lf.Placement.of((9, 7), "out,in")) for key, update in change(9, 7, 1e-6).items()}
    )
    assert refusal(lf.merge, adapter, lf.open_base(tmp_path / "base.safetensors"), tmp_path / "out.safetensors")[0] == {
        "LF-615"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


PACKED = {
    "GPTQ": {
        "q.qweight": np.zeros((1, 6), np.int32),
        "q.qzeros": np.zeros((1, 1), np.int32),
        "q.scales": normal(1, 6),
        "q.g_idx": np.zeros(8, np.int32),
    },
    "AWQ": {"q.qweight": np.zeros((8, 1), np.int32), "q.qzeros": np.zeros((1, 1), np.int32), "q.scales": normal(1, 8)},
    "MXFP4": {"q.weight_blocks": np.zeros((6, 2, 16), np.uint8), "q.weight_scales": np.zeros((6, 2), np.uint8)},
    "compressed-tensors, packed": {"q.weight_packed": np.zeros((6, 1), np.int32), "q.weight_scale": normal(6, 1)},
    "HQQ": {"q.W_q": np.zeros((6, 4), np.uint8)},
}


@pytest.mark.parametrize("name", PACKED)
def test_what_is_packed_is_refused_by_the_name_of_its_form(name, tmp_path):
    write(tmp_path / "base", PACKED[name])
    for requantize in (False, True):
        found, said = refusal(
            lf.merge, change(6, 8, 1.0), lf.open_base(tmp_path / "base"), tmp_path / "out", requantize=requantize
        )
        assert found == {"LF-608"}
        assert f"q.weight is stored as {name} (" in said
        assert "merge into the unquantised checkpoint and quantise the result" in said


def test_an_order_of_a_gpu_is_not_taken_for_rows(tmp_path):
    _, held, _ = golden("int8", tmp_path)
    write(tmp_path / "turing", {**held, "q.weight_format": np.array(2, np.uint8)})
    found = refusal(
        lf.merge, change(150, 260, 1.0), lf.open_base(tmp_path / "turing"), tmp_path / "out", requantize=True
    )[0]
    assert found == {"LF-608"}


def test_a_method_that_only_the_configuration_names_is_named(tmp_path):
    config = {**LLAMA, "quantization_config": {"quant_method": "eetq"}}
    write(tmp_path / "base", {"q.weight": np.zeros((6, 8), np.int8)}, config)
    assert (
        "q.weight is stored as EETQ (config.json says eetq)"
        in refusal(lf.merge, change(6, 8, 1.0), lf.open_base(tmp_path / "base"), tmp_path / "out", requantize=True)[1]
    )


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [((150, 260), (2, 3), (128, 128)), ((150, 260), (150, 1), (1, 260)), ((150, 260), (1,), (150, 260)), ((150, 260), (150,), (1, 260)), ((64, 64), (2, 4), (32, 16)), ((150, 260), (7, 3), None), ((150, 260), (2, 3, 1), None)],
)  # fmt: skip
def test_the_block_of_a_scale_follows_from_how_many_there_are(shape, grid, block):
    scaling = Scaling.of(normal(*grid), 1.0, shape)
    assert (scaling and scaling.block) == block


# On the command line.


def test_the_plan_estimates_and_the_proof_states_what_survives(run, tmp_path):
    write(tmp_path / "base", {"q.weight": normal(90, 70).astype(BF16), "k.weight": normal(90, 70, seed=5).astype(BF16)})
    lf.save(lf.Adapter({**change(90, 70, 0.01), **change(90, 70, 0.1, "k.weight")}), tmp_path / "a.safetensors")
    words = ("merge", "a.safetensors", "--into", "base", "-o", "out")
    told = run(*words, "--plan")
    assert told.code == 0
    assert "of ΔW survives about 90–99 %" in told.out
    assert "the least: q.weight" in told.out
    estimate = run(*words, "--plan", "--json").json["survival"]
    done = run(*words, "--json").json["targets"]
    for key, value in estimate.items():
        assert value == pytest.approx(done[key]["survival"], abs=0.01)
        assert 0.5 < value < 0.999
    told = run(*words, "--force")
    assert "% of ΔW, " in told.err
    assert "% of all" in told.err
    told = run(*words, "--force", "--survival", "0.99")
    assert (told.code, "LF-615" in told.err) == (1, True)
    assert run(*words, "--force", "--survival", "2").code == 2


def test_the_command_requantises_when_asked_and_verifies_it(run, tmp_path):
    golden("int8", tmp_path)
    lf.save(change(150, 260, 0.1), tmp_path / "a.safetensors")
    words = ("merge", "a.safetensors", "--into", "int8", "-o", "out")
    assert run(*words).code == 1
    told = run(*words, "--requantize", "--verify")
    assert told.code == 0, told.err
    assert "out: equals base + adapter" in told.err
    assert load_file(tmp_path / "out/model.safetensors")["q.weight"].dtype == np.int8
